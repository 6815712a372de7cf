"""Latent values: what the model computed on its way, and the relevance of it.

A latent value has the layout that the model gives it; `dims` says what each dimension is. Of a
batch of padded rows it holds what is computed for padding too, whose relevance is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.sites import Site, near
from attnlrp_fx.passes.mark_latents import SITE, markers_of
from attnlrp_fx.passes.return_latents import RETURNED

POSITIONS = ("position", "query")
"""Dimensions that are places of a sequence or of an image."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Latent:
    """One latent value of a batch: what it was, and its relevance for the target."""

    name: str
    """The path of the module that gave it, the node that it is, or what the user asked for."""
    role: str
    """The role by which it was asked for, or "module", "input" or "node"."""
    dims: tuple[str, ...]
    """The meaning of each dimension, see `attnlrp_fx.graph.sites`."""
    activation: Tensor
    """The value as the model went on with it: after an intervention, if there was one."""
    relevance: Tensor
    """R = x·c + r in the same layout, float32 or better; where a condition masks it, zero."""
    units: int
    """How many units it has."""
    batch: int
    """How many rows the batch has."""
    positions: Tensor | None = None
    """(batch, positions) int64: the places of the sequence that it holds; None: all."""
    chosen: Tensor | None = None
    """(token, slot) int64: of chosen experts, which one each slot holds."""

    def __repr__(self) -> str:
        shape = ", ".join(f"{d} {n}" for d, n in zip(self.dims, self.activation.shape, strict=True))
        return f"Latent({self.name!r}, role={self.role!r}, {shape})"

    @property
    def unit(self) -> str:
        """What its units are: "neuron", "head", "expert", "channel" or "feature"."""
        name = self.dims[self._site.unit]
        return "expert" if name == "slot" else name

    @property
    def unit_relevance(self) -> Tensor:
        """(batch, positions, units): relevance, summed over what belongs to a unit (features of a
        head or an expert, the keys of a query). What belongs to no row of the batch makes one."""
        return self._by_unit(self.relevance).sum(-1)

    @property
    def unit_activation(self) -> Tensor:
        """(batch, positions, units): activation; of units with several features, their norm."""
        table = self._by_unit(self.activation)
        return table[..., 0] if table.shape[-1] == 1 else table.norm(dim=-1)

    def row(self, index: int, lengths: Mapping[int, int] | None = None) -> Latent | None:
        """One row of the batch; None if it has no rows.

        Args:
            index: which row.
            lengths: of sequences of some size, how many positions are the row's own.
        """
        if self.dims[0] == "row" and self.batch > 1:
            return None
        own, is_sequence = lengths or {}, self.dims.count("position") <= 1

        def cut(value: Tensor) -> Tensor:
            if self.dims[0] == "token":
                rows = value.reshape(self.batch, -1, *value.shape[1:])
                return rows[index, : own.get(rows.shape[1])].clone()
            value = value[index : index + 1] if self.dims[0] == "batch" else value
            for dim, name in enumerate(self.dims[: value.dim()]):
                if name in (*POSITIONS, "key") and self.positions is None and is_sequence:
                    size = value.shape[dim]
                    value = value.narrow(dim, 0, own.get(size, size))
            return value.clone()

        return replace(
            self,
            activation=cut(self.activation),
            relevance=cut(self.relevance),
            batch=1,
            positions=None if self.positions is None else self.positions[index : index + 1],
            chosen=None if self.chosen is None else cut(self.chosen),
        )

    @property
    def _site(self) -> Site:
        return Site(self.name, self.role, self.dims, self.units)

    def _by_unit(self, value: Tensor) -> Tensor:
        """(batch, positions, units, rest)."""
        unit = self._site.unit
        places = [d for d, name in enumerate(self.dims) if name in POSITIONS]
        lead = [] if unit == 0 else [0]
        rest = [d for d in range(value.dim()) if d not in (unit, *places, *lead)]
        table = value.permute(*lead, *places, unit, *rest)
        batch = self.batch if self.dims[0] in ("batch", "token") else 1
        table = table.reshape(batch, -1, value.shape[unit], max(1, _product(value.shape, rest)))
        return table if self.chosen is None else self._by_expert(table)

    def _by_expert(self, table: Tensor) -> Tensor:
        """From (batch, positions, slots, rest) to (batch, positions, experts, rest)."""
        assert self.chosen is not None
        index = self.chosen.reshape(*table.shape[:3], 1).expand_as(table)
        found = table.new_zeros(*table.shape[:2], self.units, table.shape[-1])
        return found.scatter_add(2, index, table)


