"""The coefficients of recurrences are found, in loops and in parallel forms, and no other factor.

Each recurrence takes its parameters, the value (batch, steps, WIDTH), and `hold`, which stands
around the coefficients: nothing in the model, a detach in the reference (MambaLRP, Rezaei Jafari et
al. 2024; signal-takes-all, Arras et al. 2019). With every other rule set to the gradient, relevance
must be the reference's Gradient×Input.
"""

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, prepared, run, text
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Constant, Explained, Logit, Match
from attnlrp_fx.passes import PassContext, raise_scans, run_passes

BATCH, STEPS, WIDTH, STATE = 2, 5, 6, 4
HELD = COMPOSITES["gradient"].with_rules((Match(kind="coefficient"), Constant()))


def selective_scan(m, x, hold):
    """Mamba: Δ, B and C computed from x; the state has a dimension more than x."""
    x = F.silu(x)
    delta = F.softplus(x @ m.delta + m.bias)
    b, c = x @ m.b, x @ m.c
    decay = torch.exp(-torch.exp(m.a) * delta[..., None])
    entering = hold(delta[..., None] * b[:, :, None]) * x[..., None]
    state = torch.zeros(x.shape[0], WIDTH, STATE, dtype=x.dtype)
    out = []
    for t in range(STEPS):
        state = hold(decay[:, t]) * state + entering[:, t]
        out.append((state @ hold(c[:, t, :, None]))[..., 0])
    return torch.stack(out, 1) + m.skip * x


def state_space_duality(m, x, hold):
    """Mamba2: the same without a loop, as a matrix of decays between all pairs of steps."""
    b, c, x = F.silu(x @ m.b), F.silu(x @ m.c), F.silu(x)
    delta = F.softplus((x @ m.delta)[..., :1] + m.bias[:1])
    total = torch.cumsum(-delta[..., 0], 1)
    pairs = total[:, :, None] - total[:, None]
    causal = torch.ones(STEPS, STEPS, dtype=torch.bool).tril()
    decay = torch.exp(pairs.masked_fill(~causal, -torch.inf))
    mixing = torch.einsum("btn,bsn->bts", c, b) * decay
    return torch.einsum("bts,bsd->btd", hold(mixing), x * hold(delta))


def lstm(m, x, hold):
    hidden = cell = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
    out = []
    for t in range(STEPS):
        gates = x[:, t] @ m.enter_gates + hidden @ m.carry_gates
        enter, forget, value, leave = gates.chunk(4, -1)
        cell = hold(torch.sigmoid(forget)) * cell + hold(torch.sigmoid(enter)) * torch.tanh(value)
        hidden = hold(torch.sigmoid(leave)) * torch.tanh(cell)
        out.append(hidden)
    return torch.stack(out, 1)


def gru(m, x, hold):
    """The old state and the new one share out one gate."""
    hidden = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
    out = []
    for t in range(STEPS):
        entering, carried = x[:, t] @ m.enter_gates, hidden @ m.carry_gates
        reset = torch.sigmoid(entering[:, :WIDTH] + carried[:, :WIDTH])
        gate = torch.sigmoid((entering + carried)[:, WIDTH : 2 * WIDTH])
        new = torch.tanh(
            entering[:, 2 * WIDTH : 3 * WIDTH] + hold(reset) * carried[:, 2 * WIDTH : 3 * WIDTH]
        )
        hidden = hold(1 - gate) * new + hold(gate) * hidden
        out.append(hidden)
    return torch.stack(out, 1)


def real_gated_recurrence(m, x, hold):
    """RecurrentGemma: the decay is a gate's power, and what enters is scaled by √(1 − decay²)."""
    log_decay = -8.0 * torch.sigmoid(x @ m.delta) * F.softplus(m.bias)
    entering = x * hold(torch.sigmoid(x @ m.enter))
    entering = entering * hold(torch.sqrt(1 - torch.exp(2 * log_decay)))
    state = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
    out = []
    for t in range(STEPS):
        state = hold(torch.exp(log_decay)[:, t]) * state + entering[:, t]
        out.append(state)
    return torch.stack(out, 1)


