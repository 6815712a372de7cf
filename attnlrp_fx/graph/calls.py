"""Calls of modules: which values a module took and gave, as the graph's nodes tell.

Every captured node knows the modules that were running when it was made. A value that is made
inside of a module and read outside of it is one that the module gave; one that is made outside and
read inside is one that it took. A module that is called again is told apart by a number: `mlp`,
`mlp@1`, `mlp@2`.
"""

import re
from collections.abc import Iterator, Set

from torch import Tensor, fx

from attnlrp_fx.graph.provenance import readable_path


def calls_of(node: fx.Node) -> tuple[str, ...]:
    """The calls of modules that a node was made in, outermost first, without the root."""
    stack = node.meta.get("nn_module_stack") or {}
    named = ((readable_path(path), _again(str(key))) for key, (path, _) in stack.items())
    return tuple(path + again for path, again in named if path)


def path_of(call: str) -> str:
    """The module's path, whichever call of it is meant."""
    return call.partition("@")[0]


def given(graph: fx.Graph, values: Set[fx.Node]) -> dict[str, list[fx.Node]]:
    """By call, those of some values that a module gave, in the graph's order."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in values:
            for call in gives(node):
                found.setdefault(call, []).append(node)
    return found


def gives(node: fx.Node) -> list[str]:
    """The calls that gave a value, outermost first: they made it, and something else reads it."""
    outside = [set(calls_of(user)) for user in _readers(node)]
    return [call for call in calls_of(node) if any(call not in calls for calls in outside)]


def taken(graph: fx.Graph, values: Set[fx.Node]) -> dict[str, dict[fx.Node, list[fx.Node]]]:
    """By call, those of some values that a module took, each with the nodes that read it there."""
    found: dict[str, dict[fx.Node, list[fx.Node]]] = {}
    for node in graph.nodes:
        if node in values:
            own = set(calls_of(node))
            for user in _readers(node):
                for call in calls_of(user):
                    if call not in own:
                        found.setdefault(call, {}).setdefault(node, []).append(user)
    return found


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that read a value: the graph's output is one, and what asks for a size is none."""
    for user in node.users:
        value = user.meta.get("val")
        if user.op == "output" or isinstance(value, Tensor | list | tuple):
            yield user


def _again(key: str) -> str:
    found = re.search(r"@\d+$", key)
    return found[0] if found else ""
