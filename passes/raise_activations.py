"""Raise activations: a region of elementwise ops with one explained input is one activation.

    inner = x * 0.7978 * (1 + 0.044715 x²)
    y     = 0.5 * x * (1 + tanh(inner))          →  y = self.activation_0(x)

No activation is known by name. A region ends in a nonlinear op or a product, takes one explained
value x (constants do not count), and computes each element from the same element of x. It is as
large as can be, but keeps neither linear ops before it nor behind it. A lone op is not a region.

A comparison of x has no derivative, so it is a constant elsewhere; within a region it is part of
what x decides, so that f(0) is the value at 0: where(x > 1, 1, x) is a cap, not a constant 1.
A value in the region that is used outside too is computed there once more.
"""

from collections.abc import Mapping, Set
from itertools import count

import torch
from torch import fx

from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.operators import Kind, is_elementwise, is_op, kind_of, leaves
from attnlrp_fx.passes.base import PassContext, PassResult, finish, replace

PREDICATES = (
    *("gt", "ge", "lt", "le", "eq", "ne", "isnan", "isinf", "isfinite", "signbit"),
    *("logical_and", "logical_or", "logical_xor", "logical_not"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"),
)
"""Elementwise ops that decide rather than compute."""
MASKED = 1e4
"""A number as large as this one marks values to be ignored."""


def raise_activations(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace every maximal elementwise region by a call of one function."""
    result = PassResult("raise_activations")
    graph = graph_module.graph
    explained = explained_values(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    known: dict[str, str] = {}
    erased: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        if node in erased or node not in explained or not _ends_region(node, explained):
            continue
        region = _region(node, explained, order)
        if region is None:
            continue
        source, body = region
        function, constants = _function(graph_module, source, body, node)
        name = known.setdefault(function.code, _free_name(graph_module))
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


def _free_name(graph_module: fx.GraphModule) -> str:
    """A name that no activation has yet."""
    return next(n for i in count() if not hasattr(graph_module, n := f"activation_{i}"))


def _ends_region(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a node can end a region: it is not linear, or chooses between values."""
    if not is_elementwise(node):
        return False
    return kind_of(node, explained) is not Kind.LINEAR or not _masks(node, explained)


def _masks(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a linear op fills in what is to be ignored: a huge number, or another tensor."""
    if is_op(node, "where", "masked_fill"):
        values = node.args[1 if is_op(node, "where") else 2 :]
        filled = [a for a in values if not (isinstance(a, fx.Node) and a in explained)]
        return not all(isinstance(a, int | float) and abs(a) < MASKED for a in filled)
    return False


def _predicates(source: fx.Node, body: Set[fx.Node], explained: Set[fx.Node]) -> set[fx.Node]:
    """The comparisons, and what they are made of, by which a source decides about a body."""
    inside = body | {source}
    known = dict.fromkeys(inside, True)

    def decided(node: fx.Node) -> bool:
        if node not in known:
            inputs = list(leaves((node.args, node.kwargs)))
            local = is_elementwise(node) or is_op(node, *PREDICATES)
            own = local and all(leaf in inside or leaf not in explained for leaf in inputs)
            known[node] = own and True in [decided(leaf) for leaf in inputs]
        return known[node]

    taken = {leaf for node in body for leaf in leaves((node.args, node.kwargs))}
    for leaf in taken - explained:
        decided(leaf)
    return {node for node, is_decided in known.items() if is_decided} - inside


def _region(
    end: fx.Node, explained: Set[fx.Node], order: Mapping[fx.Node, int]
) -> tuple[fx.Node, list[fx.Node]] | None:
    """The largest region that ends in a node: its explained input and its nodes in order.

    Grows backwards over elementwise ops, the latest of its inputs first. Whenever only one
    explained input is left, the nodes so far are a region; the last one that counts is the largest.
    """
    body = {end}
    frontier = _explained_inputs(end, explained)
    best: tuple[fx.Node, set[fx.Node]] | None = None
    while True:
        if len(frontier) == 1:
            (source,) = frontier
            members = body | _predicates(source, body, explained)
            if _is_region(source, members, end, explained):
                best = source, members
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


def _is_region(
    source: fx.Node, members: Set[fx.Node], end: fx.Node, explained: Set[fx.Node]
) -> bool:
    """Whether nodes are more than one op, and begin and end with what is not linear."""
    if len(members) == 1 or not _same_shape(source, end):
        return False
    entries = [node for node in source.users if node in members]
    if len(entries) == 1 and kind_of(entries[0], explained) is Kind.LINEAR:
        return False
    chosen = any(leaf in members - explained for leaf in leaves(end.args))
    return kind_of(end, explained) is not Kind.LINEAR or chosen


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return tuple(map(str, a.meta["val"].shape)) == tuple(map(str, b.meta["val"].shape))


def _function(
    owner: fx.GraphModule, source: fx.Node, body: list[fx.Node], end: fx.Node
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The region as a function of its explained input and of constants.

    Its nodes are named anew, so that equal functions have equal code.
    """
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
        arguments = fx.node.map_arg((node.args, node.kwargs), value)
        values[node] = graph.create_node(node.op, node.target, *arguments)
        values[node].meta = dict(node.meta)
    graph.output(values[end])
    return fx.GraphModule(torch.nn.Module(), graph), constants
