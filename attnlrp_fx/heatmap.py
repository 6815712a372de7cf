"""Relevance drawn as colour: pure functions from numbers to HTML, terminal text and figures.

A value ``r`` is drawn as ``level(r, limit)``: its share of ``limit``, the largest finite |r| of
what shares a scale, rounded to one of ``2 * STEPS + 1`` colours from blue (against the target) over
neutral to orange (for it). Blue and orange stay apart under every common colour blindness, and each
colour carries black or white text, whichever is easier to read. That gives a contrast of at least
4.58 : 1 on any background: black and white tie, at their worst, at relative luminance 0.179.

Token inputs of one section share one scale, so an encoder's and a decoder's tokens compare. A float
input has a scale of its own, because one pixel of many holds little. What is not finite is hatched
and named in words; it never takes part in a scale.

Tokens arrive as a tokenizer's vocabulary spells them. `pieces` undoes the three common spellings
(byte-level BPE, SentencePiece, WordPiece) so that the text reads as it was written, and makes
visible what would otherwise not be seen: white space, control and formatting characters.

Nothing here knows a model or an `Explanation`; the input is `Section`.
"""

from __future__ import annotations

import base64
import html as _html
import math
import re
import struct
import textwrap
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch
from rich.color import Color
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from attnlrp_fx.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.patches import Rectangle

RGB = tuple[int, int, int]
Spelling = Literal["byte", "sentencepiece", "wordpiece", "word"]

STEPS = 24
BLACK: RGB = (0, 0, 0)
WHITE: RGB = (255, 255, 255)


# What is drawn


@dataclass(frozen=True, slots=True)
class TokenStrip:
    """The tokens of one input in one row of the batch, padding left out.

    The three sequences have one length. ``hidden`` is the relevance that padding holds: it is not
    drawn, so it has to be said.
    """

    name: str
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    relevance: tuple[float, ...]
    spelling: Spelling
    hidden: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.relevance)


@dataclass(frozen=True, slots=True)
class Grid:
    """The relevance of one float input in one row: floating, of any shape, outside autograd."""

    name: str
    relevance: Tensor

    @property
    def total(self) -> float:
        return float(self.relevance.double().sum())

    @property
    def is_image(self) -> bool:
        """(..., channels, height, width): drawn with square cells, summed over channels."""
        return self.relevance.dim() >= 3


@dataclass(frozen=True, slots=True)
class Section:
    """One row of the batch: what was explained, its value, and the relevance of each input.

    ``value`` is None for what belongs to the batch as a whole and so has no target of its own.
    """

    title: str
    value: float | None
    strips: tuple[TokenStrip, ...] = ()
    grids: tuple[Grid, ...] = ()

    @property
    def limit(self) -> float:
        """The scale that the tokens share: the largest finite |relevance|, 0 if there is none."""
        return limit(r for strip in self.strips for r in strip.relevance)

    @property
    def total(self) -> float:
        tokens = sum(strip.total for strip in self.strips)
        return tokens + sum(grid.total for grid in self.grids)


# Scale and colour


def limit(relevance: Iterable[float]) -> float:
    """Largest finite magnitude; 0.0 if there is none."""
    return max((abs(r) for r in relevance if math.isfinite(r)), default=0.0)


def level(relevance: float, limit: float, steps: int = STEPS) -> int | None:
    """Colour step in [-steps, steps]; None if ``relevance`` is not finite. 0 where limit is 0."""
    if not math.isfinite(relevance):
        return None
    share = relevance / limit if limit > 0 else 0.0
    return round(steps * min(1.0, max(-1.0, share)))


