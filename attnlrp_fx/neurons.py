"""Neurons as targets: one number of a latent value, explained like a logit."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlrp_fx.errors import TargetError
from attnlrp_fx.graph.sites import Site, near
from attnlrp_fx.targets import Chosen, Index, Outputs, Seed, checked_index, last_real

LATENT = "latent:"
"""How the names of latent values begin where seeds name outputs."""


@dataclass(frozen=True)
class Neuron:
    """One number of a latent value: a neuron's activation, a router's score, a feature of a head.

    Args:
        site: name of a latent value that the model was compiled with.
        unit: which neuron, head, expert or feature; one for all rows, or one per row.
        position: where in the sequence, one or one per row; None: the last position that the
            attention mask does not exclude.
        feature: which number of a unit that has several, as a head has; of attention weights, the
            key.

    Another site compiles a program more, another unit or position does not.

    Example:
        >>> from attnlrp_fx import Neuron
        >>> Neuron("model.layers.0.mlp.act_fn", 17)
        Neuron(site='model.layers.0.mlp.act_fn', unit=17, position=None, feature=None)
    """

    site: str
    unit: Index
    position: Index = None
    feature: Index = None

    def choose(self, outputs: Outputs) -> Chosen:
        """The activations, float32 or better."""
        if self.site not in outputs.latent:
            raise TargetError(
                f"there is no latent value '{self.site}' to explain",
                remedy=f"near it are: {near(self.site, outputs.latent)}"
                if outputs.latent
                else "compile with latent=[...]",
            )
        value, site = outputs.latent[self.site]
        index = _Indexing(value, site, outputs).index(self)
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        batch = index.shape[0]
        seeds = torch.zeros_like(wide).reshape(batch, -1).scatter_(1, index[:, None], 1.0)
        seeds = seeds.reshape(value.shape[0], -1)
        return Chosen(
            wide.reshape(batch, -1).gather(1, index[:, None])[:, 0],
            seeds=(Seed(LATENT + self.site, None, seeds),),
        )

    def __str__(self) -> str:
        return f"unit of {self.site}"


@dataclass(frozen=True)
class _Indexing:
    """Finds a neuron in a value, each row's elements in one line."""

    value: Tensor
    site: Site
    outputs: Outputs

    def index(self, neuron: Neuron) -> Tensor:
        """(batch,) int64: the place of one element in each row."""
        site = self.site
        if site.dims[0] not in ("batch", "token") or "slot" in site.dims:
            raise TargetError(
                f"'{site.name}' has no units that belong to a row of the batch",
                why=f"its dimensions are {site.dims}",
            )
        sizes, names = list(self.value.shape), list(site.dims)
        batch = sizes[0]
        if names[0] == "token":
            batch = self._batch()
            sizes[0], names = sizes[0] // batch, ["batch", "position", *names[1:]]
            sizes.insert(0, batch)
        found = torch.zeros(batch, dtype=torch.int64, device=self.value.device)
        places = [d for d, name in enumerate(names) if name in ("position", "query")]
        position = self._position(neuron.position, batch, sizes, places)
        for d in range(1, len(names)):
            if d in places:
                behind = math.prod(sizes[e] for e in places if e > d)
                part = position // behind % sizes[d]
            elif names[d] == self.site.dims[self.site.unit]:
                part = self._checked(neuron.unit, batch, sizes[d], names[d])
            else:
                part = self._checked(neuron.feature, batch, sizes[d], names[d])
            found = found * sizes[d] + part
        return found

    def _batch(self) -> int:
        named = [*self.outputs.masks.values(), *self.outputs.named.values()]
        return named[0].shape[0] if named else 1

    def _position(self, position: Index, batch: int, sizes: list[int], places: list[int]) -> Tensor:
        count = math.prod(sizes[d] for d in places)
        if position is None:
            return last_real(batch, count, self.outputs, self.value.device)
        if not places:
            raise TargetError(
                f"'{self.site.name}' has no positions", why=f"its dimensions are {self.site.dims}"
            )
        return checked_index(position, batch, count, "position", self.value.device)

    def _checked(self, index: Index, batch: int, size: int, name: str) -> Tensor:
        if index is None:
            raise TargetError(
                f"which {name} of '{self.site.name}'?",
                why=f"a target is one number, and there are {size}",
                remedy="name unit, and feature where a unit has several numbers",
            )
        return checked_index(index, batch, size, name, self.value.device)
