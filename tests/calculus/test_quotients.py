"""(f(x) − f(0)) / x of every activation against a hundred digits, where division would fail.

At 0, next to 0, in the tails: the factor of the identity rule is never NaN, and right to 1e-5 in
float32 and 1e-9 in float64, also where f(x) − f(0) cancels.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from mpmath import mp, mpf
from references import rewrite
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.calculus.quotients import intercept, quotient
from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.graph.operators import ACTIVATIONS, aten

mp.dps = 100

DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
MAGNITUDES = [1e-10, 1e-6, 1e-3, 3e-2, 0.3, 1.0, 3.0, 30.0]
EVERYWHERE = [0.0, *MAGNITUDES, *(-m for m in MAGNITUDES)]
POSITIVE = MAGNITUDES
UNIT = [0.0, *(sign * m for m in MAGNITUDES[:5] for sign in (1, -1))]

Real = Callable[[Any], Any]


@dataclass(frozen=True)
class Activation:
    """An op, its arguments beside x, and the same function of real numbers."""

    exact: Real
    args: tuple[Any, ...] = ()
    """After x; `X` among them stands for x in another place."""
    points: list[float] = field(default_factory=lambda: EVERYWHERE)
    overload: str = "default"
    singular: bool = False
    """Whether f(0) is infinite: then there is no f(0) to subtract."""
    kink: bool = False
    """Whether f has no derivative at 0: then any slope between both is right there."""
    kwargs: dict[str, Any] = field(default_factory=dict)


X = object()


def _gelu(x: Any) -> Any:
    return x * mpmath.erfc(-x / mp.sqrt(2)) / 2


def _gelu_tanh(x: Any) -> Any:
    return x * _sigmoid(mp.sqrt(8 / mp.pi) * (x + mpf(0.044715) * x**3))


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def _softplus(x: Any) -> Any:
    return mp.log1p(mp.exp(x))


def _elu(alpha: float, scale: float = 1.0, inner: float = 1.0) -> Real:
    return lambda x: mpf(scale) * (x if x > 0 else mpf(alpha) * mp.expm1(x * mpf(inner)))


def _clamp(low: float = -mp.inf, high: float = mp.inf) -> Real:
    return lambda x: min(max(x, mpf(low)), mpf(high))


SELU_ALPHA, SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946

CASES: dict[str, Activation] = {
    "atan2": Activation(lambda x: mpmath.atan2(x, 2), (torch.tensor(2.0),)),
    "hypot": Activation(lambda x: mpmath.hypot(x, 2), (torch.tensor(2.0),)),
    "erfinv": Activation(mpmath.erfinv, points=UNIT),
    "rrelu": Activation(lambda x: x * (1 if x > 0 else mpf(11) / 48), kink=True),
    "abs": Activation(abs, kink=True),
    "acos": Activation(mp.acos, points=UNIT),
    "asin": Activation(mp.asin, points=UNIT),
    "asinh": Activation(mp.asinh),
    "atan": Activation(mp.atan),
    "celu": Activation(_elu(1.3, inner=1 / 1.3), (1.3,)),
    "clamp": Activation(_clamp(0.25, 2.0), (0.25, 2.0)),
    "clamp_max": Activation(_clamp(high=0.01), (0.01,)),
    "clamp_min": Activation(_clamp(low=-0.01), (-0.01,)),
    "cos": Activation(mp.cos),
    "cosh": Activation(mp.cosh),
    "elu": Activation(_elu(0.7, 1.1, 1.2), (0.7, 1.1, 1.2), kink=True),
    "erf": Activation(mp.erf),
    "erfc": Activation(mp.erfc),
    "exp": Activation(mp.exp),
    "exp2": Activation(lambda x: mpf(2) ** x),
    "expm1": Activation(mp.expm1),
    "gelu": Activation(_gelu),
    "hardshrink": Activation(lambda x: x if abs(x) > 0.5 else mpf(0)),
    # Next to 0 counts torch's own derivative, which is 1/6 in float32 whatever the dtype.
    "hardsigmoid": Activation(
        lambda x: _clamp(0, 6)(x + 3) / 6, points=[p for p in EVERYWHERE if abs(p) > 1e-7]
    ),
    "hardswish": Activation(lambda x: x * _clamp(0, 6)(x + 3) / 6),
    "hardtanh": Activation(_clamp(-1.0, 1.0)),
    "leaky_relu": Activation(lambda x: x if x > 0 else mpf(0.01) * x, kink=True),
    "log": Activation(mp.log, points=POSITIVE, singular=True),
    "log10": Activation(mp.log10, points=POSITIVE, singular=True),
    "log1p": Activation(mp.log1p, points=[p for p in EVERYWHERE if p > -1]),
    "log2": Activation(lambda x: mp.log(x, 2), points=POSITIVE, singular=True),
    "log_sigmoid": Activation(lambda x: -_softplus(-x)),
    "logit": Activation(
        lambda x: mp.log(x / (1 - x)), points=[p for p in POSITIVE if p < 1], singular=True
    ),
    "mish": Activation(lambda x: x * mp.tanh(_softplus(x))),
    "pow": Activation(lambda x: x**3, (3,), overload="Tensor_Scalar"),
    "prelu": Activation(lambda x: x if x > 0 else x / 4, (torch.tensor([0.25]),), kink=True),
    "reciprocal": Activation(lambda x: 1 / x, points=[p for p in EVERYWHERE if p], singular=True),
    "relu": Activation(_clamp(low=0), kink=True),
    "relu6": Activation(_clamp(0, 6), kink=True),
    "rsqrt": Activation(lambda x: 1 / mp.sqrt(x), points=POSITIVE, singular=True),
    "selu": Activation(_elu(SELU_ALPHA, SELU_SCALE), kink=True),
    "sigmoid": Activation(_sigmoid),
    "silu": Activation(lambda x: x * _sigmoid(x)),
    "sin": Activation(mp.sin),
    "sinh": Activation(mp.sinh),
    "softplus": Activation(_softplus),
    "softshrink": Activation(lambda x: mp.sign(x) * max(abs(x) - 0.5, mpf(0))),
    "sqrt": Activation(mp.sqrt, points=POSITIVE),
    "square": Activation(lambda x: x**2),
    "tan": Activation(mp.tan),
    "tanh": Activation(mp.tanh),
    "threshold": Activation(lambda x: x if x > 0.1 else mpf(20), (0.1, 20.0)),
}

VARIANTS: dict[str, tuple[str, Activation]] = {
    "gelu, tanh": ("gelu", Activation(_gelu_tanh, kwargs={"approximate": "tanh"})),
    "clamp, a kink next to 0": ("clamp", Activation(_clamp(-1e-3, 1e-3), (-1e-3, 1e-3))),
    "clamp, above 0": ("clamp", Activation(_clamp(7e-4, 2e-3), (7e-4, 2e-3))),
    "pow, 2": ("pow", Activation(lambda x: x**2, (2,), overload="Tensor_Scalar")),
    "pow, ½": (
        "pow",
        Activation(mp.sqrt, (0.5,), points=POSITIVE, overload="Tensor_Scalar"),
    ),
    "pow, 1½": (
        "pow",
        Activation(lambda x: x ** mpf(1.5), (1.5,), points=POSITIVE, overload="Tensor_Scalar"),
    ),
    "pow, −1": (
        "pow",
        Activation(
            lambda x: 1 / x,
            (-1,),
            points=[p for p in EVERYWHERE if p],
            overload="Tensor_Scalar",
            singular=True,
        ),
    ),
    "3 to the x": ("pow", Activation(lambda x: mpf(3) ** x, (3.0, X), overload="Scalar")),
    "softplus, steep": (
        "softplus",
        Activation(lambda x: _softplus(4 * x) / 4, (4.0, 20.0), points=EVERYWHERE),
    ),
}

ALL = {name: (name, case) for name, case in CASES.items()} | VARIANTS


def test_every_activation_is_here() -> None:
    assert sorted(CASES) == sorted(ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_factor(name: str, dtype: torch.dtype) -> None:
    """The factor of each op of the table, to the tolerance of its dtype."""
    op_name, case = ALL[name]
    smallest = [] if name == "hardsigmoid" else [torch.finfo(dtype).tiny]
    x = torch.tensor([*case.points, *smallest], dtype=dtype)
    factor = _factor_of_op(op_name, case, x)
    _check(factor, x, case)


def _factor_of_op(name: str, case: Activation, x: Tensor) -> Tensor:
    op = getattr(getattr(aten, name), case.overload)

    def function(x: Tensor) -> Tensor:
        return op(*_args(case, x), **case.kwargs)  # type: ignore[no-any-return]

    output, factor = quotient(function, op, _args(case, x), case.kwargs, x)
    torch.testing.assert_close(output, function(x), rtol=0, atol=0)
    return factor()


def _args(case: Activation, x: Tensor) -> tuple[Any, ...]:
    args = tuple(a.to(x.dtype) if isinstance(a, Tensor) else a for a in case.args)
    return tuple(x if a is X else a for a in args) if X in case.args else (x, *args)


def _check(factor: Tensor, x: Tensor, case: Activation, absolute: float = 0.0) -> None:
    """Compare a factor with its exact value; beyond the dtype's range it is infinite or 0."""
    limits = torch.finfo(x.dtype)
    assert not factor.isnan().any()
    for point, got in zip(x.tolist(), factor.tolist(), strict=True):
        if point == 0 and case.kink:
            continue
        exact = _exact(case, point)
        if abs(exact) > limits.max:
            assert abs(got) == torch.inf
            continue
        limit = 0.0 if point else 1e-39
        allowed = TOLERANCE[x.dtype] * abs(exact) + max(limits.tiny, limit) + absolute
        assert abs(mpf(got) - exact) <= allowed, f"at {point}: {got}, not {mp.nstr(exact, 12)}"


def _exact(case: Activation, point: float) -> Any:
    """(f(x) − f(0)) / x; at 0 its limit, taken at 1e-40."""
    with mp.workdps(800 if 0 < abs(point) < 1e-30 else 100):
        at = mpf(point) if point else mpf("1e-40")
        at_zero = 0 if case.singular else case.exact(mpf(0))
        return (case.exact(at) - at_zero) / at


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_minus_infinity(name: str, dtype: torch.dtype) -> None:
    """Wherever f(−∞) is finite, so is the factor: 0, or the slope of a line."""
    op_name, case = ALL[name]
    x = torch.tensor([-torch.inf, 1.0], dtype=dtype)
    if X in case.args or op_name == "pow":
        value = getattr(torch, op_name)(*_args(case, x))
    else:
        value = getattr(aten, op_name)(*_args(case, x), **case.kwargs)
    if torch.isfinite(value[0]):
        assert _factor_of_op(op_name, case, x)[0] == 0


@pytest.mark.parametrize("name", ["sigmoid", "exp", "softplus", "cos"])
def test_law(name: str) -> None:
    """x · factor = f(x) − f(0), what the ledger rests on."""
    x = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    function = getattr(aten, name).default
    output, factor = quotient(function, function, (x,), {}, x)
    lost = x * factor() - (output - intercept(function, x))
    assert float((lost.abs() / (1 + output.abs())).max()) <= 1e-14


def test_intercept() -> None:
    x = torch.tensor([-1.0, 0.0, 2.0])
    assert intercept(torch.cos, x).tolist() == [1.0, 1.0, 1.0]
    assert intercept(torch.log, x).tolist() == [0.0, 0.0, 0.0]
    assert intercept(lambda v: v / v, x).tolist() == [0.0, 0.0, 0.0]


def test_broadcast() -> None:
    """Where constants broadcast x, the factor has the output's shape."""
    x = torch.tensor([[0.5], [2.0]])
    floor = torch.tensor([1.0, -1.0, 3.0])

    def function(x: Tensor) -> Tensor:
        return torch.maximum(x, floor)

    output, factor = quotient(function, aten.maximum.default, (x, floor), {}, x)
    at_zero = torch.tensor([1.0, 0.0, 3.0])
    torch.testing.assert_close(factor(), (output - at_zero) / x)


def _relu_squared(x: Tensor) -> Tensor:
    return torch.relu(x).square()


WRITTEN_OUT: dict[str, tuple[Callable[[Tensor], Tensor], Activation]] = {
    "NewGELU": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0)))),
        Activation(lambda x: x * _sigmoid(2 * mpf(0.7978845608) * (x + mpf(0.044715) * x**3))),
    ),
    "GELU": (lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.4142135623730951)), Activation(_gelu)),
    "QuickGELU": (
        lambda x: x * torch.sigmoid(1.702 * x),
        Activation(lambda x: x * _sigmoid(mpf(1.702) * x)),
    ),
    "SiLU": (lambda x: x * torch.sigmoid(x), Activation(lambda x: x * _sigmoid(x))),
    "SiLU, divided": (lambda x: x / (1 + torch.exp(-x)), Activation(lambda x: x * _sigmoid(x))),
    "Mish": (
        lambda x: x * torch.tanh(F.softplus(x)),
        Activation(lambda x: x * mp.tanh(_softplus(x))),
    ),
    "Mish, by logarithms": (
        lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))),
        Activation(lambda x: x * mp.tanh(_softplus(x))),
    ),
    "ReLU²": (_relu_squared, Activation(lambda x: _clamp(low=0)(x) ** 2)),
    "hardswish": (
        lambda x: x * F.relu6(x + 3),
        Activation(lambda x: x * _clamp(0, 6)(x + 3)),
    ),
    "softsign": (F.softsign, Activation(lambda x: x / (1 + abs(x)))),
    "softplus": (lambda x: torch.log(1 + torch.exp(x)), Activation(_softplus)),
    "Gaussian": (lambda x: torch.exp(-(x**2)), Activation(lambda x: mp.exp(-(x**2)))),
    "sin of a square": (lambda x: torch.sin(x * x), Activation(lambda x: mp.sin(x * x))),
    "soft cap of a gate": (
        lambda x: torch.tanh(x * torch.sigmoid(x) / 30.0),
        Activation(lambda x: mp.tanh(x * _sigmoid(x) / 30)),
    ),
}


