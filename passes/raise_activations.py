"""Raise activations: a region of elementwise ops with one explained input is one activation.

    inner = x * 0.7978 * (1 + 0.044715 x²)
    y     = 0.5 * x * (1 + tanh(inner))          →  y = self.activation_0(x)

No activation is known by name. A region ends in a nonlinear op or a product, takes one explained
value x (constants do not count), and computes each element from the same element of x. It is as
large as can be, but keeps neither linear ops before it nor behind it. A lone op is not a region.
"""

from collections.abc import Mapping, Set

import torch
from torch import fx

from attnlrp_fx.analysis import explained_values
from attnlrp_fx.operators import Kind, is_elementwise, kind_of, leaves
from attnlrp_fx.passes.base import PassContext, PassResult, finish, replace


def raise_activations(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace every maximal elementwise region by a call of one function."""
    result = PassResult("raise_activations")
    graph = graph_module.graph
    explained = explained_values(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    known: dict[str, str] = {}
    erased: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in erased or node not in explained or not _is_nonlinear(node, explained):
            continue
        region = _region(node, explained, order)
        if region is None:
            continue
        source, body = region
        function, constants = _function(graph_module, source, body, node)
        name = known.setdefault(function.code, f"activation_{len(known)}")
        graph_module.add_submodule(name, function)
        with graph.inserting_before(node):
            new = graph.call_module(name, (source, *constants))
        new.meta["kind"] = Kind.ACTIVATION
        replace(node, new, result.name)
        explained.add(new)
        result.changes += 1
        for dead in reversed(body):
            if not dead.users:
                graph.erase_node(dead)
                erased.add(dead)
    if result.changes:
        finish(graph_module)
    return result


def _is_nonlinear(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a node can end a region."""
    return is_elementwise(node) and kind_of(node, explained) is not Kind.LINEAR


def _region(
    end: fx.Node, explained: Set[fx.Node], order: Mapping[fx.Node, int]
) -> tuple[fx.Node, list[fx.Node]] | None:
    """The largest region that ends in a node: its explained input and its nodes in order.

    Grows backwards over elementwise ops, the latest of its inputs first. Whenever only one explained
    input is left, the nodes so far are a region; the last one that counts is the largest.
    """
    body = {end}
    frontier = _explained_inputs(end, explained)
    best: tuple[fx.Node, set[fx.Node]] | None = None
    while True:
        if len(frontier) == 1:
            (source,) = frontier
            if (
                len(body) > 1
                and _same_shape(source, end)
                and not _is_linear_entry(source, body, explained)
            ):
                best = source, set(body)
        latest = max(frontier, key=order.__getitem__)
        if not is_elementwise(latest) or kind_of(latest, explained) is Kind.UNKNOWN:
            break
        frontier.remove(latest)
        body.add(latest)
        frontier |= _explained_inputs(latest, explained)
        if not frontier:
            break
    if best is None:
        return None
    source, nodes = best
    return source, sorted(nodes, key=order.__getitem__)


def _explained_inputs(node: fx.Node, explained: Set[fx.Node]) -> set[fx.Node]:
    return {leaf for leaf in leaves((node.args, node.kwargs)) if leaf in explained}


def _is_linear_entry(source: fx.Node, body: Set[fx.Node], explained: Set[fx.Node]) -> bool:
    """Whether the region begins with a linear op that better stands before it."""
    entries = [node for node in source.users if node in body]
    return len(entries) == 1 and kind_of(entries[0], explained) is Kind.LINEAR


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return tuple(map(str, a.meta["val"].shape)) == tuple(map(str, b.meta["val"].shape))


def _function(
    owner: fx.GraphModule, source: fx.Node, body: list[fx.Node], end: fx.Node
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The region as a function of its explained input and of constants."""
    graph = fx.Graph()
    placeholder = graph.placeholder("x")
    placeholder.meta["val"] = source.meta["val"]
    values = {source: placeholder}
    constants: list[fx.Node] = []

    def value(leaf: fx.Node) -> fx.Node:
        if leaf not in values:
            constants.append(leaf)
            values[leaf] = graph.placeholder(f"constant_{len(constants)}")
            values[leaf].meta["val"] = leaf.meta.get("val")
        return values[leaf]

    outside = [leaf for node in body for leaf in leaves((node.args, node.kwargs))]
    for leaf in outside:
        if leaf not in body:
            value(leaf)
    for node in body:
        values[node] = graph.node_copy(node, value)
    graph.output(values[end])
    return fx.GraphModule(torch.nn.Module(), graph), constants
