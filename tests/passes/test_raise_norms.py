"""Normalisations written out in every common way have their statistic marked, and no other."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, copy_of, prepared, run, text
from torch import Tensor

import attnlrp_fx
from attnlrp_fx import Logit
from attnlrp_fx.passes import PassContext, raise_norms, run_passes

BATCH, WIDTH, GROUPS = 3, 12, 4
EPS = 1e-5

# Each takes its parameters, the value, and `hold`, which stands around the statistic: nothing in
# the model, a detach in the reference.


def rms_norm(m, x, hold):
    return m.weight * (x * hold(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)))


def rms_norm_around_one(m, x, hold):
    """The weight is learned as its distance from one."""
    return x * hold(torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS)) * (1.0 + m.weight)


def rms_norm_by_power(m, x, hold):
    return x * hold((x.square().mean(-1, keepdim=True) + EPS) ** -0.5)


def rms_norm_divided(m, x, hold):
    return (x * m.weight) / hold(torch.sqrt(x.pow(2).sum(-1, keepdim=True) / WIDTH + EPS))


def rms_norm_by_reciprocal(m, x, hold):
    return x * hold(1 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def rms_norm_weight_first(m, x, hold):
    """The weight is multiplied with the statistic."""
    return x * hold(torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * m.weight)


def layer_norm(m, x, hold):
    centred = x - x.mean(-1, keepdim=True)
    return centred / hold(torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + EPS)) + m.bias


def layer_norm_by_var(m, x, hold):
    variance = x.var(-1, keepdim=True, unbiased=False)
    return m.weight * ((x - x.mean(-1, keepdim=True)) * hold(torch.rsqrt(variance + EPS))) + m.bias


def layer_norm_by_std(m, x, hold):
    return (x - x.mean(-1, keepdim=True)) / hold(torch.std(x, -1, keepdim=True) + EPS)


def layer_norm_by_moments(m, x, hold):
    """The variance is the mean square less the squared mean."""
    mean = x.mean(-1, keepdim=True)
    variance = (x * x).mean(-1, keepdim=True) - mean * mean
    return (x - mean) * hold(torch.rsqrt(variance + EPS))


def layer_norm_by_var_mean(m, x, hold):
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) / hold(torch.sqrt(variance + EPS))


def layer_norm_of_a_residual(m, x, hold):
    """The value is itself a sum, of which one term is averaged."""
    x = x + (x * m.weight).mean(-1, keepdim=True)
    return x * hold(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))


def group_norm(m, x, hold):
    grouped = x.view(-1, GROUPS, WIDTH // GROUPS)
    variance, mean = grouped.var(-1, keepdim=True), grouped.mean(-1, keepdim=True)
    return ((grouped - mean) * hold(torch.rsqrt(variance + EPS))).view(-1, WIDTH) * m.weight


def l2_norm(m, x, hold):
    return x / hold(x.norm(dim=-1, keepdim=True))


def l2_norm_of_torch(m, x, hold):
    return x / hold(x.norm(2, -1, keepdim=True).clamp_min(1e-12).expand_as(x))


def l2_norm_by_sum(m, x, hold):
    return x * hold(torch.rsqrt(torch.sum(x**2, -1, keepdim=True) + EPS))


def l1_norm(m, x, hold):
    return x / hold(x.abs().sum(-1, keepdim=True))


def largest_absolute_value(m, x, hold):
    return x / hold(x.abs().amax(-1, keepdim=True))


def largest_absolute_value_of_max(m, x, hold):
    return x / hold(x.abs().max(-1, keepdim=True).values)


def masked_mean_square(m, x, hold):
    """Only some features count."""
    keep = torch.arange(WIDTH) < 7
    return x * hold(torch.rsqrt(torch.where(keep, x.pow(2), 0.0).sum(-1, keepdim=True) / 7 + EPS))


NORMS = [
    rms_norm,
    rms_norm_around_one,
    rms_norm_by_power,
    rms_norm_divided,
    rms_norm_by_reciprocal,
    rms_norm_weight_first,
    layer_norm,
    layer_norm_by_var,
    layer_norm_by_std,
    layer_norm_by_moments,
    layer_norm_by_var_mean,
    layer_norm_of_a_residual,
    group_norm,
    l2_norm,
    l2_norm_of_torch,
    l2_norm_by_sum,
    l1_norm,
    largest_absolute_value,
    largest_absolute_value_of_max,
    masked_mean_square,
]


def nothing(statistic: Tensor) -> Tensor:
    return statistic


def model_of(norm) -> Written:
    """A linear map, a norm, and three logits."""
    torch.manual_seed(0)
    parameters = {
        "weight": torch.randn(WIDTH),
        "bias": torch.randn(WIDTH),
        "enter": torch.randn(WIDTH, WIDTH),
        "leave": torch.randn(WIDTH, 3),
    }
    parameters = {name: value.double() for name, value in parameters.items()}
    return Written(lambda m, x: norm(m, x @ m.enter, nothing) @ m.leave, **parameters).eval()


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, WIDTH, dtype=torch.float64)}


def held_relevance(model, norm, x: Tensor) -> Tensor:
    """x times the gradient of the second logit, the statistic detached."""
    x = x.clone().requires_grad_()
    logits = norm(model, x @ model.enter, Tensor.detach) @ model.leave
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    return (x * gradient).detach()


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_relevance_is_that_of_a_constant_statistic(norm):
    model = model_of(norm)
    given = example()
    explainer = attnlrp_fx.compile(model, given, backend="eager", target=Logit(1))
    (result,) = (r for r in explainer.report().passes if r.name == "raise_norms")
    assert (result.changes, result.near_misses) == (1, [])
    given = {"x": torch.randn(5, WIDTH, dtype=torch.float64)}
    torch.testing.assert_close(
        explainer(**given).relevance["x"],
        held_relevance(model, norm, given["x"]),
        rtol=1e-12,
        atol=1e-12,
    )


def normalize(m, x, hold):
    """PyTorch's own, of which the statistic cannot be detached from outside."""
    return F.normalize(x, dim=-1)


