"""What relevance is asked for is marked: floating inputs, and what tokens look up."""

import pytest
import torch
from rewriting import captured, copy_of, run, text
from torch import nn

from attnlrp_fx.errors import InputError
from attnlrp_fx.passes import NORMALISE, PassContext, mark_sources, run_passes


class Model(nn.Module):
    """Tokens, positions counted from a mask, and features."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 4)
        self.positions = nn.Embedding(9, 4)

    def forward(self, ids, mask, features):
        positions = mask.cumsum(1) - 1
        return self.words(ids) * 2 + self.positions(positions) + features


def inputs():
    torch.manual_seed(0)
    return {
        "ids": torch.randint(11, (2, 5)),
        "mask": torch.ones(2, 5, dtype=torch.int64),
        "features": torch.randn(2, 5, 4),
    }


def marked(model, given, explain=None):
    """Before, after, and what the pass says."""
    before = captured(model, given)
    run_passes(before, PassContext(), NORMALISE)
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(explain), (mark_sources,))
    return before, after, result


def test_golden():
    before, after, result = marked(Model(), inputs())
    assert result.changes == 2
    assert (
        text(before)
        == """\
cumsum = aten.cumsum(mask, 1)
sub = aten.sub(cumsum, 1)
embedding = aten.embedding(words_weight, ids)
mul = aten.mul(embedding, 2)
embedding_1 = aten.embedding(positions_weight, sub)
add = aten.add(mul, embedding_1)
add_1 = aten.add(add, features)
return [add_1]"""
    )
    assert (
        text(after)
        == """\
source = ops.source(features, name='features')
cumsum = aten.cumsum(mask, 1)
sub = aten.sub(cumsum, 1)
embedding = aten.embedding(words_weight, ids)
source_1 = ops.source(embedding, name='ids', ids=ids)
mul = aten.mul(source_1, 2)
embedding_1 = aten.embedding(positions_weight, sub)
add = aten.add(mul, embedding_1)
add_1 = aten.add(add, source)
return [add_1]"""
    )


def test_golden_one_of_the_inputs():
    _, after, result = marked(Model(), inputs(), ("ids",))
    assert result.changes == 1
    assert (
        text(after)
        == """\
cumsum = aten.cumsum(mask, 1)
sub = aten.sub(cumsum, 1)
embedding = aten.embedding(words_weight, ids)
source = ops.source(embedding, name='ids', ids=ids)
mul = aten.mul(source, 2)
embedding_1 = aten.embedding(positions_weight, sub)
add = aten.add(mul, embedding_1)
add_1 = aten.add(add, features)
return [add_1]"""
    )


def test_meaning_is_unchanged():
    before, after, _ = marked(Model(), inputs())
    given = inputs()
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


class Mask(nn.Module):
    """A floating input that only decides, never enters the computation."""

    def forward(self, x, mask):
        return torch.where(mask > 0, x, 0.0)


def test_near_miss_of_a_floating_mask():
    given = {"x": torch.randn(2, 3), "mask": torch.ones(2, 3)}
    _, after, result = marked(Mask(), given)
    assert result.changes == 1
    assert "name='mask'" not in text(after)


class Rows(nn.Module):
    """A table that is indexed by rows rather than by an embedding, with shifted indices."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 4))

    def forward(self, ids):
        return self.table[ids.reshape(-1) + 1].tanh()


def test_indexed_table_with_moved_indices():
    _, after, _ = marked(Rows(), {"ids": torch.randint(10, (2, 5))})
    assert "name='ids', ids=add)" in text(after)


class Two(nn.Module):
    def forward(self, x, other):
        return x * 2 + other


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_example_for_two_inputs(dynamic):
    """The example may be one tensor, the inputs are two."""
    tensor = torch.randn(2, 3)
    graph = captured(Two(), {"x": tensor, "other": tensor}, dynamic=dynamic)
    (result,) = run_passes(graph, PassContext(), (mark_sources,))
    assert result.changes == 2


class Computed(nn.Module):
    """What is looked up in is no parameter."""

    def forward(self, x, ids):
        return x[ids]


def test_near_miss_of_a_computed_table():
    given = {"x": torch.randn(7, 3), "ids": torch.randint(7, (4,))}
    _, after, result = marked(Computed(), given)
    assert result.changes == 1
    assert text(after).count("ops.source") == 1


def test_no_such_input():
    with pytest.raises(InputError, match="there is no input 'tokens' to explain") as error:
        marked(Model(), inputs(), ("tokens",))
    assert "ids, mask, features" in str(error.value)


@pytest.mark.parametrize("name", ["mask"])
def test_input_that_relevance_cannot_reach(name):
    with pytest.raises(InputError, match=f"relevance cannot reach input '{name}'"):
        marked(Model(), inputs(), (name,))


class Count(nn.Module):
    def forward(self, ids):
        return (ids * 2).float()


def test_nothing_to_explain():
    with pytest.raises(InputError, match="nothing to explain"):
        marked(Count(), {"ids": torch.ones(2, 3, dtype=torch.int64)})


class Frozen(nn.Module):
    @torch.no_grad()
    def forward(self, features):
        return features.sin() * 2


def test_a_model_without_gradients_says_so():
    with pytest.raises(InputError, match="nothing to explain") as caught:
        marked(Frozen(), {"features": torch.randn(2, 3)})
    assert "torch.no_grad" in caught.value.why
    assert "features.sin() * 2" in caught.value.where
    assert "__wrapped__" in caught.value.remedy
