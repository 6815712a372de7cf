"""Rules: what happens to relevance at an op.

A rule is a frozen dataclass. Its fields are its options, `kinds` says which kinds of op it can
stand at, and `op` is the relevance op that it rewrites a node to. The first line of its docstring
is its formula, which listings show. What computes the formulas is in
`attnlrp_fx.calculus.pullbacks`, for the rules for layers in `attnlrp_fx.calculus.contributions`.

The rules for layers (`Gamma`, `AlphaBeta`, `ZPlus`, `WSquare`, `Flat`, `ZBox`) look at weights:
they stand where one explained input meets parameters in a matrix product or a convolution. With
contributions z_ij = x_i w_ji of a layer z_j = Σ_i z_ij + b_j, of which z_ij⁺ and z_ij⁻ are the
positive and the negative parts, the bias is one contribution more, whose share is absorbed. At
linear ops without weights (sums, pools, views) they are the ε rule.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import Kind, adds_up

EVERY_KIND = frozenset(Kind) - {Kind.UNKNOWN}


@dataclass(frozen=True)
class Site:
    """What a rule may ask of the op at which it stands."""

    is_layer: bool = False
    """One explained value meets one that parameters make, in a matrix product or convolution."""
    is_join: bool = False
    """Two explained values of one shape are added."""
    is_pointwise: bool = False
    """Each element of the output is made of the same element of one explained value."""
    vanishes: bool = False
    """It is pointwise, and zero where that value is."""


@dataclass(frozen=True)
class Rule:
    """Base of all rules."""

    kinds: ClassVar[frozenset[Kind]] = EVERY_KIND
    op: ClassVar[ops.Op | None] = None

    @property
    def formula(self) -> str:
        """What the rule does to relevance, in one line."""
        return next(iter((type(self).__doc__ or "").splitlines()), "").strip()

    def parameters(self) -> dict[str, Any]:
        """The rule's options as the relevance op's keyword arguments."""
        return asdict(self)

    def parameters_at(self, op: object) -> dict[str, Any]:
        """The options that matter at one op."""
        return self.parameters()

    def at(self, site: "Site") -> "Rule":
        """The rule that stands in its place at an op where its formula has no meaning."""
        return self

    def __str__(self) -> str:
        fields = ", ".join(f"{key}={value!r}" for key, value in self.parameters().items())
        return f"{type(self).__name__}({fields})"


@dataclass(frozen=True)
class Constant(Rule):
    """Hold the node's value constant: no relevance enters it, its users get it all."""


@dataclass(frozen=True)
class Explained(Rule):
    """Let relevance into a value that a pass has marked: the opposite of `Constant`."""

    kinds = frozenset({Kind.STATISTIC, Kind.COEFFICIENT, Kind.ROUTING})


@dataclass(frozen=True)
class Epsilon(Rule):
    """R_i = Σ_j W_ji x_i R_j / (z_j + ε sign(z_j)) (Achtibat et al. 2024, eq. 8).

    In coefficient form c_i = Σ_j W_ji c_j z_j / (z_j + ε sign(z_j)): with ε = 0 the op's own
    vector-Jacobian product. Holds for every op that is linear in what it explains. The stabiliser
    acts where an op adds contributions up (linear, convolution, sums); a view, a cast or a scaling
    has one contribution to each output, which gets all of its relevance.
    """

    kinds = frozenset({Kind.LINEAR})
    op = staticmethod(ops.linear)

    epsilon: float = 0.0
    """The stabiliser ε ≥ 0; it absorbs ε c_j / (z_j + ε sign(z_j)) of every output."""

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"Epsilon: epsilon must be 0 or more, got {self.epsilon}")

    def parameters(self) -> dict[str, Any]:
        return asdict(self) if self.epsilon else {}

    def parameters_at(self, op: object) -> dict[str, Any]:
        return self.parameters() if adds_up(op) else {}


@dataclass(frozen=True)
class Uniform(Rule):
    """R / N to each of N explained factors (eqs. 14 and 15): the vjp divided by N."""

    kinds = frozenset({Kind.PRODUCT})
    op = staticmethod(ops.uniform)


@dataclass(frozen=True)
class Identity(Rule):
    """R_in = R_out of y = f(x) (eq. 9), the share of f(0) apart: c_x = c_y (f(x) − f(0)) / x."""

    kinds = frozenset({Kind.ACTIVATION})
    op = staticmethod(ops.identity)


