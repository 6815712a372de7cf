"""Several explanations of the same images, side by side: other rules, targets or models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor

from attnlrp_fx import heatmap
from attnlrp_fx.errors import InputError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.runtime.explanation import Explanation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TOLERANCE = 0.02
"""How far images may differ: as models of different precision are given them."""


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Explanations of the same images, drawn beside the images under their names.

    Raises:
        InputError: there is none, or they are not of the same images.
    """

    explanations: Mapping[str, Explanation]

    def __post_init__(self) -> None:
        if not self.explanations:
            raise InputError("there is nothing to compare", remedy="pass explanations by name")
        (first, one), *others = self.explanations.items()
        images = _images(one)
        if not images:
            raise InputError(
                "there are no images to compare",
                where=f"explanation '{first}'",
                why="none of its explained inputs has shape (batch, 1, 3 or 4, height, width)",
                remedy="draw each explanation by itself",
            )
        for name, other in others:
            if not _same(images, _images(other)):
                raise InputError(
                    f"explanations '{first}' and '{name}' are not of the same images",
                    why=f"{_described(images)} is not {_described(_images(other))}",
                    remedy="explain one batch with each model or composite",
                )

    def to_html(
        self, path: str | Path | None = None, display: heatmap.Display = heatmap.PLAIN
    ) -> str:
        """A self-contained page, as `Explanation.to_html` writes it.

        Args:
            path: where to write the page as well, complete or not at all.
            display: how images are drawn.

        Raises:
            OSError: the directory of ``path`` does not exist or cannot be written.
        """
        title = f"Relevance by {', '.join(self.explanations)}"
        page = heatmap.html_document(self._galleries(), title, display)
        if path is not None:
            write_atomically(path, page)
        return page

    def figure(self, display: heatmap.Display = heatmap.PLAIN) -> Figure:
        """A matplotlib Figure, 8 inches wide: an image a line, and each explanation beside it.

        Args:
            display: how images are drawn.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return heatmap.figure(self._galleries(), display)

    def _repr_html_(self) -> str:
        return heatmap.html_fragment(self._galleries())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colours = None if console.no_color else console.color_system
        sections = [
            replace(section, title=f"{name} · {section.title}")
            for gallery in self._galleries()
            for name, section in gallery.sections.items()
        ]
        yield from heatmap.terminal(
            sections, colours, ascii_only=options.ascii_only, width=options.max_width
        )

    def _galleries(self) -> list[heatmap.Gallery]:
        rows = len(next(iter(self.explanations.values())))
        sections = {name: one.sections() for name, one in self.explanations.items()}
        return [
            heatmap.Gallery({name: found[row] for name, found in sections.items()})
            for row in range(rows)
        ]


def _images(explanation: Explanation) -> dict[str, Tensor]:
    """The images that relevance is of, as the model was given them."""
    return {
        name: explanation.inputs[name].detach().double().cpu()
        for name in explanation.relevance
        if explanation.has_images(name)
    }


def _same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        image.shape == theirs[name].shape
        and torch.allclose(image, theirs[name], _TOLERANCE, _TOLERANCE, equal_nan=True)
        for name, image in ours.items()
    )


def _described(images: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(image.shape)}" for name, image in images.items()) or "none"
