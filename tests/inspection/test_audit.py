"""Audits: the ledger measured edge by edge, pictures of it, and what speaks against trusting it."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from inspected import looked, printed
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import InputError, Ledger
from attnlrp_fx.inspection.caveats import digits_kept, of_relevance
from attnlrp_fx.inspection.flow import flow_of
from attnlrp_fx.inspection.ledger import Entry


def test_an_audit_is_the_programs_ledger() -> None:
    """Few edges measured, the rest by law, or every edge: the same figures."""
    found = looked()
    explanation = found.explainer(found.inputs)
    own, other = explanation.ledger, found.audit.ledger
    assert torch.allclose(
        found.audit.relevance["input_ids"], explanation.relevance["input_ids"], rtol=1e-12
    )
    assert (own.target, own.inputs) == (pytest.approx(other.target), pytest.approx(other.inputs))
    assert abs(own.residual) < 1e-12
    assert abs(other.residual) < 1e-12
    for a, b in zip(own.entries, other.entries, strict=True):
        assert (a.node, a.rule) == (b.node, b.rule)
        assert (a.received, a.passed) == pytest.approx((b.received, b.passed), abs=1e-12)
        assert a.causes == pytest.approx(b.causes, abs=1e-12)
        assert abs(b.discrepancy) < 1e-12
    assert own.flows == pytest.approx(other.flows, abs=1e-12)


def test_programs_measure_few_edges() -> None:
    """Most edges follow from others: that is what keeps the ledger cheap."""
    (compiled,) = looked().explainer._running.programs.compiled.values()
    posted = [key for step in compiled.schedule.relevance for key in step.audited]
    edges = [account for _, account in posted if isinstance(account, int)]
    assert len(edges) < len(looked().audit.ledger.flows) / 3


def test_sums() -> None:
    """By cause, kind and module: each way everything that is absorbed."""
    ledger = looked().audit.ledger
    for sums in (ledger.by_cause(), ledger.by_kind(), ledger.by_module(), ledger.by_module(2)):
        assert sum(sums.values()) == pytest.approx(ledger.absorbed)
    assert {"bias", "shift", "softmax"} <= set(ledger.by_cause())
    assert "blocks.1" in ledger.by_module(2)
    table = ledger.to_pandas()
    assert table["absorbed"].sum() == pytest.approx(ledger.absorbed)
    assert table.groupby("cause")["absorbed"].sum()["bias"] == pytest.approx(
        ledger.by_cause()["bias"]
    )


def test_plain_words() -> None:
    def entry(node: str, module: str, **causes: float) -> Entry:
        return Entry(node, "R", "linear", module, "", 0.0, 0.0, causes)

    ledger = Ledger(
        2.0,
        {"x": 1.0},
        (
            entry("a", "model.layers.3.mlp.down", bias=0.24),
            entry("b", "encoder.layer.11.attention", softmax=-0.1),
            entry("c", "classifier", bias=0.05, epsilon=0.04),
            entry("d", "", constant=0.02),
        ),
    )
    assert ledger.sentences() == [
        "the bias of mlp.down in layer 3 absorbs 12 %",
        "softmax in attention in layer 11 adds 5 %",
        "the bias of classifier absorbs 2.5 %",
        "the stabiliser ε in classifier ('c') absorbs 2 %",
        "a constant that is added ('d') absorbs 1 %",
    ]


def test_printed_and_written(tmp_path: Path) -> None:
    found = looked().audit
    text = printed(found)
    for part in ("Absorbed by cause", "Residual", found.ledger.sentences(1)[0], found.target):
        assert part in text
    for name in ("flow.html", "flow.png", "flow.svg"):
        found.save(tmp_path / name)
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "flow.html").read_text()
    assert "<svg" in page
    assert "Absorbed by module" in page
    assert not re.search(r'(src|href)="http', page)


def test_the_flow_is_to_scale() -> None:
    """Of 10, a bias keeps 4 and another adds 1: bands of 10, 6 and 7, leaves of 4 and 1."""
    entries = (
        Entry("b", "R", "linear", "first", "", 6, 7, {"bias": -1.0}),
        Entry("a", "R", "linear", "last", "", 10, 6, {"bias": 4.0}),
        Entry("target", "seed", "target", "", "", 10, 10, {"target": 0.0}),
    )
    flow = flow_of(Ledger(10.0, {"x": 7.0}, entries))
    ends = [(ribbon, ribbon.points[0][1], ribbon.points[4][1]) for ribbon in flow.ribbons]
    heights = {}
    for ribbon, upper, lower in ends:
        heights[ribbon.tip] = abs(lower - upper) / 15
    assert heights["100.0 % goes on"] == pytest.approx(10)
    assert heights["60.0 % goes on"] == pytest.approx(6)
    assert heights["70.0 % reaches the inputs"] == pytest.approx(7)
    assert heights["a bias at last absorbs 40.0 %"] == pytest.approx(4)
    assert heights["a bias at first adds 10.0 %"] == pytest.approx(1)
    assert [word.text for word in flow.words if word.is_tilted] == ["last", "first"]
    assert flow_of(Ledger(0.0, {"x": 0.0}, ())).to_svg().startswith("<svg")
    many = [Entry(f"n{i}", "R", "linear", f"m{i}.x", "", 1, 1, {"bias": 0.01}) for i in range(99)]
    names = [w for w in flow_of(Ledger(1.0, {"x": 0.01}, tuple(many))).words if w.is_tilted]
    assert len(names) <= 41


def test_cancelling_and_the_first_token() -> None:
    calm = torch.tensor([[1.0, 2.0, 1.0, 3.0]])
    assert of_relevance({"ids": calm}) == []
    wild = torch.tensor([[1.0, 2.0, 1.0, 3.0], [5.0, -5.0, 5.0, -4.9]])
    (caveat,) = of_relevance({"ids": wild})
    assert (caveat.kind, round(caveat.figure)) == ("cancelling", 199)
    assert "199 times |ΣR|" in str(caveat)
    assert "Contrast" in caveat.remedy
    sink = torch.tensor([[9.0, 8.0, 1.0, 1.0, 1.0]])
    assert of_relevance({"ids": sink}) == []
    (caveat,) = of_relevance({"ids": sink}, {"ids": torch.tensor([[0, 1, 1, 1, 1]])})
    assert (caveat.kind, round(caveat.figure, 3)) == ("first token", 0.727)


class Sharp(nn.Module):
    """Attention so sharp that its softmax is one-hot; fused, or written out and alone."""

    def __init__(self, is_fused: bool, scale: float) -> None:
        super().__init__()
        self.is_fused, self.scale = is_fused, scale

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, 4) → (batch, 4)."""
        if self.is_fused:
            return F.scaled_dot_product_attention(self.scale * x, x, x).sum(1)
        return torch.softmax(self.scale * x, -1).sum(1)


