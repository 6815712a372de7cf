"""The result of explaining a batch: numbers first, pictures of them on request.

An explanation holds tensors as they came out of the program, padding included. Everything made for
reading (`top`, `to_dict`, `to_pandas`, the pictures) leaves padding out, and says so where padding
holds relevance. A token input is one whose elements index a table: it has tokens or a mask, or it
is not floating. A float input has relevance in its own shape; one of shape (batch, 1, 3 or 4
channels, height, width) is a batch of images, and its relevance is drawn on them.

An input whose leading size is not the batch's (the patches of all images in one tensor, say)
belongs to no single row; it is reported once, after the rows, unless the batch has only one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from torch import Tensor
from torch.utils import _pytree as pytree

from attnlrp_fx import heatmap
from attnlrp_fx.errors import InputError, MissingExtraError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.heatmap.spelling import Spelling, spelling_of
from attnlrp_fx.runtime.flow import Flow, flow_of
from attnlrp_fx.runtime.latent import Latents
from attnlrp_fx.runtime.units import UnitRelevance, top_units

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

SCHEMA = "attnlrp_fx.explanation/1"


class TokenRelevance(NamedTuple):
    """One token of one row and its relevance."""

    input: str
    position: int
    token: str
    relevance: float


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Explanation:
    """Relevance of a batch's inputs for one target a row.

    Raises:
        InputError: shapes of relevance, tokens, mask, labels and target values do not agree.
    """

    relevance: dict[str, Tensor]
    """By input name, floating: (batch, sequence) for tokens, the input's own shape otherwise."""
    outputs: Any
    """What the model returned, unchanged."""
    target_value: Tensor
    """(batch,): the explained value of each row."""
    target: str
    """What was explained, in words, for the batch as a whole."""
    inputs: dict[str, Tensor]
    """What the model was given, by name."""
    tokens: dict[str, list[list[str]]] | None = None
    """By token input: the vocabulary's spelling of each token, padding included."""
    mask: dict[str, Tensor] | None = None
    """By token input, (batch, sequence): nonzero for tokens, 0 for padding. Absent: no padding."""
    ledger: Any | None = None
    """Where relevance went on its way, if it was kept; prints by itself."""
    labels: list[str] | None = None
    """What was explained in each row, as text, where it is known."""
    target_index: Tensor | None = None
    """(batch,) int64: the class or token that was explained in each row, where there is one."""
    normalisation: heatmap.Normalisation | None = None
    """What to undo to show an image as it was; None: it is stretched to be seen."""
    latent: Latents = field(default_factory=Latents)
    """By name, the latent values that were asked for, with activation and relevance."""

    def __post_init__(self) -> None:
        if self.target_value.dim() != 1:
            raise InputError(
                f"target_value has shape {tuple(self.target_value.shape)}; it must be (batch,)."
            )
        batch = len(self)
        if self.labels is not None and len(self.labels) != batch:
            raise InputError(f"{len(self.labels)} labels for a batch of {batch}.")
        for name, relevance in self.relevance.items():
            if not relevance.is_floating_point():
                raise InputError(f"Relevance of {name!r} is {relevance.dtype}, not floating.")
            if self._is_tokens(name):
                self._check_tokens(name, relevance)

    def _check_tokens(self, name: str, relevance: Tensor) -> None:
        shape = tuple(relevance.shape)
        if len(shape) != 2 or shape[0] != len(self):
            raise InputError(
                f"Relevance of the tokens {name!r} has shape {shape}; "
                f"it must be ({len(self)}, sequence)."
            )
        mask = (self.mask or {}).get(name)
        if mask is not None and tuple(mask.shape) != shape:
            raise InputError(f"The mask of {name!r} has shape {tuple(mask.shape)}, not {shape}.")
        ids = self.inputs.get(name)
        if ids is not None and tuple(ids.shape) != shape:
            raise InputError(f"The input {name!r} has shape {tuple(ids.shape)}, not {shape}.")
        tokens = (self.tokens or {}).get(name)
        if tokens is not None and [len(row) for row in tokens] != [shape[1]] * shape[0]:
            raise InputError(
                f"The tokens of {name!r} number {[len(row) for row in tokens]}; "
                f"each of {shape[0]} rows must have {shape[1]}."
            )

    def __len__(self) -> int:
        """Rows in the batch."""
        return self.target_value.shape[0]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(r.shape)}" for name, r in self.relevance.items())
        return f"Explanation(target={self.target!r}, batch={len(self)}, relevance: {shapes})"

    def has_images(self, name: str) -> bool:
        """Whether the relevance of an input is that of images, one a row."""
        given = self.inputs.get(name)
        return (
            given is not None
            and heatmap.is_image(given)
            and given.shape == self.relevance[name].shape
            and len(given) == len(self)
            and not given.is_meta
        )

    def detach(self) -> Explanation:
        """The same without gradients, to keep while training goes on."""
        return replace(
            self,
            relevance={name: value.detach() for name, value in self.relevance.items()},
            outputs=pytree.tree_map_only(Tensor, Tensor.detach, self.outputs),
            target_value=self.target_value.detach(),
        )

    def row(self, index: int, lengths: Mapping[str, int] | None = None) -> Explanation:
        """One row as an explanation of its own, without the padding on its right.

        Args:
            index: which row; negative counts from the last.
            lengths: by input, how many positions (of its second dimension) are the row's own; None:
                of tokens, and of what stands beside them, those up to the last that the mask does
                not exclude.

        Returns:
            A copy. Of the outputs it has the row of each tensor that has one for each, padding
            kept. What belongs to no single row, as the ledger, it has if the batch is but one row.

        Raises:
            InputError: there is no such row.
        """
        batch = len(self)
        if not -batch <= index < batch:
            raise InputError(f"there is no row {index}", why=f"the batch has {batch}")
        index %= batch
        own = self._lengths(index) if lengths is None else lengths

        def cut(value: Tensor, length: int | None = None) -> Tensor:
            if not (value.dim() and value.shape[0] == batch):
                return value
            one = value[index : index + 1]
            return (one if length is None else one[:, :length]).clone()

        def cut_all(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            rows = {n: v for n, v in values.items() if batch == 1 or self._has_rows(v)}
            return {name: cut(value, own.get(name)) for name, value in rows.items()}

        return replace(
            self,
            relevance=cut_all(self.relevance),
            outputs=pytree.tree_map_only(Tensor, cut, self.outputs),
            target_value=cut(self.target_value),
            inputs=cut_all(self.inputs),
            tokens=self.tokens and {n: [t[index][: own.get(n)]] for n, t in self.tokens.items()},
            mask=self.mask and cut_all(self.mask),
            ledger=self.ledger if batch == 1 else None,
            labels=self.labels and [self.labels[index]],
            target_index=None if self.target_index is None else cut(self.target_index),
            latent=self.latent.row(index, self._lengths_by_size(own)),
        )

    def _lengths_by_size(self, own: Mapping[str, int]) -> dict[int, int]:
        """How many positions are a row's own, by how many there are; the most, if unlike."""
        found: dict[int, int] = {}
        for name, length in own.items():
            if name in self.inputs and self.inputs[name].dim() > 1:
                size = self.inputs[name].shape[1]
                found[size] = max(length, found.get(size, 0))
        return found

    def _lengths(self, index: int) -> dict[str, int]:
        """By input of tokens and what stands beside them, where padding begins in a row."""
        found: dict[str, int] = {}
        for name, mask in (self.mask or {}).items():
            real = mask[index].nonzero()
            end = int(real.max()) + 1 if len(real) else mask.shape[1]
            decoding = name.startswith("decoder_")
            beside = (n for n, v in self.inputs.items() if v.shape[:2] == mask.shape)
            found |= {n: end for n in (name, *beside) if n.startswith("decoder_") is decoding}
        return found

    # As data

    def top(self, k: int, input: str | None = None) -> list[list[TokenRelevance]]:
        """The ``k`` tokens of each row with the largest |relevance|, strongest first.

        Args:
            k: how many; a shorter row gives all it has.
            input: name of one token input; by default those of all are ranked together.

        Returns:
            A list a row. The sign of relevance is kept; what is not finite has no rank and is
            left out.

        Raises:
            InputError: ``k`` is less than 1, or ``input`` names no token input.
        """
        if k < 1:
            raise InputError(f"top needs k of at least 1, not {k}.")
        known = [name for name in self.relevance if self._is_tokens(name)]
        if input is not None and input not in known:
            raise InputError(
                f"{input!r} is not a token input of this explanation.",
                remedy=f"choose one of {known}" if known else "there are none; read relevance",
            )
        rows = []
        for row in range(len(self)):
            found = [
                TokenRelevance(strip.name, position, token, relevance)
                for strip in self._strips(row)
                if input in (None, strip.name)
                for position, token, relevance in zip(
                    strip.positions, strip.tokens, strip.relevance, strict=True
                )
                if math.isfinite(relevance)
            ]
            rows.append(sorted(found, key=lambda entry: -abs(entry.relevance))[:k])
        return rows

    def top_neurons(self, k: int, each_position: bool = False) -> list[list[UnitRelevance]]:
        """The ``k`` neurons of each row with the largest |relevance|, of all layers together.

        Args:
            k: how many.
            each_position: whether a neuron counts at every position by itself, or summed.

        Raises:
            InputError: ``k`` is less than 1, or there are no neurons among the latent values.
        """
        return top_units(self.latent.of_unit("neuron"), k, each_position)

    def top_heads(self, k: int, each_position: bool = False) -> list[list[UnitRelevance]]:
        """The same of attention heads; `latent=["attention.heads"]`."""
        return top_units(self.latent.of_role("attention.heads"), k, each_position)

    def top_experts(self, k: int, each_position: bool = False) -> list[list[UnitRelevance]]:
        """The same of experts; `latent=["experts"]`."""
        return top_units(self.latent.of_role("experts"), k, each_position)

    def flow(self, role: str | None = None) -> Flow:
        """Relevance by layer and token: a line a latent value, a column a token.

        Args:
            role: which latent values; None: the residual stream, or all if it was not asked for.

        Raises:
            InputError: no latent value has the positions of a token input.
        """
        chosen = self.latent.of_role(role or "residual")
        every = list(self.latent.values()) if role is None else []
        lengths = {n: r.shape[1] for n, r in self.relevance.items() if self._is_tokens(n)}
        return flow_of(self.sections()[: len(self)], lengths, chosen or every)

    def to_dict(self) -> dict[str, Any]:
        """The explanation as lists, strings and floats; ``outputs`` and the ledger are left out.

        Returns:
            ::

                {"schema": "attnlrp_fx.explanation/1",
                 "target": str,
                 "rows": [{"label": str or None,
                           "target_value": float,
                           "relevance_sum": float,      # over what is listed here
                           "inputs": {name: INPUT}}],
                 "batch_inputs": {name: INPUT}}         # what belongs to no single row

            INPUT of tokens, padding left out, lists of one length::

                {"kind": "tokens", "positions": [int], "ids": [int] or None,
                 "tokens": [str] or None, "relevance": [float]}

            INPUT of floats::

                {"kind": "values", "shape": [int], "relevance": nested lists}

            A number that is not finite is None, since JSON has none.
        """
        rows = []
        for row in range(len(self)):
            section = self._section(row)
            inputs = {strip.name: self._token_dict(row, strip) for strip in section.strips}
            inputs |= {grid.name: _value_dict(grid) for grid in section.grids}
            rows.append(
                {
                    "label": self.labels[row] if self.labels else None,
                    "target_value": _plain(section.value),
                    "relevance_sum": _plain(section.total),
                    "inputs": inputs,
                }
            )
        return {
            "schema": SCHEMA,
            "target": self.target,
            "rows": rows,
            "batch_inputs": {grid.name: _value_dict(grid) for grid in self._batch_grids()},
        }

    def _token_dict(self, row: int, strip: heatmap.TokenStrip) -> dict[str, Any]:
        ids = self.inputs[strip.name][row].tolist() if strip.name in self.inputs else None
        return {
            "kind": "tokens",
            "positions": list(strip.positions),
            "ids": [ids[position] for position in strip.positions] if ids is not None else None,
            "tokens": list(strip.tokens) if strip.name in (self.tokens or {}) else None,
            "relevance": _plain(list(strip.relevance)),
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to ``path`` as UTF-8 JSON.

        The file is complete or untouched, whatever happens in between.

        Raises:
            OSError: the directory does not exist or cannot be written.
        """
        write_atomically(path, json.dumps(self.to_dict(), allow_nan=False) + "\n")

    def to_pandas(self) -> pd.DataFrame:
        """Relevance in long form, a line a token or a float.

        Returns:
            Columns ``row`` (missing for what belongs to no single row), ``input``, ``position``
            and ``token`` (of tokens), ``relevance``, and, if there are float inputs, their indices
            ``index_0``, ``index_1``, … within the row. Padding is left out.

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

        parts = [
            pd.DataFrame(
                {
                    "row": row,
                    "input": strip.name,
                    "position": strip.positions,
                    "token": strip.tokens,
                    "relevance": strip.relevance,
                }
            )
            for row in range(len(self))
            for strip in self._strips(row)
        ]
        grids: list[tuple[int | None, heatmap.Grid]] = []
        grids += [(row, grid) for row in range(len(self)) for grid in self._grids(row)]
        grids += [(None, grid) for grid in self._batch_grids()]
        for row, grid in grids:
            values = grid.relevance.double().cpu()
            indices = values.new_ones(values.shape).nonzero().unbind(1)
            parts.append(
                pd.DataFrame(
                    {"row": row, "input": grid.name, "relevance": values.flatten().tolist()}
                    | {f"index_{axis}": index.tolist() for axis, index in enumerate(indices)}
                )
            )
        columns = ["row", "input", "position", "token", "relevance"]
        axes = max((values.relevance.dim() for _, values in grids), default=0)
        columns += [f"index_{axis}" for axis in range(axes)]
        table = pd.concat(parts, ignore_index=True).reindex(columns=columns)
        whole = {name: "Int64" for name in columns if name.startswith(("row", "pos", "index"))}
        return table.astype(whole)

    # As pictures

    def to_html(
        self, path: str | Path | None = None, display: heatmap.Display = heatmap.PLAIN
    ) -> str:
        """A self-contained page: no script, no network; light and dark; printable.

        Args:
            path: where to write the page as well, complete or not at all.
            display: how images are drawn.

        Raises:
            OSError: the directory of ``path`` does not exist or cannot be written.
        """
        title = f"Relevance for {self.target}"
        page = heatmap.html_document(self.sections(), title, display)
        if path is not None:
            write_atomically(path, page)
        return page

    def figure(self, display: heatmap.Display = heatmap.PLAIN) -> Figure:
        """A matplotlib Figure, 8 inches wide and as high as it needs to be.

        Args:
            display: how images are drawn.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return heatmap.figure(self.sections(), display)

    def _repr_html_(self) -> str:
        return heatmap.html_fragment(self.sections())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colours = None if console.no_color else console.color_system
        yield from heatmap.terminal(
            self.sections(), colours, ascii_only=options.ascii_only, width=options.max_width
        )

    # From tensors to what is drawn

    def _is_tokens(self, name: str) -> bool:
        given = self.inputs.get(name)
        indexes = (
            given is not None
            and not given.is_floating_point()
            and given.dim() == 2
            and given.shape[0] == len(self)
        )
        return indexes or name in (self.tokens or {}) or name in (self.mask or {})

    def _has_rows(self, relevance: Tensor) -> bool:
        return relevance.dim() > 0 and relevance.shape[0] == len(self)

    def sections(self) -> list[heatmap.Section]:
        """What the pictures show, a section a row."""
        sections = [self._section(row) for row in range(len(self))]
        shared = tuple(self._batch_grids())
        return [*sections, heatmap.Section("All rows", None, grids=shared)] if shared else sections

    def _section(self, row: int) -> heatmap.Section:
        title = self.target
        if self.labels and f"'{self.labels[row]}'" not in title:
            title = f"{title}: {self.labels[row]}"
        return heatmap.Section(
            title,
            float(self.target_value[row].detach()),
            tuple(self._strips(row)),
            tuple(self._grids(row)),
            row if len(self) > 1 else None,
        )

    def _strips(self, row: int) -> Iterator[heatmap.TokenStrip]:
        for name, values in self.relevance.items():
            if not self._is_tokens(name):
                continue
            relevance = values[row].detach().double().cpu().tolist()
            mask = (self.mask or {}).get(name)
            real = mask[row].bool().tolist() if mask is not None else [True] * len(relevance)
            positions = tuple(i for i, keep in enumerate(real) if keep)
            tokens, spelling = self._spelled(name)
            yield heatmap.TokenStrip(
                name,
                tuple(tokens[row][i] for i in positions),
                positions,
                tuple(relevance[i] for i in positions),
                spelling,
                hidden=sum(r for r, keep in zip(relevance, real, strict=True) if not keep),
            )

    def _spelled(self, name: str) -> tuple[list[list[str]], Spelling]:
        """Tokens and their spelling; without a tokenizer the ids, or the positions, stand alone."""
        tokens = (self.tokens or {}).get(name)
        if tokens is not None:
            return tokens, spelling_of(token for row in tokens for token in row)
        ids = self.inputs.get(name)
        if ids is not None:
            return [[str(i) for i in row] for row in ids.tolist()], "word"
        rows, length = self.relevance[name].shape
        return [[f"[{i}]" for i in range(length)] for _ in range(rows)], "word"

    def _grids(self, row: int) -> Iterator[heatmap.Grid]:
        for name, values in self._float_relevance():
            if self._has_rows(values):
                yield heatmap.Grid(name, values[row], self._backdrop(name, row))
            elif len(self) == 1:
                yield heatmap.Grid(name, values)

    def _backdrop(self, name: str, row: int) -> heatmap.Backdrop | None:
        """The image that relevance is of, None if it is of none."""
        if not self.has_images(name):
            return None
        return heatmap.backdrop(self.inputs[name][row], self.normalisation)

    def _batch_grids(self) -> Iterator[heatmap.Grid]:
        for name, values in self._float_relevance():
            if len(self) != 1 and not self._has_rows(values):
                yield heatmap.Grid(name, values)

    def _float_relevance(self) -> Iterator[tuple[str, Tensor]]:
        for name, values in self.relevance.items():
            if not self._is_tokens(name):
                yield name, values.detach()


def _plain(value: Any) -> Any:
    """Numbers in nested lists, with None for what is not finite."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if value is not None and math.isfinite(value) else None


def _value_dict(grid: heatmap.Grid) -> dict[str, Any]:
    values = grid.relevance.double().cpu()
    return {
        "kind": "values",
        "shape": list(values.shape),
        "relevance": _plain(values.tolist()),
    }
