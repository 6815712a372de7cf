"""Faithfulness: what happens to the target when the inputs that matter most, or least, are gone.

Perturbation curves as in Achtibat et al. 2024: the parts of an input (tokens, patches of an image)
are ranked by relevance and replaced step by step, the most relevant first (MoRF) or the least
relevant first (LeRF), and the target's value is recorded at each step. An explanation is the better
the faster the value falls in the one order and the longer it lasts in the other: ΔA^F is the mean
of LeRF − MoRF over the steps.

Inserting parts into an empty input goes through the same inputs backwards: the k most relevant
parts are what is left when the least relevant others are gone. So the curves of insertion are those
of flipping read from the end, and ΔA^I = ΔA^F for the same replacement.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp_fx.errors import InputError
from attnlrp_fx.evaluate.parts import Parts
from attnlrp_fx.evaluate.subjects import Question

REPLACEMENTS = ("zero", "mean", "blur")
RANKINGS = ("signed", "absolute")
SCORES = ("target", "probability")


@dataclass(frozen=True)
class Curves:
    """The target's value of each row while an input is taken away, part by part."""

    share: Tensor
    """(steps,): how much of the input is gone, from 0 to 1."""
    morf: Tensor
    """(batch, steps): the values, most relevant parts first."""
    lerf: Tensor
    """(batch, steps): the values, least relevant parts first."""

    @property
    def area(self) -> Tensor:
        """(batch,): ΔA^F = ΔA^I, the mean of LeRF − MoRF over the steps; higher is better."""
        return (self.lerf - self.morf).mean(1)

    @property
    def mif(self) -> Tensor:
        """(batch, steps): insertion, most relevant parts first; `share` is how much is there."""
        return self.lerf.flip(1)

    @property
    def lif(self) -> Tensor:
        """(batch, steps): insertion, least relevant parts first; `share` is how much is there."""
        return self.morf.flip(1)

    @property
    def aopc(self) -> Tensor:
        """(batch,): mean fall of the value over the steps, most relevant first (Samek et al. 2017,
        eq. 12); higher is better."""
        return (self.morf[:, :1] - self.morf).mean(1)

    @property
    def comprehensiveness(self) -> Tensor:
        """(batch,): mean fall without the most relevant parts, over the steps between all and
        nothing (DeYoung et al. 2020, eq. 2, of probabilities); higher is better."""
        return (self.morf[:, :1] - self.morf[:, 1:-1]).mean(1)

    @property
    def sufficiency(self) -> Tensor:
        """(batch,): mean fall with the most relevant parts alone, over the same steps (DeYoung et
        al. 2020, eq. 1); lower is better."""
        return (self.lerf[:, :1] - self.lerf[:, 1:-1]).mean(1)


