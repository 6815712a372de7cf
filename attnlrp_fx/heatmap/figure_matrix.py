"""Matrices in a figure: a line a target or a layer, a column a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from matplotlib.axes import Axes

from attnlrp_fx.heatmap.figure_blocks import WIDTH, Block, draw_picture, ends, scale_key, write
from attnlrp_fx.heatmap.fonts import fonts_for
from attnlrp_fx.heatmap.pictures import Picture
from attnlrp_fx.heatmap.sections import Matrix, TokenStrip
from attnlrp_fx.heatmap.spelling import pieces, visible

NAMES = 2.1
"""Inches at the left for the names of lines."""
COLUMN, LINE = 0.34, 0.17
"""Inches of the widest column, and of a line."""
LABELLED = 0.1
"""Inches that a column must have for its token to be written over it."""
LETTERS = 32
"""Letters of a line's name: the end of a path says more than its beginning."""


def matrix_blocks(matrix: Matrix) -> Iterator[Block]:
    """The stripes of a matrix: its heading, then a table for each token input."""

    def head(axes: Axes) -> None:
        write(axes, matrix.heading, 0, 0.12, weight="bold")
        scale_key(axes, *ends(matrix.limit), 0.34)

    yield Block(0.52, head)
    for strips in matrix.strips:
        yield _table(strips, matrix)
    yield Block(0.2, lambda axes: None)


def _table(strips: Sequence[TokenStrip], matrix: Matrix) -> Block:
    tokens = [p.text.replace("\n", "") for p in pieces(strips[0].tokens, strips[0].spelling)]
    column = min(COLUMN, (WIDTH - NAMES) / max(len(tokens), 1))
    top = 0.075 * min(12, max(map(len, tokens), default=0)) + 0.1 if column >= LABELLED else 0.0
    cells = Picture(torch.tensor([strip.relevance for strip in strips]), matrix.limit)
    down = LINE * len(strips)

    def draw(axes: Axes) -> None:
        draw_picture(axes, cells, (NAMES, top, column * len(tokens), down))
        for i, name in enumerate(matrix.names):
            short = name if len(name) <= LETTERS else f"…{name[1 - LETTERS :]}"
            write(axes, short, NAMES - 0.06, top + LINE * (i + 0.5), size=7, align="right")
        for i, token in enumerate(tokens if top else ()):
            _upright(axes, token[:12], NAMES + column * (i + 0.5), top - 0.04)

    return Block(top + down + 0.1, draw)


def _upright(axes: Axes, text: str, x: float, y: float) -> None:
    fonts = fonts_for(text)
    axes.text(
        x,
        y,
        fonts.drawable(visible(text)),
        fontproperties=fonts.properties(7),
        rotation=90,
        horizontalalignment="center",
        verticalalignment="bottom",
        parse_math=False,
    )
