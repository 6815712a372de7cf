"""Promote casts: compute in float64 what a model casts to float32.

    y = _to_copy(x, dtype=float32)  →  y = _to_copy(x, dtype=float64)
    y = rsub(mask, 1.0)             →  y = _to_copy(rsub(mask, 1.0), dtype=float64)

Not in the pipeline: it changes what a model computes in its last digits. To tell rounding from
error, put it before the pipeline, `compile(..., passes=(drop_assertions, promote_casts,
*PIPELINE))`: in a float64 model the ledger then closes to the precision of float64.
"""

from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.graph.operators import aten, is_op
from attnlrp_fx.passes.base import PassContext, PassResult, replace


def promote_casts(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace float32 by float64 wherever an op names it, and cast what is float32 unnamed.

    Numbers and integers make float32 where no op names a dtype: 1.0 - mask, torch.zeros(3).
    """
    result = PassResult("promote_casts")
    graph = graph_module.graph
    promoted: set[fx.Node] = set()
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        given = node.args, node.kwargs
        arguments = fx.node.map_aggregate(given, _promoted)
        named = arguments != given
        if named:
            node.args, node.kwargs = arguments
            result.changes += 1
        value = node.meta.get("val")
        if named or any(leaf in promoted for leaf in node.all_input_nodes):
            promoted.add(node)
            node.meta["val"] = fx.node.map_aggregate(value, _doubled)
        elif _is_single(value) and not _takes_single(node) and not all(map(_casts, node.users)):
            promoted.add(_cast(graph, node, result))
    if result.changes:
        graph_module.recompile()
    return result


def _cast(graph: fx.Graph, node: fx.Node, result: PassResult) -> fx.Node:
    """Make float64 of a value that is float32 because no op says otherwise."""
    with graph.inserting_after(node):
        cast = graph.call_function(aten._to_copy.default, (node,), {"dtype": torch.float64})
    replace(node, cast, result.name)
    cast.meta["val"] = _doubled(node.meta["val"])
    result.changes += 1
    return cast


def _casts(node: fx.Node) -> bool:
    return is_op(node, "_to_copy", "to") and torch.float64 in (*node.args, *node.kwargs.values())


def _takes_single(node: fx.Node) -> bool:
    """Whether a node is float32 because an input is: a parameter or an input of the model."""
    return any(_is_single(leaf.meta.get("val")) for leaf in node.all_input_nodes)


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _promoted(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _doubled(value: Any) -> Any:
    """A value that a promoted op computes now."""
    return value.double() if _is_single(value) else value
