"""Metrics that quantus has too, against quantus: the same numbers on the same explanations."""

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnlrp_fx.evaluate import (
    Perturbation,
    Question,
    Subject,
    evidence_share,
    perturbation_curves,
    rank_accuracy,
    top1_in_evidence,
)

EDGE = 4


@pytest.fixture
def quantus() -> Iterator[Any]:
    """The package, which warns of much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield pytest.importorskip("quantus")


def asked() -> tuple[nn.Module, Question, Tensor]:
    """A classifier of small images that quantus can call, a batch, and what explains it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(EDGE * EDGE, 9), nn.Tanh(), nn.Linear(9, 3)
    ).eval()
    images = torch.randn(20, 1, EDGE, EDGE)
    subject = Subject.compile(model, images)
    question = subject.ask({"input": images})
    return model, question, subject.explainer(question.inputs).relevance["input"]


def arguments(model: nn.Module, question: Question, relevance: Tensor) -> dict[str, Any]:
    """What quantus calls a metric with."""
    classes = model(question.values).argmax(1)
    return {
        "model": model,
        "x_batch": question.values.numpy(),
        "y_batch": classes.numpy(),
        "a_batch": relevance.detach().numpy(),
        "device": "cpu",
    }


def test_pixel_flipping(quantus: Any) -> None:
    """MoRF, pixel by pixel, in logits; quantus starts after the first pixel."""
    model, question, relevance = asked()
    metric = quantus.PixelFlipping(normalise=False, perturb_baseline=0.0, disable_warnings=True)
    expected = metric(**arguments(model, question, relevance), softmax=False)
    options = Perturbation(steps=EDGE * EDGE + 1, patch=1)
    curves = perturbation_curves(question, relevance, perturbation=options)
    assert curves.morf[:, 1:].std() > 0.1
    np.testing.assert_allclose(curves.morf[:, 1:], np.array(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("PointingGame", top1_in_evidence),
        ("RelevanceRankAccuracy", rank_accuracy),
        ("RelevanceMassAccuracy", evidence_share),
    ],
)
def test_known_evidence(quantus: Any, name: str, ours: Any) -> None:
    """Of relevance that is nowhere negative; quantus divides by the sum of all, signs included."""
    model, question, relevance = asked()
    relevance = relevance.abs()
    evidence = torch.rand(relevance.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    metric = getattr(quantus, name)(abs=False, normalise=False, disable_warnings=True)
    expected = metric(**arguments(model, question, relevance), s_batch=evidence.numpy())
    found = ours(relevance[:, 0], evidence[:, 0])
    assert len(set(found.tolist())) > 1
    np.testing.assert_allclose(found, np.array(expected, dtype=float), rtol=1e-6)
