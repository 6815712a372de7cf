"""The ops of a rewritten graph.

A rewritten graph is the model's graph in which every explained node says which rule stands there:

    silu = ops.identity(aten.silu.default, gate)
    mul  = ops.uniform(aten.mul.Tensor, silu, up)

Each relevance op *is* the op that it wraps, so a rewritten graph runs and returns the model's
outputs; what differs is how `attnlrp_fx.calculus.pullbacks` takes a coefficient through it.
Keyword-only arguments are the rule's parameters. `source`, `boundary`, `latent` and `statistic` are
markers.
"""

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

Op = Callable[..., Any]


def source(
    value: Tensor, *, name: str, ids: Tensor | None = None, keep: tuple[int, ...] | None = None
) -> Tensor:
    """Mark a value whose relevance is asked for.

    `name` is the model input that it stands for. For an embedding, `ids` are the indices that were
    looked up: relevance summed over the features belongs to them. `keep` are the dimensions of the
    value that the indices have, in order; None: the leading ones.
    """
    return value


def boundary(value: Tensor) -> Tensor:
    """Mark an explained value that one region of a graph takes over from another."""
    return value


def latent(
    value: Tensor,
    units: Tensor | None = None,
    places: Tensor | None = None,
    chosen: Tensor | None = None,
    *,
    unit: int = 0,
) -> Tensor:
    """Mark a latent value whose activation and relevance are read.

    Where they are given, `units` and `places` say what of its relevance it hands on, see `kept_of`.
    """
    return value


def kept_of(
    value: Tensor, units: Tensor, places: Tensor, chosen: Tensor | None = None, *, unit: int
) -> Tensor:
    """The share of its relevance that each element of a latent value hands on.

    `unit` is the dimension of the units; the last row of `units`, (3, units), and the last one of
    `places`, (2, ...) over the other dimensions, are multiplied. Where a dimension holds chosen
    units, `chosen`, (token, slot), says which.
    """
    return _along(units[2], value, unit, chosen) * places[1].unsqueeze(unit)


def intervened(
    value: Tensor, units: Tensor, places: Tensor, chosen: Tensor | None = None, *, unit: int
) -> Tensor:
    """A latent value that is changed: units times the first row of `units`, plus the second.

    The first of `places` says where, by 1 and 0. Elsewhere, and by 1 and 0, it is as it was.
    """
    where = places[0].unsqueeze(unit)
    summand = where * _along(units[1], value, unit, chosen)
    return (value * factor_of(value, units, places, chosen, unit=unit) + summand).to(value.dtype)


def factor_of(
    value: Tensor, units: Tensor, places: Tensor, chosen: Tensor | None = None, *, unit: int
) -> Tensor:
    """What `intervened` multiplies each element of a value by."""
    return 1 + places[0].unsqueeze(unit) * (_along(units[0], value, unit, chosen) - 1)


def _along(row: Tensor, value: Tensor, dim: int, chosen: Tensor | None) -> Tensor:
    """A number for each unit in a shape that broadcasts to the value."""
    if chosen is not None:
        return row[chosen].reshape([*chosen.shape, *[1] * (value.dim() - chosen.dim())])
    return row.reshape([row.shape[0] if d == dim else 1 for d in range(value.dim())])


def reconstruction_error(value: Tensor, reconstruction: Tensor) -> Tensor:
    """What an autoencoder misses of a value, held constant."""
    return value - reconstruction


def rejoined(reconstruction: Tensor, error: Tensor) -> Tensor:
    """A value put together again of what an autoencoder makes of it and of what it misses."""
    return reconstruction + error


def statistic(value: Tensor) -> Tensor:
    """Mark the factor of a normalisation that is computed from the value it normalises."""
    return value


def coefficient(value: Tensor) -> Tensor:
    """Mark the factor of a product in a recurrence that decides how much is taken over."""
    return value


def routing(value: Tensor) -> Tensor:
    """Mark the factor of a product that weighs the experts that a router has chosen."""
    return value


def linear(op: Op, *args: Any, epsilon: float = 0.0, **kwargs: Any) -> Any:
    """ε rule: relevance in proportion to each input's contribution (eq. 8)."""
    return op(*args, **kwargs)


