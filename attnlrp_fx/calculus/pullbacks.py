"""The table relevance op → pullback, the whole of the calculus.

Every explained value x carries a coefficient c of its shape; its relevance is R = x·c. A pullback
takes the coefficient of an op's output to the coefficients of its explained inputs. Each entry
computes the op's output and returns it with its pullback; nothing here divides by an output, and
nothing detaches, so the traced program has the true derivative everywhere. Equation numbers are
those of Achtibat et al. 2024 (arXiv 2402.05602).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnlrp_fx import ops
from attnlrp_fx.calculus.calls import Call, Explicit, Pullback, vjp
from attnlrp_fx.calculus.contributions import alpha_beta, flat, gamma, join, passed, w_square, z_box
from attnlrp_fx.calculus.quotients import quotient
from attnlrp_fx.graph.operators import aten, packet


def _linear(call: Call) -> tuple[Any, Pullback]:
    """c_x = Wᵀ c (eq. 8), with ε: Wᵀ (c z / (z + ε sign z))."""
    output, pull = vjp(call)
    epsilon = call.parameters.get("epsilon", 0.0)
    if not epsilon:
        return output, pull
    return output, lambda c: pull(stabilised(output, c, epsilon))


def stabilised(z: Tensor, c: Tensor, epsilon: float) -> Tensor:
    """c z / (z + ε sign z), with sign 0 = 1: what of a coefficient ε lets through (eq. 8)."""
    return c * z / torch.where(z >= 0, z + epsilon, z - epsilon)


def _uniform(call: Call) -> tuple[Any, Pullback]:
    """c_i = vjp_i(c) / N for N factors (eqs. 14, 15); an added term keeps its whole vjp."""
    output, pull = vjp(call)

    def pullback(c: Any) -> list[Tensor | None]:
        pulled = zip(pull(c), call.is_factor, strict=True)
        return [g / call.factors if is_factor and g is not None else g for g, is_factor in pulled]

    return output, pullback


def _identity(call: Call) -> tuple[Any, Pullback]:
    """c_x = c (f(x) − f(0)) / x (eq. 9), by a closed form wherever there is one."""
    x = call.primals[0]
    output, factor = quotient(call.function, call.op, call.args, call.kwargs, x)
    if output.shape == x.shape:
        return output, lambda c: [c * factor()]
    return output, lambda c: [(c * factor()).sum_to_size(x.shape)]


def _norm(call: Call) -> tuple[Any, Pullback]:
    """The statistic is a constant, the rest linear (eq. 19)."""
    return _NORMS[packet(call.op)](*call.args, **call.kwargs)


def _layer_norm(
    x: Tensor,
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> tuple[Tensor, Pullback]:
    """y = w (x − μ)/σ + b with σ constant: c_x = P(w c)/σ, P removing the mean."""
    output, _, inverse_deviation = torch.native_layer_norm(x, shape, weight, bias, eps)
    dims = tuple(range(-len(shape), 0))

    def pullback(c: Tensor) -> list[Tensor]:
        scaled = c if weight is None else c * weight
        centred = scaled - scaled.mean(dims, keepdim=True)
        return [centred * inverse_deviation.to(c.dtype)]

    return output, pullback


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Pullback]:
    """As layer norm, over the channels and positions of each group."""
    batch, channels = x.shape[:2]
    positions = x[0, 0].numel()
    output, _, inverse_deviation = torch.native_group_norm(
        x.contiguous(), weight, bias, batch, channels, positions, groups, eps
    )

    def pullback(c: Tensor) -> list[Tensor]:
        per_channel = (1, channels) + (1,) * (x.dim() - 2)
        scaled = c if weight is None else c * weight.reshape(per_channel)
        grouped = scaled.reshape(batch, groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        return [(centred * inverse_deviation.unsqueeze(-1).to(c.dtype)).reshape(x.shape)]

    return output, pullback


def _instance_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[Tensor, Pullback]:
    """As group norm with a group a channel; with running statistics it is affine."""
    if use_input_stats:
        return _group_norm(x, x.shape[1], weight, bias, eps)
    assert running_mean is not None
    assert running_var is not None
    per_channel = (1, -1) + (1,) * (x.dim() - 2)
    scale = torch.rsqrt(running_var + eps) * (1.0 if weight is None else weight)
    shift = (0.0 if bias is None else bias) - running_mean * scale
    scale = scale.reshape(per_channel)
    return x * scale + shift.reshape(per_channel), lambda c: [c * scale]


def _rms_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Pullback]:
    """y = w x / rms(x) with the root mean square constant: c_x = w c / rms(x)."""
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    inverse = torch.rsqrt(x.float().square().mean(dims, keepdim=True) + eps).to(x.dtype)
    if x.dtype == torch.float64:
        inverse = torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    scale = inverse if weight is None else inverse * weight
    return x * scale, lambda c: [c * scale]


_NORMS: dict[Any, Callable[..., tuple[Tensor, Pullback]]] = {
    aten.layer_norm: _layer_norm,
    aten.group_norm: _group_norm,
    aten.instance_norm: _instance_norm,
    aten.rms_norm: _rms_norm,
}


def _attention(call: Call) -> tuple[Any, Pullback]:
    """vjp with shares: value (1 − w), query and key w/2 each (eqs. 13 and 15, chained).

    An operand that is not explained leaves its share to the others, as in the chain.
    """
    shares = attention_shares(call.positions, call.parameters.get("weights", 0.5))
    if not any(shares):
        return call.function(*call.primals), lambda c: [None] * len(shares)
    points = call.parameters.get("points", 0)
    of_scores = [p in (0, 1) and bool(s) for p, s in zip(call.positions, shares, strict=True)]
    if points and any(of_scores):
        return _integrated_attention(call, shares, points)
    output, pull = torch.func.vjp(_with_constants(call, shares), *_explained(call, shares))[:2]

    def pullback(c: Tensor) -> list[Tensor | None]:
        pulled = iter(pull(c))
        return [next(pulled) * share if share else None for share in shares]

    return output, pullback


def _integrated_attention(call: Call, shares: Sequence[float], points: int) -> tuple[Any, Pullback]:
    """The same with softmax integrated from scores of zero: ∫ c_ij(αx) dα in the place of c_ij(x).

    With Gauss-Legendre points on the way. Of the score x_ij query and key get x_ij ∫ c_ij each (by
    their share), which add up to Σ_j g_ij (s_ij − u_ij), u attention where all scores are zero.
    """
    others = [0.0 if p in (0, 1) else s for p, s in zip(call.positions, shares, strict=True)]
    output, pull = torch.func.vjp(_with_constants(call, others), *_explained(call, others))[:2]

    def pullback(c: Tensor) -> list[Tensor | None]:
        pulled = iter(pull(c) if any(others) else ())
        of_scores = dict(enumerate(_of_scores(call, c, points)))
        return [
            (of_scores[p] if p in (0, 1) else next(pulled)) * share if share else None
            for p, share in zip(call.positions, shares, strict=True)
        ]

    return output, pullback


def _of_scores(call: Call, c: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Coefficients of query and key, softmax integrated from scores of zero."""
    query, key, *others = call.args

    def attention(scaled: Tensor, key: Tensor) -> Tensor:
        found: Tensor = call.op(scaled, key, *others, **call.kwargs)
        return found

    of_query, of_key = torch.zeros_like(query), torch.zeros_like(key)
    for place, weight in gauss_legendre(points):
        of_scaled, of_other = torch.func.vjp(attention, place * query, key)[1](c)
        of_query = of_query + weight * of_scaled
        of_key = of_key + (weight / place) * of_other
    return of_query, of_key