@pytest.mark.parametrize("is_fused", [True, False])
def test_a_saturated_softmax(is_fused: bool) -> None:
    x = 3 * torch.eye(4)[None] + torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    for scale, is_saturated in ((50.0, True), (0.1, False)):
        explainer = attnlrp_fx.compile(
            Sharp(is_fused, scale).eval(), x, backend="eager", target=attnlrp_fx.Logit(0)
        )
        found = {caveat.kind: caveat for caveat in explainer.audit(x).caveats}
        assert ("saturated softmax" in found) == is_saturated
        if is_saturated:
            assert found["saturated softmax"].figure > 0.7
            assert "cp-lrp" in found["saturated softmax"].remedy
            assert "best" in found["saturated softmax"].remedy


def test_digits_lost_to_low_precision() -> None:
    """Of a bfloat16 model few digits are left, and all of a float64 one; only on demand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2)).bfloat16().eval()
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    explainer = attnlrp_fx.compile(model, x, backend="eager")
    assert explainer.audit(x).digits == {}
    found = explainer.audit(x, reference=torch.float32)
    assert 0.5 < found.digits["input"] < 4
    wide = attnlrp_fx.compile(model.float(), x.float(), backend="eager")(x.float())
    expected = digits_kept(found.relevance, wide.relevance)
    assert found.digits == pytest.approx(expected, abs=0.05)
    assert digits_kept({"x": x}, {"x": x}) == {"x": 17.0}
    assert math.isclose(digits_kept({"x": 1.01 * x.double()}, {"x": x})["x"], 2, abs_tol=1e-6)


def test_errors() -> None:
    with pytest.raises(InputError):
        looked().explainer.audit(torch.ones(2, 3))
    with torch.device("meta"):
        model = nn.Linear(2, 2).eval()
    explainer = attnlrp_fx.compile(model, torch.ones(1, 2, device="meta"), backend="eager")
    with pytest.raises(InputError, match="meta device"):
        explainer.audit(torch.ones(1, 2))