def luminance(colour: RGB) -> float:
    """WCAG relative luminance, 0 (black) to 1 (white)."""

    def linear(channel: int) -> float:
        c = channel / 255
        return c / 12.92 if c <= 0.04045 else float(((c + 0.055) / 1.055) ** 2.4)

    red, green, blue = map(linear, colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: RGB, b: RGB) -> float:
    """WCAG contrast ratio, 1 to 21."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def ink(background: RGB) -> RGB:
    """The text colour, black or white, with the higher contrast on ``background``."""
    return max((BLACK, WHITE), key=lambda colour: contrast(colour, background))


def hex_colour(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


@dataclass(frozen=True, slots=True)
class Palette:
    """A diverging scale: equally spaced stops from -1 to 1, linear in sRGB in between."""

    stops: tuple[RGB, ...]

    def colour(self, share: float) -> RGB:
        """Colour of a share in [-1, 1]."""
        place = (share + 1) / 2 * (len(self.stops) - 1)
        at = min(int(place), len(self.stops) - 2)
        lower, upper = self.stops[at], self.stops[at + 1]
        red, green, blue = (
            round(a + (b - a) * (place - at)) for a, b in zip(lower, upper, strict=True)
        )
        return red, green, blue


LIGHT = Palette(
    (
        (74, 144, 217),
        (133, 183, 232),
        (205, 225, 245),
        (255, 255, 255),
        (253, 226, 200),
        (250, 185, 120),
        (240, 134, 42),
    )
)
"""On paper: the stronger, the darker. Black text throughout."""

DARK = Palette(
    (
        (38, 112, 200),
        (34, 82, 142),
        (33, 54, 84),
        (27, 29, 34),
        (76, 50, 26),
        (128, 71, 18),
        (184, 88, 0),
    )
)
"""On a dark page or terminal: the stronger, the brighter. White text throughout."""


# Tokens as text


@dataclass(frozen=True, slots=True)
class Piece:
    """A token as drawn: its visible text, whether a space stands before it, and its kind."""

    text: str
    gap: bool
    special: bool


CONTINUED = "◂"
"""Stands for a token that holds nothing but later bytes of a character begun before it."""

_SPECIAL = re.compile(
    r"<[|｜].*[|｜]>"
    r"|\[[A-Z][A-Z0-9_]+\]"
    r"|</?(?:s|pad|unk|mask|bos|eos|sep|cls|image|(?:start|end)_of_\w+|extra_id_\d+)>"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORDPIECE = re.compile(r"##[^#]")
_CLOSING = frozenset(".,!?;:%)]}…。、，！？；：）」』")
_OPENING = frozenset("([{（「『")
_CLITICS = frozenset({"s", "t", "re", "ve", "m", "ll", "d"})
_JOINERS = frozenset("\u200c\u200d\ufe0e\ufe0f")


@cache
def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable character (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + n): byte for n, byte in enumerate(others)}


def is_special(token: str) -> bool:
    """Whether a token looks like a control token ([CLS], </s>, <|endoftext|>), not like text."""
    return _SPECIAL.fullmatch(token) is not None


def spelling(tokens: Iterable[str]) -> Spelling:
    """How a vocabulary spells word boundaries, judged by the marks that occur most.

    Pass all tokens of an input, over all rows: a short row may have no mark. "word" means that no
    mark was found; tokens then stand for words.
    """
    words = [token for token in tokens if token and not is_special(token)]
    marks: dict[Spelling, int] = {
        "byte": sum(word[0] in "ĠĊĉč" for word in words),
        "sentencepiece": sum(bool("▁" in word or _BYTE_TOKEN.fullmatch(word)) for word in words),
        "wordpiece": sum(bool(_WORDPIECE.match(word)) for word in words),
    }
    best = max(marks, key=lambda name: marks[name])
    if marks[best]:
        return best
    return "byte" if _spells_utf8("".join(words)) else "word"


def _spells_utf8(text: str) -> bool:
    """Whether non-ASCII text is UTF-8 spelled byte by byte; real Latin text never is by chance."""
    table = _byte_alphabet()
    if text.isascii() or any(character not in table for character in text):
        return False
    try:
        bytes(table[character] for character in text).decode()
    except UnicodeDecodeError:
        return False
    return True


def pieces(tokens: Sequence[str], spelling: Spelling) -> list[Piece]:
    """Tokens as drawn, one piece each: joined they read as the text did."""
    texts = _texts(tokens, spelling)
    drawn: list[Piece] = []
    for i, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        special = is_special(token)
        if spelling in ("wordpiece", "word"):
            continues = spelling == "wordpiece" and _WORDPIECE.match(text) is not None
            gap = not continues and not _glued(texts, i)
            text = text[2:] if continues else text
        else:
            gap = text.startswith(" ") and bool(text.strip(" "))
            text = text[1:] if gap else text
        gap = gap or special or (i > 0 and drawn[-1].special)
        starts_line = not drawn or drawn[-1].text.endswith("\n")
        drawn.append(Piece(visible(text), gap and not starts_line, special))
    return drawn


def _texts(tokens: Sequence[str], spelling: Spelling) -> list[str]:
    """The characters each token stands for, white space as itself."""
    if spelling == "byte":
        table = _byte_alphabet()
        return _decode(
            [
                bytes(table[c] for c in token) if all(c in table for c in token) else token
                for token in tokens
            ]
        )
    if spelling == "sentencepiece":
        return _decode(
            [
                bytes.fromhex(byte[1])
                if (byte := _BYTE_TOKEN.fullmatch(token))
                else (token if is_special(token) else token.replace("▁", " "))
                for token in tokens
            ]
        )
    return list(tokens)


def _decode(chunks: Sequence[bytes | str]) -> list[str]:
    """UTF-8 across tokens: a character belongs to the token that begins it."""
    texts = [chunk if isinstance(chunk, str) else "" for chunk in chunks]
    owners = [
        (i, byte)
        for i, chunk in enumerate(chunks)
        for byte in (chunk if isinstance(chunk, bytes) else (None,))
    ]
    at = 0
    while at < len(owners):
        owner, byte = owners[at]
        if byte is None:
            at += 1
            continue
        size = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
        run = bytes(b for _, b in owners[at : at + size] if b is not None)
        try:
            character = run.decode()
        except UnicodeDecodeError:
            character, size = "\ufffd", 1
        texts[owner] += character
        at += size
    return [
        CONTINUED if not text and chunk else text for text, chunk in zip(texts, chunks, strict=True)
    ]


def _glued(texts: Sequence[str], i: int) -> bool:
    """Whether word ``i`` joins the one before it: punctuation, apostrophes, CJK."""
    if i == 0:
        return False
    before, word = texts[i - 1], texts[i]
    after = texts[i + 1] if i + 1 < len(texts) else ""
    if word in _CLOSING or before in _OPENING:
        return True
    if word == "'" and after in _CLITICS:
        return True
    if before == "'" and word in _CLITICS:
        return True
    return _is_cjk(before[-1:]) and _is_cjk(word[:1])


def _is_cjk(character: str) -> bool:
    return "\u3040" <= character <= "\u9fff"


def visible(text: str) -> str:
    """``text`` with everything that a reader could not see, or that could act, made visible.

    Spaces at either end become ``·``, a newline ``⏎`` before itself, control characters their
    pictures, and formatting characters (bidirectional overrides, lone surrogates, zero widths)
    their code points. Joiners inside a token stay, for the emoji and scripts that need them.
    """
    if not text:
        return "∅"
    core = text.strip(" ")
    head = len(text) - len(text.lstrip(" ")) if core else len(text)
    tail = len(text) - head - len(core)
    joins = any(character not in _JOINERS for character in core)
    return "·" * head + "".join(_seen(character, joins) for character in core) + "·" * tail


def _seen(character: str, joins: bool) -> str:
    code = ord(character)
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if character in _JOINERS:
        return character if joins else f"⟨U+{code:04X}⟩"
    category = unicodedata.category(character)
    if category == "Zs" and character != " ":
        return "·"
    if category in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return character


# Words about numbers


def number(value: float) -> str:
    """Four significant digits with a sign: ``+3.142``, ``0``, ``nan``."""
    return f"{value:.4g}" if value == 0 or math.isnan(value) else f"{value:+.4g}"


def share_of_value(section: Section) -> str:
    """The sum of relevance, and what part of the target's value it is where that is defined."""
    total, value = section.total, section.value
    if value is None or not value or not math.isfinite(total) or not math.isfinite(value):
        return number(total)
    return f"{number(total)} ({total / value:.1%} of the value)"


