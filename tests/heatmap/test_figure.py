"""Figures hold what they show, warn of nothing, and read in the text's direction."""

import io
import math
import warnings

import pytest
import torch
from drawn import grid, section, strip

from attnlrp_fx.heatmap import Grid, figure


def drawn_figure(*sections):
    pytest.importorskip("matplotlib")
    drawing = figure(sections)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.savefig(io.BytesIO(), format="png", dpi=50)
    return drawing


def figure_texts(drawing):
    return [text.get_text() for axes in drawing.axes for text in axes.texts]


def test_figure_shows_tokens_and_facts():
    texts = figure_texts(drawn_figure(section(strip(["$a", "b$"], [1.0, math.nan]), value=None)))
    assert {"$a", "b$", "-1", "+1", "logit 'positive' (1)"} <= set(texts)
    assert any("not finite at 1 (nan)" in text for text in texts)


def test_figure_grows_with_the_text():
    short, long = (drawn_figure(section(strip(["word"] * n, [1.0] * n))) for n in (5, 400))
    assert long.get_size_inches()[1] > 3 * short.get_size_inches()[1]
    for axes in long.axes:
        for text in axes.texts:
            assert 0 <= text.get_position()[0] <= 8


def test_figure_draws_float_inputs_and_not_finite_cells():
    relevance = torch.tensor([[1.0, math.nan], [math.inf, -1.0]])
    drawing = drawn_figure(section(grids=[Grid("x", relevance), grid(3, 4, 5), grid(9)]))
    images = [image for axes in drawing.axes for image in axes.images]
    assert [image.get_array().shape for image in images] == [(2, 2), (4, 5), (1, 9)]
    assert images[0].get_array().mask.tolist() == [[False, True], [True, False]]


def test_figure_reads_hebrew_from_the_right():
    drawing = drawn_figure(section(strip(["שלום", "עולם"], [1.0, -1.0])))
    places = {
        text.get_text(): text.get_position()[0] for axes in drawing.axes for text in axes.texts
    }
    assert places["שלום"] > places["עולם"]


def test_figure_replaces_characters_that_no_font_has():
    unassigned_glyph = "\U0001f9a9\U00013000"
    drawn_figure(section(strip([unassigned_glyph], [1.0])))
