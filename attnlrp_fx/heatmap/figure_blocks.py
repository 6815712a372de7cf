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
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from torch import Tensor

from attnlrp_fx.heatmap.display import Display
from attnlrp_fx.heatmap.fonts import fonts_for
from attnlrp_fx.heatmap.pictures import Picture, picture
from attnlrp_fx.heatmap.scale import LIGHT, NOT_FINITE, STEPS, hex_colour, ink, level
from attnlrp_fx.heatmap.sections import (
    Gallery,
    Grid,
    Section,
    TokenStrip,
    facts,
    gallery_notes,
    notes,
    number,
)
from attnlrp_fx.heatmap.spelling import Piece, pieces, visible
from attnlrp_fx.heatmap.tiles import Tile, gallery_tiles, pair

WIDTH = 7.6
"""Inches between the margins."""

LINE = 0.27
"""Inches from one line of tokens to the next."""

SIZE = 10.0
"""Points of a token."""

CELLS = 1024
"""The most cells of a picture along an axis."""

TILE, GAP = 3.0, 0.2
"""Inches of the widest tile, and from one tile to the next."""

KEY = 3.0
"""Inches that the colour scale takes, with its numbers."""

TILES = 4
"""Tiles side by side."""


@dataclass(frozen=True, slots=True)
class Block:
    """A stripe across the figure: its height in inches, and what draws it on axes in inches."""

    height: float
    draw: Callable[[Axes], None]


def blocks_of(drawn: Section | Gallery, display: Display) -> Iterator[Block]:
    """The stripes of one section or gallery, from top to bottom."""
    if isinstance(drawn, Gallery):
        yield from _gallery_blocks(drawn, display)
    else:
        yield from _section_blocks(drawn, display)
    yield Block(0.2, lambda axes: None)


def _section_blocks(section: Section, display: Display) -> Iterator[Block]:
    subtitle = "     ".join(f"{name} {text}" for name, text in facts(section))

    def head(axes: Axes) -> None:
        write(axes, section.heading, 0, 0.12, weight="bold")
        write(axes, subtitle, 0, 0.34, size=9)
        scale_key(axes, *ends(section.limit), 0.34)

    yield Block(0.52, head)
    yield from _notes_blocks(notes(section))
    for strip in section.strips:
        if section.has_several_inputs:
            yield _lines_block([strip.caption])
        yield _strip_block(strip, section.limit)
    for grid in section.grids:
        yield from _grid_blocks(grid, display)


def _gallery_blocks(gallery: Gallery, display: Display) -> Iterator[Block]:
    title = _line_wrapped(gallery.heading, WIDTH)

    def head(axes: Axes) -> None:
        for i, line in enumerate(title):
            write(axes, line, 0, 0.12 + 0.2 * i, weight="bold")

    yield Block(0.2 * len(title) + 0.08, head)
    yield from _notes_blocks(gallery_notes(gallery))
    for said, tiles in gallery_tiles(gallery, CELLS, display):
        caption = _line_wrapped(said, WIDTH - KEY)
        yield _caption_block(caption, "against", "for")
        yield from _tile_blocks(tiles)


def _notes_blocks(said: Sequence[str]) -> Iterator[Block]:
    lines = [line for note in said for line in _line_wrapped(note, WIDTH)]
    if lines:
        yield _lines_block(lines)


def _line_wrapped(text: str, inches: float, size: float = 9) -> list[str]:
    """Lines that fit, by what a letter takes on average."""
    return textwrap.wrap(text, int(inches * 135 / size))


def _lines_block(lines: Sequence[str]) -> Block:
    return Block(0.2 * len(lines) + 0.04, lambda axes: _write_lines(axes, lines))


def _write_lines(axes: Axes, lines: Sequence[str]) -> None:
    for i, line in enumerate(lines):
        write(axes, line, 0, 0.2 * i + 0.1, size=9, colour="#59616b")


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