def notes(section: Section) -> list[str]:
    """What a reader must know before trusting the colours, a sentence each."""
    said = []
    tokens = [r for strip in section.strips for r in strip.relevance]
    if tokens and not any(tokens):
        said.append("The relevance of every token is zero.")
    for strip in section.strips:
        if not strip.tokens:
            said.append(f"{strip.name} has no tokens but padding.")
        if strip.hidden:
            said.append(
                f"Padding of {strip.name} holds relevance that is not shown: "
                f"{number(strip.hidden)}."
            )
        bad = [
            f"{position} ({relevance})"
            for position, relevance in zip(strip.positions, strip.relevance, strict=True)
            if not math.isfinite(relevance)
        ]
        if bad:
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            said.append(
                f"Relevance of {strip.name} is not finite at {', '.join(bad[:8])}{more}; "
                "the scale leaves that out."
            )
    for grid in section.grids:
        if lost := int((~grid.relevance.isfinite()).sum()):
            said.append(f"{lost} of {grid.relevance.numel()} values of {grid.name} are not finite.")
        elif not bool(grid.relevance.any()):
            said.append(f"The relevance of {grid.name} is zero everywhere.")
    return said


# Float inputs as pictures


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


_OVERLAY: tuple[RGB, RGB] = ((58, 128, 210), (232, 120, 24))
_NOT_FINITE: RGB = (214, 39, 160)


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
    colours = bytes(_NOT_FINITE) + b"".join(bytes(_OVERLAY[i > 128]) for i in range(1, 256))
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


