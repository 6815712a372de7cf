"""In-place ops of an exported graph become functional, without tracing it again.

    t.mul_(2)            →  t' = mul(t, 2);  whoever reads t from here on reads t'
    x[:, 0].fill_(1)     →  s = full_like(x[:, 0], 1);  x' = select_scatter(x, s, 1, 0)

Values that share memory, as their fake values tell, are one value and views of it. A write is taken
from the view through the inverse of each view on its way to the value that owns the memory; a view
that is read after a write to its memory is taken again. So autograd sees what it would have seen.

What cannot be written so is left to PyTorch's own functionalisation: writes into inputs, into views
without an inverse (expand, as_strided, diagonal), and ops that write more than one argument.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.graph.operators import aten, is_op
from attnlrp_fx.torch_private import storage_of

FILLS = {aten.zero_: aten.zeros_like.default, aten.fill_: aten.full_like.default}
"""In-place ops whose functional forms no table has, and what they are with a number."""
SCATTERS = {"select": aten.select_scatter.default, "slice": aten.slice_scatter.default}
"""Views of a part, and how a part is put back."""
RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
SAME = ("to", "contiguous", "alias", "dropout")
"""Ops that may return what they are given."""


class Unsupported(Exception):
    """A write that has no functional form here."""


def is_mutable(node: fx.Node) -> bool:
    """Whether a node writes into one of its arguments."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def drop_mutations(graph_module: fx.GraphModule) -> bool:
    """Make every in-place op functional.

    Returns:
        Whether that was possible; if not, the graph is left half changed and is of no use.
    """
    writes = [node for node in graph_module.graph.nodes if is_mutable(node)]
    if not writes:
        return True
    try:
        _Functional(graph_module.graph, writes).rewrite()
    except Unsupported:
        return False
    for node in reversed(writes):
        graph_module.graph.erase_node(node)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return True


