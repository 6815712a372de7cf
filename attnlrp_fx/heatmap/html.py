"""Sections and galleries as HTML: a fragment for a notebook, or a whole page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from attnlrp_fx.heatmap.display import PLAIN, Display
from attnlrp_fx.heatmap.pictures import Picture, picture, png, rgb_png
from attnlrp_fx.heatmap.scale import level
from attnlrp_fx.heatmap.sections import (
    Gallery,
    Grid,
    Matrix,
    Section,
    TokenStrip,
    facts,
    gallery_notes,
    notes,
    number,
)
from attnlrp_fx.heatmap.spelling import pieces, visible
from attnlrp_fx.heatmap.stylesheet import css_class, stylesheet
from attnlrp_fx.heatmap.tiles import Tile, gallery_tiles, pair

CELLS = 512
"""The most cells of a picture along an axis."""

ALONE, BESIDE = 336, 224
"""About how many pixels across an image is drawn, alone and beside others."""


Drawn = Section | Gallery | Matrix


def html_fragment(drawn: Sequence[Drawn], display: Display = PLAIN) -> str:
    """Self-contained HTML for a notebook or a page: no script, no network, everything escaped."""
    body = "\n".join(_drawn(each, display) for each in drawn)
    return f'<div class="attnlrp"><style>\n{stylesheet()}\n</style>\n{body}\n</div>'


def html_document(drawn: Sequence[Drawn], title: str, display: Display = PLAIN) -> str:
    """A whole page around `html_fragment`, in UTF-8."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_escape(title)}</title>\n"
        "<style>html{color-scheme:light dark}body{margin:0;background:#fff;"
        "background:light-dark(#fff,#1b1d22)}.attnlrp{margin:8px auto}</style>\n"
        f"</head>\n<body>\n{html_fragment(drawn, display)}\n</body>\n</html>\n"
    )


def _escape(text: str) -> str:
    """Escaped for element content and for quoted attributes, encodable in UTF-8."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _drawn(drawn: Drawn, display: Display) -> str:
    if isinstance(drawn, Matrix):
        return _matrix(drawn)
    return _gallery(drawn, display) if isinstance(drawn, Gallery) else _section(drawn, display)


def _section(section: Section, display: Display) -> str:
    head = "".join(f"<span>{name} <b>{text}</b></span>" for name, text in facts(section))
    head += _key(section.limit)
    parts = [f"<h4>{_escape(visible(section.heading))}</h4><header>{head}</header>"]
    parts += [f'<p class="note">{_escape(note)}</p>' for note in notes(section)]
    for strip in section.strips:
        if section.has_several_inputs:
            parts.append(f'<div class="name dim">{_escape(strip.caption)}</div>')
        parts.append(_strip(strip, section.limit))
    parts += [_grid(grid, display) for grid in section.grids]
    return f"<section>{''.join(parts)}</section>"


def _key(limit: float, kind: str = "bar") -> str:
    if limit == 0:
        return ""
    return (
        f'<span class="key dim">{number(-limit)}<span class="{kind}" role="img" '
        f'aria-label="colour scale, blue against the target, orange for it"></span>'
        f"{number(limit)}</span>"
    )


def _strip(strip: TokenStrip, limit: float) -> str:
    spans = []
    shown = pieces(strip.tokens, strip.spelling)
    for piece, token, position, relevance in zip(
        shown, strip.tokens, strip.positions, strip.relevance, strict=True
    ):
        gap = " " if piece.gap else ""
        kind = f"t {css_class(level(relevance, limit))}{' s' if piece.special else ''}"
        # A direction of its own keeps a Latin [CLS] from deciding that of a Hebrew sentence.
        direction = ' dir="ltr"' if piece.special else ""
        tip = f"{visible(token).strip()}\n{strip.name}[{position}]: {relevance:+.7g}"
        spans.append(
            f'{gap}<span class="{kind}"{direction} title="{_escape(tip)}">'
            f"{_escape(piece.text)}</span>"
        )
    return f'<div class="strip" dir="auto">{"".join(spans)}</div>'


def _matrix(matrix: Matrix) -> str:
    head = f"<h4>{_escape(visible(matrix.heading))}</h4><header>{_key(matrix.limit)}</header>"
    tables = [_table(strips, matrix) for strips in matrix.strips]
    return f"<section>{head}{''.join(tables)}</section>"


def _table(strips: Sequence[TokenStrip], matrix: Matrix) -> str:
    """One input's tokens from left to right, the targets from top to bottom."""
    first = strips[0]
    tokens = [piece.text for piece in pieces(first.tokens, first.spelling)]
    columns = "".join(f"<th><span>{_escape(token)}</span></th>" for token in tokens)
    lines = []
    for target, strip in zip(matrix.names, strips, strict=True):
        name = visible(target.strip() or target)
        cells = []
        for token, position, relevance in zip(
            tokens, strip.positions, strip.relevance, strict=True
        ):
            tip = f"{name} \u2190 {token}\n{strip.name}[{position}]: {relevance:+.7g}"
            kind = css_class(level(relevance, matrix.limit))
            cells.append(f'<td class="t {kind}" title="{_escape(tip)}"></td>')
        lines.append(f"<tr><th>{_escape(name)}</th>{''.join(cells)}</tr>")
    caption = f'<div class="name dim">{_escape(first.name)}</div>' if len(matrix.strips) > 1 else ""
    body = f"<thead><tr><th></th>{columns}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'{caption}<div class="matrix"><table>{body}</table></div>'