# HTML


def _both(light: RGB, dark: RGB) -> str:
    return f"light-dark({hex_colour(light)},{hex_colour(dark)})"


@cache
def stylesheet() -> str:
    """CSS for `html_fragment`, scoped to ``.attnlrp``.

    ``light-dark()`` follows the page's colour scheme; notebooks that have a theme of their own say
    so in an attribute or class of the body. Browsers without it get the light colours.
    """
    rules = [_LAYOUT]
    for step in range(-STEPS, STEPS + 1):
        light, dark = (palette.colour(step / STEPS) for palette in (LIGHT, DARK))
        rules.append(
            f".attnlrp .{_css_class(step)}{{background:{hex_colour(light)};"
            f"background:{_both(light, dark)};color:{hex_colour(ink(light))};"
            f"color:{_both(ink(light), ink(dark))}}}"
        )
    light_bar = ",".join(map(hex_colour, LIGHT.stops))
    bar = ",".join(_both(a, b) for a, b in zip(LIGHT.stops, DARK.stops, strict=True))
    rules.append(
        f".attnlrp .bar{{background:linear-gradient(90deg,{light_bar});"
        f"background:linear-gradient(90deg,{bar})}}"
    )
    below, above = (",".join(map(str, colour)) for colour in _OVERLAY)
    rules.append(
        f".attnlrp .bar.over{{background:linear-gradient(90deg,rgb({below}),rgba({below},0) 50%,"
        f"rgba({above},0) 50%,rgb({above}))}}"
    )
    return "\n".join(rules)


def _css_class(step: int | None) -> str:
    if step is None:
        return "x"
    return f"n{-step}" if step < 0 else f"p{step}"


