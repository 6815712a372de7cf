"""How relevance is drawn where there is a choice. Numbers never depend on it."""

from __future__ import annotations

from dataclasses import dataclass

from attnlrp_fx.errors import InputError

_WIDEST = 1000.0


@dataclass(frozen=True, slots=True)
class Display:
    """How the heat maps of images are drawn.

    Raises:
        InputError: ``smooth`` is negative, not finite or beyond all images.
    """

    smooth: float = 0.0
    """The standard deviation, in pixels, of a Gaussian that spreads relevance; 0 for none. Sums
    stay."""
    overlay: bool = True
    """Whether relevance lies on the image in grey, its opacity being the magnitude, or on
    nothing."""

    def __post_init__(self) -> None:
        if not 0 <= self.smooth <= _WIDEST:
            raise InputError(
                f"heat maps cannot be smoothed by {self.smooth} pixels",
                remedy=f"pass a number from 0 to {_WIDEST:.0f}",
            )


PLAIN = Display()
"""What is drawn if nothing is asked for."""
