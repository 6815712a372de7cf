"""Raise routing: find the weights by which a router mixes the experts that it has chosen.

    weights, chosen = topk(softmax(router(x)), k)
    y = Σ (weights / Σ weights) · expert(x)

A product's factor is routing if, moved about, rescaled, renormalised, masked or put through a
softmax or sigmoid, it is what a selection chose: the output of top-k, sort or max, or a value
gathered at indices that one of them found. Where the experts' outputs were chosen in the same way,
it is the factor that is one number for all features. AttnLRP explains it like any other factor
(Achtibat et al. 2024, on Mixtral); a composite may hold it constant.
"""

from collections.abc import Set
from typing import Any

from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.operators import (
    Kind,
    explained_factors,
    is_broadcast,
    is_elementwise,
    is_op,
    is_structural,
    kind_of,
    leaves,
)
from attnlrp_fx.passes.base import PassContext, PassResult, finish, mark

CHOOSING = ("topk", "sort", "max", "amax", "argmax", "argsort", "kthvalue")
MOVING = (
    *("gather", "index", "index_select", "take_along_dim", "scatter", "index_put", "where"),
    *("masked_fill", "softmax", "_softmax", "repeat_interleave", "cat", "stack", "flip", "roll"),
)
"""Ops after which what was chosen is still what was chosen, beside views and elementwise ops."""


def raise_routing(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Mark the factor of every product that weighs chosen experts."""
    result = PassResult("raise_routing")
    explained = explained_values(graph_module.graph)
    for node in list(graph_module.graph.nodes):
        factors = explained_factors(node, explained) if node in explained else []
        if len(factors) != 2 or any(factor.target in ops.MARKERS for factor in factors):
            continue
        chosen = [factor for factor in factors if _is_chosen(factor, explained)]
        if len(chosen) == 2:
            chosen = [factor for factor in factors if is_broadcast(factor, node)]
        if len(chosen) == 1:
            explained.add(mark(node, chosen[0], ops.routing, Kind.ROUTING, result))
    if result.changes:
        finish(graph_module)
    return result


def _is_chosen(factor: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a factor is what a selection chose, rescaled or moved at most."""
    seen: set[fx.Node] = set()
    stack = [factor]
    while stack:
        node = stack.pop()
        if node in seen or node not in explained:
            continue
        seen.add(node)
        if is_op(node, *CHOOSING) and kind_of(node, explained) is Kind.SELECTION:
            return True
        if is_op(node, *MOVING) and _has_chosen_indices(node, explained):
            return True
        inputs = [leaf for leaf in node.all_input_nodes if leaf in explained]
        if is_op(node, "div"):
            stack += leaves(node.args[0])
        elif len(inputs) == 1 and (
            is_structural(node) or is_elementwise(node) or is_op(node, *MOVING)
        ):
            stack += inputs
    return False


def _has_chosen_indices(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a selection found the indices or the mask by which an op moves a value."""
    stack = [leaf for leaf in node.all_input_nodes if leaf not in explained]
    seen: set[fx.Node] = set()
    while stack:
        index = stack.pop()
        if index in seen:
            continue
        seen.add(index)
        if is_op(index, *CHOOSING) and _is_floating(index.args[0]):
            return True
        stack += index.all_input_nodes
    return False


def _is_floating(value: Any) -> bool:
    return bool(value.meta["val"].is_floating_point())
