"""One batch explained for several targets: a sequence of explanations, and their stacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor

from attnlrp_fx import heatmap
from attnlrp_fx.errors import InputError, MissingExtraError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.runtime.explanation import Explanation

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Explanations(Sequence[Explanation]):
    """Relevance of a batch's inputs for M targets a row.

    A sequence of M explanations of the same batch, in the order of the targets.

    Raises:
        InputError: there is none.
    """

    items: tuple[Explanation, ...]

    def __post_init__(self) -> None:
        if not self.items:
            raise InputError("there is no target to explain", remedy="pass at least one")

    @property
    def relevance(self) -> dict[str, Tensor]:
        """By input name, floating: (batch, M, ...), the targets in the second dimension."""
        names = self.items[0].relevance
        return {n: torch.stack([one.relevance[n] for one in self.items], 1) for n in names}

    @property
    def target_value(self) -> Tensor:
        """(batch, M): the explained values."""
        return torch.stack([one.target_value for one in self.items], 1)

    @property
    def target_index(self) -> Tensor | None:
        """(batch, M) int64: the classes or tokens explained; None if one target has none."""
        found = [one.target_index for one in self.items if one.target_index is not None]
        return torch.stack(found, 1) if len(found) == len(self.items) else None

    @property
    def outputs(self) -> Any:
        """What the model returned; None where no single call returned it all."""
        return self.items[0].outputs

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model was given, by name."""
        return self.items[0].inputs

    @overload
    def __getitem__(self, index: int) -> Explanation: ...
    @overload
    def __getitem__(self, index: slice) -> Explanations: ...
    def __getitem__(self, index: int | slice) -> Explanation | Explanations:
        """One target's explanation, or those of some targets."""
        return Explanations(self.items[index]) if isinstance(index, slice) else self.items[index]

    def __iter__(self) -> Iterator[Explanation]:
        return iter(self.items)

    def __len__(self) -> int:
        """M: how many targets."""
        return len(self.items)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(r.shape)}" for name, r in self.relevance.items())
        return f"Explanations(targets={len(self)}, relevance: {shapes})"

    def to_pandas(self) -> pd.DataFrame:
        """`Explanation.to_pandas` of each, with a first column ``target``: its number.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError(
                "A table of relevance needs pandas.",
                why=str(error),
                remedy="pip install 'attnlrp_fx[pandas]'",
            ) from error
        tables = [one.to_pandas() for one in self.items]
        for number, table in enumerate(tables):
            table.insert(0, "target", number)
        return pd.concat(tables, ignore_index=True)

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page with every target's heat map.

        Args:
            path: where to write the page as well, complete or not at all.

        Raises:
            OSError: the directory of ``path`` does not exist or cannot be written.
        """
        page = heatmap.html_document(self._sections(), f"Relevance for {len(self)} targets")
        if path is not None:
            write_atomically(path, page)
        return page

    def matrix_html(self, path: str | Path | None = None) -> str:
        """A self-contained page with tables of colours: a line a target, a column a token.

        Args:
            path: where to write the page as well, complete or not at all.

        Raises:
            InputError: no explained input is one of tokens.
            OSError: the directory of ``path`` does not exist or cannot be written.
        """
        by_row = list(zip(*(one.sections() for one in self.items), strict=True))
        if not by_row[0][0].strips:
            raise InputError("there are no tokens to make a table of", remedy="use to_html")
        matrices = []
        for row, sections in enumerate(by_row[: len(self.items[0])]):
            names = [one.labels[row] if one.labels else str(i) for i, one in enumerate(self.items)]
            matrices.append(heatmap.Matrix(tuple(names), sections))
        page = heatmap.html_document(matrices, f"Relevance for {len(self)} targets")
        if path is not None:
            write_atomically(path, page)
        return page

    def _repr_html_(self) -> str:
        return heatmap.html_fragment(self._sections())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colours = None if console.no_color else console.color_system
        yield from heatmap.terminal(
            self._sections(), colours, ascii_only=options.ascii_only, width=options.max_width
        )

    def _sections(self) -> list[heatmap.Section]:
        return [section for one in self.items for section in one.sections()]
