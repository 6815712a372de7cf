"""Batch normalisation becomes part of the layer before it or behind it, where rules would tell."""

import pytest
import torch
from rewriting import captured, copy_of, run, text
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import attnlrp_fx
from attnlrp_fx import COMPOSITES
from attnlrp_fx.graph.provenance import module_path, source_line
from attnlrp_fx.passes import NORMALISE, PassContext, merge_batch_norms, run_passes

DOUBLE = torch.float64
CONTEXT = PassContext(composite=COMPOSITES["epsilon-plus"])
BEFORE = NORMALISE[: NORMALISE.index(merge_batch_norms)]


def filled(module):
    """Float64, in evaluation, with parameters and statistics as training leaves them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.3)
        for norm in module.modules():
            if isinstance(norm, BatchNorm):
                norm.running_var.add_(0.5)
    return module.double().eval()


class Whole(nn.Module):
    """Layers in a row; norms as capture leaves them, which spares it a decomposition."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for layer in self.children():
            if isinstance(layer, BatchNorm):
                given = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
                options = (layer.momentum, layer.eps)
                x = torch.ops.aten._native_batch_norm_legit_no_training(x, *given, *options)[0]
            else:
                x = layer(x)
        return x


def image(batch=3, channels=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, 4, 5, generator=generator, dtype=DOUBLE)


def rows(batch=3, features=4):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(batch, features, generator=generator, dtype=DOUBLE)


def merged(model, x, context=CONTEXT, *, dynamic=False):
    before = captured(filled(model), {"x": x}, dynamic=dynamic)
    run_passes(before, context, BEFORE)
    after = copy_of(before)
    (result,) = run_passes(after, context, (merge_batch_norms,))
    return before, after, result


def test_golden_before():
    _, after, result = merged(
        Whole(conv=nn.Conv2d(2, 3, 3, padding=1, stride=2), norm=nn.BatchNorm2d(3)), image()
    )
    assert (result.changes, result.near_misses) == (1, [])
    assert (
        text(after)
        == """\
add = aten.add(norm_running_var, 1e-05)
rsqrt = aten.rsqrt(add)
mul = aten.mul(rsqrt, norm_weight)
mul_1 = aten.mul(norm_running_mean, mul)
neg = aten.neg(mul_1)
add_1 = aten.add(neg, norm_bias)
view = aten.view(mul, [-1, 1, 1, 1])
mul_2 = aten.mul(conv_weight, view)
mul_3 = aten.mul(conv_bias, mul)
add_2 = aten.add(mul_3, add_1)
conv2d = aten.conv2d(x, mul_2, add_2, [2, 2], [1, 1])
return [conv2d]"""
    )


def test_golden_behind():
    _, after, result = merged(Whole(norm=nn.BatchNorm1d(4), linear=nn.Linear(4, 3)), rows())
    assert (result.changes, result.near_misses) == (1, [])
    assert (
        text(after)
        == """\
add = aten.add(norm_running_var, 1e-05)
rsqrt = aten.rsqrt(add)
mul = aten.mul(rsqrt, norm_weight)
mul_1 = aten.mul(norm_running_mean, mul)
neg = aten.neg(mul_1)
add_1 = aten.add(neg, norm_bias)
view = aten.view(mul, [1, -1])
mul_2 = aten.mul(linear_weight, view)
view_1 = aten.view(add_1, [1, -1])
mul_3 = aten.mul(linear_weight, view_1)
sum = aten.sum(mul_3, [1])
add_2 = aten.add(sum, linear_bias)
linear = aten.linear(x, mul_2, add_2)
return [linear]"""
    )


def test_golden_bare():
    """Without an affine part, and a layer without a bias: less to compute."""
    model = Whole(conv=nn.Conv2d(2, 3, 3, bias=False), norm=nn.BatchNorm2d(3, affine=False))
    _, after, _ = merged(model, image())
    assert (
        text(after)
        == """\
add = aten.add(norm_running_var, 1e-05)
rsqrt = aten.rsqrt(add)
mul = aten.mul(norm_running_mean, rsqrt)
neg = aten.neg(mul)
view = aten.view(rsqrt, [-1, 1, 1, 1])
mul_1 = aten.mul(conv_weight, view)
conv2d = aten.conv2d(x, mul_1, neg)
return [conv2d]"""
    )


