"""Programs traced once more: the same values, in symbols that a compiler can read off inputs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from test_trace import SIZED, targets, traced
from torch import Tensor, fx

from attnlrp_fx.codegen.retrace import Retraced, retraced
from attnlrp_fx.codegen.trace import Input, Trace
from attnlrp_fx.graph.operators import placeholders_of
from attnlrp_fx.torch_private import SIZE_FUNCTIONS, SymbolicSizes, expression_of

aten = torch.ops.aten
S, T = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))
HALF = SIZE_FUNCTIONS["FloorDiv"](S - 1, 2)


def program_of(
    function: Callable[..., list[Any]], examples: Mapping[Any, int], *shapes: Sequence[Any]
) -> fx.GraphModule:
    """A program that takes tensors of sizes that are expressions."""
    sizes = SymbolicSizes({s: (example, 2, None) for s, example in examples.items()}, [])
    with sizes.mode, torch.no_grad():
        values = [torch.empty([sizes.size(sympy.sympify(d)) for d in shape]) for shape in shapes]
        trace = Trace([Input("input", f"x{i}", value) for i, value in enumerate(values)])
        with trace.recording():
            results = function(*values)
        return trace.graph_module(results)


def run(made: Retraced, *inputs: Tensor) -> list[Any]:
    sizes = made.sizes(*inputs) if made.sizes is not None else []
    found: list[Any] = made.program(*inputs, *sizes)
    return found


def shapes(made: Retraced) -> list[list[Any]]:
    """What the inputs' sizes are."""
    values = [node.meta["val"] for node in placeholders_of(made.program)]
    return [
        list(map(expression_of, v.shape)) if isinstance(v, Tensor) else expression_of(v)
        for v in values
    ]


def test_what_convolutions_left_of_a_length_is_a_symbol() -> None:
    """No input has the length itself; what is made of the same size stays made of it."""
    program = program_of(
        lambda x, y: [x.reshape(x.shape[0] * 4) * y], {S: 9}, (HALF + 1, 4), (4 * HALF + 4,)
    )
    made = retraced(program, {})
    ((length, four), (whole,)), extra = shapes(made)[:2], shapes(made)[2:]
    assert length.is_Symbol
    assert four == 4
    assert whole.free_symbols
    x, y = torch.randn(3, 4), torch.randn(12)
    torch.testing.assert_close(run(made, x, y)[0], x.reshape(12) * y)
    assert len(extra) == (0 if made.sizes is None else len(made.sizes(x, y)))


def test_what_is_rounded_is_one_more_input() -> None:
    """The number of chunks: with it, no size of any value is rounded."""

    def function(x: Tensor) -> list[Tensor]:
        chunks = -(-x.shape[1] // 4)
        padded = torch.nn.functional.pad(x, (0, chunks * 4 - x.shape[1]))
        return [padded.reshape(x.shape[0], chunks, 4).cumsum(1)]

    made = retraced(traced(function, torch.randn(3, 10)), {})
    assert made.sizes is not None
    for node in made.program.graph.nodes:
        for size in getattr(node.meta.get("val"), "shape", ()):
            assert not expression_of(size).atoms(sympy.Function)
    for shape in ((2, 9), (5, 12), (1, 3)):
        x = torch.randn(shape)
        torch.testing.assert_close(run(made, x), function(x))


def test_sizes_without_rounding_take_no_more_inputs() -> None:
    made = retraced(traced(lambda x: [x.reshape(x.shape[0] * x.shape[1])], torch.randn(3, 4)), {})
    assert made.sizes is None
    x = torch.randn(5, 2)
    assert torch.equal(run(made, x)[0], x.reshape(10))


def test_sizes_that_are_inputs() -> None:
    """A program may take a size, and hand one on."""
    sizes = SymbolicSizes({S: (6, 2, None), T: (4, 2, None)}, [])
    with sizes.mode, torch.no_grad():
        x, size = torch.empty(sizes.size(S)), sizes.size(T)
        trace = Trace([Input("input", "x", x), Input("input", "size", size)])
        with trace.recording():
            results = [x[:, None].expand(x.shape[0], size) * 2, size * 3]
        program = trace.graph_module(results)
    made = retraced(program, {})
    given = torch.randn(3)
    sizes_too = made.sizes(given, 5) if made.sizes is not None else []
    found, tripled = made.program(given, 5, *sizes_too)
    assert torch.equal(found, given[:, None].expand(3, 5) * 2)
    assert tripled == 15


def test_sizes_that_depend_on_values() -> None:
    """The node that makes one says so; of one that was made elsewhere, nothing is assumed."""
    made = retraced(traced(lambda x: [x[x > 0] * 2], torch.randn(3, 4)), {})
    (chosen,) = (n for n in made.program.graph.nodes if n.meta.get("unbacked_bindings"))
    assert list(chosen.meta["unbacked_bindings"]) == list(
        map(expression_of, chosen.meta["val"].shape)
    )
    x = torch.randn(2, 5)
    assert torch.equal(run(made, x)[0], x[x > 0] * 2)
    after = program_of_value(chosen.meta["val"])
    assert after.sizes is None
    (size,) = shapes(after)[0]
    assert str(size).startswith("u")
    for count in (0, 1, 3):
        value = torch.randn(count)
        assert torch.equal(run(after, value)[0], value * 2)


def program_of_value(value: Tensor) -> Retraced:
    """One that takes such a value, retraced."""
    with value.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        trace = Trace([Input("input", "x", value)])
        with trace.recording():
            results = [value * 2]
        return retraced(trace.graph_module(results), {})


def test_a_program_written_out() -> None:
    """In other ops, with the same inputs and sizes; the program itself stays as it was."""

    def program(x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.nn.functional.silu(x) @ y, x.reshape(-1, x.shape[1] * 2)]

    before = traced(program, torch.randn(4, 6), torch.randn(6, 3))
    silu = aten.silu.default
    after, _ = retraced(before, {silu: lambda x: x * torch.sigmoid(x)})
    assert silu in targets(before)
    assert silu not in targets(after)
    assert aten.sigmoid.default in targets(after)
    given = torch.randn(8, 5), torch.randn(5, 7)
    for found, expected in zip(after(*given), before(*given), strict=True):
        torch.testing.assert_close(found, expected)
    names = [[node.name for node in g.graph.find_nodes(op="placeholder")] for g in (before, after)]
    assert names[0] == names[1]


def test_what_a_program_written_out_returns_is_laid_out_as_before() -> None:
    """Written out, an op may lay out otherwise what it makes; who reads it would not know."""
    before = traced(lambda x: [torch.tanh(x)], SIZED)
    after, _ = retraced(before, {aten.tanh.default: lambda x: x.t().contiguous().sinh().t()})
    after, _ = retraced(after, {aten.sinh.default: torch.tanh})
    (found,), (expected,) = after(SIZED), before(SIZED)
    assert found.stride() == expected.stride() == (3, 1)
    torch.testing.assert_close(found, expected)
