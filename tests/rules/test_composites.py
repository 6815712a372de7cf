"""Composites: which entry decides, what a user's own entries do, how the list prints."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from references import rewrite
from torch import Tensor, fx, nn

import attnlrp_fx
from attnlrp_fx import (
    COMPOSITES,
    AlphaBeta,
    Attention,
    Composite,
    Constant,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Identity,
    Join,
    Match,
    Pass,
    Rule,
    RuleError,
    StatisticConstant,
    Taylor,
    Uniform,
    Winner,
    WSquare,
    ZBox,
    ZPlus,
    epsilon_gamma_box,
    ops,
)
from attnlrp_fx.graph.operators import Kind, is_matrix_product
from attnlrp_fx.graph.provenance import module_path
from attnlrp_fx.rules.composites import composite_named
from attnlrp_fx.rules.roles import Role
from attnlrp_fx.rules.rules import Site


def call(op: str = "silu", module: str = "", module_class: str = "") -> fx.Node:
    """A node as capture leaves it: an ATen op inside a module."""
    graph = fx.Graph()
    target = getattr(torch.ops.aten, op).default
    node = graph.call_function(target, (graph.placeholder("x"),))
    if module or module_class:
        node.meta["nn_module_stack"] = {
            "root": ("L['self']", "Root"),
            "inner": (f"L['self'].{module}", f"package.{module_class or 'Module'}"),
        }
    return node


@pytest.mark.parametrize(
    ("match", "fits"),
    [
        (Match(), True),
        (Match(kind=Kind.ACTIVATION), True),
        (Match(kind="activation"), True),
        (Match(kind="linear"), False),
        (Match(role="gate"), True),
        (Match(role="weights"), False),
        (Match(op="aten.silu.default"), True),
        (Match(op="aten.silu*"), True),
        (Match(op="aten.silu"), False),
        (Match(op="*.silu.*"), True),
        (Match(op="aten.gelu.*"), False),
        (Match(module="model.layers.3.mlp.act"), True),
        (Match(module="model.layers.*.mlp*"), True),
        (Match(module="model.layers.[0-2].*"), False),
        (Match(module="mlp"), False),
        (Match(module_class="SiLU"), True),
        (Match(module_class="*LU"), True),
        (Match(module_class="silu"), False),
        (Match(kind="activation", role="gate", op="*silu*", module="*.3.*"), True),
        (Match(kind="activation", role="gate", op="*silu*", module="*.4.*"), False),
    ],
)
def test_match(match: Match, fits: bool) -> None:
    """Every field that is given must fit; globs are anchored at both ends and case counts."""
    node = call("silu", "model.layers.3.mlp.act", "SiLU")
    assert match.fits(node, Kind.ACTIVATION, {"first", "gate"}) is fits


def test_match_outside_of_modules() -> None:
    """A node without provenance is in the root, whose path and class are empty."""
    node = call()
    assert Match(module="").fits(node, Kind.ACTIVATION)
    assert Match(module="*").fits(node, Kind.ACTIVATION)
    assert not Match(module="?*").fits(node, Kind.ACTIVATION)


def test_match_of_several_roles() -> None:
    """A node may have several roles, or none; any of them fits."""
    node = call("linear")
    both = {Role.DENSE, Role.FIRST}
    for role in both:
        assert Match(role=role).fits(node, Kind.LINEAR, both)
        assert Match(role=str(role)).fits(node, Kind.LINEAR, both)
        assert not Match(role=role).fits(node, Kind.LINEAR)
        assert not Match(role=role).fits(node, Kind.LINEAR, {Role.PROJECTION})
    assert not Match(role="join").fits(node, Kind.LINEAR, both)
    assert Match().fits(node, Kind.LINEAR)


def test_match_of_no_role() -> None:
    with pytest.raises(RuleError, match="no role 'gates'") as raised:
        Match(role="gates")
    assert "projection" in raised.value.remedy


def test_match_of_no_kind() -> None:
    with pytest.raises(RuleError, match="no kind of op 'activations'") as raised:
        Match(kind="activations")
    assert "softmax" in raised.value.remedy


def test_first_match_decides() -> None:
    composite = Composite(
        "mine",
        (
            (Match(op="aten.gelu.*"), Taylor()),
            (Match(kind="activation"), Identity()),
            (Match(), Gradient()),
        ),
    )
    assert composite.rule_for(call("gelu"), Kind.ACTIVATION) == Taylor()
    assert composite.rule_for(call("silu"), Kind.ACTIVATION) == Identity()
    assert composite.rule_for(call("neg"), Kind.LINEAR) == Gradient()
    assert Composite("none", ()).rule_for(call(), Kind.ACTIVATION) is None


def test_with_rules() -> None:
    """A user's entries go first, in the order given; the composite itself stays as it was."""
    base = COMPOSITES["attnlrp"]
    first, second = (Match(op="aten.silu.*"), Taylor()), (Match(kind="activation"), Constant())
    mine = base.with_rules(first, second)
    assert mine.entries == (first, second, *base.entries)
    assert mine.name == "attnlrp+2"
    assert base is COMPOSITES["attnlrp"]
    assert mine.rule_for(call("silu"), Kind.ACTIVATION) == Taylor()
    assert mine.rule_for(call("gelu"), Kind.ACTIVATION) == Constant()
    assert base.rule_for(call("gelu"), Kind.ACTIVATION) == Identity()
    assert base.with_rules().entries == base.entries


