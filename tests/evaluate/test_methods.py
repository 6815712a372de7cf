"""Rival methods against closed forms on models whose right answer is known, and against captum."""

import math
from itertools import combinations

import pytest
import torch
from captum.attr import LayerGradCam
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import attnlrp_fx
from attnlrp_fx import InputError, Logit
from attnlrp_fx.evaluate import METHODS, Subject, method_named
from attnlrp_fx.evaluate.attention import GradCam
from attnlrp_fx.evaluate.methods import KernelShap, Occlusion, Relevance

LOCAL = ("input-x-gradient", "ig", "occlusion", "attnlrp", "cp-lrp")


class Mixer(nn.Module):
    """One layer of attention with one head, read at the first token; everything is known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 4)
        self.query, self.key, self.value = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def weights(self, x: Tensor) -> Tensor:
        """(batch, length, length)."""
        return (self.query(x) @ self.key(x).mT / 2).softmax(-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) twice → (batch, 3)."""
        x = self.table(input_ids)
        q, k, v = (part(x)[:, None] for part in (self.query, self.key, self.value))
        mask = attention_mask[:, None, None].bool()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask)[:, 0]
        return self.head((x + mixed)[:, 0])


@pytest.fixture(scope="module")
def mixer() -> Subject:
    ids = torch.randint(20, (3, 5))
    return Subject.compile(
        Mixer().eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    )


IDS = {
    "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]),
    "attention_mask": torch.ones(2, 6, dtype=torch.int64),
}


