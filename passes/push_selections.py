"""Push selections up: compute only what is read of a sequence.

    y = select(linear(gelu(x), w, b), 1, 0)  →  y = select(linear(gelu(s), w, b), 1, 0)
                                                 with s = unsqueeze(select(x, 1, 0), 1)

A classifier reads one token, a language model's logit one position. What stands between that and
the last attention then works on one position, and of the attention the query alone. A value becomes
the selected part of itself if everything that reads it wants that part and no other; so what keys
and values are made of stays whole, and nothing is computed twice. The results are equal.
"""

from collections import defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import aten, is_elementwise, is_op, leaves
from attnlrp_fx.passes.base import PassContext, PassResult, call, compute, finish


@dataclass(frozen=True)
class Selection:
    """One place along a dimension: the same for all rows, or one for each."""

    index: int
    rows: fx.Node | None = None
    """(batch,) int64: the place in each row; then the index does not count."""


@dataclass(frozen=True)
class Part:
    """What is wanted of a value: a selection along one of its dimensions."""

    selection: Selection
    dim: int


def push_selections(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Compute values for a selected position alone where nothing else of them is read."""
    result = PassResult("push_selections")
    graph = graph_module.graph
    wanted: dict[fx.Node, list[Part | None]] = defaultdict(list)
    plans: dict[fx.Node, tuple[Part, dict[int, int]]] = {}
    starts: dict[fx.Node, Part] = {}
    for node in reversed(graph.nodes):
        part = _agreed(wanted[node])
        is_whole = node.target is ops.latent and not (context.sliced and len(node.args) == 1)
        dims = _operand_dims(node, part) if part is not None and not is_whole else None
        if part is not None and dims is not None:
            plans[node] = part, dims
            for i, arg in enumerate(node.args):
                want = Part(part.selection, dims[i]) if i in dims else None
                for leaf in leaves(arg):
                    wanted[leaf].append(want)
            for leaf in leaves(node.kwargs):
                wanted[leaf].append(None)
            continue
        start = _start(node)
        for i, arg in enumerate((*node.args, node.kwargs)):
            for leaf in leaves(arg):
                wanted[leaf].append(start if i == 0 else None)
        if start is not None:
            starts[node] = start
    for rows in {part.selection.rows: None for part, _ in plans.values()}:
        if rows is not None:
            _compute_early(rows)
    taken: dict[tuple[fx.Node, Part], fx.Node] = {}
    for node in list(graph.nodes):
        if node in plans:
            part, dims = plans[node]
            args = [
                _operand(node, arg, Part(part.selection, dims[i]), plans.keys(), taken)
                if i in dims
                else arg
                for i, arg in enumerate(node.args)
            ]
            _become(node, part, args)
            result.changes += 1
        elif node in starts and node.args[0] in plans:
            _restart(node, starts[node])
    if result.changes:
        finish(graph_module)
    return result


def _agreed(wishes: Sequence[Part | None]) -> Part | None:
    """The one part that every user wants, None if there is no such."""
    return wishes[0] if wishes and all(wish == wishes[0] for wish in wishes) else None


def _start(node: fx.Node) -> Part | None:
    """What a node that reads one place of its first argument wants of it."""
    args: Any = node.args
    if is_op(node, "select"):
        return _part(*args)
    if is_op(node, "slice") and len(args) == 4:
        x, dim, first, end = args
        is_last = first == -1 and isinstance(end, int) and end >= 2**31
        return _part(x, dim, first) if is_last or end == _next(first) else None
    if is_op(node, "index") and len(args[1]) == 2:
        x, (rows, places) = args
        is_counted = isinstance(rows, fx.Node) and is_op(rows, "arange") and len(rows.args) == 1
        if is_counted and isinstance(places, fx.Node) and places.meta["val"].dim() == 1:
            same = str(x.meta["val"].shape[0]) == str(rows.meta["val"].shape[0])
            known = not any(node.target is ops.source for node in _made_of(places))
            return Part(Selection(0, places), 1) if same and known and _is_sequence(x) else None
    return None


def _made_of(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from, in the graph's order."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        leaf = stack.pop()
        if leaf not in found:
            found.add(leaf)
            stack += leaf.all_input_nodes
    return [leaf for leaf in node.graph.nodes if leaf in found]


def _compute_early(rows: fx.Node) -> None:
    """Move what places are computed from to the head of the graph."""
    anchor = rows.graph.find_nodes(op="placeholder")[-1]
    for node in _made_of(rows):
        if node.op != "placeholder":
            anchor.append(node)
            anchor = node


def _next(first: Any) -> int | None:
    return first + 1 if isinstance(first, int) and first >= 0 else None


def _is_sequence(x: fx.Node) -> bool:
    """Whether a value is floating and has a dimension beside the batch."""
    value = x.meta["val"]
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1


def _part(x: fx.Node, dim: int, index: Any) -> Part | None:
    if not _is_sequence(x) or not isinstance(index, int) or index < -1:
        return None
    value = x.meta["val"]
    dim = dim % value.dim()
    return None if dim == 0 or _is_one(value.shape[dim]) else Part(Selection(index), dim)


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _operand_dims(node: fx.Node, part: Part) -> dict[int, int] | None:
    """Which arguments are wanted in part, by position, and along which dimension.

    None where the part of a node cannot be had from parts of its arguments.
    """
    if part.selection.rows is not None and not _has_batch_first(node):
        return None
    if node.op == "call_module" or is_elementwise(node) or is_op(node, "contiguous", "alias"):
        return _elementwise(node, part)
    if node.target in ops.MARKERS or node.target is ops.latent:
        return {0: part.dim}
    known = next((dims for names, dims in _DIMS.items() if is_op(node, *names)), None)
    if known is None or "attn_mask" in node.kwargs:
        return None
    dims: dict[int, int] | None = known(node.args, node.meta["val"], part)
    return dims


def _has_batch_first(node: fx.Node) -> bool:
    """Whether rows are the first dimension of a value, and of what it is a view of."""
    if _is_one(node.meta["val"].shape[0]):
        return False
    args: Any = node.args
    rank = node.meta["val"].dim()
    if is_op(node, "transpose"):
        return 0 not in (args[1] % rank, args[2] % rank)
    if is_op(node, "permute"):
        return bool(args[1][0] % rank == 0)
    if is_op(node, "select", "unsqueeze"):
        ranks = rank + 1 if is_op(node, "select") else rank
        return bool(args[1] % ranks != 0)
    return True


def _elementwise(node: fx.Node, part: Part) -> dict[int, int] | None:
    """Operands that have the dimension; one that is broadcast along it stays."""
    rank = node.meta["val"].dim()
    found = {}
    for i, arg in enumerate(node.args):
        if not isinstance(arg, fx.Node):
            continue
        value = arg.meta["val"]
        dim = part.dim - (rank - value.dim())
        if dim < 0 or _is_one(value.shape[dim]):
            continue
        if str(value.shape[dim]) != str(node.meta["val"].shape[part.dim]):
            return None
        if part.selection.rows is not None and not _has_rows(value, dim, rank):
            return None
        found[i] = dim
    return found


def _has_rows(value: Tensor, dim: int, rank: int) -> bool:
    """Whether a place of its own can be taken for each row of the batch."""
    return value.dim() == rank and dim > 0


def _rows_stay(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    """A linear layer: rows stay apart."""
    return {0: part.dim} if part.dim < value.dim() - 1 else None


def _softmax(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    return None if args[1] % value.dim() == part.dim else {0: part.dim}


def _norm(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    return {0: part.dim} if part.dim < value.dim() - len(args[1]) else None


def _matmul(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    """Rows of the first factor are rows of the product."""
    rank = value.dim()
    return {0: part.dim} if part.dim == rank - 2 and args[0].meta["val"].dim() == rank else None


def _attention(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    """Queries are rows of the result; a mask has a row for each query."""
    if part.dim != 2 or value.dim() != 4:
        return None
    queries, keys = (str(operand.meta["val"].shape[2]) for operand in args[:2])
    if len(args) > 5 and args[5] and queries != keys:
        return None
    found = {0: part.dim}
    if len(args) > 3 and args[3] is not None:
        mask = args[3].meta["val"]
        if mask.dim() != 4:
            return None
        if not _is_one(mask.shape[2]):
            found[3] = 2
    return found


def _reduced(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    """A sum or a mean along other dimensions, kept as ones."""
    keeps = len(args) > 2 and args[2] is True
    if not keeps or not isinstance(args[1], list | tuple):
        return None
    return None if part.dim in [dim % value.dim() for dim in args[1]] else {0: part.dim}


def _view(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    """A view that leaves everything up to the dimension as it is."""
    before, after = (x.shape[: part.dim + 1] for x in (args[0].meta["val"], value))
    return {0: part.dim} if list(map(str, before)) == list(map(str, after)) else None


def _transpose(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    a, b = (dim % value.dim() for dim in args[1:3])
    return {0: {a: b, b: a}.get(part.dim, part.dim)}


def _permute(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    return {0: args[1][part.dim] % value.dim()}


def _unsqueeze(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    new = args[1] % value.dim()
    return None if new == part.dim else {0: part.dim - (new < part.dim)}


def _select(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    gone = args[1] % (value.dim() + 1)
    return {0: part.dim + (gone <= part.dim)}


def _along(args: Any, value: Tensor, part: Part) -> dict[int, int] | None:
    """A slice or a concatenation along another dimension."""
    along = args[1] if len(args) > 1 else 0
    return None if along % value.dim() == part.dim else {0: part.dim}


_DIMS: dict[tuple[str, ...], Any] = {
    ("linear",): _rows_stay,
    ("softmax", "_softmax"): _softmax,
    ("layer_norm", "rms_norm"): _norm,
    ("matmul", "bmm"): _matmul,
    ("scaled_dot_product_attention",): _attention,
    ("sum", "mean"): _reduced,
    ("view", "reshape", "_unsafe_view", "flatten", "unflatten"): _view,
    ("transpose",): _transpose,
    ("permute",): _permute,
    ("unsqueeze",): _unsqueeze,
    ("select",): _select,
    ("slice", "cat"): _along,
}
"""Ops beside elementwise ones, and how a part of theirs is made of parts of their arguments."""


def _operand(
    node: fx.Node,
    arg: Any,
    want: Part,
    plans: Set[fx.Node],
    taken: dict[tuple[fx.Node, Part], fx.Node],
) -> Any:
    """The part of an argument that a node wants: the argument, where it has become that part."""

    def part_of(leaf: fx.Node) -> fx.Node:
        if leaf in plans:
            return leaf
        if (leaf, want) not in taken:
            taken[leaf, want] = _taken(node, leaf, want)
        return taken[leaf, want]

    return fx.node.map_arg(arg, part_of)


def _taken(node: fx.Node, leaf: fx.Node, want: Part) -> fx.Node:
    """One place of a value that is computed whole, its dimension kept, before the node."""
    write = partial(call, node, "push_selections")
    rows = want.selection.rows
    with node.graph.inserting_before(node):
        if rows is None:
            place = write(aten.select.int, leaf, want.dim, want.selection.index)
        elif _is_one(leaf.meta["val"].shape[0]):
            places = write(aten.index_select.default, leaf, want.dim, rows)
            return write(aten.transpose.int, places, 0, want.dim)
        else:
            batch = write(aten.arange.default, write(aten.sym_size.int, rows, 0))
            between = [None] * (want.dim - 1)
            place = write(aten.index.Tensor, leaf, [batch, *between, rows])
        return write(aten.unsqueeze.default, place, want.dim)


def _become(node: fx.Node, part: Part, given: Sequence[Any]) -> None:
    """Compute a node from parts of its arguments."""
    args: list[Any] = list(given)
    if is_op(node, "view", "reshape", "_unsafe_view"):
        args[1] = [1 if d == part.dim else size for d, size in enumerate(args[1])]
    if is_op(node, "scaled_dot_product_attention") and len(args) > 5 and args[5]:
        args[3], args[5] = _causal(node, args, part), False
    node.args = tuple(args)
    compute(node)


def _causal(node: fx.Node, args: Sequence[Any], part: Part) -> fx.Node | None:
    """The row of a causal mask that belongs to the selected query; the last one masks nothing."""
    rows, index = part.selection.rows, part.selection.index
    if rows is None and index == -1:
        return None
    write = partial(call, node, "push_selections")
    with node.graph.inserting_before(node):
        length = write(aten.sym_size.int, args[1], 2)
        places = write(aten.arange.default, length)
        if rows is not None:
            return write(aten.le.Tensor, places, write(aten.view.default, rows, [-1, 1, 1, 1]))
        return write(aten.view.default, write(aten.le.Scalar, places, index), [1, -1])


def _restart(node: fx.Node, start: Part) -> None:
    """Read the one place that is left of a value."""
    x = node.args[0]
    if is_op(node, "index"):
        node.target = aten.select.int
    if is_op(node, "slice"):
        node.args = (x, start.dim, 0, 1)
    else:
        node.args = (x, start.dim, 0)
