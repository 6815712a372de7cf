"""Rules: what happens to relevance at an op.

A rule is a frozen dataclass. Its fields are its options, `kinds` says which kinds of op it can
stand at, `op` is the relevance op that it rewrites a node to, and `absorbs` says, in the words
of the ledger, why relevance may end there. The formulas are in `attnlrp_fx.pullbacks`.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from attnlrp_fx import ops
from attnlrp_fx.operators import Kind, adds_up

EVERY_KIND = frozenset(Kind) - {Kind.UNKNOWN}


@dataclass(frozen=True)
class Rule:
    """Base of all rules."""

    kinds: ClassVar[frozenset[Kind]] = EVERY_KIND
    op: ClassVar[ops.Op | None] = None
    absorbs: ClassVar[str] = ""

    def parameters(self) -> dict[str, Any]:
        """The rule's options as the relevance op's keyword arguments."""
        return asdict(self)

    def parameters_at(self, op: object) -> dict[str, Any]:
        """The options that matter at one op."""
        return self.parameters()

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
    absorbs = "constant"

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
    absorbs = "constant"


@dataclass(frozen=True)
class Identity(Rule):
    """R_in = R_out of y = f(x) (eq. 9), the share of f(0) apart: c_x = c_y (f(x) − f(0)) / x."""

    kinds = frozenset({Kind.ACTIVATION})
    op = staticmethod(ops.identity)
    absorbs = "intercept"


@dataclass(frozen=True)
class Taylor(Rule):
    """First-order Taylor expansion: the op's own vjp; for softmax eq. 13. Absorbs by design."""

    op = staticmethod(ops.taylor)
    absorbs = "taylor"


@dataclass(frozen=True)
class Winner(Rule):
    """Relevance to the selected element: the vjp of maximum, top-k, sort, max-pool."""

    kinds = frozenset({Kind.SELECTION})
    op = staticmethod(ops.winner)
    absorbs = "constant"


@dataclass(frozen=True)
class StatisticConstant(Rule):
    """Layer, group or RMS norm with its statistic held constant, the rest linear (eq. 19)."""

    kinds = frozenset({Kind.NORM})
    op = staticmethod(ops.norm)
    absorbs = "shift"


@dataclass(frozen=True)
class Attention(Rule):
    """Scaled dot-product attention around whatever fused kernel runs.

    The written-out chain gives value 1/2 (eq. 15) and, through the softmax (eq. 13) and the
    query-key product (eq. 15), query and key 1/4 each; together a vjp with scaled operands.
    """

    kinds = frozenset({Kind.ATTENTION})
    op = staticmethod(ops.attention)
    absorbs = "softmax"

    weights: float = 0.5
    """The share of the attention weights (query and key); 0 holds them constant (CP-LRP)."""

    def __post_init__(self) -> None:
        if not 0 <= self.weights <= 1:
            raise ValueError(f"Attention: weights must lie in [0, 1], got {self.weights}")


@dataclass(frozen=True)
class Gradient(Rule):
    """The op's own vjp, whatever it is: with this rule everywhere, Gradient×Input."""

    kinds = frozenset(Kind)

    op = staticmethod(ops.gradient)
    absorbs = "gradient"
