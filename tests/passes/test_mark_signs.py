"""Signs that the graph itself tells, and what would be wrong if they were told too freely."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, captured, copy_of, run, text

from attnlrp_fx import (
    COMPOSITES,
    AlphaBeta,
    Flat,
    Gamma,
    Gradient,
    Identity,
    Join,
    Match,
    Pass,
    Taylor,
    WSquare,
    ZPlus,
    ops,
)
from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.passes import ASSIGN, NORMALISE, RAISE, PassContext, mark_signs, run_passes

DOUBLE = torch.float64
GAMMA = (Match(role="dense"), Gamma(0.5))
CONVOLUTION = (Match(role="convolution"), Gamma(0.5))


def randn(*shape, seed=11):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def context(*entries):
    return PassContext(composite=COMPOSITES["attnlrp"].with_rules(*entries, GAMMA, CONVOLUTION))


def marked(function, x, *entries, **parameters):
    """Before, after, and what the pass says."""
    before = captured(Written(function, **parameters), {"x": x})
    run_passes(before, context(*entries), (*NORMALISE, *RAISE, *ASSIGN[: ASSIGN.index(mark_signs)]))
    after = copy_of(before)
    (result,) = run_passes(after, context(*entries), (mark_signs,))
    return before, after, result


def signs(graph_module, *targets):
    """What is known at each layer, in order."""
    return [
        {name for name in ("nonnegative", "rectified") if node.kwargs.get(name)}
        for node in graph_module.graph.nodes
        if node.target in (targets or (ops.gamma,))
    ]


def relevance(graph_module, x, seed=None):
    tape = Tape(graph_module)
    with torch.no_grad():
        (output, *_) = tape.run(x)
        (seeded, *_) = graph_module.graph.output_node().args[0]
        seed = torch.ones_like(output) if seed is None else seed
        return tape.reverse({seeded: seed}).relevance["x"]


def mlp(m, x):
    """Two layers and a head; γ in the first, αβ in the second, z⁺ in the third."""
    h = torch.relu(F.linear(x, m.a, m.b))
    return F.linear(torch.relu(F.linear(h, m.c)), m.d)


MLP = {"a": randn(5, 4), "b": randn(1, 5)[0], "c": randn(6, 5), "d": randn(3, 6)}


def test_golden():
    before, after, result = marked(
        mlp,
        randn(2, 4),
        (Match(op="aten.linear.*", module="none"), ZPlus()),
        **MLP,
    )
    assert (result.changes, result.notes, result.near_misses) == (3, [], [])
    assert (
        text(before)
        == """\
source = ops.source(x, name='x')
gamma = ops.gamma(aten.linear, source, a, b, gamma=0.5)
identity = ops.identity(aten.relu, gamma)
gamma_1 = ops.gamma(aten.linear, identity, c, gamma=0.5)
identity_1 = ops.identity(aten.relu, gamma_1)
gamma_2 = ops.gamma(aten.linear, identity_1, d, gamma=0.5)
return [gamma_2]"""
    )
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
gamma = ops.gamma(aten.linear, source, a, b, gamma=0.5, rectified=True)
identity = ops.identity(aten.relu, gamma)
gamma_1 = ops.gamma(
    aten.linear, identity, c, gamma=0.5, nonnegative=True, rectified=True
)
identity_1 = ops.identity(aten.relu, gamma_1)
gamma_2 = ops.gamma(aten.linear, identity_1, d, gamma=0.5, nonnegative=True)
return [gamma_2]"""
    )


