"""From a relevance to a colour.

A value ``r`` is drawn as ``level(r, limit)``: its share of ``limit``, the largest finite |r| of
what shares a scale, rounded to one of ``2 * STEPS + 1`` colours from blue (against the target) over
neutral to orange (for it). Blue and orange stay apart under every common colour blindness, and each
colour carries black or white text, whichever is easier to read. That gives a contrast of at least
4.58 : 1 on any background: black and white tie, at their worst, at relative luminance 0.179.

What is not finite has a colour of its own and never takes part in a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

RGB = tuple[int, int, int]

STEPS = 24
BLACK: RGB = (0, 0, 0)
WHITE: RGB = (255, 255, 255)
NOT_FINITE: RGB = (214, 39, 160)


def limit(relevance: Iterable[float]) -> float:
    """Largest finite magnitude; 0.0 if there is none."""
    return max((abs(r) for r in relevance if math.isfinite(r)), default=0.0)


def level(relevance: float, limit: float) -> int | None:
    """Colour step in [-STEPS, STEPS]; None if ``relevance`` is not finite. 0 where limit is 0."""
    if not math.isfinite(relevance):
        return None
    share = relevance / limit if limit > 0 else 0.0
    return round(STEPS * min(1.0, max(-1.0, share)))


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

OVERLAY: tuple[RGB, RGB] = ((58, 128, 210), (232, 120, 24))
"""Against and for, at full strength, where opacity is the magnitude and the page shines through."""
