"""The weights of chosen experts are found for routers of every make, and no other factor."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import Written, prepared, run, text
from torch import Tensor

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Constant, Logit, Match, ops
from attnlrp_fx.passes import PassContext, raise_routing, run_passes

BATCH, WIDTH, EXPERTS, CHOSEN = 5, 6, 4, 2
HELD = COMPOSITES["gradient"].with_rules((Match(kind="routing"), Constant()))

# Each takes its parameters, the value, and `hold`, which stands around the routing weights: nothing
# in the model, a detach in the reference. All mix the same experts.


def experts(m, x) -> Tensor:
    """What every expert says: (batch, experts, width)."""
    return torch.tanh(torch.einsum("bi,eij->bej", x, m.experts))


def of_chosen(y, chosen) -> Tensor:
    return y.gather(1, chosen[..., None].expand(-1, -1, WIDTH))


def softmax_renormalised(m, x, hold):
    """Mixtral, OLMoE, Qwen-MoE."""
    weights, chosen = torch.topk((x @ m.router).softmax(-1), CHOSEN, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return (hold(weights[..., None]) * of_chosen(experts(m, x), chosen)).sum(1)


def softmax_of_chosen(m, x, hold):
    """gpt-oss, Granite-MoE."""
    logits, chosen = torch.topk(x @ m.router + m.bias, CHOSEN, dim=-1)
    return (hold(logits.softmax(-1)[..., None]) * of_chosen(experts(m, x), chosen)).sum(1)


def sigmoid_with_bias(m, x, hold):
    """DeepSeek-V3: a bias takes part in the choice, not in the weights."""
    scores = torch.sigmoid(x @ m.router)
    chosen = torch.topk(scores + m.bias, CHOSEN, dim=-1).indices
    weights = scores.gather(1, chosen)
    weights = 2.5 * weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (hold(weights[..., None]) * of_chosen(experts(m, x), chosen)).sum(1)


def single_expert(m, x, hold):
    """Switch: the highest probability times its expert."""
    weight, chosen = (x @ m.router).softmax(-1).max(-1, keepdim=True)
    return (hold(weight[..., None]) * of_chosen(experts(m, x), chosen)).sum(1)


def scattered(m, x, hold):
    """Llama 4: what was not chosen weighs nothing."""
    top, chosen = torch.topk(x @ m.router, CHOSEN, dim=-1)
    weights = torch.sigmoid(torch.full_like(x @ m.router, -torch.inf).scatter(1, chosen, top))
    return (hold(weights[..., None]) * experts(m, x)).sum(1)


def sorted_by_expert(m, x, hold):
    """Grouped products: weights and values in the order of their experts."""
    weights, chosen = torch.topk((x @ m.router).softmax(-1), CHOSEN, dim=-1)
    order = chosen.reshape(-1).sort().indices
    y = of_chosen(experts(m, x), chosen).reshape(-1, WIDTH)[order]
    y = (y * hold(weights.reshape(-1)[order][:, None]))[order.argsort()]
    return y.reshape(-1, CHOSEN, WIDTH).sum(1)


ROUTERS = [
    softmax_renormalised,
    softmax_of_chosen,
    sigmoid_with_bias,
    single_expert,
    scattered,
    sorted_by_expert,
]


def nothing(value: Tensor) -> Tensor:
    return value


def model_of(router) -> Written:
    """Experts, their router, a shared expert, and three logits."""
    torch.manual_seed(0)
    shapes = {
        "router": (WIDTH, EXPERTS),
        "bias": (EXPERTS,),
        "experts": (EXPERTS, WIDTH, WIDTH),
        "shared": (WIDTH, WIDTH),
        "after": (WIDTH, 3),
    }
    drawn = {name: torch.randn(shape).double() for name, shape in shapes.items()}

    def forward(m, x):
        return (router(m, x, nothing) + F.silu(x @ m.shared)) @ m.after

    return Written(forward, **drawn).eval()


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(BATCH, WIDTH, dtype=torch.float64)}


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_relevance_is_that_of_constant_routing(router):
    model, given = model_of(router), example()
    explainer = attnlrp_fx.compile(model, given, backend="eager", target=Logit(1), composite=HELD)
    (result,) = (r for r in explainer.report().passes if r.name == "raise_routing")
    assert result.changes == 1
    x = given["x"].clone().requires_grad_()
    logits = (router(model, x, Tensor.detach) + F.silu(x @ model.shared)) @ model.after
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    found = explainer(**given).relevance["x"]
    torch.testing.assert_close(found, (x * gradient).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_marking_changes_nothing_that_is_computed(router):
    graph, given = prepared(model_of(router), example()), example()
    was = run(graph, given)
    run_passes(graph, PassContext(), (raise_routing,))
    torch.testing.assert_close(run(graph, given), was, rtol=0, atol=0)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.__name__)
def test_half_of_an_expert_goes_to_its_router_unless_it_is_held(router):
    """AttnLRP explains the choice, CP-LRP and the option do not; the ledger closes either way."""
    model, given = model_of(router), example()
    held = COMPOSITES["attnlrp"].with_rules((Match(kind="routing"), Constant()))
    for composite, constants in ((COMPOSITES["attnlrp"], 0), (held, 1), (COMPOSITES["cp-lrp"], 1)):
        explainer = attnlrp_fx.compile(
            model, given, backend="eager", composite=composite, target=Logit(1), audit=True
        )
        explanation = explainer(**given)
        assert abs(explanation.ledger.residual) < 1e-12
        marked = explainer.rewritten.graph.find_nodes(op="call_function", target=ops.routing)
        assert len(marked) == constants


def test_other_products_are_left_alone():
    """Attention, a softmax less its maximum with a sink, gates: nothing chose an expert."""

    def forward(m, x):
        scores = torch.cat([x @ m.router, m.bias.expand(len(x), -1)], -1)
        weights = (scores - scores.max(-1, keepdim=True).values).softmax(-1)[:, :EXPERTS]
        y = torch.einsum("be,bej->bj", weights, experts(m, x))
        return y * torch.sigmoid(x) @ m.after

    graph = prepared(Written(forward, **dict(model_of(scattered).named_parameters())), example())
    was = text(graph)
    (result,) = run_passes(graph, PassContext(), (raise_routing,))
    assert result.changes == 0
    assert text(graph) == was


def test_golden():
    graph = prepared(model_of(softmax_of_chosen), example())
    run_passes(graph, PassContext(), (raise_routing,))
    assert [line for line in text(graph).splitlines() if "routing" in line] == [
        "routing = ops.routing(unsqueeze)",
        "mul = aten.mul(routing, gather)",
    ]
