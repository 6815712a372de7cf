"""Infidelity, sensitivity, shuffled weights and sums, on models whose answer is known."""

import pytest
import torch
from torch import nn

from attnlrp_fx import InputError, Logit
from attnlrp_fx.evaluate import (
    METHODS,
    Question,
    Subject,
    conservation,
    infidelity,
    randomisation,
    sensitivity,
)
from attnlrp_fx.evaluate.robustness import shuffled


@pytest.fixture(scope="module")
def linear() -> Question:
    torch.manual_seed(0)
    model = nn.Linear(6, 3, bias=False).double().eval()
    subject = Subject.compile(model, torch.randn(2, 6).double())
    return subject.ask({"input": torch.randn(5, 6).double()}, Logit(2))


def test_a_linear_model_is_explained_perfectly(linear: Question):
    """Relevance predicts every loss of parts, up to any factor, and tells all of the target."""
    relevance = METHODS["attnlrp"](linear.subject, linear.inputs, linear.target)
    assert float(infidelity(linear, 3 * relevance).max()) < 1e-9
    assert float(infidelity(linear, torch.randn(5, 6)).min()) > 1e-3
    torch.testing.assert_close(conservation(linear, relevance), torch.ones(5).double())


def test_sensitivity_of_gradient_and_of_gradient_times_input(linear: Question):
    """A linear model's gradient does not move; times input it moves with the input."""
    still = sensitivity(linear, METHODS["gradient"])
    assert float(still.max()) < 1e-6
    moving = sensitivity(linear, METHODS["input-x-gradient"], radius=0.01)
    weights = linear.subject.model.weight[2].detach()
    most = 0.01 * weights.norm() / (linear.values * weights).norm(dim=1)
    assert bool(((moving > 0) & (moving <= most * 1.001)).all())
    embedding = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)).eval()
    tokens = Subject.compile(embedding, torch.randint(9, (2, 3)))
    with pytest.raises(InputError, match="noise cannot be added"):
        sensitivity(tokens.ask({"input": torch.randint(9, (2, 3))}), METHODS["gradient"])


def test_shuffled_weights(linear: Question):
    """What looks at weights changes, what does not stays; the model gets its weights back."""
    before = linear.subject.model.weight.detach().clone()
    blind = randomisation(linear, METHODS["random"])
    torch.testing.assert_close(blind, torch.ones(5).double())
    seeing = randomisation(linear, METHODS["gradient"])
    assert float(seeing.max()) < 0.9
    assert torch.equal(linear.subject.model.weight, before)
    with shuffled(linear.subject.model):
        assert not torch.equal(linear.subject.model.weight, before)
    assert torch.equal(linear.subject.model.weight, before)