def test_print() -> None:
    """A composite prints as the list that it is."""
    assert str(COMPOSITES["attnlrp"]) == ATTNLRP
    assert str(COMPOSITES["cp-lrp"]) == CP_LRP
    assert str(COMPOSITES["best"]) == BEST
    assert str(COMPOSITES["gradient"]) == "composite gradient\n  any  Gradient()"
    assert str(COMPOSITES["attnlrp-vision"]) == ATTNLRP_VISION
    assert str(COMPOSITES["epsilon-plus-flat"]) == EPSILON_PLUS_FLAT
    mine = Composite("mine", ()).with_rules((Match(kind="linear", module="*.mlp"), Epsilon(0.1)))
    assert str(mine) == "composite mine+1\n  kind=linear, module=*.mlp  Epsilon(epsilon=0.1)"
    assert str(Composite("empty", ())) == "composite empty"


ATTNLRP = """\
composite attnlrp
  kind=statistic    Constant()
  kind=coefficient  Constant()
  kind=norm         StatisticConstant()
  kind=linear       Epsilon()
  kind=selection    Winner()
  kind=routing      Explained()
  kind=attention    Attention(weights=0.5)
  kind=activation   Identity()
  kind=product      Uniform()
  kind=softmax      Taylor()
  kind=reduction    Taylor()
  kind=quotient     Taylor()"""

CP_LRP = """\
composite cp-lrp
  kind=statistic    Constant()
  kind=coefficient  Constant()
  kind=norm         StatisticConstant()
  kind=linear       Epsilon()
  kind=selection    Winner()
  kind=routing      Constant()
  kind=attention    Attention(weights=0.0)
  role=weights      Constant()
  role=gate         Constant()
  kind=activation   Identity()
  kind=product      Uniform()
  kind=softmax      Taylor()
  kind=reduction    Taylor()
  kind=quotient     Taylor()"""


BEST = """\
composite best
  kind=attention    Attention(weights=0.25, points=8)
""" + ATTNLRP.removeprefix("composite attnlrp\n")

ATTNLRP_VISION = """\
composite attnlrp-vision
  role=convolution  Gamma(gamma=0.25)
  role=projection   Epsilon()
  role=dense        Gamma(gamma=0.05)
""" + ATTNLRP.removeprefix("composite attnlrp\n")

EPSILON_PLUS_FLAT = """\
composite epsilon-plus-flat
  role=first        Flat(epsilon=1e-06)
  role=convolution  ZPlus(epsilon=1e-06)
  role=gate         Constant()
  kind=linear       Epsilon(epsilon=1e-06)
  kind=activation   Pass()
""" + ATTNLRP.removeprefix("composite attnlrp\n")


def test_looks_at_weights() -> None:
    """Only rules that tell a layer from a layer and its normalisation make a difference."""
    plain = {name for name, composite in COMPOSITES.items() if not composite.looks_at_weights}
    assert plain == {"attnlrp", "cp-lrp", "best", "gradient"}
    for rule in (Gamma(), ZPlus(), Flat(), Epsilon(1e-6)):
        assert COMPOSITES["attnlrp"].with_rules((Match(kind="linear"), rule)).looks_at_weights
    for rule in (Epsilon(), Join(), Pass()):
        assert not COMPOSITES["attnlrp"].with_rules((Match(kind="linear"), rule)).looks_at_weights


