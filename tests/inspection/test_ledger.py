"""The ledger on nets small enough to check by hand, and on broken rules, which it must expose."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Epsilon, Explanation, Ledger, LogProb, Match, ops
from attnlrp_fx.calculus.postings import edge
from attnlrp_fx.calculus.pullbacks import PULLBACKS, Call, vjp
from attnlrp_fx.inspection.ledger import Entry
from attnlrp_fx.rules.composites import Composite

DOUBLE = torch.float64


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=DOUBLE)


class Net(nn.Module):
    """A function with its parameters, so that hand-made numbers can be put in."""

    def __init__(self, function: Callable[..., Tensor], **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) → (batch, classes)."""
        return self.function(self, x)


def audited(
    function: Callable[..., Tensor],
    x: Tensor,
    composite: str | Composite = "attnlrp",
    target: Any = 0,
    **parameters: Tensor,
) -> Explanation:
    explainer = attnlrp_fx.compile(
        Net(function, **parameters).eval(),
        torch.randn(3, x.shape[1], dtype=x.dtype),
        composite=composite,
        target=target,
        backend="eager",
        audit=True,
    )
    return explainer(x)


def ledger_of(explanation: Explanation) -> Ledger:
    """Its ledger, closed to rounding."""
    ledger = explanation.ledger
    assert ledger is not None
    assert abs(ledger.residual) <= 1e-12 * max(1.0, abs(ledger.target))
    return ledger


def by_node(ledger: Ledger) -> dict[str, Entry]:
    return {entry.node: entry for entry in ledger.entries}


def test_bias() -> None:
    """y = 1·2 + 2·(−1) + 3 = 3: the inputs get 2 and −2, the bias keeps 3, all through one node."""
    explanation = audited(
        lambda net, x: F.linear(x, net.w, net.b),
        matrix([2.0, -1.0]),
        w=matrix([1.0, 2.0], [5.0, 7.0]),
        b=torch.tensor([3.0, 11.0], dtype=DOUBLE),
    )
    ledger = ledger_of(explanation)
    assert explanation.relevance["x"].tolist() == [[2.0, -2.0]]
    assert (ledger.target, ledger.inputs, ledger.absorbed) == (3.0, {"x": 0.0}, 3.0)
    entry = by_node(ledger)["linear"]
    assert (entry.received, entry.passed, entry.absorbed) == (3.0, 0.0, 3.0)
    assert (entry.rule, entry.cause) == ("Epsilon()", "bias")
    assert "test_ledger.py" in entry.source
    assert ledger.by_cause() == {"bias": 3.0, "target": 0.0}


def test_epsilon() -> None:
    """z = 4 and −4, ε = 1, c = 1: of each, 1/5 is absorbed; the sign of ε follows z."""
    composite = COMPOSITES["attnlrp"].with_rules((Match(op="aten.linear.*"), Epsilon(epsilon=1.0)))
    for sign in (1.0, -1.0):
        ledger = ledger_of(
            audited(
                lambda net, x: F.linear(x, net.w),
                sign * matrix([2.0, 1.0]),
                composite,
                w=matrix([1.0, 2.0], [0.0, 1.0]),
            )
        )
        assert math.isclose(ledger.inputs["x"], sign * 3.2)
        entry = by_node(ledger)["linear"]
        assert math.isclose(entry.absorbed, sign * 0.8)
        assert entry.rule == "Epsilon(epsilon=1.0)"


def test_epsilon_and_bias() -> None:
    """z = 4 of which the bias is 1, ε = 1: c' = 4/5, so bias 4/5 and ε 4/5 stay."""
    composite = COMPOSITES["attnlrp"].with_rules((Match(op="aten.linear.*"), Epsilon(epsilon=1.0)))
    ledger = ledger_of(
        audited(
            lambda net, x: F.linear(x, net.w, net.b),
            matrix([3.0]),
            composite,
            w=matrix([1.0], [1.0]),
            b=torch.tensor([1.0, 0.0], dtype=DOUBLE),
        )
    )
    assert math.isclose(ledger.inputs["x"], 2.4)
    assert by_node(ledger)["linear"].causes == pytest.approx({"bias": 0.8, "epsilon": 0.8})


def test_intercept() -> None:
    """sigmoid(x) = ½ + (sigmoid(x) − ½): f(0) is absorbed, the rest passed on."""
    ledger = ledger_of(audited(lambda net, x: torch.sigmoid(x), matrix([1.5, -2.0])))
    entry = by_node(ledger)["sigmoid"]
    assert (entry.absorbed, entry.cause) == (0.5, "intercept")
    assert math.isclose(ledger.inputs["x"], 1 / (1 + math.exp(-1.5)) - 0.5)


