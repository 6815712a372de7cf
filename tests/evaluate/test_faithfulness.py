"""Perturbation curves against loops, on models whose right answer is known."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import InputError, Logit, Perturbation, perturbation_curves
from attnlrp_fx.evaluate import Question, Subject, interval
from attnlrp_fx.evaluate.faithfulness import blurred, replacement


class Sums(nn.Module):
    """Class 0 is the sum of the features, class 1 nothing: what each feature is worth is known."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, features) → (batch, 2)."""
        total = x.sum(1, keepdim=True)
        return torch.cat([total, total * 0 - 100], 1)


class Words(nn.Module):
    """A sum over word vectors that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) → (batch, 3)."""
        words = self.table(input_ids) * attention_mask[..., None]
        return self.head(words.sum(1).tanh())


def asked(
    model: nn.Module, inputs: dict[str, Tensor], target: object = None, input: str | None = None
) -> tuple[Question, Tensor]:
    """A question, and the relevance of what is asked for."""
    subject = Subject.compile(model.eval(), inputs, input=input)
    question = subject.ask(inputs, target)
    found = subject.explainer(inputs, target=question.target)
    return question, found.relevance[subject.name]


def test_a_sum_is_taken_apart_in_order():
    """Of a sum, MoRF takes the largest feature first and LeRF the smallest."""
    inputs = {"x": torch.tensor([[3.0, 1.0, 2.0], [0.0, -4.0, 8.0]])}
    question, relevance = asked(Sums(), inputs)
    curves = perturbation_curves(question, relevance, perturbation=Perturbation(steps=4))
    torch.testing.assert_close(curves.share, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    torch.testing.assert_close(
        curves.morf, torch.tensor([[6.0, 3.0, 1.0, 0.0], [4.0, -4.0, -4.0, 0.0]])
    )
    torch.testing.assert_close(
        curves.lerf, torch.tensor([[6.0, 5.0, 3.0, 0.0], [4.0, 8.0, 8.0, 0.0]])
    )
    torch.testing.assert_close(curves.area, (curves.lerf - curves.morf).mean(1))


def test_tokens_against_a_loop():
    """Zeroed embeddings of tokens, padding left alone, the class fixed: as a loop does it."""
    model = Words().eval()
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    question, relevance = asked(model, inputs)
    curves = perturbation_curves(question, relevance, perturbation=Perturbation(steps=6, rows=3))
    for row, length in enumerate(mask.sum(1).tolist()):
        order = relevance[row, :length].argsort(descending=True).tolist()
        label = int(model(ids, mask)[row].argmax())
        for step in range(6):
            zeroed = round(length * step / 5)
            for chosen, values in ((order, curves.morf), (order[::-1], curves.lerf)):
                words = model.table(ids[row]) * mask[row][:, None]
                words[chosen[:zeroed]] = 0
                wanted = model.head(words.sum(0).tanh())[label]
                torch.testing.assert_close(values[row, step], wanted)


def test_patches_of_an_image():
    """Patches go as wholes, all channels at once, those at the edge smaller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 4, 2)).eval()
    image = torch.rand(1, 2, 5, 4)
    inputs = {"input": image}
    question, relevance = asked(model, inputs, Logit(0))
    curves = perturbation_curves(question, relevance, perturbation=Perturbation(steps=7, patch=2))
    relevance = relevance.sum(1)
    patches = {
        (r, c): float(relevance[0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].sum())
        for r in range(3)
        for c in range(2)
    }
    order = sorted(patches, key=lambda place: -patches[place])
    for step in range(7):
        changed = image.clone()
        for r, c in order[:step]:
            changed[..., 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = 0
        torch.testing.assert_close(curves.morf[0, step], model(changed)[0, 0])


def test_the_class_stays_the_one_that_was_explained():
    """Without its strongest feature the other class wins; the curve is still of the first."""
    inputs = {"x": torch.tensor([[60.0, -110.0, 1.0]])}
    question, relevance = asked(Sums(), inputs)
    assert question.target.index.tolist() == [0]
    curves = perturbation_curves(question, relevance, perturbation=Perturbation(steps=4))
    torch.testing.assert_close(curves.morf, torch.tensor([[-49.0, -109.0, -110.0, 0.0]]))


def test_random_relevance_has_no_area():
    """Over many rows, an order that knows nothing gains nothing; the right one does."""
    torch.manual_seed(0)
    question, relevance = asked(Sums(), {"x": torch.rand(400, 6)})
    known = interval(perturbation_curves(question, relevance).area)
    blind = interval(perturbation_curves(question, torch.rand(400, 6)).area)
    assert not blind.excludes_zero
    assert known.low > 0.5


def test_a_linear_model_reaches_the_bound():
    """No order of any kind has more area than that of the contributions themselves."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2, bias=False).double().eval()
    question, relevance = asked(model, {"input": torch.randn(3, 5).double()}, Logit(0))
    options = Perturbation(steps=6)
    best = perturbation_curves(question, relevance, perturbation=options).area
    contributions = question.values * model.weight[0]
    for row in range(3):
        areas = []
        for order in itertools.permutations(range(5)):
            gone = torch.tensor([0.0, *contributions[row, list(order)].tolist()]).cumsum(0)
            back = torch.tensor([0.0, *contributions[row, list(order[::-1])].tolist()]).cumsum(0)
            areas.append(float((gone - back).mean()))
        assert math.isclose(float(best[row]), max(areas), rel_tol=1e-6)


def test_insertion_is_flipping_read_backwards():
    """Inserting the k most relevant features into nothing, as a loop does it."""
    torch.manual_seed(0)
    question, relevance = asked(Sums(), {"x": torch.rand(2, 5)})
    curves = perturbation_curves(question, relevance, perturbation=Perturbation(steps=6))
    for row in range(2):
        order = relevance[row].argsort(descending=True)
        for step in range(6):
            inserted = question.values[row, order[:step]].sum()
            torch.testing.assert_close(curves.mif[row, step], inserted)
            last = question.values[row, order[5 - step :]].sum()
            torch.testing.assert_close(curves.lif[row, step], last)
    area = (curves.mif - curves.lif).mean(1)
    torch.testing.assert_close(area, curves.area)


def test_what_comes_in_the_place_of_a_token():
    """Zero, the mean of the row's own embeddings, or another token's."""
    model = Words().eval()
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    question, _ = asked(model, {"input_ids": ids, "attention_mask": mask})
    table = model.table.weight.detach()
    zero = replacement(question, Perturbation())
    assert not zero.any()
    mean = replacement(question, Perturbation(replace="mean"))
    torch.testing.assert_close(mean[0, 2], table[1:4].mean(0))
    torch.testing.assert_close(mean[1, 0], table[4:6].mean(0))
    token = replacement(question, Perturbation(replace=7))
    torch.testing.assert_close(token[1, 1], table[7])
    with pytest.raises(InputError, match="no image to blur"):
        replacement(question, Perturbation(replace="blur"))


def test_what_comes_in_the_place_of_a_patch():
    """The mean of each channel, or the image behind a filter that keeps constants."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 6 * 6, 2))
    image = torch.rand(3, 2, 6, 6)
    question, _ = asked(model, {"input": image})
    mean = replacement(question, Perturbation(replace="mean"))
    torch.testing.assert_close(mean[1, 0], image[1, 0].mean().expand(6, 6))
    constant = torch.full_like(image, 0.3)
    torch.testing.assert_close(blurred(constant, 1.0), constant)
    blur = replacement(question, Perturbation(replace="blur"))
    assert 0 < float(blur.var()) < float(image.var())
    with pytest.raises(InputError, match="no tokens to replace by token 3"):
        replacement(question, Perturbation(replace=3))


def test_absolute_ranking_puts_both_signs_first():
    """Features that speak against the target count as much as those for it."""
    question, relevance = asked(Sums(), {"x": torch.tensor([[3.0, -5.0, 1.0, 2.0]])})
    options = Perturbation(steps=5, ranking="absolute")
    curves = perturbation_curves(question, relevance, perturbation=options)
    torch.testing.assert_close(curves.morf, torch.tensor([[1.0, 6.0, 3.0, 1.0, 0.0]]))


def test_probabilities_and_what_follows_from_them():
    """Comprehensiveness and sufficiency from their definitions, in probabilities."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).eval()
    question, relevance = asked(model, {"input": torch.randn(2, 4)})
    options = Perturbation(steps=5, score="probability")
    curves = perturbation_curves(question, relevance, perturbation=options)

    def probability(row: int, kept: Tensor) -> Tensor:
        changed = torch.zeros(4)
        changed[kept] = question.values[row, kept]
        return model(changed).softmax(-1)[question.target.index[row]]

    for row in range(2):
        order = relevance[row].argsort(descending=True)
        full = probability(row, order)
        without = torch.stack([full - probability(row, order[k:]) for k in (1, 2, 3)])
        alone = torch.stack([full - probability(row, order[:k]) for k in (1, 2, 3)])
        torch.testing.assert_close(curves.comprehensiveness[row], without.mean())
        torch.testing.assert_close(curves.sufficiency[row], alone.mean())
        every = torch.stack([full - probability(row, order[k:]) for k in range(5)])
        torch.testing.assert_close(curves.aopc[row], every.mean())
    contrast = question.subject.ask(question.inputs, attnlrp_fx.Contrast(0))
    with pytest.raises(InputError, match="has no probability"):
        perturbation_curves(contrast, relevance, perturbation=options)


def test_one_of_several_inputs():
    """The other inputs stay as they are; one has to be named."""
    inputs = {"x": torch.rand(2, 3), "y": torch.rand(2, 3)}

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            """Twice (batch, 3) → (batch, 3)."""
            return F.relu(x) + y

    explainer = attnlrp_fx.compile(Two().eval(), inputs, backend="eager")
    with pytest.raises(InputError, match="2 inputs have relevance"):
        Subject(explainer)
    with pytest.raises(InputError, match="'z' is not explained"):
        Subject(explainer, "z")
    question = Subject(explainer, "y").ask(inputs, Logit(1))
    options = Perturbation(steps=4)
    curves = perturbation_curves(question, torch.rand(2, 3), perturbation=options)
    torch.testing.assert_close(curves.morf[:, -1], inputs["x"][:, 1])


def test_errors():
    question, _ = asked(Sums(), {"x": torch.rand(2, 3)})
    with pytest.raises(InputError, match=r"relevance has shape \(2, 4\)"):
        perturbation_curves(question, torch.rand(2, 4))
    with pytest.raises(InputError, match="steps is 2"):
        Perturbation(steps=2)
    with pytest.raises(InputError, match="replace is 'noise'"):
        Perturbation(replace="noise")
