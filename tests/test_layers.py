"""The rules for layers against their slow oracles, at every op that is a layer.

Each op is captured once for every surrounding (alone, behind a rectifier, between two, which
decide what is known of signs); rules are then assigned, parameters and inputs drawn.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import layer_references as ref
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from references import Explained, Oracle, explain, read_tape
from torch import Tensor, fx, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import (
    COMPOSITES,
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Match,
    Rule,
    RuleError,
    WSquare,
    ZBox,
    ZPlus,
    ops,
)
from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.passes import (
    ASSIGN,
    NORMALISE,
    RAISE,
    Pass,
    PassContext,
    assign_rules,
    run_passes,
)

DOUBLE = torch.float64
SETTINGS = settings(deadline=None, max_examples=4, derandomize=True)


@dataclass(frozen=True)
class Case:
    """An op of one explained input and one parameter."""

    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    x: tuple[int, ...]
    """Shape of the input, the batch first."""
    weight: tuple[int, ...]
    bias: tuple[int, ...] | None = None
    is_batched: bool = True
    """Whether the first dimension of the input may vary."""


def _conv2d(**options: object) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return lambda x, w, b: F.conv2d(x, w, b, **options)  # type: ignore[arg-type]


CASES: dict[str, Case] = {
    "linear": Case(F.linear, (2, 5), (4, 5), (4,)),
    "linear without bias": Case(F.linear, (2, 5), (4, 5)),
    "linear of sequences": Case(F.linear, (2, 3, 5), (4, 5), (4,)),
    "conv1d": Case(
        lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1), (2, 2, 6), (3, 2, 3), (3,)
    ),
    "conv2d": Case(
        _conv2d(stride=(1, 2), padding=1, dilation=(1, 2)), (2, 2, 3, 4), (3, 2, 3, 2), (3,)
    ),
    "conv2d without bias": Case(_conv2d(padding=1), (2, 2, 3, 3), (3, 2, 2, 2)),
    "conv2d same": Case(_conv2d(padding="same"), (2, 2, 3, 4), (3, 2, 3, 2), (3,)),
    "grouped": Case(_conv2d(groups=2, padding=1), (2, 4, 3, 3), (6, 2, 2, 2), (6,)),
    "depthwise": Case(_conv2d(groups=3), (2, 3, 4, 3), (3, 1, 2, 2), (3,)),
    "conv3d": Case(
        lambda x, w, b: F.conv3d(x, w, b, stride=(1, 2, 1)), (2, 2, 2, 3, 3), (2, 2, 2, 2, 2), (2,)
    ),
    "conv_transpose1d": Case(
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2, padding=1),
        (2, 2, 4),
        (2, 3, 3),
        (3,),
    ),
    "conv_transpose2d": Case(
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, output_padding=1, groups=2),
        (2, 4, 2, 3),
        (4, 2, 2, 3),
        (4,),
    ),
    "addmm": Case(lambda x, w, b: torch.addmm(b, x, w), (2, 5), (5, 4), (4,)),
    "addmm of a row": Case(lambda x, w, b: torch.addmm(b, x, w), (2, 5), (5, 4), (1, 4)),
    "mm": Case(lambda x, w, b: torch.mm(x, w), (2, 5), (5, 4)),
    "matmul": Case(lambda x, w, b: x @ w, (2, 3, 5), (5, 4)),
    "matmul from the left": Case(lambda x, w, b: w @ x, (2, 3, 5), (4, 3)),
    "matmul to several heads": Case(lambda x, w, b: x[:, None] @ w, (2, 3, 5), (2, 5, 4)),
    "matmul of a vector": Case(lambda x, w, b: x @ w, (2, 5), (5,)),
    "bmm": Case(lambda x, w, b: torch.bmm(x, w), (2, 3, 4), (2, 4, 3), None, False),
    "baddbmm": Case(lambda x, w, b: torch.baddbmm(b, x, w), (2, 3, 4), (2, 4, 3), (2, 1, 3), False),
    "einsum": Case(lambda x, w, b: torch.einsum("bij,kj->bik", x, w), (2, 3, 5), (4, 5)),
    "einsum over two": Case(
        lambda x, w, b: torch.einsum("hjk,bij->bhik", w, x), (2, 3, 5), (2, 5, 4)
    ),
}

SCALED = {
    "beta": Case(lambda x, w, b: torch.addmm(b, x, w, beta=0.5), (2, 5), (5, 4), (4,)),
    "alpha": Case(lambda x, w, b: torch.addmm(b, x, w, alpha=2.0), (2, 5), (5, 4), (4,)),
    "both": Case(
        lambda x, w, b: torch.baddbmm(b, x, w, beta=0.5, alpha=3.0),
        (2, 3, 4),
        (2, 4, 3),
        (2, 1, 3),
        False,
    ),
    "negative alpha": Case(lambda x, w, b: torch.addmm(b, x, w, alpha=-1.0), (2, 5), (5, 4), (4,)),
    "negative beta": Case(lambda x, w, b: torch.addmm(b, x, w, beta=-1.0), (2, 5), (5, 4), (4,)),
}

ALL = {
    **CASES,
    **SCALED,
    "linear of pairs": Case(F.linear, (3, 2), (4, 2), (4,)),
}

RULES: dict[str, Callable[[float], Rule]] = {
    "epsilon": Epsilon,
    "gamma": lambda epsilon: Gamma(0.3, epsilon=epsilon),
    "gamma large": lambda epsilon: Gamma(20.0, epsilon=epsilon),
    "z-plus": lambda epsilon: ZPlus(epsilon=epsilon),
    "alpha2-beta1": lambda epsilon: AlphaBeta(2.0, 1.0, epsilon=epsilon),
    "alpha1.5-beta0.5": lambda epsilon: AlphaBeta(1.5, 0.5, epsilon=epsilon),
    "w-square": lambda epsilon: WSquare(epsilon=epsilon),
    "flat": lambda epsilon: Flat(epsilon=epsilon),
    "z-box": lambda epsilon: ZBox(-1.5, 2.0, epsilon=epsilon),
}
"""By name, each with a stabiliser."""

SURROUNDINGS = {
    "alone": (False, False),
    "behind a rectifier": (True, False),
    "between rectifiers": (True, True),
}


class Net(nn.Module):
    """One layer, and rectifiers around it."""

    def __init__(self, case: Case, behind: bool, before: bool) -> None:
        super().__init__()
        self.function, self.behind, self.before = case.function, behind, before
        self.weight = nn.Parameter(torch.ones(case.weight, dtype=DOUBLE))
        self.bias = None
        if case.bias is not None:
            self.bias = nn.Parameter(torch.ones(case.bias, dtype=DOUBLE))

    def layer(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with another weight."""
        return self.function(x, weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → any shape."""
        z = self.layer(torch.relu(x) if self.behind else x, self.weight)
        return torch.relu(z) if self.before else z


def _with(rule: Rule) -> PassContext:
    """The rule at every op that a rule for layers may stand at."""
    return PassContext(composite=COMPOSITES["attnlrp"].with_rules((Match(kind="linear"), rule)))


@functools.cache
def captured(name: str, surrounding: str) -> tuple[Net, fx.GraphModule]:
    """A net and its graph, as rules are assigned to it."""
    case = ALL[name]
    net = Net(case, *SURROUNDINGS[surrounding]).eval()
    example = torch.ones(case.x, dtype=DOUBLE)
    graph_module = capture(net, {"x": example}).graph_module
    run_passes(graph_module, _with(Epsilon()), (*NORMALISE, *RAISE))
    return net, graph_module


@functools.cache
def assigned(
    name: str, surrounding: str, rule: Rule, passes: tuple[Pass, ...] = ASSIGN
) -> tuple[Net, fx.GraphModule]:
    """A net, and a copy of its graph with a rule in it, on the same parameters."""
    net, graph_module = captured(name, surrounding)
    copy = copy_of(graph_module)
    run_passes(copy, _with(rule), passes)
    return net, copy


def copy_of(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph once more, on the same parameters."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return fx.GraphModule(graph_module, graph)


def draw(net: Net, case: Case, seed: int, batch: int, sign: str) -> Tensor:
    """New parameters in place, some of them zero, and an input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=DOUBLE)
            kept = torch.rand(parameter.shape, generator=generator) > 0.2
            parameter.copy_(values * kept)
    shape = (batch, *case.x[1:]) if case.is_batched else case.x
    x = torch.randn(shape, generator=generator, dtype=DOUBLE).clamp(-1.4, 1.9)
    if sign == "some zero":
        return x * (torch.rand(shape, generator=generator) > 0.4)
    return {"mixed": x, "positive": x.abs(), "negative": -x.abs(), "all zero": 0 * x}[sign]