def test_softmax() -> None:
    """Absorbed by softmax, for R at output j: R (1 − x_j + Σ_i s_i x_i) (eq. 13, summed)."""
    x = matrix([1.0, 2.0, 0.5])
    ledger = ledger_of(audited(lambda net, x: torch.softmax(x, -1), x, target=1))
    s = torch.softmax(x[0], 0)
    expected = s[1] * (1 - x[0, 1] + (s * x[0]).sum())
    entry = by_node(ledger)["softmax"]
    assert math.isclose(entry.absorbed, float(expected), rel_tol=1e-12)
    assert entry.cause == "softmax"


def test_shift_of_a_norm() -> None:
    """LayerNorm absorbs its shift, and nothing else."""
    shift = torch.tensor([0.25, 3.0, -1.0], dtype=DOUBLE)
    x = matrix([1.0, 2.0, 4.0])
    ledger = ledger_of(
        audited(lambda net, x: F.layer_norm(x, (3,), net.w, net.b), x, w=1 - shift, b=shift)
    )
    entry = by_node(ledger)["layer_norm"]
    assert (entry.absorbed, entry.cause) == (0.25, "shift")


def test_fused_attention() -> None:
    """Attention absorbs by its softmax; with constant weights (CP-LRP) it absorbs nothing."""

    def attend(net: Net, x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], 1, 3, 2)
        return F.scaled_dot_product_attention(heads, heads, heads).flatten(1)

    x = matrix([1.0, 2.0, 0.5, -1.0, 0.25, 3.0])
    name = "scaled_dot_product_attention"
    entry = by_node(ledger_of(audited(attend, x)))[name]
    assert entry.cause == "softmax"
    assert abs(entry.absorbed) > 1e-3
    assert by_node(ledger_of(audited(attend, x, "cp-lrp")))[name].absorbed == 0


def test_target() -> None:
    """log p = Σ c·y + rest: what a curved target keeps is entered under its name."""
    x = matrix([1.0, 2.0, 0.5])
    ledger = ledger_of(audited(lambda net, x: x * 2, x, target=LogProb(1)))
    y = 2 * x[0]
    value = torch.log_softmax(y, 0)[1]
    seeded = y[1] - (torch.softmax(y, 0) * y).sum()
    entry = by_node(ledger)["target"]
    assert math.isclose(entry.absorbed, float(value - seeded), rel_tol=1e-12)
    assert math.isclose(ledger.inputs["x"], float(seeded), rel_tol=1e-12)


def test_gradient_composite() -> None:
    """x³ under the gradient: 3x³ arrive, so −2x³ is entered as absorbed."""
    ledger = ledger_of(audited(lambda net, x: x**3, matrix([2.0, 1.0]), "gradient"))
    assert (ledger.target, ledger.inputs["x"], ledger.absorbed) == (8.0, 24.0, -16.0)
    assert by_node(ledger)["pow_1"].cause == "gradient"


def test_constants() -> None:
    """What a concatenation, a fill and a shift put in is theirs, node by node."""

    def function(net: Net, x: Tensor) -> Tensor:
        filled = x.masked_fill(torch.tensor([True, False]), 3.0)
        return (torch.cat([filled, torch.full_like(x, 5.0)], 1) + 7).sum(1, keepdim=True)

    ledger = ledger_of(audited(function, matrix([1.0, 2.0])))
    absorbed = [(e.node.rstrip("_0123456789"), e.absorbed) for e in ledger.entries if e.absorbed]
    assert absorbed == [("masked_fill", 3.0), ("cat", 10.0), ("add", 28.0)]
    assert ledger.inputs == {"x": 2.0}