_LAYOUT = """\
.attnlrp{color-scheme:light dark;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,\
"Helvetica Neue",Arial,sans-serif;color:#1f2328;color:light-dark(#1f2328,#e6e8ec);\
background:#fff;background:light-dark(#fff,#1b1d22);padding:4px 16px;border-radius:8px;\
max-width:72em;text-align:start;font-variant-numeric:tabular-nums}
[data-jp-theme-light="true"] .attnlrp,.vscode-light .attnlrp{color-scheme:light}
[data-jp-theme-light="false"] .attnlrp,.vscode-dark .attnlrp,html[theme="dark"] .attnlrp\
{color-scheme:dark}
.attnlrp section{padding:12px 0}
.attnlrp section+section{border-top:1px solid #d8dbe0;border-color:light-dark(#d8dbe0,#3a3e46)}
.attnlrp h4{margin:0;font-size:15px;font-weight:600}
.attnlrp header{display:flex;flex-wrap:wrap;gap:2px 20px;align-items:baseline}
.attnlrp header b{font-weight:600}
.attnlrp .dim,.attnlrp figcaption{color:#59616b;color:light-dark(#59616b,#a3abb6);font-size:13px}
.attnlrp .key{display:inline-flex;gap:8px;align-items:center;margin-inline-start:auto}
.attnlrp .bar{display:inline-block;width:132px;height:10px;border-radius:5px;\
box-shadow:0 0 0 1px #c8ccd2;box-shadow:0 0 0 1px light-dark(#c8ccd2,#4a4f59)}
.attnlrp .note{margin:6px 0 0;padding-inline-start:10px;font-size:13px;border-inline-start:\
3px solid #d627a0}
.attnlrp .name{margin-top:10px}
.attnlrp .strip{margin-top:6px;line-height:2;white-space:pre-wrap;overflow-wrap:anywhere}
.attnlrp .t{position:relative;padding-block:3px;border-radius:3px;-webkit-box-decoration-break:\
clone;box-decoration-break:clone;box-shadow:inset -1px 0 #8882;forced-color-adjust:none;\
-webkit-print-color-adjust:exact;print-color-adjust:exact;cursor:default}
.attnlrp .s{font:0.8em ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.attnlrp .x{background:repeating-linear-gradient(45deg,#d627a055 0 3px,transparent 3px 7px);\
color:inherit}
.attnlrp .t:hover{outline:2px solid #1f2328;outline-color:light-dark(#1f2328,#e6e8ec)}
.attnlrp .t:hover::after{content:attr(title);position:absolute;left:0;top:calc(100% + 4px);\
z-index:9;width:max-content;max-width:24em;padding:4px 8px;border-radius:5px;background:#1f2328;\
background:light-dark(#1f2328,#e6e8ec);color:#fff;color:light-dark(#fff,#16181d);\
font:13px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;direction:ltr;\
white-space:pre-wrap;pointer-events:none}
@supports (position-area:bottom){.attnlrp .t:hover{anchor-name:--attnlrp;position:static}\
.attnlrp .t:hover::after{position:fixed;left:auto;top:auto;margin-block:4px;\
position-anchor:--attnlrp;position-area:bottom span-right;\
position-try-fallbacks:flip-inline,flip-block,flip-inline flip-block}}
.attnlrp figure{margin:10px 0 0}
.attnlrp img{display:block;image-rendering:pixelated;max-width:100%;box-shadow:0 0 0 1px #c8ccd2;\
box-shadow:0 0 0 1px light-dark(#c8ccd2,#4a4f59);-webkit-print-color-adjust:exact;\
print-color-adjust:exact}
.attnlrp figcaption{display:flex;flex-wrap:wrap;gap:2px 20px;margin-bottom:6px}
@media print{.attnlrp{color-scheme:light;max-width:none}.attnlrp .bar\
{-webkit-print-color-adjust:exact;print-color-adjust:exact}.attnlrp h4,\
.attnlrp header{break-after:avoid}.attnlrp figure{break-inside:avoid}}
@media print,(prefers-contrast:more){.attnlrp [class*=" n"]:not(.n1,.n2,.n3)\
{text-decoration:underline dotted 2px;text-underline-offset:3px}}"""


def html_fragment(sections: Sequence[Section]) -> str:
    """Self-contained HTML for a notebook or a page: no script, no network, everything escaped."""
    body = "\n".join(_html_section(section) for section in sections)
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
    return _html.escape(text.encode("utf-8", "replace").decode())


def _html_section(section: Section) -> str:
    facts = []
    if section.value is not None:
        facts.append(f"<span>value <b>{number(section.value)}</b></span>")
    facts.append(f"<span>sum of relevance <b>{share_of_value(section)}</b></span>")
    facts.append(_html_key(section.limit))
    several = len(section.strips) + len(section.grids) > 1
    parts = [f"<h4>{_escape(visible(section.title))}</h4><header>{''.join(facts)}</header>"]
    parts += [f'<p class="note">{_escape(note)}</p>' for note in notes(section)]
    parts += [_html_strip(strip, section.limit, named=several) for strip in section.strips]
    parts += [_html_grid(grid) for grid in section.grids]
    return f"<section>{''.join(parts)}</section>"


def _html_key(limit: float, kind: str = "bar") -> str:
    if limit == 0:
        return ""
    return (
        f'<span class="key dim">{number(-limit)}<span class="{kind}" role="img" '
        f'aria-label="colour scale, blue against the target, orange for it"></span>'
        f"{number(limit)}</span>"
    )


