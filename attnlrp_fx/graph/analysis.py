"""Which values lie on the way from explained inputs to outputs.

Only floating tensors carry relevance: masks, positions and rotary tables depend on shapes and
integers, and are constants. A value is explained if it is floating, depends on a source, and
reaches an output.
"""

from typing import Any

from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import is_shape_only, value_inputs


def explained_values(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that carry relevance from the graph's sources to its outputs."""
    forward: set[fx.Node] = set()
    for node in graph.nodes:
        is_call = node.op in ("call_function", "call_module") and not is_shape_only(node)
        depends = node.target is ops.source or any(leaf in forward for leaf in value_inputs(node))
        if is_call and depends and _is_floating(node.meta.get("val")):
            forward.add(node)
    reaching: set[fx.Node] = set()
    stack = [leaf for leaf in graph.output_node().all_input_nodes if leaf in forward]
    while stack:
        node = stack.pop()
        if node not in reaching:
            reaching.add(node)
            stack.extend(leaf for leaf in value_inputs(node) if leaf in forward)
    return reaching


def _is_floating(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_is_floating(item) for item in value)
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def parameter_values(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values depend on parameters, buffers and constants alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        is_call = node.op == "call_function" and bool(inputs)
        if node.op == "get_attr" or (is_call and all(leaf in found for leaf in inputs)):
            found.add(node)
    return found