def test_a_batch_is_summed() -> None:
    """Every figure is the sum over the rows."""
    x = torch.randn(4, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    explanation = audited(lambda net, x: torch.softmax(x, -1), x, target=2)
    ledger = ledger_of(explanation)
    assert math.isclose(ledger.target, float(explanation.target_value.sum()))
    assert math.isclose(ledger.inputs["x"], float(explanation.relevance["x"].sum()))


def _net(net: Net, x: Tensor) -> Tensor:
    """Every kind of rule, one after the other."""
    heads = F.layer_norm(x, (4,), net.w[0], net.w[1]).view(-1, 1, 2, 2)
    attended = F.scaled_dot_product_attention(heads, heads, heads).flatten(1)
    mixed = F.linear(torch.softmax(attended, -1) + x, net.w, net.w[0])
    gated = F.silu(mixed) * attended
    return gated + torch.maximum(gated, x) + F.normalize(mixed, dim=-1)


def _off_by_a_hundredth(pullback: Callable[[Call], Any]) -> Callable[[Call], Any]:
    """A rule whose pullback is wrong by a factor of 1.01."""

    def broken(call: Call) -> Any:
        output, pull = pullback(call)
        return output, lambda c: [None if g is None else 1.01 * g for g in pull(c)]

    return broken


WEIGHT = torch.randn(4, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
X = torch.randn(2, 4, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
BY_LAW = ["linear", "uniform", "identity", "winner", "norm"]


@pytest.mark.parametrize("broken", [None, *BY_LAW])
def test_a_broken_rule_does_not_close(broken: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that breaks its law by a hundredth shows; the ledger is no mere difference."""
    if broken is not None:
        op = getattr(ops, broken)
        monkeypatch.setitem(PULLBACKS, op, _off_by_a_hundredth(PULLBACKS[op]))
    ledger = audited(_net, X, w=WEIGHT).ledger
    assert ledger is not None
    assert (abs(ledger.residual) <= 1e-12) == (broken is None)


def test_a_gradient_in_place_of_a_rule_does_not_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commonest mistake: an activation's own derivative."""
    monkeypatch.setitem(PULLBACKS, ops.identity, vjp)
    ledger = audited(_net, X, w=WEIGHT).ledger
    assert ledger is not None
    assert abs(ledger.residual) > 1e-3


def test_constant_weights_of_attention_are_held_to_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PULLBACKS, ops.attention, _off_by_a_hundredth(PULLBACKS[ops.attention]))
    ledger = audited(_net, X, "cp-lrp", w=WEIGHT).ledger
    assert ledger is not None
    assert abs(ledger.residual) > 1e-6


def printed(ledger: Ledger) -> str:
    console = Console(width=160, no_color=True, highlight=False)
    with console.capture() as text:
        console.print(ledger)
    return text.get()


def test_print() -> None:
    """The table says where most of the relevance went, why, and that it adds up."""
    ledger = ledger_of(audited(_net, X, w=WEIGHT))
    text = printed(ledger)
    largest = ledger.largest(1)[0]
    assert abs(largest.absorbed) == max(abs(entry.absorbed) for entry in ledger.entries)
    line = next(line for line in text.splitlines() if largest.node in line)
    for part in (largest.cause, f"{largest.absorbed:.5g}"):
        assert part in line
    assert f"target {ledger.target:.6g}" in text
    assert "residual" in text
    assert f"{100 * ledger.inputs['x'] / ledger.target:.1f}" in text


def _entry(name: str, absorbed: float, cause: str = "constant") -> Entry:
    causes = {cause: absorbed}
    return Entry(name, "Epsilon()", "linear", "layer", "file:1", 5.0, 5.0 - absorbed, causes)


def test_sums() -> None:
    """absorbed, residual, reasons and the largest, from the entries alone."""
    entries = (_entry("a", -3.0), _entry("b", 1.0), _entry("c", 0.0), _entry("d", 2.0, "softmax"))
    ledger = Ledger(10.0, {"x": 9.0, "y": 1.5}, entries)
    assert ledger.absorbed == 0.0
    assert ledger.residual == -0.5
    assert list(ledger.by_cause().items()) == [("constant", -2.0), ("softmax", 2.0)]
    assert [entry.node for entry in ledger.largest()] == ["a", "d", "b"]
    assert [entry.node for entry in ledger.largest(1)] == ["a"]
    assert "2 others" in printed(Ledger(1.0, {"x": 1.0}, tuple(_entry("e", 0.0) for _ in "ab")))
    assert printed(Ledger(0.0, {"x": 0.0}, ()))


def test_an_infinite_value_that_gets_nothing() -> None:
    """−∞ in a mask times a coefficient of zero counts nothing; integers neither."""
    value = torch.tensor([-torch.inf, 2.0])
    (total,) = edge(value, torch.tensor([0.0, 3.0]), guarded=True)
    assert float(total) == 6.0
    assert edge(torch.tensor([1]), torch.tensor([1.0])) == []
    half = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    (total,) = edge(half, half)
    assert (total.dtype, float(total)) == (torch.float32, 4096.0)


def test_no_ledger_unless_audited() -> None:
    model = Net(lambda net, x: x * 2).eval()
    explainer = attnlrp_fx.compile(model, torch.ones(2, 3), backend="eager")
    assert explainer(torch.ones(2, 3)).ledger is None
