"""Methods of explanation behind one interface: `method(subject, inputs, target) -> relevance`.

Relevance is one number a place: (batch, length) of tokens, (batch, height, width) of images. All
methods explain the same values, of tokens their embeddings, and score by the same target. What
captum has is taken from captum; methods that look inside the model find what they need by
mechanism and say so where there is nothing to find.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.errors import InputError, MissingExtraError
from attnlrp_fx.evaluate.attention import GradCam, GradientRollout, Rollout
from attnlrp_fx.evaluate.parts import Parts
from attnlrp_fx.evaluate.subjects import Grid, Inputs, Question, Subject, of_rows
from attnlrp_fx.rules.composites import Composite
from attnlrp_fx.targets import Contrast, Logit, TargetLike


class Method(Protocol):
    """A method of explanation."""

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None, /) -> Tensor:
        """Relevance of each place, (batch, length) or (batch, height, width)."""
        ...


@dataclass(frozen=True)
class Random:
    """Numbers that know nothing: the floor."""

    seed: int = 0

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """Standard normal numbers, the same for the same seed and shape."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(subject.ask(inputs, target).shape, generator=generator)


@dataclass(frozen=True)
class Relevance:
    """Relevance by this package."""

    composite: str | Composite | None = None
    """The rules; None: those that the subject was compiled with."""
    contrast: bool = False
    """Whether the target's logit is explained against the mean of all others."""

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """Relevance by the composite."""
        question = subject.ask(inputs, target)
        wanted = question.target
        if self.contrast:
            if not isinstance(wanted, Logit):
                raise InputError(f"'{wanted}' has no contrast", remedy="explain a Logit")
            wanted = Contrast(wanted.index, None, wanted.position, wanted.output)
        explanation: Any = subject.sibling(self.composite)(question.inputs, target=wanted)
        return subject.places(explanation.relevance[subject.name])


@dataclass(frozen=True)
class Gradient:
    """The norm of the gradient over a place's features, or channels."""

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """|∂ target / ∂ value|, never negative."""
        question = subject.ask(inputs, target)
        method = _captum().Saliency(_forward(question))
        gradient = method.attribute(
            _watched(question), abs=False, additional_forward_args=(question.rows,)
        )
        return _norm(question, gradient)


@dataclass(frozen=True)
class InputXGradient:
    """Gradient × Input."""

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """Value times gradient, summed over features."""
        question = subject.ask(inputs, target)
        method = _captum().InputXGradient(_forward(question))
        found = method.attribute(_watched(question), additional_forward_args=(question.rows,))
        return question.places_of(found.detach())


@dataclass(frozen=True)
class IntegratedGradients:
    """Integrated Gradients from zero (Sundararajan et al. 2017)."""

    steps: int = 20
    """Points on the way, of a Gauss-Legendre quadrature."""
    rows: int = 64
    """How many rows the model gets at a time."""

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """Value times mean gradient on the way from zero, summed over features."""
        question = subject.ask(inputs, target)
        found = (
            _captum()
            .IntegratedGradients(_forward(question))
            .attribute(
                _watched(question),
                additional_forward_args=(question.rows,),
                n_steps=self.steps,
                internal_batch_size=max(self.rows, len(question)),
            )
        )
        return question.places_of(found.detach())


