"""Composites: ordered lists of matcher → rule.

The first matcher that fits a node decides its rule. A composite prints as the list that it is, and
`with_rules` puts a user's own entries before it.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import translate

from torch import fx

from attnlrp_fx.errors import RuleError
from attnlrp_fx.graph.operators import Kind
from attnlrp_fx.graph.provenance import module_class, module_path, target_name
from attnlrp_fx.rules.roles import Role
from attnlrp_fx.rules.rules import (
    AlphaBeta,
    Attention,
    Constant,
    Epsilon,
    Explained,
    Flat,
    Gamma,
    Gradient,
    Identity,
    LayerRule,
    Pass,
    Rule,
    StatisticConstant,
    Taylor,
    Uniform,
    Winner,
    ZBox,
    ZPlus,
)


@dataclass(frozen=True)
class Match:
    """Which nodes an entry of a composite stands for; fields that are None fit every node."""

    kind: Kind | str | None = None
    """Kind of op: one of `attnlrp_fx.graph.operators.Kind`."""
    role: Role | str | None = None
    """Role in the model: one of `attnlrp_fx.rules.roles.Role`."""
    op: str | None = None
    """Glob on the op's name, e.g. "aten.silu.*"."""
    module: str | None = None
    """Glob on the module path, e.g. "model.layers.*.mlp*"."""
    module_class: str | None = None
    """Glob on the class name of the innermost module."""

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in set(Kind):
            raise RuleError(
                f"there is no kind of op '{self.kind}'",
                remedy=f"use one of: {', '.join(Kind)}",
            )
        if self.role is not None and self.role not in set(Role):
            raise RuleError(
                f"there is no role '{self.role}'", remedy=f"use one of: {', '.join(Role)}"
            )

    def fits(self, node: fx.Node, kind: Kind, roles: Collection[str] = ()) -> bool:
        """Whether a node of the given kind and roles is meant."""
        return (
            self.kind in (None, kind)
            and (self.role is None or self.role in roles)
            and _glob(self.op, target_name(node.target))
            and _glob(self.module, module_path(node))
            and _glob(self.module_class, module_class(node))
        )

    def __str__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return ", ".join(f"{name}={value}" for name, value in given if value is not None) or "any"


def _has_epsilon(rule: Rule) -> bool:
    return isinstance(rule, Epsilon) and rule.epsilon > 0


def _glob(pattern: str | None, text: str) -> bool:
    return pattern is None or re.match(translate(pattern), text) is not None


@dataclass(frozen=True)
class Composite:
    """An ordered list of matcher → rule."""

    name: str
    entries: tuple[tuple[Match, Rule], ...]

    def entry_for(
        self, node: fx.Node, kind: Kind, roles: Collection[str] = ()
    ) -> tuple[Match, Rule] | None:
        """The first entry that fits, None if there is none."""
        return next((entry for entry in self.entries if entry[0].fits(node, kind, roles)), None)

    def rule_for(self, node: fx.Node, kind: Kind, roles: Collection[str] = ()) -> Rule | None:
        """The rule of the first entry that fits, None if there is none."""
        entry = self.entry_for(node, kind, roles)
        return None if entry is None else entry[1]

    @property
    def looks_at_weights(self) -> bool:
        """Whether any of its rules depends on what a layer's weights and bias are, one by one."""
        return any(isinstance(rule, LayerRule) or _has_epsilon(rule) for _, rule in self.entries)

    def with_rules(self, *entries: tuple[Match, Rule]) -> "Composite":
        """The same composite with entries put before its own.

        >>> from attnlrp_fx import COMPOSITES, Epsilon, Match
        >>> mine = COMPOSITES["attnlrp"].with_rules((Match(module="*.mlp*", kind="linear"),
        ...                                          Epsilon(1e-6)))
        >>> print(mine.name, len(mine.entries) - len(COMPOSITES["attnlrp"].entries))
        attnlrp+1 1
        """
        return replace(self, name=f"{self.name}+{len(entries)}", entries=entries + self.entries)

    def __str__(self) -> str:
        width = max((len(str(match)) for match, _ in self.entries), default=0)
        lines = (f"  {match!s:<{width}}  {rule}" for match, rule in self.entries)
        return "\n".join((f"composite {self.name}", *lines))


_LINEAR_PARTS: tuple[tuple[Match, Rule], ...] = (
    (Match(kind=Kind.STATISTIC), Constant()),
    (Match(kind=Kind.COEFFICIENT), Constant()),
    (Match(kind=Kind.NORM), StatisticConstant()),
    (Match(kind=Kind.LINEAR), Epsilon()),
    (Match(kind=Kind.SELECTION), Winner()),
)
_NONLINEAR_PARTS: tuple[tuple[Match, Rule], ...] = (
    (Match(kind=Kind.ACTIVATION), Identity()),
    (Match(kind=Kind.PRODUCT), Uniform()),
    (Match(kind=Kind.SOFTMAX), Taylor()),
    (Match(kind=Kind.REDUCTION), Taylor()),
    (Match(kind=Kind.QUOTIENT), Taylor()),
)