@dataclass(frozen=True)
class Taylor(Rule):
    """First-order Taylor expansion: the op's own vjp; for softmax eq. 13. Absorbs by design."""

    op = staticmethod(ops.taylor)


@dataclass(frozen=True)
class Winner(Rule):
    """Relevance to the selected element: the vjp of maximum, top-k, sort, max-pool."""

    kinds = frozenset({Kind.SELECTION})
    op = staticmethod(ops.winner)


@dataclass(frozen=True)
class StatisticConstant(Rule):
    """Layer, group or RMS norm with its statistic held constant, the rest linear (eq. 19)."""

    kinds = frozenset({Kind.NORM})
    op = staticmethod(ops.norm)


@dataclass(frozen=True)
class Attention(Rule):
    """R (1 − w) to the value, R w / 2 each to query and key, less what softmax absorbs.

    Around whatever fused kernel runs. The written-out chain gives value 1/2 (eq. 15) and, through
    the softmax (eq. 13) and the query-key product (eq. 15), query and key 1/4 each; together a vjp
    with scaled operands.
    """

    kinds = frozenset({Kind.ATTENTION})
    op = staticmethod(ops.attention)

    weights: float = 0.5
    """The share of the attention weights (query and key); 0 holds them constant (CP-LRP)."""
    points: int = 0
    """Points on the way from scores of zero to the scores, over which the derivative of softmax is
    integrated: then one that is saturated hides nothing. 0: the derivative at the scores."""

    def parameters(self) -> dict[str, Any]:
        return {"weights": self.weights} | ({"points": self.points} if self.points else {})

    def __post_init__(self) -> None:
        if not 0 <= self.weights <= 1:
            raise ValueError(f"Attention: weights must lie in [0, 1], got {self.weights}")
        if self.points < 0:
            raise ValueError(f"Attention: points must be 0 or more, got {self.points}")


@dataclass(frozen=True)
class Gradient(Rule):
    """The op's own vjp, whatever it is: with this rule everywhere, Gradient×Input."""

    kinds = frozenset(Kind)

    op = staticmethod(ops.gradient)


