"""Raise normalisations: find the statistic that a value is divided by.

A normalisation multiplies a value by a statistic of itself that undoes its scale:

    x · rsqrt(mean(x²) + ε)        (x − mean x) / sqrt(var x + ε)        x / max(‖x‖, ε)

Written out or not, the statistic is a reduction of x, homogeneous in x of degree −1 where it
multiplies (+1 where it divides), ε apart, and even: the same for x and −x. So a statistic of
another value is none, and neither is a sum: x / Σx shares out, it does not normalise. Degree and
parity are computed along the graph:

    x: 1, odd        a·b: sum, odd if one is      a/b: difference, odd if one is
    |a|: even        aⁿ: n times, even n even     √a: half      rsqrt a: minus half
    var, std, norm: even (var: twice)             mean, sum, max, a + constant, max(a, constant),
                                                  where, views, casts: the same

The statistic is marked, and the composite decides what becomes of it; every rule of LRP holds it
constant, and the rest of the normalisation is linear.
"""

import math
import operator
from collections.abc import Set
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.operators import Kind, is_op, is_structural, kind_of, leaves
from attnlrp_fx.passes.base import PassContext, PassResult, finish, mark

EVEN_REDUCTIONS = ("linalg_vector_norm", "norm", "std", "var", "std_mean", "var_mean")
REDUCTIONS = (*EVEN_REDUCTIONS, "mean", "sum", "amax", "amin", "max", "min")
SCALING = (
    *(*REDUCTIONS, "abs", "neg", "clamp_min", "clamp", "maximum", "where", "masked_fill"),
    *("add", "sub", "rsub", "mul", "div"),
)
"""Ops that scale with what they take, beside views, casts and powers."""
POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
PARTS = ("select", "slice", "split", "split_with_sizes", "chunk", "unbind", "narrow", "diagonal")
"""Views of a part: a part's statistic is not the whole's."""


