"""Raise attention written out in parts to one scaled dot-product attention.

    s = matmul(q, kᵀ) · scale  (+ mask)           →  y = scaled_dot_product_attention(
    y = matmul(softmax(s, -1), v)                         q, k, v, attn_mask=mask, scale=scale)

The rules of the parts and of the whole give the same relevance; the whole runs on a fused kernel.
A mask that depends on explained values, a cap on the scores, or weights that are also an output
leave the parts as they are.
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from attnlrp_fx.analysis import explained_values
from attnlrp_fx.operators import aten, is_cast, is_op
from attnlrp_fx.passes.base import PassContext, PassResult, finish, replace


@dataclass
class _Scores:
    """Attention scores: query · keyᵀ · scale + mask."""

    query: fx.Node
    key: fx.Node
    scale: float
    mask: fx.Node | None


def raise_attention(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace every written-out attention by the fused op."""
    result = PassResult("raise_attention")
    graph = graph_module.graph
    explained = explained_values(graph)
    for node in list(graph.nodes):
        if not is_op(node, "matmul", "bmm") or node not in explained:
            continue
        weights, value = node.args[:2]
        softmax = _through_casts(weights)
        if not is_op(softmax, "softmax", "_softmax") or softmax not in explained:
            continue
        scores = _scores(softmax, explained)
        if isinstance(scores, str):
            result.miss(node, scores)
            continue
        with graph.inserting_before(node):
            new = _fused(graph, scores, value)
        if new is None:
            result.miss(node, "the mask's dtype or rank does not fit the fused op")
            continue
        replace(node, new, result.name)
        explained.add(new)
        result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


def _through_casts(node: Any) -> fx.Node:
    while is_cast(node):
        node = node.args[0]
    return node


def _scores(softmax: fx.Node, explained: Set[fx.Node]) -> _Scores | str:
    """What the softmax is taken of, or the reason why it is no attention."""
    rank = softmax.meta["val"].dim()
    if softmax.args[1] not in (-1, rank - 1):
        return "the softmax is not over the last dimension"
    current = _through_casts(softmax.args[0])
    mask, scale = None, 1.0
    if is_op(current, "add"):
        terms = list(current.args[:2])
        scored = [term for term in terms if term in explained]
        if len(scored) != 1 or current.kwargs.get("alpha", 1) != 1:
            return f"'{current.name}' adds two explained values: the mask is not a constant"
        terms.remove(scored[0])
        mask, current = terms[0], _through_casts(scored[0])
    if is_op(current, "mul", "div") and isinstance(current.args[1], int | float):
        factor = float(current.args[1])
        scale = factor if is_op(current, "mul") else 1 / factor
        current = _through_casts(current.args[0])
    if not is_op(current, "matmul", "bmm"):
        return f"the scores come from '{current.name}', not from a product of query and key"
    query, transposed = current.args[:2]
    if not is_op(transposed, "transpose", "permute"):
        return f"the second factor of '{current.name}' is not a transposed key"
    if not _swaps_last_two(transposed):
        return f"'{transposed.name}' does not swap the last two dimensions"
    if mask is not None and not isinstance(mask, fx.Node):
        return "the mask is a number"
    return _Scores(query, transposed, scale, mask)


def _swaps_last_two(node: fx.Node) -> bool:
    rank = node.meta["val"].dim()
    if is_op(node, "transpose"):
        return {int(d) % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[arg-type]
    return False


def _fused(graph: fx.Graph, scores: _Scores, value: Any) -> fx.Node | None:
    """The fused op; the key is transposed back, which cancels the transposition."""
    query, key, mask = scores.query.meta["val"], scores.key, scores.mask
    kwargs: dict[str, Any] = {"scale": scores.scale}
    if mask is not None:
        given = mask.meta["val"]
        if not isinstance(given, Tensor) or given.dtype not in (query.dtype,) or given.dim() < 2:
            return None
        kwargs["attn_mask"] = mask
    untransposed = key.args[0]
    target = aten.scaled_dot_product_attention.default
    return graph.call_function(target, (scores.query, untransposed, value), kwargs)
