"""Lower functional copies: `copy(a, b)` is b, cast and expanded to a.

    y = copy(a, b)  →  expand(_to_copy(b, a.dtype), a.shape)

What remains of an in-place `a.copy_(b)` after functionalisation; a itself does not matter.
"""

import torch
from torch import Tensor, fx

from attnlrp_fx.graph.operators import aten, is_op
from attnlrp_fx.passes.base import PassContext, PassResult, finish, replace


def lower_copies(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace each functional copy by a cast and an expansion."""
    result = PassResult("lower_copies")
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.copy.default):
        destination, value = node.args[:2]
        assert is_op(node, "copy")
        to, what = destination.meta["val"], value.meta["val"]
        new = value
        with graph.inserting_before(node):
            if to.dtype != what.dtype:
                new = graph.call_function(aten._to_copy.default, (new,), {"dtype": to.dtype})
                new.meta = {**node.meta, "val": what.to(to.dtype)}
            if tuple(map(str, to.shape)) != tuple(map(str, what.shape)):
                sizes = [_size(graph, destination, d) for d in range(to.dim())]
                new = graph.call_function(aten.expand.default, (new, sizes))
                new.meta = dict(node.meta)
        if new is value:
            node.replace_all_uses_with(value)
        else:
            replace(node, new, result.name)
        graph.erase_node(node)
        result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


def _size(graph: fx.Graph, tensor: fx.Node, dim: int) -> int | fx.Node:
    """A tensor's size as a number, or as a node where it is symbolic."""
    value = tensor.meta["val"]
    assert isinstance(value, Tensor)
    size: int | torch.SymInt = value.shape[dim]
    if isinstance(size, int):
        return size
    node = graph.call_function(aten.sym_size.int, (tensor, dim))
    node.meta["val"] = size
    return node
