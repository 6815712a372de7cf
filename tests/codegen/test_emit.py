"""The traced program: plain ATen, under the model's names, its sizes read off the inputs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, RuleError
from attnlrp_fx.codegen import emit as codegen


class Gated(nn.Module):
    """A norm, a gate and a projection, so that every kind of saved value occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.gate = nn.Linear(4, 6)
        self.up = nn.Linear(4, 6, bias=False)
        self.down = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.down(nn.functional.silu(self.gate(y)) * self.up(y)).mean(1)


@pytest.fixture(scope="module")
def explainer() -> ExplainableGraphModule:
    torch.manual_seed(0)
    return attnlrp_fx.compile(Gated().eval(), torch.randn(2, 5, 4), backend="eager")


def targets(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def test_program_is_plain_aten(explainer: ExplainableGraphModule) -> None:
    ops = targets(explainer.program)
    assert not [op for op in ops if "detach" in op or "autograd" in op or "_make_dual" in op]
    assert all(op.startswith(("aten.", "<built-in function")) for op in ops)


def test_parameters_are_inputs_under_the_models_names(explainer: ExplainableGraphModule) -> None:
    names = [n.meta["name"] for n in explainer.program.graph.find_nodes(op="placeholder")]
    assert names == [*dict.fromkeys(names)]
    assert {"norm.weight", "gate.weight", "gate.bias", "up.weight", "x", "seed:0"} <= set(names)
    assert not explainer.program.graph.find_nodes(op="get_attr")


def test_nodes_say_where_they_come_from(explainer: ExplainableGraphModule) -> None:
    rewritten = {node.name for node in explainer.rewritten.graph.nodes}
    said = [n.meta["custom"] for n in explainer.program.graph.nodes if "custom" in n.meta]
    assert {entry["phase"] for entry in said} == {"forward", "relevance"}
    assert {entry["from"] for entry in said} <= rewritten


def test_sizes_are_read_off_the_inputs(explainer: ExplainableGraphModule) -> None:
    inputs = set(explainer.program.graph.find_nodes(op="placeholder"))
    reads = explainer.program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.sym_size.int
    )
    assert reads
    assert all(node.args[0] in inputs for node in reads)
    sizes = [str(node.meta["val"]) for node in reads]
    assert len(sizes) == len(set(sizes))


def test_program_exports_and_runs_again(explainer: ExplainableGraphModule) -> None:
    x, seed = torch.randn(2, 5, 4), torch.zeros(2, 3)
    seed[:, 1] = 1
    parameters = dict(explainer.model.named_parameters())
    values: dict[str, Any] = {**parameters, "x": x, "seed:0": seed}
    placeholders = explainer.program.graph.find_nodes(op="placeholder")
    arguments = tuple(values[node.meta["name"]] for node in placeholders)
    exported = torch.export.export(explainer.program, arguments, strict=False)
    output, relevance = exported.module(check_guards=False)(*arguments)
    explanation = explainer(x, target=1)
    torch.testing.assert_close(output, explanation.outputs, rtol=0, atol=0)
    torch.testing.assert_close(relevance, explanation.relevance["x"], rtol=0, atol=0)


def test_in_place_ops_on_temporaries_become_functional() -> None:
    """The derivative of maximum fills its own temporary in place."""

    def program(x: Tensor) -> Tensor:
        y = x * 2
        y.masked_fill_(x > 0, 1.0)
        y.add_(x)
        return y + 1

    traced = make_fx(program)(torch.randn(3))
    assert any(op.endswith("_.Scalar") or "add_." in op for op in targets(traced))
    codegen._functionalise(traced.graph)
    traced.recompile()
    codegen._check_pure(traced)
    x = torch.randn(3)
    torch.testing.assert_close(traced(x), program(x), rtol=0, atol=0)


def test_writing_into_a_slice_of_a_temporary_becomes_a_scatter() -> None:
    """The derivative of a real Fourier transform pads what it gets with zeros, in place."""

    def program(x: Tensor) -> Tensor:
        base = x.new_zeros(2, 6)
        base[:, 1:4].copy_(x)
        return base + 1

    traced = make_fx(program)(torch.randn(2, 3))
    codegen._functionalise(traced.graph)
    traced.recompile()
    codegen._check_pure(traced)
    x = torch.randn(2, 3)
    torch.testing.assert_close(traced(x), program(x), rtol=0, atol=0)


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [lambda x: x.cumprod(1), lambda x: torch.fft.rfft(x).abs()],
    ids=["cumprod", "rfft"],
)
def test_derivatives_that_fill_temporaries(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, dtype=torch.float64)
    explainer = attnlrp_fx.compile(
        Function(function).eval(), x, backend="eager", composite="gradient", target=1
    )
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(explainer(x).relevance["x"], x * gradient)


class Branching(nn.Module):
    """What carries no relevance depends on the values of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        scale = torch.cond(
            lengths.sum() > 6, lambda n: n.float() * 2, lambda n: n.float() + 1, (lengths,)
        )
        return self.layer(x) * scale[:, None]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_branches_that_carry_no_relevance(backend: str) -> None:
    torch.manual_seed(0)
    model, x, lengths = Branching().eval(), torch.randn(3, 4), torch.tensor([1, 2, 3])
    explainer = attnlrp_fx.compile(model, (x, lengths), backend=backend, target=1)
    for given in (lengths, lengths + 1):
        scale = given.float() * 2 if given.sum() > 6 else given.float() + 1
        expected = x * model.layer.weight[1] * scale[:, None]
        torch.testing.assert_close(explainer(x, given).relevance["x"], expected)


@torch.library.custom_op("attnlrp_fx_tests::undifferentiable", mutates_args=())
def undifferentiable(x: Tensor) -> Tensor:
    return x.sin()


@undifferentiable.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_what_cannot_be_traced_says_where() -> None:
    """Here an op of another library without a derivative."""
    model = Function(lambda x: undifferentiable(x) * 2).eval()
    with pytest.raises(RuleError, match="could not be traced") as caught:
        attnlrp_fx.compile(model, torch.randn(2, 3), backend="eager", fallback="gradient")
    assert "undifferentiable" in caught.value.where
    assert "test_emit.py" in caught.value.where
    assert "RuntimeError: " in caught.value.why
    assert "\n" not in caught.value.why
    assert caught.value.remedy


def test_writing_into_a_view_is_refused() -> None:
    """What was written would be lost: the base does not change in a functional program."""

    def program(x: Tensor) -> Tensor:
        base = torch.zeros(6)
        base.as_strided((3,), (2,)).copy_(x)
        return base

    traced = make_fx(program)(torch.randn(3))
    codegen._functionalise(traced.graph)
    with pytest.raises(RuleError, match="in place"):
        codegen._check_pure(traced)


def test_views_do_not_mind_strides() -> None:
    """A pad's derivative has the strides of what it cuts, unlike its fake: no view may mind."""

    class Blocks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            heads = x.reshape(x.shape[0], x.shape[1], 2, 3)
            padded = nn.functional.pad(heads, (0, 0, 0, 0, 0, -x.shape[1] % 4))
            return padded.transpose(1, 2).softmax(-1).reshape(x.shape[0], 2, -1).sum(-1)

    x = torch.randn(2, 7, 6).double()
    explainer = attnlrp_fx.compile(Blocks().eval(), x, backend="eager")
    assert explainer(x).relevance["x"].shape == x.shape
