"""Colours keep their order, their symmetry and readable text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlrp_fx.heatmap.scale import DARK, LIGHT, STEPS, contrast, ink, level, limit, luminance

CHANNEL = st.integers(0, 255)
COLOUR = st.tuples(CHANNEL, CHANNEL, CHANNEL)


@given(COLOUR)
def test_text_is_readable_on_any_background(background):
    assert contrast(ink(background), background) >= 4.5


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_palettes_keep_one_ink_and_its_contrast(palette):
    colours = [palette.colour(step / STEPS) for step in range(-STEPS, STEPS + 1)]
    assert len({ink(colour) for colour in colours}) == 1
    assert min(contrast(ink(colour), colour) for colour in colours) >= 4.5
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(("palette", "sign"), [(LIGHT, -1), (DARK, 1)])
def test_strength_shows_in_luminance_to_either_side(palette, sign):
    for side in (1, -1):
        ramp = [luminance(palette.colour(side * n / STEPS)) for n in range(STEPS + 1)]
        assert ramp == sorted(ramp, reverse=sign < 0)


def test_luminance_and_contrast_are_wcags():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert luminance((255, 0, 0)) == pytest.approx(0.2126)


@given(st.floats(), st.floats(0, allow_nan=False))
def test_level_is_bounded_odd_and_none_only_where_not_finite(relevance, limit):
    step = level(relevance, limit)
    assert (step is None) == (not math.isfinite(relevance))
    if step is not None:
        assert -STEPS <= step <= STEPS
        assert level(-relevance, limit) == -step


def test_level_of_zero_scale_is_neutral():
    assert level(0.0, 0.0) == 0
    assert limit([float("nan"), -2.0, 1.0, float("inf")]) == 2.0
    assert limit([]) == 0.0
