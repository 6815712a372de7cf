"""Choices that cannot be drawn are refused."""

import math

import pytest

from attnlrp_fx.errors import InputError
from attnlrp_fx.heatmap import PLAIN, Display


@pytest.mark.parametrize("smooth", [-1.0, math.nan, math.inf, 1e9])
def test_smoothing_has_bounds(smooth):
    with pytest.raises(InputError, match=r"cannot be smoothed by(.|\n)*from 0 to 1000"):
        Display(smooth)


def test_nothing_is_smoothed_unasked():
    assert Display() == PLAIN
    assert PLAIN.smooth == 0
