"""Assertions that export leaves in a graph go; everything that computes stays."""

import torch
from rewriting import Written, captured, copy_of, run, text

from attnlrp_fx.passes import PassContext, drop_assertions


def dropped(function):
    """Before, after, and what the pass says."""
    before = captured(Written(function), {"x": torch.randn(4, 3)})
    after = copy_of(before)
    return before, after, drop_assertions(after, PassContext())


def test_golden():
    before, after, result = dropped(lambda m, x: torch.tanh((x * 2).to(x.dtype)))
    assert result.changes == 1
    assert (
        text(before)
        == """\
mul = aten.mul(x, 2)
_assert_tensor_metadata = aten._assert_tensor_metadata(mul, dtype=torch.float32)
to = aten.to(mul, torch.float32)
tanh = aten.tanh(to)
return [tanh]"""
    )
    assert (
        text(after)
        == """\
mul = aten.mul(x, 2)
to = aten.to(mul, torch.float32)
tanh = aten.tanh(to)
return [tanh]"""
    )


def test_check_of_a_value():
    def function(m, x):
        torch._assert_async(x.sum() < 1e9)
        return x * 2

    before, after, result = dropped(function)
    assert "assert" in text(before)
    assert "assert" not in text(after)
    assert result.changes == 1


def test_meaning_is_unchanged():
    before, after, _ = dropped(lambda m, x: torch.tanh((x * 2).to(x.dtype)))
    given = {"x": torch.randn(4, 3)}
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


def test_near_miss_of_a_graph_without_assertions():
    before, after, result = dropped(lambda m, x: x.clamp(0) * (x > 1))
    assert result.changes == 0
    assert text(after) == text(before)
