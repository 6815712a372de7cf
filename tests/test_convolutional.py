"""Convolutional networks: their mechanisms against both laws and worked out, and autoencoders.

Law 1: inputs and what is absorbed add up to the target. Law 2: the gradient composite is
Gradient×Input. Layers by themselves are in test_layers.py.
"""

import functools
from collections.abc import Callable

import layer_references as ref
import pytest
import references
import torch
import torch.nn.functional as F
from models import transformers_model
from references import explain, rewrite
from torch import Tensor, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import (
    COMPOSITES,
    AlphaBeta,
    Epsilon,
    ExplainableGraphModule,
    Flat,
    Gamma,
    Match,
    ZPlus,
)

DOUBLE = torch.float64


def randn(*shape: int, seed: int = 11) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def filled(module: nn.Module) -> nn.Module:
    """Float64, in evaluation, no bias zero and no scale one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if not tensor.is_floating_point():
                continue
            fan = tensor[0].numel() if tensor.dim() > 1 else 4
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / fan**0.5)
            if "running_var" in name:
                tensor.abs_().add_(0.5)
    return module.double().eval()


class Block(nn.Module):
    """A function of a module with layers, between a stem and a head."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module):
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.LazyConv2d(3, 1)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 2, 8, 8) → (batch, 3)."""
        return self.head(self.function(self, self.stem(x))).mean((2, 3))


class LayerScale(nn.Module):
    """A factor for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(…, channels) → the same."""
        return x * self.scale


def squeeze_and_excite(m: nn.Module, x: Tensor) -> Tensor:
    signal = F.silu(x)
    return signal * torch.sigmoid(m.up(F.silu(m.down(signal.mean((2, 3), keepdim=True)))))


def hard_gate(m: nn.Module, x: Tensor) -> Tensor:
    return x * F.hardsigmoid(m.up(torch.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))


def convnext(m: nn.Module, x: Tensor) -> Tensor:
    h = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
    return x + m.scale(m.down(F.gelu(m.up(h)))).permute(0, 3, 1, 2)


def basic_block(m: nn.Module, x: Tensor) -> Tensor:
    h = m.norm2(m.second(torch.relu(m.norm1(m.first(x)))))
    return torch.relu(h + m.norm3(m.shortcut(x)))


def dense_block(m: nn.Module, x: Tensor) -> Tensor:
    x = torch.cat([x, m.first(torch.relu(m.norm(x)))], 1)
    return torch.cat([x, m.second(torch.relu(x))], 1)


def inverted_residual(m: nn.Module, x: Tensor) -> Tensor:
    h = F.relu6(m.norm1(m.expand(x)))
    h = F.hardswish(m.norm2(m.depthwise(h)))
    return x + m.norm3(m.project(h))


def u_net(m: nn.Module, x: Tensor) -> Tensor:
    low = torch.relu(m.down(F.max_pool2d(torch.relu(x), 2)))
    return torch.cat([x, m.up(low)], 1)


def shuffled(m: nn.Module, x: Tensor) -> Tensor:
    return F.channel_shuffle(m.grouped(torch.relu(x)), 2)


def spatial_attention(m: nn.Module, x: Tensor) -> Tensor:
    pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * torch.sigmoid(m.conv(pooled))


def _conv(inputs: int, outputs: int, size: int = 1, **options: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, **options)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "squeeze and excite": lambda: Block(squeeze_and_excite, down=_conv(4, 2), up=_conv(2, 4)),
    "hard gate": lambda: Block(hard_gate, down=_conv(4, 2), up=_conv(2, 4)),
    "spatial attention": lambda: Block(spatial_attention, conv=_conv(2, 1, 3, padding=1)),
    "ConvNeXt": lambda: Block(
        convnext,
        depthwise=_conv(4, 4, 7, padding=3, groups=4),
        norm=nn.LayerNorm(4, eps=1e-3),
        up=nn.Linear(4, 8),
        down=nn.Linear(8, 4),
        scale=LayerScale(4),
    ),
    "residual with norms": lambda: Block(
        basic_block,
        first=_conv(4, 5, 3, padding=1, stride=2, bias=False),
        norm1=nn.BatchNorm2d(5),
        second=_conv(5, 5, 3, padding=1, bias=False),
        norm2=nn.BatchNorm2d(5),
        shortcut=_conv(4, 5, stride=2),
        norm3=nn.BatchNorm2d(5),
    ),
    "dense": lambda: Block(
        dense_block, norm=nn.BatchNorm2d(4), first=_conv(4, 2, 3, padding=1), second=_conv(6, 2)
    ),
    "inverted residual": lambda: Block(
        inverted_residual,
        expand=_conv(4, 6, bias=False),
        norm1=nn.BatchNorm2d(6),
        depthwise=_conv(6, 6, 3, padding=1, groups=6),
        norm2=nn.BatchNorm2d(6),
        project=_conv(6, 4, bias=False),
        norm3=nn.BatchNorm2d(4),
    ),
    "U-Net": lambda: Block(
        u_net, down=_conv(4, 6, 3, padding=1), up=nn.ConvTranspose2d(6, 3, 2, 2)
    ),
    "channel shuffle": lambda: Block(shuffled, grouped=_conv(4, 6, 3, groups=2)),
    "pools": lambda: Block(
        lambda m, x: (
            F.adaptive_avg_pool2d(torch.relu(x), (2, 3))
            + F.interpolate(F.max_pool2d(x, 3, stride=2, padding=1), (2, 3))
            + F.adaptive_max_pool2d(x, (2, 3))
        )
    ),
    "uneven pools": lambda: Block(
        lambda m, x: torch.cat(
            [
                F.adaptive_avg_pool2d(x, (3, 5)),
                F.avg_pool2d(x, 4, stride=2, padding=1, count_include_pad=False)[..., :3, :].repeat(
                    1, 1, 1, 2
                )[..., :5],
                F.adaptive_max_pool2d(x, (3, 5)),
            ],
            1,
        )
    ),
    "interpolations": lambda: Block(
        lambda m, x: torch.cat(
            [
                F.interpolate(x, size=(5, 6), mode=mode, align_corners=corners)
                for mode, corners in (
                    ("nearest", None),
                    ("bilinear", False),
                    ("bilinear", True),
                    ("bicubic", False),
                    ("area", None),
                )
            ],
            1,
        )
    ),
    "pixel shuffle": lambda: Block(lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 4)),
    "group norm": lambda: Block(
        lambda m, x: F.silu(m.norm(x)) + m.instance(x),
        norm=nn.GroupNorm(2, 4, eps=1e-3),
        instance=nn.InstanceNorm2d(4, eps=1e-3, affine=True),
    ),
}


@functools.cache
def _explainer(name: str) -> ExplainableGraphModule:
    torch.manual_seed(0)
    model = BLOCKS[name]()
    with torch.no_grad():
        model(torch.zeros(1, 2, 8, 8))
    return attnlrp_fx.compile(
        filled(model),
        {"x": randn(2, 2, 8, 8)},
        composite="gradient",
        backend="eager",
        target=1,
        audit=True,
    )


X = randn(3, 2, 8, 8, seed=1)


@pytest.mark.parametrize("name", BLOCKS)
def test_law_2(name: str) -> None:
    """With plain gradients everywhere, Gradient×Input of the untouched model."""
    explainer = _explainer(name)
    explanation = explainer(X)
    x = X.clone().requires_grad_()
    value = explainer.model(x)[:, 1]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert_close(explanation.target_value, value.detach(), rtol=1e-9, atol=1e-12)
    expected = X * gradient
    scale = float(expected.abs().max())
    assert scale > 1e-3
    assert_close(explanation.relevance["x"], expected, rtol=1e-9, atol=1e-10 * scale)


MIXED = COMPOSITES["epsilon-plus"].with_rules(
    (Match(role="first"), Flat(epsilon=1e-6)),
    (Match(role="convolution"), Gamma(0.25)),
    (Match(role="dense"), AlphaBeta(2, 1, epsilon=1e-6)),
)
"""As many rules as there are places for."""


@pytest.mark.parametrize("name", BLOCKS)
def test_law_1(name: str) -> None:
    """The ledger closes, and the outputs are the model's."""
    explanation = _explainer(name).with_composite(MIXED)(X)
    ledger = explanation.ledger
    assert ledger is not None
    scale = sum(abs(entry.received) for entry in ledger.entries)
    assert abs(ledger.residual) <= 1e-9 * float(explanation.target_value.abs().sum())
    for entry in ledger.entries:
        assert abs(entry.received - entry.passed - entry.absorbed) <= 1e-12 * scale, entry
    with torch.no_grad():
        assert_close(explanation.outputs, _explainer(name).model(X), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("composite", ["attnlrp", "epsilon-plus"])
def test_squeeze_and_excitation(composite: str) -> None:
    """Under convolutional composites the gate is constant and the signal takes all (Arras et al.
    2017); under AttnLRP each gets half, and the squeeze's share goes back to the signal."""
    model = filled(
        nn.Sequential(Excite(), nn.Conv2d(4, 2, 2, bias=False)),
    )
    excite, head = model
    entries = ((Match(role="convolution"), ZPlus()),) if composite == "epsilon-plus" else ()
    x = randn(2, 4, 2, 2)
    result = explain(
        rewrite(model, {"input": randn(3, 4, 2, 2)}, COMPOSITES[composite].with_rules(*entries)),
        {"input": x},
    )
    rule = ZPlus() if entries else Epsilon()
    with torch.no_grad():
        signal = F.silu(x)
        squeezed = signal.mean((2, 3), keepdim=True)
        hidden = excite.down(squeezed)
        raised = excite.up(F.silu(hidden))
        product = signal * torch.sigmoid(raised)
        of_product = ref.Layer(head, rule).back(product, result.seeded)
        if entries:
            expected = of_product
        else:
            of_gate = references.product(2, of_product).sum((2, 3), keepdim=True)
            of_raised = references.activation(torch.sigmoid, raised, of_gate)
            of_active = ref.Layer(excite.up, rule).back(F.silu(hidden), of_raised)
            of_squeezed = ref.Layer(excite.down, rule).back(squeezed, of_active)
            of_mean = references.affine(lambda s: s.mean((2, 3), keepdim=True), signal, of_squeezed)
            expected = references.product(2, of_product) + of_mean
    tolerance = 1e-5 if entries else 1e-9
    assert_close(result.relevance["input"], expected, rtol=tolerance, atol=tolerance)


class Excite(nn.Module):
    """A gate for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4, rows, columns) → the same."""
        return squeeze_and_excite(self, x)


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive average": lambda x: F.adaptive_avg_pool2d(x, (2, 3)),
    "average to one": lambda x: F.adaptive_avg_pool2d(x, 1),
    "average": lambda x: F.avg_pool2d(x, 3, stride=2, padding=1),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, size=(5, 3), mode="bilinear"),
    "aligned": lambda x: F.interpolate(x, size=(7, 2), mode="bilinear", align_corners=True),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "layer scale": lambda x: x * torch.linspace(-1, 2, 4, dtype=DOUBLE).view(4, 1, 1),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_mechanisms(name: str) -> None:
    """In proportion to contribution (eq. 8), by the explicit matrix."""
    x = randn(2, 4, 4, 4)
    result = explain(rewrite(lambda x: LINEAR[name](x), {"x": randn(3, 4, 4, 4)}), {"x": x})
    assert abs(result.residual) <= 1e-10
    expected = references.affine(LINEAR[name], x, result.seeded)
    assert_close(result.relevance["x"], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("size", "stride", "padding"), [(2, 2, 0), (3, 1, 1), (3, 2, 0)])
