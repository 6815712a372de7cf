"""Sections as terminal text: coloured tokens, or without colour a table of the strongest."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from rich.color import Color
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from attnlrp_fx.heatmap import matrices
from attnlrp_fx.heatmap.pictures import Picture, picture
from attnlrp_fx.heatmap.scale import DARK, STEPS, hex_colour, ink, level
from attnlrp_fx.heatmap.sections import Matrix, Section, facts, notes, number
from attnlrp_fx.heatmap.spelling import pieces, visible

# For terminals that cannot show `DARK` itself, the nearest of what they have.
INDEXED: dict[str, tuple[int, ...]] = {
    "256": (32, 25, 24, 17, 235, 58, 94, 130, 166),
    "standard": (12, 4, 0, 3, 11),
    "windows": (12, 4, 0, 3, 11),
}
TOP = 10
"""Tokens listed where there is no colour."""

BAR = 10
"""Cells of the longest bar, to either side."""


def terminal(
    sections: Sequence[Section | Matrix],
    colours: str | None,
    ascii_only: bool = False,
    width: int = 80,
) -> Iterator[RenderableType]:
    """Rich renderables: coloured text, or a table of the strongest tokens without colour.

    ``colours`` is rich's name of the colour system, None for no colour. ``width`` is in cells.
    """
    for i, section in enumerate(sections):
        if i:
            yield Text()
        head = _line(section.heading, "bold")
        if isinstance(section, Matrix):
            yield head
            yield from _matrix(section, colours, width)
            continue
        for name, text in facts(section):
            head.append(f"   {name} {text}", style="not bold")
        yield head
        for note in notes(section):
            yield _line(f"! {note}", "italic")
        if colours is None:
            yield from _plain_section(section, ascii_only)
        else:
            yield from _coloured_section(section, colours, width)


def _matrix(matrix: Matrix, colours: str | None, width: int) -> Iterator[RenderableType]:
    if colours is None:
        yield from matrices.plain(matrix)
        return
    yield from matrices.coloured(matrix, lambda share: colour_name(share, colours), width)
    if matrix.limit:
        yield _key(matrix.limit, colours)


def _line(text: str, style: str = "") -> Text:
    """Text that can do nothing to the terminal but show."""
    return Text(visible(text), style=style)


def _coloured_section(section: Section, colours: str, width: int) -> Iterator[RenderableType]:
    for strip in section.strips:
        if section.has_several_inputs:
            yield _line(strip.caption, "dim")
        text = Text()
        shown = pieces(strip.tokens, strip.spelling)
        for piece, relevance in zip(shown, strip.relevance, strict=True):
            if piece.gap:
                text.append(" ", style=_cell_style(0, colours))
            text.append(piece.text, style=_cell_style(_share(relevance, section.limit), colours))
        yield text
    if section.limit:
        yield _key(section.limit, colours)
    for grid in section.grids:
        cells = picture(grid, 48, min(64, width))
        yield _line(cells.caption, "dim")
        yield _half_blocks(cells, colours)
        if cells.limit:
            yield _key(cells.limit, colours)


def _share(relevance: float, limit: float) -> float | None:
    step = level(relevance, limit)
    return None if step is None else step / STEPS


def _cell_style(share: float | None, colours: str) -> str:
    """Style of a token; one that is not finite is struck out."""
    if share is None:
        return "reverse strike"
    background = colour_name(share, colours)
    return f"{hex_colour(ink(Color.parse(background).get_truecolor()))} on {background}"


def colour_name(share: float, colours: str) -> str:
    """What rich calls the colour of a share in [-1, 1] in the colour system ``colours``."""
    if colours not in INDEXED:
        return hex_colour(DARK.colour(share))
    ramp = INDEXED[colours]
    middle = len(ramp) // 2
    return f"color({ramp[middle + round(share * middle)]})"


def _key(limit: float, colours: str) -> Text:
    text = Text(f"{number(-limit)} ", style="dim")
    for i in range(-12, 13):
        text.append(" ", style=f"on {colour_name(i / 12, colours)}")
    return text.append(f" {number(limit)}   blue against, orange for the target", style="dim")


def _half_blocks(picture: Picture, colours: str) -> Text:
    """Two cells a character, one above the other."""

    def colour(value: float) -> str:
        share = _share(value, picture.limit)
        return "magenta" if share is None else colour_name(share, colours)

    text = Text(no_wrap=True)
    rows = picture.cells.tolist()
    for top in range(0, len(rows), 2):
        text.append("\n" if top else "")
        for column, upper in enumerate(rows[top]):
            if top + 1 < len(rows):
                style = f"{colour(upper)} on {colour(rows[top + 1][column])}"
            else:
                style = colour(upper)
            text.append("▀", style=style)
    return text


def _plain_section(section: Section, ascii_only: bool) -> Iterator[RenderableType]:
    """The strongest tokens in a table; of float inputs, their sums."""
    ranked = [
        (relevance, strip.name, position, piece.text.replace("\n", ""))
        for strip in section.strips
        for piece, position, relevance in zip(
            pieces(strip.tokens, strip.spelling), strip.positions, strip.relevance, strict=True
        )
        if math.isfinite(relevance) and relevance
    ]
    ranked.sort(key=lambda entry: -abs(entry[0]))
    if ranked:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        several = len(section.strips) > 1
        if several:
            table.add_column("input")
        table.add_column("position", justify="right")
        table.add_column("token", overflow="fold")
        table.add_column("relevance", justify="right")
        table.add_column(f"{'against ':>{BAR}}| for", no_wrap=True)
        for relevance, name, position, token in ranked[:TOP]:
            cells = [_line(name)] * several
            cells += [Text(str(position)), Text(token), Text(number(relevance))]
            table.add_row(*cells, Text(bar(relevance / section.limit, ascii_only)))
        yield table
        if len(ranked) > TOP:
            yield Text(f"{len(ranked) - TOP} weaker tokens are not listed.")
    for grid in section.grids:
        shape = "x".join(map(str, grid.relevance.shape))
        yield _line(f"{grid.name} {shape}: sum {number(grid.total)}")


def bar(share: float, ascii_only: bool) -> str:
    """A bar that grows from the middle: to the left against, to the right for."""
    block = ("#" if ascii_only else "█") * math.ceil(abs(share) * BAR)
    return f"{block if share < 0 else '':>{BAR}}|{block if share > 0 else '':<{BAR}}"
