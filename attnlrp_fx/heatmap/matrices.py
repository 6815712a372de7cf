"""Matrices for a terminal: a line a token, a column a target or a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from attnlrp_fx.heatmap.scale import STEPS, level
from attnlrp_fx.heatmap.sections import Matrix, TokenStrip, number
from attnlrp_fx.heatmap.spelling import pieces, visible

LABEL = 16
"""Cells that a token may take."""
TOP = 10
"""Cells of the table that are listed where there is no colour."""

Colour = Callable[[float], str]
"""What rich calls the colour of a share in [-1, 1]."""


def coloured(matrix: Matrix, colour: Colour, width: int) -> Iterator[RenderableType]:
    """Each token with a cell for every line of the matrix, the first of them at the left.

    What does not fit into `width` is left out in the middle, and said.
    """
    for strips in matrix.strips:
        count = min(len(strips), max(2, width - LABEL - 1))
        shown = [*range(count - count // 2), *range(len(strips) - count // 2, len(strips))]
        cell = " " * (2 if 2 * count + LABEL < width else 1)
        first, last = (visible(matrix.names[i]) for i in (0, -1))
        yield Text(f"{'':{LABEL}} {first} … {last}", style="dim", no_wrap=True)
        for position, token in enumerate(_tokens(strips[0])):
            line = Text(f"{token:>{LABEL}.{LABEL}} ", no_wrap=True)
            for i in shown:
                step = level(strips[i].relevance[position], matrix.limit)
                style = "reverse strike" if step is None else f"on {colour(step / STEPS)}"
                line.append(cell, style=style)
            yield line
        if count < len(strips):
            yield Text(f"{len(strips) - count} columns in the middle are not shown.", style="dim")


def plain(matrix: Matrix) -> Iterator[RenderableType]:
    """Without colour, the strongest cells in a table."""
    ranked = [
        (relevance, name, position, token)
        for strips in matrix.strips
        for name, strip in zip(matrix.names, strips, strict=True)
        for position, (token, relevance) in enumerate(
            zip(_tokens(strip), strip.relevance, strict=True)
        )
        if math.isfinite(relevance) and relevance
    ]
    ranked.sort(key=lambda entry: -abs(entry[0]))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("where", "position", "token", "relevance"):
        table.add_column(column, overflow="fold")
    for relevance, name, position, token in ranked[:TOP]:
        table.add_row(Text(visible(name)), str(position), Text(token), number(relevance))
    yield table
    if len(ranked) > TOP:
        yield Text(f"{len(ranked) - TOP} weaker cells are not listed.")


def _tokens(strip: TokenStrip) -> list[str]:
    shown = pieces(strip.tokens, strip.spelling)
    return [visible(piece.text.replace("\n", "")) for piece in shown]
