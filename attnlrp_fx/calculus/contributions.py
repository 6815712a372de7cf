"""The rules that share relevance out by contributions: γ, αβ, z⁺, w², flat, zᴮ, joins.

A layer is z = W x + b, a matrix product or a convolution of one explained input with a weight. Each
rule gives every output j a total t_j of what its inputs and, of this, k_j, what its bias contribute
in the rule's sense; then a_j = R_j / (t_j + ε sign t_j), and input i gets R_i = Σ_j q_ij a_j, where
q_ij adds up to t_j − k_j over i. What is left, a_j (k_j + ε sign t_j), is absorbed, and so is R_j
where nothing contributes at all.

For γ, z_ij⁺ = (|w_ji| |x_i| + w_ji x_i) / 2. So beside the layer's own products Wx and Wᵀa there is
one with |W| on the way up, and one on the way down:

    t = (1 + γ/2) z + (γ/2) s (|W| |x| + |b|),                                       s = sign(z)
    c = (1 + γ/2) Wᵀ a + (γ/2) sign(x) |W|ᵀ (s a)

With inputs that are not negative and a rectifier behind the layer, where a_j = 0 unless z_j > 0, it
is one in place of the two on the way down: t = (W + γW⁺) x + b + γb⁺, c = (W + γW⁺)ᵀ a, with
W⁺ = max(W, 0). No digits are lost, since |t| ≥ |z|. For z⁺ alone they would be, so α and β take
their parts as they are: W⁺ x⁺ + W⁻ x⁻.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp_fx.calculus.calls import Call, Explicit, Message, Shares, parts_of, vjp
from attnlrp_fx.errors import RuleError
from attnlrp_fx.graph.operators import is_convolution, product_of

Transposed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Layer:
    """A product of one explained input x and one weight, with a bias or without."""

    call: Call
    x: Tensor
    given: Tensor
    """The weight as the op takes it."""
    weight: Tensor
    """The weight as it counts: scaled where the op scales the product."""
    bias: Tensor | None
    """In the shape that the op takes, scaled where the op scales it."""
    output: Tensor
    epsilon: float

    @property
    def given_last(self) -> bool:
        """Whether the weight stands behind the input."""
        product = product_of(self.call.op)
        assert product is not None
        return self.call.args[product.factors[-1]] is self.given

    def applied(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The same op on another input, weight and bias."""
        args, kwargs = _with_bias(self.call, bias)
        output: Tensor = self.call.op(*self._swapped(args, x, weight), **kwargs)
        return output

    def through(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Transposed]:
        """The same op on another input, weight and bias, and its transpose in the input."""
        args, kwargs = _with_bias(self.call, bias)

        def function(x: Tensor) -> Tensor:
            return self.applied(x, weight, bias)

        swapped = tuple(self._swapped(args, x, weight))
        positions = self.call.positions
        call = Call(self.call.op, swapped, kwargs, (x,), positions, function, 1, (True,))
        output, transposed = vjp(call)
        return output, lambda a: _only(transposed(a))

    def derivative(self, x: Tensor, weight: Tensor, a: Tensor) -> Tensor:
        """Σ a x over all places: the transpose of the same op in its weight."""
        args, kwargs = _with_bias(self.call, None)
        swapped = tuple(self._swapped(args, x, weight))
        positions = self.call.positions

        def function(weight: Tensor) -> Tensor:
            return self.applied(x, weight)

        call = Call(self.call.op, swapped, kwargs, (weight,), positions, function, 1, (True,))
        return _only(vjp(call)[1](a))

    def _swapped(self, args: Sequence[Any], x: Tensor, weight: Tensor) -> list[Any]:
        """Arguments of the op with another input and weight."""

        def swapped(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [swapped(item) for item in value]
            return x if value is self.x else weight if value is self.given else value

        return [swapped(arg) for arg in args]

    def divided(
        self, relevance: Tensor, total: Tensor, kept: Tensor | float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """a = R / (t + ε sign t), and what of R is absorbed: by the bias, by ε, by what is zero.

        Where t is 0, a is R: whatever weights it meets add up to nothing.
        """
        epsilon = self.epsilon and _with_sign(self.epsilon, total >= 0, total.dtype)
        total = total + epsilon
        nothing = total == 0
        a = relevance / torch.where(nothing, 1, total)
        absorbed = {"zero": _sum(torch.where(nothing, relevance, 0))}
        if isinstance(kept, Tensor):
            absorbed["bias"] = _sum(torch.where(nothing, 0, a * kept))
        if isinstance(epsilon, Tensor):
            absorbed["epsilon"] = _sum(torch.where(nothing, 0, a * epsilon))
        return a, absorbed


def layer_of(call: Call) -> Layer:
    """The layer that a call of a product is."""
    product = product_of(call.op)
    assert product is not None
    x = call.primals[0]
    factors = [leaf for p in product.factors for leaf in parts_of(call.args[p])]
    weight = next(factor for factor in factors if factor is not x)
    terms = [call.args[i] for i in product.terms if i < len(call.args)]
    bias = call.kwargs.get("bias", terms[0] if terms else None)
    epsilon = call.parameters.get("epsilon", 0.0)
    alpha, beta = call.kwargs.get("alpha", 1), call.kwargs.get("beta", 1)
    return Layer(
        call,
        x,
        given=weight,
        weight=weight if alpha == 1 else weight * alpha,
        bias=bias if bias is None or beta == 1 else bias * beta,
        output=call.function(x),
        epsilon=epsilon,
    )


def _sum(relevance: Tensor) -> Tensor:
    """A sum in float32 or better."""
    return relevance.sum(dtype=torch.promote_types(relevance.dtype, torch.float32))


def _only(pulled: Sequence[Tensor | None]) -> Tensor:
    (value,) = pulled
    assert value is not None
    return value


def _with_bias(call: Call, bias: Tensor | None) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call with another bias, None for none."""
    product = product_of(call.op)
    assert product is not None
    args = list(call.args)
    counted = ("bias", "alpha", "beta")
    kwargs = {key: value for key, value in call.kwargs.items() if key not in counted}
    if "bias" in call.kwargs:
        kwargs["bias"] = bias
    for i in product.terms:
        if i < len(args) and i > min(product.factors):
            args[i] = bias
        elif i < len(args):  # addmm and its like must add something
            args[i] = torch.zeros_like(args[i]) if bias is None else bias
    return args, kwargs


def spread(layer: Layer, bias: Tensor | None) -> Tensor | float:
    """A bias as it is broadcast to the layer's output."""
    if bias is None:
        return 0.0
    if is_convolution(layer.call.op):
        return bias.reshape(-1, *[1] * (layer.weight.dim() - 2))
    return bias


def _kept(a: Tensor, kept: Tensor | float) -> Tensor | None:
    """What the bias absorbs, in the output's shape."""
    return a * kept if isinstance(kept, Tensor) else None


def _with_sign(value: float, is_positive: Tensor, dtype: torch.dtype) -> Tensor:
    """A number, negative where told so, in a dtype (which `where` of two numbers has not)."""
    return (2 * is_positive.to(dtype) - 1) * value


def _positive(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clamp(min=0)


def _negative(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clamp(max=0)


def gamma(call: Call) -> tuple[Tensor, Explicit]:
    """The generalised γ rule (Achtibat et al. 2024, eqs. 24 and 25), in few products."""
    layer, options = layer_of(call), call.parameters
    share = options.get("gamma", 0.25)
    is_nonnegative = options.get("nonnegative", False)
    if is_nonnegative and options.get("rectified"):
        return _rectified_gamma(layer, share)
    x, z, bias = layer.x, layer.output, layer.bias
    upright = x if is_nonnegative else x.abs()
    magnitude, of_magnitude = layer.through(
        upright, layer.weight.abs(), None if bias is None else bias.abs()
    )
    transposed = layer.through(x, layer.weight)[1]
    half = share / 2

    def pulled(relevance: Tensor) -> Shares:
        sign = _with_sign(half, z > 0, z.dtype)
        total = (1 + half) * z + sign * magnitude
        kept: Any = spread(layer, bias)
        kept = (1 + half) * kept + sign * abs(kept)
        a, absorbed = layer.divided(relevance, total, kept)
        by_sign = of_magnitude(sign * a)
        by_sign = by_sign if is_nonnegative else _with_sign(1, x >= 0, x.dtype) * by_sign
        return Shares(
            [(1 + half) * transposed(a) + by_sign],
            absorbed=absorbed,
            messages=[
                Message(x, layer.weight, (1 + half) * a),
                Message(upright, layer.weight.abs(), sign * a),
            ],
            kept=_kept(a, kept),
        )

    return z, Explicit(pulled)


def _rectified_gamma(layer: Layer, share: float) -> tuple[Tensor, Explicit]:
    """γ of inputs that are not negative, where relevance arrives at positive outputs alone."""
    weight = layer.weight + share * layer.weight.clamp(min=0)
    bias = None if layer.bias is None else layer.bias + share * layer.bias.clamp(min=0)
    total, transposed = layer.through(layer.x, weight, bias)

    def pulled(relevance: Tensor) -> Shares:
        kept = spread(layer, bias)
        a, absorbed = layer.divided(relevance, total, kept)
        message = Message(layer.x, weight, a)
        return Shares([transposed(a)], (), absorbed, [message], _kept(a, kept))

    return layer.output, Explicit(pulled)


def alpha_beta(call: Call) -> tuple[Tensor, Explicit]:
    """The αβ rule (Bach et al. 2015, eq. 60); z⁺ (Montavon et al. 2017) is α = 1, β = 0."""
    layer, options = layer_of(call), call.parameters
    is_nonnegative = options.get("nonnegative", False)
    parts = [
        (share, *_signed(layer, sign, bias, is_nonnegative), spread(layer, bias))
        for share, sign, bias in (
            (options.get("positive", 1.0), 1, _positive(layer.bias)),
            (-options.get("negative", 0.0), -1, _negative(layer.bias)),
        )
        if share
    ]

    def pulled(relevance: Tensor) -> Shares:
        shared = [
            (used, transposed, *layer.divided(share * relevance, total, kept), kept)
            for share, total, transposed, used, kept in parts
        ]
        coefficient: Any = sum(transposed(a) for _, transposed, a, *_ in shared)
        kept: Any = [k for _, _, a, _, each in shared if (k := _kept(a, each)) is not None]
        absorbed: dict[str, Tensor] = {}
        for cause, lost in (item for *_, found, _ in shared for item in found.items()):
            absorbed[cause] = absorbed[cause] + lost if cause in absorbed else lost
        return Shares(
            [coefficient],
            absorbed=absorbed,
            messages=[Message(x, weight, a) for used, _, a, *_ in shared for x, weight in used],
            kept=torch.stack(kept).sum(0) if kept else None,
        )

    return layer.output, Explicit(pulled)


def _signed(
    layer: Layer, sign: int, bias: Tensor | None, is_nonnegative: bool
) -> tuple[Tensor, Transposed, list[tuple[Tensor, Tensor]]]:
    """Σ_i z_ij⁺ + b_j⁺, or z_ij⁻ and b_j⁻ for a sign of −1, the transpose of its weights, and the
    inputs and weights that it consists of."""
    x, own = layer.x, layer.weight
    plus, minus = own.clamp(min=0), own.clamp(max=0)
    same, other = (plus, minus) if sign > 0 else (minus, plus)
    if is_nonnegative:
        return *layer.through(x, same, bias), [(x, same)]
    above, below = x.clamp(min=0), x.clamp(max=0)
    of_positive, back_positive = layer.through(above, same, bias)
    of_negative, back_negative = layer.through(below, other)
    return (
        of_positive + of_negative,
        lambda a: torch.where(x >= 0, back_positive(a), back_negative(a)),
        [(above, same), (below, other)],
    )


def w_square(call: Call) -> tuple[Tensor, Explicit]:
    """The w² rule (Montavon et al. 2017)."""
    layer = layer_of(call)
    bias = None if layer.bias is None else layer.bias.square()
    return _by_weight(layer, layer.weight.square(), bias)


def flat(call: Call) -> tuple[Tensor, Explicit]:
    """The flat rule (Lapuschkin et al. 2019)."""
    layer = layer_of(call)
    return _by_weight(layer, torch.ones_like(layer.weight), None)


def _by_weight(layer: Layer, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Explicit]:
    """Shares in proportion to a weight, whatever the input is."""
    ones = torch.ones_like(layer.x)
    total, transposed = layer.through(ones, weight, bias)

    def pulled(relevance: Tensor) -> Shares:
        kept = spread(layer, bias)
        a, absorbed = layer.divided(relevance, total, kept)
        message = Message(ones, weight, a)
        return Shares((), [transposed(a)], absorbed, [message], _kept(a, kept))

    return layer.output, Explicit(pulled)


def z_box(call: Call) -> tuple[Tensor, Explicit]:
    """The zᴮ rule (Montavon et al. 2017): x w − l w⁺ − h w⁻ = (x − l) w⁺ + (x − h) w⁻.

    In this form both parts are positive, and none of their digits is lost.
    """
    layer = layer_of(call)
    above = layer.x - _end(call.parameters.get("low", 0.0), layer.x)
    below = layer.x - _end(call.parameters.get("high", 1.0), layer.x)
    plus, minus = layer.weight.clamp(min=0), layer.weight.clamp(max=0)
    of_above, back_above = layer.through(above, plus)
    of_below, back_below = layer.through(below, minus)
    total = of_above + of_below

    def pulled(relevance: Tensor) -> Shares:
        a, absorbed = layer.divided(relevance, total, 0.0)
        shared = above * back_above(a) + below * back_below(a)
        messages = [Message(above, plus, a), Message(below, minus, a)]
        return Shares((), [shared], absorbed, messages)

    return layer.output, Explicit(pulled)


def _end(value: float | Sequence[float], x: Tensor) -> Tensor:
    """One end of the range as it broadcasts to the input: a number, or one a channel."""
    if isinstance(value, int | float):
        return torch.full((), value, dtype=x.dtype, device=x.device)
    if x.dim() < 2 or len(value) not in (1, x.shape[1]):
        raise RuleError(
            f"ZBox has ends for {len(value)} channels, a layer reads {tuple(x.shape)}",
            why="channels are the second dimension of what the layer reads",
            remedy="pass one number for all, or narrow the matcher to the layer that reads images",
        )
    ends = torch.stack([torch.full((), end, dtype=x.dtype, device=x.device) for end in value])
    return ends.reshape(-1, *[1] * (x.dim() - 2))


def join(call: Call) -> tuple[Tensor, Explicit]:
    """A residual join (Otsuki et al. 2024): shares by magnitude, or equal ones."""
    a, b = call.primals
    is_equal = call.parameters.get("split") == "equal"

    def pulled(relevance: Tensor) -> Shares:
        if is_equal:
            return Shares(relevance=[relevance / 2, relevance / 2])
        total = a.abs() + b.abs()
        nothing = total == 0
        share = torch.where(nothing, 0, relevance / torch.where(nothing, 1, total))
        lost = _sum(torch.where(nothing, relevance, 0))
        return Shares([a.sign() * share, b.sign() * share], absorbed={"zero": lost})

    return call.function(a, b), Explicit(pulled)


def passed(call: Call) -> tuple[Any, Explicit]:
    """R_in = R_out, element by element."""
    return call.function(*call.primals), Explicit(lambda relevance: Shares(relevance=[relevance]))