def raise_norms(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Mark the statistic of every normalisation."""
    result = PassResult("raise_norms")
    graph = graph_module.graph
    explained = explained_values(graph)
    for node in list(graph.nodes):
        if not is_op(node, "mul", "div") or len(node.args) != 2:
            continue
        wanted = -1.0 if is_op(node, "mul") else 1.0
        for position in (1, 0) if is_op(node, "mul") else (1,):
            value, factor = node.args[1 - position], node.args[position]
            if value is factor or not {value, factor} <= explained:
                continue
            if ops.statistic in (value.target, factor.target):
                break
            reason = _objection(value, factor, wanted, explained)
            if reason is not None:
                if reason:
                    result.miss(node, reason)
                continue
            explained.add(mark(node, factor, ops.statistic, Kind.STATISTIC, result))
            break
    if result.changes:
        finish(graph_module)
    return result


def _objection(
    value: fx.Node, factor: fx.Node, wanted: float, explained: Set[fx.Node]
) -> str | None:
    """Why a factor is no statistic that normalises a value, '' if it is none at all."""
    origins = _origins(value, explained)
    found = _homogeneity(factor, origins, explained)
    if found is None or not found.reduced:
        return ""
    others = found.bases - origins
    right_degree = math.isclose(found.degree, wanted)
    if others:
        names = ", ".join(sorted(f"'{node.name}'" for node in others))
        likely = right_degree and found.even
        return f"'{factor.name}' is a statistic of {names}, not of the value" if likely else ""
    if not right_degree:
        return f"'{factor.name}' is a statistic of degree {found.degree:g}, not {wanted:g}"
    if not found.even:
        return f"'{factor.name}' changes its sign with the value: it shares out, it is no norm"
    return None


def _origins(value: fx.Node, explained: Set[fx.Node]) -> set[fx.Node]:
    """The value that is normalised, and what it is a cast, a view, a multiple or a centring of."""
    found = {value}
    stack = [value]
    while stack:
        node = stack.pop()
        sources = _inputs(node, explained)
        if is_op(node, "sub", "add") and len(sources) == 2:
            sources = [a for a, b in permutations(sources) if _is_mean(b, a, explained)]
        elif len(sources) != 1 or not _is_multiple(node, explained):
            continue
        stack.extend(source for source in sources if source not in found)
        found.update(sources)
    return found


def _inputs(node: fx.Node, explained: Set[fx.Node]) -> list[fx.Node]:
    """The explained inputs, without the one whose shape or dtype a view or a cast takes."""
    given = node.args[:1] if is_structural(node) else (node.args, node.kwargs)
    return [leaf for leaf in leaves(given) if leaf in explained]


def _is_multiple(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a node is its one explained input, moved about or times a constant."""
    if node.target is operator.getitem or is_op(node, *PARTS):
        return False
    if is_structural(node) or is_op(node, "neg"):
        return True
    return is_op(node, "mul", "div") and kind_of(node, explained) is Kind.LINEAR


def _is_mean(node: fx.Node, value: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a node is a reduction of a value that a value can be centred by."""
    found = _homogeneity(node, {value}, explained)
    if found is None or not found.reduced or found.degree != 1:
        return False
    return found.bases <= _origins(value, explained)


@dataclass(frozen=True)
class _Homogeneity:
    """How a value scales with what it is computed from."""

    degree: float
    even: bool
    """Whether it stays the same when what it is computed from changes its sign."""
    reduced: bool
    """Whether there is a reduction in it."""
    bases: frozenset[fx.Node]
    """What it is computed from."""


def _homogeneity(
    node: fx.Node, origins: Set[fx.Node], explained: Set[fx.Node]
) -> _Homogeneity | None:
    """The homogeneity of a node in the origins, or in whatever else it is computed from.

    None if it is a sum of unlike degrees.
    """
    known: dict[fx.Node, _Homogeneity | None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        inputs = _inputs(current, explained)
        if current in origins or not inputs or not _scales(current, len(inputs)):
            known[current] = _Homogeneity(1.0, False, False, frozenset((current,)))
        elif unknown := [leaf for leaf in inputs if leaf not in known]:
            stack += [current, *unknown]
        else:
            known[current] = _through(current, [known[leaf] for leaf in inputs], explained)
    return known[node]


def _scales(node: fx.Node, inputs: int) -> bool:
    """Whether an op scales with its explained inputs, a constant added to them apart."""
    if inputs == 1 and is_op(node, "pow"):
        return isinstance(node.args[1], int | float)
    binary = is_op(node, "add", "sub", "rsub", "mul", "div")
    return binary or (inputs == 1 and (is_structural(node) or is_op(node, *SCALING, *POWERS)))


def _through(
    node: fx.Node, taken: list[_Homogeneity | None], explained: Set[fx.Node]
) -> _Homogeneity | None:
    """The homogeneity of an op's output, None for a sum of unlike degrees."""
    found = [each for each in taken if each is not None]
    if len(found) < len(taken):
        return None
    first, *rest = found
    degree, even = first.degree, all(each.even for each in found)
    source: Any = node.args[0]
    power = _power(node)
    if is_op(node, "mul", "div"):
        sign = 1 if is_op(node, "mul") else -1
        degree *= 1 if source in explained else sign
        degree += sum(sign * each.degree for each in rest)
        even = sum(not each.even for each in found) % 2 == 0
    elif any(each.degree != degree for each in rest):
        return None
    elif power is not None:
        degree, even = degree * power, even or power % 2 == 0
    elif is_op(node, "abs", *EVEN_REDUCTIONS):
        degree, even = degree * (2 if is_op(node, "var") else 1), True
    elif node.target is operator.getitem and is_op(source, "var_mean", "std_mean"):
        even = bool(node.args[1] == 0)
        degree *= 2 if even and is_op(source, "var_mean") else 1
    reduced = _reduces(node) or any(each.reduced for each in found)
    return _Homogeneity(degree, even, reduced, frozenset().union(*(e.bases for e in found)))


def _power(node: fx.Node) -> float | None:
    if is_op(node, "pow"):
        return float(node.args[1])  # type: ignore[arg-type]
    return next((power for name, power in POWERS.items() if is_op(node, name)), None)


def _reduces(node: fx.Node) -> bool:
    """Whether an op takes a reduction; max and min of two tensors share their name with one."""
    return is_op(node, *REDUCTIONS) and getattr(node.target, "_overloadname", "") != "other"