@dataclass(frozen=True)
class LayerRule(Rule):
    """Base of the rules that look at a layer's weights."""

    kinds = frozenset({Kind.LINEAR})

    epsilon: float = field(default=0.0, kw_only=True)
    """The stabiliser ε ≥ 0: every denominator d becomes d + ε sign(d), with sign(0) = 1."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, int | float) and not value >= 0:
                raise ValueError(f"{type(self).__name__}: {name} must be 0 or more, got {value}")

    def parameters(self) -> dict[str, Any]:
        options = asdict(self)
        epsilon = options.pop("epsilon")
        return {**options, "epsilon": epsilon} if epsilon else options

    def at(self, site: Site) -> Rule:
        return self if site.is_layer else Epsilon(self.epsilon)


@dataclass(frozen=True)
class Gamma(LayerRule):
    """R_i = Σ_j (z_ij + γ z_ij^s) R_j / (z_j + γ Σ_i z_ij^s + γ b_j^s), s the sign of z_j.

    The generalised γ rule (Achtibat et al. 2024, eqs. 24 and 25; Andéol et al. 2021): what points
    the output's way counts 1 + γ times. With γ = 0 it is the ε rule.
    """

    op = staticmethod(ops.gamma)

    gamma: float = 0.25

    def at(self, site: Site) -> Rule:
        return self if site.is_layer and self.gamma else Epsilon(self.epsilon)


@dataclass(frozen=True)
class AlphaBeta(LayerRule):
    """R_i = Σ_j (α z_ij⁺ / (Σ_i z_ij⁺ + b_j⁺) − β z_ij⁻ / (Σ_i z_ij⁻ + b_j⁻)) R_j.

    Bach et al. 2015, eq. 60; α − β = 1.
    """

    op = staticmethod(ops.alpha_beta)

    alpha: float = 2.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if abs(self.alpha - self.beta - 1) > 1e-9:
            raise ValueError(f"AlphaBeta: alpha - beta must be 1, got {self.alpha - self.beta}")

    def parameters_at(self, op: object) -> dict[str, Any]:
        named = {"alpha": "positive", "beta": "negative"}
        return {named.get(key, key): value for key, value in self.parameters().items()}


@dataclass(frozen=True)
class ZPlus(LayerRule):
    """R_i = Σ_j z_ij⁺ / (Σ_i z_ij⁺ + b_j⁺) R_j (Montavon et al. 2017): αβ with α = 1, β = 0."""

    op = staticmethod(ops.alpha_beta)


@dataclass(frozen=True)
class WSquare(LayerRule):
    """R_i = Σ_j w_ji² / (Σ_i w_ji² + b_j²) R_j (Montavon et al. 2017), for unbounded inputs.

    Shares do not depend on the input: an input that is zero may get relevance. So it is carried as
    relevance rather than as a coefficient, as `Flat`'s and `ZBox`'s are.
    """

    op = staticmethod(ops.w_square)


@dataclass(frozen=True)
class Flat(LayerRule):
    """R_i = Σ_j R_j / n_j, n_j the inputs that output j reads (Lapuschkin et al. 2019).

    The bias has no share.
    """

    op = staticmethod(ops.flat)


@dataclass(frozen=True)
class ZBox(LayerRule):
    """R_i = Σ_j (x_i w_ji − l_i w_ji⁺ − h_i w_ji⁻) / (the same, summed over i) R_j.

    Montavon et al. 2017, zᴮ, for inputs that lie in [l, h], as pixels do. The bias has no share.
    """

    op = staticmethod(ops.z_box)

    low: float | tuple[float, ...] = 0.0
    """The least that an input can be: one number, or one a channel (dimension 1)."""
    high: float | tuple[float, ...] = 1.0
    """The most."""

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"ZBox: epsilon must be 0 or more, got {self.epsilon}")
        low, high = _tuple(self.low), _tuple(self.high)
        if len({len(low), len(high)} - {1}) > 1:
            raise ValueError(f"ZBox: low has {len(low)} channels, high has {len(high)}")
        pairs = zip(low * len(high), high * len(low), strict=False)
        if not all(lowest < highest for lowest, highest in pairs):
            raise ValueError(f"ZBox: low {self.low} must be less than high {self.high}")

    @classmethod
    def normalised(
        cls,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        low: float = 0.0,
        high: float = 1.0,
        epsilon: float = 0.0,
    ) -> "ZBox":
        """The box of images in [low, high] that were normalised by a mean and a std a channel.

        >>> ZBox.normalised((0.5, 0.5, 0.5), (0.25, 0.25, 0.5)).high
        (2.0, 2.0, 1.0)
        """
        pairs = list(zip(mean, std, strict=True))
        lows = tuple((low - m) / s for m, s in pairs)
        return cls(lows, tuple((high - m) / s for m, s in pairs), epsilon=epsilon)


def _tuple(value: float | Sequence[float]) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, int | float) else tuple(value)


@dataclass(frozen=True)
class Join(Rule):
    """R_a = R |a| / (|a| + |b|), or R / 2, at a residual join a + b (Otsuki et al. 2024).

    In coefficient form c_a = z c sign(a) / (|a| + |b|). Half to each branch does not depend on the
    branches' values, and is carried as relevance. At an op that is no join it is the ε rule.
    """

    kinds = frozenset({Kind.LINEAR})
    op = staticmethod(ops.join)

    split: str = "magnitude"
    """"magnitude": in proportion to |a| and |b|; "equal": half to each."""

    def __post_init__(self) -> None:
        if self.split not in ("magnitude", "equal"):
            raise ValueError(f"Join: split must be 'magnitude' or 'equal', got {self.split!r}")

    def at(self, site: Site) -> Rule:
        return self if site.is_join else Epsilon()


@dataclass(frozen=True)
class Pass(Rule):
    """R_in = R_out, element by element, of an op with one explained input of the output's shape.

    What zennit does at activations and at BatchNorm that was not merged. Where the op is zero at
    zero, it is `Identity`; at a linear op that is not elementwise, the ε rule.
    """

    kinds = frozenset({Kind.LINEAR, Kind.ACTIVATION, Kind.NORM})
    op = staticmethod(ops.passed)

    def at(self, site: Site) -> Rule:
        if site.vanishes:
            return Identity()
        return self if site.is_pointwise else Epsilon()
