"""In evaluation mode a randomised leaky ReLU is a leaky ReLU; one that draws numbers stays."""

import torch
import torch.nn.functional as F
from rewriting import Written, captured, copy_of, run, text
from torch import nn

import attnlrp_fx
from attnlrp_fx.passes import PassContext, lower_rrelu


def lowered(function):
    before = captured(Written(function), {"x": torch.randn(2, 3)})
    after = copy_of(before)
    return before, after, lower_rrelu(after, PassContext())


def test_golden():
    _, after, result = lowered(lambda m, x: F.rrelu(x, 0.25, 0.5))
    assert result.changes == 1
    assert (
        text(after)
        == """\
leaky_relu = aten.leaky_relu(x, 0.375)
return [leaky_relu]"""
    )


def test_meaning_is_unchanged():
    before, after, _ = lowered(lambda m, x: F.rrelu(x))
    given = {"x": torch.randn(2, 3)}
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


def test_near_miss():
    before, after, result = lowered(lambda m, x: F.rrelu(x, training=True))
    assert result.changes == 0
    assert "draws" in result.near_misses[0]
    assert text(after) == text(before)


def test_it_hands_its_relevance_on():
    model = nn.RReLU().double().eval()
    x = torch.randn(2, 3, dtype=torch.float64)
    explanation = attnlrp_fx.compile(model, x, backend="eager", target=1)(x)
    expected = torch.zeros_like(x)
    expected[:, 1] = model(x)[:, 1]
    torch.testing.assert_close(explanation.relevance["input"], expected)
