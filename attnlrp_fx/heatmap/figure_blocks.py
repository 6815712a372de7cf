"""What a figure is made of: heads, notes, heat strips and heat maps, in inches.

Tokens wrap over lines by their measured widths; the colours are those of a light page.
"""

from __future__ import annotations

import math
import textwrap
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from attnlrp_fx.heatmap.fonts import fonts_for
from attnlrp_fx.heatmap.pictures import picture
from attnlrp_fx.heatmap.scale import LIGHT, NOT_FINITE, STEPS, hex_colour, ink, level
from attnlrp_fx.heatmap.sections import Grid, Section, TokenStrip, facts, notes, number
from attnlrp_fx.heatmap.spelling import Piece, pieces, visible

WIDTH = 7.6
"""Inches between the margins."""

LINE = 0.27
"""Inches from one line of tokens to the next."""

SIZE = 10.0
"""Points of a token."""


@dataclass(frozen=True, slots=True)
class Block:
    """A stripe across the figure: its height in inches, and what draws it on axes in inches."""

    height: float
    draw: Callable[[Axes], None]


def section_blocks(section: Section) -> Iterator[Block]:
    """The stripes of one section, from top to bottom."""
    subtitle = "     ".join(f"{name} {text}" for name, text in facts(section))

    def head(axes: Axes) -> None:
        _write(axes, section.title, 0, 0.12, weight="bold")
        _write(axes, subtitle, 0, 0.34, size=9)
        _key(axes, section.limit, 0.34)

    yield Block(0.52, head)
    said = [line for note in notes(section) for line in textwrap.wrap(note, int(WIDTH * 15))]
    if said:
        yield _lines_block(said)
    for strip in section.strips:
        if section.has_several_inputs:
            yield _lines_block([strip.caption])
        yield _strip_block(strip, section.limit)
    for grid in section.grids:
        yield _grid_block(grid)
    yield Block(0.2, lambda axes: None)


def _lines_block(lines: Sequence[str]) -> Block:
    return Block(0.2 * len(lines) + 0.04, lambda axes: _write_lines(axes, lines))


def _write_lines(axes: Axes, lines: Sequence[str]) -> None:
    for i, line in enumerate(lines):
        _write(axes, line, 0, 0.2 * i + 0.1, size=9, colour="#59616b")


def _strip_block(strip: TokenStrip, limit: float) -> Block:
    shown = pieces(strip.tokens, strip.spelling)
    fonts = fonts_for("".join(piece.text for piece in shown))
    texts = [fonts.drawable(piece.text.replace("\n", "")) for piece in shown]
    properties = fonts.properties(SIZE)
    extents = [_text_width(text, properties) + 0.03 for text in texts]
    places = _wrapped(shown, extents)
    from_right = _reads_from_right(texts)

    def draw(axes: Axes) -> None:
        boxes, colours = [], []
        for (left, line), extent, text, relevance in zip(
            places, extents, texts, strip.relevance, strict=True
        ):
            start = WIDTH - left - extent if from_right else left
            step = level(relevance, limit)
            colour = LIGHT.colour((step or 0) / STEPS)
            box = Rectangle((start, line * LINE + 0.02), extent, LINE - 0.05)
            boxes.append(box)
            colours.append(hex_colour(colour))
            if step is None:
                axes.add_patch(_hatched(box))
            axes.text(
                start + extent / 2,
                (line + 0.5) * LINE,
                text,
                horizontalalignment="center",
                verticalalignment="center_baseline",
                color=hex_colour(ink(colour)),
                fontproperties=properties,
                parse_math=False,
            )
        # One collection: single patches took half as long again on long texts.
        axes.add_collection(
            PatchCollection(boxes, facecolors=colours, edgecolors="#dfe2e6", linewidths=0.4),
            autolim=False,
        )

    lines = places[-1][1] + 1 if places else 0
    return Block(lines * LINE + 0.05, draw)


def _text_width(text: str, properties: FontProperties) -> float:
    points: float = text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0]
    return points / 72


