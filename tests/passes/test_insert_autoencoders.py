"""insert_autoencoders: features of a sparse autoencoder as latent values."""

import pytest
import torch
from torch import nn

import attnlrp_fx
from attnlrp_fx import SAE, Ablate, Clamp, InputError, Neuron
from attnlrp_fx.passes import insert_autoencoders  # noqa: F401


class TopK(nn.Module):
    """A sparse autoencoder that keeps its strongest features."""

    def __init__(self, size, features, k):
        super().__init__()
        self.encoder, self.decoder, self.k = nn.Linear(size, features), nn.Linear(features, size), k

    def encode(self, values):
        scores = torch.relu(self.encoder(values))
        best = scores.topk(self.k, -1)
        return torch.zeros_like(scores).scatter(-1, best.indices, best.values)

    def decode(self, features):
        return self.decoder(features)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)).double().eval()
    return model, TopK(6, 20, 5).double().eval(), torch.randn(2, 7, 4).double()


def compiled(parts, **options):
    model, sae, x = parts
    options |= {"latent": [SAE(sae, at="1"), "1"], "target": lambda y: y[:, -1, 1]}
    return attnlrp_fx.compile(model, x, backend="eager", audit=True, **options)


@pytest.mark.parametrize("editable", [False, True])
def test_outputs_stay_and_the_error_keeps_its_share(parts, editable):
    model, sae, x = parts
    found = compiled(parts, editable=editable)(x)
    torch.testing.assert_close(found.outputs, model(x), rtol=1e-12, atol=1e-12)
    features, error, whole = (found.latent[name] for name in ("1:sae", "1:error", "1"))
    value = model[:2](x)
    torch.testing.assert_close(features.activation, sae.encode(value))
    torch.testing.assert_close(error.activation, value - sae.decode(sae.encode(value)))
    kept = found.ledger.by_cause()["reconstruction error"]
    assert kept == pytest.approx(float(error.relevance.sum()), abs=1e-12)
    assert abs(found.ledger.residual) < 1e-12
    coefficient = model[2].weight[1] * torch.eye(7)[-1][:, None]
    torch.testing.assert_close(whole.relevance, value * coefficient)
    torch.testing.assert_close(
        features.relevance, features.activation * (coefficient @ sae.decoder.weight)
    )


def test_the_audit_knows_the_error(parts):
    """Node by node, and by module, as the ledger that is left on does."""
    explainer, x = compiled(parts, editable=True), parts[2]
    found, expected = explainer.audit(x).ledger, explainer(x).ledger
    assert abs(found.residual) < 1e-12
    assert found.by_cause()["reconstruction error"] == pytest.approx(
        expected.by_cause()["reconstruction error"], abs=1e-12
    )


@pytest.mark.parametrize("edits", [{"conditions": {"1": [2]}}, {"interventions": {"1": Ablate(3)}}])
def test_the_audit_of_an_edited_call_is_that_calls(parts, edits):
    explainer, x = compiled(parts, editable=True), parts[2]
    found, expected = explainer.audit(x, **edits), explainer(x, **edits)
    assert abs(found.ledger.residual) < 1e-12
    assert found.ledger.by_cause().keys() == expected.ledger.by_cause().keys()
    assert found.ledger.target == pytest.approx(float(expected.target_value.sum()), abs=1e-12)
    torch.testing.assert_close(found.relevance["input"], expected.relevance["input"])


def test_with_the_gradient_composite_relevance_is_that_of_the_autoencoders_path(parts):
    """Law 2: the gradient of the model with the autoencoder in its place, the error constant."""
    model, sae, x = parts
    x = x.clone().requires_grad_()
    value = model[:2](x)
    decoded = sae.decode(sae.encode(value))
    output = model[2](decoded + (value - decoded).detach())
    (gradient,) = torch.autograd.grad(output[:, -1, 1].sum(), x)
    found = compiled(parts, composite="gradient")(x.detach())
    (relevance,) = found.relevance.values()
    torch.testing.assert_close(relevance, x * gradient, rtol=1e-9, atol=1e-12)


def test_a_changed_feature_changes_the_output_by_what_it_decodes_to(parts):
    model, sae, x = parts
    made = compiled(parts, editable=True)
    plain, found = made(x), made(x, interventions={"1:sae": Clamp(3.0, [4])})
    step = 3.0 - plain.latent["1:sae"].activation[..., 4]
    expected = plain.outputs + step[..., None] * (model[2].weight @ sae.decoder.weight[:, 4])
    torch.testing.assert_close(found.outputs, expected)
    assert abs(found.ledger.residual) < 1e-9
    explained = made(x, target=Neuron("1:sae", 4, 0))
    torch.testing.assert_close(explained.target_value, plain.latent["1:sae"].activation[:, 0, 4])
    assert abs(explained.ledger.residual) < 1e-9


def test_an_autoencoder_needs_both_ways(parts):
    model, _, x = parts
    with pytest.raises(InputError, match="no method encode"):
        attnlrp_fx.compile(model, x, backend="eager", latent=[SAE(nn.Linear(6, 6), at="1")])