def test_normalize_of_torch():
    model = model_of(normalize)
    given = example()
    explainer = attnlrp_fx.compile(model, given, backend="eager", target=Logit(1))
    torch.testing.assert_close(
        explainer(**given).relevance["x"],
        held_relevance(model, l2_norm_of_torch, given["x"]),
        rtol=1e-12,
        atol=1e-12,
    )


def float32_rms_norm(m, x, hold):
    """Computed in float32, whatever the model's dtype is."""
    y = x.to(torch.float32)
    y = y * hold(torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + EPS))
    return m.weight * y.to(x.dtype)


def test_casts_do_not_hide_a_norm():
    model = model_of(float32_rms_norm)
    given = example()
    explainer = attnlrp_fx.compile(model, given, backend="eager", target=Logit(1))
    expected = held_relevance(model, float32_rms_norm, given["x"])
    found = explainer(**given).relevance["x"]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def raised(function):
    """Before, after, and what the pass says, of a function of the value alone."""
    before = prepared(Written(lambda m, x: function(x)), example())
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (raise_norms,))
    return before, after, result


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.__name__)
def test_meaning_is_unchanged(norm):
    before = prepared(model_of(norm), example())
    after = copy_of(before)
    run_passes(after, PassContext(), (raise_norms,))
    given = example()
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


def test_golden():
    before, after, _ = raised(lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS))
    assert (
        text(before)
        == """\
source = ops.source(x, name='x')
pow = aten.pow(source, 2)
mean = aten.mean(pow, [-1], True)
add = aten.add(mean, 1e-05)
rsqrt = aten.rsqrt(add)
mul = aten.mul(source, rsqrt)
return [mul]"""
    )
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
pow = aten.pow(source, 2)
mean = aten.mean(pow, [-1], True)
add = aten.add(mean, 1e-05)
rsqrt = aten.rsqrt(add)
statistic = ops.statistic(rsqrt)
mul = aten.mul(source, statistic)
return [mul]"""
    )


def test_golden_divided_and_centred():
    _, after, _ = raised(lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS))
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
mean = aten.mean(source, [-1], True)
sub = aten.sub(source, mean)
std = aten.std(source, [-1], True, True)
add = aten.add(std, 1e-05)
statistic = ops.statistic(add)
div = aten.div(sub, statistic)
return [div]"""
    )


def shares(x):
    return x / x.sum(-1, keepdim=True)


NOT_NORMS = {
    "statistic of another value": (
        lambda x: x * torch.rsqrt(torch.tanh(x).pow(2).mean(-1, keepdim=True) + EPS),
        "'rsqrt' is a statistic of 'tanh', not of the value",
    ),
    "statistic of the other half": (
        lambda x: x[:, :6] / x[:, 6:].norm(dim=-1, keepdim=True),
        "is a statistic of 'source', not of the value",
    ),
    "difference to another value": (
        lambda x: (x - torch.tanh(x)) / x.norm(dim=-1, keepdim=True),
        "is a statistic of 'source', not of the value",
    ),
    "degree 1": (
        lambda x: x * x.abs().mean(-1, keepdim=True),
        "'mean' is a statistic of degree 1, not -1",
    ),
    "degree -2": (
        lambda x: x / x.pow(2).sum(-1, keepdim=True),
        "'sum_1' is a statistic of degree 2, not 1",
    ),
    "degree 0": (
        lambda x: x * (x.norm(dim=0, keepdim=True) / x.norm(dim=0, keepdim=True).mean()),
        "is a statistic of degree 0, not -1",
    ),
    "softmax written out": (
        lambda x: shares((x - x.amax(-1, keepdim=True)).exp()),
        "'sum_1' changes its sign with the value: it shares out, it is no norm",
    ),
    "shares": (
        lambda x: shares(x),
        "'sum_1' changes its sign with the value: it shares out, it is no norm",
    ),
    "range": (
        lambda x: (
            (x - x.amin(-1, keepdim=True)) / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True))
        ),
        "changes its sign with the value: it shares out, it is no norm",
    ),
}


@pytest.mark.parametrize("name", NOT_NORMS)
def test_near_miss(name):
    function, reason = NOT_NORMS[name]
    before, after, result = raised(function)
    assert result.changes == 0
    assert text(after) == text(before)
    assert any(reason in near_miss for near_miss in result.near_misses)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
        lambda x: x / (1 + x.abs()),
        lambda x: x / torch.max(x.abs(), torch.ones(WIDTH, dtype=x.dtype)),
        lambda x: x * x,
        lambda x: x * (x.mean(-1, keepdim=True) + x.pow(2).mean(-1, keepdim=True)),
    ],
    ids=["gate", "softsign", "clipped", "square", "unlike degrees"],
)
def test_is_no_norm_at_all(function):
    before, after, result = raised(function)
    assert (result.changes, result.near_misses) == (0, [])
    assert text(after) == text(before)


def test_each_of_two_norms_has_its_own_statistic():
    """The second normalises what the first returns."""

    def twice(x):
        for _ in range(2):
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
        return x

    _, after, result = raised(twice)
    assert result.changes == 2
    assert text(after).count("ops.statistic") == 2