@dataclass(frozen=True)
class Perturbation:
    """How inputs are taken away."""

    steps: int = 16
    """Points of a curve, the whole and the empty input among them; 3 or more."""
    patch: int | None = None
    """Edge in pixels of an image's parts; None: a 14th of the shorter side, at least one pixel."""
    rows: int = 64
    """How many rows the model gets at a time."""
    replace: str | int = "zero"
    """What comes in the place of a part: "zero" (of a token, its embedding); "mean", of the row's
    own embeddings, or of each channel; "blur", of an image; or a token, such as the mask token."""
    ranking: str = "signed"
    """"signed": what speaks against the target is the least relevant; or "absolute"."""
    score: str = "target"
    """What is recorded: the "target", mostly a logit; or the "probability" of its class."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 3), ("patch", 1), ("rows", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}", remedy=f"pass {least} or more")
        allowed = {"replace": REPLACEMENTS, "ranking": RANKINGS, "score": SCORES}
        for name, names in allowed.items():
            value = getattr(self, name)
            if isinstance(value, str) and value not in names:
                raise InputError(f"{name} is '{value}'", remedy=f"use one of: {', '.join(names)}")


def perturbation_curves(
    question: Question, relevance: Tensor, *, perturbation: Perturbation | None = None
) -> Curves:
    """Perturbation curves of an explanation of one batch.

    Args:
        question: the batch, and what was explained of it: `Subject.ask`.
        relevance: (batch, length) of tokens, which go one by one, padding excepted; (batch, height,
            width) or with channels of images, which go by patches, all channels at once; of
            anything else in the input's shape, which goes element by element.
        perturbation: how inputs are taken away.

    Raises:
        InputError: the relevance is not of this batch, or the input cannot be perturbed so.

    Example:
        >>> import torch
        >>> from attnlrp_fx.evaluate import Subject, perturbation_curves
        >>> net = torch.nn.Linear(4, 2).eval()
        >>> subject = Subject.compile(net, torch.randn(3, 4))
        >>> question = subject.ask({"input": torch.randn(5, 4)})
        >>> relevance = subject.explainer(question.inputs).relevance["input"]
        >>> curves = perturbation_curves(question, relevance)
        >>> bool((curves.area > 0).all())              # a linear model is explained perfectly
        True
    """
    options = perturbation or Perturbation()
    relevance = question.subject.places(relevance.detach())
    if tuple(relevance.shape) != question.shape:
        raise InputError(
            f"relevance has shape {tuple(relevance.shape)}, the batch {question.shape}",
            remedy="pass the relevance of this batch, one number a token or pixel",
        )
    parts = Parts.of(question, options.patch)
    summed = parts.sums(relevance)
    summed = summed.abs() if options.ranking == "absolute" else summed
    share = torch.linspace(0, 1, options.steps)
    gone = (share[1:-1, None].to(summed.device) * parts.counts).round()  # (steps, batch)
    kept = [
        (parts.ranks(summed, descending)[None] >= gone[:, :, None]) | ~parts.present
        for descending in (True, False)
    ]
    ends = torch.stack([torch.ones_like(parts.present), ~parts.present])
    values = values_without(question, parts, torch.cat([ends, *kept]), options)
    whole, empty, *between = values
    middle = len(share) - 2
    morf = torch.stack([whole, *between[:middle], empty], 1)
    lerf = torch.stack([whole, *between[middle:], empty], 1)
    return Curves(share, morf, lerf)


@torch.no_grad()
def values_without(
    question: Question, parts: Parts, keep: Tensor, options: Perturbation
) -> list[Tensor]:
    """The recorded value, (batch,), for each of several choices of what is kept.

    Args:
        question: the batch.
        parts: its parts.
        keep: (choices, batch, parts) bool.
        options: how the rest is taken away.
    """
    target = question.probability() if options.score == "probability" else None
    other = replacement(question, options)
    flat, rows = keep.flatten(0, 1), question.rows.repeat(len(keep))
    found = []
    for some, row in zip(
        torch.split(flat, options.rows), torch.split(rows, options.rows), strict=True
    ):
        mask = question.spread(parts.spread(some))
        changed = torch.where(mask, question.values[row], other[row])
        found.append(question.score(changed, row, target))
    values = torch.cat(found)
    values = values.exp() if target is not None else values
    return list(values.reshape(len(keep), -1))


def replacement(question: Question, options: Perturbation) -> Tensor:
    """What comes in the place of the explained values, in their shape.

    Raises:
        InputError: only images can be blurred, and only tokens replaced by a token.
    """
    values, tail = question.values, question.subject.tail
    kind = options.replace
    is_image = not tail.features and values.dim() == 4
    if isinstance(kind, int):
        if not tail.features:
            raise InputError(
                f"'{tail.name}' holds no tokens to replace by token {kind}",
                remedy=f"use one of: {', '.join(REPLACEMENTS)}",
            )
        ids = torch.full_like(question.inputs[tail.name], kind)
        return tail.values({**question.inputs, tail.name: ids})
    if kind == "zero":
        return torch.zeros_like(values)
    if kind == "mean":
        here = question.spread(question.present).to(values.dtype).expand_as(values)
        dims = tuple(
            d for d in range(1, values.dim()) if d not in tail.features and (not is_image or d > 1)
        )
        mean = (values * here).sum(dims, keepdim=True) / here.sum(dims, keepdim=True)
        return mean.expand_as(values)
    if not is_image:
        raise InputError(f"'{tail.name}' is no image to blur", remedy='use "zero" or "mean"')
    return blurred(values, sigma=max(values.shape[-2:]) / 20)


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Images (batch, channels, height, width) behind a Gaussian filter of some pixels."""
    radius = max(1, min(round(3 * sigma), *(size - 1 for size in images.shape[-2:])))
    reach = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    line = (-reach.square() / (2 * sigma**2)).exp()
    line = line / line.sum()
    kernels: Any = (line[:, None], line[None, :])
    padded = torch.nn.functional.pad(images, [radius] * 4, mode="reflect")
    batch, channels, height, width = padded.shape
    flat = padded.reshape(batch * channels, 1, height, width)
    for kernel in kernels:
        flat = torch.nn.functional.conv2d(flat, kernel[None, None])
    return flat.reshape(images.shape)