def test_winner_of_a_window(size: int, stride: int, padding: int) -> None:
    """Each window's largest element takes all, though windows overlap."""
    x = randn(2, 2, 5, 5)
    result = explain(
        rewrite(lambda x: F.max_pool2d(x, size, stride, padding), {"x": randn(3, 2, 5, 5)}),
        {"x": x},
    )
    expected = torch.zeros_like(x)
    batch, channels, rows, columns = result.seeded.shape
    for b in range(batch):
        for c in range(channels):
            for i in range(rows):
                for j in range(columns):
                    places = [
                        (m, n)
                        for m in range(i * stride - padding, i * stride - padding + size)
                        for n in range(j * stride - padding, j * stride - padding + size)
                        if 0 <= m < 5 and 0 <= n < 5
                    ]
                    m, n = max(places, key=lambda at, b=b, c=c: float(x[b, c][at]))
                    expected[b, c, m, n] += result.seeded[b, c, i, j]
    assert_close(result.relevance["x"], expected)


def test_stochastic_depth() -> None:
    """In evaluation a class of transformers' with drop path keeps every path; both laws hold."""
    torch.manual_seed(0)
    model = filled(
        transformers_model(
            "convnext",
            "ConvNextForImageClassification",
            num_channels=2,
            hidden_sizes=[4, 6],
            depths=[1, 2],
            num_stages=2,
            patch_size=2,
            drop_path_rate=0.7,
            num_labels=3,
            image_size=16,
        )
    )
    gradients = attnlrp_fx.compile(
        model,
        {"pixel_values": randn(2, 2, 16, 16)},
        composite="gradient",
        backend="eager",
        target=2,
        audit=True,
    )
    pixels = randn(3, 2, 16, 16, seed=1)
    x = pixels.clone().requires_grad_()
    value = model(pixel_values=x).logits[:, 2]
    (gradient,) = torch.autograd.grad(value.sum(), x)
    value = value.detach()
    found = gradients(pixel_values=pixels).relevance["pixel_values"]
    assert_close(found, pixels * gradient, rtol=1e-9, atol=1e-12)
    explanation = gradients.with_composite("epsilon-plus")(pixel_values=pixels)
    assert_close(explanation.target_value, value, rtol=1e-9, atol=1e-12)
    ledger = explanation.ledger
    assert ledger is not None
    assert abs(ledger.residual) <= 1e-9 * float(value.abs().sum())


