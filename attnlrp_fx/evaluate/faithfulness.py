"""Faithfulness: what happens to the target when the inputs that matter most, or least, are zero.

Perturbation curves as in Achtibat et al. 2024: the parts of an input (tokens, patches of an image)
are ranked by relevance and set to zero step by step, the most relevant first (MoRF) or the least
relevant first (LeRF), and the target's value is recorded at each step. An explanation is the better
the faster the value falls in the one order and the longer it lasts in the other: ΔA^F is the mean
of LeRF − MoRF over the steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnlrp_fx.errors import InputError
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.targets import Logit, Target, TargetLike, as_target


@dataclass(frozen=True)
class Curves:
    """The target's value of each row while an input is set to zero, part by part."""

    share: Tensor
    """(steps,): how much of the input is zero, from 0 to 1."""
    morf: Tensor
    """(batch, steps): the values, most relevant parts first."""
    lerf: Tensor
    """(batch, steps): the values, least relevant parts first."""

    @property
    def area(self) -> Tensor:
        """(batch,): ΔA^F, the mean of LeRF − MoRF over the steps."""
        return (self.lerf - self.morf).mean(1)


@dataclass(frozen=True)
class Perturbation:
    """How inputs are set to zero."""

    steps: int = 16
    """Points of a curve, the whole and the empty input among them; 2 or more."""
    patch: int | None = None
    """Edge in pixels of an image's parts; None: a 14th of the shorter side, at least one pixel."""
    rows: int = 64
    """How many rows the model gets at a time."""

    def __post_init__(self) -> None:
        for name in ("steps", "patch", "rows"):
            value, least = getattr(self, name), 2 if name == "steps" else 1
            if value is not None and value < least:
                raise InputError(f"{name} is {value}", remedy=f"pass {least} or more")


def perturbation_curves(
    explainer: ExplainableGraphModule,
    inputs: Mapping[str, Tensor],
    explanation: Explanation,
    *,
    input: str | None = None,
    target: TargetLike = None,
    perturbation: Perturbation | None = None,
) -> Curves:
    """Perturbation curves of an explanation of one batch.

    Args:
        explainer: what made the explanation, or another compilation of the same model.
        inputs: the batch.
        explanation: relevance of the batch.
        input: the input to perturb; None: the only one that has relevance. Tokens (batch, length)
            go one by one, padding excepted; images (batch, channels, height, width) by patches, all
            channels at once; anything else element by element.
        target: as in a call; None: the class or token that was explained.
        perturbation: how inputs are set to zero.

    Raises:
        InputError: several inputs have relevance and none is named, or the named one has none.
    """
    options = perturbation or Perturbation()
    name = _the_input(explanation, input)
    relevance = explanation.relevance[name].detach()
    mask = (explanation.mask or {}).get(name)
    parts = _Parts.of(relevance, explanation.inputs[name], mask, options.patch)
    share = torch.linspace(0, 1, options.steps)
    batch = relevance.shape[0]
    curves = []
    for descending in (True, False):
        ranks = parts.ranks(descending)
        zeroed = (share[:, None].to(ranks.device) * parts.counts).round()  # (steps, batch)
        keep = parts.of_elements(ranks[None] >= zeroed[:, :, None])
        values = _values(explainer, inputs, name, keep, _fixed(target, explanation), options.rows)
        curves.append(values.reshape(options.steps, batch).T)
    return Curves(share, *curves)


def _the_input(explanation: Explanation, name: str | None) -> str:
    names = list(explanation.relevance)
    if name is None and len(names) != 1:
        raise InputError(
            f"{len(names)} inputs have relevance", remedy=f"name one: {', '.join(names)}"
        )
    if name is not None and name not in names:
        raise InputError(f"'{name}' has no relevance", remedy=f"choose from: {', '.join(names)}")
    return names[0] if name is None else name


def _fixed(target: TargetLike, explanation: Explanation) -> Target:
    """The target with the class or token that was explained in each row."""
    wanted = as_target(target)
    index = explanation.target_index
    if isinstance(wanted, Logit) and wanted.index is None and index is not None:
        return replace(wanted, index=index)
    return wanted


@dataclass(frozen=True)
class _Parts:
    """What of an input is set to zero together."""

    relevance: Tensor
    """(batch, parts)."""
    present: Tensor
    """(batch, parts) bool: false for padding, which stays as it is."""
    shape: tuple[int, ...]
    """Of the input's relevance."""
    grid: tuple[int, int, int] | None
    """Rows and columns of patches and their edge, of an image."""

    @classmethod
    def of(
        cls, relevance: Tensor, value: Tensor, mask: Tensor | None, edge: int | None
    ) -> "_Parts":
        shape = tuple(relevance.shape)
        if relevance.dim() == 4 and value.is_floating_point():
            height, width = shape[-2:]
            edge = edge or max(1, min(height, width) // 14)
            grid = (math.ceil(height / edge), math.ceil(width / edge), edge)
            padded = torch.nn.functional.pad(
                relevance.sum(1), (0, grid[1] * edge - width, 0, grid[0] * edge - height)
            )
            summed = padded.unfold(1, edge, edge).unfold(2, edge, edge).sum((-1, -2)).flatten(1)
            return cls(summed, torch.ones_like(summed, dtype=torch.bool), shape, grid)
        flat = relevance.flatten(1)
        present = (
            torch.ones_like(flat, dtype=torch.bool) if mask is None else mask.bool().flatten(1)
        )
        return cls(flat, present, shape, None)

    @property
    def counts(self) -> Tensor:
        """(batch,): how many parts a row has."""
        return self.present.sum(1)

    def ranks(self, descending: bool) -> Tensor:
        """(batch, parts): each part's place in the order; padding is never reached."""
        order = torch.argsort(self.relevance, dim=1, descending=descending, stable=True)
        present = self.present.gather(1, order)
        places = torch.where(present, present.cumsum(1) - 1, self.present.shape[1] + 1)
        return torch.empty_like(places).scatter_(1, order, places)

    def of_elements(self, keep: Tensor) -> Tensor:
        """(steps, batch, parts) → (steps · batch, …) as it broadcasts to the input's relevance."""
        keep = keep.flatten(0, 1)
        if self.grid is None:
            return keep.reshape(-1, *self.shape[1:])
        rows, columns, edge = self.grid
        patches = keep.reshape(-1, 1, rows, columns)
        whole = patches.repeat_interleave(edge, 2).repeat_interleave(edge, 3)
        return whole[..., : self.shape[-2], : self.shape[-1]]


def _values(
    explainer: ExplainableGraphModule,
    inputs: Mapping[str, Tensor],
    name: str,
    keep: Tensor,
    target: Target,
    rows: int,
) -> Tensor:
    """The target's value for each row of a mask, the inputs repeated to meet it."""
    batch = next(iter(inputs.values())).shape[0]
    at_once = max(1, rows // batch) * batch
    values = []
    for part in torch.split(keep, at_once):
        times = part.shape[0] // batch
        repeated = {key: torch.cat([value] * times) for key, value in inputs.items()}
        values.append(
            explainer.target_values(keep={name: part}, target=_repeated(target, times), **repeated)
        )
    return torch.cat(values)


def _repeated(target: Target, times: int) -> Any:
    """A target for a batch that is repeated: what it names row by row is repeated with it."""
    named = {
        key: torch.as_tensor(value).repeat(times)
        for key in ("index", "position")
        if isinstance(value := getattr(target, key, None), list | tuple | Tensor)
        and torch.as_tensor(value).dim() == 1
    }
    return replace(target, **named) if named else target  # type: ignore[type-var]
