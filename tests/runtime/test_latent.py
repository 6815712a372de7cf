"""Latent relevance: what holds of it on every model."""

import sys
from pathlib import Path

import pytest
import torch
from inside import example, explainer, model_of
from models import BY_NAME, tokens
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import attnlrp_fx
from attnlrp_fx import Contrast, InputError, Logit, Neuron

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import peer

ROLES = ["residual", "attention.heads", "mlp.neurons"]


def llama():
    return explainer("llama", *ROLES, "input:**.o_proj", "model.layers.*.mlp.act_fn")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_cut_of_the_residual_stream_and_what_is_absorbed_behind_it_is_the_target(name):
    made = llama() if name == "llama" else explainer(name, *ROLES)
    explanation = made(example(name))
    order = {node.name: i for i, node in enumerate(made.rewritten.graph.nodes)}
    markers = {one.site.name: one.marker for one in made._running.latent}
    target = float(explanation.target_value.sum())
    cuts = explanation.latent.of_role("residual")
    assert len(cuts) == 4
    for cut in cuts:
        behind = [e for e in explanation.ledger.entries if e.node == "target"]
        behind += [
            e
            for e in explanation.ledger.entries
            if e.node != "target" and order[e.node] > order[markers[cut.name]]
        ]
        absorbed = sum(entry.absorbed for entry in behind)
        assert float(cut.relevance.sum()) + absorbed == pytest.approx(target, abs=1e-9)


def test_each_heads_relevance_is_that_of_its_part_of_the_attentions_output():
    latent = llama()(example("llama")).latent
    for layer in (0, 1):
        heads = latent[f"model.layers.{layer}.self_attn:heads"]
        read = latent[f"input:model.layers.{layer}.self_attn.o_proj"]
        parts = read.relevance.unflatten(-1, (4, 8)).sum(-1)
        assert heads.dims == ("batch", "head", "position", "feature")
        torch.testing.assert_close(heads.unit_relevance, parts)
        assert float(parts.abs().max()) > 1e-3


def gradients(model, given, modules, scalar, wanted=None):
    """By module its output, and the gradient of a scalar of the outputs with respect to it.

    If a module is wanted, Gradient×Input of its neuron 11 at position 3 instead.
    """
    kept = {}

    def keep(path):
        def hook(module, args, output):
            value = output[0] if isinstance(output, tuple) else output
            value.retain_grad()
            kept[path] = value

        return hook

    handles = [model.get_submodule(p).register_forward_hook(keep(p)) for p in modules]
    embeds = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    rest = {name: value for name, value in given.items() if name != "input_ids"}
    outputs = model(inputs_embeds=embeds, **rest)
    for handle in handles:
        handle.remove()
    if wanted is not None:
        (gradient,) = torch.autograd.grad(kept[wanted][:, 3, 11].sum(), embeds)
        return (embeds * gradient).sum(-1)
    scalar(outputs).backward()
    return {path: (value.detach(), value.grad) for path, value in kept.items()}


def highest(outputs):
    return outputs.logits[:, -1].max(-1).values.sum()


def test_it_is_activation_times_gradient_of_an_lxt_style_peer():
    paths = [f"model.layers.{i}{part}" for i in (0, 1) for part in ("", ".mlp.act_fn")]
    model, given = model_of("llama", torch.float32), BY_NAME["llama"].example()
    made = attnlrp_fx.compile(model, given, backend="eager", latent=paths)
    latent = made(given).latent
    with peer.patched(model):
        expected = gradients(model, given, paths, highest)
    for path, (value, coefficient) in expected.items():
        relevance = value * coefficient
        difference = (latent[path].relevance - relevance).abs().max() / relevance.abs().max()
        assert difference < 1e-5


def test_several_targets_share_the_activation_and_have_relevance_of_their_own():
    given = example("llama")
    both = llama()(given, target=[Logit(3), Contrast(5, against=7)])
    name = "model.layers.0.mlp.act_fn"
    first, second = (one.latent[name] for one in both)
    assert first.activation is second.activation
    alone = llama()(given, target=Contrast(5, against=7)).latent[name]
    assert torch.equal(second.relevance, alone.relevance)
    assert not torch.equal(first.relevance, second.relevance)


def test_rows_of_a_padded_batch_are_those_of_the_rows_alone():
    given = example("llama", 2, 7)
    given["attention_mask"][1, 4:] = 0
    short = {name: value[1:, :4] for name, value in given.items()}
    row, alone = llama()(given).row(1).latent, llama()(short).latent
    for name, latent in alone.items():
        assert row[name].activation.shape == latent.activation.shape
        torch.testing.assert_close(row[name].relevance, latent.relevance, rtol=1e-6, atol=1e-8)


