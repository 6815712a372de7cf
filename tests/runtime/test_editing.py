"""Conditions and interventions: masked relevance and changed values, in the same program."""

import pytest
import torch
from inside import example, explainer, model_of
from torch import nn

import attnlrp_fx
from attnlrp_fx import Ablate, Clamp, InputError, Keep, Neuron, Scale

SITE = "model.layers.0.mlp.act_fn"
HEADS = "model.layers.1.self_attn:heads"
EXPERTS = "model.layers.0.mlp.experts:experts"


@pytest.fixture(scope="module")
def made():
    return explainer("llama", SITE, "attention.heads", editable=True)


def test_without_edits_it_is_the_plain_explanation(made):
    found, plain = made(example("llama")), explainer("llama", audit=False)(example("llama"))
    torch.testing.assert_close(found.relevance, plain.relevance, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.outputs.logits, plain.outputs.logits)
    assert found.ledger.by_cause()["condition"] == 0
    assert abs(found.ledger.residual) < 1e-9
    assert not plain.latent


@pytest.mark.parametrize(("site", "kept"), [(SITE, [17, 30]), (HEADS, [2])])
def test_a_condition_masks_the_relevance_of_all_other_units(made, site, kept):
    plain = made(example("llama"))
    found = made(example("llama"), conditions={site: kept})
    table, expected = found.latent[site].unit_relevance, plain.latent[site].unit_relevance
    assert torch.equal(table[..., kept], expected[..., kept])
    others = [unit for unit in range(found.latent[site].units) if unit not in kept]
    assert not table[..., others].any()
    masked = float(expected[..., others].sum())
    assert found.ledger.by_cause()["condition"] == pytest.approx(masked, abs=1e-9)
    assert abs(found.ledger.residual) < 1e-9
    assert torch.equal(found.outputs.logits, plain.outputs.logits)


def test_relevance_through_units_and_through_the_others_adds_up(made):
    """Relevance is linear in the coefficients: what is kept, and what flows around, add up."""
    given = example("llama")

    def inputs(kept):
        return made(given, conditions={SITE: kept}).relevance["input_ids"]

    both = inputs(range(10)) + inputs(range(10, 48))
    torch.testing.assert_close(both, inputs(None) + inputs([]))
    assert not torch.allclose(inputs([]), inputs(None))


def test_a_condition_at_some_positions(made):
    found = made(example("llama"), conditions={SITE: Keep([3], positions=[1, -1])}).latent[SITE]
    where = found.relevance.nonzero()
    assert set(where[:, 1].tolist()) <= {1, 6}
    assert set(where[:, 2].tolist()) == {3}


@pytest.mark.parametrize(
    ("intervention", "change"),
    [
        (Ablate([4, 7]), lambda v: v.index_fill(2, torch.tensor([4, 7]), 0.0)),
        (Scale(-2.0, 5, positions=[2]), lambda v: v + torch.zeros_like(v).index_put(
            (torch.tensor([0, 1]), torch.tensor([2, 2]), torch.tensor([5, 5])), -3 * v[:, 2, 5]
        )),
        (Clamp(torch.tensor([1.5, -1.0]), [0, 1]), lambda v: torch.cat(
            [torch.tensor([1.5, -1.0], dtype=v.dtype).expand(*v.shape[:2], 2), v[..., 2:]], -1
        )),
    ],
)  # fmt: skip
def test_an_intervention_does_what_changing_the_model_does(made, intervention, change):
    given, compiled = example("llama"), made.compilations
    module = model_of("llama").get_submodule(SITE)
    handle = module.register_forward_hook(lambda module, args, output: change(output))
    expected = model_of("llama")(**given).logits
    handle.remove()
    found = made(given, interventions={SITE: intervention})
    torch.testing.assert_close(found.outputs.logits, expected, rtol=1e-5, atol=1e-6)
    assert abs(found.ledger.residual) < 1e-9
    assert made.compilations == compiled
    assert not torch.allclose(expected, made(given).outputs.logits)


