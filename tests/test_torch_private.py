"""Each use of PyTorch's private API, alone: an upgrade that breaks one fails here, by its name."""

import inspect
import threading
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
from references import Function
from torch import Tensor, fx, nn
from torch._inductor import async_compile as torch_async_compile
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppWrapperCodeCache
from torch._inductor.cpu_vec_isa import invalid_vec_isa
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing import assert_close
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.value_ranges import ValueRangeError

import attnlrp_fx
from attnlrp_fx import torch_private
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.codegen.retrace import retraced


def _three_ops(x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(x @ y) + x.sum(1, keepdim=True)


SAME = {"x": torch.ones(4, 4), "y": torch.ones(4, 4)}
"""Sizes that are equal by chance."""


def _captured(inputs: dict[str, Tensor]) -> fx.GraphModule:
    return capture(Function(_three_ops).eval(), inputs).graph_module


def _symbols(graph_module: fx.GraphModule) -> list[str]:
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    return [str(size) for node in placeholders for size in node.meta["val"].shape]


def test_symbolic_sizes() -> None:
    """Sizes of symbols with examples and ranges; what is assumed about them is kept."""
    s, t = (sympy.Symbol(name, integer=True, positive=True) for name in ("s0", "s1"))
    sizes = torch_private.SymbolicSizes({s: (6, 2, 40), t: (3, 2, None)}, [sympy.Le(s, 30)])
    assert sizes.size(sympy.Integer(4)) == 4
    with sizes.mode:
        value = torch.empty(sizes.size(torch_private.SIZE_FUNCTIONS["FloorDiv"](s, 2)), 5)
    assert isinstance(value, FakeTensor)
    assert value.shape[0].node.hint == 3  # type: ignore[attr-defined]
    graph = fx.Graph()
    graph.placeholder("x").meta["val"] = value
    graph.output(None)
    found = torch_private.size_assumptions(fx.GraphModule(nn.Module(), graph))
    assert any(torch_private.fails(one, {"s0": 35, "s1": 2}) for one in found)
    assert not any(torch_private.fails(one, {"s0": 30, "s1": 4}) for one in found)
    with pytest.raises(ValueError, match="nothing is known of s9"):
        sizes.size(sympy.Symbol("s9", integer=True))


def test_sizes_without_bounds() -> None:
    """A quotient of which PyTorch fails to find bounds is unknown, no error."""
    s = sympy.Symbol("s0", integer=True, positive=True)
    sizes = torch_private.SymbolicSizes({s: (6, 2, None)}, [])
    square, side = sizes.size((s + 1) ** 2 + s - s), sizes.size(s + 1)
    wanted = sympy.Eq(square.node.expr.expand() % side.node.expr, 0)  # type: ignore[union-attr]
    with pytest.raises(ValueRangeError):
        ShapeEnv._maybe_evaluate_static(sizes.environment, wanted)
    assert sizes.environment._maybe_evaluate_static(wanted) is None


def test_example_and_range() -> None:
    """What is known of a size; nothing of one that depends on values."""
    s = sympy.Symbol("s0", integer=True, positive=True)
    sizes = torch_private.SymbolicSizes({s: (6, 2, 40)}, [])
    assert torch_private.example_and_range(sizes.size(s)) == (6, 2, 40)  # type: ignore[arg-type]
    assert torch_private.example_and_range(sizes.size(7 - s)) == (1, -33, 5)  # type: ignore[arg-type]
    unknown = sizes.size(sizes.unknown() + 1)
    assert torch_private.example_and_range(unknown) is None  # type: ignore[arg-type]
    assert list(map(torch_private.example_of, (3, sizes.size(s), unknown))) == [3, 6, None]


def test_new_symbols() -> None:
    """Told once, where they are new."""
    sizes = torch_private.SymbolicSizes({}, [])
    with sizes.mode:
        found = torch.ones(4).nonzero()
    (symbol,) = torch_private.new_symbols(sizes.mode, found)
    assert symbol == torch_private.expression_of(found.shape[0])
    assert not torch_private.new_symbols(sizes.mode, found)


def test_every_function_is_tested() -> None:
    """A function added to `torch_private` needs a test here."""
    public = {
        name
        for name, value in vars(torch_private).items()
        if inspect.isfunction(value) and value.__module__.startswith(torch_private.__name__)
        if not name.startswith("_")
    }
    assert public == {
        "unlike_symbols",
        "symbolic_dispatch",
        "composite",
        "expression_of",
        "example_of",
        "example_and_range",
        "new_symbols",
        "with_values",
        "nothing_remembered",
        "grows_with",
        "decompositions",
        "inductor",
        "inductor_decompositions",
        "inductor_differentiable",
        "inductor_lowered",
        "instructions_meanwhile",
        "wait_for_instructions",
        "mended_lowerings",
        "kernels_meanwhile",
        "fake_mode_of",
        "fresh",
        "new_fake_mode",
        "is_plain_fake",
        "lazy_graph_module",
        "written",
        "written_late",
        "outside_of_tracing",
        "own_backwards",
        "size_assumptions",
        "storage_of",
        "fails",
        "typical_size",
    }


def test_unlike_symbols() -> None:
    """Equal sizes get symbols apart inside, one symbol outside: torch's default is back."""

    def symbols() -> set[str]:
        mode = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=False))
        return set(map(str, mode.from_tensor(torch.ones(4, 4), static_shapes=False).shape))

    with torch_private.unlike_symbols():
        assert len(symbols()) == 2
    assert len(symbols()) == 1


