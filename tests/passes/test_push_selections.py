"""The part that is read: golden texts, what stays whole, numbers, rows, attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, copy_of, prepared, relevance, run, text
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import attnlrp_fx
from attnlrp_fx.passes import ASSIGN, NORMALISE, PIPELINE, RAISE, PassContext, run_passes
from attnlrp_fx.passes.push_selections import push_selections

DOUBLE = torch.float64
WITHOUT = (*NORMALISE, *RAISE, *(p for p in ASSIGN if p is not push_selections))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def pushed(function: Callable[..., Any], x: Tensor, **parameters: Tensor) -> Any:
    """A graph before the pass and after it, and what the pass did."""
    before = prepared(Written(function, **parameters), {"x": x}, dynamic=True)
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (push_selections,))
    return before, after, result


def same(before: Any, after: Any, x: Tensor) -> None:
    """Outputs and relevance are the same, at other sizes too."""
    for given in (x, randn(x.shape[0] + 1, x.shape[1] + 2, *x.shape[2:], seed=1)):
        (expected,), (found,) = run(before, {"x": given}), run(after, {"x": given})
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        seed = randn(*expected.shape, seed=2)
        torch.testing.assert_close(
            relevance(after, {"x": given}, seed)["x"],
            relevance(before, {"x": given}, seed)["x"],
            rtol=1e-12,
            atol=1e-12,
        )


W = {"w": randn(6, 4, seed=3), "v": randn(4, 6, seed=4)}


def test_golden_first():
    """A layer, an activation and a norm of one token."""

    def first(m, x):
        return F.linear(F.layer_norm(F.gelu(F.linear(x, m.w)), (6,)), m.v)[:, 0]

    before, after, result = pushed(first, randn(2, 5, 4), **W)
    assert result.changes == 4
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
select = aten.select(source, 1, 0)
unsqueeze = aten.unsqueeze(select, 1)
linear = aten.linear(unsqueeze, w)
gelu = aten.gelu(linear)
layer_norm = aten.layer_norm(gelu, [6], None, None, 1e-05, False)
linear_1 = aten.linear(layer_norm, v)
select_1 = aten.select(linear_1, 1, 0)
return [select_1]"""
    )
    same(before, after, randn(2, 5, 4))


def test_what_others_read_stays_whole():
    """A value that is also read whole is computed whole, once; what follows is not."""

    def both(m, x):
        h = F.linear(x, m.w)
        return torch.tanh(F.gelu(h))[:, 0] + h.mean(1)

    before, after, result = pushed(both, randn(2, 5, 4), **W)
    assert result.changes == 2
    shapes = {n.name: tuple(n.meta["val"].shape[1:]) for n in after.graph.nodes if "val" in n.meta}
    assert len(shapes["linear"]) == 2
    assert shapes["linear"][0] != 1
    assert shapes["gelu"] == shapes["tanh"] == (1, 6)
    same(before, after, randn(2, 5, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.gelu(x)[:, -1],
        lambda m, x: F.gelu(x)[:, 1:2],
        lambda m, x: F.gelu(x)[:, -1:],
        lambda m, x: (F.linear(x, m.w) + x.repeat(1, 1, 2)[..., :6])[:, 2],
        lambda m, x: (x.transpose(1, 2) * 2).transpose(1, 2)[:, 0],
        lambda m, x: torch.tanh(x).permute(2, 0, 1)[..., 0].T,
        lambda m, x: torch.tanh(x).unsqueeze(1)[:, :, 0],
        lambda m, x: torch.tanh(x).view(*x.shape[:2], 2, 2)[:, 0],
        lambda m, x: torch.tanh(x)[..., 1:3][:, 0],
        lambda m, x: torch.cat([F.relu(x), F.gelu(x)], -1)[:, 0],
        lambda m, x: (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))[:, 0],
        lambda m, x: torch.softmax(F.linear(x, m.w), -1)[:, 0],
        lambda m, x: (F.gelu(x) @ m.w.T)[:, 0],
        lambda m, x: (F.gelu(x) + x.mean(1, keepdim=True))[:, 0],
    ],
)
def test_what_a_selection_goes_through(function):
    x = randn(2, 5, 4)
    before, after, result = pushed(function, x, **W)
    assert result.changes >= 1
    same(before, after, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x[:, 0],
        lambda m, x: F.gelu(x)[:, 1:3],
        lambda m, x: F.gelu(x)[:, ::2],
        lambda m, x: torch.softmax(x, 1)[:, 0],
        lambda m, x: x.cumsum(1)[:, 0],
        lambda m, x: x.mean(1),
        lambda m, x: F.gelu(x)[0],
        lambda m, x: x.flip(1)[:, 0],
        lambda m, x: torch.cat([x, x], 1)[:, 0],
    ],
)
def test_what_it_does_not_go_through(function):
    """Ops that mix places, selections of several, and of the batch."""
    x = randn(2, 5, 4)
    before = prepared(Written(function), {"x": x})
    after = copy_of(before)
    run_passes(after, PassContext(), (push_selections,))
    kept = [n.meta["val"].shape for n in before.graph.nodes if "val" in n.meta]
    whole = [n.meta["val"].shape for n in after.graph.nodes if "val" in n.meta]
    assert [s for s in whole if s.numel() > 8] == [s for s in kept if s.numel() > 8]
    torch.testing.assert_close(run(after, {"x": x}), run(before, {"x": x}))