def checked(net: Net, layer: ref.Dense, rule: Rule, x: Tensor, result: Explained) -> None:
    """The tape's relevance and the ledger's entry against the oracle."""
    given = torch.relu(x) if net.behind else x
    expected, absorbed = ref.share_out(rule, layer, given, result.seeded)
    assert_close(result.relevance["x"], expected, rtol=1e-9, atol=1e-10)
    scale = 1.0 + float(result.seeded.abs().sum())
    assert sum(result.absorbed.values()) == pytest.approx(absorbed, abs=1e-9 * scale)
    assert abs(result.residual) <= 1e-10 * scale


SIGN = st.sampled_from(["mixed", "some zero", "positive", "negative", "all zero"])


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", CASES)
@SETTINGS
@given(st.integers(0, 2**16), st.integers(1, 3), SIGN, st.sampled_from([0.0, 1e-6, 0.5]))
def test_rule(
    name: str, surrounding: str, seed: int, batch: int, sign: str, epsilon: float
) -> None:
    """Every rule at every op: signs, zeros, batches, biases, stabilisers; values and ledger."""
    net, _ = captured(name, surrounding)
    x = draw(net, CASES[name], seed, batch, sign)
    with torch.no_grad():
        layer = ref.dense(net.layer, torch.relu(x) if net.behind else x, net.weight.detach())
    for make in RULES.values():
        rule = make(epsilon)
        _, rewritten = assigned(name, surrounding, rule)
        checked(net, layer, rule, x, explain(rewritten, {"x": x}))


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_a_layer(name: str) -> None:
    """The rule stands at the op itself, whichever it is, and no weaker one in its place."""
    for make in RULES.values():
        rule = make(0.0)
        _, rewritten = assigned(name, "alone", rule)
        found = [n.target for n in rewritten.graph.nodes if n.target in ops.RELEVANCE_OPS]
        assert found[-1] is rule.op


