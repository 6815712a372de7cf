"""Relevance flow: what each layer holds of the relevance, at every position.

A line a latent value, from the model's first to its last, a column a token: the relevance of the
value there, summed over its units. Of the residual stream, a line is a complete cut of an encoder
or a decoder alone: it adds up to the target's value, but for what is absorbed behind it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor

from attnlrp_fx import heatmap
from attnlrp_fx.errors import InputError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.runtime.latent import Latent

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Flow:
    """Relevance by latent value and position, for every row of a batch."""

    values: dict[str, Tensor]
    """By name of a latent value: (batch, positions), float32 or better."""
    matrices: tuple[heatmap.Matrix, ...]
    """What is drawn: a table a row and token input."""

    def __repr__(self) -> str:
        return f"Flow({', '.join(f'{n} {tuple(v.shape)}' for n, v in self.values.items())})"

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page with a table of colours for each row.

        Args:
            path: where to write the page as well, complete or not at all.

        Raises:
            OSError: the directory of ``path`` does not exist or cannot be written.
        """
        page = heatmap.html_document(self.matrices, "Relevance by layer and token")
        if path is not None:
            write_atomically(path, page)
        return page

    def figure(self) -> Figure:
        """A matplotlib Figure, 8 inches wide and as high as it needs to be.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return heatmap.figure(self.matrices)

    def _repr_html_(self) -> str:
        return heatmap.html_fragment(self.matrices)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colours = None if console.no_color else console.color_system
        yield from heatmap.terminal(
            self.matrices, colours, ascii_only=options.ascii_only, width=options.max_width
        )


def flow_of(
    sections: Sequence[heatmap.Section], lengths: Mapping[str, int], latents: Sequence[Latent]
) -> Flow:
    """The flow of an explanation's relevance through some of its latent values.

    Values whose positions are those of no token input are left out.

    Args:
        sections: what the explanation shows, one a row.
        lengths: of its token inputs, padding included.
        latents: in the order in which they are drawn.

    Raises:
        InputError: no value is left.
    """
    found = {latent.name: _placed(latent, lengths) for latent in latents}
    values = {name: placed for name, placed in found.items() if placed is not None}
    if not values:
        raise InputError(
            "no latent value has the positions of a token input",
            why=f"there are: {', '.join(found) or 'none'}",
            remedy='compile with latent=["residual"]',
        )
    rows = enumerate(sections)
    matrices = tuple(m for row, section in rows for m in _matrices(section, row, values))
    return Flow({name: table for name, (_, table) in values.items()}, matrices)


def _placed(latent: Latent, lengths: Mapping[str, int]) -> tuple[str, Tensor] | None:
    """The token input whose positions a latent value has, and its relevance there."""
    table = latent.unit_relevance.sum(-1)
    if latent.positions is not None and lengths:
        name, length = next(iter(lengths.items()))
        whole = table.new_zeros(len(table), length)
        return name, whole.scatter_add(1, latent.positions, table)
    fitting = [name for name, length in lengths.items() if length == table.shape[1]]
    return (fitting[0], table) if fitting and len(table) == latent.batch else None


def _matrices(
    section: heatmap.Section, row: int, values: Mapping[str, tuple[str, Tensor]]
) -> Iterator[heatmap.Matrix]:
    """A table for each token input that a latent value has the positions of."""
    for strip in section.strips:
        lines = {n: table[row] for n, (owner, table) in values.items() if owner == strip.name}
        tables = [
            heatmap.Section(section.title, section.value, (_line(strip, table),))
            for table in lines.values()
        ]
        if tables:
            yield heatmap.Matrix(_shortened([*lines]), tuple(tables), section.heading)


def _shortened(names: Sequence[str]) -> tuple[str, ...]:
    """Names without the modules that all of them are in."""
    paths = [name.split(".") for name in names]
    shared = 0
    while all(len(path) > shared + 1 for path in paths) and len({p[shared] for p in paths}) == 1:
        shared += 1
    return tuple(".".join(path[shared:]) for path in paths)


def _line(strip: heatmap.TokenStrip, table: Tensor) -> heatmap.TokenStrip:
    """A strip of the same tokens with the relevance of a latent value."""
    positions = torch.tensor(strip.positions, dtype=torch.int64)
    return replace(strip, relevance=tuple(table.double().cpu()[positions].tolist()), hidden=0.0)