def uniform(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Uniform rule: each of N factors gets 1/N of the relevance (eqs. 14, 15)."""
    return op(*args, **kwargs)


def identity(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Identity rule: an activation hands on its relevance, f(0) apart (eq. 9)."""
    return op(*args, **kwargs)


def taylor(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Taylor rule: the op's own vector-Jacobian product (eq. 13 for softmax)."""
    return op(*args, **kwargs)


def winner(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Winner-takes-all: relevance goes to the element that was selected."""
    return op(*args, **kwargs)


def norm(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Normalisation whose statistic is held constant (eq. 19)."""
    return op(*args, **kwargs)


def attention(op: Op, *args: Any, weights: float = 0.5, points: int = 0, **kwargs: Any) -> Any:
    """Attention: `weights` of the relevance to query and key in equal parts, the rest to value.

    `points`: softmax is integrated from scores of zero, with so many points on the way.
    """
    return op(*args, **kwargs)


def gradient(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Plain gradient: Gradient×Input, no relevance rule."""
    return op(*args, **kwargs)


def gamma(
    op: Op,
    *args: Any,
    gamma: float = 0.25,
    epsilon: float = 0.0,
    nonnegative: bool = False,
    rectified: bool = False,
    **kwargs: Any,
) -> Any:
    """γ rule: contributions of the output's sign count 1 + γ times (eqs. 24, 25).

    `nonnegative` says that the explained input is, `rectified` that no relevance arrives where the
    output is negative; both only save products.
    """
    return op(*args, **kwargs)


def alpha_beta(
    op: Op,
    *args: Any,
    positive: float = 1.0,
    negative: float = 0.0,
    epsilon: float = 0.0,
    nonnegative: bool = False,
    **kwargs: Any,
) -> Any:
    """αβ rule: `positive` times the relevance to positive contributions, −`negative` to others."""
    return op(*args, **kwargs)


def flat(op: Op, *args: Any, epsilon: float = 0.0, **kwargs: Any) -> Any:
    """Flat rule: the same share to every input that an output reads."""
    return op(*args, **kwargs)


def w_square(op: Op, *args: Any, epsilon: float = 0.0, **kwargs: Any) -> Any:
    """w² rule: shares in proportion to squared weights."""
    return op(*args, **kwargs)


def z_box(
    op: Op,
    *args: Any,
    low: float | tuple[float, ...] = 0.0,
    high: float | tuple[float, ...] = 1.0,
    epsilon: float = 0.0,
    **kwargs: Any,
) -> Any:
    """zᴮ rule: contributions are measured from the ends of the range that inputs lie in."""
    return op(*args, **kwargs)


def join(op: Op, *args: Any, split: str = "magnitude", **kwargs: Any) -> Any:
    """Join of two branches: relevance in proportion to magnitude, or half to each."""
    return op(*args, **kwargs)


def passed(op: Op, *args: Any, **kwargs: Any) -> Any:
    """Pass rule: the input's relevance is the output's, element by element."""
    return op(*args, **kwargs)


RELEVANCE_OPS: tuple[Op, ...] = (
    linear,
    uniform,
    identity,
    taylor,
    winner,
    norm,
    attention,
    gradient,
    gamma,
    alpha_beta,
    flat,
    w_square,
    z_box,
    join,
    passed,
)
"""The ops that carry a coefficient from their output to their inputs."""


MARKERS: tuple[Op, ...] = (statistic, coefficient, routing)
"""What passes mark for the composite to decide whether it is held constant."""


LATENT: tuple[Op, ...] = (latent, intervened, rejoined)
"""What stands behind a latent value that is asked for; it is explained if the value is."""


RULE_PARAMETERS: dict[Op, tuple[str, ...]] = {
    linear: ("epsilon",),
    attention: ("weights", "points"),
    gamma: ("gamma", "epsilon", "nonnegative", "rectified"),
    alpha_beta: ("positive", "negative", "epsilon", "nonnegative"),
    flat: ("epsilon",),
    w_square: ("epsilon",),
    z_box: ("low", "high", "epsilon"),
    join: ("split",),
}
"""The keyword arguments of a relevance op that belong to the rule."""


def is_explained(node: fx.Node) -> bool:
    """Whether a node of a rewritten graph carries relevance."""
    if node.target is operator.getitem:
        value = node.meta["val"]
        owner = node.args[0]
        assert isinstance(owner, fx.Node)
        return is_explained(owner) and (value.is_floating_point() or value.is_complex())
    if node.target in LATENT:
        value = node.args[0]
        assert isinstance(value, fx.Node)
        return is_explained(value)
    return node.target in (source, boundary) or node.target in RELEVANCE_OPS