class _Functional:
    """One walk over a graph, in which each argument is replaced by what it holds by then."""

    def __init__(self, graph: fx.Graph, writes: list[fx.Node]) -> None:
        self.graph = graph
        written = {_storage(node) for node in writes} - {None}
        owners: dict[int | None, fx.Node] = {}
        self.owner: dict[fx.Node, fx.Node] = {}
        """The value that owns the memory, of each value in memory that is written."""
        for node in graph.nodes:
            storage = _storage(node)
            if storage in written and not _is_only_copied(node):
                self.owner[node] = owners.setdefault(storage, node)
        self.viewed = {node: self._viewed(node) for node in self.owner}
        """What each value is a view of, None for an owner."""
        self.read: dict[fx.Node, fx.Node] = {}
        """What a view's own argument became."""
        self.version = dict.fromkeys(owners.values(), 0)
        self.now: dict[fx.Node, tuple[int, fx.Node]] = {}
        """What each value became, and at which version of its memory."""

    def rewrite(self) -> None:
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                if not node.all_input_nodes:
                    continue
                given = fx.node.map_arg((node.args, node.kwargs), self.value)
                if is_mutable(node):
                    self._write(node, *given)
                    continue
                viewed = self.viewed.get(node)
                if viewed is not None:
                    self.read[node] = self.value(viewed)
                if node in self.owner:
                    self.now[node] = self.version[self.owner[node]], node
                node.args, node.kwargs = given

    def value(self, node: fx.Node) -> fx.Node:
        """The node that holds by now what a node of the original graph holds."""
        if node not in self.owner:
            return node
        version = self.version[self.owner[node]]
        known, now = self.now.get(node, (0, node))
        if known != version:
            viewed = self.viewed[node]
            assert viewed is not None
            taken, read = self.value(viewed), self.read.get(node)
            now = taken
            if not is_mutable(node):
                now = self.graph.node_copy(node, lambda leaf: taken if leaf is read else leaf)
            self.now[node] = version, now
        return now

    def _viewed(self, node: fx.Node) -> fx.Node | None:
        owner = self.owner[node]
        if owner is node:
            return None
        if is_op(node, "as_strided"):
            raise Unsupported
        found = (leaf for leaf in node.all_input_nodes if self.owner.get(leaf) is owner)
        if (viewed := next(found, None)) is None:
            raise Unsupported
        return viewed

    def _write(self, node: fx.Node, args: Any, kwargs: Any) -> None:
        """Compute what an in-place op leaves behind, and take it to the owner of the memory."""
        target: Any = node.args[0]
        owner = self.owner.get(target)
        if owner is None or owner.op != "call_function":
            raise Unsupported
        new = self._functional(node, args, kwargs)
        path, whole = target, new
        while (viewed := self.viewed[path]) is not None:
            whole = whole if is_mutable(path) else self._put_back(path, viewed, whole)
            path = viewed
        self.version[owner] += 1
        for leaf, now in ((target, new), (node, new), (owner, whole)):
            self.now[leaf] = self.version[owner], now

    def _functional(self, node: fx.Node, args: Any, kwargs: Any) -> fx.Node:
        """The functional form of an in-place op, in the dtype of what it writes into."""
        written = node.all_input_nodes[0].meta["val"]
        op = _functional_op(node)
        new = self._call(op, node, args, kwargs, node.meta["val"])
        given = [leaf.meta.get("val") for leaf in node.all_input_nodes]
        dtypes = [v.dtype for v in given if isinstance(v, Tensor) and v.is_floating_point()]
        if is_op(node, "copy_") or all(dtype == written.dtype for dtype in dtypes):
            return new
        return self._call(aten._to_copy.default, node, (new,), {"dtype": written.dtype}, written)

    def _put_back(self, view: fx.Node, viewed: fx.Node, part: fx.Node) -> fx.Node:
        """The value that was viewed, with a part in it that was written."""
        value, whole = viewed.meta["val"], self.value(viewed)
        rest: Sequence[Any] = view.args[1:]
        for name, scatter in SCATTERS.items():
            if is_op(view, name):
                return self._call(scatter, view, (whole, part, *rest), {}, value)
        if is_op(view, *SAME):
            return part
        if is_op(view, "transpose"):
            return self._call(aten.transpose.int, view, (part, *rest), {}, value)
        if is_op(view, "t"):
            return self._call(aten.t.default, view, (part,), {}, value)
        if is_op(view, "permute"):
            order = [d % value.dim() for d in rest[0]]
            inverse = [order.index(d) for d in range(value.dim())]
            return self._call(aten.permute.default, view, (part, inverse), {}, value)
        if is_op(view, *RESHAPES):
            sizes = [self._size(whole, d, size) for d, size in enumerate(value.shape)]
            return self._call(aten.reshape.default, view, (part, sizes), {}, value)
        raise Unsupported

    def _size(self, node: fx.Node, dim: int, size: Any) -> Any:
        if isinstance(size, int):
            return size
        return self._call(aten.sym_size.int, node, (node, dim), {}, size)

    def _call(self, op: Any, source: fx.Node, args: Any, kwargs: Any, value: Any) -> fx.Node:
        """A new node with the provenance of another."""
        new = self.graph.call_function(op, args, kwargs)
        new.meta = {**source.meta, "val": value}
        return new


def _functional_op(node: fx.Node) -> Any:
    """The op that returns what an in-place op writes."""
    target: Any = node.target
    if target is aten.fill_.Tensor:
        return aten.copy.default
    if target.overloadpacket in FILLS:
        return FILLS[target.overloadpacket]
    name = target.overloadpacket.__name__
    functional = getattr(aten, name.removesuffix("_"), None)
    overload = getattr(functional, target._overloadname, None)
    arguments = target._schema.arguments
    writes = [i for i, argument in enumerate(arguments) if argument.is_write]
    is_aten = target.namespace == "aten" and name.endswith("_") and writes == [0]
    if not is_aten or overload is None or len(overload._schema.arguments) != len(arguments):
        raise Unsupported
    return overload


def _is_only_copied(node: fx.Node) -> bool:
    """Whether a node is a constant of the model's code: its copy has memory of its own."""
    return node.op == "get_attr" and all(is_op(user, "lift_fresh_copy") for user in node.users)


def _storage(node: fx.Node) -> int | None:
    """The memory that a node's value lies in; of parts, that of what they are parts of.

    Several new results have memory of their own each, and none in common.
    """
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        value = next((part for part in value if isinstance(part, Tensor)), None)
        taken = [leaf.meta.get("val") for leaf in node.all_input_nodes]
        if value is None or not any(_share_memory(value, one) for one in taken):
            return None
    if not isinstance(value, Tensor):
        return None
    return _memory(value)


def _share_memory(one: Tensor, other: Any) -> bool:
    return isinstance(other, Tensor) and _memory(one) == _memory(other)


def _memory(value: Tensor) -> int:
    try:
        return storage_of(value)
    except NotImplementedError as error:  # a tensor of functorch's, left by a vmapped mask
        raise Unsupported from error