def test_what_a_clamped_unit_holds_is_absorbed(made):
    found = made(example("llama"), interventions={HEADS: Clamp(0.5, 1)})
    held = float(found.latent[HEADS].unit_relevance[..., 1].sum())
    assert found.ledger.by_cause()["intervention"] == pytest.approx(held, abs=1e-9)
    assert held != 0


def mixture():
    return explainer("mixtral", "experts", "router", "model.layers.*.mlp", editable=True)


def test_experts_hold_what_each_contributes():
    given = example("mixtral")
    latent = mixture()(given).latent
    experts = latent["model.layers.0.mlp.experts:experts"]
    router, output = latent["model.layers.0.mlp.gate:router"], latent["model.layers.0.mlp"]
    table = torch.zeros(2 * 7, 5, dtype=torch.float64)
    for token in range(14):
        for slot in range(2):
            expert = int(experts.chosen[token, slot])
            table[token, expert] += experts.relevance[token, slot].sum()
    torch.testing.assert_close(experts.unit_relevance, table.unflatten(0, (2, 7)))
    total = output.relevance.sum(-1)
    torch.testing.assert_close(experts.unit_relevance.sum(-1), total)
    best = router.activation.topk(2).indices.sort(-1).values
    assert torch.equal(best, experts.chosen.sort(-1).values)
    assert router.unit_relevance.shape == (2, 7, 5)


def test_an_expert_is_ablated_wherever_it_was_chosen():
    plain = mixture()(example("mixtral"))
    chosen = plain.latent[EXPERTS].chosen == 2
    found = mixture()(example("mixtral"), interventions={EXPERTS: Ablate(2)})
    assert bool(chosen.any())
    assert not found.latent[EXPERTS].activation[chosen].any()
    kept = plain.latent[EXPERTS].activation[~chosen]
    torch.testing.assert_close(found.latent[EXPERTS].activation[~chosen], kept)
    assert abs(found.ledger.residual) < 1e-9
    router = found.latent["model.layers.0.mlp.gate:router"]
    condition = {router.name: Keep(None, positions=[0])}
    first = mixture()(example("mixtral"), conditions=condition).latent[router.name]
    assert not first.unit_relevance[:, 1:].any()


@pytest.mark.parametrize(
    ("site", "unit", "position", "feature"), [(SITE, 17, 2, None), (HEADS, 1, None, 3)]
)
def test_a_neuron_is_explained_like_a_logit(made, site, unit, position, feature):
    given = example("llama")
    found = made(given, target=Neuron(site, unit, position, feature))
    value = found.latent[site].activation
    expected = value[:, 2, 17] if site == SITE else value[:, 1, -1, 3]
    torch.testing.assert_close(found.target_value, expected)
    assert abs(found.ledger.residual) < 1e-9
    assert found.relevance["input_ids"].any()
    assert not found.relevance["input_ids"][:, 3:].any() or site == HEADS
    compiled = made.compilations
    made(given, target=Neuron(site, [2, 3], 1, feature))
    assert made.compilations == compiled


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({"conditions": {"model.layers.0.mlp.act": [1]}}, "near it are"),
        ({"conditions": {SITE: [48]}}, "it has 48"),
        ({"interventions": {SITE: Ablate(positions=[7])}}, "has no position 7"),
        ({"target": Neuron("nothing", 1)}, "near it are"),
        ({"target": Neuron(HEADS, 1)}, "which feature"),
    ],
)
def test_what_does_not_fit_is_named(made, edits, says):
    with pytest.raises(ValueError, match=r"what to do|why|which") as error:
        made(example("llama"), **edits)
    assert says in str(error.value)


def test_what_was_not_compiled_to_be_edited_cannot_be():
    x = torch.randn(2, 3)
    plain = attnlrp_fx.compile(nn.Linear(3, 2).eval(), x, backend="eager")
    with pytest.raises(InputError, match="editable=True"):
        plain(x, conditions={"0": [1]})