@pytest.mark.parametrize("rule_name", RULES)
@pytest.mark.parametrize("name", SCALED)
def test_scaled_products(name: str, rule_name: str) -> None:
    """A weight that is scaled by alpha and a bias by beta are what the op makes of them."""
    rule = RULES[rule_name](0.0)
    for surrounding in ("alone", "between rectifiers"):
        net, rewritten = assigned(name, surrounding, rule)
        x = draw(net, SCALED[name], 1, 2, "mixed")
        with torch.no_grad():
            layer = ref.dense(net.layer, torch.relu(x) if net.behind else x, net.weight.detach())
        checked(net, layer, rule, x, explain(rewritten, {"x": x}))


def test_z_box_at_the_ends_of_its_range() -> None:
    """An input at an end contributes nothing by weights of one sign; rounding is not shared out."""
    rule = ZBox(-1.5, 2.0)
    net, rewritten = assigned("conv2d without bias", "alone", rule)
    draw(net, CASES["conv2d without bias"], 0, 1, "mixed")
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([-1.5, 2.0], dtype=DOUBLE)
    x = ends[torch.randint(0, 2, (8, 2, 3, 3), generator=generator)]
    with torch.no_grad():
        layer = ref.dense(net.layer, x, net.weight.detach())
    checked(net, layer, rule, x, explain(rewritten, {"x": x}))


@pytest.mark.parametrize(
    ("low", "high"),
    [((-1.0, -2.0), (1.0, 3.0)), (-2.0, (1.0, 3.0)), ((-1.0, -2.0), 3), (-2, 3.0)],
)
@pytest.mark.parametrize("name", ["conv1d", "conv2d", "conv3d", "linear of pairs"])
def test_z_box_of_channels(
    name: str, low: float | tuple[float, ...], high: float | tuple[float, ...]
) -> None:
    """Ends for every channel, or one for all of them; zeros that pad the image are no pixels."""
    rule = ZBox(low, high)
    net, rewritten = assigned(name, "alone", rule)
    x = draw(net, ALL[name], 3, 2, "mixed").clamp(-0.9, 0.9)
    with torch.no_grad():
        layer = ref.dense(net.layer, x, net.weight.detach())
    checked(net, layer, rule, x, explain(rewritten, {"x": x}))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 0.3)], ids=str
)
@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("rule_name", RULES)
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv_transpose1d"])
def test_precision(
    name: str, rule_name: str, surrounding: str, dtype: torch.dtype, tolerance: float
) -> None:
    """The same relevance in lower precision, never in another than float32."""
    rule = RULES[rule_name](1e-6)
    net, rewritten = assigned(name, surrounding, rule)
    x = draw(net, CASES[name], 5, 3, "mixed")
    exact = explain(rewritten, {"x": x})
    low = {key: value.to(dtype) for key, value in net.state_dict().items()}
    tape = Tape(rewritten, low)
    with torch.no_grad():
        tape.run(x.to(dtype))
        (seeded,) = rewritten.graph.output_node().args[0]  # type: ignore[misc]
        relevance = tape.reverse({seeded: exact.coefficient.to(dtype)}).relevance["x"]  # type: ignore[dict-item]
    assert relevance.dtype == torch.float32
    scale = float(exact.relevance["x"].abs().max())
    assert_close(
        relevance.double(), exact.relevance["x"], rtol=40 * tolerance, atol=tolerance * scale
    )


MARKED = [name for name in CASES if name not in ("bmm", "baddbmm")]


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("name", MARKED)
def test_signs_change_no_number(name: str, surrounding: str) -> None:
    """What is known of signs saves products; the relevance is the same without it."""
    for rule_name in ("gamma", "z-plus", "alpha2-beta1"):
        rule = RULES[rule_name](1e-6)
        net, marked = assigned(name, surrounding, rule)
        _, unmarked = assigned(name, surrounding, rule, (assign_rules,))
        known = [n.kwargs.get("nonnegative", False) for n in marked.graph.nodes if n.kwargs]
        assert any(known) == net.behind
        assert not any("nonnegative" in n.kwargs for n in unmarked.graph.nodes)
        x = draw(net, CASES[name], 7, 3, "some zero")
        found, expected = explain(marked, {"x": x}), explain(unmarked, {"x": x})
        assert_close(found.relevance["x"], expected.relevance["x"], rtol=1e-12, atol=1e-12)
        assert sum(found.absorbed.values()) == pytest.approx(
            sum(expected.absorbed.values()), rel=1e-11, abs=1e-11
        )


def _mlp(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7, bias=bias),
        nn.ReLU(),
        nn.Linear(7, 6, bias=bias),
        nn.ReLU(),
        nn.Linear(6, 3, bias=bias),
    )


def _convolutional(bias: bool) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=bias),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, stride=2, bias=bias),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 2, padding=1, groups=1, bias=bias),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3, bias=bias),
    )


NETS = {"mlp": (_mlp, (5,)), "convolutional": (_convolutional, (2, 9, 9))}


@functools.cache
def _net(name: str, bias: bool) -> fx.GraphModule:
    """A net's graph, as rules are assigned to it."""
    torch.manual_seed(0)
    make, shape = NETS[name]
    graph_module = capture(
        make(bias).double().eval(), {"input": torch.ones(2, *shape, dtype=DOUBLE)}
    ).graph_module
    run_passes(graph_module, _with(Epsilon()), (*NORMALISE, *RAISE))
    return graph_module


