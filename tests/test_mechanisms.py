"""Whole mechanisms of real models against the paper's equations, worked out by hand.

Single ops are in test_rules.py, recurrences and routers of every make in tests/passes.
"""

import pytest
import references as ref
import torch
from torch import Tensor, nn
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import attnlrp_fx
from attnlrp_fx import Logit
from attnlrp_fx.passes import PIPELINE, drop_assertions, promote_casts

F64 = torch.float64
EXACT = (drop_assertions, promote_casts, *PIPELINE)


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp"])
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_mixture_of_experts(composite: str, implementation: str) -> None:
    config = MixtralConfig(
        hidden_size=6, intermediate_size=5, num_local_experts=4, num_experts_per_tok=2
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    block = MixtralSparseMoeBlock(config).to(F64).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    parameters = {
        "router": block.gate.weight.detach(),
        "gate_up": block.experts.gate_up_proj.detach(),
        "down": block.experts.down_proj.detach(),
    }
    explainer = attnlrp_fx.compile(
        block, torch.randn(2, 3, 6, dtype=F64), composite=composite, backend="eager", passes=EXACT
    )
    x = torch.randn(3, 5, 6, dtype=F64)
    token, feature = 2, 4
    explanation = explainer(x, target=Logit(feature, position=token))
    config._experts_implementation = "eager"
    torch.testing.assert_close(  # the router's own softmax is in float32
        explanation.target_value, block(x)[:, token, feature].detach(), rtol=1e-5, atol=1e-6
    )
    for row in range(3):
        relevance = torch.zeros(6, dtype=F64)
        relevance[feature] = explanation.target_value[row]
        expected = ref.mixture_of_experts(
            x[row, token], parameters, 2, relevance, cp=composite == "cp-lrp"
        )
        (found,) = explanation.relevance.values()
        torch.testing.assert_close(found[row, token], expected, rtol=1e-9, atol=1e-12)
        assert torch.count_nonzero(found[row]) == 6


class TwoTowers(nn.Module):
    """Contrastive: the scaled cosine of a text's and an image's embedding, for all pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(7, 5, bias=False), nn.Linear(9, 5, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        of_text, of_image = self.text(text), self.image(image)
        of_text = of_text / of_text.norm(p=2, dim=-1, keepdim=True)
        of_image = of_image / of_image.norm(p=2, dim=-1, keepdim=True)
        return of_text @ of_image.t() * self.scale.exp()


def test_contrastive_logits() -> None:
    """Norms are constants (eq. 19), the cosine is a matrix product (eq. 15): half to each side."""
    torch.manual_seed(0)
    model = TwoTowers().to(F64).eval()
    example = {"text": torch.randn(2, 7, dtype=F64), "image": torch.randn(3, 9, dtype=F64)}
    explainer = attnlrp_fx.compile(model, example, backend="eager")
    inputs = {"text": torch.randn(4, 7, dtype=F64), "image": torch.randn(4, 9, dtype=F64)}
    explanation = explainer(**inputs, target=Logit([0, 3, 1, 1]))
    logits = model(**inputs).detach()
    embeddings = {name: getattr(model, name)(x).detach() for name, x in inputs.items()}
    units = {name: e / e.norm(dim=-1, keepdim=True) for name, e in embeddings.items()}
    seed = torch.zeros(4, 4, dtype=F64)
    seed[range(4), [0, 3, 1, 1]] = logits[range(4), [0, 3, 1, 1]]
    of_text, of_image = ref.matmul(units["text"], units["image"].T.contiguous(), seed)
    for name, received in (("text", of_text), ("image", of_image.T)):
        weight = getattr(model, name).weight.detach()
        expected = ref.rows(
            lambda x, r, w=weight: ref.linear(x, w, None, r)[0], inputs[name], received
        )
        torch.testing.assert_close(explanation.relevance[name], expected, rtol=1e-9, atol=1e-12)
        total = explanation.relevance[name].sum()
        torch.testing.assert_close(total, explanation.target_value.sum() / 2, rtol=1e-9, atol=0)


class CrossAttention(nn.Module):
    """A decoder's step: queries from its own words, keys and values from the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.targets = nn.Embedding(11, 4), nn.Embedding(13, 4)
        self.encoder, self.query, self.key, self.value, self.out = (
            nn.Linear(4, 4, bias=False) for _ in range(5)
        )
        self.bias = nn.Parameter(torch.randn(9, 9))

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        memory, own = self.encoder(self.words(input_ids)), self.targets(decoder_input_ids)
        scores = self.query(own) @ self.key(memory).transpose(1, 2)
        scores = scores + self.bias[: scores.shape[1], : scores.shape[2]]
        mixed = scores.softmax(-1) @ self.value(memory)
        return (own + self.out(mixed)) @ self.targets.weight.T * 0.5


def test_cross_attention_with_a_relative_bias_and_tied_scaled_logits() -> None:
    """Relevance of encoder and decoder tokens in one explanation, by eqs. 8, 13 and 15."""
    torch.manual_seed(0)
    model = CrossAttention().to(F64).eval()
    inputs = {
        "input_ids": torch.tensor([[3, 1, 4, 1, 5, 9]]),
        "decoder_input_ids": torch.tensor([[2, 7, 1]]),
    }
    explainer = attnlrp_fx.compile(model, inputs, backend="eager")
    explanation = explainer(**inputs, target=Logit(8))
    p = {name: value.detach() for name, value in model.named_parameters()}
    words, own = p["words.weight"][inputs["input_ids"][0]], p["targets.weight"][[2, 7, 1]]
    memory = words @ p["encoder.weight"].T
    q, k, v = own @ p["query.weight"].T, memory @ p["key.weight"].T, memory @ p["value.weight"].T
    bias = p["bias"][:3, :6]
    mixed = torch.softmax(q @ k.T + bias, -1) @ v
    hidden = own + mixed @ p["out.weight"].T
    seed = torch.zeros(3, 13, dtype=F64)
    seed[2, 8] = (hidden @ p["targets.weight"].T * 0.5)[2, 8]

    def back(x: Tensor, weight: Tensor, received: Tensor) -> Tensor:
        return ref.rows(lambda a, r: ref.linear(a, weight, None, r)[0], x, received)

    of_hidden = back(hidden, p["targets.weight"] * 0.5, seed)
    of_own, of_out = ref.add(own, mixed @ p["out.weight"].T, of_hidden)
    of_mixed = back(mixed, p["out.weight"], of_out)
    of_q, of_k, of_v = ref.attention(q, k, v, of_mixed, 1.0, bias)
    of_own = of_own + back(own, p["query.weight"], of_q)
    of_memory = back(memory, p["key.weight"], of_k) + back(memory, p["value.weight"], of_v)
    of_words = back(words, p["encoder.weight"], of_memory)
    for name, expected in (("input_ids", of_words), ("decoder_input_ids", of_own)):
        found = explanation.relevance[name][0]
        torch.testing.assert_close(found, expected.sum(-1), rtol=1e-9, atol=1e-12)
