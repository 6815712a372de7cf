"""Functional graphs: decomposed only where needed, equal to the model always."""

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

import attnlrp_fx
from attnlrp_fx.capture.functionalise import functional, inline_regions, needs_decomposition


class NoGradRegion(nn.Module):
    """Positions computed without gradients, as rotary embeddings are."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            angle = torch.arange(x.shape[-1]).to(x.dtype)
            cosine, sine = angle.cos(), angle.sin()
        return x * cosine + x.roll(1, -1) * sine


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y[:, 0] = 1.0
        return y.add_(x)


class UnknownOp(nn.Module):
    """An op that the table does not have, made of ops that it has."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.glu(x)


class OnlyConstants(nn.Module):
    """An op outside the table on integers, which relevance never meets."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.bincount(torch.arange(3), minlength=4).to(x.dtype)


@pytest.mark.parametrize(
    ("model", "decomposed"),
    [(NoGradRegion(), False), (InPlace(), True), (UnknownOp(), True), (OnlyConstants(), False)],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_functional(model: nn.Module, decomposed: bool) -> None:
    x = torch.randn(3, 4)
    exported = export(model, (x,), strict=False)
    before = exported.module(check_guards=False)
    assert isinstance(before, torch.fx.GraphModule)
    inline_regions(before)
    assert needs_decomposition(before) == decomposed
    after = functional(exported)
    assert not needs_decomposition(after)
    torch.testing.assert_close(after(x), model(x), rtol=0, atol=0)


class Counts(nn.Module):
    """Counts integers wherever that works, as transformers does for experts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        chosen = y.argmax(-1)
        counted = chosen.float() if x.device.type == "cpu" else chosen.int()
        return y * torch.histc(counted, bins=4, min=0, max=3)


class Positions(nn.Module):
    """Places between -1 and 1, next to an op that must be decomposed."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.glu(x) + torch.linspace(-1, 1, 7, dtype=torch.float32)


def test_constants_are_made_by_the_models_own_kernels() -> None:
    """Decomposed, a linspace is rounded otherwise."""
    x = torch.randn(2, 14, dtype=torch.float64)
    exported = export(Positions(), (x,))
    assert needs_decomposition(exported.module(check_guards=False))
    torch.testing.assert_close(functional(exported)(x), Positions()(x), rtol=0, atol=0)


def test_counts_of_integers_run_on_the_cpu() -> None:
    """Compiled on a device that counts integers, given its values on the CPU, which does not."""
    x, expected = torch.randn(7, 4), Counts().eval()
    model = Counts().to("meta").eval()
    explainer = attnlrp_fx.compile(model, torch.ones(2, 4, device="meta"), backend="eager")
    (counts,) = explainer.captured.graph.find_nodes(
        op="call_function", target=torch.ops.aten.histc.default
    )
    assert counts.meta["val"].dtype == torch.float32
    assert [user.meta["val"].dtype for user in counts.users] == [torch.int32]
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    torch.testing.assert_close(explainer(x).outputs, expected(x))


class Frozen(nn.Module):
    """A part of the model's own without gradients, and then one with them."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            frozen = x * x
        y = frozen * x.sin()
        if self.in_place:
            y[:, 0] = 1.0
        return y


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_what_leaves_a_no_grad_region_is_a_constant(in_place: bool, grad: bool) -> None:
    model, x = Frozen(in_place), torch.randn(3, 4).double()
    with torch.set_grad_enabled(grad):
        explainer = attnlrp_fx.compile(model.eval(), x, composite="gradient", backend="eager")
        found = explainer(x, target=1).relevance["x"]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(found, x * gradient, rtol=1e-12, atol=0)


class CastInRegion(nn.Module):
    """A value is cast to its own dtype without gradients, and used with them afterwards."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        with torch.no_grad():
            cast = y.to(torch.float64)
            scale = cast.square().sum(-1, keepdim=True)
        return cast * y * scale


def test_a_cast_that_returns_its_input_is_no_constant() -> None:
    model, x = CastInRegion().eval(), torch.randn(3, 4).double()
    explainer = attnlrp_fx.compile(model, x, composite="gradient", backend="eager")
    found = explainer(x, target=1).relevance["x"]
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(found, x * gradient, rtol=1e-12, atol=0)


def test_constants_of_a_no_grad_region_need_no_detach() -> None:
    graph_module = functional(export(NoGradRegion(), (torch.randn(3, 4),), strict=False))
    assert not [node for node in graph_module.graph.nodes if "detach" in str(node.target)]


def test_regions_leave_nothing_behind() -> None:
    graph_module = export(NoGradRegion(), (torch.randn(3, 4),), strict=False).module()
    assert isinstance(graph_module, torch.fx.GraphModule)
    inline_regions(graph_module)
    targets = [str(node.target) for node in graph_module.graph.nodes]
    assert not [target for target in targets if "set_grad" in target or "submod" in target]


class Buffered(nn.Module):
    """Writes halves into memory that it never fills."""

    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x)
        y[:, :2] = x[:, :2] * 2
        y[:, 2:] = x[:, 2:] * 3
        return y.sum(1)


@pytest.mark.parametrize(
    "make",
    [torch.empty_like, lambda x: x.new_empty(x.shape), lambda x: torch.empty(x.shape)],
    ids=["empty_like", "new_empty", "empty"],
)
def test_memory_begins_as_zeros(make) -> None:
    """What lay there before reaches no ledger, NaN least of all."""
    x = torch.randn(3, 5)
    explainer = attnlrp_fx.compile(
        Buffered(make).eval(), x, target=lambda y: y, audit=True, backend="eager"
    )
    assert not any("empty" in str(node.target) for node in explainer.rewritten.graph.nodes)
    explanation = explainer(x)
    scale = torch.tensor([2.0, 2, 3, 3, 3])
    torch.testing.assert_close(explanation.relevance["x"], x * scale)
    assert abs(explanation.ledger.residual) < 1e-5


def test_views_do_not_mind_strides() -> None:
    """What a view refuses: an input that is transposed, as another kernel's output may be."""

    class Views(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 12)

    exported = export(Views(), (torch.randn(4, 6),), strict=False)
    x = torch.randn(6, 4).t()
    with pytest.raises(RuntimeError, match="view size"):
        exported.module(check_guards=False)(x)
    torch.testing.assert_close(functional(exported)(x), x.reshape(2, 12), rtol=0, atol=0)


def test_parameters_are_the_models_own() -> None:
    model = nn.Linear(3, 2)
    graph_module = functional(export(model, (torch.ones(4, 3),), strict=False))
    assert dict(graph_module.named_parameters())["weight"] is model.weight
