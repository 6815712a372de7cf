"""Tails: a rewritten graph from one of its sources on.

What is explained of a model, an embedding's output or a floating input, becomes an input of its
own, so that it can be perturbed, interpolated and differentiated:

    head: inputs → the source's value        tail: (inputs, the source's value) → outputs
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.provenance import describe
from attnlrp_fx.torch_private import lazy_graph_module

VALUE = "explained_value"
"""The name of the tail's additional placeholder."""


def source_of(rewritten: fx.GraphModule, name: str) -> fx.Node:
    """The one source that stands for an input.

    Raises:
        InputError: there is none, or there are several.
    """
    sources: list[fx.Node] = [n for n in rewritten.graph.nodes if n.target is ops.source]
    found = [node for node in sources if node.kwargs["name"] == name]
    if not found:
        known = dict.fromkeys(str(node.kwargs["name"]) for node in sources)
        raise InputError(
            f"'{name}' is not explained, so it cannot be perturbed",
            remedy=f"choose from: {', '.join(known)}",
        )
    if len(found) > 1:
        raise InputError(
            f"'{name}' is looked up {len(found)} times, so it has no one embedding to perturb",
            where=describe(found[1]),
            remedy="explain the embeddings (inputs_embeds) instead",
        )
    return found[0]


def features_of(source: fx.Node) -> tuple[int, ...]:
    """The dimensions of a source's value that relevance is summed over: none of a float input.

    Raises:
        InputError: the model cuts or repeats the indices before it looks them up.
    """
    ids = source.kwargs.get("ids")
    if not isinstance(ids, fx.Node):
        return ()
    given = next(
        node
        for node in source.graph.find_nodes(op="placeholder")
        if str(node.target) == source.kwargs["name"]
    )
    if str(ids.meta["val"].numel()) != str(given.meta["val"].numel()):
        raise InputError(
            f"the tokens of '{source.kwargs['name']}' cannot be perturbed",
            where=describe(source),
            why="the model cuts or repeats them before it looks them up",
            remedy="explain the embeddings (inputs_embeds) instead",
        )
    kept: Any = source.kwargs.get("keep") or range(ids.meta["val"].dim())
    return tuple(d for d in range(source.meta["val"].dim()) if d not in set(kept))


def split_at(
    rewritten: fx.GraphModule, source: fx.Node, attributes: Mapping[str, Tensor]
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph before a source, and the graph from it on.

    Args:
        rewritten: the rewritten graph.
        source: one of its sources.
        attributes: its parameters, buffers and constants by name; the parts share them.

    Returns:
        head, (inputs) → value; and tail, (inputs, value) → flat outputs.
    """
    head, copies = _copied(rewritten.graph)
    head.erase_node(head.output_node())
    head.output(copies[source])
    tail, copies = _copied(rewritten.graph)
    last = tail.find_nodes(op="placeholder")[-1]
    with tail.inserting_after(last):
        value = tail.placeholder(VALUE)
    value.meta = dict(source.meta)
    copies[source].replace_all_uses_with(value)
    return _module(rewritten, head, attributes), _module(rewritten, tail, attributes)


def _copied(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    copy = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = copy.graph_copy(graph, copies)
    copy.output(output)
    return copy, copies


def _module(
    rewritten: fx.GraphModule, graph: fx.Graph, attributes: Mapping[str, Tensor]
) -> fx.GraphModule:
    """A graph as a module that shares what it reads; what nothing reads is not computed."""
    graph.eliminate_dead_code()
    module = lazy_graph_module(torch.nn.Module(), fx.Graph())
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        _put(module, name, attributes[name] if name in attributes else _read(rewritten, name))
    module.graph = graph
    return module


def _read(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def _put(module: torch.nn.Module, name: str, value: Any) -> None:
    path, _, leaf = name.rpartition(".")
    for part in path.split(".") if path else ():
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    if isinstance(value, torch.nn.Parameter):
        module.register_parameter(leaf, value)
    elif isinstance(value, Tensor):
        module.register_buffer(leaf, value)
    else:
        setattr(module, leaf, value)