def test_epsilon_gamma_box() -> None:
    """The range of pixels is for the first layer, whatever it is; γ for all other convolutions."""
    composite = epsilon_gamma_box((-2.0, -1.5), (2.0, 2.5), gamma=0.5)
    first, other, dense = {"convolution", "first"}, {"convolution"}, {"dense"}
    linear = call("linear")
    found = [composite.rule_for(linear, Kind.LINEAR, roles) for roles in (first, other, dense)]
    box = ZBox((-2.0, -1.5), (2.0, 2.5), epsilon=1e-6)
    assert found == [box, Gamma(0.5, epsilon=1e-6), Epsilon(1e-6)]
    assert composite.name == "epsilon-gamma-box"


def test_composite_named() -> None:
    mine = Composite("mine", ())
    assert composite_named(mine) is mine
    assert composite_named("cp-lrp") is COMPOSITES["cp-lrp"]
    with pytest.raises(RuleError, match="no composite 'lrp'") as raised:
        composite_named("lrp")
    for name in COMPOSITES:
        assert name in raised.value.remedy


@pytest.mark.parametrize("name", COMPOSITES)
def test_every_kind_has_a_rule(name: str) -> None:
    """Every kind that is known is claimed, by a rule that may stand there."""
    for kind in set(Kind) - {Kind.UNKNOWN}:
        rule = COMPOSITES[name].rule_for(call(), kind)
        assert rule is not None
        assert kind in rule.kinds
    unknown = COMPOSITES[name].rule_for(call(), Kind.UNKNOWN)
    assert unknown == (Gradient() if name == "gradient" else None)


RULES: list[Rule] = [
    *(Epsilon(), Uniform(), Identity(), Taylor(), Winner(), StatisticConstant()),
    *(Attention(), Gradient(), Gamma(), AlphaBeta(), WSquare(), Flat(), ZBox(), Join(), Pass()),
]