def test_another_place_wins_nothing():
    """Two places of one value: it is computed whole."""

    def two(m, x):
        h = F.gelu(x)
        return h[:, 0] + h[:, 1]

    _, _, result = pushed(two, randn(2, 5, 4))
    assert result.changes == 0


def test_a_place_for_each_row():
    """The last token that is no padding: where it is, is computed first."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            """(batch, length) → (batch, 3)."""
            scores = self.head(F.gelu(self.table(ids)))
            places = torch.arange(ids.shape[1])
            last = (places * (ids != 0).to(places.dtype)).argmax(-1)
            return scores[torch.arange(ids.shape[0]), last]

    model = Last().double().eval()
    ids = torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 7, 8]])
    plain, sliced = (
        attnlrp_fx.compile(model, {"ids": ids[:2]}, backend="eager", passes=passes)
        for passes in (WITHOUT, PIPELINE)
    )
    assert next(r.changes for r in sliced.report().passes if r.name == "push_selections") == 2
    for given in (ids, ids[:, :3]):
        expected, found = plain(ids=given), sliced(ids=given)
        torch.testing.assert_close(found.outputs, expected.outputs)
        torch.testing.assert_close(found.relevance["ids"], expected.relevance["ids"])
    assert sliced.cost(ids=ids).flops < 0.5 * plain.cost(ids=ids).flops


def attention(causal: bool, place: int) -> Callable[..., Tensor]:
    def function(m: Any, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, w).unflatten(-1, (2, 2)).transpose(1, 2) for w in (m.a, m.b, m.c))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return (x + F.linear(y.transpose(1, 2).flatten(2), m.d))[:, place]

    return function


@pytest.mark.parametrize("place", [0, 2, -1])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal, place):
    """One query; keys and values whole; of a causal mask the query's own row."""
    weights = {name: randn(4, 4, seed=i) for i, name in enumerate("abcd")}
    x = randn(2, 5, 4)
    before, after, result = pushed(attention(causal, place), x, **weights)
    assert result.changes >= 5
    (node,) = [n for n in after.graph.nodes if "scaled_dot_product" in str(n.target)]
    query, key = (arg.meta["val"].shape[2] for arg in node.args[:2])
    assert query == 1
    assert key != 1
    same(before, after, x)


def test_causal_attention_of_fewer_queries_than_keys():
    """The last query is not the last key's then: left whole."""

    def fewer(m: Any, x: Tensor) -> Tensor:
        h = F.linear(x, m.a).unflatten(-1, (2, 2)).transpose(1, 2)
        return F.scaled_dot_product_attention(h[:, :, :3], h, h, is_causal=True)[:, :, -1]

    x = randn(2, 5, 4)
    before, after, result = pushed(fewer, x, a=randn(4, 4))
    assert result.changes == 0
    same(before, after, x)


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(
    vocab_size=40, intermediate_size=32, num_key_value_heads=1, pad_token_id=0, **SMALL
)
IDS = torch.tensor([[5, 6, 7, 8, 9], [7, 8, 9, 0, 0], [9, 8, 7, 6, 0]])
TEXTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long()}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "encoder": (
        lambda: BertForSequenceClassification(
            BertConfig(vocab_size=40, intermediate_size=32, **SMALL)
        ),
        TEXTS,
    ),
    "decoder that classifies": (lambda: LlamaForSequenceClassification(LLAMA), TEXTS),
    "decoder, last logit": (lambda: LlamaForCausalLM(LLAMA), {**TEXTS, "logits_to_keep": 1}),
    "images": (
        lambda: ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=2, intermediate_size=32, **SMALL)
        ),
        {"pixel_values": randn(3, 3, 8, 8)},
    ),
}


@pytest.mark.parametrize(
    ("name", "composite"),
    [
        ("encoder", "attnlrp"),
        ("decoder that classifies", "attnlrp"),
        ("decoder, last logit", "attnlrp-vision"),
        ("images", "gradient"),
    ],
)
def test_models(name, composite):
    """The last layer works on one position; relevance is that of the whole."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make().double().eval()
    plain, sliced = (
        attnlrp_fx.compile(model, inputs, backend="eager", composite=composite, passes=passes)
        for passes in (WITHOUT, PIPELINE)
    )
    given = {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
    expected, found = plain(given), sliced(given)
    for key, value in expected.relevance.items():
        torch.testing.assert_close(found.relevance[key], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.outputs.logits, expected.outputs.logits)
    assert sliced.cost(given).flops < 0.8 * plain.cost(given).flops
    rows = {key: value[:2] for key, value in given.items()}  # another batch, no compilation
    torch.testing.assert_close(sliced(rows).outputs.logits, expected.outputs.logits[:2])
    assert sliced.compilations == 1
