"""Raise scans: find the coefficients of a recurrence, which are held constant.

    sₜ = aₜ · sₜ₋₁ + uₜ        uₜ = (Δₜ Bₜ) · xₜ        yₜ = Cₜ · sₜ

A rule that halves relevance at each product would halve it at every step, and nothing would be left
of what was said early. MambaLRP (Rezaei Jafari et al. 2024) therefore holds a, Δ, B and C constant,
as the signal-takes-all rule of recurrent networks holds gates (Arras et al. 2019). They are found
by structure. A *gate* is positive whatever it is computed from: exp, sigmoid, softplus, and what
products, sums and constants make of them. A *recurrence* multiplies by a gate a sum that holds a
product with a gate; written in parallel, it multiplies by a *decay*, the exponential of a running
sum. Around a recurrence, as far as no layer with weights and no norm lies between, each product has
a coefficient: the factor that stands higher in

    signal < plain < gated (a gate · plain) < decayed (a decay · plain) < gate < decay

where the carried sum is a signal, and so is what a decayed factor multiplies. A gated factor is the
coefficient of a plain one that it was computed from, as Δ B from x; else either could be it. A
plain factor is the coefficient of a signal where their product is summed up (C), not where it
stands element by element (the output gate). What is not decided the composite shares out as usual.
"""

from collections.abc import Set
from enum import IntEnum

from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.operators import (
    Kind,
    explained_factors,
    is_cast,
    is_matrix_product,
    is_op,
    is_structural,
    kind_of,
    leaves,
    product_of,
    value_inputs,
)
from attnlrp_fx.passes.base import PassContext, PassResult, finish, mark

POSITIVE = ("exp", "exp2", "sigmoid", "softplus", "hardsigmoid")
"""Functions whose value is positive whatever they take."""
STILL_POSITIVE = ("sqrt", "rsqrt", "reciprocal", "clamp", "clamp_min", "clamp_max", "square")
"""Functions whose value is positive if what they take is."""


class _Sort(IntEnum):
    """What a value is in a scan; of two factors, the higher is the coefficient."""

    SIGNAL = 0
    PLAIN = 1
    GATED = 2
    DECAYED = 3
    GATE = 4
    DECAY = 5