def test_every_relevance_op_has_a_rule() -> None:
    assert {rule.op for rule in RULES} == set(ops.RELEVANCE_OPS)
    assert all(rule.formula for rule in RULES)
    assert ZPlus().op is AlphaBeta().op


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gamma(-0.1), "Gamma: gamma must be 0 or more, got -0.1"),
        (lambda: Gamma(0.1, epsilon=-1.0), "Gamma: epsilon must be 0 or more"),
        (lambda: Gamma(float("nan")), "Gamma: gamma must be 0 or more"),
        (lambda: AlphaBeta(2, 2), "alpha - beta must be 1, got 0"),
        (lambda: AlphaBeta(0.5, -0.5), "AlphaBeta: beta must be 0 or more"),
        (lambda: Flat(epsilon=-1e-6), "Flat: epsilon must be 0 or more"),
        (lambda: ZBox(1.0, 0.0), "ZBox: low 1.0 must be less than high 0.0"),
        (lambda: ZBox((0.0, 0.0), (1.0, 0.0)), "must be less than"),
        (lambda: ZBox(0.5, (1.0, 0.5)), "must be less than"),
        (lambda: ZBox((0.0, 0.0), (1.0, 1.0, 1.0)), "low has 2 channels, high has 3"),
        (lambda: ZBox(-1, 1, epsilon=-1.0), "ZBox: epsilon must be 0 or more"),
        (lambda: Join("ratio"), "split must be 'magnitude' or 'equal', got 'ratio'"),
    ],
)
def test_options_out_of_range(make: Callable[[], Rule], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


LAYER, JOIN = Site(True, False, False), Site(False, True, False)
POINTWISE, ELSEWHERE = Site(False, False, True), Site(False, False, False)


@pytest.mark.parametrize(
    ("rule", "places", "instead"),
    [
        (Gamma(0.5, epsilon=0.1), {LAYER}, Epsilon(0.1)),
        (Gamma(0.0, epsilon=0.1), set(), Epsilon(0.1)),
        (ZPlus(), {LAYER}, Epsilon()),
        (AlphaBeta(epsilon=0.1), {LAYER}, Epsilon(0.1)),
        (ZBox(-1.0, 1.0), {LAYER}, Epsilon()),
        (Join(), {JOIN}, Epsilon()),
        (Pass(), {POINTWISE}, Epsilon()),
        (Epsilon(0.1), {LAYER, JOIN, POINTWISE, ELSEWHERE}, Epsilon(0.1)),
    ],
    ids=str,
)
def test_what_stands_where_a_rule_has_no_meaning(
    rule: Rule, places: set[Site], instead: Rule
) -> None:
    """Rules for layers, for joins and for pointwise ops are the ε rule elsewhere."""
    for site in (LAYER, JOIN, POINTWISE, ELSEWHERE):
        assert rule.at(site) == (rule if site in places else instead)


def test_pass_at_what_is_zero_at_zero() -> None:
    """There the identity rule hands on as much, and needs no relevance of its own."""
    assert Pass().at(Site(is_pointwise=True, vanishes=True)) == Identity()
    composite = COMPOSITES["epsilon-plus"]

    def function(x: Tensor) -> Tensor:
        for activation in (F.gelu, F.relu, F.leaky_relu, F.softplus, torch.sigmoid):
            x = activation(x).flip(1)
        return torch.cos(F.relu(x) + 1)  # a region

    rules = _rules(rewrite(function, {"x": X["x"]}, composite))
    assert rules == {
        "aten.gelu.default": "Identity()",
        "aten.relu.default": "Identity()",
        "aten.leaky_relu.default": "Identity()",
        "aten.softplus.default": "Pass()",
        "aten.sigmoid.default": "Pass()",
        "aten.flip.default": "Epsilon(epsilon=1e-06)",
        "activation_0": "Pass()",
    }


def _rules(rewritten: fx.GraphModule) -> dict[str, str]:
    """The rule of each ATen op, by the op's name."""
    return {
        str(node.meta["op"]): node.meta["rule"]
        for node in rewritten.graph.nodes
        if "rule" in node.meta and node.target in ops.RELEVANCE_OPS
    }


X = {"x": torch.ones(2, 3, 4), "y": torch.ones(2, 3, 4)}


def _gated(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(2 * x) * (y + 1)


def _mixed(x: Tensor, y: Tensor) -> Tensor:
    return torch.softmax(2 * x, -1).matmul((y + 1).mT)


def _equals(x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(2 * x) * torch.sigmoid(y + 1)


@pytest.mark.parametrize(
    ("function", "constant", "rule"),
    [(_gated, "silu", "Uniform()"), (_mixed, "softmax", "Uniform()"), (_equals, "", "Uniform()")],
    ids=["gate", "weights", "two activations"],
)
def test_roles(function: Callable[..., Tensor], constant: str, rule: str) -> None:
    """CP-LRP holds the gate or the weights constant; of two activations neither is the gate."""
    assert rule in _rules(rewrite(function, X)).values()
    rewritten = rewrite(function, X, "cp-lrp")
    held = [n.name for n in rewritten.graph.nodes if n.meta.get("rule") == "Constant()"]
    assert held == ([constant] if constant else [])
    assert (rule in _rules(rewritten).values()) == (not constant)


@pytest.mark.parametrize("function", [lambda x, y: F.silu(x) * y, lambda x, y: y * F.silu(x)])
def test_a_gate_on_an_input(function: Callable[..., Tensor]) -> None:
    """The other factor may be an explained input itself, and come first."""
    rewritten = rewrite(function, X, "cp-lrp")
    assert [n.name for n in rewritten.graph.nodes if n.meta.get("rule") == "Constant()"] == ["silu"]


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 4) → (batch, 3)."""
        return self.down(self.act(self.up(x)))


def test_by_module() -> None:
    """Module path and class, as the user knows them, choose the rule through the whole pipeline."""
    model = nn.Sequential(Mlp(), nn.ReLU(), nn.Linear(3, 2))
    composite = COMPOSITES["attnlrp"].with_rules(
        (Match(module="0.down"), Epsilon(epsilon=0.1)),
        (Match(module_class="Linear", module="0.*"), Epsilon(epsilon=0.2)),
        (Match(module_class="GELU"), Gradient()),
    )
    rewritten = rewrite(model, {"input": torch.ones(2, 4)}, composite)
    rules = [n.meta["rule"] for n in rewritten.graph.nodes if "rule" in n.meta]
    assert rules == [
        "Epsilon(epsilon=0.2)",
        "Gradient()",
        "Epsilon(epsilon=0.1)",
        "Identity()",
        "Epsilon()",
    ]


def test_constant_factor_makes_a_product_linear() -> None:
    """A factor that its rule holds constant leaves the other all of the relevance."""
    composite = COMPOSITES["attnlrp"].with_rules((Match(op="aten.silu.*"), Constant()))
    assert _rules(rewrite(_gated, X, composite))["aten.mul.Tensor"] == "Epsilon()"


class Angle(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(…) twice → (…)."""
        return torch.i0(x) * y + x


def test_unclaimed_op() -> None:
    """No rule: an error that names op, place and remedy; the remedy works, and so the fallback."""

    with pytest.raises(RuleError, match=r"no rule of composite 'attnlrp' claims aten\.i0") as e:
        rewrite(Angle(), X)
    assert "test_composites.py" in e.value.where
    assert "torch.i0(x) * y" in e.value.where
    assert "not in the table" in e.value.why
    match = Match(op="aten.i0.default")
    mine = COMPOSITES["attnlrp"].with_rules((match, Gradient()))
    assert _rules(rewrite(Angle(), X, mine))["aten.i0.default"] == "Gradient()"
    explainer = attnlrp_fx.compile(Angle().eval(), X, backend="eager", fallback="gradient")
    assert any("i0" in line for line in explainer.report().fallbacks)


def test_a_kind_that_no_entry_claims() -> None:
    composite = Composite("half", ((Match(kind="linear"), Epsilon()),))
    with pytest.raises(RuleError, match=r"claims aten\.silu") as raised:
        rewrite(_gated, X, composite)
    assert "activation" in raised.value.why


def test_a_rule_that_does_not_fit() -> None:
    """A rule stands only at the kinds it is made for."""
    composite = COMPOSITES["attnlrp"].with_rules((Match(op="aten.silu.*"), Uniform()))
    with pytest.raises(RuleError, match=r"Uniform\(\) cannot stand at .* 'activation'") as raised:
        rewrite(_gated, X, composite)
    assert "product" in raised.value.remedy


class Vision(nn.Module):
    """A transformer on patches, or the convolutions before it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.patches = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 8, 4, stride=4)
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(8, 8))
        self.norm, self.mlp, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.squeeze = nn.Linear(8, 8)

    def forward(self, image: Tensor) -> Tensor:
        """(batch, 2, 8, 8) → (batch, 3)."""
        x = self.patches(torch.relu(self.stem(image))).flatten(2).mT
        h = self.norm(x)
        q, k, v = (layer(h)[:, None] for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v)[:, 0])
        x = F.gelu(self.mlp(x)).mean(1)
        return self.head(x * torch.sigmoid(self.squeeze(x)))


@pytest.mark.parametrize(
    ("composite", "expected"),
    [
        (
            "attnlrp-vision",
            {"stem": "Gamma(gamma=0.25)", "q": "Epsilon()", "mlp": "Gamma(gamma=0.05)"},
        ),
        (
            "epsilon-plus",
            {"stem": "ZPlus(epsilon=1e-06)", "q": "Epsilon(epsilon=1e-06)"},
        ),
        (
            "epsilon-alpha2-beta1",
            {"stem": "AlphaBeta(alpha=2, beta=1, epsilon=1e-06)", "q": "Epsilon(epsilon=1e-06)"},
        ),
        (
            "epsilon-alpha2-beta1-flat",
            {
                "stem": "Flat(epsilon=1e-06)",
                "patches": "AlphaBeta(alpha=2, beta=1, epsilon=1e-06)",
                "q": "Epsilon(epsilon=1e-06)",
            },
        ),
        (
            epsilon_gamma_box(-2.0, (2.0, 3.0)),
            {
                "stem": "ZBox(low=-2.0, high=(2.0, 3.0), epsilon=1e-06)",
                "patches": "Gamma(gamma=0.25, epsilon=1e-06)",
                "q": "Epsilon(epsilon=1e-06)",
            },
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", ""),
)
def test_rules_of_a_vision_model(composite: str | Composite, expected: dict[str, str]) -> None:
    """By role: the first layer, convolutions, projections, other dense layers, gates."""
    explainer = attnlrp_fx.compile(
        Vision().eval(), torch.randn(3, 2, 8, 8), composite=composite, backend="eager", audit=True
    )
    rules = {
        module_path(node): node.meta["rule"]
        for node in explainer.rewritten.graph.nodes
        if "rule" in node.meta and is_matrix_product(node.meta.get("op"))
    }
    stem, dense = expected["stem"], expected.get("mlp", expected["q"])
    wanted = {
        "stem": stem,
        "patches": expected.get("patches", stem),
        **dict.fromkeys(("q", "k", "v", "o"), expected["q"]),
        **dict.fromkeys(("mlp", "head"), dense),
    }
    is_gate_constant = composite != "attnlrp-vision"
    if not is_gate_constant:
        wanted["squeeze"] = dense
    assert rules == wanted
    (gate,) = (
        n
        for n in explainer.rewritten.graph.nodes
        if "sigmoid" in n.name or "sigmoid" in str(n.args[:1])
    )
    assert (gate.meta["rule"] == "Constant()") == is_gate_constant
    explanation = explainer(torch.randn(2, 2, 8, 8))
    assert explanation.ledger is not None
    scale = sum(abs(entry.received) for entry in explanation.ledger.entries)
    assert abs(explanation.ledger.residual) <= 1e-5 * scale