class Encoder(nn.Module):
    """An image to a latent map."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=bias)
        self.second = nn.Conv2d(4, 3, 3, stride=2, padding=1, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 1, 16, 16) → (batch, 3, 4, 4)."""
        return self.second(torch.relu(self.first(image)))


class Autoencoder(nn.Module):
    """An image, its latent map, and the image again."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.encoder = Encoder(bias)
        self.third = nn.ConvTranspose2d(3, 4, 2, stride=2, bias=bias)
        self.last = nn.ConvTranspose2d(4, 1, 2, stride=2, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 1, 16, 16) → the same."""
        return self.last(torch.relu(self.third(torch.relu(self.encoder(image)))))


@functools.cache
def _autoencoder(part: str, bias: bool) -> ExplainableGraphModule:
    model = filled(Autoencoder(bias))
    return attnlrp_fx.compile(
        model if part == "pixel" else model.encoder,
        {"image": randn(2, 1, 16, 16)},
        composite="gradient",
        backend="eager",
        target=CHOSEN[part],
        audit=True,
    )


CHOSEN: dict[str, Callable[[Tensor], Tensor]] = {
    "pixel": lambda out: out[:, 0, 7, 9],
    "latent": lambda out: out[:, 2, 1, 2],
}
"""One output pixel of the whole, one latent of the encoder."""
IMAGE = randn(3, 1, 16, 16, seed=5)


