"""What is drawn, and what is said in words beside it.

Token inputs of one section share one scale, so an encoder's and a decoder's tokens compare. A float
input has a scale of its own, because one pixel of many holds little. What colours cannot say (not
finite, all zero, in padding) is named by `notes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from attnlrp_fx.heatmap.images import Backdrop
from attnlrp_fx.heatmap.scale import limit
from attnlrp_fx.heatmap.spelling import Spelling


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

    @property
    def caption(self) -> str:
        return f"{self.name}: sum {number(self.total)}"


@dataclass(frozen=True, slots=True)
class Grid:
    """The relevance of one float input in one row: floating, of any shape, outside autograd."""

    name: str
    relevance: Tensor
    backdrop: Backdrop | None = None
    """The image that the relevance is of, if it is of one: (channels, height, width)."""

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
    row: int | None = None
    """Which row, if there are several."""
    measure: str = "relevance"
    """What the numbers are: relevance, or the activation of a neuron."""

    @property
    def heading(self) -> str:
        return self.title if self.row is None else f"Row {self.row} · {self.title}"

    @property
    def limit(self) -> float:
        """The scale that the tokens share: the largest finite |relevance|, 0 if there is none."""
        return limit(r for strip in self.strips for r in strip.relevance)

    @property
    def total(self) -> float:
        tokens = sum(strip.total for strip in self.strips)
        return tokens + sum(grid.total for grid in self.grids)

    @property
    def has_several_inputs(self) -> bool:
        """Whether a strip needs its caption: alone, it holds all of the section's relevance."""
        return len(self.strips) + len(self.grids) > 1


@dataclass(frozen=True, slots=True)
class Gallery:
    """One row of the batch under several explanations: a section each, by name.

    Its images are drawn side by side. The sections have the same images, by the same names.
    """

    sections: Mapping[str, Section]

    @property
    def heading(self) -> str:
        """That of the sections, without what they differ in."""
        first = next(iter(self.sections.values()))
        title = first.title if self.has_one_title else "several targets"
        return replace(first, title=title).heading

    @property
    def has_one_title(self) -> bool:
        return len({section.title for section in self.sections.values()}) == 1

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the inputs that are images."""
        first = next(iter(self.sections.values()))
        return tuple(grid.name for grid in first.grids if grid.backdrop is not None)

    def grids(self, image: str) -> dict[str, Grid]:
        """The relevance of one image, by the sections' names."""
        return {
            name: grid
            for name, section in self.sections.items()
            for grid in section.grids
            if grid.name == image
        }


@dataclass(frozen=True, slots=True)
class Matrix:
    """One row of the batch under several targets or at several layers, by name: a line each.

    The sections have the same tokens. All lines of a table share one scale.
    """

    names: tuple[str, ...]
    sections: tuple[Section, ...]
    title: str | None = None
    """What stands above it; None: how many targets there are."""

    @property
    def heading(self) -> str:
        if self.title is not None:
            return self.title
        return replace(self.sections[0], title=f"{len(self.sections)} targets").heading

    @property
    def limit(self) -> float:
        """The scale that all lines share: the largest finite |relevance|, 0 if there is none."""
        return limit(section.limit for section in self.sections)

    @property
    def strips(self) -> list[tuple[TokenStrip, ...]]:
        """By token input, one strip a target."""
        return list(zip(*(section.strips for section in self.sections), strict=True))


def number(value: float) -> str:
    """Four significant digits with a sign: ``+3.142``, ``0``, ``nan``."""
    return f"{value:.4g}" if value == 0 or math.isnan(value) else f"{value:+.4g}"


def share_of_value(total: float, value: float | None, name: str = "the value") -> str:
    """A sum of relevance, and what part of the target's value it is where that is defined."""
    if not value or not math.isfinite(total) or not math.isfinite(value):
        return number(total)
    return f"{number(total)} ({total / value:.1%} of {name})"


def facts(section: Section) -> list[tuple[str, str]]:
    """What stands beside the title, a name and its number each."""
    value = [] if section.value is None else [("value", number(section.value))]
    return [*value, (f"sum of {section.measure}", share_of_value(section.total, section.value))]


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


def gallery_notes(gallery: Gallery) -> list[str]:
    """`notes` of every section, after its name."""
    return [f"{name}: {n}" for name, section in gallery.sections.items() for n in notes(section)]
