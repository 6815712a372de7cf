"""Perturbation curves against loops, on models whose right answer is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import InputError, Logit, Perturbation, perturbation_curves


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


def explained(model: nn.Module, inputs: dict[str, Tensor], target: object = None):
    explainer = attnlrp_fx.compile(model.eval(), inputs, backend="eager")
    return explainer, explainer(inputs, target=target)


def test_a_sum_is_taken_apart_in_order():
    """Of a sum, MoRF takes the largest feature first and LeRF the smallest."""
    inputs = {"x": torch.tensor([[3.0, 1.0, 2.0], [0.0, -4.0, 8.0]])}
    explainer, explanation = explained(Sums(), inputs)
    curves = perturbation_curves(explainer, inputs, explanation, perturbation=Perturbation(steps=4))
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
    explainer, explanation = explained(model, inputs)
    curves = perturbation_curves(
        explainer, inputs, explanation, perturbation=Perturbation(steps=6, rows=3)
    )
    relevance = explanation.relevance["input_ids"]
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
    explainer, explanation = explained(model, inputs, Logit(0))
    curves = perturbation_curves(
        explainer, inputs, explanation, perturbation=Perturbation(steps=7, patch=2)
    )
    relevance = explanation.relevance["input"].sum(1)
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
    explainer, explanation = explained(Sums(), inputs)
    assert explanation.target_index is not None
    assert explanation.target_index.tolist() == [0]
    curves = perturbation_curves(explainer, inputs, explanation, perturbation=Perturbation(steps=4))
    torch.testing.assert_close(curves.morf, torch.tensor([[-49.0, -109.0, -110.0, 0.0]]))


def test_random_relevance_has_no_area():
    """Over many rows, an order that knows nothing gains nothing; the right one does."""
    torch.manual_seed(0)
    inputs = {"x": torch.rand(400, 6)}
    explainer, explanation = explained(Sums(), inputs)
    known = perturbation_curves(explainer, inputs, explanation).area
    explanation.relevance["x"] = torch.rand(400, 6)
    blind = perturbation_curves(explainer, inputs, explanation).area
    assert abs(float(blind.mean())) < 0.05
    assert float(known.mean()) > 0.5


def test_errors():
    inputs = {"x": torch.rand(2, 3), "y": torch.rand(2, 3)}

    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            """Twice (batch, 3) → (batch, 3)."""
            return F.relu(x) + y

    explainer, explanation = explained(Two(), inputs)
    with pytest.raises(InputError, match="2 inputs have relevance"):
        perturbation_curves(explainer, inputs, explanation)
    with pytest.raises(InputError, match="'z' has no relevance"):
        perturbation_curves(explainer, inputs, explanation, input="z")
    assert perturbation_curves(explainer, inputs, explanation, input="y").morf.shape == (2, 16)
    with pytest.raises(InputError, match="steps is 1"):
        Perturbation(steps=1)
    with pytest.raises(InputError, match="nothing of it can be zero"):
        explainer.target_values(inputs, keep={"z": torch.ones(2, 3).bool()})