def raise_scans(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Mark the coefficients of every recurrence."""
    result = PassResult("raise_scans")
    graph = graph_module.graph
    explained = explained_values(graph)
    scans = _Scans(explained)
    for node in graph.nodes:
        if node in explained:
            scans.visit(node)
    around = _around(scans.recurrences, explained)
    for product, coefficient in scans.coefficients:
        if product in around and coefficient.target is not ops.coefficient:
            mark(product, coefficient, ops.coefficient, Kind.COEFFICIENT, result)
    if result.changes:
        finish(graph_module)
    return result


class _Scans:
    """Sorts the values of a graph, in order, and finds its recurrences."""

    def __init__(self, explained: Set[fx.Node]) -> None:
        self.explained = explained
        self.sorts: dict[fx.Node, _Sort] = {}
        self.running: set[fx.Node] = set()
        """Running sums, and what is linear in them."""
        self.products: set[fx.Node] = set()
        """Products with a gate, moved about or not."""
        self.carried: set[fx.Node] = set()
        """Sums that hold such a product."""
        self.recurrences: list[fx.Node] = []
        self.coefficients: list[tuple[fx.Node, fx.Node]] = []
        """A product, and the factor of it that is a coefficient if there is a recurrence."""

    def visit(self, node: fx.Node) -> None:
        """Sort one node, all of its inputs sorted."""
        inputs = [leaf for leaf in value_inputs(node) if leaf in self.explained]
        if node.target is ops.coefficient:
            self.sorts[node] = self.sorts[inputs[0]]
        elif _is_boundary(node, self.explained) or not inputs:
            self.sorts[node] = _Sort.PLAIN
        elif is_op(node, *POSITIVE):
            is_decay = is_op(node, "exp", "exp2") and inputs[0] in self.running
            self.sorts[node] = _Sort.DECAY if is_decay else _Sort.GATE
        elif _is_product(node, self.explained):
            self.sorts[node] = self._product(node)
        elif is_op(node, *STILL_POSITIVE) or kind_of(node, self.explained) is Kind.LINEAR:
            self.sorts[node] = _sum([self.sorts[leaf] for leaf in inputs])
            self._linear(node, inputs)
        else:
            is_signal = any(self.sorts[leaf] is _Sort.SIGNAL for leaf in inputs)
            self.sorts[node] = _Sort.SIGNAL if is_signal else _Sort.PLAIN

    def _linear(self, node: fx.Node, inputs: list[fx.Node]) -> None:
        """Follow running sums, products and sums of products through a linear op."""

        def among(found: Set[fx.Node]) -> bool:
            return any(leaf in found for leaf in inputs)

        is_sum = is_op(node, "add", "sub", "rsub")
        is_gate_times_constant = product_of(node.target) and self.sorts[node] >= _Sort.GATE
        if is_op(node, "cumsum") or among(self.running):
            self.running.add(node)
        if among(self.carried) or (is_sum and among(self.products)):
            self.carried.add(node)
        elif is_gate_times_constant or (is_structural(node) and among(self.products)):
            self.products.add(node)

    def _product(self, node: fx.Node) -> _Sort:
        """Sort a product or a quotient of two explained values."""
        first, second = _factors(node, self.explained)
        low, high = sorted((first, second), key=self.sorts.__getitem__)
        lower, higher = self.sorts[low], self.sorts[high]
        if higher >= _Sort.GATE:
            self.products.add(node)
            if low in self.carried or higher is _Sort.DECAY:
                self.recurrences.append(node)
        if lower >= _Sort.GATE or (is_op(node, "div") and high is first):
            return min(lower, _Sort.GATE)
        if not self._is_coefficient(node, low, high):
            return higher if lower else _Sort.SIGNAL
        self.coefficients.append((node, high))
        if lower is _Sort.SIGNAL or low in self.carried or higher < _Sort.GATE:
            return _Sort.SIGNAL
        return _Sort.DECAYED if higher is _Sort.DECAY else _Sort.GATED

    def _is_coefficient(self, product: fx.Node, low: fx.Node, high: fx.Node) -> bool:
        """Whether the higher of two factors is the coefficient of the lower."""
        lower, higher = self.sorts[low], self.sorts[high]
        if higher is _Sort.PLAIN:
            return lower is _Sort.SIGNAL and _is_summed(product)
        if higher is _Sort.GATED and lower is _Sort.PLAIN:
            return _is_computed_from(high, low)
        return lower is not higher


def _sum(sorts: list[_Sort]) -> _Sort:
    """The sort of a sum: a signal in it decides, then what is gated; gates alone stay gates."""
    if all(sort >= _Sort.GATE for sort in sorts):
        return min(sorts)
    if _Sort.SIGNAL in sorts:
        return _Sort.SIGNAL
    return max(sort for sort in sorts if sort < _Sort.GATE)


def _is_product(node: fx.Node, explained: Set[fx.Node]) -> bool:
    return len(_factors(node, explained)) == 2


def _factors(node: fx.Node, explained: Set[fx.Node]) -> list[fx.Node]:
    """The explained factors of a product, numerator and denominator of a quotient."""
    if is_op(node, "div"):
        return [leaf for leaf in leaves(node.args[:2]) if leaf in explained]
    return explained_factors(node, explained)


def _is_summed(node: fx.Node) -> bool:
    """Whether a product's terms are added up: it is a matrix product, or goes to sums alone."""
    if is_matrix_product(node.target):
        return True
    users = list(node.users)
    while len(users) == 1 and is_cast(users[0]):
        users = list(users[0].users)
    return bool(users) and all(is_op(user, "sum") for user in users)


def _is_computed_from(value: fx.Node, source: fx.Node) -> bool:
    """Whether a value depends on what another one is a view or a cast of."""
    while is_structural(source):
        source = source.args[0]  # type: ignore[assignment]
    stack, seen = [value], {value}
    while stack:
        node = stack.pop()
        if node is source:
            return True
        earlier = [leaf for leaf in node.all_input_nodes if leaf not in seen and source <= leaf]
        stack += earlier
        seen.update(earlier)
    return False


def _is_boundary(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a scan ends at a node: a layer with weights, a norm, an attention, a look-up."""
    if node.target is ops.source or node.meta.get("kind") is Kind.STATISTIC:
        return True
    if any(leaf.meta.get("kind") is Kind.STATISTIC for leaf in node.all_input_nodes):
        return True
    if kind_of(node, explained) in (Kind.SOFTMAX, Kind.ATTENTION, Kind.NORM):
        return True
    return is_matrix_product(node.target) and len(explained_factors(node, explained)) == 1


def _around(recurrences: list[fx.Node], explained: Set[fx.Node]) -> set[fx.Node]:
    """The explained nodes that are connected with a recurrence without crossing a boundary."""
    found: set[fx.Node] = set()
    stack = list(recurrences)
    while stack:
        node = stack.pop()
        if node in found or node not in explained or _is_boundary(node, explained):
            continue
        found.add(node)
        stack += [*value_inputs(node), *node.users]
    return found
