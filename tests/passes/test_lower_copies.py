"""A functional copy is what is copied, cast and expanded to what it is copied into."""

import pytest
import torch
from rewriting import Written, captured, copy_of, run, text

from attnlrp_fx.passes import PassContext, lower_copies

aten = torch.ops.aten


def lowered(function, *, dynamic=False, dtype=torch.float32):
    """Before, after, and what the pass says."""
    given = {"x": torch.randn(4, 6, dtype=dtype)}
    before = captured(Written(function), given, dynamic=dynamic)
    after = copy_of(before)
    return before, after, lower_copies(after, PassContext())


def same(m, x):
    return aten.copy(x * 0, x * 2) + 1


def cast_and_expanded(m, x):
    return aten.copy(torch.zeros(4, 6, dtype=torch.float64), x[:1] * 2) + 1


def test_golden_same_shape_and_dtype():
    before, after, result = lowered(same)
    assert result.changes == 1
    assert (
        text(before)
        == """\
mul = aten.mul(x, 0)
mul_1 = aten.mul(x, 2)
copy = aten.copy(mul, mul_1)
add = aten.add(copy, 1)
return [add]"""
    )
    assert (
        text(after)
        == """\
mul = aten.mul(x, 2)
add = aten.add(mul, 1)
return [add]"""
    )


def test_golden_cast_and_expanded():
    before, after, result = lowered(cast_and_expanded)
    assert result.changes == 1
    assert (
        text(before)
        == """\
zeros = aten.zeros([4, 6], dtype=torch.float64)
slice = aten.slice(x, 0, 0, 1)
mul = aten.mul(slice, 2)
copy = aten.copy(zeros, mul)
add = aten.add(copy, 1)
return [add]"""
    )
    assert (
        text(after)
        == """\
slice = aten.slice(x, 0, 0, 1)
mul = aten.mul(slice, 2)
_to_copy = aten._to_copy(mul, dtype=torch.float64)
expand = aten.expand(_to_copy, [4, 6])
add = aten.add(expand, 1)
return [add]"""
    )


def in_place(m, x):
    """Into a part of a buffer, from a row."""
    buffer = torch.zeros(4, 6, dtype=torch.float64)
    buffer[:, 1:3].copy_(x[:, :1])
    return buffer + 1


@pytest.mark.parametrize("function", [same, cast_and_expanded, in_place])
@pytest.mark.parametrize("dynamic", [False, True])
def test_meaning_is_unchanged(function, dynamic):
    before, after, _ = lowered(function, dynamic=dynamic)
    given = {"x": torch.randn(4, 6)}
    assert "aten.copy(" not in text(after)
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


def test_any_size():
    before, after, result = lowered(
        lambda m, x: aten.copy(torch.zeros_like(x), x.sum(0, keepdim=True)) + 1, dynamic=True
    )
    assert result.changes == 1
    for size in ((4, 6), (2, 9)):
        given = {"x": torch.randn(size)}
        torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


def test_near_miss_of_a_clone():
    """A clone copies too, but into nothing."""
    before, after, result = lowered(lambda m, x: x.clone() + 1)
    assert result.changes == 0
    assert text(after) == text(before)
