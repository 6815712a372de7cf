"""Mark signs: where a value's sign is known, the rules for layers need fewer products.

    gamma(aten.linear, relu(x), w, b)  →  gamma(aten.linear, relu(x), w, b, nonnegative=True)
    relu(gamma(aten.linear, x, w, b))  →  relu(gamma(aten.linear, x, w, b, rectified=True))

A value is not negative behind a rectifier, a softmax, a sigmoid or a square, through rearrangements
and pools, and as a sum or a product of such values. No relevance arrives at negative outputs of a
layer that only rectifiers read, unless a rule further up gives relevance to values that are zero.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import aten, is_structural_op, leaves, packet
from attnlrp_fx.passes.base import PassContext, PassResult

RECTIFIERS: dict[Any, Callable[..., bool]] = {
    aten.relu: lambda *args: True,
    aten.relu6: lambda *args: True,
    aten.clamp: lambda x, low=None, high=None: low == 0,
    aten.clamp_min: lambda x, low: low == 0,
    aten.hardtanh: lambda x, low=-1, high=1: low == 0,
}
"""Ops that are zero where their input is negative, if their arguments say so."""

NONNEGATIVE = {
    getattr(aten, name)
    for name in """
        softmax _softmax sigmoid hardsigmoid abs exp exp2 square sqrt rsqrt cosh softplus
    """.split()
}

KEEPING = {
    getattr(aten, name)
    for name in """
        add mul div mean sum cumsum maximum fmax cat stack flip roll repeat gather index
        index_select pixel_shuffle pixel_unshuffle channel_shuffle upsample_nearest1d
        upsample_nearest2d upsample_nearest3d max_pool1d max_pool2d max_pool3d
        max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_linear1d
        upsample_bilinear2d upsample_trilinear3d dropout feature_dropout
    """.split()
}
"""Ops whose output is not negative if none of the values that they read is."""

ARITHMETIC = (aten.add, aten.mul, aten.div)
"""Those of them that compute with numbers, too."""

CAREFUL = (ops.identity, ops.gradient, ops.taylor)
"""Rules under which a rectifier hands nothing on where its input is negative."""

REGARDLESS = (ops.flat, ops.w_square, ops.z_box, ops.passed, ops.join)
"""Rules that give relevance to values that are zero."""


def mark_signs(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Write what is known of signs into the relevance ops that read it."""
    result = PassResult("mark_signs")
    graph = graph_module.graph
    nonnegative: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_function" and _is_nonnegative(node, nonnegative):
            nonnegative.add(node)
    given = _given_regardless(graph)
    for node in graph.nodes:
        reads = {"nonnegative", "rectified"} & {*ops.RULE_PARAMETERS.get(node.target, ())}
        if not reads:
            continue
        x = next(leaf for leaf in leaves(node.args[1:]) if ops.is_explained(leaf))
        known = {
            "nonnegative": x in nonnegative,
            "rectified": node not in given and _is_rectified(node),
        }
        found = {name: True for name in known if name in reads and known[name]}
        if not found.items() <= node.kwargs.items():
            node.kwargs = {**node.kwargs, **found}
            result.changes += 1
    if result.changes:
        graph_module.recompile()
    return result


def _call(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """The op that a node calls, and its arguments, whichever rule stands there."""
    if node.target in ops.RELEVANCE_OPS:
        return node.args[0], node.args[1:]
    return node.target, node.args


def _is_nonnegative(node: fx.Node, known: set[fx.Node]) -> bool:
    op, args = _call(node)
    name = packet(op)
    if name in NONNEGATIVE or _rectifies(name, args):
        return True
    if name is aten.pow:
        return isinstance(args[1], int | float) and args[1] % 2 == 0
    if name is aten.mul and args[0] is args[1]:
        return True
    if name not in KEEPING and not is_structural_op(op):
        return False
    numbers = [*args, *node.kwargs.values()] if name in ARITHMETIC else []
    floating = [leaf for leaf in leaves((args, node.kwargs)) if _is_floating(leaf)]
    return all(leaf in known for leaf in floating) and not any(map(_is_below, numbers))


def _rectifies(name: Any, args: tuple[Any, ...]) -> bool:
    return name in RECTIFIERS and RECTIFIERS[name](*args)


def _is_below(number: Any) -> bool:
    return isinstance(number, int | float) and not number >= 0


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in parts)


def _is_rectified(node: fx.Node) -> bool:
    """Whether rectifiers alone read a value, under rules that respect them."""
    for user in node.users:
        op, args = _call(user)
        if user.target not in CAREFUL or not _rectifies(packet(op), args):
            return False
    return bool(node.users)


def _given_regardless(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that relevance may reach where their value is zero."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.target in REGARDLESS or node in found:
            found.update(node.all_input_nodes)
    return found