@dataclass(frozen=True)
class SmoothGrad:
    """The gradient, averaged over noisy inputs (Smilkov et al. 2017), as a norm over features."""

    samples: int = 20
    noise: float = 0.1
    """Standard deviation of the noise, as a share of the values' range in the batch."""
    rows: int = 64

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """|mean gradient|, never negative; the same noise at every call."""
        question = subject.ask(inputs, target)
        captum, values = _captum(), _watched(question)
        method = captum.NoiseTunnel(captum.Saliency(_forward(question)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            gradient = method.attribute(
                values,
                nt_type="smoothgrad",
                nt_samples=self.samples,
                nt_samples_batch_size=max(1, self.rows // len(question)),
                stdevs=self.noise * float(question.values.max() - question.values.min()),
                abs=False,
                additional_forward_args=(question.rows,),
            )
        return _norm(question, gradient)


@dataclass(frozen=True)
class Occlusion:
    """How much the target falls when one token, or patch, is zero (Zeiler and Fergus 2014)."""

    patch: int | None = None
    """Edge of a patch; None: as in `Perturbation`."""
    rows: int = 64

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """Target minus target without the part."""
        question = subject.ask(inputs, target)
        parts = Parts.of(question, self.patch)
        with torch.no_grad():
            found = (
                _captum()
                .FeatureAblation(_forward(question))
                .attribute(
                    question.values,
                    additional_forward_args=(question.rows,),
                    feature_mask=_features(question, parts),
                    perturbations_per_eval=max(1, self.rows // len(question)),
                )
            )
        return _one_a_place(question, found)


@dataclass(frozen=True)
class KernelShap:
    """Shapley values by a weighted regression on random coalitions (Lundberg and Lee 2017)."""

    samples: int = 100
    """Coalitions of each row."""
    patch: int | None = None
    rows: int = 64

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """The regression's coefficients; the same coalitions at every call."""
        question = subject.ask(inputs, target)
        parts = Parts.of(question, self.patch)
        features = _features(question, parts)
        method = _captum().KernelShap(_forward(question))
        found = []
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for row in question.rows:
                here = row[None]
                found.append(
                    method.attribute(
                        question.values[here],
                        additional_forward_args=(here,),
                        feature_mask=features,
                        n_samples=self.samples,
                        perturbations_per_eval=self.rows,
                    )
                )
        return _one_a_place(question, torch.cat(found))


@dataclass(frozen=True)
class AtMan:
    """How much the target falls when attention to a token is suppressed (Deiseroth et al. 2023).

    In every layer, scores of attention to the token are multiplied by 1 − `suppression`, which is
    done to its keys. Of images, the patches that attention reads are suppressed.
    """

    suppression: float = 0.9
    rows: int = 64

    @torch.no_grad()
    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """Target minus target with the token suppressed.

        Raises:
            InputError: no attention reads the explained input.
        """
        question = subject.ask(inputs, target)
        grid = Grid.of(question, _attended(question)) if question.is_image else None
        count = question.shape[1] if grid is None else grid.tokens
        whole = self._scores(question, count, torch.full((len(question),), -1))
        suppressed = torch.arange(count).repeat_interleave(len(question))
        found = self._scores(question, count, suppressed).reshape(count, -1)
        fall = (whole - found).T
        return fall if grid is None else grid.to_pixels(fall)

    def _scores(self, question: Question, count: int, suppressed: Tensor) -> Tensor:
        """The score of each row with one token suppressed, the batch again and again; −1: none."""
        rows = question.rows.repeat(len(suppressed) // len(question))
        found = []
        for row, token in zip(
            torch.split(rows, self.rows), torch.split(suppressed, self.rows), strict=True
        ):
            factor = 1 - self.suppression * (torch.arange(count) == token[:, None]).float()
            run = _WithKeys(question.subject.tail.rest, factor.to(question.values))
            chosen = question.subject.tail.choose_by(
                run.run,
                question.values[row],
                {name: value[row] for name, value in question.inputs.items()},
                of_rows(question.target, row),
            )
            if not run.changed:
                raise _unattended(question)
            found.append(chosen.value)
        return torch.cat(found)


class _WithKeys(fx.Interpreter):
    """Interpreter that multiplies the keys of attention, each token's by a factor.

    Args:
        graph: the graph.
        factor: (batch, length).
    """

    def __init__(self, graph: fx.GraphModule, factor: Tensor) -> None:
        super().__init__(graph)
        self.factor = factor
        self.changed = 0

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is ops.attention:
            op, query, key, *others = args
            batch, length = self.factor.shape
            if key.dim() > 2 and key.shape[-2] == length and not key.shape[0] % batch:
                spread = self.factor.repeat_interleave(key.shape[0] // batch, 0)
                key = key * spread.reshape(len(spread), *[1] * (key.dim() - 3), length, 1)
                self.changed += 1
                args = (op, query, key, *others)
        return super().call_function(target, args, kwargs)


def _attended(question: Question) -> int:
    """How many tokens the first attention of a model of images reads."""
    for node in question.subject.tail.rest.graph.nodes:
        if node.target is ops.attention:
            return int(node.args[2].meta["val"].shape[-2])
    raise _unattended(question)


def _unattended(question: Question) -> InputError:
    return InputError(
        f"no attention of the model reads '{question.subject.name}'",
        remedy="use a method that does not look at attention",
    )


def _captum() -> Any:
    try:
        from captum import attr
    except ImportError as error:
        raise MissingExtraError(
            "This method needs captum.",
            why=str(error),
            remedy="pip install 'attnlrp_fx[evaluation]'",
        ) from error
    return attr


def _forward(question: Question) -> Any:
    """What captum calls: values, and which row of the batch each is."""
    return lambda values, rows: question.score(values, rows)


def _watched(question: Question) -> Tensor:
    """The values, ready to be differentiated by."""
    return question.values.detach().requires_grad_()


def _norm(question: Question, gradient: Tensor) -> Tensor:
    return question.places_of(gradient.detach().square()).sqrt()


def _features(question: Question, parts: Parts) -> Tensor:
    """captum's feature mask: which part each element of a row's value belongs to."""
    places = question.spread(parts.numbers[None])
    return places.expand_as(question.values[:1])


def _one_a_place(question: Question, found: Tensor) -> Tensor:
    """From what captum gives to every element of a part, to one number a place."""
    first = question.spread(torch.ones(question.shape, dtype=torch.bool)).expand_as(found)
    mean = question.places_of(found.detach()) / question.places_of(first.to(found.dtype))
    return mean.masked_fill(~question.present, 0)


METHODS: Mapping[str, Method] = {
    "random": Random(),
    "gradient": Gradient(),
    "input-x-gradient": InputXGradient(),
    "ig": IntegratedGradients(),
    "smoothgrad": SmoothGrad(),
    "grad-cam": GradCam(),
    "rollout": Rollout(),
    "gradient-rollout": GradientRollout(),
    "atman": AtMan(),
    "kernel-shap": KernelShap(),
    "occlusion": Occlusion(),
    "cp-lrp": Relevance("cp-lrp"),
    "attnlrp": Relevance("attnlrp"),
    "best": Relevance("best"),
    "attnlrp-vision": Relevance("attnlrp-vision"),
    "attnlrp-contrast": Relevance("attnlrp", contrast=True),
}
"""Every method by name, as it is used if nothing else is said."""


def method_named(name: str) -> Method:
    """A method by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in METHODS:
        raise InputError(f"there is no method '{name}'", remedy=f"use one of: {', '.join(METHODS)}")
    return METHODS[name]