def gauss_legendre(points: int) -> list[tuple[float, float]]:
    """Places in [0, 1] and their weights."""
    places, weights = np.polynomial.legendre.leggauss(points)
    return [(float(1 + x) / 2, float(w) / 2) for x, w in zip(places, weights, strict=True)]


def attention_shares(positions: Sequence[int | str], weights: float) -> list[float]:
    """The share of each explained operand of an attention (query, key, value, mask by position).

    A mask is added to the scores: like the product of query and key, it gets the weights' share.
    """
    value = positions.count(2)
    product = positions.count(0) + positions.count(1)
    if value == len(positions):
        return [1.0] * value
    weights = weights if value else 1.0 if weights else 0.0
    share = {0: weights / max(product, 1), 1: weights / max(product, 1), 2: 1 - weights}
    return [share.get(p, weights) if isinstance(p, int) else weights for p in positions]


def _explained(call: Call, shares: Sequence[float]) -> list[Tensor]:
    return [primal for primal, share in zip(call.primals, shares, strict=True) if share]


def _with_constants(call: Call, shares: Sequence[float]) -> Callable[..., Any]:
    """The call as a function of the operands that have a share, the others held constant."""

    def function(*explained: Tensor) -> Any:
        given = iter(explained)
        operands = zip(call.primals, shares, strict=True)
        return call.function(*[next(given) if share else primal for primal, share in operands])

    return function


PULLBACKS: dict[Any, Callable[[Call], tuple[Any, Pullback | Explicit]]] = {
    ops.linear: _linear,
    ops.uniform: _uniform,
    ops.identity: _identity,
    ops.taylor: vjp,
    ops.winner: vjp,
    ops.norm: _norm,
    ops.attention: _attention,
    ops.gradient: vjp,
    ops.gamma: gamma,
    ops.alpha_beta: alpha_beta,
    ops.flat: flat,
    ops.w_square: w_square,
    ops.z_box: z_box,
    ops.join: join,
    ops.passed: passed,
}
