"""Figures hold what they show, warn of nothing, and read in the text's direction."""

import io
import math
import warnings

import pytest
import torch
from drawn import gallery, grid, on_image, section, strip

from attnlrp_fx.heatmap import PLAIN, Display, Grid, figure


def drawn_figure(*sections, display=PLAIN):
    pytest.importorskip("matplotlib")
    drawing = figure(sections, display)
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


def figure_images(drawing):
    return [image for axes in drawing.axes for image in axes.images]


@pytest.mark.parametrize("overlay", [True, False])
def test_figure_draws_relevance_beside_its_image(overlay):
    drawn = on_image(grid(3, 8, 8).relevance)
    drawing = drawn_figure(section(grids=[drawn]), display=Display(overlay=overlay))
    image, relevance = figure_images(drawing)
    torch.testing.assert_close(torch.tensor(image.get_array()), drawn.backdrop.pixels)
    assert relevance.get_array().shape == ((8, 8, 3) if overlay else (8, 8))
    assert {each.get_interpolation() for each in (image, relevance)} == {"nearest"}
    assert {"image", "relevance"} <= set(figure_texts(drawing))


def test_figure_of_a_gallery_has_a_panel_a_name_inside_its_margins():
    names = [f"a composite with a long name {i}" for i in range(6)]
    drawing = drawn_figure(gallery(*names))
    images = figure_images(drawing)
    assert len(images) == 1 + len(names)
    boxes = {tuple(round(float(edge), 3) for edge in each.get_extent()) for each in images[:4]}
    assert len(boxes) == 4, "side by side"
    assert all(0 <= left < right <= 7.601 for left, right, _, _ in boxes)
    words = " ".join(figure_texts(drawing))
    assert all(word in words for name in names for word in name.split())
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    renderer = agg.FigureCanvasAgg(drawing).get_renderer()
    width = drawing.bbox.width
    for axes in drawing.axes:
        for text in axes.texts:
            extent = text.get_window_extent(renderer)
            assert extent.x0 >= 0
            assert extent.x1 <= width


def test_figure_scales_small_images_up_with_sharp_pixels():
    image_module = pytest.importorskip("PIL.Image")
    drawn = on_image(grid(1, 8, 8).relevance)
    drawing = drawn_figure(section(grids=[drawn]))
    file = io.BytesIO()
    drawing.savefig(file, format="png", dpi=100)
    with image_module.open(file) as opened:
        seen = torch.tensor([*opened.convert("RGB").tobytes()]).view(-1, 3).unique(dim=0)
    colours = (drawn.backdrop.pixels * 255).round().long().view(-1, 3)
    assert set(map(tuple, colours.tolist())) <= set(map(tuple, seen.tolist()))
