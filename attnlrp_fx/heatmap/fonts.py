"""Fonts that can draw a text: matplotlib itself falls back only to families that it is told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from matplotlib import font_manager

_EMPTY_SQUARE = "\u25a1"


@dataclass(frozen=True, slots=True)
class Fonts:
    """The families that cover a text, in order of preference, and the characters none covers."""

    families: tuple[str, ...]
    lacking: frozenset[str]

    def drawable(self, text: str) -> str:
        return "".join(_EMPTY_SQUARE if c in self.lacking else c for c in text)

    def properties(self, size: float, weight: str = "normal") -> font_manager.FontProperties:
        return font_manager.FontProperties(family=list(self.families), size=size, weight=weight)


def fonts_for(text: str) -> Fonts:
    """DejaVu Sans, which comes with matplotlib, and installed fonts for what it lacks."""
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
    return Fonts(tuple(families), frozenset(lacking))


@cache
def _covered(path: str) -> frozenset[str]:
    return frozenset(map(chr, font_manager.get_font(path).get_charmap()))
