"""Pictures whose evidence is known: one handwritten digit among clutter that says nothing.

A digit of scikit-learn's (8 x 8 real scans, 1,797 of them), enlarged, turned a little and coloured,
stands at a random place on a textured canvas with strokes, blobs and fragments of other digits
around it. The label is the digit. Its pixels are the evidence, since nothing else depends on the
label: texture, colours and clutter are drawn without looking at it, and clutter keeps clear of the
digit's tile, whose shape is the same for every digit.

The digits are split before anything is composed: no scan of a held-out picture, neither its digit
nor a fragment, is in any training picture. Everything follows from a seed.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor

SIZE = 40
"""Height and width of a picture in pixels."""

CLASSES = 10
HELD_OUT = 0.25
"""Share of the scans that training never sees."""

INK = 0.25
"""A pixel with at least this share of ink is the digit's."""

TILE = (17.0, 23.0)
"""Smallest and largest side of the square that a scan is enlarged to, in pixels."""

TURN = 15.0
"""The most that a digit is rotated either way, in degrees."""

OBJECTS = {"strokes": 4, "blobs": 3, "fragments": 4}
"""Clutter objects of each kind; those that would touch the digit's tile are left out."""


class Pictures(NamedTuple):
    """Pictures, what they show, and where the evidence for it is."""

    images: NDArray[np.uint8]
    """(count, SIZE, SIZE, 3)."""

    labels: NDArray[np.int64]
    """(count,): 0 to 9."""

    masks: NDArray[np.bool_]
    """(count, SIZE, SIZE): the pixels of the digit."""


class Scans(NamedTuple):
    """Some of scikit-learn's digits."""

    images: Tensor
    """(count, 8, 8): the share of ink, 0 to 1."""

    labels: Tensor


def held_out(count: int, seed: int) -> Pictures:
    """Pictures of scans that no training picture contains."""
    return compose(split()[1], count, seed)


def training(count: int, seed: int, clutter: float = 1.0) -> Pictures:
    """Pictures to train on, others for every seed; `clutter` is the share of objects that stay."""
    return compose(split()[0], count, seed, clutter)


