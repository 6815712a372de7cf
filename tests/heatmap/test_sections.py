"""What a reader must be told, whatever draws it."""

import math

import pytest
import torch
from drawn import printed, section, spans, strip

from attnlrp_fx.heatmap import Grid, html_fragment
from attnlrp_fx.heatmap.scale import STEPS
from attnlrp_fx.heatmap.sections import notes, share_of_value


def test_not_finite_is_marked_and_named_everywhere():
    row = section(strip(["a", "b", "c"], [1.0, math.nan, -math.inf]))
    assert [attrs["class"] for attrs, _ in spans(row)] == [f"t p{STEPS}", "t x", "t x"]
    (note,) = notes(row)
    assert "1 (nan), 2 (-inf)" in note
    assert note in html_fragment([row])
    for colours in ("truecolor", "256", "standard", None):
        assert "1 (nan), 2 (-inf)" in printed([row], colours)


def test_zero_relevance_is_neutral_and_says_so():
    row = section(strip(["a", "b"], [0.0, 0.0]))
    assert {attrs["class"] for attrs, _ in spans(row)} == {"t p0"}
    assert notes(row) == ["The relevance of every token is zero."]
    assert 'class="bar"' not in html_fragment([row])
    assert "every token is zero" in printed([row], None)


def test_relevance_of_padding_and_empty_rows_are_named():
    empty = strip([], [], hidden=0.25)
    said = " ".join(notes(section(empty)))
    assert "no tokens but padding" in said
    assert "not shown: +0.25" in said


def test_grids_name_zero_and_not_finite():
    zero, bad = Grid("z", torch.zeros(3)), Grid("b", torch.tensor([1.0, math.nan]))
    assert notes(section(grids=[zero, bad])) == [
        "The relevance of z is zero everywhere.",
        "1 of 2 values of b are not finite.",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(2.0, "+1 (50.0% of the value)"), (0.0, "+1"), (None, "+1")]
)
def test_share_of_value_only_where_defined(value, text):
    assert share_of_value(1.0, value) == text