def _html_strip(strip: TokenStrip, limit: float, named: bool) -> str:
    spans = []
    drawn = pieces(strip.tokens, strip.spelling)
    for i, piece in enumerate(drawn):
        relevance = strip.relevance[i]
        kind = f"t {_css_class(level(relevance, limit))}"
        tip = f"{visible(strip.tokens[i]).strip()}\n{strip.name}[{strip.positions[i]}]"
        # A direction of its own keeps a Latin [CLS] from deciding that of a Hebrew sentence.
        extra = ' dir="ltr"' if piece.special else ""
        spans.append(
            f'{" " if piece.gap else ""}<span class="{kind}{" s" if piece.special else ""}"{extra}'
            f' title="{_escape(tip)}: {relevance:+.7g}">{_escape(piece.text)}</span>'
        )
    name = (
        f'<div class="name dim">{_escape(strip.name)}: sum {number(strip.total)}</div>'
        if named
        else ""
    )
    return f'{name}<div class="strip" dir="auto">{"".join(spans)}</div>'


def _html_grid(grid: Grid) -> str:
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
        f"{_html_key(shown.limit, 'bar over')}</figcaption>"
        f'<img alt="relevance of {_escape(grid.name)}" style="width:{width}px;{ratio}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


# Terminal

# For terminals that cannot show `DARK` itself, the nearest of what they have.
_INDEXED: dict[str, tuple[int, ...]] = {
    "256": (32, 25, 24, 17, 235, 58, 94, 130, 166),
    "standard": (12, 4, 0, 3, 11),
    "windows": (12, 4, 0, 3, 11),
}
TOP = 10
"""Tokens listed where there is no colour."""

BAR = 10
"""Cells of the longest bar, to either side."""


def terminal(
    sections: Sequence[Section], colours: str | None, ascii_only: bool = False, width: int = 80
) -> Iterator[RenderableType]:
    """Rich renderables: coloured text, or a table of the strongest tokens without colour.

    ``colours`` is rich's name of the colour system, None for no colour. ``width`` is in cells.
    """
    for number_, section in enumerate(sections):
        if number_:
            yield Text()
        head = _line(section.title, "bold")
        if section.value is not None:
            head.append(f"   value {number(section.value)}", style="not bold")
        head.append(f"   sum of relevance {share_of_value(section)}", style="not bold")
        yield head
        for note in notes(section):
            yield _line(f"! {note}", "italic")
        if colours is None:
            yield from _plain_section(section, ascii_only)
        else:
            yield from _coloured_section(section, colours, width)


def _line(text: str, style: str = "") -> Text:
    """Text that can do nothing to the terminal but show."""
    return Text(visible(text), style=style)


def _coloured_section(section: Section, colours: str, width: int) -> Iterator[RenderableType]:
    several = len(section.strips) + len(section.grids) > 1
    for strip in section.strips:
        if several:
            yield _line(f"{strip.name}: sum {number(strip.total)}", "dim")
        text = Text()
        shown = pieces(strip.tokens, strip.spelling)
        for piece, relevance in zip(shown, strip.relevance, strict=True):
            if piece.gap:
                text.append(" ", style=_cell_style(0, colours))
            text.append(piece.text, style=_cell_style(_share(relevance, section.limit), colours))
        yield text
    if section.limit:
        yield _terminal_key(section.limit, colours)
    for grid in section.grids:
        cells = picture(grid, 48, min(64, width))
        yield _line(cells.caption, "dim")
        yield _half_blocks(cells, colours)
        if cells.limit:
            yield _terminal_key(cells.limit, colours)


def _share(relevance: float, limit: float) -> float | None:
    step = level(relevance, limit)
    return None if step is None else step / STEPS


def _cell_style(share: float | None, colours: str) -> str:
    """Style of a token; one that is not finite is struck out."""
    if share is None:
        return "reverse strike"
    background = _terminal_colour(share, colours)
    return f"{hex_colour(ink(Color.parse(background).get_truecolor()))} on {background}"


def _terminal_colour(share: float, colours: str) -> str:
    if colours not in _INDEXED:
        return hex_colour(DARK.colour(share))
    ramp = _INDEXED[colours]
    middle = len(ramp) // 2
    return f"color({ramp[middle + round(share * middle)]})"


def _terminal_key(limit: float, colours: str) -> Text:
    text = Text(f"{number(-limit)} ", style="dim")
    for i in range(-12, 13):
        text.append(" ", style=f"on {_terminal_colour(i / 12, colours)}")
    return text.append(f" {number(limit)}   blue against, orange for the target", style="dim")