def _product(shape: Sequence[int], dims: Sequence[int]) -> int:
    count = 1
    for dim in dims:
        count *= shape[dim]
    return count


class Latents(Mapping[str, Latent]):
    """The latent values of an explanation by name, in the order of their computation."""

    def __init__(self, items: Sequence[Latent] = ()) -> None:
        self._items = {latent.name: latent for latent in items}

    def __getitem__(self, name: str) -> Latent:
        if name not in self._items:
            raise InputError(
                f"there is no latent value '{name}'",
                why=f"compiled with: {len(self._items)} of them"
                if self._items
                else "compiled without latent=[...]",
                remedy=f"near it are: {near(name, self._items)}"
                if self._items
                else "compile with latent=[...]",
            )
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"Latents({list(self._items)})"

    def of_role(self, role: str) -> list[Latent]:
        """Those that were asked for by a role, in order."""
        return [latent for latent in self.values() if latent.role == role]

    def of_unit(self, unit: str) -> list[Latent]:
        """Those whose units are "neuron", "head", "expert", "channel" or "feature", in order."""
        return [latent for latent in self.values() if latent.unit == unit]

    def row(self, index: int, lengths: Mapping[int, int] | None = None) -> Latents:
        """One row of the batch of each that has rows, see `Latent.row`."""
        rows = [latent.row(index, lengths) for latent in self.values()]
        return Latents([row for row in rows if row is not None])


@dataclass(frozen=True)
class LatentOutput:
    """Where a latent value is among the flat outputs of a rewritten graph."""

    site: Site
    marker: str
    """The name of the marker."""
    index: int
    chosen: int | None
    """Where the chosen experts are."""
    is_sliced: bool
    """Whether it holds the target's position alone."""


def latent_outputs(rewritten: fx.GraphModule, sliced: bool) -> tuple[LatentOutput, ...]:
    """The latent values that a rewritten graph returns."""
    found = []
    for marker in markers_of(rewritten.graph).values():
        site, (index, chosen) = marker.meta[SITE], marker.meta[RETURNED]
        sizes = marker.meta["val"].shape
        places = [sizes[d] for d, name in enumerate(site.dims) if name in POSITIONS]
        one = sliced and any(isinstance(size, int) and size == 1 for size in places)
        found.append(LatentOutput(site, marker.name, index, chosen, one))
    return tuple(found)


def read_latents(
    sites: Sequence[LatentOutput],
    flat: Sequence[Any],
    relevance: Mapping[str, Tensor],
    batch: int,
    positions: Tensor | None,
) -> Latents:
    """Latent values from what a program returned.

    Args:
        sites: where they are.
        flat: the flat outputs.
        relevance: by marker; what the target does not depend on is not there.
        batch: how many rows there are.
        positions: (batch,) int64: the target's position, where it is all that is computed.
    """
    found = []
    for one in sites:
        activation = flat[one.index]
        wide = torch.promote_types(activation.dtype, torch.float32)
        reached = relevance.get(one.marker)
        found.append(
            Latent(
                name=one.site.name,
                role=one.site.role,
                dims=one.site.dims,
                activation=activation,
                relevance=torch.zeros_like(activation, dtype=wide) if reached is None else reached,
                units=one.site.units or activation.shape[one.site.unit],
                batch=batch,
                positions=positions[:, None] if one.is_sliced and positions is not None else None,
                chosen=None if one.chosen is None else flat[one.chosen],
            )
        )
    return Latents(found)
