"""A region of elementwise ops with one explained input is one activation; products of two stay."""

import math

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, copy_of, prepared, relevance, run, text
from torch import nn

from attnlrp_fx.passes import PassContext, raise_activations, run_passes

BATCH, WIDTH = 6, 5


def newgelu(m, x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


def exact_gelu(m, x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def quickgelu(m, x):
    return x * torch.sigmoid(1.702 * x)


def mish(m, x):
    return x * torch.tanh(F.softplus(x))


def squared_relu(m, x):
    return torch.square(F.relu(x))


def silu(m, x):
    return x * torch.sigmoid(x)


def softsign(m, x):
    return x / (1 + x.abs())


def both_factors_of_one_source(m, x):
    """A gate and what it gates, from the same value element by element."""
    return torch.tanh(x) * torch.sigmoid(x)


def logistic_by_exp(m, x):
    return 1 / (1 + torch.exp(-x))


def elu(m, x):
    return torch.where(x > 0, x, m.slope * (torch.exp(x) - 1))


def cap(m, x):
    return torch.where(x > 1, 1.0, torch.where(x < -1, -1.0, x))


def guarded_softplus(m, x):
    """The exponential overflows where it is not used."""
    return torch.where(x > 20, x, torch.log1p(torch.exp(x)))


def leaky(m, x):
    return torch.where(x > 0, x, m.slope * x)


def masked(m, x):
    """A constant mask in the middle."""
    return x * torch.sigmoid(x).masked_fill(torch.arange(WIDTH) > 2, 0.0)


def learned(m, x):
    """A slope for each channel in the middle."""
    return x * torch.sigmoid(m.slope * x)


ACTIVATIONS = {
    newgelu: lambda x: F.gelu(x, approximate="tanh"),
    exact_gelu: F.gelu,
    quickgelu: lambda x: x * (1.702 * x).sigmoid(),
    mish: F.mish,
    squared_relu: lambda x: x.clamp_min(0) ** 2,
    silu: F.silu,
    softsign: F.softsign,
    both_factors_of_one_source: lambda x: x.tanh() * x.sigmoid(),
    logistic_by_exp: torch.sigmoid,
    elu: lambda x: torch.where(x > 0, x, SLOPE * torch.expm1(x)),
    cap: lambda x: x.clamp(-1, 1),
    guarded_softplus: F.softplus,
    leaky: lambda x: torch.where(x > 0, x, SLOPE * x),
    masked: lambda x: x * x.sigmoid() * (torch.arange(WIDTH) <= 2),
    learned: lambda x: x * (SLOPE * x).sigmoid(),
}
"""Each as it is written out, and as a function to take f(0) and f(x) from."""

SLOPE = torch.linspace(0.1, 1.5, WIDTH, dtype=torch.float64)


def example():
    """Values of every size, zero and a great one among them."""
    torch.manual_seed(0)
    x = 2 * torch.randn(BATCH, WIDTH, dtype=torch.float64)
    x[0], x[1], x[2] = 0.0, 1e-9, 800.0
    return {"x": x}


def raised(function):
    """Before, after, and what the pass says."""
    before = prepared(Written(function, slope=SLOPE.clone()), example())
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (raise_activations,))
    return before, after, result


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda function: function.__name__)
def test_is_one_activation(function):
    before, after, result = raised(function)
    assert (result.changes, result.near_misses) == (1, [])
    body = [node for node in after.graph.nodes if node.op.startswith("call")]
    assert [str(node.target) for node in body[1:] if node.op == "call_module"] == ["activation_0"]
    given = example()
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda function: function.__name__)
def test_relevance_is_the_identity_rule(function):
    """R = c·(f(x) − f(0)), and the derivative's limit at x = 0 costs nothing: R is 0 there."""
    _, after, _ = raised(function)
    x = example()["x"]
    f = ACTIVATIONS[function]
    seed = torch.rand_like(x)
    found = relevance(after, {"x": x}, seed)["x"]
    expected = seed * (f(x) - f(torch.zeros_like(x)))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


def swiglu(m, x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def swiglu_written_out(m, x):
    gate, up = x * m.slope, x.flip(-1)
    return gate * torch.sigmoid(gate) * up


def glu(m, x):
    value, gate = x.chunk(2, -1)
    return value * torch.sigmoid(gate)


def gate_of_a_mean(m, x):
    return x * torch.sigmoid(x.mean(-1, keepdim=True))


def lone(m, x):
    return torch.tanh(x)


def soft_cap(m, x):
    """The scales before and behind are linear and stay outside."""
    return torch.tanh(x / 30) * 30


def residual(m, x):
    return x + F.gelu(x)


def mask_as_score(m, x):
    """A number that only says that something is to be ignored is no value of a function."""
    return torch.where(x < -1, -torch.inf, x).softmax(-1)


def other_value_decides(m, x):
    return torch.where(x.flip(-1) > 0, x, 2 * x)


UNTOUCHED = [
    swiglu,
    glu,
    gate_of_a_mean,
    lone,
    soft_cap,
    residual,
    mask_as_score,
    other_value_decides,
]


@pytest.mark.parametrize("function", UNTOUCHED, ids=lambda function: function.__name__)
def test_is_no_region(function):
    width = 2 * WIDTH if function in (swiglu, glu) else WIDTH
    given = {"x": torch.randn(BATCH, width, dtype=torch.float64)}
    before = prepared(Written(function, slope=SLOPE.clone()), given)
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (raise_activations,))
    assert (result.changes, result.near_misses) == (0, [])
    assert text(after) == text(before)