@pytest.mark.parametrize("name", LOCAL)
def test_a_linear_model_is_taken_apart(name: str):
    """Every method that is exact for linear models gives weight × input."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3).eval()
    subject = Subject.compile(model, torch.randn(2, 5))
    inputs = {"input": torch.randn(4, 5)}
    expected = inputs["input"] * model.weight[2].detach()
    found = METHODS[name](subject, inputs, Logit(2))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_gradient_has_no_sign_and_random_no_sense():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).eval()
    subject = Subject.compile(model, torch.randn(2, 5))
    inputs = {"input": torch.randn(2, 5)}
    for name in ("gradient", "smoothgrad"):
        found = METHODS[name](subject, inputs, Logit(2))
        torch.testing.assert_close(found, model.weight[2].detach().abs().expand(2, 5))
    again = METHODS["random"](subject, inputs, Logit(2))
    assert torch.equal(METHODS["random"](subject, inputs, Logit(2)), again)


def test_shapley_values_of_a_product():
    """All coalitions of three features, weighed as Shapley 1953 does."""

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """(batch, 3) → (batch, 1): a b + c."""
            return (x[:, 0] * x[:, 1] + x[:, 2])[:, None]

    model = Product().eval()
    subject = Subject.compile(model, {"x": torch.rand(2, 3)})
    x = torch.tensor([[2.0, 3.0, 5.0]])
    found = KernelShap(samples=200)(subject, {"x": x}, Logit(0))
    for feature in range(3):
        others = [i for i in range(3) if i != feature]
        value = 0.0
        for size in range(3):
            for some in combinations(others, size):
                weight = math.factorial(size) * math.factorial(2 - size) / 6
                kept = [torch.zeros(1, 3), torch.zeros(1, 3)]
                for index, keep in zip((0, 1), ([*some], [*some, feature]), strict=True):
                    kept[index][0, keep] = x[0, keep]
                value += weight * float(model(kept[1]) - model(kept[0]))
        assert abs(float(found[0, feature]) - value) < 0.5  # drawn coalitions; gradients say 6


def test_occlusion_of_tokens_and_of_patches(mixer: Subject):
    """Against a loop: one embedding is zero, or one patch is."""
    question = mixer.ask(IDS)
    found = METHODS["occlusion"](mixer, IDS, question.target)
    whole = question.score(question.values)
    for token in range(6):
        changed = question.values.clone()
        changed[:, token] = 0
        torch.testing.assert_close(found[:, token], whole - question.score(changed))
    net = nn.Sequential(nn.Flatten(), nn.Linear(2 * 4 * 6, 2)).eval()
    images = {"input": torch.rand(2, 2, 4, 6)}
    subject = Subject.compile(net, images)
    found = Occlusion(patch=2)(subject, images, Logit(1))
    product = (images["input"] * net[1].weight[1].detach().reshape(2, 4, 6)).sum(1)
    patches = nn.functional.avg_pool2d(product[:, None], 2, divisor_override=1)
    expected = patches.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_rollout_of_one_layer(mixer: Subject):
    """(A + 1) / 2 and (A ⊙ ∇A)⁺, in the row of the token that is read."""
    question = mixer.ask(IDS)
    model = mixer.model
    x = question.values
    weights = model.weights(x).detach().requires_grad_()
    first = torch.eye(6)[0]
    found = METHODS["rollout"](mixer, IDS, question.target)
    torch.testing.assert_close(found, (weights[:, 0].detach() + first) / 2)
    logits = model.head((x + weights @ model.value(x))[:, 0])
    score = logits.gather(1, question.target.index[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, weights)
    found = METHODS["gradient-rollout"](mixer, IDS, question.target)
    torch.testing.assert_close(found, (weights * gradient)[:, 0].clamp(min=0).detach())


def test_atman_suppresses_scores(mixer: Subject):
    """Scores of attention to a token times 0.1, by a loop over tokens."""
    question = mixer.ask(IDS)
    model, x = mixer.model, question.values
    scores = model.query(x) @ model.key(x).mT / 2
    value = model.value(x)

    def score(factor: Tensor) -> Tensor:
        mixed = (scores * factor).softmax(-1) @ value
        return model.head((x + mixed)[:, 0]).gather(1, question.target.index[:, None])[:, 0]

    found = METHODS["atman"](mixer, IDS, question.target)
    for token in range(6):
        factor = torch.ones(6)
        factor[token] = 0.1
        expected = score(torch.ones(6)) - score(factor)
        torch.testing.assert_close(found[:, token], expected.detach())


def test_what_looks_at_attention_needs_some():
    model = nn.Linear(5, 3).eval()
    subject = Subject.compile(model, torch.randn(2, 5))
    for name in ("rollout", "gradient-rollout", "atman", "grad-cam"):
        with pytest.raises(InputError, match=r"attention|no images"):
            METHODS[name](subject, {"input": torch.randn(2, 5)}, Logit(0))
    with pytest.raises(InputError, match="there is no method 'shap'"):
        method_named("shap")


def test_grad_cam_of_a_convolutional_network_is_captums():
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3, stride=2)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.ReLU(), layer, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    ).eval()
    images = torch.rand(2, 1, 11, 11)
    subject = Subject.compile(net, images)
    found = GradCam()(subject, {"input": images}, Logit(1))
    expected = LayerGradCam(net, layer).attribute(images, target=1, relu_attributions=True)
    size = found.shape[-2:]
    expected = nn.functional.interpolate(expected, size, mode="bilinear")[:, 0]
    torch.testing.assert_close(found, expected.detach())


@pytest.fixture(scope="module")
def vit() -> tuple[Subject, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=12,
        patch_size=4,
        num_channels=2,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=3,
    )
    inputs = {"pixel_values": torch.rand(2, 2, 12, 12)}
    return Subject.compile(ViTForImageClassification(config).eval(), inputs), inputs


@pytest.mark.parametrize("name", ["rollout", "gradient-rollout", "atman", "grad-cam"])
def test_tokens_of_an_image_become_pixels(name: str, vit: tuple[Subject, dict[str, Tensor]]):
    """Relevance has the image's size; but for Grad-CAM a patch's pixels are alike."""
    subject, inputs = vit
    found = METHODS[name](subject, inputs, None)
    pixels = inputs["pixel_values"]
    assert found.shape == (len(pixels), *pixels.shape[-2:])
    assert float(found.std()) > 0


PADDED = ("input-x-gradient", "ig", "occlusion", "rollout", "gradient-rollout", "attnlrp")


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(name: str, mixer: Subject):
    """A padded row has what it has alone, and padding has nothing."""
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    padded = METHODS[name](mixer, {**IDS, "attention_mask": mask}, Logit(1))[1]
    alone = {key: value[1:, :4] for key, value in IDS.items()}
    torch.testing.assert_close(padded[:4], METHODS[name](mixer, alone, Logit(1))[0])
    assert not padded[4:].any()


def test_ours_is_what_the_explainer_says(mixer: Subject):
    expected = mixer.explainer(IDS, target=Logit(1)).relevance["input_ids"]
    torch.testing.assert_close(Relevance()(mixer, IDS, Logit(1)), expected)
    contrast = Relevance(contrast=True)(mixer, IDS, Logit(1))
    expected = mixer.explainer(IDS, target=attnlrp_fx.Contrast(1)).relevance["input_ids"]
    torch.testing.assert_close(contrast, expected)
    other = mixer.explainer.with_composite("cp-lrp")(IDS, target=Logit(1))
    torch.testing.assert_close(
        METHODS["cp-lrp"](mixer, IDS, Logit(1)), other.relevance["input_ids"]
    )