def test_nothing_remembered() -> None:
    """By one mode, or by those that are made meanwhile; afterwards all is as before."""
    mode = FakeTensorMode()
    with torch_private.nothing_remembered(mode):
        assert not mode.cache_enabled
        assert FakeTensorMode().cache_enabled
    with torch_private.nothing_remembered():
        assert mode.cache_enabled
        assert not FakeTensorMode().cache_enabled
    assert FakeTensorMode().cache_enabled


def test_capture_keeps_symbols_apart() -> None:
    """batch = length = width in the example: only what the model ties is tied (x's width)."""
    batch, width, height, columns = _symbols(_captured(SAME))
    assert width == height
    assert len({batch, width, columns}) == 3


def test_own_backwards() -> None:
    """Functions that are not PyTorch's are named while it watches; then all is as before."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

    before = torch.autograd.Function.__dict__["apply"]
    with torch_private.own_backwards() as called:
        assert_close(Doubled.apply(torch.ones(2)), torch.full((2,), 2.0))
    assert [name.rpartition(".")[2] for name in called] == ["Doubled"]
    assert torch.autograd.Function.__dict__["apply"] is before


def test_outside_of_tracing() -> None:
    """What is computed there is neither fake nor traced; behind it, tracing goes on."""

    def function(x: Tensor) -> Tensor:
        with torch_private.outside_of_tracing():
            real = torch.arange(3) * 2
        assert not isinstance(real, FakeTensor)
        assert real.tolist() == [0, 2, 4]
        return x + 1

    graph = torch.fx.experimental.proxy_tensor.make_fx(function, tracing_mode="fake")(torch.ones(2))
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.aten.add.Tensor]


def test_fake_mode_of() -> None:
    """The mode in which a captured graph's values live; a plain graph has none."""
    graph_module = _captured(SAME)
    mode = torch_private.fake_mode_of(graph_module)
    node = graph_module.graph.find_nodes(op="placeholder")[0]
    assert node.meta["val"].fake_mode is mode
    assert mode.shape_env is not None
    with mode:
        made = torch.empty(node.meta["val"].shape)
    assert isinstance(made, FakeTensor)
    assert str(made.shape[0]) == str(node.meta["val"].shape[0])
    with pytest.raises(ValueError, match="no fake values"):
        torch_private.fake_mode_of(fx.symbolic_trace(nn.ReLU()))


def test_typical_size() -> None:
    """Numbers as they are, symbols as what is typical, in any expression of them."""
    node = _captured(SAME).graph.find_nodes(op="placeholder")[0]
    batch, width = node.meta["val"].shape
    assert torch_private.typical_size(7, 64) == 7.0
    assert torch_private.typical_size(batch, 64) == 64.0
    assert torch_private.typical_size(2 * batch + 3, 10) == 23.0
    assert torch_private.typical_size(batch * width, 8) == 64.0


def test_symbolic_dispatch() -> None:
    """Without it, a matrix product of a batch reads its sizes as numbers."""
    x = _captured(SAME).graph.find_nodes(op="placeholder")[0].meta["val"]
    with x.fake_mode, torch.no_grad(), torch_private.symbolic_dispatch():
        product = torch.empty(x.shape[0], 3, x.shape[1]) @ torch.empty(x.shape[1], 2)
    assert [str(size) for size in product.shape] == [str(x.shape[0]), "3", "2"]


def test_composite() -> None:
    """Ops that PyTorch makes of others, and not those that it has kernels of."""
    x = torch.ones(2, 2)
    assert torch_private.composite(torch.ops.aten.matmul.default, (x, x), {})
    assert not torch_private.composite(torch.ops.aten.mm.default, (x, x), {})
    assert not torch_private.composite(torch.ops.prim.device.default, (x,), {})


