"""A bag of each row's embeddings is their sum; other bags stay."""

import pytest
import torch
from rewriting import captured, copy_of, run, text
from torch import nn

import attnlrp_fx
from attnlrp_fx.errors import InputError
from attnlrp_fx.passes import PassContext, lower_bags


class Bags(nn.Module):
    def __init__(self, mode="mean", **options):
        super().__init__()
        torch.manual_seed(0)
        self.bags = nn.EmbeddingBag(11, 4, mode=mode, dtype=torch.float64, **options)

    def forward(self, ids, *offsets):
        return self.bags(ids, *offsets)


IDS = torch.tensor([[3, 7, 1, 7, 5], [2, 2, 9, 4, 6], [8, 0, 3, 1, 1]])


def lowered(model, dynamic=False):
    before = captured(model, {"ids": IDS}, dynamic=dynamic)
    after = copy_of(before)
    return before, after, lower_bags(after, PassContext())


def test_golden():
    _, after, result = lowered(Bags())
    assert result.changes == 1
    assert (
        text(after)
        == """\
embedding = aten.embedding(bags_weight, ids)
mean = aten.mean(embedding, [1])
return [mean]"""
    )


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_meaning_is_unchanged(mode, dynamic):
    before, after, result = lowered(Bags(mode), dynamic)
    assert result.changes == 1
    torch.testing.assert_close(run(after, {"ids": IDS}), run(before, {"ids": IDS}))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Bags("max"), "maximum"), (Bags("sum", padding_idx=1), "padded")],
)
def test_near_miss(model, reason):
    before, after, result = lowered(model)
    assert result.changes == 0
    assert reason in result.near_misses[0]
    assert text(after) == text(before)


def test_each_index_has_its_rows_relevance():
    model = Bags("sum").eval()
    explainer = attnlrp_fx.compile(model, {"ids": IDS[:2]}, backend="eager", target=1)
    found = explainer(ids=IDS).relevance["ids"]
    torch.testing.assert_close(found, model.bags.weight[IDS, 1].detach())


def test_bags_that_stay_say_so():
    with pytest.raises(InputError, match="nothing to explain"):
        attnlrp_fx.compile(Bags("max").eval(), {"ids": IDS}, backend="eager")


class Normalised(nn.Module):
    """Bags beside an op that capture decomposes, with other look-ups or without."""

    def __init__(self, has_words):
        super().__init__()
        torch.manual_seed(0)
        self.bags, self.norm = nn.EmbeddingBag(11, 4, mode="sum"), nn.BatchNorm1d(4)
        self.words = nn.Embedding(11, 4) if has_words else None

    def forward(self, ids):
        x = self.bags(ids)
        return self.norm(x if self.words is None else x + self.words(ids[:, 0]))


@pytest.mark.parametrize("has_words", [False, True])
def test_bags_before_an_op_that_is_decomposed(has_words):
    """Decomposing the one op must not take the bags apart, and bags are look-ups, too."""
    model = Normalised(has_words).double().eval()
    explainer = attnlrp_fx.compile(model, {"ids": IDS[:2]}, backend="eager", target=1)
    found = explainer(ids=IDS).relevance["ids"]
    expected = model.bags.weight[IDS, 1].detach() / (1 + model.norm.eps) ** 0.5
    if has_words:
        expected[:, 0] += model.words.weight[IDS[:, 0], 1].detach() / (1 + model.norm.eps) ** 0.5
    torch.testing.assert_close(found, expected)
