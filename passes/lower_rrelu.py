"""Lower a randomised leaky ReLU in evaluation mode to the leaky ReLU that it is.

    y = rrelu(x, lower, upper)  →  y = leaky_relu(x, (lower + upper) / 2)

PyTorch's own kernel takes noise to write into, which a traced program cannot hold.
"""

from torch import fx

from attnlrp_fx.graph.operators import aten
from attnlrp_fx.passes.base import PassContext, PassResult, finish, replace


def lower_rrelu(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace every rrelu that draws no numbers."""
    result = PassResult("lower_rrelu")
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.rrelu.default):
        x, lower, upper, training = (*node.args, *(None, 1 / 8, 1 / 3, False)[len(node.args) :])[:4]
        if training:
            result.miss(node, "it draws its slopes")
            continue
        with graph.inserting_before(node):
            new = graph.call_function(aten.leaky_relu.default, (x, (lower + upper) / 2))
        replace(node, new, result.name)
        graph.erase_node(node)
        result.changes += 1
    if result.changes:
        finish(graph_module)
    return result
