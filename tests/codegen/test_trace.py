"""Tracing: what is called becomes a graph, sizes are computed from the inputs', each once."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from attnlrp_fx.codegen.trace import Input, Trace
from attnlrp_fx.errors import RuleError
from attnlrp_fx.torch_private import SymbolicSizes

aten = torch.ops.aten
SIZED = torch.randn(4, 3)


def fakes(*inputs: Tensor) -> tuple[FakeTensorMode, list[Tensor]]:
    """Fake tensors whose sizes are symbols of their own, of the shapes of these."""
    symbols = {
        (i, d): sympy.Symbol(f"s{10 * i + d}", integer=True, positive=True)
        for i, value in enumerate(inputs)
        for d in range(value.dim())
    }
    examples = {symbols[i, d]: (inputs[i].shape[d], 2, None) for i, d in symbols}
    sizes = SymbolicSizes(examples, [])
    with sizes.mode:
        return sizes.mode, [
            torch.empty([sizes.size(symbols[i, d]) for d in range(value.dim())])
            for i, value in enumerate(inputs)
        ]


def traced(
    function: Callable[..., Any], *inputs: Tensor, parts: tuple[str, ...] = ()
) -> fx.GraphModule:
    mode, values = fakes(*inputs)
    parts = parts or ("input",) * len(values)
    given = enumerate(zip(parts, values, strict=True))
    with mode, torch.no_grad():
        trace = Trace([Input(part, f"x.{i}", value) for i, (part, value) in given])
        with trace.recording():
            results = function(*values)
        return trace.graph_module(results)


def targets(graph_module: fx.GraphModule) -> list[Any]:
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def test_ops_as_they_are_called() -> None:
    graph_module = traced(lambda x: [torch.tanh(x) + x, x.topk(2).values], torch.randn(3, 4))
    x = torch.randn(5, 6)
    first, second = graph_module(x)
    torch.testing.assert_close(first, torch.tanh(x) + x, rtol=0, atol=0)
    torch.testing.assert_close(second, x.topk(2).values, rtol=0, atol=0)
    (placeholder,) = graph_module.graph.find_nodes(op="placeholder")
    assert (placeholder.name, placeholder.meta["name"]) == ("x_0", "x.0")
    assert aten.topk.default in targets(graph_module)
    assert operator.getitem in targets(graph_module)


def test_inputs_that_are_returned() -> None:
    graph_module = traced(lambda x, y: [y, x, 3, x.shape[0]], torch.ones(3, 4), torch.ones(5, 7))
    x, y = torch.randn(2, 2), torch.randn(6, 6)
    assert graph_module(x, y)[0] is y
    assert graph_module(x, y)[1] is x
    assert graph_module(x, y)[2:] == [3, 2]


def test_ops_that_are_made_of_others_are_taken_apart() -> None:
    """A matrix product of a batch, with symbolic sizes: no size becomes a number."""
    weight = torch.randn(6, 2)
    graph_module = traced(lambda x, w: [x @ w], torch.randn(3, 4, 6), torch.randn(6, 2))
    assert aten.mm.default in targets(graph_module)
    x = torch.randn(7, 5, 6)
    torch.testing.assert_close(graph_module(x, weight)[0], x @ weight, rtol=0, atol=0)


def test_ops_below_a_derivative() -> None:
    def gradient(x: Tensor) -> list[Tensor]:
        _, pull = torch.func.vjp(lambda y: (y.sin() * y).sum(1), x)[:2]
        return list(pull(torch.ones(x.shape[0])))

    graph_module = traced(gradient, torch.randn(3, 4))
    x = torch.randn(2, 7)
    torch.testing.assert_close(graph_module(x)[0], x.sin() + x * x.cos())


def test_ops_that_are_written_out() -> None:
    mode, (x,) = fakes(torch.randn(3, 4))
    with mode, torch.no_grad():
        trace = Trace([Input("input", "x", x)], {aten.silu.default: lambda x: x * x.sigmoid()})
        with trace.recording():
            results = [torch.nn.functional.silu(x)]
        graph_module = trace.graph_module(results)
    assert targets(graph_module) == [aten.sigmoid.default, aten.mul.Tensor]


def test_numbers_made_tensors_are_constants() -> None:
    graph_module = traced(lambda x: [x * torch.tensor([2.0, 3.0])], torch.randn(3, 2))
    x = torch.randn(4, 2)
    torch.testing.assert_close(graph_module(x)[0], x * torch.tensor([2.0, 3.0]))


def test_ops_that_run_graphs() -> None:
    branches = [fx.symbolic_trace(branch) for branch in (lambda y: (y * 2,), lambda y: (y + 1,))]

    def function(x: Tensor) -> list[Tensor]:
        return list(torch.ops.higher_order.cond(x.sum() > 0, *branches, (x,)))

    graph_module = traced(function, torch.randn(3, 4))
    for x in (torch.ones(2, 5), -torch.ones(2, 5)):
        torch.testing.assert_close(graph_module(x)[0], function(x)[0], rtol=0, atol=0)


def test_ops_say_where_they_are_from() -> None:
    mode, (x,) = fakes(torch.randn(3, 4))
    source = fx.Graph().placeholder("source")
    with mode, torch.no_grad():
        trace = Trace([Input("input", "x", x)])
        with trace.recording():
            with trace.at(source, "forward"):
                y = x.sin()
            z = y.cos()
        graph_module = trace.graph_module([z])
    said = {node.target: node.meta.get("custom") for node in graph_module.graph.nodes}
    assert said[aten.sin.default] == {"from": "source", "phase": "forward"}
    assert said[aten.cos.default] is None


def test_values_keep_no_autograd_graph() -> None:
    def function(x: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            return list(torch.autograd.grad(leaf.sin().sum(), [leaf]))

    graph_module = traced(function, torch.randn(3, 4))
    values = [node.meta["val"] for node in graph_module.graph.nodes if "val" in node.meta]
    assert not any(value.requires_grad for value in values if isinstance(value, Tensor))


def test_a_size_is_read_and_computed_once() -> None:
    def function(x: Tensor) -> list[Tensor]:
        rows, columns = x.shape
        return [x.reshape(rows * columns), x.new_ones(rows * columns), x.new_ones(columns, rows)]

    graph_module = traced(function, torch.randn(3, 4))
    assert targets(graph_module).count(aten.sym_size.int) == 2
    assert targets(graph_module).count(operator.mul) == 1
    assert [tuple(part.shape) for part in graph_module(torch.randn(2, 5))] == [(10,), (10,), (5, 2)]
    for node in graph_module.graph.nodes:
        assert node.op == "output" or "val" in node.meta


def test_sizes_that_nothing_is_called_with_are_not_computed() -> None:
    graph_module = traced(lambda x: [x.sin()] if x.shape[0] * 3 > 4 else [], torch.randn(3, 4))
    assert targets(graph_module) == [aten.sin.default]


def test_sizes_of_seeds_are_read_where_no_other_input_has_them() -> None:
    def function(seed: Tensor, x: Tensor) -> list[Tensor]:
        return [seed.new_ones(x.shape[0]), seed.new_ones(seed.shape[0])]

    graph_module = traced(function, torch.ones(3, 4), torch.ones(5, 6), parts=("seed", "input"))
    seed, x = graph_module.graph.find_nodes(op="placeholder")
    reads = graph_module.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    assert {node.args[0] for node in reads} == {seed, x}
    found = graph_module(torch.ones(2, 2), torch.ones(7, 7))
    assert [len(part) for part in found] == [7, 2]


def test_sizes_that_are_inputs() -> None:
    """They are read off a tensor nevertheless where one has them."""
    mode, (x, y) = fakes(torch.randn(3, 4), torch.randn(5, 6))
    with mode, torch.no_grad():
        sizes = [Input("input", f"size_{i}", size) for i, size in enumerate((*x.shape, *y.shape))]
        trace = Trace([*sizes, Input("input", "x", x)])
        with trace.recording():
            results = [x.new_ones(size.value) for size in sizes]
        graph_module = trace.graph_module(results)
    used = [n.name for n in graph_module.graph.find_nodes(op="placeholder") if n.users]
    assert used == ["size_2", "size_3", "x"]
    found = graph_module(2, 5, 8, 9, torch.ones(2, 5))
    assert [len(part) for part in found] == [2, 5, 8, 9]


def test_sizes_that_follow_from_an_inputs() -> None:
    """A region can take a value of 3s + t rows and t columns, and need s."""
    mode, (x,) = fakes(torch.randn(3, 4))
    with mode, torch.no_grad():
        size, columns = x.shape
        wide = torch.empty(3 * size + columns, columns)
        trace = Trace([Input("input", "wide", wide)])
        with trace.recording():
            results = [wide.new_ones(size), wide.new_ones(6 * size)]
        graph_module = trace.graph_module(results)
    found = graph_module(torch.ones(3 * 7 + 5, 5))
    assert [len(part) for part in found] == [7, 42]


@pytest.mark.parametrize(
    ("dimensions", "wanted"),
    [
        (lambda s, t: [(s - 3) // 2 + 1, t], lambda s, t: t * ((s - 3) // 2)),
        (lambda s, t: [(s - 3) // 2 + 1, t], lambda s, t: (((s - 3) // 2 + 1) // 2 + t) * t),
        (lambda s, t: [(s // 5 - 1) // 2, t], lambda s, t: 8 * t * ((s // 5 - 1) // 2) + t),
        (lambda s, t: [s + t, 3], lambda s, t: 2 * s + 2 * t + 1),
        (lambda s, t: [s + t, t - 1], lambda s, t: s * t),
        (lambda s, t: [(s // 8) * (t // 2) + 2, t], lambda s, t: 5 * t * ((s // 8) * (t // 2) + 2)),
        (lambda s, t: [(s // 8 + 1) * t, t], lambda s, t: (s // 8 + 1) * 3),
    ],
    ids=["rounded", "rounded twice", "nested", "a sum", "two steps", "patches", "folded rows"],
)
def test_sizes_made_of_others(dimensions: Any, wanted: Any) -> None:
    """As regions have them behind convolutions, or where lengths were joined."""
    mode, (x,) = fakes(torch.randn(30, 4))
    with mode, torch.no_grad():
        given = torch.empty(dimensions(*x.shape))
        trace = Trace([Input("input", "given", given)])
        with trace.recording():
            results = [given.new_ones(wanted(*x.shape))]
        graph_module = trace.graph_module(results)
    for s, t in ((30, 4), (47, 6)):
        (found,) = graph_module(torch.ones(dimensions(s, t)))
        assert len(found) == wanted(s, t)


def test_sizes_that_are_found_when_it_runs() -> None:
    def function(x: Tensor) -> list[Tensor]:
        chosen = (x > 0).nonzero()
        return [chosen, x.new_ones(chosen.shape[0] + 1)]

    graph_module = traced(function, torch.randn(3, 4))
    x = torch.tensor([[1.0, -1.0], [2.0, 3.0]])
    chosen, ones = graph_module(x)
    assert len(chosen) == 3
    assert len(ones) == 4


def test_a_size_that_follows_from_nothing() -> None:
    mode, (x,) = fakes(torch.randn(3, 4))
    with mode, torch.no_grad():
        other = torch.empty(5)
        trace = Trace([Input("input", "other", other)])
        with pytest.raises(RuleError, match="follows from"), trace.recording():
            other.new_ones(x.shape[0])


def test_a_quotient_of_sizes() -> None:
    """A mean over a symbolic number of elements, written out, divides by it."""
    before = traced(lambda x: [x * (x.shape[0] / 16)], SIZED)
    assert operator.truediv in targets(before)
    for rows in (4, 7):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(before(x)[0], x * rows / 16)
