"""A captured graph in another dtype, without capturing the model again.

The model's tensors and floating inputs are of the new dtype; every op runs in the dtypes that this
leads to. Where a value of the new dtype meets one of the old, the new wins. A dtype that an op
names is kept if it is float32, in which models compute norms and logits on purpose; any other that
was the model's own is the new one. So a graph does what the model's code does after
`model.to(dtype)`, as far as that can be told from a graph.

What depends on no parameter, as a mask does, is clamped where it becomes narrower: the least
float32 is no number in float16.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.capture.capture import Captured
from attnlrp_fx.graph.operators import aten, is_op
from attnlrp_fx.torch_private import fake_mode_of, lazy_graph_module

_CASTS = ("to", "_to_copy", "type_as")


def main_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype | None:
    """The floating dtype that most numbers of some tensors have; None without any."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return counts.most_common(1)[0][0] if counts else None


def retyped(
    captured: Captured, tensors: Mapping[str, Tensor], old: torch.dtype, new: torch.dtype
) -> Captured:
    """A captured graph in another dtype.

    Args:
        captured: the graph.
        tensors: what it reads, by name, in the new dtype.
        old: the model's dtype when it was captured.
        new: its dtype now.
    """
    graph = _Retyping(captured.graph_module, tensors, old, new).graph
    graph_module = lazy_graph_module(captured.graph_module, graph)
    for name in {str(node.target) for node in graph.find_nodes(op="get_attr")} & tensors.keys():
        path, _, leaf = name.rpartition(".")
        setattr(graph_module.get_submodule(path), leaf, tensors[name])

    def moved(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: v.to(new) if v.dtype == old else v for n, v in inputs.items()}

    return replace(
        captured,
        graph_module=graph_module,
        example=moved(captured.example),
        given=moved(captured.given),
        notes=(*captured.notes, f"computes in {new}, captured in {old}"),
    )


class _Retyping:
    """Copies a graph node by node, each with the dtype that its arguments lead to."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        tensors: Mapping[str, Tensor],
        old: torch.dtype,
        new: torch.dtype,
    ) -> None:
        self.tensors, self.old, self.new = tensors, old, new
        self.mode = fake_mode_of(graph_module)
        self.graph = fx.Graph()
        self._copies: dict[fx.Node, fx.Node] = {}
        self._casts: dict[fx.Node, fx.Node] = {}
        self._varying: set[fx.Node] = set()
        for node in graph_module.graph.nodes:
            self._copies[node] = self._copy(node)

    def _copy(self, node: fx.Node) -> fx.Node:
        copy = self.graph.node_copy(node, self._copies.__getitem__)
        value: Any = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.dtype == self.old:
            copy.meta["val"] = self._cast_value(value)
            self._varying.add(copy)
        elif node.op == "get_attr" and str(node.target) in self.tensors:
            tensor = self.tensors[str(node.target)]
            with self.mode:
                copy.meta["val"] = torch.empty_like(value, dtype=tensor.dtype)
            if isinstance(tensor, torch.nn.Parameter):
                self._varying.add(copy)
        elif node.op == "call_function":
            self._compute(copy)
        return copy

    def _compute(self, node: fx.Node) -> None:
        if self.old != torch.float32:
            node.args, node.kwargs = fx.node.map_aggregate(
                (node.args, node.kwargs), lambda leaf: self.new if leaf is self.old else leaf
            )
        dtypes = {getattr(leaf.meta["val"], "dtype", None) for leaf in node.all_input_nodes}
        if {self.old, self.new} <= dtypes and not is_op(node, *_CASTS):
            for leaf in node.all_input_nodes:
                if getattr(leaf.meta["val"], "dtype", None) == self.old:
                    node.replace_input_with(leaf, self._cast(leaf, node))
        if any(leaf in self._varying for leaf in node.all_input_nodes):
            self._varying.add(node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda leaf: leaf.meta["val"])
        assert callable(node.target)
        with self.mode:
            node.meta["val"] = node.target(*args, **kwargs)

    def _cast(self, leaf: fx.Node, before: fx.Node) -> fx.Node:
        """A value in the new dtype, once for all that read it."""
        if leaf in self._casts:
            return self._casts[leaf]
        limits, source = torch.finfo(self.new), leaf
        with self.graph.inserting_before(before):
            if leaf not in self._varying and limits.max < torch.finfo(self.old).max:
                source = self._call(leaf, aten.clamp.default, leaf, limits.min, limits.max)
            cast = self._call(leaf, aten._to_copy.default, source, dtype=self.new)
        cast.meta["val"] = self._cast_value(leaf.meta["val"])
        if leaf in self._varying:
            self._varying.add(cast)
        self._casts[leaf] = cast
        return cast

    def _call(self, like: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(op, args, kwargs)
        node.meta = dict(like.meta)
        return node

    def _cast_value(self, value: Tensor) -> Tensor:
        with self.mode:
            return torch.empty_like(value, dtype=self.new)