def _half_blocks(picture: Picture, colours: str) -> Text:
    """Two cells a character, one above the other."""

    def colour(value: float) -> str:
        share = _share(value, picture.limit)
        return "magenta" if share is None else _terminal_colour(share, colours)

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
            table.add_row(*cells, Text(_bar(relevance / section.limit, ascii_only)))
        yield table
        if len(ranked) > TOP:
            yield Text(f"{len(ranked) - TOP} weaker tokens are not listed.")
    for grid in section.grids:
        shape = "x".join(map(str, grid.relevance.shape))
        yield _line(f"{grid.name} {shape}: sum {number(grid.total)}")


def _bar(share: float, ascii_only: bool) -> str:
    """A bar that grows from the middle: to the left against, to the right for."""
    block = ("#" if ascii_only else "█") * math.ceil(abs(share) * BAR)
    return f"{block if share < 0 else '':>{BAR}}|{block if share > 0 else '':<{BAR}}"


# Figure

_SIZE = 10.0
_LINE = 0.27
_EMPTY_SQUARE = "\u25a1"


@dataclass(frozen=True, slots=True)
class _Block:
    """A stripe across the figure: its height in inches, and what draws it on axes in inches."""

    height: float
    draw: Callable[[Axes], None]


def figure(sections: Sequence[Section], width: float = 8.0) -> Figure:
    """Tokens as a heat strip wrapped over lines, float inputs as heat maps; light colours.

    Characters that no installed font has are drawn as an empty square, so that saving the figure
    warns of nothing.

    Args:
        sections: what to draw, from top to bottom.
        width: in inches; the height follows.

    Returns:
        A matplotlib Figure that belongs to no pyplot state.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Drawing a figure needs matplotlib.",
            why=str(error),
            remedy="pip install 'attnlrp_fx[plot]'",
        ) from error

    margin = 0.2
    inner = width - 2 * margin
    blocks = [block for section in sections for block in _figure_blocks(section, inner)]
    height = 2 * margin + sum(block.height for block in blocks)
    drawing = Figure(figsize=(width, height), facecolor="white")
    top = height - margin
    for block in blocks:
        top -= block.height
        axes = drawing.add_axes(
            (margin / width, top / height, inner / width, block.height / height),
            xlim=(0, inner),
            ylim=(block.height, 0),
        )
        axes.set_axis_off()
        block.draw(axes)
    return drawing


def _figure_blocks(section: Section, width: float) -> Iterator[_Block]:
    facts = f"sum of relevance {share_of_value(section)}"
    if section.value is not None:
        facts = f"value {number(section.value)}     {facts}"

    def head(axes: Axes) -> None:
        _write(axes, section.title, 0, 0.12, weight="bold")
        _write(axes, facts, 0, 0.34, size=9)
        _figure_key(axes, section.limit, width, 0.34)

    yield _Block(0.52, head)
    said = [line for note in notes(section) for line in textwrap.wrap(note, int(width * 15))]
    if said:
        yield _figure_lines(said)
    several = len(section.strips) + len(section.grids) > 1
    for strip in section.strips:
        if several:
            yield _figure_lines([f"{strip.name}: sum {number(strip.total)}"])
        yield _figure_strip(strip, section.limit, width)
    for grid in section.grids:
        yield _figure_grid(grid, width)
    yield _Block(0.2, lambda axes: None)


def _figure_lines(lines: Sequence[str]) -> _Block:
    def draw(axes: Axes) -> None:
        for i, line in enumerate(lines):
            _write(axes, line, 0, 0.2 * i + 0.1, size=9, colour="#59616b")

    return _Block(0.2 * len(lines) + 0.04, draw)


def _figure_strip(strip: TokenStrip, limit: float, width: float) -> _Block:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from matplotlib.textpath import text_to_path

    shown = pieces(strip.tokens, strip.spelling)
    fonts = _fonts("".join(piece.text for piece in shown))
    texts = [fonts.drawable(piece.text.replace("\n", "")) for piece in shown]
    properties = fonts.properties(_SIZE)
    blank = 0.05

    places: list[tuple[float, int, float]] = []
    x, line = 0.0, 0
    for piece, text in zip(shown, texts, strict=True):
        extent = text_to_path.get_text_width_height_descent(text, properties, ismath=False)[0] / 72
        extent += 0.03
        x += blank * piece.gap
        if x > 0 and x + extent > width:
            x, line = 0.0, line + 1
        places.append((x, line, extent))
        x += extent
        if piece.text.endswith("\n"):
            x, line = 0.0, line + 1
    from_right = _reads_from_right(texts)

    def draw(axes: Axes) -> None:
        boxes, colours = [], []
        for (left, line, extent), text, relevance in zip(
            places, texts, strip.relevance, strict=True
        ):
            start = width - left - extent if from_right else left
            step = level(relevance, limit)
            colour = LIGHT.colour((step or 0) / STEPS)
            box = Rectangle((start, line * _LINE + 0.02), extent, _LINE - 0.05)
            boxes.append(box)
            colours.append(hex_colour(colour))
            if step is None:
                axes.add_patch(_hatched(box))
            axes.text(
                start + extent / 2,
                (line + 0.5) * _LINE,
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
    return _Block(lines * _LINE + 0.05, draw)


def _hatched(box: Rectangle) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle(
        box.get_xy(),
        box.get_width(),
        box.get_height(),
        fill=False,
        edgecolor=hex_colour(_NOT_FINITE),
        hatch="////",
        linewidth=0.4,
        zorder=2,
    )


def _figure_grid(grid: Grid, width: float) -> _Block:
    from matplotlib.colors import LinearSegmentedColormap

    shown = picture(grid, 1024, 1024)
    rows, columns = shown.cells.shape
    if grid.is_image:
        scale = min(width, 4.0) / max(rows, columns)
        across, down = columns * scale, rows * scale
    else:
        across, down = min(width, max(2.0, 0.3 * columns)), min(4.0, max(0.25, 0.16 * rows))
    stops = [hex_colour(colour) for colour in LIGHT.stops]
    colours = LinearSegmentedColormap.from_list("attnlrp", stops)
    colours_and_bad = colours.with_extremes(bad=hex_colour(_NOT_FINITE))
    caption = textwrap.wrap(shown.caption, int((width - 2.6) * 15))
    start = 0.2 * len(caption) + 0.08

    def draw(axes: Axes) -> None:
        for i, line in enumerate(caption):
            _write(axes, line, 0, 0.2 * i + 0.1, size=9, colour="#59616b")
        _figure_key(axes, shown.limit, width, 0.1)
        end = shown.limit or 1.0
        cells = shown.cells.masked_fill(~shown.cells.isfinite(), math.nan)
        axes.imshow(
            cells.tolist(),
            cmap=colours_and_bad,
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

    return _Block(start + down + 0.1, draw)


def _figure_key(axes: Axes, limit: float, width: float, y: float) -> None:
    """The colour scale with its numbers, at the right end of a line; none for a limit of 0."""
    from matplotlib.patches import Rectangle

    if limit == 0:
        return
    right, cells, cell = width - 0.62, 24, 0.05
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
    size: float = _SIZE,
    weight: str = "normal",
    colour: str = "black",
    align: Literal["left", "right"] = "left",
) -> None:
    fonts = _fonts(text)
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


@dataclass(frozen=True, slots=True)
class _Fonts:
    """The families that cover a text, in order of preference, and the characters none covers."""

    families: tuple[str, ...]
    lacking: frozenset[str]

    def drawable(self, text: str) -> str:
        return "".join(_EMPTY_SQUARE if c in self.lacking else c for c in text)

    def properties(self, size: float, weight: str = "normal") -> FontProperties:
        from matplotlib.font_manager import FontProperties

        return FontProperties(family=list(self.families), size=size, weight=weight)


def _fonts(text: str) -> _Fonts:
    """DejaVu Sans, which comes with matplotlib, and installed fonts for what it lacks."""
    from matplotlib import font_manager

    families = ["DejaVu Sans"]
    covered = font_manager.get_font(font_manager.findfont(families[0])).get_charmap()
    lacking = {c for c in text if ord(c) not in covered}
    for entry in font_manager.fontManager.ttflist if lacking else ():
        # Colour fonts hold bitmaps, which matplotlib cannot draw; last resorts hold only boxes.
        if re.search("Emoji|Last ?Resort", entry.name) or entry.name in families:
            continue
        found = lacking & _covered(entry.fname)
        if found:
            families.append(entry.name)
            lacking -= found
    return _Fonts(tuple(families), frozenset(lacking))


@cache
def _covered(path: str) -> frozenset[str]:
    from matplotlib import font_manager

    return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
