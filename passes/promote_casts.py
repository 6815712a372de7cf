"""Promote casts: compute in float64 what a model casts to float32.

    y = _to_copy(x, dtype=float32)  →  y = _to_copy(x, dtype=float64)

Not in the pipeline: it changes what a model computes in its last digits. To tell rounding from
error, put it before the pipeline, `compile(..., passes=(drop_assertions, promote_casts,
*PIPELINE))`: in a float64 model the ledger then closes to the precision of float64.
"""

from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.passes.base import PassContext, PassResult


def promote_casts(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace float32 by float64 wherever an op names it."""
    result = PassResult("promote_casts")
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        given = node.args, node.kwargs
        promoted = fx.node.map_aggregate(given, _promoted)
        if promoted != given:
            node.args, node.kwargs = promoted
            result.changes += 1
        node.meta["val"] = fx.node.map_aggregate(node.meta.get("val"), _doubled)
    if result.changes:
        graph_module.recompile()
    return result


def _promoted(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def _doubled(value: Any) -> Any:
    """A value that a promoted op computes now."""
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value
