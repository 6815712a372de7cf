"""Return the marked latent values behind the model's own outputs.

    return [logits]  →  return [logits, latent, latent_1, …]

So activations leave a program as outputs do, and a latent value can be what is explained. Rules
stand where they stand by now, and a marker that relevance never reaches is an error. Of chosen
experts the graph also returns which ones they are.
"""

from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.graph.provenance import describe
from attnlrp_fx.passes.base import PassContext, PassResult, finish
from attnlrp_fx.passes.mark_latents import CHOSEN, SITE, markers_of, value_of

RETURNED = "returned"
"""The key of a marker's meta: the places of its value, and of chosen experts, in the outputs."""


def return_latents(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Append the marked values, and the experts that they chose, to the outputs.

    Raises:
        InputError: relevance never reaches a marked value.
    """
    result = PassResult("return_latents")
    graph = graph_module.graph
    outputs, markers = outputs_of(graph), [*markers_of(graph).values()]
    if not markers or all(RETURNED in marker.meta for marker in markers):
        return result
    reaching = _reaching(graph)
    for marker in markers:
        if marker not in reaching:
            raise _unreached(marker, context)
    chosen = [marker.meta[CHOSEN] for marker in markers if marker.meta[CHOSEN] is not None]
    further = [*map(value_of, markers), *dict.fromkeys(chosen)]
    places = {node: len(outputs) + i for i, node in enumerate(further)}
    graph.output_node().args = ((*outputs, *further),)
    for marker in markers:
        marker.meta[RETURNED] = places[value_of(marker)], places.get(marker.meta[CHOSEN])
    result.changes = len(markers)
    finish(graph_module)
    return result


def _reaching(graph: fx.Graph) -> set[fx.Node]:
    """The explained nodes from which relevance of an output can come."""
    found: set[fx.Node] = set()
    stack = [leaf for leaf in graph.output_node().all_input_nodes if ops.is_explained(leaf)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [leaf for leaf in node.all_input_nodes if ops.is_explained(leaf)]
    return found


def _unreached(marker: fx.Node, context: PassContext) -> InputError:
    """Why no relevance reaches a value: a rule holds it, or all that reads it, constant."""
    value = marker.args[0]
    assert isinstance(value, fx.Node)
    rule = value.meta.get("rule", "")
    why = (
        f"{rule} stands at it"
        if not ops.is_explained(value) and rule
        else ("what reads it is held constant")
    )
    return InputError(
        f"relevance never reaches '{marker.meta[SITE].name}'",
        where=describe(value),
        why=f"{why} in composite '{context.composite.name}'",
        remedy="use a composite that explains it, or leave it out of latent",
    )