def test_expressions_of_sizes() -> None:
    """Sizes as expressions, which numbers can be put into."""
    x = _captured(SAME).graph.find_nodes(op="placeholder")[0].meta["val"]
    batch, width = map(torch_private.expression_of, x.shape)
    assert torch_private.expression_of(3) == 3
    size = torch_private.expression_of((x.shape[0] * 3 + x.shape[1]) // 2)
    assert torch_private.with_values(size, {batch: 5, width: 4}) == 9


def test_grows_with() -> None:
    """A size is a multiple of another, does not depend on it, or does so in another way."""
    node = _captured(SAME).graph.find_nodes(op="placeholder")[0]
    batch, width = node.meta["val"].shape
    assert torch_private.grows_with(batch, batch) is True
    assert torch_private.grows_with(batch * width * 3, batch) is True
    assert torch_private.grows_with(width, batch) is False
    assert torch_private.grows_with(5, batch) is False
    assert torch_private.grows_with(batch + 1, batch) is None
    assert torch_private.grows_with(batch * batch, batch) is None


def test_sizes_that_divide_by_zero() -> None:
    """Where an expression has no value, another typical size has; it contradicts no assumption."""
    node = _captured(SAME).graph.find_nodes(op="placeholder")[0]
    batch = node.meta["val"].shape[0]
    assert torch_private.typical_size(128 // (batch - 64), 64) == 128.0
    symbol = sympy.Symbol("s0", integer=True, positive=True)
    assumption = sympy.Ge(FloorDiv(8, symbol - 4), 2, evaluate=False)
    assert not torch_private.fails(assumption, {"s0": 4})
    assert torch_private.fails(assumption, {"s0": 12})


def _runs_at_any_size(compiled: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, width, columns in [(4, 4, 4), (1, 5, 3), (7, 2, 11), (3, 3, 1)]:
        x = torch.randn(batch, width, generator=generator)
        y = torch.randn(width, columns, generator=generator)
        with torch.no_grad():
            (found,) = compiled(x, y)
        assert_close(found, _three_ops(x, y))


def test_inductor() -> None:
    """One compilation of a graph with symbolic sizes runs at any, batch 1 and equal sizes too."""
    graph_module = _captured(SAME)
    examples = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    _runs_at_any_size(torch_private.inductor(graph_module, examples))


@pytest.mark.parametrize("in_cpp", [False, True])
def test_inductor_lowered(in_cpp: bool) -> None:
    """The same of a graph that nobody traces again, whose kernels are compiled meanwhile."""
    graph_module, _ = retraced(_captured(SAME), torch_private.inductor_decompositions())
    waited = AsyncCompile.wait
    with torch_private.kernels_meanwhile():
        compiled = torch_private.inductor_lowered(graph_module, in_cpp)
    assert AsyncCompile.wait is waited
    _runs_at_any_size(compiled)


@pytest.mark.parametrize("in_cpp", [False, True])
def test_who_calls_the_kernels(in_cpp: bool) -> None:
    """Python, or C++, with a setting of Inductor's and an argument that say the same."""
    program, _ = retraced(_captured(SAME), torch_private.inductor_decompositions())
    settings: list[bool] = []

    def compiler(*given: Any, cpp_wrapper: bool, **others: Any) -> Callable[..., Any]:
        settings.extend([cpp_wrapper, inductor_config.cpp_wrapper])
        return list

    with mock.patch("torch._inductor.compile_fx.compile_fx_inner", compiler):
        torch_private.inductor_lowered(program, in_cpp)
    assert settings == [in_cpp, in_cpp]


def test_inductor_differentiable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph and its derivative, with our lowerings in both, whatever PyTorch remembers."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x = torch.randn(3, 4, requires_grad=True)
    texts = []
    for backend in ("inductor", torch_private.inductor_differentiable):
        compiled = torch.compile(lambda x: torch.erfc(x) * x, backend=backend)
        (found,) = torch.autograd.grad(compiled(x).sum(), x)
        (expected,) = torch.autograd.grad((torch.erfc(x) * x).sum(), x)
        assert_close(found, expected)
        texts.append({p.read_text() for p in tmp_path.rglob("*.py") if "call" in p.read_text()})
    theirs, ours = texts[0], texts[1] - texts[0]
    assert any("erfc()" in text for text in theirs)
    assert ours
    assert not any("erfc()" in text for text in ours)


def test_inductor_decompositions() -> None:
    """Inductor has no lowering for the derivative of SiLU, and has it written out."""
    parts = torch_private.inductor_decompositions()
    x = torch.randn(3, 4, dtype=torch.float64)
    arguments = torch.randn_like(x), x
    found = parts[torch.ops.aten.silu_backward.default](*arguments)
    assert_close(found, torch.ops.aten.silu_backward(*arguments))


def test_kernels_meanwhile() -> None:
    """What waits for kernels does when the context ends, by an error too; elsewhere at once."""
    order: list[str] = []

    class Kernels(AsyncCompile):
        def _wait_futures(self, scope: dict[str, Any]) -> None:
            order.append(scope["name"])

    with mock.patch.object(torch_async_compile, "get_compile_threads", return_value=2):
        with torch_private.kernels_meanwhile():
            Kernels().wait({"name": "first"})
            Kernels().wait({"name": "second"})
            other = threading.Thread(target=Kernels().wait, args=({"name": "another thread's"},))
            other.start()
            other.join()
            order.append("the end")
        Kernels().wait({"name": "after"})
        with suppress(KeyError), torch_private.kernels_meanwhile():
            Kernels().wait({"name": "before an error"})
            raise KeyError
    assert order[:2] == ["another thread's", "the end"]
    assert set(order[2:4]) == {"first", "second"}
    assert order[4:] == ["after", "before an error"]


@pytest.mark.parametrize("threads", [1, 2])
def test_programs_in_cpp_meanwhile(threads: int) -> None:
    """C++ is loaded when the context ends, with what its compiler said; elsewhere at once."""
    loaded: list[str] = []

    def load(name: str, submit_fn: Any = None) -> Callable[[], Any]:
        assert (submit_fn is None) is (threads == 1)

        def ready() -> Callable[[int], int]:
            if name == "wrong":
                raise RuntimeError("no such instruction")
            loaded.append(name)
            return lambda number: number + 1

        return ready

    with (
        mock.patch.object(torch_async_compile, "get_compile_threads", return_value=threads),
        mock.patch.object(CppWrapperCodeCache, "load_pybinding_async", load),
    ):
        before = CppWrapperCodeCache.load_pybinding
        with torch_private.kernels_meanwhile():
            call = CppWrapperCodeCache.load_pybinding("one")
            assert loaded == []
        assert loaded == ["one"]
        assert call(2) == 3
        assert CppWrapperCodeCache.load_pybinding == before
        with (
            pytest.raises(RuntimeError, match="no such instruction"),
            torch_private.kernels_meanwhile(),
        ):
            CppWrapperCodeCache.load_pybinding("wrong")


@pytest.mark.parametrize("is_there", [True, False])
def test_instructions_meanwhile(is_there: bool) -> None:
    """They are found in a thread that others wait for, then headers; what goes wrong comes up
    where they are asked for."""
    asked: list[str] = []
    may_go_on, done = threading.Event(), threading.Event()

    def pick() -> None:
        may_go_on.wait(60)
        asked.append("instructions")
        if not is_there:
            raise RuntimeError("no compiler")

    def headers(header: str, *given: Any, **settings: Any) -> str:
        asked.append("headers")
        done.set()
        raise RuntimeError("no headers")

    with (
        mock.patch("torch._inductor.cpu_vec_isa.pick_vec_isa", pick),
        mock.patch("torch._inductor.codecache.pick_vec_isa", return_value=invalid_vec_isa),
        mock.patch("torch._inductor.codecache._precompile_header", headers),
    ):
        torch_private.instructions_meanwhile()
        waiting = threading.Thread(target=torch_private.wait_for_instructions)
        waiting.start()
        assert waiting.is_alive()
        may_go_on.set()
        waiting.join(60)
        assert asked[0] == "instructions"
        assert done.wait(60)
    assert asked == ["instructions", "headers"]


def test_mended_lowerings() -> None:
    """Inductor's tables are as before when the context ends, and other devices keep more of it."""
    aten, table = torch.ops.aten, import_module("torch._inductor.lowering").lowerings
    before = dict(table)
    everywhere, on_cpus = aten.convolution_backward.default, (aten.mm.default, aten.erfc.default)
    for device in ("cpu", "meta"):
        with torch_private.mended_lowerings([torch.empty(2, device=device)]):
            assert table[everywhere] is not before[everywhere]
            assert all((table[op] is before[op]) is (device == "meta") for op in on_cpus)
        assert dict(table) == before
    with (
        mock.patch.object(torch.backends.mkldnn, "is_available", return_value=False),
        torch_private.mended_lowerings([]),
    ):
        assert table[aten.mm.default] is before[aten.mm.default]


def test_fresh_is_nobodys_view() -> None:
    view = torch.ones(3, 8).split(4, 1)[1].transpose(0, 1)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(view)
        copy = torch_private.fresh(fake)
    assert (copy.shape, copy.stride(), copy.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert not copy._is_view()
    assert copy.storage_offset() == 0
    assert torch_private.fresh(3) == 3


def test_size_assumptions() -> None:
    def by_size(x: Tensor, y: Tensor) -> Tensor:
        return x + y if x.shape[0] < 10 else x - y

    same = {"x": torch.ones(4, 3), "y": torch.ones(4, 3)}
    graph_module = capture(Function(by_size).eval(), same).graph_module
    rows = _symbols(graph_module)[0]
    assumptions = torch_private.size_assumptions(graph_module)
    assert any(torch_private.fails(a, {rows: 12}) for a in assumptions)
    assert not any(torch_private.fails(a, {rows: 5}) for a in assumptions)
    assert not any(torch_private.fails(a, {}) for a in assumptions)


def test_the_choice_of_a_kernel_is_no_assumption() -> None:
    """A convolution asks for its batch in order to choose a kernel, which changes nothing."""
    layers = torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 8)
    model = torch.nn.Sequential(*layers).eval()
    explainer = attnlrp_fx.compile(model, torch.rand(4, 1, 6, 6), backend="eager")
    environment = torch_private.fake_mode_of(explainer.captured).shape_env
    assert environment is not None
    assert [str(guard.expr.rhs) for guard in environment.guards] == ["16"]
    assert torch_private.size_assumptions(explainer.captured) == []


def test_new_fake_mode() -> None:
    """Gigabytes that are none, beside a constant that is real."""
    with torch_private.new_fake_mode():
        huge = torch.empty(2**40, dtype=torch.float64, device="cpu")
        assert (huge + torch.ones(())).shape == (2**40,)


def test_is_plain_fake() -> None:
    mode = torch_private.new_fake_mode()
    known = mode.from_tensor(torch.tensor([1]))
    assert torch_private.is_plain_fake(known)
    known.constant = torch.tensor([1])
    assert not torch_private.is_plain_fake(known)
    assert not torch_private.is_plain_fake(torch.ones(2))
    with mode:
        assert not torch_private.is_plain_fake(torch.ones(2, 2).to_sparse())


def test_lazy_graph_modules() -> None:
    """Neither made nor recompiled is code written; called, shown and asked for it is."""
    graph_module = _captured(SAME)
    with mock.patch.object(fx.Graph, "python_code", side_effect=AssertionError):
        lazy = torch_private.lazy_graph_module(graph_module, graph_module.graph)
        lazy.graph.eliminate_dead_code()
        lazy.recompile()
    assert_close(lazy(*SAME.values())[0], _three_ops(**SAME))
    lazy.recompile()
    assert "tanh" in lazy.code
    lazy.recompile()
    assert torch_private.written(lazy) is lazy
    with mock.patch.object(fx.Graph, "python_code", side_effect=AssertionError):
        lazy(*SAME.values())


def test_written_late() -> None:
    with torch_private.written_late():
        made = make_fx(torch.tanh)(torch.ones(2))
    with mock.patch.object(fx.Graph, "python_code", side_effect=AssertionError):
        made.recompile()


def test_storage_of() -> None:
    """Views lie where what they view lies, with values or without."""
    with torch_private.new_fake_mode():
        fakes = torch.empty(3, 4), torch.empty(3, 4)
        for x, other in [fakes, (torch.ones(3, 4), torch.ones(3, 4))]:
            assert torch_private.storage_of(x.view(12)[1:]) == torch_private.storage_of(x)
            assert torch_private.storage_of(x) != torch_private.storage_of(other)


def test_decompositions() -> None:
    """Of the ops asked for alone, by overload; the same values, of simpler ops."""
    aten = torch.ops.aten
    table = torch_private.decompositions([aten.native_layer_norm, aten.silu_backward])
    assert set(table) >= {aten.native_layer_norm.default, aten.silu_backward.default}
    assert aten.gelu_backward.default not in table
    x = torch.linspace(-2, 3, 12, dtype=torch.float64).reshape(3, 4)
    found = table[aten.native_layer_norm.default](x, [4], None, None, 1e-5)
    for part, expected in zip(found, aten.native_layer_norm(x, [4], None, None, 1e-5), strict=True):
        torch.testing.assert_close(part, expected)