def weighted_average(m, x, hold):
    """RWKV: a running average of values, each weighed by the exponential of its key."""
    keys, values = x @ m.delta, x @ m.enter
    above = below = torch.zeros(x.shape[0], WIDTH, dtype=x.dtype)
    out = []
    for t in range(STEPS):
        bonus, weight = torch.exp(keys[:, t] + m.bias), torch.exp(keys[:, t])
        out.append((above + hold(bonus) * values[:, t]) / hold(below + bonus))
        above = torch.exp(-torch.exp(m.skip)) * above + hold(weight) * values[:, t]
        below = torch.exp(-torch.exp(m.skip)) * below + weight
    return torch.stack(out, 1) * hold(torch.sigmoid(x @ m.leave))


def gated_delta_rule(m, x, hold):
    """Qwen3-Next: the state is a matrix from keys to values; what it predicts is taken off."""
    queries, keys, values = x @ m.b, x @ m.c, x @ m.enter
    decay, share = torch.exp(-F.softplus(x @ m.bias)), torch.sigmoid(x @ m.skip)
    state = torch.zeros(x.shape[0], STATE, WIDTH, dtype=x.dtype)
    out = []
    for t in range(STEPS):
        state = hold(decay[:, t, None, None]) * state
        known = (state * (hold(keys[:, t, :, None]) if t else keys[:, t, :, None])).sum(1)
        delta = (values[:, t] - known) * hold(share[:, t, None])
        state = state + keys[:, t, :, None] * delta[:, None]
        out.append((state * hold(queries[:, t, :, None])).sum(1))
    return torch.stack(out, 1)


SCANS = [
    selective_scan,
    state_space_duality,
    lstm,
    gru,
    real_gated_recurrence,
    weighted_average,
]


def nothing(value: Tensor) -> Tensor:
    return value


def model_of(scan) -> Written:
    """A linear map, a recurrence, and three logits at the last step."""
    torch.manual_seed(0)
    shapes = {
        **dict.fromkeys(("before", "delta", "enter", "leave"), (WIDTH, WIDTH)),
        **dict.fromkeys(("b", "c"), (WIDTH, STATE)),
        **dict.fromkeys(("enter_gates", "carry_gates"), (WIDTH, 4 * WIDTH)),
        **dict.fromkeys(("bias", "skip"), (WIDTH,)),
        "a": (WIDTH, STATE),
        "after": (WIDTH, 3),
    }
    drawn = {name: torch.randn(shape).double() / 2 for name, shape in shapes.items()}

    def forward(m, x):
        return scan(m, x @ m.before, nothing)[:, -1] @ m.after

    return Written(forward, **drawn).eval()


def example(batch: int = BATCH) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, STEPS, WIDTH, dtype=torch.float64)}


def held_relevance(model, scan, x: Tensor) -> Tensor:
    """x times the gradient of the second logit, the coefficients detached."""
    x = x.clone().requires_grad_()
    logits = scan(model, x @ model.before, Tensor.detach)[:, -1] @ model.after
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    return (x * gradient).detach()


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: scan.__name__)
def test_relevance_is_that_of_constant_coefficients(scan):
    model = model_of(scan)
    explainer = attnlrp_fx.compile(
        model, example(), backend="eager", target=Logit(1), composite=HELD
    )
    given = example(batch=3)
    found = explainer(**given).relevance["x"]
    expected = held_relevance(model, scan, given["x"])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    plain = held_relevance(model, lambda m, x, hold: scan(m, x, nothing), given["x"])
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize("scan", [*SCANS, gated_delta_rule], ids=lambda scan: scan.__name__)
def test_marking_changes_nothing_that_is_computed(scan):
    graph, given = prepared(model_of(scan), example()), example()
    was = run(graph, given)
    (result,) = run_passes(graph, PassContext(), (raise_scans,))
    assert result.changes > 0
    torch.testing.assert_close(run(graph, given), was, rtol=0, atol=0)


