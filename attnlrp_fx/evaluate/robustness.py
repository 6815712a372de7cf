"""Whether explanations follow the model: infidelity, sensitivity, randomised weights, sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnlrp_fx.errors import InputError, MissingExtraError
from attnlrp_fx.evaluate.methods import Method
from attnlrp_fx.evaluate.parts import Parts
from attnlrp_fx.evaluate.subjects import Question, of_rows


def infidelity(
    question: Question, relevance: Tensor, *, samples: int = 32, patch: int | None = None
) -> Tensor:
    """How far relevance is from predicting what the loss of random parts does (Yeh et al. 2019).

    Parts are set to zero with probability ½. The mean square of (what the target falls by) − β ·
    (relevance of these parts), with the factor β that makes it least, as captum computes it.

    Args:
        question: the batch, and what was explained of it.
        relevance: one number a place.
        samples: how many choices of parts are tried.
        patch: edge of an image's parts in pixels; None: as in `Perturbation`.

    Returns:
        (batch,), in the target's unit squared; 0 is best.

    Raises:
        MissingExtraError: captum is not installed.
    """
    parts = Parts.of(question, patch)
    sums = parts.sums(question.subject.places(relevance.detach())) * parts.present
    generator = torch.Generator().manual_seed(0)

    def without(keep: Tensor, rows: Tensor) -> Tensor:
        mask = question.spread(parts.spread(keep > 0.5))
        return question.score(torch.where(mask, question.values[rows], 0), rows)

    def drawn(keep: Tensor) -> tuple[Tensor, Tensor]:
        gone = (torch.rand(keep.shape, generator=generator) < 0.5).to(keep)
        return gone, keep - gone

    with torch.no_grad():
        found: Tensor = _captum_metrics().infidelity(
            without,
            drawn,
            torch.ones_like(sums),
            sums,
            additional_forward_args=(question.rows,),
            n_perturb_samples=samples,
            max_examples_per_batch=max(64, len(question)),
            normalize=True,
        )
    return found


def sensitivity(
    question: Question, method: Method, *, radius: float = 0.02, samples: int = 4
) -> Tensor:
    """The most that an explanation changes, relatively, by small noise (Yeh et al. 2019).

    Args:
        question: the batch, and what is explained of it; of a floating input.
        method: makes explanations.
        radius: the most that noise adds to an element.
        samples: how many noises are tried.

    Returns:
        (batch,): max ‖R(x + δ) − R(x)‖ / ‖R(x)‖, as captum computes it; 0 is best.

    Raises:
        InputError: the input is of tokens, to which no noise can be added.
        MissingExtraError: captum is not installed.
    """
    subject = question.subject
    if subject.tail.features:
        raise InputError(
            f"noise cannot be added to the tokens of '{subject.name}'",
            remedy="explain the embeddings (inputs_embeds) instead",
        )

    def explained(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        times = len(values[0]) // len(question)
        rows = question.rows.repeat_interleave(times)
        inputs = {name: value[rows] for name, value in question.inputs.items()}
        given = {**inputs, subject.name: values[0].detach()}
        return (method(subject, given, of_rows(question.target, rows)),)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: Tensor = _captum_metrics().sensitivity_max(
            explained, question.values, perturb_radius=radius, n_perturb_samples=samples
        )
    return found


def randomisation(question: Question, method: Method, *, seed: int = 0) -> Tensor:
    """Rank correlation of explanations of the model and of one whose weights were shuffled.

    The sanity check of Adebayo et al. 2018: an explanation that does not change with the weights
    (of an edge detector, say) explains something else. The model gets its weights back.

    Args:
        question: the batch, and what is explained of it.
        method: makes explanations.
        seed: of the shuffling.

    Returns:
        (batch,): Spearman's correlation of magnitudes over places; near 0 is best, 1 is bad.
    """
    subject = question.subject
    before = method(subject, question.inputs, question.target)
    with shuffled(subject.model, seed):
        after = method(subject, question.inputs, question.target)
    return torch.stack(
        [
            _correlation(a[here].abs(), b[here].abs())
            for a, b, here in zip(before, after, question.present, strict=True)
        ]
    )


@contextmanager
def shuffled(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """A model whose parameters have their elements in a random order, for a while."""
    generator = torch.Generator().manual_seed(seed)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                order = torch.randperm(parameter.numel(), generator=generator)
                mixed = kept[name].flatten()[order.to(parameter.device)]
                parameter.copy_(mixed.reshape(parameter.shape))
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])


def conservation(question: Question, relevance: Tensor) -> Tensor:
    """(batch,): Σ relevance / (target − target of the empty input).

    1 where relevance tells all of what the input adds to the target (completeness, Sundararajan et
    al. 2017); for AttnLRP less, since biases and softmax absorb by design: `Explanation.ledger`
    has the sum that closes.
    """
    with torch.no_grad():
        whole = question.score(question.values)
        empty = question.score(torch.zeros_like(question.values))
    places = question.subject.places(relevance.detach())
    return places.flatten(1).double().sum(1) / (whole - empty).double()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation of two vectors; ties in the order of their places."""
    ranks = torch.stack([x.argsort(stable=True).argsort(stable=True) for x in (a, b)]).double()
    return torch.corrcoef(ranks)[0, 1]


def _captum_metrics() -> Any:
    try:
        from captum import metrics
    except ImportError as error:
        raise MissingExtraError(
            "This metric needs captum.",
            why=str(error),
            remedy="pip install 'attnlrp_fx[evaluation]'",
        ) from error
    return metrics