SEQUENCE = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
VOLUME = torch.randn(3, 2, 3, 4, 3, generator=torch.Generator().manual_seed(4), dtype=DOUBLE)
PAIRS = {
    "conv1d, norm": (lambda: (nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3)), SEQUENCE),
    "conv2d, norm": (lambda: (nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)), image()),
    "conv3d, norm": (lambda: (nn.Conv3d(2, 3, 2, bias=False), nn.BatchNorm3d(3)), VOLUME),
    "grouped, norm": (lambda: (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), image(3, 4)),
    "depthwise, norm": (
        lambda: (nn.Conv2d(4, 4, 3, groups=4, padding="same"), nn.BatchNorm2d(4)),
        image(3, 4),
    ),
    "transposed, norm": (
        lambda: (nn.ConvTranspose2d(2, 3, 2, stride=2), nn.BatchNorm2d(3)),
        image(),
    ),
    "transposed 1d, norm": (
        lambda: (nn.ConvTranspose1d(2, 3, 3, padding=1, bias=False), nn.BatchNorm1d(3)),
        SEQUENCE,
    ),
    "linear, norm": (lambda: (nn.Linear(4, 3), nn.BatchNorm1d(3)), rows()),
    "linear, bare norm": (
        lambda: (nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3, affine=False)),
        rows(),
    ),
    "norm, linear": (lambda: (nn.BatchNorm1d(4), nn.Linear(4, 3)), rows()),
    "norm, bare linear": (
        lambda: (nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3, bias=False)),
        rows(),
    ),
    "norm, 1x1": (lambda: (nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1)), image()),
    "norm, conv without padding": (
        lambda: (nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, bias=False, dilation=1, stride=2)),
        image(),
    ),
    "norm, valid": (lambda: (nn.BatchNorm2d(2), nn.Conv2d(2, 3, 2, padding="valid")), image()),
}


@pytest.mark.parametrize("name", PAIRS)
def test_meaning_is_unchanged(name):
    """At another batch too; the norm is gone, and the layer has the layer's provenance."""
    make, x = PAIRS[name]
    first, second = make()
    before, after, result = merged(Whole(first=first, second=second), x, dynamic=True)
    assert (result.changes, result.near_misses) == (1, [])
    assert "norm" not in text(after)
    for given in (x, torch.cat([x, x.flip(0) * 2])):
        torch.testing.assert_close(
            run(after, {"x": given}), run(before, {"x": given}), rtol=1e-12, atol=1e-12
        )
    (output,) = after.graph.output_node().all_input_nodes
    is_first = not isinstance(first, BatchNorm)
    assert module_path(output) == ("first" if is_first else "second")
    assert output.meta["constructed_by"] == "merge_batch_norms"
    assert source_line(output)


@pytest.mark.parametrize("name", ["conv2d, norm", "norm, linear"])
def test_new_nodes_have_provenance(name):
    make, x = PAIRS[name]
    first, second = make()
    before, after, _ = merged(Whole(first=first, second=second), x)
    known = {node.name for node in before.graph.nodes}
    new = [n for n in after.graph.nodes if n.name not in known and n.op == "call_function"]
    assert len(new) > 3
    for node in new:
        assert node.meta.get("constructed_by") == "merge_batch_norms", node
        assert node.meta.get("nn_module_stack"), node


class Read(nn.Module):
    """A layer whose output, or a norm whose output, others read."""

    def __init__(self, of_layer):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)
        self.of_layer = of_layer

    def forward(self, x):
        if self.of_layer:
            y = self.conv(x)
            return torch.relu(self.norm(y)) + y
        y = self.norm(torch.relu(self.conv(x)))
        return self.last(y).mean() + y


class Shifted(nn.Module):
    """A layer whose weight is computed."""

    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(3, 4)), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(nn.functional.linear(x, self.weight.square()))


