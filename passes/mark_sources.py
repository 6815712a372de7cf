"""Mark the values whose relevance is asked for.

    x = placeholder                →  x' = source(x, name="x")
    e = embedding(table, ids)      →  e' = source(e, name="input_ids", ids=ids)

A floating input is explained itself. An integer input is explained where it looks up a table of
parameters: the looked-up vectors carry the relevance, and their sum over features is the token's.
Indices that were computed rather than moved (positions counted from a mask) are constants.
"""

from typing import Any

from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.operators import is_op
from attnlrp_fx.graph.provenance import describe
from attnlrp_fx.graph.tokens import origin, table_and_indices
from attnlrp_fx.passes.base import PassContext, PassResult, finish, inherit


def mark_sources(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Insert a source after every explained input and look-up.

    Raises:
        InputError: an input to explain does not exist, or relevance cannot reach it.
    """
    result = PassResult("mark_sources")
    graph = graph_module.graph
    if any(node.target is ops.source for node in graph.nodes):
        return result
    placeholders = graph.find_nodes(op="placeholder")
    names = [str(node.target) for node in placeholders]
    for name in context.explain or ():
        if name not in names:
            raise InputError(
                f"there is no input '{name}' to explain", remedy=f"choose from: {', '.join(names)}"
            )
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point() and _wanted(node, context):
            _mark(graph, node, node)
    for node in list(graph.nodes):
        looked_up = table_and_indices(node) if node.op == "call_function" else None
        if looked_up is None:
            continue
        table, ids = looked_up
        source = origin(ids) if _is_parameter(table) and isinstance(ids, fx.Node) else None
        if source is not None and not _is_floating(source) and _wanted(source, context):
            _mark(graph, node, source, ids)
    finish(graph_module)
    _drop_unreached(graph_module, context, names)
    result.changes = sum(node.target is ops.source for node in graph.nodes)
    return result


def _mark(graph: fx.Graph, node: fx.Node, source: fx.Node, ids: fx.Node | None = None) -> None:
    kwargs: dict[str, Any] = {"name": str(source.target)} | ({} if ids is None else {"ids": ids})
    with graph.inserting_after(node):
        marked = graph.call_function(ops.source, (node,), kwargs)
    inherit(marked, node, "mark_sources")
    node.replace_all_uses_with(marked, delete_user_cb=lambda user: user is not marked)


def _drop_unreached(graph_module: fx.GraphModule, context: PassContext, names: list[str]) -> None:
    """Unmark sources that reach no output; an error if one was asked for, or none is left."""
    graph = graph_module.graph
    explained = explained_values(graph)
    sources = [node for node in graph.nodes if node.target is ops.source]
    left = {node.kwargs["name"] for node in sources if node in explained}
    missing = [name for name in context.explain or () if name not in left]
    if missing or not left:
        what = f"relevance cannot reach input '{missing[0]}'" if missing else "nothing to explain"
        raise _unreached(graph, what, names)
    for node in sources:
        if node not in explained:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    finish(graph_module)


def _unreached(graph: fx.Graph, what: str, names: list[str]) -> InputError:
    """Why relevance reaches no source: the model stops gradients on the way, or there is none."""
    stopped = _stopped(graph)
    if stopped is not None:
        return InputError(
            what,
            where=describe(stopped),
            why="the model stops gradients here: by detach, or under torch.no_grad",
            remedy="compile a model that computes this with gradients; of a function that "
            "torch.no_grad decorates, `__wrapped__` is one",
        )
    return InputError(
        what,
        where=f"inputs: {', '.join(names)}",
        why="no floating-point path leads from it to an output: a floating input must enter "
        "the computation, an integer input must look up an embedding",
        remedy="pass a floating input (inputs_embeds, for instance), or name another input "
        "with explain=[...]",
    )


def _stopped(graph: fx.Graph) -> fx.Node | None:
    """The first value that depends on a source and is detached, None if there is none."""
    reached: set[fx.Node] = set()
    node: fx.Node
    for node in graph.nodes:
        if node.target is ops.source or any(leaf in reached for leaf in node.all_input_nodes):
            if is_op(node, "detach"):
                return node
            reached.add(node)
    return None


def _wanted(node: fx.Node, context: PassContext) -> bool:
    return context.explain is None or str(node.target) in context.explain


def _is_parameter(node: fx.Node) -> bool:
    return node.op == "get_attr" or (
        node.op == "call_function"
        and len(node.all_input_nodes) == 1
        and _is_parameter(node.all_input_nodes[0])
    )


def _is_floating(node: fx.Node) -> bool:
    return bool(node.meta["val"].is_floating_point())
