"""Which values lie on the way from explained inputs to outputs, and what role they play.

Only floating tensors carry relevance: masks, positions and rotary tables depend on shapes and
integers, and are constants. A value is explained if it is floating, depends on a source, and
reaches an output.
"""

from collections.abc import Set
from typing import Any

from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.operators import (
    Kind,
    explained_factors,
    is_shape_only,
    is_structural,
    kind_of,
    leaves,
    value_inputs,
)

WEIGHTS, GATE = "weights", "gate"


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


def roles(graph: fx.Graph, explained: Set[fx.Node]) -> dict[fx.Node, str]:
    """The role of softmaxes and activations that multiply another explained value.

    In a product of two explained factors, the factor that is a softmax is the "weights"; if there
    is none, the one factor that is an activation is the "gate". Two activations are equals.
    """
    found: dict[fx.Node, str] = {}
    for node in graph.nodes:
        factors = explained_factors(node, explained)
        if len(factors) != 2 or factors[0] is factors[1]:
            continue
        producers = [_producer(factor, explained) for factor in factors]
        kinds = [kind_of(p, explained) for p in producers]
        for kind, role in ((Kind.SOFTMAX, WEIGHTS), (Kind.ACTIVATION, GATE)):
            if kinds.count(kind) == 1:
                found[producers[kinds.index(kind)]] = role
                break
    return found


def _producer(node: fx.Node, explained: Set[fx.Node]) -> fx.Node:
    """The node that computed a value, views and casts skipped."""
    while is_structural(node):
        inputs = [leaf for leaf in leaves(node.args) if leaf in explained]
        if len(inputs) != 1:
            return node
        node = inputs[0]
    return node