class Unbatched(nn.Module):
    """The norm's channels are not the convolution's."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(2, 5, 3, padding=1), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.norm(self.conv(x[0]))


NEAR_MISSES = {
    "others read the layer": (lambda: Read(of_layer=True), image()),
    "others read the norm": (lambda: Read(of_layer=False), image()),
    "padding": (
        lambda: Whole(norm=nn.BatchNorm2d(2), conv=nn.Conv2d(2, 3, 3, padding=1)),
        image(),
    ),
    "same padding": (
        lambda: Whole(norm=nn.BatchNorm2d(2), conv=nn.Conv2d(2, 3, 3, padding="same")),
        image(),
    ),
    "grouped behind": (
        lambda: Whole(norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1, groups=2)),
        image(3, 4),
    ),
    "transposed behind": (
        lambda: Whole(norm=nn.BatchNorm2d(2), conv=nn.ConvTranspose2d(2, 3, 1)),
        image(),
    ),
    "grouped and transposed": (
        lambda: Whole(conv=nn.ConvTranspose2d(4, 6, 2, groups=2), norm=nn.BatchNorm2d(6)),
        image(3, 4),
    ),
    "rectifiers on both sides": (
        lambda: Whole(
            conv=nn.Conv2d(2, 3, 1), relu=nn.ReLU(), norm=nn.BatchNorm2d(3), tanh=nn.Tanh()
        ),
        image(),
    ),
    "a linear layer of sequences": (
        lambda: Whole(linear=nn.Linear(5, 4), norm=nn.BatchNorm1d(6)),
        torch.randn(3, 6, 5, dtype=DOUBLE),
    ),
    "a weight that is computed": (Shifted, rows()),
    "a convolution without a batch": (Unbatched, torch.randn(1, 2, 5, dtype=DOUBLE)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    make, x = NEAR_MISSES[name]
    before, after, result = merged(make(), x)
    assert (result.changes, text(after)) == (0, text(before))
    (miss,) = result.near_misses
    assert "no layer of its own" in miss
    assert "_native_batch_norm" in miss


@pytest.mark.parametrize("composite", COMPOSITES)
def test_composites_without_rules_for_weights_leave_it_alone(composite):
    """To them the merged and the unmerged layer are the same, and the model's own shape is kept."""
    context = PassContext(composite=COMPOSITES[composite])
    model = Whole(conv=nn.Conv2d(2, 3, 1), norm=nn.BatchNorm2d(3))
    before, after, result = merged(model, image(), context)
    is_merged = composite not in ("attnlrp", "cp-lrp", "best", "gradient")
    assert (result.changes, text(after) != text(before)) == (int(is_merged), is_merged)
    assert result.near_misses == []


class Stacked(nn.Module):
    """Several norms: two to be merged before, one behind, one alone; a weight used twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norms = nn.Conv2d(2, 2, 1), nn.ModuleList(nn.BatchNorm2d(2) for _ in "abc")
        self.last, self.head = nn.BatchNorm1d(40), nn.Linear(40, 3)

    def forward(self, x):
        x = torch.relu(self.norms[0](self.conv(x)))
        x = self.norms[2](torch.relu(self.norms[1](self.conv(x))))
        return self.head(self.last(torch.relu(x).flatten(1)))


def test_several():
    before, after, result = merged(Stacked(), image())
    assert result.changes == 3
    (miss,) = result.near_misses
    assert "norms.2" in miss
    assert text(after).count("aten._native_batch_norm") == 1
    x = {"x": image()}
    torch.testing.assert_close(run(after, x), run(before, x), rtol=1e-12, atol=1e-12)


def small():
    """Convolutions and a linear layer, each with a norm."""
    return filled(
        nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 5),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.Linear(5, 3),
        )
    )


def merged_by_hand(model):
    """The same network without norms, by PyTorch's own fusion."""
    return nn.Sequential(
        fuse_conv_bn_eval(model[0], model[1]),
        nn.ReLU(),
        fuse_conv_bn_eval(model[3], model[4]),
        nn.ReLU(),
        nn.Flatten(),
        fuse_linear_bn_eval(model[7], model[8]),
        nn.ReLU(),
        model[10],
    ).eval()


@pytest.mark.parametrize("composite", ["epsilon-plus", "epsilon-alpha2-beta1-flat"])
def test_relevance_is_that_of_the_network_merged_by_hand(composite):
    model, x = small(), image(4)
    found, expected = (
        attnlrp_fx.compile(net, image(2), composite=composite, backend="eager", target=1)(x)
        for net in (model, merged_by_hand(model))
    )
    torch.testing.assert_close(found.target_value, expected.target_value, rtol=1e-12, atol=1e-12)
    (of_model,), (of_merged,) = found.relevance.values(), expected.relevance.values()
    assert of_model.abs().max() > 1e-3
    torch.testing.assert_close(of_model, of_merged, rtol=1e-9, atol=1e-12)


def test_a_change_of_the_norm_shows_without_compiling_again():
    """Parameters are the model's own: the merged weight is computed from them at every call."""
    model, x = small(), image(4)
    explainer = attnlrp_fx.compile(
        model, image(2), composite="epsilon-plus", backend="eager", target=1
    )
    (before,) = explainer(x).relevance.values()
    with torch.no_grad():
        model[1].weight.mul_(-2.0)
        model[4].running_mean.add_(0.5)
        model[8].bias.add_(1.0)
    explanation = explainer(x)
    (after,) = explanation.relevance.values()
    fresh = attnlrp_fx.compile(
        merged_by_hand(model), image(2), composite="epsilon-plus", backend="eager", target=1
    )
    (expected,) = fresh(x).relevance.values()
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(explanation.outputs, model(x).detach(), rtol=1e-12, atol=1e-12)
    assert explainer.compilations == 1
