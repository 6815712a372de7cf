"""Float inputs as pictures: relevance summed into cells, and cells as a PNG."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlrp_fx.heatmap.scale import NOT_FINITE, OVERLAY
from attnlrp_fx.heatmap.sections import Grid, number


@dataclass(frozen=True, slots=True)
class Picture:
    """A float input's relevance as cells: (rows, columns) float64, and how they came about."""

    cells: Tensor
    limit: float
    caption: str


SATURATION = 0.995
"""A picture's scale ends at this quantile of |cell|: one hot pixel would blank out the rest."""


def picture(grid: Grid, rows: int, columns: int) -> Picture:
    """Relevance laid out in at most ``rows`` x ``columns`` cells, neighbours summed to fit.

    Channels of images are summed; further leading axes are stacked from top to bottom. Sums
    conserve relevance, where a mean would not.
    """
    cells = grid.relevance.double().cpu()
    shape = "×".join(map(str, cells.shape)) or "scalar"
    steps = [f"{grid.name} {shape}: sum {number(grid.total)}"]
    if grid.is_image:
        cells = cells.sum(-3)
        steps.append("summed over channels")
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
    if 0 < end < top:
        steps.append(f"colours end at the {SATURATION:.1%} quantile, largest |cell| {top:.4g}")
    return Picture(cells, end or top, ", ".join(steps))


def png(picture: Picture) -> bytes:
    """``picture`` as an indexed PNG: full colour whose opacity is the magnitude.

    Transparent where the relevance is zero, so that one file suits a light and a dark page.
    Index 0 marks what is not finite; index 128 is zero.
    """
    share = picture.cells / picture.limit if picture.limit > 0 else picture.cells * 0
    index = (share.clamp(-1, 1).nan_to_num() * 127).round().long() + 128
    index[~picture.cells.isfinite()] = 0
    height, width = index.shape
    lines = b"".join(b"\0" + bytes(row) for row in index.tolist())
    colours = bytes(NOT_FINITE) + b"".join(bytes(OVERLAY[i > 128]) for i in range(1, 256))
    opacity = bytes([255, *(min(255, 2 * abs(i - 128) + (i != 128)) for i in range(1, 256))])

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
            chunk(b"PLTE", colours),
            chunk(b"tRNS", opacity),
            chunk(b"IDAT", zlib.compress(lines, 9)),
            chunk(b"IEND", b""),
        )
    )
