"""Methods that look at attention or at a layer's maps: rollout, gradient × rollout, Grad-CAM.

Attention weights and their gradients are latent values of a program compiled for it. Which rows of
attention the output reads is found, not assumed: those of the last layer that have a gradient (the
first token of a classifier, the last of a language model, all of one that averages).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.errors import InputError
from attnlrp_fx.evaluate.subjects import Grid, Inputs, Question, Subject
from attnlrp_fx.targets import TargetLike


@dataclass(frozen=True)
class Rollout:
    """Attention rollout (Abnar and Zuidema 2020): the product over layers of (A + 1) / 2."""

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """The rolled-out attention of the rows that the output reads, never negative.

        Raises:
            InputError: the model has no attention among the explained input's tokens.
        """
        question = subject.ask(inputs, target)
        layers = _layers(question)
        rolled = _identity(layers[0].weights)
        for layer in layers:
            rolled = layer.weights @ rolled / 2 + rolled / 2
        return _read(question, layers, rolled)


@dataclass(frozen=True)
class GradientRollout:
    """Gradient × attention rollout (Chefer et al. 2021, eqs. 5 and 6): R ← R + (A ⊙ ∇A)⁺ R."""

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """As `Rollout`, of attention weighed by its gradient's positive part.

        Raises:
            InputError: the model has no attention among the explained input's tokens.
        """
        question = subject.ask(inputs, target)
        layers = _layers(question)
        rolled = _identity(layers[0].weights)
        for layer in layers:
            rolled = rolled + layer.relevant @ rolled
        return _read(question, layers, rolled - _identity(rolled))


@dataclass(frozen=True)
class _Layer:
    """Attention of one layer, (batch, query, key) each, the mean over heads."""

    weights: Tensor
    relevant: Tensor
    """(A ⊙ ∇A)⁺."""
    read: Tensor
    """(batch, query): the sum of |A ⊙ ∇A|."""


def _layers(question: Question) -> list[_Layer]:
    subject = question.subject
    try:
        explainer = subject.sibling("gradient", latent=("attention.weights",))
    except InputError as error:
        raise _no_attention(question, str(error.what)) from error
    explanation: Any = explainer(question.inputs, target=question.target)
    wanted = None if question.is_image else question.shape[1]
    found, batch = [], len(question)
    for latent in explanation.latent.of_role("attention.weights"):
        weights, product = latent.activation, latent.relevance
        if latent.dims != ("batch", "head", "query", "key") or len(weights) != batch:
            continue
        square = weights.shape[2] == weights.shape[3]
        if square and wanted in (None, weights.shape[3]):
            relevant, read = product.clamp(min=0).mean(1), product.abs().sum((1, 3))
            found.append(_Layer(weights.mean(1).to(relevant), relevant, read))
    if not found:
        raise _no_attention(question, "no attention is among its tokens alone")
    return found


def _no_attention(question: Question, why: str) -> InputError:
    return InputError(
        f"there is no attention to roll out for '{question.subject.name}'",
        why=why,
        remedy="use a method that does not look at attention",
    )


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _read(question: Question, layers: list[_Layer], rolled: Tensor) -> Tensor:
    """The rows that the output reads, each as much as it does, as places of the input."""
    read = layers[-1].read
    share = read / read.sum(1, keepdim=True).clamp(min=torch.finfo(read.dtype).tiny)
    found = (share[:, None] @ rolled)[:, 0]
    if not question.is_image:
        return found.masked_fill(~question.present, 0)
    return Grid.of(question, rolled.shape[-1]).to_pixels(found)


@dataclass(frozen=True)
class GradCam:
    """Grad-CAM (Selvaraju et al. 2017): maps of a layer, each weighed by its mean gradient.

    Of the last layer whose gradient reaches more than one place: the last maps of a convolutional
    network, the last tokens of a transformer of which more than the class token counts.
    """

    def __call__(self, subject: Subject, inputs: Inputs, target: TargetLike = None) -> Tensor:
        """The positive part of the weighed sum, enlarged to the image.

        Raises:
            InputError: the input is no image, or no layer has places.
        """
        question = subject.ask(inputs, target)
        if not question.is_image:
            raise InputError(f"'{subject.name}' holds no images, which Grad-CAM is for")
        watch = _Watch(subject.tail.rest)
        with torch.enable_grad():
            values = question.values.detach().requires_grad_()
            chosen = subject.tail.choose_by(
                watch.run, values, question.inputs, question.target, differentiable=True
            )
            gradients = torch.autograd.grad(chosen.value.sum(), watch.seen, allow_unused=True)
        for value, gradient in zip(reversed(watch.seen), reversed(gradients), strict=True):
            found = None if gradient is None else _cam(question, value, gradient)
            if found is not None:
                return found
        raise InputError(f"no layer of the model has places of '{subject.name}'")


class _Watch(fx.Interpreter):
    """Interpreter that keeps maps, (batch, channels, height, width), and normalised tokens."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.requires_grad:
            is_map = value.dim() == 4 and ops.is_explained(n)
            if is_map or (value.dim() == 3 and n.target is ops.norm):
                self.seen.append(value)
        return value


def _cam(question: Question, value: Tensor, gradient: Tensor) -> Tensor | None:
    """Grad-CAM of one layer; None if it has no places, or its gradient reaches one at most."""
    height, width = question.shape[1:]
    if len(value) != len(question):
        return None
    if value.dim() == 3:
        grid = Grid.find(value.shape[1], height, width)
        if grid is None:
            return None
        value, gradient = grid.maps(value.mT), grid.maps(gradient.mT)
    rows, columns = value.shape[-2:]
    is_like_image = abs(rows * width - columns * height) < max(height, width)
    reached = gradient.abs().sum((0, 1)) > 0
    if not is_like_image or min(rows, columns) < 2 or int(reached.sum()) < 2:
        return None
    weights = gradient.mean((2, 3), keepdim=True)
    cam = (weights * value).sum(1, keepdim=True).clamp(min=0).detach()
    return torch.nn.functional.interpolate(cam, (height, width), mode="bilinear")[:, 0]
