"""A global average pool is a mean; other pools stay."""

import pytest
import torch
from rewriting import Written, captured, copy_of, run, text
from torch import nn

import attnlrp_fx
from attnlrp_fx.passes import PassContext, lower_pools


def lowered(function):
    """Before, after, and what the pass says."""
    before = captured(Written(function), {"x": torch.randn(2, 3, 4, 6)})
    after = copy_of(before)
    return before, after, lower_pools(after, PassContext())


def test_golden():
    before, after, result = lowered(lambda m, x: torch.nn.functional.adaptive_avg_pool2d(x, 1))
    assert result.changes == 1
    assert (
        text(before)
        == """\
adaptive_avg_pool2d = aten.adaptive_avg_pool2d(x, [1, 1])
return [adaptive_avg_pool2d]"""
    )
    assert (
        text(after)
        == """\
mean = aten.mean(x, [-2, -1], True)
return [mean]"""
    )


def test_meaning_is_unchanged():
    before, after, _ = lowered(lambda m, x: torch.nn.functional.adaptive_avg_pool2d(x, 1))
    given = {"x": torch.randn(2, 3, 4, 6)}
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=1e-6)


def test_near_miss():
    before, after, result = lowered(lambda m, x: torch.nn.functional.adaptive_avg_pool2d(x, 2))
    assert result.changes == 0
    assert "not to one position" in result.near_misses[0]
    assert text(after) == text(before)


@pytest.mark.parametrize("pool", [nn.AdaptiveAvgPool1d(1), nn.AdaptiveAvgPool1d(3)])
def test_relevance_reaches_the_input(pool):
    """Law 2: the in-place kernel once lost all of it."""
    torch.manual_seed(0)
    model = nn.Sequential(pool, nn.Flatten(1), nn.LazyLinear(2)).double().eval()
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    model(x)
    explainer = attnlrp_fx.compile(model, x, composite="gradient", backend="eager")
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    found = explainer(x, target=1).relevance["input"]
    torch.testing.assert_close(found, x * gradient, rtol=1e-12, atol=1e-12)
