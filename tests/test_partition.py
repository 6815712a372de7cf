"""What crosses the cut between the forward and the relevance side."""

import pytest
import torch
from torch import Tensor, fx, nn

import attnlrp_fx
from attnlrp_fx.codegen import Program


class Block(nn.Module):
    """x → W₂(σ-gated W₁x): needs W₁x on both sides, its activation is cheap to make again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.gelu(self.first(x)))


def program(backend: object) -> Program:
    explainer = attnlrp_fx.compile(Block().eval(), torch.randn(5, 8), backend=backend)  # type: ignore[arg-type]
    (compiled,) = explainer._programs.values()
    (found,) = compiled.schedule.programs
    return found


def unchanged(graph_module: fx.GraphModule, inputs: object) -> object:
    """A backend that is not "eager": the program may compute cheap values again."""
    return graph_module.forward


def saved(program: Program) -> list[str]:
    placeholders = program.relevance.graph.find_nodes(op="placeholder")
    return [n.meta["name"] for n in placeholders if n.meta["name"].startswith("saved:")]


def ops(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("backend", ["eager", unchanged], ids=["eager", "recompute"])
def test_products_are_never_computed_twice(backend: object) -> None:
    found = program(backend)
    whole = sum("mm" in op for op in ops(found.graph_module))
    assert whole == sum("mm" in op for op in ops(found.forward) + ops(found.relevance))


@pytest.mark.parametrize("backend", ["eager", unchanged], ids=["eager", "recompute"])
def test_only_what_relevance_needs_is_saved(backend: object) -> None:
    found = program(backend)
    assert len(saved(found)) == 1
    used = [n for n in found.relevance.graph.find_nodes(op="placeholder") if n.users]
    assert {n.meta["name"] for n in used} == {
        n.meta["name"] for n in found.relevance.graph.find_nodes(op="placeholder")
    }


def test_seeds_enter_on_the_relevance_side_only() -> None:
    found = program("eager")
    forward = [n.meta["name"] for n in found.forward.graph.find_nodes(op="placeholder")]
    relevance = [n.meta["name"] for n in found.relevance.graph.find_nodes(op="placeholder")]
    assert "seed:0" not in forward
    assert "seed:0" in relevance


def test_both_cuts_give_the_same_relevance() -> None:
    torch.manual_seed(1)
    model, x = Block().eval(), torch.randn(5, 8)
    plain = attnlrp_fx.compile(model, x, backend="eager")(x)
    again = attnlrp_fx.compile(model, x, backend=unchanged)(x)  # type: ignore[arg-type]
    torch.testing.assert_close(plain.relevance["x"], again.relevance["x"], rtol=0, atol=0)
