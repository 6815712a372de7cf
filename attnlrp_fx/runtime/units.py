"""Ranking of units: the neurons, heads and experts that matter most for a target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnlrp_fx.errors import InputError
from attnlrp_fx.runtime.latent import Latent


class UnitRelevance(NamedTuple):
    """One unit of one latent value in one row, and its relevance."""

    site: str
    unit: int
    position: int | None
    """Where, if positions are ranked apart; else None, and the rest is summed over them."""
    relevance: float
    activation: float
    """The mean over positions, where they are not ranked apart."""


def top_units(
    latents: Sequence[Latent], k: int, each_position: bool = False
) -> list[list[UnitRelevance]]:
    """The k units of each row with the largest |relevance|, strongest first.

    Args:
        latents: where to look; of those whose leading dimension is no batch, nothing is ranked.
        k: how many; all that there are if there are fewer.
        each_position: whether a unit at every position counts by itself.

    Raises:
        InputError: k is less than 1, or there is nothing to rank.
    """
    if k < 1:
        raise InputError(f"k must be at least 1, not {k}")
    ranked = [latent for latent in latents if latent.unit_relevance.shape[0] == latent.batch]
    if not ranked:
        raise InputError(
            "there are no such units to rank",
            remedy='compile with latent=["mlp.neurons"], ["attention.heads"] or ["experts"]',
        )
    tables = [_tables(latent, each_position) for latent in ranked]
    rows = []
    for row in range(ranked[0].batch):
        found = []
        for latent, (relevance, activation) in zip(ranked, tables, strict=True):
            flat = relevance[row].flatten()
            finite = torch.where(flat.isfinite(), flat.abs(), -1.0)
            best = finite.topk(min(k, len(flat)))
            units = relevance.shape[-1]
            for index, magnitude in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                if magnitude >= 0:
                    held = None if latent.positions is None else int(latent.positions[row, 0])
                    position = (held or 0) + index // units if each_position else None
                    numbers = float(flat[index]), float(activation[row].flatten()[index])
                    found.append(UnitRelevance(latent.name, index % units, position, *numbers))
        rows.append(sorted(found, key=lambda unit: -abs(unit.relevance))[:k])
    return rows


def _tables(latent: Latent, each_position: bool) -> tuple[Tensor, Tensor]:
    """(batch, positions or 1, units) of relevance and activation."""
    relevance, activation = latent.unit_relevance, latent.unit_activation
    if each_position:
        return relevance, activation
    return relevance.sum(1, keepdim=True), activation.mean(1, keepdim=True)