def test_golden_of_other_rules():
    """αβ and z⁺ read the sign of their input alone; what looks at no input reads none."""

    def function(m, x):
        h = F.linear(torch.relu(x), m.a)
        return F.linear(torch.relu(F.conv1d(torch.relu(h)[:, None], m.c).flatten(1)), m.d)

    weights = {"a": randn(5, 4), "c": randn(1, 1, 2), "d": randn(3, 4)}
    first, dense = Match(role="first"), Match(role="dense")
    entries = (
        (first, AlphaBeta()),
        (Match(role="convolution"), ZPlus(epsilon=1e-6)),
        (dense, WSquare()),
    )
    _, after, result = marked(function, randn(2, 4), *entries, **weights)
    assert result.changes == 1
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
identity = ops.identity(aten.relu, source)
w_square = ops.w_square(aten.linear, identity, a)
identity_1 = ops.identity(aten.relu, w_square)
linear = ops.linear(aten.unsqueeze, identity_1, 1)
alpha_beta = ops.alpha_beta(aten.conv1d, linear, c, epsilon=1e-06, nonnegative=True)
linear_1 = ops.linear(aten.flatten, alpha_beta, 1)
identity_2 = ops.identity(aten.relu, linear_1)
w_square_1 = ops.w_square(aten.linear, identity_2, d)
return [w_square_1]"""
    )


NONNEGATIVE = {
    "relu": torch.relu,
    "relu6": F.relu6,
    "clamp": lambda x: x.clamp(min=0),
    "clamp of an interval": lambda x: x.clamp(0.0, 2.0),
    "hardtanh": lambda x: F.hardtanh(x, 0.0, 1.0),
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "softmax": lambda x: torch.softmax(x, -1),
    "softplus": F.softplus,
    "exp": torch.exp,
    "abs": torch.abs,
    "square": lambda x: x**2,
    "square by name": torch.square,
    "product with itself": lambda x: x * x,
    "fourth power": lambda x: x**4,
    "max-pool": lambda x: F.max_pool2d(torch.relu(x), 2),
    "avg-pool": lambda x: F.avg_pool2d(torch.relu(x), 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(torch.relu(x), (2, 3)),
    "adaptive max-pool": lambda x: F.adaptive_max_pool2d(torch.relu(x), 2),
    "mean": lambda x: torch.relu(x).mean((2, 3)),
    "sum": lambda x: torch.relu(x).sum(2),
    "view": lambda x: torch.relu(x).flatten(1).view(x.shape[0], 2, -1),
    "transposed": lambda x: torch.relu(x).transpose(2, 3)[..., 1:],
    "part": lambda x: torch.relu(x).split([2, 2], 2)[1],
    "cat": lambda x: torch.cat([torch.relu(x), torch.sigmoid(x)], -1),
    "stack": lambda x: torch.stack([torch.relu(x), torch.sigmoid(x)], -1),
    "sum of two": lambda x: torch.relu(x) + torch.sigmoid(x.flip(-1)),
    "product of two": lambda x: torch.relu(x) * torch.sigmoid(x.flip(-1)),
    "shift": lambda x: torch.relu(x) + 1,
    "scale": lambda x: torch.relu(x) * 0.5 / 3,
    "nearest": lambda x: F.interpolate(torch.relu(x), scale_factor=2),
    "bilinear": lambda x: F.interpolate(torch.relu(x), scale_factor=2, mode="bilinear"),
    "maximum": lambda x: torch.maximum(torch.relu(x), torch.sigmoid(x.flip(-1))),
    "dropout": lambda x: F.dropout(torch.relu(x), training=False),
}
UNKNOWN = {
    "plain": lambda x: x * 2,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "leaky": F.leaky_relu,
    "log": lambda x: torch.log_softmax(x, -1),
    "clamp below": lambda x: x.clamp(min=-0.5),
    "clamp above": lambda x: x.clamp(max=0.5),
    "hardtanh around zero": F.hardtanh,
    "cube": lambda x: x**3,
    "max-pool of anything": lambda x: F.max_pool2d(x, 2),
    "negative": lambda x: -torch.relu(x),
    "difference": lambda x: torch.relu(x) - torch.sigmoid(x),
    "negative alpha": lambda x: torch.add(torch.relu(x), torch.sigmoid(x), alpha=-1),
    "negative shift": lambda x: torch.relu(x) + -1.0,
    "negative scale": lambda x: torch.relu(x) * -0.5,
    "negative divisor": lambda x: torch.relu(x) / -2,
    "one of two": lambda x: torch.relu(x) + x,
    "cat with anything": lambda x: torch.cat([torch.relu(x), x], -1),
    "cat with a constant": lambda x: torch.cat([torch.relu(x), torch.full_like(x, -1.0)], -1),
    "filled": lambda x: torch.relu(x).masked_fill(x > 1, -2.0),
    "padded": lambda x: F.pad(torch.relu(x), (1, 1), value=-1.0),
    "bicubic": lambda x: F.interpolate(torch.relu(x), scale_factor=2, mode="bicubic"),
    "norm": lambda x: F.layer_norm(torch.relu(x), (4,)),
}
OF_PARAMETERS = {
    "plus a parameter": lambda m, x: torch.relu(x) + m.shift,
    "times a parameter": lambda m, x: torch.relu(x) * m.shift,
    "over a parameter": lambda m, x: torch.relu(x) / m.shift,
    "plus the root of one": lambda m, x: torch.relu(x) + m.shift.abs().sqrt(),
    "times a constant": lambda m, x: torch.relu(x) * torch.tensor(-2.0, dtype=DOUBLE),
    "plus a constant": lambda m, x: torch.relu(x) + torch.full((4,), -2.0, dtype=DOUBLE),
}
KNOWN = {
    **{name: (lambda m, x, f=f: f(x), True) for name, f in NONNEGATIVE.items()},
    **{name: (lambda m, x, f=f: f(x), False) for name, f in UNKNOWN.items()},
    **{name: (f, name == "plus the root of one") for name, f in OF_PARAMETERS.items()},
}


@pytest.mark.parametrize("name", KNOWN)
def test_nonnegative(name):
    """What is marked is not negative, whatever the input, and relevance is as without the mark."""
    function, is_known = KNOWN[name]
    x, shift = 3 * randn(2, 3, 4, 4), -torch.ones(4, dtype=DOUBLE)
    values = function(Written(function, shift=shift), x).detach()
    assert (values >= 0).all() == is_known
    weight = randn(3, values.shape[-1])
    before, after, result = marked(
        lambda m, x: F.linear(function(m, x), m.weight), x, weight=weight, shift=shift
    )
    assert signs(after) == [{"nonnegative"} if is_known else set()]
    assert result.changes == int(is_known)
    torch.testing.assert_close(relevance(after, x), relevance(before, x), rtol=1e-9, atol=1e-12)


LAYER = (lambda m, x: F.linear(x, m.weight), {"weight": randn(5, 4)})
RECTIFIED = {
    "relu": lambda z: torch.relu(z),
    "relu6": lambda z: F.relu6(z),
    "clamp": lambda z: z.clamp(min=0),
    "two rectifiers": lambda z: torch.relu(z) + F.relu6(z),
}
NOT_RECTIFIED = {
    "alone": lambda z: z,
    "gelu": lambda z: F.gelu(z),
    "leaky": lambda z: F.leaky_relu(z),
    "view": lambda z: torch.relu(z.flatten(1)),
    "another reader": lambda z: torch.relu(z) + z,
    "clamp below": lambda z: z.clamp(min=-1.0),
}


@pytest.mark.parametrize(
    ("function", "is_known"),
    [(f, True) for f in RECTIFIED.values()] + [(f, False) for f in NOT_RECTIFIED.values()],
    ids=[*RECTIFIED, *NOT_RECTIFIED],
)
def test_rectified(function, is_known):
    """Only if rectifiers are all that reads the layer, and no output is the layer itself."""

    def whole(m, x):
        return function(F.linear(torch.relu(x), m.weight))

    before, after, _ = marked(whole, randn(3, 4), weight=LAYER[1]["weight"])
    assert signs(after) == [{"nonnegative", "rectified"} if is_known else {"nonnegative"}]
    x = randn(6, 4, seed=1)
    torch.testing.assert_close(relevance(after, x), relevance(before, x), rtol=1e-12, atol=1e-12)


def test_an_output_is_read_by_the_user():
    """A layer that is an output too may be what is explained, negative or not."""

    def whole(m, x):
        z = F.linear(torch.relu(x), m.weight)
        return z, torch.relu(z)

    _, after, _ = marked(whole, randn(3, 4), **LAYER[1])
    assert signs(after) == [{"nonnegative"}]


@pytest.mark.parametrize("rule", [Identity(), Gradient(), Taylor()], ids=str)
def test_rules_of_a_rectifier_that_hand_nothing_on(rule):
    entry = (Match(kind="activation"), rule)
    _, after, _ = marked(
        lambda m, x: torch.relu(F.linear(x, m.weight)), randn(3, 4), entry, **LAYER[1]
    )
    assert signs(after) == [{"rectified"}]


def test_a_rectifier_that_passes_everything():
    """At a rectifier, which is zero at zero, `Pass` hands on what the identity rule does."""
    entry = (Match(kind="activation"), Pass())

    def whole(m, x):
        return F.linear(torch.relu(F.linear(torch.relu(x), m.weight)), m.head)

    before, after, _ = marked(whole, randn(3, 4), entry, head=randn(2, 5), **LAYER[1])
    assert signs(after) == [{"nonnegative", "rectified"}, {"nonnegative"}]
    x = randn(6, 4, seed=1)
    torch.testing.assert_close(relevance(after, x), relevance(before, x), rtol=1e-12, atol=1e-12)


def two(m, x):
    """γ in a convolution; another rule in the linear layer behind it."""
    return F.linear(torch.relu(F.conv1d(torch.relu(x)[:, None], m.a)).flatten(1), m.b)


@pytest.mark.parametrize("rule", [Flat(), WSquare()], ids=str)
def test_relevance_of_zeros_from_above(rule):
    """A rule towards the output gives relevance to zeros of a rectifier, and so to negative sums.

    Marked all the same, the number would be wrong: those sums' shares of the positive part.
    """
    kernels = torch.tensor([[[1.0, -2.0]], [[-0.5, 0.25]]], dtype=DOUBLE)
    weights = {"a": kernels, "b": randn(3, 6)}
    before, after, _ = marked(two, randn(3, 4), (Match(role="dense"), rule), **weights)
    assert signs(after) == [{"nonnegative"}]
    x = randn(6, 4, seed=1)
    expected = relevance(before, x)
    torch.testing.assert_close(relevance(after, x), expected, rtol=1e-12, atol=1e-12)
    (layer,) = (node for node in after.graph.nodes if node.target is ops.gamma)
    layer.kwargs = {**layer.kwargs, "rectified": True}
    assert (relevance(after, x) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("split", ["equal", "magnitude"])
def test_relevance_of_zeros_through_a_join(split):
    def whole(m, x):
        h = torch.relu(F.linear(torch.relu(x), m.a))
        return h + F.linear(h, m.c)

    weights = {"a": randn(5, 4), "c": randn(5, 5)}
    entry = (Match(role="join"), Join(split))
    before, after, _ = marked(whole, randn(3, 4), entry, **weights)
    assert signs(after) == [{"nonnegative"}, {"nonnegative"}]
    x = randn(6, 4, seed=1)
    torch.testing.assert_close(relevance(after, x), relevance(before, x), rtol=1e-12, atol=1e-12)


def test_rules_towards_the_input_do_not_matter():
    """A flat first layer leaves what is known of the layers above it."""
    _, after, _ = marked(mlp, randn(2, 4), (Match(role="first"), Flat()), **MLP)
    assert signs(after) == [{"nonnegative", "rectified"}, {"nonnegative"}]


def test_meaning_is_unchanged():
    before, after, _ = marked(mlp, randn(2, 4), **MLP)
    x = {"x": randn(2, 4, seed=1)}
    torch.testing.assert_close(run(after, x), run(before, x), rtol=0, atol=0)
    assert (relevance(after, x["x"]) - relevance(before, x["x"])).abs().max() < 1e-12
    assert relevance(after, x["x"]).abs().max() > 1e-2