def boxes(masks: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The bounding box of each mask, filled: (count, height, width)."""

    def filled(line: NDArray[np.bool_]) -> NDArray[np.bool_]:
        forward = np.logical_or.accumulate(line, axis=1)
        return forward & np.logical_or.accumulate(line[:, ::-1], axis=1)[:, ::-1]

    rows, columns = np.logical_or.reduce(masks, axis=2), np.logical_or.reduce(masks, axis=1)
    return filled(rows)[:, :, None] & filled(columns)[:, None, :]


@functools.cache
def split() -> tuple[Scans, Scans]:
    """The scans for training and the held-out ones."""
    # Here, so that only who composes pictures needs scikit-learn.
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=Generator().manual_seed(0))
    apart = round(HELD_OUT * len(order))
    kept, away = order[apart:], order[:apart]
    return Scans(images[kept], labels[kept]), Scans(images[away], labels[away])


def compose(scans: Scans, count: int, seed: int, clutter: float = 1.0) -> Pictures:
    """Pictures with digits and fragments from `scans`, and a share of the other clutter."""
    draw = Draw(seed)
    chosen = draw.index(len(scans.labels), count)
    ink, tile = _digits(draw, scans.images[chosen])
    canvas = _texture(draw, count)
    for alpha in _clutter(draw, scans, count):
        stays = ~((alpha > 0.02) & tile).flatten(1).any(1)
        stays &= draw.uniform(0, 1, count) < clutter
        alpha = alpha * stays[:, None, None]
        canvas = _paint(canvas, alpha, _ink_colour(draw, count))
    canvas = _paint(canvas, ink, _ink_colour(draw, count))
    canvas = canvas + draw.normal(count, 3, SIZE, SIZE) * draw.uniform(0, 0.05, count, 1, 1, 1)
    return Pictures(
        (canvas.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy(),
        scans.labels[chosen].numpy(),
        (ink >= INK).numpy(),
    )


class Draw:
    """Random numbers that follow from a seed."""

    def __init__(self, seed: int) -> None:
        """Starts the generator."""
        self._generator = Generator().manual_seed(seed)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers from `low` to `high`."""
        return torch.rand(*shape, generator=self._generator) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """Numbers with mean 0 and deviation 1."""
        return torch.randn(*shape, generator=self._generator)

    def index(self, below: int, *shape: int) -> Tensor:
        """Integers from 0 to `below` - 1."""
        return torch.randint(below, shape, generator=self._generator)


def _digits(draw: Draw, scans: Tensor) -> tuple[Tensor, Tensor]:
    """Each scan enlarged at a random place: the share of ink, and the tile that it covers."""
    grid = _placed(draw, len(scans), inside=True)
    ink = F.grid_sample(scans[:, None], grid, mode="bicubic", align_corners=False)
    return ink[:, 0].clamp(0, 1), grid.abs().amax(-1) <= 1.1


def _placed(draw: Draw, count: int, inside: bool) -> Tensor:
    """For every pixel of the canvas its place in a tile, whose corners are at -1 and 1.

    Args:
        draw: the random numbers.
        count: how many canvases.
        inside: whether the whole tile lies on the canvas.
    """
    side = draw.uniform(*TILE, count)
    stretch = draw.uniform(0.9, 1.1, count)
    angle = draw.uniform(-TURN, TURN, count).deg2rad()
    cos, sin = angle.cos(), angle.sin()
    reach = side * 1.1 * (cos + sin.abs()) / 2 if inside else torch.zeros(count)
    x = reach + draw.uniform(0, 1, count) * (SIZE - 2 * reach)
    y = reach + draw.uniform(0, 1, count) * (SIZE - 2 * reach)
    right, down = _coordinates(x, y)
    across = (right * cos[:, None, None] + down * sin[:, None, None]) * stretch[:, None, None]
    along = (down * cos[:, None, None] - right * sin[:, None, None]) / stretch[:, None, None]
    return torch.stack((across, along), -1) * 2 / side[:, None, None, None]


def _coordinates(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """How far right of x and below y the middle of every pixel is, each (count, SIZE, SIZE)."""
    middles = torch.arange(SIZE) + 0.5
    shape = (len(x), SIZE, SIZE)
    right = middles[None, None, :] - x[:, None, None]
    down = middles[None, :, None] - y[:, None, None]
    return right.expand(shape), down.expand(shape)


def _texture(draw: Draw, count: int) -> Tensor:
    """Two dark colours that a grating and smooth noise mix: (count, 3, SIZE, SIZE)."""
    angle = draw.uniform(0, torch.pi, count)[:, None, None]
    pace = draw.uniform(0.1, 1.2, count)[:, None, None]
    right, down = _coordinates(*draw.uniform(0, SIZE, 2, count))
    grating = ((right * angle.cos() + down * angle.sin()) * pace).sin()
    coarse = F.interpolate(draw.normal(count, 1, 7, 7), (SIZE, SIZE), mode="bicubic")[:, 0]
    share = draw.uniform(0, 1, count)[:, None, None]
    mixed = (share * grating + (1 - share) * coarse).mul(0.5).add(0.5).clamp(0, 1)[:, None]
    colours = draw.uniform(0, 0.45, 2, count, 3, 1, 1)
    return colours[0] + (colours[1] - colours[0]) * mixed


def _ink_colour(draw: Draw, count: int) -> Tensor:
    """A light colour each, which stands out from any texture."""
    return draw.uniform(0.55, 1, count, 3, 1, 1)


def _paint(canvas: Tensor, alpha: Tensor, colour: Tensor) -> Tensor:
    return canvas + (colour - canvas) * alpha[:, None]


def _clutter(draw: Draw, scans: Scans, count: int) -> list[Tensor]:
    """The share of ink of each clutter object, one on every canvas."""
    kinds = {"strokes": _stroke, "blobs": _blob}
    objects = [kinds[kind](draw, count) for kind in kinds for _ in range(OBJECTS[kind])]
    return objects + [_fragment(draw, scans, count) for _ in range(OBJECTS["fragments"])]


def _stroke(draw: Draw, count: int) -> Tensor:
    """A straight or bent line: a parabola's piece, as thick as a digit's lines."""
    right, down = _coordinates(*draw.uniform(0, SIZE, 2, count))
    angle = draw.uniform(0, 2 * torch.pi, count)[:, None, None]
    along = right * angle.cos() + down * angle.sin()
    across = down * angle.cos() - right * angle.sin()
    half = draw.uniform(3, 8, count)[:, None, None]
    across = across - draw.uniform(-0.08, 0.08, count)[:, None, None] * along.square()
    ends = (along.abs() - half).clamp(min=0)
    distance = (across.square() + ends.square()).sqrt()
    thickness = draw.uniform(0.7, 1.5, count)[:, None, None]
    return (thickness + 0.5 - distance).clamp(0, 1)


def _blob(draw: Draw, count: int) -> Tensor:
    """A soft spot."""
    right, down = _coordinates(*draw.uniform(0, SIZE, 2, count))
    width, height = draw.uniform(1.0, 3.5, 2, count, 1, 1)
    spot = (-(right / width).square() - (down / height).square()).exp()
    return torch.where(spot > 0.05, spot, 0)


def _fragment(draw: Draw, scans: Scans, count: int) -> Tensor:
    """A quarter of the tile of some digit."""
    grid = _placed(draw, count, inside=False)
    chosen = scans.images[draw.index(len(scans.labels), count)]
    ink = F.grid_sample(chosen[:, None], grid, mode="bicubic", align_corners=False)[:, 0]
    corner = draw.uniform(-0.8, -0.2, count, 1, 1, 2)
    kept = ((grid > corner) & (grid < corner + 1)).all(-1)
    return ink.clamp(0, 1) * kept
