"""Conditions and interventions: what a call masks and changes of its latent values.

A condition keeps the relevance of some units of a site and masks that of all others, as in
concept-conditional explanations (CRP, Achtibat et al. 2023, arXiv 2206.03208); what flows around
the site, over a residual connection say, is not masked. An intervention changes the values
themselves, and so the outputs: y = f·x + s for some units, at some positions. Both are inputs of
the program; with f = 1, s = 0 and everything kept, it gives the plain explanation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.sites import Site, near
from attnlrp_fx.passes.mark_latents import EDITS
from attnlrp_fx.torch_private import typical_size

Units = int | Sequence[int] | None
"""Some units of a site; None: all."""
Positions = int | Sequence[int] | Tensor | None
"""Some positions, the same in every row, or a bool tensor (batch, positions); None: all."""


@dataclass(frozen=True)
class Keep:
    """A condition: the relevance of these units, at these positions, and of no others."""

    units: Units = None
    positions: Positions = None


@dataclass(frozen=True)
class Ablate:
    """An intervention: these units are zero."""

    units: Units = None
    positions: Positions = None

    def affine(self) -> tuple[float | Tensor, float | Tensor]:
        """The factor and the summand, for all units or for each."""
        return 0.0, 0.0


@dataclass(frozen=True)
class Scale:
    """An intervention: these units are multiplied by a factor, one for all or one each."""

    factor: float | Tensor
    units: Units = None
    positions: Positions = None

    def affine(self) -> tuple[float | Tensor, float | Tensor]:
        """The factor and the summand, for all units or for each."""
        return self.factor, 0.0


@dataclass(frozen=True)
class Clamp:
    """An intervention: these units have a value, one for all or one each."""

    value: float | Tensor
    units: Units = None
    positions: Positions = None

    def affine(self) -> tuple[float | Tensor, float | Tensor]:
        """The factor and the summand, for all units or for each."""
        return 0.0, self.value


Intervention = Ablate | Scale | Clamp
Conditions = Mapping[str, "Keep | int | Sequence[int]"]
"""By site what to keep: some units, or a `Keep`."""
Interventions = Mapping[str, Intervention]


class Editing:
    """The inputs of a rewritten graph that edit its latent values.

    Args:
        rewritten: the rewritten graph.
    """

    def __init__(self, rewritten: fx.GraphModule) -> None:
        self._inputs: dict[str, tuple[Site, str, Tensor]] = {
            str(node.target): (*node.meta[EDITS], node.meta["val"])
            for node in rewritten.graph.find_nodes(op="placeholder")
            if EDITS in node.meta
        }
        self._sites = {site.name: site for site, _, _ in self._inputs.values()}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of these inputs."""
        return tuple(self._inputs)

    def given(
        self,
        sizes: Mapping[str, int],
        device: torch.device,
        batch: int,
        conditions: Conditions | None = None,
        interventions: Interventions | None = None,
    ) -> dict[str, Tensor]:
        """The inputs for some conditions and interventions.

        Args:
            sizes: of the call's inputs, by symbol.
            device: where the program runs.
            batch: how many rows there are.
            conditions: by site.
            interventions: by site.

        Raises:
            InputError: there is no such editable site, unit or position.
        """
        kept, changed = dict(conditions or {}), dict(interventions or {})
        for name in (*kept, *changed):
            self._check(name)
        found = {}
        for name, (site, part, like) in self._inputs.items():
            shape = [int(typical_size(size, 1, sizes)) for size in like.shape]
            value = torch.ones(shape, dtype=like.dtype)
            if part == "units":
                value[1] = 0
                _write_units(value, site, kept.get(site.name), changed.get(site.name))
            else:
                if changed.get(site.name) is not None:
                    value[0] = _places(changed[site.name].positions, value[0], site, batch)
                if kept.get(site.name) is not None:
                    value[1] = _places(_as_keep(kept[site.name]).positions, value[1], site, batch)
            found[name] = value.to(device)
        return found

    def _check(self, name: str) -> None:
        if name not in self._sites:
            raise InputError(
                f"there is no editable latent value '{name}'",
                why="" if self._sites else "nothing was compiled to be edited",
                remedy=f"near it are: {near(name, self._sites)}"
                if self._sites
                else "compile with latent=[...] and editable=True",
            )


def _write_units(value: Tensor, site: Site, kept: Any, changed: Intervention | None) -> None:
    """Fill (3, units): factor, summand, share of relevance."""
    if changed is not None:
        rows = _units(changed.units, site)
        for row, number in enumerate(changed.affine()):
            value[row, rows] = torch.as_tensor(number, dtype=value.dtype).cpu()
    if kept is not None:
        value[2] = 0
        value[2, _units(_as_keep(kept).units, site)] = 1


def _as_keep(kept: Any) -> Keep:
    return kept if isinstance(kept, Keep) else Keep(kept)


def _units(units: Units, site: Site) -> list[int]:
    assert site.units is not None
    chosen = range(site.units) if units is None else [units] if isinstance(units, int) else units
    numbers = [int(unit) for unit in chosen]
    for unit in numbers:
        if not -site.units <= unit < site.units:
            raise InputError(
                f"'{site.name}' has no {site.dims[site.unit]} {unit}",
                why=f"it has {site.units}",
            )
    return [unit % site.units for unit in numbers]


def _places(positions: Positions, like: Tensor, site: Site, batch: int) -> Tensor:
    """1 where something is meant, 0 elsewhere, in the shape of places."""
    if positions is None:
        return torch.ones_like(like)
    if site.dims[0] not in ("batch", "token"):
        raise InputError(f"'{site.name}' has no positions", why=f"its dimensions are {site.dims}")
    rows = torch.zeros(batch, like.numel() // batch, dtype=like.dtype)
    length = rows.shape[1]
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.numel() not in (length, rows.numel()):
            raise InputError(
                f"positions at '{site.name}' have shape {tuple(positions.shape)}",
                why=f"the value has {length} positions in each of {batch} rows",
                remedy="pass (batch, positions)",
            )
        return (rows + positions.reshape(-1, length).to(rows)).reshape(like.shape)
    for position in [positions] if isinstance(positions, int) else list(map(int, positions)):
        if not -length <= position < length:
            raise InputError(f"'{site.name}' has no position {position}", why=f"it has {length}")
        rows[:, position] = 1
    return rows.reshape(like.shape)