@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU], ids=lambda module: module.__name__)
def test_recurrent_modules_of_torch(module):
    """PyTorch's own, whose gates cannot be detached from outside, against the same written out."""
    torch.manual_seed(0)
    network = module(WIDTH, WIDTH, batch_first=True, bias=False).double().eval()
    written = model_of(lstm)
    order = range(4) if module is nn.LSTM else range(3)
    rows = [slice(i * WIDTH, (i + 1) * WIDTH) for i in order]
    with torch.no_grad():
        written.before.copy_(torch.eye(WIDTH))
        for ours, theirs in (("enter_gates", "weight_ih_l0"), ("carry_gates", "weight_hh_l0")):
            for row in rows:
                getattr(written, ours)[:, row].copy_(getattr(network, theirs)[row].T)
    scan = lstm if module is nn.LSTM else gru

    def logits(m, x):
        return m.network(x)[0][:, -1] @ m.after

    model = Written(logits, after=written.after)
    model.network = network
    given = example()
    explainer = attnlrp_fx.compile(
        model.eval(), given, backend="eager", target=Logit(1), composite=HELD
    )
    expected = held_relevance(written, scan, given["x"])
    torch.testing.assert_close(explainer(**given).relevance["x"], expected, rtol=1e-10, atol=1e-12)


def leaky(m, x, hold):
    """A gate that is ½ whatever x is: of the first step, 2⁻⁴ is left after four more."""
    gate = torch.sigmoid(0 * x)
    state = gate[:, 0] * torch.zeros_like(x[:, 0]) + x[:, 0]
    for t in range(1, STEPS):
        state = gate[:, t] * state + x[:, t]
    return state[:, None]


def test_the_first_step_is_not_halved_away():
    """By the uniform rule, which is an option, each step would halve what was carried once more."""
    model, given = model_of(leaky), example()
    uniform = COMPOSITES["attnlrp"].with_rules((Match(kind="coefficient"), Explained()))
    held, halved = (
        attnlrp_fx.compile(model, given, backend="eager", composite=c, target=Logit(1), audit=True)
        for c in (COMPOSITES["attnlrp"], uniform)
    )
    explanation, other = held(**given), halved(**given)
    assert abs(explanation.ledger.residual) < 1e-12
    assert abs(other.ledger.residual) < 1e-12
    share = 0.5 ** (STEPS - 1)
    first = (given["x"][:, 0] @ model.before) @ model.after[:, 1]
    found, less = (e.relevance["x"][:, 0].sum(-1) for e in (explanation, other))
    torch.testing.assert_close(found, share * first, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(less, share * share * first, rtol=1e-12, atol=1e-12)


def test_gates_without_a_recurrence_are_left_alone():
    """GLU, SwiGLU, squeeze-and-excite and a gated sum: products with gates, but nothing carried."""

    def gated(m, x, hold):
        y = torch.sigmoid(x @ m.delta) * (x @ m.enter) + x
        y = F.silu(y @ m.delta) * (y @ m.leave)
        return y * torch.sigmoid(y.mean(1, keepdim=True) @ m.enter)

    graph = prepared(model_of(gated), example())
    was = text(graph)
    (result,) = run_passes(graph, PassContext(), (raise_scans,))
    assert result.changes == 0
    assert text(graph) == was


def test_attention_is_no_scan():
    """Softmax weights are positive, and added up; nor is linear attention without decays."""

    def attend(m, x, hold):
        weights = ((x @ m.b) @ (x @ m.c).transpose(1, 2)).softmax(-1)
        y = weights @ (x @ m.enter) + x
        return torch.einsum("btn,bsn,bsd->btd", y @ m.b, y @ m.c, y)

    graph = prepared(model_of(attend), example())
    (result,) = run_passes(graph, PassContext(), (raise_scans,))
    assert result.changes == 0


def golden(m, x, hold):
    """Two steps of the shortest recurrence."""
    gate = torch.sigmoid(x @ m.delta)
    first = gate[:, 0] * x[:, 0] + x[:, 1]
    second = gate[:, 1] * first + x[:, 2]
    return torch.stack([first, second], 1)


def test_golden():
    graph = prepared(model_of(golden), example())
    run_passes(graph, PassContext(), (raise_scans,))
    assert [line for line in text(graph).splitlines() if "coefficient" in line] == [
        "coefficient = ops.coefficient(select)",
        "mul = aten.mul(coefficient, select_1)",
        "coefficient_1 = ops.coefficient(select_3)",
        "mul_1 = aten.mul(coefficient_1, add)",
    ]
