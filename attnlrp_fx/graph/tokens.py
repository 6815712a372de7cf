"""From token indices to what was looked up, and relevance back.

Integer inputs have no relevance of their own: the explained value is what they look up in a table
(an embedding), and its relevance, summed over features, belongs to the index. On the way from the
input to the look-up, indices may be reshaped, cast, sliced, shifted into place, padded, repeated or
offset by constants; each of those ops moves or drops an index and never mixes two, so relevance
goes back by the same moves.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.graph.operators import is_op, is_structural, value_inputs

MOVES = [
    "cat",
    "stack",
    "slice_scatter",
    "select_scatter",
    "flip",
    "roll",
    "repeat",
    "repeat_interleave",
    "tile",
    "pad",
    "constant_pad_nd",
    "copy",
]
FILLS = ["where", "masked_fill", "index_put"]
"""Ops that put indices of the model's own among the moved ones."""
OFFSETS = ["add", "sub"]
SHIFTS = ["add", "sub", "clamp", "clamp_min", "clamp_max"]
"""Ops that change an index by a constant and leave it in its place."""


def table_and_indices(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The table and the indices of a look-up (embedding, or a table indexed by rows), or None."""
    given: Sequence[Any] = node.args
    if is_op(node, "embedding"):
        return given[0], given[1]
    if is_op(node, "index") and len(given[1]) == 1:
        return given[0], given[1][0]
    if is_op(node, "index_select") and given[1] == 0:
        return given[0], given[2]
    return None


def origin(indices: fx.Node) -> fx.Node | None:
    """The input whose own elements a tensor of indices holds, None if it was computed."""
    seen = indices
    while seen.op != "placeholder":
        moved = moved_inputs(seen)
        if not moved:
            return None
        origins = {found for leaf in moved if (found := origin(leaf)) is not None}
        return origins.pop() if len(origins) == 1 else None
    return seen


def moved_inputs(node: fx.Node) -> list[fx.Node]:
    """The integer tensors whose elements a node moves to its output."""
    candidates: list[Any]
    given: Sequence[Any] = node.args
    if node.target is operator.getitem:
        return moved_inputs(given[0]) if is_structural(given[0]) else []
    if is_op(node, *OFFSETS) and all(_is_tensor(arg) for arg in node.args[:2]):
        candidates = _offset(node)
    elif is_structural(node) or is_op(node, *SHIFTS, "repeat_interleave"):
        candidates = [node.args[0]]
        if is_op(node, *SHIFTS) and any(_is_tensor(arg) for arg in node.args[1:]):
            return []
    elif is_op(node, "where"):
        candidates = list(node.args[1:])
    elif is_op(node, "cat", "stack"):
        candidates = list(given[0])
    elif is_op(node, "masked_fill"):
        candidates = [node.args[0]]
    elif is_op(node, "index_put"):
        accumulates = len(node.args) > 3 and node.args[3]
        candidates = [] if accumulates else [node.args[0], node.args[2]]
    elif is_op(node, *MOVES):
        candidates = list(node.args[:2])
    else:
        return []
    return [leaf for leaf in candidates if _is_tensor(leaf) and not _is_floating(leaf)]


def _offset(node: fx.Node) -> list[Any]:
    """The term of a sum or difference that is no constant, if only one is."""
    terms = [arg for arg in node.args[:2] if not _is_constant(arg)]
    return terms if len(terms) == 1 and (is_op(node, "add") or terms[0] is node.args[0]) else []


def _is_constant(node: Any) -> bool:
    """Whether a tensor is the same whatever the inputs hold; their sizes may count."""
    stack, seen = [node], {node}
    while stack:
        leaf = stack.pop()
        if leaf.op == "placeholder":
            return False
        if not is_op(leaf, "sym_size", "sym_numel"):
            stack.extend(new := set(value_inputs(leaf)) - seen)
            seen |= new
    return True


def carry(
    node: fx.Node, relevance: Tensor, env: Mapping[fx.Node, Any]
) -> Iterator[tuple[fx.Node, Tensor]]:
    """Take relevance of moved indices to the tensors that they came from.

    Args:
        node: the op that moved them.
        relevance: of its output, floating, in the output's shape.
        env: the values of all nodes.

    Yields:
        Each moved input that leads to a model input, and its relevance in its shape.
    """
    inputs = [leaf for leaf in moved_inputs(node) if origin(leaf) is not None]
    if is_op(node, *SHIFTS, "_to_copy", "to", "type_as"):
        yield inputs[0], relevance.sum_to_size(env[inputs[0]].shape)
        return
    call = node.args[0] if node.target is operator.getitem else node
    assert isinstance(call, fx.Node)

    def move(*values: Tensor) -> Tensor:
        given = dict(zip(inputs, values, strict=True))

        def value(leaf: fx.Node) -> Any:
            found = given.get(leaf, env[leaf])
            is_index = isinstance(found, Tensor) and found.dtype in (torch.int64, torch.int32)
            moves_it = leaf in moved_inputs(node)
            return found.to(relevance.dtype) if is_index and moves_it else found

        args, kwargs = fx.node.map_arg((call.args, call.kwargs), value)
        assert callable(call.target)
        moved: Any = call.target(*args, **kwargs)
        found: Tensor = moved if call is node else moved[node.args[1]]
        return found

    shadows = [env[leaf].to(relevance.dtype) for leaf in inputs]
    pull = torch.func.vjp(move, *shadows)[1]
    yield from zip(inputs, pull(relevance), strict=True)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def _is_floating(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_floating_point())