def _wrapped(pieces: Sequence[Piece], extents: Sequence[float]) -> list[tuple[float, int]]:
    """Where each piece begins: inches from the line's start, and the line's number."""
    places: list[tuple[float, int]] = []
    x, line = 0.0, 0
    for piece, extent in zip(pieces, extents, strict=True):
        x += 0.05 * piece.gap
        if x > 0 and x + extent > WIDTH:
            x, line = 0.0, line + 1
        places.append((x, line))
        x += extent
        if piece.text.endswith("\n"):
            x, line = 0.0, line + 1
    return places


def _hatched(box: Rectangle) -> Rectangle:
    return Rectangle(
        box.get_xy(),
        box.get_width(),
        box.get_height(),
        fill=False,
        edgecolor=hex_colour(NOT_FINITE),
        hatch="////",
        linewidth=0.4,
        zorder=2,
    )


def _grid_block(grid: Grid) -> Block:
    shown = picture(grid, 1024, 1024)
    rows, columns = shown.cells.shape
    if grid.is_image:
        scale = 4.0 / max(rows, columns)
        across, down = columns * scale, rows * scale
    else:
        across, down = min(WIDTH, max(2.0, 0.3 * columns)), min(4.0, max(0.25, 0.16 * rows))
    stops = [hex_colour(colour) for colour in LIGHT.stops]
    ramp = LinearSegmentedColormap.from_list("attnlrp", stops)
    colours = ramp.with_extremes(bad=hex_colour(NOT_FINITE))
    caption = textwrap.wrap(shown.caption, int((WIDTH - 2.6) * 15))
    start = 0.2 * len(caption) + 0.08

    def draw(axes: Axes) -> None:
        _write_lines(axes, caption)
        _key(axes, shown.limit, 0.1)
        end = shown.limit or 1.0
        cells = shown.cells.masked_fill(~shown.cells.isfinite(), math.nan)
        axes.imshow(
            cells.tolist(),
            cmap=colours,
            vmin=-end,
            vmax=end,
            extent=(0, across, start + down, start),
            aspect="auto",
            interpolation="nearest",
        )
        axes.plot(
            [0, across, across, 0, 0],
            [start, start, start + down, start + down, start],
            color="#c8ccd2",
            linewidth=0.8,
        )

    return Block(start + down + 0.1, draw)


def _key(axes: Axes, limit: float, y: float) -> None:
    """The colour scale with its numbers, at the right end of a line; none for a limit of 0."""
    if limit == 0:
        return
    right, cells, cell = WIDTH - 0.62, 24, 0.05
    for i in range(cells):
        colour = hex_colour(LIGHT.colour(2 * i / (cells - 1) - 1))
        corner = (right - (cells - i) * cell, y - 0.05)
        axes.add_patch(Rectangle(corner, cell, 0.1, facecolor=colour, linewidth=0))
    frame = (right - cells * cell, y - 0.05)
    axes.add_patch(
        Rectangle(frame, cells * cell, 0.1, fill=False, edgecolor="#c8ccd2", linewidth=0.8)
    )
    _write(axes, number(-limit), frame[0] - 0.06, y, size=8, align="right")
    _write(axes, number(limit), right + 0.06, y, size=8)


def _write(
    axes: Axes,
    text: str,
    x: float,
    y: float,
    size: float = SIZE,
    weight: str = "normal",
    colour: str = "black",
    align: Literal["left", "right"] = "left",
) -> None:
    fonts = fonts_for(text)
    axes.text(
        x,
        y,
        fonts.drawable(visible(text)),
        fontproperties=fonts.properties(size, weight),
        color=colour,
        horizontalalignment=align,
        verticalalignment="center_baseline",
        parse_math=False,
    )


def _reads_from_right(texts: Iterable[str]) -> bool:
    """Whether more letters are Hebrew or Arabic than are not."""
    kinds = [unicodedata.bidirectional(letter) for text in texts for letter in text]
    return sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L")
