"""Drop assertions on shapes, dtypes and symbols that export leaves in a graph.

Meaning on valid inputs is unchanged; inputs are checked before the program runs.
"""

from torch import fx

from attnlrp_fx.graph.provenance import target_name
from attnlrp_fx.passes.base import PassContext, PassResult, finish

ASSERTIONS = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_constrain_range")


def drop_assertions(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Erase every call whose only effect is to raise."""
    result = PassResult("drop_assertions")
    for node in reversed(list(graph_module.graph.nodes)):
        if is_assertion(node) and not node.users:
            graph_module.graph.erase_node(node)
            result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


def is_assertion(node: fx.Node) -> bool:
    """Whether a node is an assertion of export's."""
    if node.op == "call_module":
        return str(node.target).startswith("_guards")
    name = target_name(node.target) if node.op == "call_function" else ""
    return any(assertion in name for assertion in ASSERTIONS) or "torch._check" in name
