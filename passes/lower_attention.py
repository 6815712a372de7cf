"""Write fused attention out, where its weights are asked for.

    y = scaled_dot_product_attention(q, k, v, m)  →  w = softmax(c · q kᵀ + m)
                                                     y = w v

The rules of the parts and of the whole give the same relevance. A masked score gets the least
number of its dtype, which swallows any score, so that no row is NaN; a row that is masked
throughout gives zero, as the fused kernels do.
"""

from functools import partial
from typing import Any

import torch
from torch import fx

from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.operators import aten, is_op
from attnlrp_fx.passes.base import PassContext, PassResult, call, finish, replace
from attnlrp_fx.rules.latent_roles import LatentRole

NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def lower_attention(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace every fused attention by its parts, if attention weights are asked for."""
    result = PassResult("lower_attention")
    graph = graph_module.graph
    if LatentRole.WEIGHTS not in context.latent:
        return result
    explained = explained_values(graph)
    for node in list(graph.nodes):
        if node in explained and is_op(node, "scaled_dot_product_attention"):
            with graph.inserting_before(node):
                new = _written_out(node, explained)
            replace(node, new, result.name)
            graph.erase_node(node)  # an op that may drop at random is never dead to torch.fx
            result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


def _written_out(node: fx.Node, explained: set[fx.Node]) -> fx.Node:
    """The nodes of one attention, the last of them returned."""
    write = partial(call, node, "lower_attention")
    given: dict[str, Any] = {**dict(zip(NAMES, node.args, strict=False)), **node.kwargs}
    query, key, value = (given[name] for name in NAMES[:3])
    if given.get("enable_gqa"):
        groups = query.meta["val"].shape[-3] // key.meta["val"].shape[-3]
        key, value = (write(aten.repeat_interleave.self_int, x, groups, -3) for x in (key, value))
    scale = given.get("scale")
    scale = query.meta["val"].shape[-1] ** -0.5 if scale is None else scale
    product = write(aten.matmul.default, query, write(aten.transpose.int, key, -2, -1))
    scores = write(aten.mul.Tensor, product, scale)
    scores, masked = _masked(node, scores, given, explained)
    weights = write(aten.softmax.int, scores, -1)
    output = write(aten.matmul.default, weights, value)
    return output if masked is None else write(aten.masked_fill.Scalar, output, masked, 0.0)


def _masked(
    node: fx.Node, scores: fx.Node, given: dict[str, Any], explained: set[fx.Node]
) -> tuple[fx.Node, fx.Node | None]:
    """The scores with their mask, and which rows are masked throughout, if any can be."""
    write = partial(call, node, "lower_attention")
    least = torch.finfo(scores.meta["val"].dtype).min
    mask = given.get("attn_mask")
    if given.get("is_causal"):
        rows = write(aten.arange.default, write(aten.sym_size.int, scores, -2))
        columns = write(aten.arange.default, write(aten.sym_size.int, scores, -1))
        kept = write(aten.le.Tensor, columns, write(aten.unsqueeze.default, rows, -1))
        hidden = write(aten.logical_not.default, kept)
        return write(aten.masked_fill.Scalar, scores, hidden, least), None
    if mask is None:
        return scores, None
    if mask in explained:
        return write(aten.add.Tensor, scores, mask), None
    if mask.meta["val"].dtype == torch.bool:
        hidden = write(aten.logical_not.default, mask)
        filled = write(aten.masked_fill.Scalar, scores, hidden, least)
    else:
        hidden = write(aten.eq.Scalar, mask, -torch.inf)
        bias = write(aten.clamp_min.default, mask, least / 2)
        filled = write(aten.add.Tensor, scores, bias)
    return filled, write(aten.all.dim, hidden, -1, True)