def receptive_field(model: nn.Module, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Which pixels can make a difference: with all weights positive every path is open."""
    opened = {name: value.detach().abs() + 0.1 for name, value in model.named_parameters()}
    image = torch.ones(1, 1, 16, 16, dtype=DOUBLE, requires_grad=True)
    value = choose(torch.func.functional_call(model, opened, (image,)))
    (gradient,) = torch.autograd.grad(value.sum(), image)
    return gradient[0] > 0


@pytest.mark.parametrize("part", CHOSEN)
def test_autoencoder_is_gradient_times_input(part: str) -> None:
    explainer = _autoencoder(part, True)
    image = IMAGE.clone().requires_grad_()
    value = CHOSEN[part](explainer.model(image))
    (gradient,) = torch.autograd.grad(value.sum(), image)
    explanation = explainer(IMAGE)
    assert_close(explanation.target_value, value.detach(), rtol=1e-9, atol=1e-12)
    assert_close(explanation.relevance["image"], IMAGE * gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("composite", ["attnlrp-vision", "epsilon-plus-flat"])
@pytest.mark.parametrize("part", CHOSEN)
def test_autoencoder_stays_in_the_receptive_field(part: str, composite: str) -> None:
    """Which input pixels made one output pixel, or one latent: none that it cannot see."""
    explainer = _autoencoder(part, True).with_composite(composite)
    explanation = explainer(IMAGE)
    field = receptive_field(explainer.model, CHOSEN[part])
    assert 9 <= field.sum() < 150
    relevance = explanation.relevance["image"]
    assert relevance.shape == IMAGE.shape
    assert not relevance[:, ~field].any()
    assert relevance[:, field].abs().sum() > 1e-2 * explanation.target_value.abs().sum()
    ledger = explanation.ledger
    assert ledger is not None
    assert abs(ledger.residual) <= 1e-9 * float(explanation.target_value.abs().sum())


@pytest.mark.parametrize("part", CHOSEN)
def test_autoencoder_conserves_without_biases(part: str) -> None:
    """ε-plus: what a pixel or a latent is worth is all found in the image; exactly if ε is 0."""
    explainer = _autoencoder(part, False)
    stabilised = explainer.with_composite("epsilon-plus")(IMAGE)
    exact = explainer.with_composite(
        COMPOSITES["attnlrp"].with_rules((Match(role="convolution"), ZPlus()))
    )(IMAGE)
    for explanation, tolerance in ((stabilised, 1e-3), (exact, 1e-10)):
        total = explanation.relevance["image"].flatten(1).sum(1)
        assert_close(total, explanation.target_value, rtol=tolerance, atol=1e-12)
    ledger = exact.ledger
    assert ledger is not None
    assert abs(ledger.absorbed) <= 1e-12
