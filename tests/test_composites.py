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
    Attention,
    Composite,
    Constant,
    Epsilon,
    Gradient,
    Identity,
    Match,
    Rule,
    RuleError,
    StatisticConstant,
    Taylor,
    Uniform,
    Winner,
    ops,
)
from attnlrp_fx.composites import composite_named
from attnlrp_fx.operators import Kind


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
    assert match.fits(node, Kind.ACTIVATION, "gate") is fits


def test_match_outside_of_modules() -> None:
    """A node without provenance is in the root, whose path and class are empty."""
    node = call()
    assert Match(module="").fits(node, Kind.ACTIVATION, None)
    assert Match(module="*").fits(node, Kind.ACTIVATION, None)
    assert not Match(module="?*").fits(node, Kind.ACTIVATION, None)
    assert not Match(role="gate").fits(node, Kind.ACTIVATION, None)


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
    assert composite.rule_for(call("gelu"), Kind.ACTIVATION, None) == Taylor()
    assert composite.rule_for(call("silu"), Kind.ACTIVATION, None) == Identity()
    assert composite.rule_for(call("neg"), Kind.LINEAR, None) == Gradient()
    assert Composite("none", ()).rule_for(call(), Kind.ACTIVATION, None) is None


def test_with_rules() -> None:
    """A user's entries go first, in the order given; the composite itself stays as it was."""
    base = COMPOSITES["attnlrp"]
    first, second = (Match(op="aten.silu.*"), Taylor()), (Match(kind="activation"), Constant())
    mine = base.with_rules(first, second)
    assert mine.entries == (first, second, *base.entries)
    assert mine.name == "attnlrp+2"
    assert base is COMPOSITES["attnlrp"]
    assert mine.rule_for(call("silu"), Kind.ACTIVATION, None) == Taylor()
    assert mine.rule_for(call("gelu"), Kind.ACTIVATION, None) == Constant()
    assert base.rule_for(call("gelu"), Kind.ACTIVATION, None) == Identity()
    assert base.with_rules().entries == base.entries


def test_print() -> None:
    """A composite prints as the list that it is."""
    assert str(COMPOSITES["attnlrp"]) == ATTNLRP
    assert str(COMPOSITES["cp-lrp"]) == CP_LRP
    assert str(COMPOSITES["gradient"]) == "composite gradient\n  any  Gradient()"
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


def test_composite_named() -> None:
    mine = Composite("mine", ())
    assert composite_named(mine) is mine
    assert composite_named("cp-lrp") is COMPOSITES["cp-lrp"]
    with pytest.raises(RuleError, match="no composite 'lrp'") as raised:
        composite_named("lrp")
    for name in COMPOSITES:
        assert name in raised.value.remedy


@pytest.mark.parametrize("name", ["attnlrp", "cp-lrp", "gradient"])
def test_every_kind_has_a_rule(name: str) -> None:
    """Every kind that is known is claimed, by a rule that may stand there."""
    for kind in set(Kind) - {Kind.UNKNOWN}:
        rule = COMPOSITES[name].rule_for(call(), kind, None)
        assert rule is not None
        assert kind in rule.kinds
    unknown = COMPOSITES[name].rule_for(call(), Kind.UNKNOWN, None)
    assert unknown == (Gradient() if name == "gradient" else None)


RULES: list[Rule] = [
    *(Epsilon(), Uniform(), Identity(), Taylor(), Winner(), StatisticConstant()),
    *(Attention(), Gradient()),
]


def test_every_relevance_op_has_a_rule() -> None:
    assert {rule.op for rule in RULES} == set(ops.RELEVANCE_OPS)
    assert all(rule.absorbs for rule in RULES)


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
