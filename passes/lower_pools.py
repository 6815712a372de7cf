"""Lower global average pooling to the mean that it is.

    y = adaptive_avg_pool2d(x, 1)  →  mean(x, (-2, -1), keepdim=True)

PyTorch's own kernel for this case writes its result in place, which a traced program cannot hold.
"""

from typing import Any

from torch import fx

from attnlrp_fx.graph.operators import aten
from attnlrp_fx.passes.base import PassContext, PassResult, finish

POOLS = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten._adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten._adaptive_avg_pool3d.default: 3,
}
"""Adaptive pools and over how many dimensions they pool."""


def lower_pools(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace every adaptive average pool to a single position."""
    result = PassResult("lower_pools")
    for pool, dims in POOLS.items():
        for node in graph_module.graph.find_nodes(op="call_function", target=pool):
            x, size = node.args
            if not _is_one(size):
                result.miss(node, f"it pools to {size}, not to one position")
                continue
            node.target = aten.mean.dim
            node.args = (x, list(range(-dims, 0)), True)
            result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


def _is_one(size: Any) -> bool:
    return size == 1 or (isinstance(size, list | tuple) and all(part == 1 for part in size))
