"""Every explained node gets one rule, written into the graph; what no rule claims is an error."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, copy_of, prepared, run, text

from attnlrp_fx import COMPOSITES, Composite, Epsilon, Gradient, Identity, Match
from attnlrp_fx.errors import RuleError
from attnlrp_fx.passes import (
    PassContext,
    assign_rules,
    raise_activations,
    raise_attention,
    raise_norms,
    run_passes,
)

WIDTH = 4


def block(m, x):
    """A norm, a gated product, and a constant on the side."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    gated = F.silu(F.linear(y, m.gate)) * F.linear(y, m.up)
    return x + F.linear(gated, m.down, m.bias)


def assigned(function, composite="attnlrp", *, context=None):
    """Before, after, and what the pass says."""
    torch.manual_seed(0)
    sizes = {"gate": (6, WIDTH), "up": (6, WIDTH), "down": (WIDTH, 6), "bias": (WIDTH,)}
    parameters = {name: torch.randn(size) for name, size in sizes.items()}
    before = prepared(Written(function, **parameters), {"x": torch.randn(3, WIDTH)})
    context = context or PassContext(composite=COMPOSITES[composite])
    run_passes(before, context, (raise_attention, raise_norms, raise_activations))
    after = copy_of(before)
    (result,) = run_passes(after, context, (assign_rules,))
    return before, after, result


def test_golden_attnlrp():
    before, after, result = assigned(block)
    assert (
        text(before)
        == """\
source = ops.source(x, name='x')
pow = aten.pow(source, 2)
mean = aten.mean(pow, [-1], True)
add = aten.add(mean, 1e-05)
rsqrt = aten.rsqrt(add)
statistic = ops.statistic(rsqrt)
mul = aten.mul(source, statistic)
linear = aten.linear(mul, gate)
silu = aten.silu(linear)
linear_1 = aten.linear(mul, up)
mul_1 = aten.mul(silu, linear_1)
linear_2 = aten.linear(mul_1, down, bias)
add_1 = aten.add(source, linear_2)
return [add_1]"""
    )
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
pow = aten.pow(source, 2)
mean = aten.mean(pow, [-1], True)
add = aten.add(mean, 1e-05)
rsqrt = aten.rsqrt(add)
statistic = ops.statistic(rsqrt)
linear = ops.linear(aten.mul, source, statistic)
linear_1 = ops.linear(aten.linear, linear, gate)
identity = ops.identity(aten.silu, linear_1)
linear_2 = ops.linear(aten.linear, linear, up)
uniform = ops.uniform(aten.mul, identity, linear_2)
linear_3 = ops.linear(aten.linear, uniform, down, bias)
linear_4 = ops.linear(aten.add, source, linear_3)
return [linear_4]"""
    )
    assert result.changes == 8
    assert result.notes == [
        "5 × Epsilon()",
        "1 × Constant()",
        "1 × Identity()",
        "1 × Uniform()",
    ]


def test_golden_cp_lrp():
    """The gate is a constant, so its product with the other value is linear."""
    _, after, _ = assigned(block, "cp-lrp")
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
pow = aten.pow(source, 2)
mean = aten.mean(pow, [-1], True)
add = aten.add(mean, 1e-05)
rsqrt = aten.rsqrt(add)
statistic = ops.statistic(rsqrt)
linear = ops.linear(aten.mul, source, statistic)
linear_1 = aten.linear(linear, gate)
silu = aten.silu(linear_1)
linear_2 = ops.linear(aten.linear, linear, up)
linear_3 = ops.linear(aten.mul, silu, linear_2)
linear_4 = ops.linear(aten.linear, linear_3, down, bias)
linear_5 = ops.linear(aten.add, source, linear_4)
return [linear_5]"""
    )


