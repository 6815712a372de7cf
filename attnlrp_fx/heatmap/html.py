"""Sections as HTML: a fragment for a notebook, or a whole page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from attnlrp_fx.heatmap.pictures import picture, png
from attnlrp_fx.heatmap.scale import level
from attnlrp_fx.heatmap.sections import Grid, Section, TokenStrip, facts, notes, number
from attnlrp_fx.heatmap.spelling import pieces, visible
from attnlrp_fx.heatmap.stylesheet import css_class, stylesheet


def html_fragment(sections: Sequence[Section]) -> str:
    """Self-contained HTML for a notebook or a page: no script, no network, everything escaped."""
    body = "\n".join(_section(section) for section in sections)
    return f'<div class="attnlrp"><style>\n{stylesheet()}\n</style>\n{body}\n</div>'


def html_document(sections: Sequence[Section], title: str) -> str:
    """A whole page around `html_fragment`, in UTF-8."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_escape(title)}</title>\n"
        "<style>html{color-scheme:light dark}body{margin:0;background:#fff;"
        "background:light-dark(#fff,#1b1d22)}.attnlrp{margin:8px auto}</style>\n"
        f"</head>\n<body>\n{html_fragment(sections)}\n</body>\n</html>\n"
    )


def _escape(text: str) -> str:
    """Escaped for element content and for quoted attributes, encodable in UTF-8."""
    return html.escape(text.encode("utf-8", "replace").decode())


def _section(section: Section) -> str:
    head = "".join(f"<span>{name} <b>{text}</b></span>" for name, text in facts(section))
    head += _key(section.limit)
    parts = [f"<h4>{_escape(visible(section.title))}</h4><header>{head}</header>"]
    parts += [f'<p class="note">{_escape(note)}</p>' for note in notes(section)]
    for strip in section.strips:
        if section.has_several_inputs:
            parts.append(f'<div class="name dim">{_escape(strip.caption)}</div>')
        parts.append(_strip(strip, section.limit))
    parts += [_grid(grid) for grid in section.grids]
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


def _grid(grid: Grid) -> str:
    shown = picture(grid, 512, 512)
    rows, columns = shown.cells.shape
    if grid.is_image:
        zoom = max(1, round(336 / max(rows, columns)))
        width, height = columns * zoom, rows * zoom
    else:
        width, height = max(160, min(640, columns * 24)), max(20, min(320, rows * 14))
    data = base64.b64encode(png(shown)).decode()
    ratio = f"aspect-ratio:{width}/{height};height:auto" if grid.is_image else f"height:{height}px"
    return (
        f"<figure><figcaption><span>{_escape(shown.caption)}</span>"
        f"{_key(shown.limit, 'bar over')}</figcaption>"
        f'<img alt="relevance of {_escape(grid.name)}" style="width:{width}px;{ratio}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )
