"""The identity rule's factor (f(x) − f(0)) / x of an elementwise function, without dividing.

An activation is a graph of elementwise ops over one input x. Values that are x times something
are carried as that something, q with value = x·q, through the graph:

    x → 1;  a·b → q_a·b;  a ± b → q_a ± q_b;  aⁿ → q_a·aⁿ⁻¹;  f(a) → q_a·(f(a)/a)

where f(a)/a has a closed form (SiLU: σ(a), GELU: Φ(a), ReLU: step(a), ...). So NewGELU, QuickGELU,
Mish, ReLU² and their like have a closed form by composition. Where the output is not divisible by
x in this way (softplus, exp, cos: f(0) ≠ 0) the factor is the difference quotient, and the mean of
f' between 0 and x where the difference would cancel.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from attnlrp_fx.graph.operators import aten, packet

Factor = Callable[[], Tensor]


def quotient(
    function: Callable[[Tensor], Tensor],
    op: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
) -> tuple[Tensor, Factor]:
    """The output of y = f(x) and a function that computes (f(x) − f(0)) / x.

    Args:
        function: f, elementwise, any shape and floating dtype.
        op: the ATen op that f calls, or the graph of an elementwise region.
        args: the op's arguments, x among them.
        kwargs: the op's keyword arguments.
        x: the explained input.
    """
    output = function(x)
    if isinstance(op, fx.GraphModule):
        divisible = _Divisible(op, x).run(*args)
        closed = divisible.quotient if isinstance(divisible, _Value) else None
    else:
        marked = tuple(_Value(x, torch.ones_like) if arg is x else arg for arg in args)
        closed = _closed_form(op, marked, kwargs, output)
    if closed is not None:
        return output, lambda: closed(x)
    if output.shape != x.shape:
        return output, lambda: difference_quotient(function, x.expand(output.shape), output)
    return output, lambda: difference_quotient(function, x, output)


_GAUSS_LEGENDRE = tuple(
    (0.5 + t, w / 18) for t, w in ((-math.sqrt(0.15), 5), (0, 8), (math.sqrt(0.15), 5))
)
"""Nodes and weights on [0, 1]; three integrate f' to O(x⁶)."""


def difference_quotient(function: Callable[[Tensor], Tensor], x: Tensor, output: Tensor) -> Tensor:
    """(f(x) − f(0)) / x, by division or as the mean of f' between 0 and x.

    The division is right to rounding in f, which small x magnify; the mean has no cancellation,
    but is wrong across a kink, near a singularity, or for large x. So the mean counts wherever it
    agrees with the division to rounding in f, and the law x·factor = f(x) − f(0) holds everywhere.
    Where f is infinite at 0 (1/x, log x) there is no f(0) to subtract, nor a mean.
    """
    at_zero = intercept(function, x)
    scale = torch.maximum(output.abs(), at_zero.abs()).clamp(min=1.0)
    division = (output - at_zero) / torch.where(x == 0, 1.0, x)
    mean = sum(weight * _derivative(function, node * x) for node, weight in _GAUSS_LEGENDRE)
    assert isinstance(mean, Tensor)
    agrees = (mean - division).abs() * x.abs() <= 8 * torch.finfo(x.dtype).eps * scale
    return torch.where(agrees | ((x == 0) & torch.isfinite(mean)), mean, division)


def _derivative(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f'(x), element by element."""
    output, pull = torch.func.vjp(function, x)[:2]
    (found,) = pull(torch.ones_like(output))
    derivative: Tensor = found
    return derivative


def intercept(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f(0) in the shape of x; where f is singular at 0 (1/x, log x) it has no intercept, 0."""
    at_zero = function(torch.zeros_like(x))
    return torch.where(torch.isfinite(at_zero), at_zero, 0.0)


class _Value:
    """A tensor that equals x times `quotient(x)`."""

    def __init__(self, value: Tensor, quotient: Callable[[Tensor], Tensor]) -> None:
        self.value = value
        self.quotient = quotient


class _Divisible(fx.Interpreter):
    """Runs an elementwise region, carrying the quotients of what is divisible by its input."""

    def __init__(self, region: fx.GraphModule, x: Tensor) -> None:
        super().__init__(region)
        self.x = x

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        return _Value(value, torch.ones_like) if value is self.x else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        plain = fx.node.map_aggregate(args, _plain)
        output = super().call_function(target, plain, kwargs)
        closed = _closed_form(target, args, kwargs, output)
        return output if closed is None else _Value(output, closed)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, _Value) else value


def _closed_form(
    op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> Callable[[Tensor], Tensor] | None:
    """output / x of one op whose divisible arguments are `_Value`s; None where it has none."""
    name = packet(op)
    divisible = [isinstance(arg, _Value) for arg in args]
    if not any(divisible):
        return None
    first = args[0]
    if name in _FACTORS and divisible[0]:
        return lambda x: first.quotient(x) * _FACTORS[name](first.value, *args[1:], **kwargs)
    rest = [_plain(arg) for arg in args[1:]]
    match str(name).removeprefix("aten."):
        case "mul" if divisible[0]:
            return lambda x: first.quotient(x) * rest[0]
        case "mul":
            return lambda x: first * args[1].quotient(x)
        case "div" if divisible[0] and not kwargs.get("rounding_mode"):
            return lambda x: first.quotient(x) / rest[0]
        case "add" | "sub" if all(divisible[:2]):
            sign = (1 if name is aten.add else -1) * kwargs.get("alpha", 1)
            return lambda x: first.quotient(x) + sign * args[1].quotient(x)
        case "neg":
            return lambda x: -first.quotient(x)
        case "pow" if divisible[0] and isinstance(rest[0], int | float) and rest[0] > 0:
            return lambda x: first.quotient(x) * _power(first.value, rest[0])
        case "square":
            return lambda x: first.quotient(x) * first.value
        case "_to_copy" | "to" | "clone":
            return lambda x: first.quotient(x).to(output.dtype)
    return None


def _gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Φ(x), or ½(1 + tanh(√(2/π)(x + 0.044715 x³)))."""
    if approximate == "tanh":
        return torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * torch.erfc(x * -math.sqrt(0.5))


def _leaky(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, 1.0, torch.full_like(x, slope))


def _elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    negative = _EXPM1(x.clamp(max=0) * input_scale)
    return scale * torch.where(x > 0, 1.0, alpha * input_scale * negative)


def _power(x: Tensor, exponent: float) -> Tensor:
    """xⁿ⁻¹; at 0 the finite 0 where n < 1: of xⁿ = 0 there is nothing to hand on."""
    if exponent >= 1:
        return x ** (exponent - 1)
    return torch.where(x == 0, 0.0, torch.where(x == 0, 1.0, x) ** (exponent - 1))


def _divided(function: Callable[[Tensor], Tensor], *series: float) -> Callable[[Tensor], Tensor]:
    """f(x)/x of a function with f(0) = 0, and its derivative, exact to rounding near 0.

    There it is the series a + b x + c x² + …; the derivative of a division would cancel.
    """

    def factor(x: Tensor) -> Tensor:
        near = x.abs() < torch.finfo(x.dtype).eps ** (1 / len(series))
        small, polynomial = torch.where(near, x, 0.0), torch.full_like(x, series[-1])
        for term in series[-2::-1]:
            polynomial = polynomial * small + term
        divisor = torch.where(near, 1.0, x)
        return torch.where(near, polynomial, function(divisor) / divisor)

    return factor


_EXPM1 = _divided(torch.expm1, 1, 1 / 2, 1 / 6, 1 / 24, 1 / 120)
_ERF_SLOPE = 2 / math.sqrt(math.pi)

_FACTORS: dict[Any, Callable[..., Tensor]] = {
    aten.relu: lambda x: (x > 0).to(x.dtype),
    aten.silu: torch.sigmoid,
    aten.gelu: _gelu,
    aten.mish: lambda x: torch.tanh(F.softplus(x)),
    aten.leaky_relu: _leaky,
    aten.prelu: lambda x, w: torch.where(x > 0, 1.0, w.reshape((-1,) + (1,) * (x.dim() - 2))),
    aten.hardswish: lambda x: F.relu6(x + 3) / 6,
    aten.abs: torch.sgn,
    aten.tanh: _divided(torch.tanh, 1, 0, -1 / 3, 0, 2 / 15),
    aten.sin: _divided(torch.sin, 1, 0, -1 / 6, 0, 1 / 120),
    aten.erf: _divided(torch.erf, _ERF_SLOPE, 0, -_ERF_SLOPE / 3, 0, _ERF_SLOPE / 10),
    aten.expm1: _EXPM1,
    aten.log1p: _divided(torch.log1p, 1, -1 / 2, 1 / 3, -1 / 4, 1 / 5),
    aten.atan: _divided(torch.atan, 1, 0, -1 / 3, 0, 1 / 5),
    aten.elu: _elu,
    aten.celu: lambda x, alpha=1.0: _elu(x, alpha, input_scale=1 / alpha),
    aten.sqrt: lambda x: _power(x, 0.5),
    aten.reciprocal: lambda x: x**-2,
    aten.rsqrt: lambda x: x**-1.5,
    aten.log: lambda x: torch.log(x) / x,
}
"""Closed forms of f(x)/x, for functions with f(0) = 0 and for those singular at 0."""
