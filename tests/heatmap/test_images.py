"""Images are shown as they were, and blurring them loses nothing."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from attnlrp_fx.errors import InputError
from attnlrp_fx.heatmap import Backdrop, Normalisation, backdrop, is_image
from attnlrp_fx.heatmap.images import spread

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def photo(height=5, width=7):
    """Bytes (height, width, 3)."""
    return torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(0))


# Normalisation


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False, "do_normalize": False},
    ],
    ids=str,
)
def test_what_a_processor_of_transformers_did_is_undone_to_the_byte(changes):
    options = {"image_mean": MEAN, "image_std": STD, "do_resize": False} | changes
    processor = ViTImageProcessorPil(**options)
    original = photo()
    images = original.to(torch.uint8).permute(2, 0, 1).numpy()
    given = processor(images, return_tensors="pt")["pixel_values"][0]
    assert given.shape == (3, 5, 7)
    shown = backdrop(given.float(), Normalisation.of(processor))
    assert shown.caption == ""
    torch.testing.assert_close(shown.pixels * 255, original.double(), rtol=0, atol=1e-3)


def test_a_processor_is_whatever_has_mean_and_std():
    wanted = Normalisation((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    plain = SimpleNamespace(image_mean=MEAN, image_std=STD)
    assert Normalisation.of(plain) == wanted
    assert Normalisation.of(SimpleNamespace(image_processor=plain)) == wanted
    assert Normalisation.of(SimpleNamespace(image_mean=0.5, image_std=2.0)) == (
        Normalisation((0.5,), (2.0,))
    )
    assert Normalisation.of(SimpleNamespace(image_mean=None, image_std=None)) is None


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (object(), "is none of images"),
        (SimpleNamespace(image_mean=MEAN, image_std=[1.0, 0.0, 1.0]), "cannot be undone"),
        (SimpleNamespace(image_mean=MEAN, image_std=[1.0]), "cannot be undone"),
        (SimpleNamespace(image_mean=MEAN, image_std=STD, rescale_factor=0), "cannot be undone"),
    ],
)
def test_a_processor_that_cannot_be_undone_is_refused(processor, message):
    with pytest.raises(InputError, match=message):
        Normalisation.of(processor)


# What is shown


def test_without_a_processor_an_image_is_stretched_and_says_so():
    image = torch.tensor([[[-2.0, 0.0], [2.0, 6.0]]])
    shown = backdrop(image, None)
    assert shown.caption == "the image is stretched: black is -2, white 6"
    assert shown.pixels[..., 0].tolist() == [[0.0, 0.25], [0.5, 1.0]]
    assert shown.pixels.shape == (2, 2, 3)


def test_a_normalisation_of_other_channels_is_not_undone():
    shown = backdrop(torch.rand(1, 2, 2), Normalisation((0.5,) * 3, (0.5,) * 3))
    assert "stretched" in shown.caption
    one_for_all = backdrop(torch.zeros(3, 2, 2), Normalisation((0.5,), (0.5,)))
    assert one_for_all == Backdrop(one_for_all.pixels)
    assert one_for_all.pixels.unique().tolist() == [0.5]


def test_values_that_no_pixel_has_are_cut_and_named():
    shown = backdrop(torch.tensor([[[-1.0, 0.5, 3.0]]]), Normalisation((0.0,), (1.0,)))
    assert shown.caption == "the image has values beyond black and white"
    assert shown.pixels[0, :, 0].tolist() == [0.0, 0.5, 1.0]


def test_a_fourth_channel_is_left_out_and_named():
    image = torch.cat([torch.zeros(3, 2, 2), torch.full((1, 2, 2), 9.0)])
    shown = backdrop(image, Normalisation((0.0,) * 4, (1.0,) * 4))
    assert shown.caption == "the fourth channel is not drawn"
    assert not shown.pixels.any()


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_an_image_of_one_value_is_shown(value):
    shown = backdrop(torch.full((3, 2, 2), value), None)
    assert bool(shown.pixels.isfinite().all())


def test_grey_keeps_the_order_of_brightness_and_no_colour():
    pixels = torch.tensor([[[0.0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]]])
    grey = Backdrop(pixels).grey()
    assert bool((grey == grey[..., :1]).all())
    assert bool((grey[0, :, 0].diff() > 0).all())


@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((2, 3, 4, 5), torch.float32, True),
        ((2, 1, 4, 5), torch.bfloat16, True),
        ((2, 4, 4, 5), torch.float64, True),
        ((2, 2, 4, 5), torch.float32, False),
        ((2, 5, 3, 4, 5), torch.float32, False),
        ((3, 4, 5), torch.float32, False),
        ((2, 3, 4, 5), torch.int64, False),
    ],
)
def test_an_image_is_told_by_its_shape(shape, dtype, expected):
    assert is_image(torch.zeros(shape, dtype=dtype)) is expected


# Blur


def blurred_slowly(line, sigma):
    """Each value is handed to its neighbours in proportion, in a mirror beyond the ends."""
    size, reach = len(line), max(1, round(4 * sigma))
    weights = {d: math.exp(-0.5 * (d / sigma) ** 2) for d in range(-reach, reach + 1)}
    total = sum(weights.values())
    out = [0.0] * size
    for i, value in enumerate(line):
        for d, weight in weights.items():
            at = i + d
            while not 0 <= at < size:
                at = -1 - at if at < 0 else 2 * size - 1 - at
            out[at] += value * weight / total
    return out


@pytest.mark.parametrize("sigma", [0.01, 0.7, 2.0, 30.0])
def test_blur_is_a_gaussian_in_a_mirror(sigma):
    line = torch.randn(1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.tensor([blurred_slowly(line[0].tolist(), sigma)], dtype=torch.float64)
    torch.testing.assert_close(spread(line, sigma), expected)


@pytest.mark.parametrize("sigma", [0.5, 3.0, 50.0])
def test_blur_keeps_sums_and_constants(sigma):
    cells = torch.randn(2, 7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sums = spread(cells, sigma).sum((-1, -2))
    torch.testing.assert_close(sums, cells.sum((-1, -2)), rtol=1e-12, atol=1e-12)
    even = torch.full((7, 11), 0.25, dtype=torch.float64)
    torch.testing.assert_close(spread(even, sigma), even)


def test_blur_leaves_what_is_not_finite_where_it_is():
    cells = torch.zeros(5, 5, dtype=torch.float64)
    cells[0, 0], cells[4, 4], cells[2, 2] = math.nan, -math.inf, 1.0
    blurred = spread(cells, 1.0)
    assert blurred[0, 0].isnan()
    assert blurred[4, 4] == -math.inf
    assert int(blurred.isfinite().sum()) == 23
    assert 0 < blurred[1, 2] < blurred[2, 2]