def test_golden_gradient():
    """Nothing is held constant: the statistic is not one any more."""
    _, after, _ = assigned(block, "gradient")
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
gradient = ops.gradient(aten.pow, source, 2)
gradient_1 = ops.gradient(aten.mean, gradient, [-1], True)
gradient_2 = ops.gradient(aten.add, gradient_1, 1e-05)
gradient_3 = ops.gradient(aten.rsqrt, gradient_2)
gradient_4 = ops.gradient(aten.mul, source, gradient_3)
gradient_5 = ops.gradient(aten.linear, gradient_4, gate)
gradient_6 = ops.gradient(aten.silu, gradient_5)
gradient_7 = ops.gradient(aten.linear, gradient_4, up)
gradient_8 = ops.gradient(aten.mul, gradient_6, gradient_7)
gradient_9 = ops.gradient(aten.linear, gradient_8, down, bias)
gradient_10 = ops.gradient(aten.add, source, gradient_9)
return [gradient_10]"""
    )


def test_golden_parameters_of_a_rule():
    composite = COMPOSITES["attnlrp"].with_rules((Match(op="aten.linear.*"), Epsilon(1e-6)))
    _, after, _ = assigned(
        lambda m, x: F.linear(x, m.gate).tanh(), context=PassContext(composite=composite)
    )
    assert (
        text(after)
        == """\
source = ops.source(x, name='x')
linear = ops.linear(aten.linear, source, gate, epsilon=1e-06)
identity = ops.identity(aten.tanh, linear)
return [identity]"""
    )


@pytest.mark.parametrize("composite", COMPOSITES)
def test_meaning_is_unchanged(composite):
    before, after, _ = assigned(block, composite)
    given = {"x": torch.randn(3, WIDTH)}
    torch.testing.assert_close(run(after, given), run(before, given), rtol=0, atol=0)


def test_near_miss_of_what_only_a_constant_needs():
    """Relevance cannot come from a statistic, so what computes it keeps its plain ops."""
    _, after, _ = assigned(block)
    assert "pow = aten.pow(source, 2)" in text(after)
    assert "ops.identity(aten.pow" not in text(after)


def test_every_rule_names_its_node():
    before, after, result = assigned(block)
    known = {node.name: node for node in before.graph.nodes}
    rewritten = [node for node in after.graph.nodes if "formula" in node.meta]
    assert len(rewritten) == result.changes - 1
    for node in rewritten:
        assert node.meta["constructed_by"] in ("assign_rules", "raise_activations")
        assert node.meta["stack_trace"] == known[node.name].meta["stack_trace"]
        assert node.meta["op"] == known[node.name].target


def unknown(m, x):
    """An op that is not in the table."""
    return torch.special.i0(x)


def test_no_rule_claims_an_op():
    with pytest.raises(RuleError, match="no rule of composite 'attnlrp' claims") as error:
        assigned(unknown)
    message = str(error.value)
    assert "node 'i0' (aten.i0.default)" in message
    assert "the op is not in the table" in message
    assert "rewriting.py" in message
    assert "fallback='gradient'" in message


def test_gradient_fallback_is_noted():
    _, after, result = assigned(unknown, context=PassContext(fallback="gradient"))
    assert "ops.gradient(aten.i0" in text(after)
    assert any("gradient fallback: node 'i0'" in note for note in result.notes)


def test_composite_without_an_entry_for_a_kind():
    composite = Composite("linear only", ((Match(kind="linear"), Epsilon()),))
    with pytest.raises(RuleError, match=r"'linear only' claims aten\.tanh") as error:
        assigned(lambda m, x: (x * 2).tanh(), context=PassContext(composite=composite))
    assert "its kind is activation" in str(error.value)


def test_rule_at_an_op_that_it_does_not_fit():
    composite = COMPOSITES["attnlrp"].with_rules((Match(op="aten.linear.*"), Identity()))
    with pytest.raises(RuleError, match=r"Identity\(\) cannot stand at an op of kind 'linear'"):
        assigned(block, context=PassContext(composite=composite))


def test_user_entry_comes_first():
    composite = COMPOSITES["attnlrp"].with_rules((Match(op="aten.silu.*"), Gradient()))
    _, after, _ = assigned(block, context=PassContext(composite=composite))
    assert "ops.gradient(aten.silu" in text(after)
