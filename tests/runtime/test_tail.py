"""A model from its explained value on: the same outputs, gradients and parameters."""

import pytest
import torch
from conftest import EXAMPLE, Explain
from models import BY_NAME, Case
from torch import nn

import attnlrp_fx
from attnlrp_fx import InputError, Logit
from attnlrp_fx.evaluate import Subject

NAMES = ["bert", "mlp"]


@pytest.mark.parametrize("case", [BY_NAME[name] for name in NAMES], ids=str)
def test_a_tail_continues_what_its_head_began(case: Case, explain: Explain):
    """Head and tail give the target's value, and Gradient×Input by plain autograd."""
    explainer = explain(case, "gradient")
    inputs = case.example(*EXAMPLE, torch.float64)
    explanation = explainer(inputs)
    tail = explainer.tail(explainer.explained[0])
    values = tail.values(inputs).requires_grad_()
    target = Logit() if case.target is None else case.target
    chosen = tail.choose(values, inputs, attnlrp_fx.targets.as_target(target))
    torch.testing.assert_close(chosen.value, explanation.target_value, rtol=1e-6, atol=1e-9)
    (gradient,) = torch.autograd.grad(chosen.value.sum(), values)
    product = tail.summed(values * gradient).detach()
    expected = explanation.relevance[tail.name].to(product.dtype)
    torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-8)


class Word(nn.Module):
    """An embedding and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch, length) → (batch, 2)."""
        return self.head(self.table(ids).sum(1).tanh())


def test_parameters_are_the_models_own():
    model, ids = Word().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    subject = Subject.compile(model, ids)
    before = subject.ask({"ids": ids}, Logit(0))
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.table.weight.mul_(3)
    after = subject.ask({"ids": ids}, Logit(0))
    torch.testing.assert_close(after.values, 3 * before.values)
    torch.testing.assert_close(after.score(after.values), model(ids)[:, 0], rtol=1e-6, atol=1e-6)


def test_a_compiled_tail_equals_the_eager_one():
    model, ids = Word().eval(), torch.tensor([[1, 2, 3], [4, 5, 6]])
    explainer = attnlrp_fx.compile(model, ids, backend="eager")
    plain, compiled = Subject(explainer), Subject(explainer, backend="aot_eager")
    for rows in (2, 5):
        some = {"ids": torch.randint(9, (rows, 3))}
        a, b = plain.ask(some, Logit(1)), compiled.ask(some, Logit(1))
        torch.testing.assert_close(a.score(a.values), b.score(b.values))


def test_what_is_looked_up_twice_has_no_one_value():
    class Twice(Word):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            """(batch, length) → (batch, 2)."""
            return self.head((self.table(ids) * self.table(ids + 1)).sum(1))

    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(InputError, match="'ids' is looked up 2 times"):
        Subject.compile(Twice().eval(), ids)
