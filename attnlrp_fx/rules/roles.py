"""Roles: what an op is for in its model, found in the graph, for composites to match.

A node may have several. Modules and their names play no part.
"""

from collections.abc import Iterator, Set
from enum import StrEnum

from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.graph.analysis import parameter_values
from attnlrp_fx.graph.operators import (
    Kind,
    explained_factors,
    factors_of,
    is_broadcast,
    is_convolution,
    is_elementwise,
    is_matrix_product,
    is_op,
    is_structural,
    kind_of,
    leaves,
    rearranges,
)


class Role(StrEnum):
    """What an op is for in its model."""

    WEIGHTS = "weights"
    """A softmax that multiplies another explained value."""
    GATE = "gate"
    """An activation that multiplies another explained value."""
    CONVOLUTION = "convolution"
    """A convolution of an explained value with parameters."""
    DENSE = "dense"
    """Any other matrix product of an explained value with parameters."""
    PROJECTION = "projection"
    """A matrix product with parameters that makes queries, keys or values, or that takes what
    attention returns."""
    FIRST = "first"
    """A convolution or matrix product with parameters that reads what is explained directly."""
    JOIN = "join"
    """A sum of two explained values of one shape: a residual join."""


def roles(graph: fx.Graph, explained: Set[fx.Node]) -> dict[fx.Node, set[Role]]:
    """The roles of explained nodes, of those that have any."""
    found: dict[fx.Node, set[Role]] = {}
    parameters = parameter_values(graph)
    layers = {node for node in explained if is_layer(node, explained, parameters)}
    for node in graph.nodes:
        if node in layers:
            role = Role.CONVOLUTION if is_convolution(node.target) else Role.DENSE
            found.setdefault(node, set()).add(role)
            if _reads_source(node, explained):
                found[node].add(Role.FIRST)
        elif node in explained and is_join(node, explained):
            found.setdefault(node, set()).add(Role.JOIN)
        for other, role in _of_factors(node, explained):
            found.setdefault(other, set()).add(role)
        for other in _projections(node, explained, layers):
            found.setdefault(other, set()).add(Role.PROJECTION)
    return found


def is_join(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a node adds two explained values of its own shape."""
    if not is_op(node, "add") or node.kwargs.get("alpha", 1) != 1:
        return False
    shape = node.meta["val"].shape
    return all(
        isinstance(leaf, fx.Node) and leaf in explained and leaf.meta["val"].shape == shape
        for leaf in node.args
    )


def is_layer(node: fx.Node, explained: Set[fx.Node], parameters: Set[fx.Node]) -> bool:
    """Whether a node is a product of one explained value and one that parameters make."""
    if not is_matrix_product(node.target):
        return False
    factors = factors_of(node)
    inputs = [leaf for leaf in leaves((node.args, node.kwargs)) if leaf in explained]
    is_pair = len(factors) == 2 and len(inputs) == 1 and inputs[0] in factors
    return is_pair and sum(factor in parameters for factor in factors) == 1


def _reads_source(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether nothing but rearrangements and affine ops of one value stand before a layer."""
    value = next(factor for factor in factors_of(node) if factor in explained)
    while value.target is not ops.source:
        inputs = [leaf for leaf in leaves((value.args, value.kwargs)) if leaf in explained]
        is_affine = is_elementwise(value) and kind_of(value, explained) is Kind.LINEAR
        if len(inputs) != 1 or not (is_affine or rearranges(value.target)):
            return False
        value = inputs[0]
    return True


def _of_factors(node: fx.Node, explained: Set[fx.Node]) -> Iterator[tuple[fx.Node, Role]]:
    """The role of a product's factor.

    In a product of two explained factors, the factor that is a softmax is the weights; if there is
    none, the one factor that is an activation is the gate. Of two activations, the one that is
    broadcast over the other is the gate; else they are equals.
    """
    factors = explained_factors(node, explained)
    if len(factors) != 2 or factors[0] is factors[1]:
        return
    producers = [_producer(factor, explained) for factor in factors]
    kinds = [kind_of(p, explained) for p in producers]
    for kind, role in ((Kind.SOFTMAX, Role.WEIGHTS), (Kind.ACTIVATION, Role.GATE)):
        if kinds.count(kind) == 1:
            yield producers[kinds.index(kind)], role
            return
    if kinds.count(Kind.ACTIVATION) == 2:
        spread = [is_broadcast(factor, node) for factor in factors]
        if sum(spread) == 1:
            yield producers[spread.index(True)], Role.GATE


def _producer(node: fx.Node, explained: Set[fx.Node]) -> fx.Node:
    """The node that computed a value, views and casts skipped."""
    while is_structural(node):
        inputs = [leaf for leaf in leaves(node.args) if leaf in explained]
        if len(inputs) != 1:
            return node
        node = inputs[0]
    return node


def _projections(node: fx.Node, explained: Set[fx.Node], layers: Set[fx.Node]) -> Iterator[fx.Node]:
    """The layers before and after attention, fused or written out."""
    if node not in explained or node in layers:
        return
    kind = kind_of(node, explained)
    if kind is Kind.ATTENTION or (kind is Kind.PRODUCT and is_matrix_product(node.target)):
        for operand in leaves(node.args):
            reached = _layers_before(operand, explained, layers)
            if len(reached) == 1:
                yield from reached
        yield from _layers_behind(node, layers)


def _layers_before(operand: fx.Node, explained: Set[fx.Node], layers: Set[fx.Node]) -> set[fx.Node]:
    """The layers that make an operand; none if anything but them, norms and rotations does."""
    reached: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [operand]
    while stack:
        node = stack.pop()
        if node in seen or node not in explained or node.target in ops.MARKERS:
            continue
        seen.add(node)
        kind = kind_of(node, explained)
        if node in layers:
            reached.add(node)
        elif node.target is ops.source or kind not in (Kind.LINEAR, Kind.NORM, Kind.PRODUCT):
            return set()
        else:
            stack += leaves((node.args, node.kwargs))
    return reached


def _layers_behind(node: fx.Node, layers: Set[fx.Node]) -> Iterator[fx.Node]:
    """The layers that read a value, moved about at most."""
    for user in node.users:
        if user in layers:
            yield user
        elif rearranges(user.target):
            yield from _layers_behind(user, layers)