def _read(
    name: str, bias: bool, rule: Rule, passes: tuple[Pass, ...] = ASSIGN
) -> tuple[Tensor, Oracle]:
    """The first logit of each row, and what a net with a rule at every layer reads of it."""
    rewritten = copy_of(_net(name, bias))
    layers = ((Match(role=role), rule) for role in ("convolution", "dense"))
    run_passes(rewritten, PassContext(composite=COMPOSITES["attnlrp"].with_rules(*layers)), passes)
    generator = torch.Generator().manual_seed(1)
    tape = Tape(rewritten)
    with torch.no_grad():
        (logits,) = tape.run(torch.randn(4, *NETS[name][1], generator=generator, dtype=DOUBLE))
        seed = torch.zeros_like(logits)
        seed[:, 0] = 1
        (seeded,) = rewritten.graph.output_node().args[0]  # type: ignore[misc]
        return logits[:, 0], read_tape(tape, {seeded: seed})  # type: ignore[dict-item]


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("rule_name", RULES)
@pytest.mark.parametrize("name", NETS)
def test_law_1_the_ledger_closes(name: str, rule_name: str, epsilon: float) -> None:
    """With biases and a stabiliser; node by node too."""
    target, reading = _read(name, True, RULES[rule_name](epsilon))
    scale = float(target.abs().sum())
    absorbed = sum(float(sums[2]) for sums in reading.sums.values())
    residual = float(target.sum() - reading.relevance["input"].sum()) - absorbed
    assert abs(residual) <= 1e-9 * scale
    keeps = epsilon > 0 or rule_name not in ("flat", "z-box")
    assert not keeps or abs(absorbed) > 1e-4 * scale
    for received, passed, kept in reading.sums.values():
        assert abs(received - passed - kept) <= 1e-9 * scale


CONSERVING = {"gamma": Gamma(0.25), "gamma large": Gamma(50.0), "z-plus": ZPlus(), "flat": Flat()}


@pytest.mark.parametrize("rule_name", CONSERVING)
@pytest.mark.parametrize("name", NETS)
def test_conserves_without_biases(name: str, rule_name: str) -> None:
    """Rectifiers hand on what they get, and nothing else keeps anything: row by row."""
    target, reading = _read(name, False, CONSERVING[rule_name])
    total = reading.relevance["input"].flatten(1).sum(1)
    if (name, rule_name) == ("convolutional", "flat"):  # relevance of an average of zeros
        kept = {node for node, sums in reading.sums.items() if abs(sums[2]) > 1e-12}
        assert kept <= {"avg_pool2d"}
        return
    assert_close(total, target, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rule_name", ["gamma", "gamma large", "z-plus", "alpha2-beta1"])
@pytest.mark.parametrize("name", NETS)
def test_signs_change_no_number_of_a_network(name: str, rule_name: str) -> None:
    for epsilon in (0.0, 1e-6):
        rule = RULES[rule_name](epsilon)
        _, marked = _read(name, True, rule)
        _, unmarked = _read(name, True, rule, (assign_rules,))
        expected = unmarked.relevance["input"]
        scale = float(expected.abs().max())
        assert_close(marked.relevance["input"], expected, rtol=1e-12, atol=1e-12 * scale)
        for node, sums in unmarked.sums.items():
            assert_close(marked.sums[node], sums, rtol=1e-11, atol=1e-11 * scale)


def test_z_box_of_other_channels() -> None:
    """Ends for three channels at a layer behind a flatten: an error that says so."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    composite = COMPOSITES["attnlrp"].with_rules((Match(role="first"), ZBox((0, 0, 0), (1, 1, 1))))
    with pytest.raises(RuleError, match="ends for 3 channels, a layer reads") as raised:
        attnlrp_fx.compile(model, torch.rand(2, 3, 2, 2), composite=composite, backend="eager")
    assert "one number for all" in str(raised.value)