def _gallery(gallery: Gallery, display: Display) -> str:
    parts = [f"<h4>{_escape(visible(gallery.heading))}</h4>"]
    parts += [f'<p class="note">{_escape(note)}</p>' for note in gallery_notes(gallery)]
    for said, tiles in gallery_tiles(gallery, CELLS, display):
        caption = f"<figcaption><span>{_escape(said)}</span></figcaption>"
        parts.append(f"<figure>{caption}{_tiles(tiles, BESIDE)}</figure>")
    return f"<section>{''.join(parts)}</section>"


def _grid(grid: Grid, display: Display) -> str:
    shown = picture(grid, CELLS, CELLS, display)
    caption = (
        f"<figcaption><span>{_escape(shown.caption)}</span>"
        f"{_key(shown.limit, 'bar over')}</figcaption>"
    )
    if shown.image is not None:
        return f"<figure>{caption}{_tiles(pair(shown, shown.image), ALONE)}</figure>"
    rows, columns = shown.cells.shape
    if grid.is_image:
        _, size = _square_cells(rows, columns, ALONE)
    else:
        height = max(20, min(320, rows * 14))
        size = f"width:{max(160, min(640, columns * 24))}px;height:{height}px"
    return f"<figure>{caption}{_image(f'relevance of {grid.name}', size, png(shown))}</figure>"


def _tiles(tiles: Sequence[Tile], across: int) -> str:
    parts = []
    for tile in tiles:
        if isinstance(tile.shows, Picture):
            pixels, data = tile.shows.cells, png(tile.shows)
        else:
            pixels, data = tile.shows, rgb_png(tile.shows)
        width, size = _square_cells(pixels.shape[0], pixels.shape[1], across)
        beneath = "".join(f"<div>{_escape(visible(line))}</div>" for line in tile.lines)
        parts.append(
            f'<div class="tile" style="width:{width}px"><div class="name">'
            f"{_escape(visible(tile.name))}</div>{_image(tile.name, size, data)}"
            f'<div class="dim">{beneath}{_key(tile.limit, "bar over")}</div></div>'
        )
    return f'<div class="tiles">{"".join(parts)}</div>'


def _square_cells(rows: int, columns: int, across: int) -> tuple[int, str]:
    """The width of square cells of a whole number of pixels, and their size in CSS."""
    width = columns * max(1, round(across / max(rows, columns)))
    return width, f"width:{width}px;aspect-ratio:{columns}/{rows};height:auto"


def _image(alt: str, size: str, data: bytes) -> str:
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{_escape(alt)}" style="{size}" src="{source}">'