def test_golden():
    before, after, _ = raised(newgelu)
    assert (
        text(before)
        == """\
source = ops.source(x, name='x')
mul = aten.mul(source, 0.5)
pow = aten.pow(source, 3)
mul_1 = aten.mul(pow, 0.044715)
add = aten.add(source, mul_1)
mul_2 = aten.mul(add, 0.797885)
tanh = aten.tanh(mul_2)
add_1 = aten.add(tanh, 1)
mul_3 = aten.mul(mul, add_1)
return [mul_3]"""
    )
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
activation_0 = self.activation_0(source)
return [activation_0]"""
    )
    assert (
        text(after.activation_0)
        == """\
mul = aten.mul(x, 0.5)
pow = aten.pow(x, 3)
mul_1 = aten.mul(pow, 0.044715)
add = aten.add(x, mul_1)
mul_2 = aten.mul(add, 0.797885)
tanh = aten.tanh(mul_2)
add_1 = aten.add(tanh, 1)
mul_3 = aten.mul(mul, add_1)
return mul_3"""
    )


def test_golden_condition():
    """A comparison of the region's own input belongs to it; a learned slope comes in."""
    before, after, _ = raised(elu)
    assert (
        text(before)
        == """\
source = ops.source(x, name='x')
gt = aten.gt(source, 0)
exp = aten.exp(source)
sub = aten.sub(exp, 1)
mul = aten.mul(slope, sub)
where = aten.where(gt, source, mul)
return [where]"""
    )
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
activation_0 = self.activation_0(source, slope)
return [activation_0]"""
    )
    assert (
        text(after.activation_0)
        == """\
gt = aten.gt(x, 0)
exp = aten.exp(x)
sub = aten.sub(exp, 1)
mul = aten.mul(constant_1, sub)
where = aten.where(gt, x, mul)
return where"""
    )


def test_golden_gate_written_out():
    """The gate's activation is raised, its product with the other value stays a product."""
    _, after, _ = raised(swiglu_written_out)
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
mul = aten.mul(source, slope)
flip = aten.flip(source, [-1])
activation_0 = self.activation_0(mul)
mul_1 = aten.mul(activation_0, flip)
return [mul_1]"""
    )


def test_golden_soft_cap_of_a_region():
    """Linear ops before and behind stay outside."""
    _, after, _ = raised(lambda m, x: 30 * silu(m, x / 30))
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
div = aten.div(source, 30)
activation_0 = self.activation_0(div)
mul = aten.mul(activation_0, 30)
return [mul]"""
    )


def test_golden_sum_of_two():
    """Two activations of one input are two; they and a residual are added as before."""
    _, after, _ = raised(lambda m, x: x + silu(m, x) + torch.tanh(x))
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
activation_0 = self.activation_0(source)
add = aten.add(source, activation_0)
tanh = aten.tanh(source)
add_1 = aten.add(add, tanh)
return [add_1]"""
    )


def test_golden_periodic():
    """x + sin²(a x)/a: of the learned frequency, only the inner factor lies in the way."""
    _, after, _ = raised(lambda m, x: x + torch.sin(m.slope * x).square() / m.slope)
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
mul = aten.mul(slope, source)
activation_0 = self.activation_0(mul)
div = aten.div(activation_0, slope)
add = aten.add(source, div)
return [add]"""
    )


def test_golden_inner_value_used_elsewhere():
    """The gate is an output too: it stays for that, and y's relevance is as without it."""

    def function(m, x):
        gate = torch.sigmoid(x)
        return x * gate, gate

    _, after, result = raised(function)
    assert result.changes == 1
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
sigmoid = aten.sigmoid(source)
activation_0 = self.activation_0(source)
return [activation_0, sigmoid]"""
    )
    given = example()
    seed = torch.rand_like(given["x"])
    _, alone, _ = raised(silu)
    observed, unobserved = (relevance(graph, given, seed)["x"] for graph in (after, alone))
    torch.testing.assert_close(observed, unobserved, rtol=0, atol=0)


def test_same_function_is_shared():
    class Twice(nn.Module):
        def forward(self, x):
            return quickgelu(self, mish(self, quickgelu(self, x).flip(-1)).flip(-1))

    graph = prepared(Twice().double(), example())
    run_passes(graph, PassContext(), (raise_activations,))
    assert text(graph).count("self.activation_0(") == 2
    assert text(graph).count("self.activation_1(") == 1


def test_second_run_keeps_the_names_of_the_first():
    """A pass in between may add a region; it must not take the name of another."""
    _, after, _ = raised(silu)
    (activation,) = after.graph.find_nodes(op="call_module", target="activation_0")
    given = example()
    with after.graph.inserting_after(activation):
        gate = after.graph.call_function(torch.ops.aten.tanh.default, (activation,))
        product = after.graph.call_function(torch.ops.aten.mul.Tensor, (activation, gate))
    gate.meta, product.meta = dict(activation.meta), dict(activation.meta)
    del gate.meta["kind"], product.meta["kind"]
    gate.append(product)
    activation.replace_all_uses_with(product, lambda user: user not in (gate, product))
    after.recompile()
    expected = run(after, given)
    (result,) = run_passes(after, PassContext(), (raise_activations,))
    assert result.changes == 1
    torch.testing.assert_close(run(after, given), expected, rtol=0, atol=0)