ATTNLRP = Composite(
    "attnlrp",
    (
        *_LINEAR_PARTS,
        (Match(kind=Kind.ROUTING), Explained()),
        (Match(kind=Kind.ATTENTION), Attention(weights=0.5)),
        *_NONLINEAR_PARTS,
    ),
)
"""AttnLRP for language models (Achtibat et al. 2024): ε = 0 everywhere, no γ."""

CP_LRP = Composite(
    "cp-lrp",
    (
        *_LINEAR_PARTS,
        (Match(kind=Kind.ROUTING), Constant()),
        (Match(kind=Kind.ATTENTION), Attention(weights=0.0)),
        (Match(role="weights"), Constant()),
        (Match(role="gate"), Constant()),
        *_NONLINEAR_PARTS,
    ),
)
"""Attention weights, gates and routing are constants (Ali et al. 2022)."""

BEST = Composite(
    "best",
    (
        (Match(kind=Kind.ATTENTION), Attention(weights=0.25, points=8)),
        *ATTNLRP.entries,
    ),
)
"""AttnLRP with softmax integrated from scores of zero, and a quarter to the attention weights.

Our own, chosen by `benchmarks/faithfulness.py --search`. A softmax outside of attention, or in
attention whose weights are read too, keeps AttnLRP's rule.
"""

GRADIENT = Composite("gradient", ((Match(), Gradient()),))
"""Gradient×Input."""

ATTNLRP_VISION = Composite(
    "attnlrp-vision",
    (
        (Match(role=Role.CONVOLUTION), Gamma(0.25)),
        (Match(role=Role.PROJECTION), Epsilon()),
        (Match(role=Role.DENSE), Gamma(0.05)),
        *ATTNLRP.entries,
    ),
)
"""AttnLRP for vision transformers (Achtibat et al. 2024, Table 4): γ 0.25 in convolutions, 0.05 in
linear layers, ε in the projections of attention."""

STABILISER = 1e-6
"""ε of the composites for convolutional networks, as in zennit."""


def _convolutional(name: str, *entries: tuple[Match, Rule]) -> Composite:
    """A composite for convolutional networks: entries, and ε with a stabiliser for the rest.

    A gate (squeeze-and-excitation) is a constant: the signal takes all (Arras et al. 2017).
    Activations hand on all of their relevance, as in zennit.
    """
    return Composite(
        name,
        (
            *entries,
            (Match(role=Role.GATE), Constant()),
            (Match(kind=Kind.LINEAR), Epsilon(STABILISER)),
            (Match(kind=Kind.ACTIVATION), Pass()),
            *ATTNLRP.entries,
        ),
    )


_FLAT_FIRST = (Match(role=Role.FIRST), Flat(epsilon=STABILISER))
_PLUS = (Match(role=Role.CONVOLUTION), ZPlus(epsilon=STABILISER))
_ALPHA2_BETA1 = (Match(role=Role.CONVOLUTION), AlphaBeta(2, 1, epsilon=STABILISER))

EPSILON_PLUS = _convolutional("epsilon-plus", _PLUS)
"""z⁺ in convolutions, ε elsewhere; zennit's EpsilonPlus."""

EPSILON_PLUS_FLAT = _convolutional("epsilon-plus-flat", _FLAT_FIRST, _PLUS)
"""The same, flat in the first layer; zennit's EpsilonPlusFlat."""

EPSILON_ALPHA2_BETA1 = _convolutional("epsilon-alpha2-beta1", _ALPHA2_BETA1)
"""αβ with α = 2, β = 1 in convolutions, ε elsewhere; zennit's EpsilonAlpha2Beta1."""

EPSILON_ALPHA2_BETA1_FLAT = _convolutional("epsilon-alpha2-beta1-flat", _FLAT_FIRST, _ALPHA2_BETA1)
"""The same, flat in the first layer; zennit's EpsilonAlpha2Beta1Flat."""


def epsilon_gamma_box(
    low: float | tuple[float, ...], high: float | tuple[float, ...], gamma: float = 0.25
) -> Composite:
    """γ in convolutions, zᴮ in the first layer, ε elsewhere; zennit's EpsilonGammaBox.

    Args:
        low: the least that an input can be, one number or one a channel; of normalised images,
            `ZBox.normalised(mean, std).low`.
        high: the most.
        gamma: γ of the convolutions.
    """
    return _convolutional(
        "epsilon-gamma-box",
        (Match(role=Role.FIRST), ZBox(low, high, epsilon=STABILISER)),
        (Match(role=Role.CONVOLUTION), Gamma(gamma, epsilon=STABILISER)),
    )


COMPOSITES: Mapping[str, Composite] = {
    c.name: c
    for c in (
        ATTNLRP,
        CP_LRP,
        GRADIENT,
        BEST,
        ATTNLRP_VISION,
        EPSILON_PLUS,
        EPSILON_PLUS_FLAT,
        EPSILON_ALPHA2_BETA1,
        EPSILON_ALPHA2_BETA1_FLAT,
    )
}


def composite_named(composite: str | Composite) -> Composite:
    """A composite by its name, or as it is.

    Raises:
        RuleError: there is no composite of that name.
    """
    if isinstance(composite, Composite):
        return composite
    if composite not in COMPOSITES:
        raise RuleError(
            f"there is no composite '{composite}'",
            remedy=f"use one of: {', '.join(COMPOSITES)}, or pass a Composite",
        )
    return COMPOSITES[composite]
