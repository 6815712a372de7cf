"""Values made of parameters alone, kept from call to call: exact, and fresh when they must be."""

import pytest
import torch
from torch import nn

import attnlrp_fx
from attnlrp_fx import InputError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).eval()


X = torch.linspace(-1, 1, 2 * 2 * 6 * 6).reshape(2, 2, 6, 6)


def compiled(model: nn.Module, weights: str):
    return attnlrp_fx.compile(
        model, X, composite="attnlrp-vision", backend="eager", derived_weights=weights
    )


def relevance(explainer) -> torch.Tensor:
    return explainer(X, target=1).relevance["input"]


def test_kept_equals_recomputed():
    model = network()
    assert torch.equal(relevance(compiled(model, "keep")), relevance(compiled(model, "recompute")))


def test_nothing_of_the_weights_is_left_in_the_program():
    """Both sides read |W| and the merged weight; neither computes them."""
    explainer = compiled(network(), "keep")
    compilation = explainer._running.programs.example(
        explainer._running.default_seeds(), torch.device("cpu")
    )
    (program,) = compilation.schedule.programs
    assert program.derived is not None
    for side in (program.forward, program.relevance):
        names = {n.meta["name"] for n in side.graph.find_nodes(op="placeholder")}
        constant = {n for n in side.graph.nodes if n.op == "placeholder"}
        constant -= {n for n in constant if not _is_constant(n)}
        assert any(name.startswith("derived:") for name in names)
        for node in side.graph.nodes:
            inputs = node.all_input_nodes
            if node.op == "call_function" and inputs and all(leaf in constant for leaf in inputs):
                assert node.target.overloadpacket.__name__ in ("reshape", "t", "view")
                constant.add(node)


def _is_constant(node: torch.fx.Node) -> bool:
    name = node.meta["name"]
    return name.startswith("derived:") or name[0].isdigit()


@pytest.mark.parametrize("change", ["in place", "optimiser", "state dict", "another parameter"])
def test_a_change_shows_at_once(change):
    model = network()
    kept = compiled(model, "keep")
    before = relevance(kept)
    if change == "in place":
        with torch.no_grad():
            model[1].weight.mul_(torch.tensor([1.0, 2.0, 3.0, -1.0]))
    elif change == "optimiser":
        model(X).sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    elif change == "state dict":
        model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})
    else:
        model[4].weight = nn.Parameter(torch.randn(5, 64))
    after = relevance(kept)
    assert not torch.allclose(before, after)
    assert torch.equal(after, relevance(compiled(model, "recompute")))


def test_refresh():
    """What PyTorch does not count is not seen until asked for; what it does not keep is."""
    model = network()
    kept, recomputed = compiled(model, "keep"), compiled(model, "recompute")
    relevance(kept)
    model[4].weight.data.mul_(-2)
    assert not torch.allclose(relevance(kept), relevance(recomputed))
    kept.refresh()
    assert torch.equal(relevance(kept), relevance(recomputed))


def test_inference_tensors_have_no_versions():
    """PyTorch counts no changes of them: what is made of them is made anew each time."""
    model = network()
    kept = compiled(model, "keep")
    with torch.inference_mode():
        model[4].weight = nn.Parameter(torch.randn(5, 64))
        before = relevance(kept)
        model[4].weight.mul_(torch.linspace(-1, 1, 64))
        assert not torch.allclose(relevance(kept), before)


def test_the_memory_is_stated():
    model = network()
    kept, recomputed = compiled(model, "keep"), compiled(model, "recompute")
    (compilation,) = kept.report().compilations
    assert "MiB of values made of parameters alone" in str(kept.report())
    assert "MiB of values made of parameters alone" not in str(recomputed.report())
    assert kept.cost(X).derived == compilation.derived_bytes
    least = 4 * (model[0].weight.numel() + model[4].weight.numel())
    assert least < compilation.derived_bytes < 4 * least
    assert recomputed.cost(X).derived == 0
    assert kept.cost(X).flops == recomputed.cost(X).flops


def test_no_derived_weights():
    """The default composite makes nothing of weights alone."""
    linear = nn.Linear(3, 2).eval()
    x = torch.rand(2, 3)
    explainer = attnlrp_fx.compile(linear, x, backend="eager", derived_weights="keep")
    assert explainer.report().compilations[0].derived_bytes == 0
    assert torch.equal(explainer(x).relevance["input"], explainer(x).relevance["input"])


def test_errors():
    with pytest.raises(InputError, match="derived_weights is 'cache'"):
        compiled(network(), "cache")
