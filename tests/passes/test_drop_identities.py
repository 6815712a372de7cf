"""Ops that return their input go; ops that only look like it stay."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, captured, copy_of, run, text

from attnlrp_fx.passes import PassContext, drop_assertions, drop_identities, run_passes

aten = torch.ops.aten


def dropped(function, *, dynamic=False):
    """Before, after, and what the pass says; assertions on casts are not the matter here."""
    before = captured(Written(function), {"x": torch.randn(4, 6)}, dynamic=dynamic)
    run_passes(before, PassContext(), (drop_assertions,))
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (drop_identities,))
    return before, after, result


def mixed(m, x):
    """An identity of every kind, one after another, each on something computed."""
    y = aten.alias(x * 2)
    y = aten.dropout(y, 0.5, False)
    y = aten.slice(y, 1, 0, 2**63 - 1)
    y = aten._to_copy(y, dtype=torch.float32)
    y = aten.view(y, [4, 6])
    y = aten.expand(y, [4, 6])
    return aten.clone(y) + 1


def test_golden():
    before, after, result = dropped(mixed)
    assert (
        text(before)
        == """\
mul = aten.mul(x, 2)
alias = aten.alias(mul)
dropout = aten.dropout(alias, 0.5, False)
slice = aten.slice(dropout, 1, 0, 9223372036854775807)
_to_copy = aten._to_copy(slice, dtype=torch.float32)
reshape = aten.reshape(_to_copy, [4, 6])
expand = aten.expand(reshape, [4, 6])
clone = aten.clone(expand)
add = aten.add(clone, 1)
return [add]"""
    )
    assert (
        text(after)
        == """\
mul = aten.mul(x, 2)
add = aten.add(mul, 1)
return [add]"""
    )
    assert result.changes == text(before).count("\n") - text(after).count("\n")


IDENTITIES = {
    "alias": lambda m, x: aten.alias(x * 2) + 1,
    "dropout": lambda m, x: F.dropout(x * 2, 0.3, training=False) + 1,
    "channel dropout": lambda m, x: aten.feature_dropout(x * 2, 0.3, False) + 1,
    "whole slice": lambda m, x: (x * 2)[:, 0:] + 1,
    "cast to the same dtype": lambda m, x: aten._to_copy(x * 2, dtype=torch.float32) + 1,
    "type of another": lambda m, x: aten.type_as(x * 2, x) + 1,
    "view of the same shape": lambda m, x: aten.view(x * 2, [4, -1]) + 1,
    "copy of the same layout": lambda m, x: (x * 2).clone() + 1,
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity_goes(name):
    before, after, _ = dropped(IDENTITIES[name])
    assert text(after) == ("mul = aten.mul(x, 2)\nadd = aten.add(mul, 1)\nreturn [add]")
    given = {"x": torch.randn(4, 6)}
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


def transposed_and_viewed(m, x):
    """The copy is what makes the view possible."""
    return x.t().clone(memory_format=torch.contiguous_format).view(-1) + 1


NEAR_MISSES = {
    "detach": lambda m, x: (x * 2).detach() + 1,
    "dropout in training": lambda m, x: aten.dropout(x, 0.5, True),
    "part of a slice": lambda m, x: x[:, 1:] + 1,
    "every other": lambda m, x: x[:, ::2] + 1,
    "up to an end": lambda m, x: x[:, :5] + 1,
    "cast to another dtype": lambda m, x: x.double() + 1,
    "view of another shape": lambda m, x: x.view(-1) + 1,
    "expansion": lambda m, x: x.sum(0, keepdim=True).expand(4, 6) + 1,
    "copy in another layout": transposed_and_viewed,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    before, after, result = dropped(NEAR_MISSES[name])
    assert result.changes == 0
    assert text(after) == text(before)


def test_sizes_are_compared_for_every_input():
    """x.view(4, 6) is no identity where the example's 4 may be another number."""
    before, after, result = dropped(
        lambda m, x: x.view(x.shape[0], x.shape[1]) + x.view(-1, x.shape[0]).t(), dynamic=True
    )
    assert result.changes == 1
    for size in ((4, 6), (3, 5)):
        given = {"x": torch.randn(size[0], size[0])}
        torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)
