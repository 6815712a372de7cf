"""Cells hold all the relevance, and the PNG shows it."""

import io
import math
import zlib

import pytest
import torch
from drawn import grid, on_image

from attnlrp_fx.heatmap import Display, Grid
from attnlrp_fx.heatmap.pictures import Picture, overlaid, picture, png, rgb_png
from attnlrp_fx.heatmap.scale import NOT_FINITE, OVERLAY


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (3, 40, 50), (2, 3, 11, 13), (1, 1)])
def test_pictures_conserve_relevance_and_fit(shape):
    shown = picture(grid(*shape), 16, 16)
    frames = shape[0] if len(shape) == 4 else 1
    assert shown.cells.shape[0] <= max(16, frames)
    assert shown.cells.shape[1] <= 16
    torch.testing.assert_close(shown.cells.sum(), grid(*shape).relevance.sum())


@pytest.mark.parametrize("smooth", [0.0, 1.5])
@pytest.mark.parametrize("shape", [(3, 9, 7), (1, 40, 50), (2, 3, 11, 13)])
def test_images_conserve_relevance_smoothed_and_scaled_down(shape, smooth):
    for size in (64, 6):
        shown = picture(grid(*shape), size, size, Display(smooth))
        torch.testing.assert_close(shown.cells.sum(), grid(*shape).relevance.sum())
        assert ("σ=1.5 pixels, which keeps the sum" in shown.caption) is bool(smooth)
    assert "neighbours summed" in shown.caption


def test_smoothing_spreads_images_and_nothing_else():
    spot = torch.zeros(3, 9, 9)
    spot[0, 4, 4] = 1.0
    smooth = picture(Grid("x", spot), 9, 9, Display(1.0))
    assert 0 < smooth.cells[4, 5] < smooth.cells[4, 4] < 1
    table = torch.eye(4)
    assert torch.equal(picture(Grid("x", table), 9, 9, Display(1.0)).cells, table.double())


def test_an_image_is_laid_out_like_its_relevance():
    drawn = on_image(grid(3, 11, 7).relevance)
    whole = picture(drawn, 64, 64)
    assert torch.equal(whole.image, drawn.backdrop.pixels)
    small = picture(drawn, 4, 4)
    assert small.image.shape == small.ground.shape == (*small.cells.shape, 3) == (4, 3, 3)
    torch.testing.assert_close(small.image[0, 0], drawn.backdrop.pixels[:3, :3].mean((0, 1)))
    corner = drawn.backdrop.pixels[9:, 6:].mean((0, 1))
    torch.testing.assert_close(small.image[3, 2], corner)
    assert picture(drawn, 64, 64, Display(overlay=False)).ground is None


def test_overlay_is_ground_where_zero_and_colour_where_strongest():
    cells = torch.tensor([[1.0, -1.0, 0.0, 0.5, math.nan]], dtype=torch.float64)
    ground = torch.full((1, 5, 3), 0.8, dtype=torch.float64)
    against, favour, bad = (
        torch.tensor(colour, dtype=torch.float64) / 255 for colour in (*OVERLAY, NOT_FINITE)
    )
    drawn = overlaid(Picture(cells, 1.0), ground)[0]
    for pixel, expected in zip(
        drawn, (favour, against, ground[0, 0], (favour + 0.8) / 2, bad), strict=True
    ):
        torch.testing.assert_close(pixel, expected)


def test_rgb_png_is_what_a_decoder_reads():
    image = pytest.importorskip("PIL.Image")
    samples = torch.arange(18).reshape(2, 3, 3) * 15
    with image.open(io.BytesIO(rgb_png(samples.double() / 255))) as opened:
        assert (opened.size, opened.mode) == ((3, 2), "RGB")
        assert [*opened.tobytes()] == samples.flatten().tolist()


def test_images_keep_their_proportions():
    assert picture(grid(3, 40, 20), 20, 20).cells.shape == (20, 10)


def test_one_hot_pixel_does_not_blank_out_the_rest():
    relevance = torch.ones(1, 64, 64)
    relevance[0, 3, 3] = 1000
    shown = picture(Grid("x", relevance), 64, 64)
    assert shown.limit == pytest.approx(1)
    assert "largest |cell| 1000" in shown.caption


def test_one_hot_pixel_on_zeros_keeps_a_scale():
    relevance = torch.zeros(1, 64, 64)
    relevance[0, 3, 3] = 5
    assert picture(Grid("x", relevance), 64, 64).limit == 5


def test_png_is_what_a_decoder_reads():
    image = pytest.importorskip("PIL.Image")
    cells = torch.tensor([[1.0, -1.0, 0.0], [0.5, math.nan, math.inf]])
    data = png(Picture(cells, 1.0))
    with image.open(io.BytesIO(data)) as opened:
        assert opened.size == (3, 2)
        pixels = opened.convert("RGBA")
    against, favour = OVERLAY
    assert pixels.getpixel((0, 0)) == (*favour, 255)
    assert pixels.getpixel((1, 0)) == (*against, 255)
    assert pixels.getpixel((2, 0))[3] == 0
    assert pixels.getpixel((0, 1))[3] == pytest.approx(128, abs=2)
    assert pixels.getpixel((1, 1)) == pixels.getpixel((2, 1)) == (*NOT_FINITE, 255)


def test_png_chunks_carry_their_checksums():
    data = png(Picture(torch.zeros(2, 2), 0.0))
    at, kinds = 8, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + size]
        assert zlib.crc32(body) == int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        kinds.append(body[:4])
        at += 12 + size
    assert kinds == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]
