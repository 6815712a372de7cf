"""What crosses the cut between the forward and the relevance side."""

import functools
import math

import pytest
import torch
from torch import Tensor, fx, nn

import attnlrp_fx
from attnlrp_fx.codegen.emit import Program
from attnlrp_fx.codegen.flops import operations
from attnlrp_fx.codegen.partition import Keeping
from attnlrp_fx.graph.operators import is_cheap
from attnlrp_fx.torch_private import typical_size


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
    (compiled,) = explainer._running.programs.compiled.values()
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


class Attending(nn.Module):
    """Norm, projections, attention and a nonlinearity: what is dear, and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.project(self.norm(x)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return x + self.out(nn.functional.gelu(y.transpose(1, 2).flatten(2)))


@functools.cache
def attending() -> Program:
    x = torch.randn(3, 9, 8)
    explainer = attnlrp_fx.compile(Attending().eval(), x, backend=unchanged)  # type: ignore[arg-type]
    (compiled,) = explainer._running.programs.compiled.values()
    (found,) = compiled.schedule.programs
    return found


def test_a_price_of_nothing_keeps_nothing() -> None:
    """Everything that relevance reads is computed again, once, and the rest is not."""
    found = attending().keeping(Keeping(price=0.0))
    assert not saved(found)
    whole, forward, relevance = map(ops, (found.graph_module, found.forward, found.relevance))
    attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert [each.count(attention) for each in (whole, forward, relevance)] == [1, 1, 1]
    # The last layer's output is read by nothing.
    products = [sum("mm" in op for op in each) for each in (whole, forward, relevance)]
    assert products[1] + products[2] == products[0] + 1


def test_no_price_keeps_every_product() -> None:
    found = attending()
    attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert ops(found.forward).count(attention) == 1
    assert attention not in ops(found.relevance)
    assert any("getitem" in name for name in saved(found))


def test_more_is_kept_at_a_higher_price() -> None:
    """Until nothing is done twice; what is kept is never larger than it need be."""
    prices = [0.0, 1e-3, 3e-2, 0.3, 3.0, math.inf]
    programs = [attending().keeping(Keeping(price=price)) for price in prices]
    work = [sum(dear(p.forward)) + sum(dear(p.relevance)) for p in programs]
    kept = [sum(sizes(p)) for p in programs]
    assert work == sorted(work, reverse=True)
    assert kept == sorted(kept)
    assert kept[0] == 0 < kept[-1]
    assert work[-1] == sum(dear(attending().rest))


def dear(graph_module: fx.GraphModule) -> list[float]:
    """Operations of what is no view and not elementwise."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    return [
        typical_size(operations(node), 64)
        for node in nodes
        if not is_cheap(node) and isinstance(node.meta["val"], Tensor | tuple | list)
    ]


def sizes(program: Program) -> list[float]:
    """The bytes of each saved value."""
    placeholders = program.relevance.graph.find_nodes(op="placeholder")
    values = [n.meta["val"] for n in placeholders if n.meta["part"] == "saved"]
    return [typical_size(v.numel(), 64) * v.dtype.itemsize for v in values]


def test_what_sizes_count_for_decides() -> None:
    """Attention over many tokens is dear for its size, over few it is not."""
    found = attending()
    (x,) = [n for n in found.rest.graph.find_nodes(op="placeholder") if n.meta["part"] == "input"]
    length = str(x.meta["val"].shape[1])
    few, many = (
        found.keeping(Keeping(price=0.01, sizes={length: count})) for count in (2, 100_000)
    )
    assert not any("getitem" in name for name in saved(few))
    assert any("getitem" in name for name in saved(many))
