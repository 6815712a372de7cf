"""Float inputs as pictures: relevance summed into cells, alone or on the image that it is of."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlrp_fx.heatmap.display import PLAIN, Display
from attnlrp_fx.heatmap.images import spread
from attnlrp_fx.heatmap.scale import NOT_FINITE, OVERLAY
from attnlrp_fx.heatmap.sections import Grid, number


@dataclass(frozen=True, slots=True)
class Picture:
    """A float input's relevance as cells: (rows, columns) float64, and how they came about."""

    cells: Tensor
    limit: float
    """The magnitude at which colours end."""
    heading: str = ""
    """Name, shape and sum of the input."""
    steps: tuple[str, ...] = ()
    """How the cells came about, in words."""
    largest: float = 0.0
    """The largest finite |cell|."""
    image: Tensor | None = None
    """The image that the relevance is of, (rows, columns, 3) in 0…1."""
    ground: Tensor | None = None
    """What the relevance lies on, (rows, columns, 3) in 0…1; None: the page."""

    @property
    def caption(self) -> str:
        end = f"colours end at the {SATURATION:.1%} quantile, largest |cell| {self.largest:.4g}"
        return ", ".join((self.heading, *self.steps, *[end] * self.is_clipped))

    @property
    def is_clipped(self) -> bool:
        """Whether colours end before the largest cell."""
        return 0 < self.limit < self.largest


SATURATION = 0.995
"""A picture's scale ends at this quantile of |cell|: one hot pixel would blank out the rest."""


def picture(grid: Grid, rows: int, columns: int, display: Display = PLAIN) -> Picture:
    """Relevance laid out in at most ``rows`` x ``columns`` cells, neighbours summed to fit.

    Channels of images are summed; further leading axes are stacked from top to bottom. Sums
    conserve relevance, where a mean would not. Smoothing is for images alone.
    """
    cells = grid.relevance.double().cpu()
    shape = "×".join(map(str, cells.shape)) or "scalar"
    heading = f"{grid.name} {shape}: sum {number(grid.total)}"
    steps = []
    if grid.is_image:
        cells = cells.sum(-3)
        steps.append("summed over channels")
        if display.smooth:
            cells = spread(cells, display.smooth)
            steps.append(f"smoothed with σ={display.smooth:g} pixels, which keeps the sum")
    cells = cells.reshape(-1, cells.shape[-1] if cells.dim() else 1)
    height, width = cells.shape
    tall, wide = math.ceil(height / rows), math.ceil(width / columns)
    if grid.is_image:
        tall = wide = max(tall, wide)
    if tall > 1 or wide > 1:
        cells = torch.nn.functional.pad(cells, (0, -width % wide, 0, -height % tall))
        cells = cells.reshape(-(-height // tall), tall, -(-width // wide), wide).sum((1, 3))
        steps.append(f"{tall}×{wide} neighbours summed")
    magnitude = cells[cells.isfinite()].abs()
    top = float(magnitude.max()) if magnitude.numel() else 0.0
    end = float(magnitude.quantile(SATURATION)) if magnitude.numel() >= 1000 else top
    image, ground = None, None
    if grid.backdrop is not None:
        steps += [grid.backdrop.caption] if grid.backdrop.caption else []
        image = _averaged(grid.backdrop.pixels, tall)
        ground = _averaged(grid.backdrop.grey(), tall) if display.overlay else None
    return Picture(cells, end or top, heading, tuple(steps), top, image, ground)


def _averaged(pixels: Tensor, side: int) -> Tensor:
    """Pixels (height, width, 3) of squares of ``side`` pixels, incomplete ones at the far edges."""
    channels = pixels.permute(2, 0, 1)[None]
    averaged = torch.nn.functional.avg_pool2d(channels, side, ceil_mode=True)
    return averaged[0].permute(1, 2, 0)


def overlaid(picture: Picture, ground: Tensor) -> Tensor:
    """Relevance on ``ground``, both (rows, columns, 3) in 0…1: opacity is the magnitude."""
    share = _share(picture).unsqueeze(-1)
    against, favour = (ground.new_tensor(colour) / 255 for colour in OVERLAY)
    opacity = share.abs()
    drawn = ground * (1 - opacity) + torch.where(share > 0, favour, against) * opacity
    marked = ground.new_tensor(NOT_FINITE) / 255
    return torch.where(picture.cells.isfinite().unsqueeze(-1), drawn, marked)


def _share(picture: Picture) -> Tensor:
    """Cells as shares of the scale in [-1, 1]; 0 for what is not finite."""
    share = picture.cells / picture.limit if picture.limit > 0 else picture.cells * 0
    return share.clamp(-1, 1).nan_to_num()


def png(picture: Picture) -> bytes:
    """``picture`` without its image, as an indexed PNG: colour whose opacity is the magnitude.

    Transparent where the relevance is zero, so that one file suits a light and a dark page.
    Index 0 marks what is not finite; index 128 is zero.
    """
    index = (_share(picture) * 127).round().long() + 128
    index[~picture.cells.isfinite()] = 0
    colours = bytes(NOT_FINITE) + b"".join(bytes(OVERLAY[i > 128]) for i in range(1, 256))
    opacity = bytes([255, *(min(255, 2 * abs(i - 128) + (i != 128)) for i in range(1, 256))])
    return _png(index, _INDEXED, (b"PLTE", colours), (b"tRNS", opacity))


def rgb_png(pixels: Tensor) -> bytes:
    """Pixels (rows, columns, 3) in 0…1 as a PNG."""
    return _png((pixels * 255).round().long().flatten(1), _COLOURS)


_INDEXED, _COLOURS = 3, 2
"""Colour types of a PNG."""

_SAMPLES = {_INDEXED: 1, _COLOURS: 3}


def _png(samples: Tensor, kind: int, *tables: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit samples (rows, columns * samples a pixel), with the chunks ``tables``."""

    def chunk(name: bytes, data: bytes) -> bytes:
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    height, width = samples.shape[0], samples.shape[1] // _SAMPLES[kind]
    lines = b"".join(b"\0" + bytes(row) for row in samples.tolist())
    chunks: Sequence[tuple[bytes, bytes]] = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)),
        *tables,
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*named) for named in chunks)