def test_under_target_slice_a_value_holds_the_targets_position_and_says_so():
    given = example("llama", 2, 7)
    given["attention_mask"][1, 5:] = 0
    made = explainer("llama", "mlp.neurons", "residual", target_slice=True, audit=False)
    sliced, whole = made(given).latent, llama()(given).latent
    name = "model.layers.1.mlp:neurons"
    assert sliced[name].positions.tolist() == [[6], [4]]
    for row, position in enumerate((6, 4)):
        expected = whole[name].relevance[row, position]
        torch.testing.assert_close(sliced[name].relevance[row, 0], expected)
    assert sliced["model.layers.0"].positions is None
    flow = made(given).flow().values["model.layers.1"]
    torch.testing.assert_close(flow, whole["model.layers.1"].relevance.sum(-1))


def test_with_the_gradient_composite_it_is_gradient_times_activation():
    """Law 2, inside of the model, where blocks that are alike share one program."""
    config = GPT2Config(vocab_size=19, n_embd=8, n_head=2, n_layer=6)
    model, given = GPT2LMHeadModel(config).double().eval(), tokens(2, 5)
    given["input_ids"] %= 19
    made = attnlrp_fx.compile(
        model,
        given,
        composite="gradient",
        backend="eager",
        latent=["residual", "mlp.neurons", "transformer.h.*.attn.c_attn"],
        memory="small",
        editable=True,
    )
    assert made.report().compilations[0].distinct == 3
    latent = made(given).latent
    paths = [
        f"transformer.h.{i}{part}" for i in range(6) for part in ("", ".mlp.act", ".attn.c_attn")
    ]
    assert len(latent) == 6 * 4
    for path, (value, gradient) in gradients(model, given, paths, highest).items():
        torch.testing.assert_close(latent[path].activation, value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(latent[path].relevance, value * gradient, rtol=1e-9, atol=1e-12)
    neuron = made(given, target=Neuron(paths[4], 11, 3))
    kept = gradients(model, given, [paths[4]], highest, wanted=paths[4])
    torch.testing.assert_close(neuron.relevance["input_ids"], kept, rtol=1e-9, atol=1e-12)


def test_inductor_gives_the_same():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4)).double().eval()
    x = torch.randn(3, 5, dtype=torch.float64)
    options = {"latent": ["mlp.neurons"], "editable": True}
    fast, slow = (
        attnlrp_fx.compile(model, x, backend=backend, **options)
        for backend in ("inductor", "eager")
    )
    for edits in (
        {},
        {"conditions": {"1": [2, 3]}},
        {"interventions": {"1": attnlrp_fx.Ablate(4)}},
    ):
        a, b = fast(x[:2], **edits).latent["1"], slow(x[:2], **edits).latent["1"]
        torch.testing.assert_close(a.relevance, b.relevance)
        torch.testing.assert_close(a.activation, b.activation)


def test_attention_weights_have_relevance_where_attention_is_written_out():
    given = example("llama")
    made = explainer("llama", "attention.weights", "attention.heads", audit=False)
    explanation = made(given)
    torch.testing.assert_close(
        explanation.relevance["input_ids"], llama()(given).relevance["input_ids"]
    )
    weights = explanation.latent["model.layers.1.self_attn:weights"]
    heads = explanation.latent["model.layers.1.self_attn:heads"]
    assert weights.dims == ("batch", "head", "query", "key")
    torch.testing.assert_close(weights.activation.sum(-1), torch.ones(2, 4, 7).double())
    assert not weights.activation.triu(1).any()
    torch.testing.assert_close(2 * weights.relevance.sum(-1), heads.relevance.sum(-1))


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ("mlp.neuron", "near it are: 'mlp.neurons'"),
        ("model.layers.*.mlp.act_fm", "model.layers.0.mlp.act_fn"),
        ("model.rotary_emb", "it depends on no explained input"),
        ("experts", "nothing in this model plays the role"),
    ],
)
def test_what_is_not_there_is_named(wanted, says):
    with pytest.raises(InputError, match="what to do") as error:
        explainer("llama", wanted)
    assert says in str(error.value)


def test_a_value_that_a_rule_holds_constant_is_an_error():
    with pytest.raises(InputError, match="relevance never reaches") as error:
        explainer("llama", "model.layers.*.mlp.act_fn", composite="cp-lrp")
    assert "Constant()" in str(error.value)


def test_an_unknown_name_is_an_error_that_lists_near_ones():
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.act_fn"):
        llama()(example("llama")).latent["model.layers.0.mlp.act"]


def test_calls_of_a_shared_module_are_told_apart():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.layer(torch.tanh(self.layer(x)))))

    x = torch.randn(2, 4)
    made = attnlrp_fx.compile(Shared().eval(), x, backend="eager", latent=["layer", "tanh"])
    assert list(made(x).latent) == ["layer", "tanh", "layer@1"]
    again = attnlrp_fx.compile(Shared().eval(), x, backend="eager", latent=["layer@1"])
    assert list(again(x).latent) == ["layer@1"]


def test_channels_of_a_convolution_are_units():
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)).eval()
    x = torch.randn(2, 2, 4, 4)
    latent = attnlrp_fx.compile(model, x, backend="eager", latent=["1"])(x).latent["1"]
    assert latent.dims == ("batch", "channel", "position", "position")
    expected = latent.relevance.flatten(2).mT
    torch.testing.assert_close(latent.unit_relevance, expected)