def _grid_blocks(grid: Grid, display: Display) -> Iterator[Block]:
    shown = picture(grid, CELLS, CELLS, display)
    caption = _line_wrapped(shown.caption, WIDTH - KEY)
    yield _caption_block(caption, *ends(shown.limit))
    if shown.image is not None:
        yield from _tile_blocks(pair(shown, shown.image))
        return
    rows, columns = shown.cells.shape
    if grid.is_image:
        scale = 4.0 / max(rows, columns)
        across, down = columns * scale, rows * scale
    else:
        across, down = min(WIDTH, max(2.0, 0.3 * columns)), min(4.0, max(0.25, 0.16 * rows))
    yield Block(down + 0.1, lambda axes: draw_picture(axes, shown, (0, 0, across, down)))


def _caption_block(lines: Sequence[str], low: str, high: str) -> Block:
    """A caption, with the colour scale at its right unless it has no ends."""

    def draw(axes: Axes) -> None:
        _write_lines(axes, lines)
        scale_key(axes, low, high, 0.1)

    return Block(0.2 * len(lines) + 0.08, draw)


def _tile_blocks(tiles: Sequence[Tile]) -> Iterator[Block]:
    """Tiles side by side, on as many lines as they need."""
    side_by_side = min(len(tiles), TILES)
    across = min(TILE, (WIDTH - GAP * (side_by_side - 1)) / side_by_side)
    for start in range(0, len(tiles), TILES):
        yield _tile_line(tiles[start : start + TILES], across)


def _tile_line(tiles: Sequence[Tile], across: float) -> Block:
    shapes = [_pixels(tile).shape[:2] for tile in tiles]
    down = max(across * rows / max(rows, columns) for rows, columns in shapes)
    names = [_line_wrapped(tile.name, across) for tile in tiles]
    beneath = [_beneath(tile, across) for tile in tiles]
    top = 0.2 * max(map(len, names)) + 0.04

    def draw(axes: Axes) -> None:
        for i, (tile, (rows, columns)) in enumerate(zip(tiles, shapes, strict=True)):
            left, cell = i * (across + GAP), across / max(rows, columns)
            for line, name in enumerate(names[i]):
                write(axes, name, left, 0.1 + 0.2 * line, size=9)
            draw_picture(axes, tile.shows, (left, top, columns * cell, rows * cell))
            for line, said in enumerate(beneath[i]):
                y = top + down + 0.12 + 0.17 * line
                write(axes, said, left, y, size=8, colour="#59616b")

    return Block(top + down + 0.17 * max(map(len, beneath)) + 0.12, draw)


def _pixels(tile: Tile) -> Tensor:
    return tile.shows.cells if isinstance(tile.shows, Picture) else tile.shows


def _beneath(tile: Tile, across: float) -> list[str]:
    said = (*tile.lines, *[f"colours to ±{tile.limit:.4g}"] * bool(tile.limit))
    return [line for text in said for line in _line_wrapped(text, across, 8)]


def draw_picture(
    axes: Axes, shown: Picture | Tensor, box: tuple[float, float, float, float]
) -> None:
    """Relevance or pixels in a box: left, top, across, down."""
    left, top, across, down = box
    extent = (left, left + across, top + down, top)
    if isinstance(shown, Picture):
        end = shown.limit or 1.0
        cells = shown.cells.masked_fill(~shown.cells.isfinite(), math.nan)
        axes.imshow(
            cells.tolist(),
            cmap=_colours(),
            vmin=-end,
            vmax=end,
            extent=extent,
            aspect="auto",
            interpolation="nearest",
        )
    else:
        axes.imshow(shown.numpy(), extent=extent, aspect="auto", interpolation="nearest")
    axes.add_patch(
        Rectangle((left, top), across, down, fill=False, edgecolor="#c8ccd2", linewidth=0.8)
    )


def _colours() -> Colormap:
    stops = [hex_colour(colour) for colour in LIGHT.stops]
    ramp = LinearSegmentedColormap.from_list("attnlrp", stops)
    return ramp.with_extremes(bad=hex_colour(NOT_FINITE))


def ends(limit: float) -> tuple[str, str]:
    """What stands at the ends of a colour scale; nothing for a limit of 0."""
    return (number(-limit), number(limit)) if limit else ("", "")


def scale_key(axes: Axes, low: str, high: str, y: float) -> None:
    """The colour scale between the words for its ends, at the right end of a line."""
    if not high:
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
    write(axes, low, frame[0] - 0.06, y, size=8, align="right")
    write(axes, high, right + 0.06, y, size=8)


def write(
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
