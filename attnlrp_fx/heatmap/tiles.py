"""Pictures side by side: an image beside its relevance, or beside several explanations of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from attnlrp_fx.heatmap.display import Display
from attnlrp_fx.heatmap.pictures import Picture, overlaid, picture
from attnlrp_fx.heatmap.sections import Gallery, number, share_of_value


@dataclass(frozen=True, slots=True)
class Tile:
    """One of several pictures of one size: its name, what it shows, what is said beneath it."""

    name: str
    shows: Tensor | Picture
    """Pixels (rows, columns, 3) in 0…1, or relevance on the page's own colour."""
    lines: tuple[str, ...] = ()
    limit: float = 0.0
    """Where the colours end, if the tile has a scale of its own."""


def pair(shown: Picture, image: Tensor) -> tuple[Tile, Tile]:
    """An image and its relevance."""
    return Tile("image", image), Tile("relevance", _relevance(shown))


def gallery_tiles(
    gallery: Gallery, size: int, display: Display
) -> Iterator[tuple[str, tuple[Tile, ...]]]:
    """For each image of a gallery: what is said above, the image, and its relevance by name.

    Each explanation has a scale of its own, since methods differ in magnitude.
    """
    for image in gallery.images:
        grids = gallery.grids(image)
        shown = {name: picture(grid, size, size, display) for name, grid in grids.items()}
        tiles = []
        for name, drawn in shown.items():
            section = gallery.sections[name]
            lines = [] if gallery.has_one_title else [section.title]
            lines += [] if section.value is None else [f"value {number(section.value)}"]
            lines.append(f"sum {share_of_value(grids[name].total, section.value, 'it')}")
            lines += [f"largest |cell| {drawn.largest:.4g}"] if drawn.is_clipped else []
            tiles.append(Tile(name, _relevance(drawn), tuple(lines), drawn.limit))
        first = next(iter(shown.values()))
        assert first.image is not None  # what `Gallery.images` names has one
        said = f"{image}: {', '.join(first.steps)}"
        yield said, (Tile("image", first.image), *tiles)


def _relevance(shown: Picture) -> Tensor | Picture:
    return shown if shown.ground is None else overlaid(shown, shown.ground)