@functools.cache
def _rewritten(name: str) -> fx.GraphModule:
    return rewrite(lambda x: WRITTEN_OUT[name][0](x), {"x": torch.ones(3, 5)})


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_written_out_is_raised(name: str) -> None:
    """One activation, the whole of it, under the identity rule."""
    rewritten = _rewritten(name)
    assert _rules(rewritten) == ["Identity()"]
    (node,) = rewritten.graph.find_nodes(op="call_function", target=ops.identity)
    assert isinstance(node.args[0], fx.Node)
    assert node.args[0].target == "activation_0"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_written_out(name: str, dtype: torch.dtype) -> None:
    """To rounding of the terms that the model itself adds: 1 + tanh(x) loses its tail."""
    case = WRITTEN_OUT[name][1]
    x = torch.tensor([*case.points, torch.finfo(dtype).tiny], dtype=dtype)[None]
    rounding = 8 * torch.finfo(dtype).eps
    _check(_factor_of_graph(_rewritten(name), x)[0], x[0], case, rounding)


def _factor_of_graph(rewritten: fx.GraphModule, x: Tensor) -> Tensor:
    tape = Tape(rewritten)
    tape.run(x)
    (node,) = rewritten.graph.find_nodes(op="call_function", target=ops.identity)
    (factor,) = tape.pullbacks[node](torch.ones_like(x))
    assert factor is not None
    return factor


def _rules(rewritten: fx.GraphModule) -> list[str]:
    return [node.meta["rule"] for node in rewritten.graph.nodes if "rule" in node.meta]


def test_soft_cap() -> None:
    """tanh(x/30)·30: the scales are linear and stay outside; the tanh stays an op of the table."""
    rewritten = rewrite(lambda x: torch.tanh(x / 30.0) * 30.0, {"x": torch.ones(3, 5)})
    assert _rules(rewritten) == ["Epsilon()", "Identity()", "Epsilon()"]


def test_linear_ops_are_not_raised() -> None:
    """Lines have no curve to raise, and a product of two values is a product."""
    rewritten = rewrite(lambda x: (2 * x + 1).flip(0) - x / 3, {"x": torch.ones(3, 5)})
    assert set(_rules(rewritten)) == {"Epsilon()"}
    inputs = {"x": torch.ones(3, 5), "y": torch.ones(3, 5)}
    assert _rules(rewrite(lambda x, y: x * y, inputs)) == ["Uniform()"]


def test_the_gradient_of_a_factor_is_true() -> None:
    """Relevance is differentiable: no detached part, no NaN from the branch not taken."""
    x = torch.tensor([-3.0, -1e-3, 0.0, 1e-3, 3.0], dtype=torch.float64, requires_grad=True)
    divided = ("tanh", "sin", "erf", "expm1", "atan", "elu")
    for name in ("sigmoid", "silu", "gelu", "exp", "softplus", *divided):
        op = getattr(aten, name).default

        def factor(x: Tensor, op: Any = op) -> Tensor:
            return quotient(op, op, (x,), {}, x)[1]()

        (gradient,) = torch.autograd.grad(factor(x).sum(), x)
        step = 1e-4
        with torch.no_grad():
            numeric = (factor(x + step) - factor(x - step)) / (2 * step)
        where = x.detach() != 0 if name == "elu" else torch.ones(5, dtype=torch.bool)  # a kink
        torch.testing.assert_close(gradient[where], numeric[where], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["tanh", "sin", "erf", "expm1", "log1p", "atan"])
def test_the_gradient_of_a_factor_near_zero(name: str) -> None:
    """Right to rounding in float32, where the derivative of f(x)/x would cancel."""
    op = getattr(aten, name).default

    def slope(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(quotient(op, op, (x,), {}, x)[1]().sum(), x)[0]

    small = torch.tensor([-0.3, -1e-2, -1e-5, 0.0, 1e-7, 1e-4, 3e-2, 5e-2])
    assert_close = torch.testing.assert_close
    assert_close(slope(small), slope(small.double().detach()).float(), rtol=1e-3, atol=1e-5)


def test_the_gradient_of_a_root_is_finite_at_zero() -> None:
    x = torch.tensor([0.0, 4.0], requires_grad=True)
    factor = quotient(aten.sqrt.default, aten.sqrt.default, (x,), {}, x)[1]()
    (gradient,) = torch.autograd.grad(factor.sum(), x)
    assert gradient.tolist() == [0.0, -0.0625]
