"""The one place where PyTorch's private API is used.

- `unlike_symbols`: export gives two dimensions of equal example size one symbol ("duck shapes"),
  which would tie the batch to whatever else has its size; only a private setting turns that off.
- `nothing_remembered`: PyTorch remembers what ops make of fake tensors; with symbolic sizes looking
  it up takes longer than finding it anew.
- `inductor`, `inductor_lowered`, `inductor_decompositions`: compiling a graph that nobody will
  differentiate, with the symbols of its own placeholders. `standalone_compile`, exported from
  `torch._inductor` without documentation, traces it twice before; `compile_fx_forward` takes what
  is functional, and written out in the ops that Inductor has, as it is.
- `kernels_meanwhile`: Inductor waits for the kernels of each graph before it takes the next.
- `fake_mode_of`, `fresh`: the fake-tensor mode of a captured graph, in which it is traced again,
  so that both share their symbols; a fake tensor that is no view, which Inductor cannot take in.
- `is_plain_fake`: whether a fake tensor has sizes alone, so that what an op makes of it has, too.
- `lazy_graph_module`, `written_late`, `written`: graphs whose Python code is written when they are
  first called or shown. That takes a tenth of a compilation, and of most graphs nobody reads it.
- `new_fake_mode`, `storage_of`: tensors with sizes and no values, on any device; which of them
  share memory.
- `size_assumptions`, `fails`: the branches that capture took by size; `torch.export` would check
  them at run time only in the calling convention that a rewritten graph no longer has.
- `outside_of_tracing`: computing with real values while a model is traced.
- `TRACING`: what tracing and compiling set (modes, patched methods, counters of symbols) belongs to
  the process, so that only one thread may do it at a time.
- `own_backwards`: no hook tells that an `autograd.Function` is called, so its `apply` is watched.
- `decompositions`: ops written out, for those whose own derivative is not exact.
- `SymbolicSizes`, `SIZE_FUNCTIONS`: fake values with symbolic sizes, of a graph that was saved, and
  the functions that PyTorch writes such sizes with.
- `symbolic_dispatch`, `composite`: while ops are recorded, those that PyTorch makes of others must
  be taken apart by what it has for symbolic sizes.
- `expression_of`, `with_values`: sizes by their expressions, which a traced graph computes.
- `example_of`, `example_and_range`, `new_symbols`: what is known of a size before a program runs,
  and where those are that are not known: Inductor looks for that in a graph's metadata.
- `typical_size`, `grows_with`: what a symbolic size would be, and whether it is a multiple of
  another, from their expressions.

`tests/test_torch_private.py` uses each of them, so that an upgrade fails loudly.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import lru_cache, partial, wraps
from importlib import import_module
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import sympy
import torch
import torch._dynamo.config as dynamo_config
import torch._inductor.config as inductor_config
import torch.fx.experimental._config as symbolic_shapes_config
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, disable_fake_tensor_cache
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.fx.experimental.symbolic_shapes import ShapeEnv, compute_unbacked_bindings
from torch.utils._python_dispatch import (
    _disable_current_modes,
    autograd_would_have_decomposed,
)
from torch.utils._sympy import functions as size_functions
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRangeError

TRACING = threading.RLock()
"""Held while a model is captured, and while a program is traced and compiled."""


@contextmanager
def unlike_symbols() -> Iterator[None]:
    """Give every dynamic dimension a symbol of its own while a model is captured."""
    config: Any = symbolic_shapes_config  # which makes itself a module with `patch`
    with config.patch(use_duck_shape=False):
        yield


@contextmanager
def nothing_remembered(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """A fake-tensor mode looks nothing up; if none is given, those that are made in it."""
    if mode is None:
        with dynamo_config.patch(fake_tensor_cache_enabled=False):
            yield
    else:
        with disable_fake_tensor_cache(mode):
            yield


@contextmanager
def own_backwards() -> Iterator[dict[str, None]]:
    """Which autograd functions that are not PyTorch's a model calls.

    Their forward alone is captured: what they hand back as a derivative leaves no trace in a graph.
    """
    called: dict[str, None] = {}
    function: Any = torch.autograd.Function
    apply = function.__dict__["apply"]

    def recorded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            called[cls.__qualname__] = None
        return apply.__func__(cls, *args, **kwargs)

    function.apply = classmethod(recorded)
    try:
        yield called
    finally:
        function.apply = apply


def outside_of_tracing() -> AbstractContextManager[Any]:
    """A context in which ops on real tensors are computed, not traced."""
    return _disable_current_modes()


def fake_mode_of(graph_module: fx.GraphModule) -> FakeTensorMode:
    """The fake-tensor mode that a captured graph's values belong to."""
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError("the graph has no fake values: it was not captured by torch.export")


def fresh(value: Any) -> Any:
    """A fake tensor of the same sizes and strides that is nobody's view; anything else as it is."""
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )


def lazy_graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose Python code is written when it is first called or shown."""
    return _LazyGraphModule(root, graph)


def written_late() -> AbstractContextManager[None]:
    """A context in which PyTorch makes graph modules of that kind, too."""
    context: AbstractContextManager[None] = _use_lazy_graph_module(True)
    return context


def written(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with its Python code: Dynamo cannot follow how it is written."""
    _LazyGraphModule.force_recompile(graph_module)
    return graph_module


def is_plain_fake(value: Tensor) -> bool:
    """Whether it is a fake tensor with strides, for any values: of some, PyTorch knows them."""
    is_fake = isinstance(value, FakeTensor) and value.constant is None
    return is_fake and value.layout is torch.strided


def new_fake_mode() -> FakeTensorMode:
    """A mode in which tensors have sizes and no values; a graph's own constants may be real."""
    return FakeTensorMode(allow_non_fake_inputs=True)


SIZE_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    name: getattr(size_functions, name)
    for name in (
        "CeilDiv",
        "CeilToInt",
        "CleanDiv",
        "FloatTrueDiv",
        "FloorDiv",
        "FloorToInt",
        "IntTrueDiv",
        "Mod",
        "ModularIndexing",
        "PythonMod",
        "ToFloat",
        "TruncToInt",
        "Where",
    )
}
"""What PyTorch writes symbolic sizes with, beside sympy's own functions."""


class _Relations(ShapeEnv):
    """What is known of symbols.

    Where PyTorch fails to find bounds, as of quotients, nothing is; and where it fails to say what
    was assumed, in symbols that are no inputs of a program themselves, nothing was: what a model
    assumes of its sizes is checked where it is called.
    """

    @wraps(ShapeEnv._maybe_evaluate_static)  # whose cache PyTorch empties
    def _maybe_evaluate_static(  # type: ignore[override]  # It is typed as that cache.
        self, *args: Any, **kwargs: Any
    ) -> Any:
        try:
            return super()._maybe_evaluate_static(*args, **kwargs)
        except ValueRangeError:
            return None

    def produce_guards_expression(self, *args: Any, **kwargs: Any) -> str | None:
        try:
            return super().produce_guards_expression(*args, **kwargs)
        except RuntimeError:
            return None


class SymbolicSizes:
    """Sizes made of symbols, and fake tensors of such sizes.

    Args:
        typical: by symbol an example of it, and the least and the most that it can be, if known.
        assumptions: relations that are taken to hold.
    """

    def __init__(
        self, typical: Mapping[Any, tuple[int, int | None, int | None]], assumptions: Sequence[Any]
    ) -> None:
        self.environment = _Relations(duck_shape=False)
        with nothing_remembered():
            self.mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=self.environment)
        self._typical = {s: sympy.Integer(example) for s, (example, _, _) in typical.items()}
        self._unknown: set[Any] = set()
        self._made: dict[Any, int | torch.SymInt] = {}
        for symbol, (example, least, _) in typical.items():
            self.environment.add_backed_var_to_val(symbol, example)
            self._constrain(symbol, least, None)
        for relation in assumptions:
            if relation.free_symbols <= typical.keys():
                bool(self.environment.create_symboolnode(relation))
        for symbol, (_, least, most) in typical.items():  # what follows from them is no assumption
            self._constrain(symbol, least, most)

    def _constrain(self, symbol: Any, least: int | None, most: int | None) -> None:
        limits: Any = [-int_oo if least is None else least, int_oo if most is None else most]
        self.environment.constrain_symbol_range(
            symbol, compiler_min=limits[0], compiler_max=limits[1]
        )

    def size(self, expression: Any) -> int | torch.SymInt:
        """A size.

        Raises:
            ValueError: it has other symbols, or is no whole number.
        """
        if expression.is_Integer:
            return int(expression)
        if expression not in self._made:
            if not expression.free_symbols <= self._typical.keys() | self._unknown:
                raise ValueError(f"nothing is known of {expression}")
            example = None
            if not expression.free_symbols & self._unknown:
                example = expression.xreplace(self._typical)
                if not example.is_Integer:
                    raise ValueError(f"{expression} is no size")
                example = int(example)
            self._made[expression] = self.environment.create_symintnode(expression, hint=example)
        return self._made[expression]

    def unknown(self) -> Any:
        """A new symbol, of a size that depends on values."""
        size: Any = self.environment.create_unbacked_symint()
        torch._check(size >= 0)
        self.environment.pending_fresh_unbacked_symbols.clear()
        self._unknown.add(size.node.expr)
        return size.node.expr


def decompositions(ops: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """PyTorch's own way of writing ops out in simpler ones, by overload."""
    return dict(get_decompositions(ops))


def storage_of(tensor: torch.Tensor) -> int:
    """What identifies the memory that a tensor lies in, for as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


def size_assumptions(graph_module: fx.GraphModule) -> list[Any]:
    """What capture assumed about sizes when it took one branch of the model's code and not another.

    Each is a sympy relation between the symbols of the graph's sizes. Inequalities (≠) are left
    out: they say that a size is not 0 or 1, which the graph does not depend on. So is what PyTorch
    asks in order to choose a kernel for a convolution.
    """
    environment = fake_mode_of(graph_module).shape_env
    assert environment is not None
    guards = [guard for guard in environment.guards if not _chooses_a_kernel(guard)]
    relations = [_simplified(environment, guard.expr) for guard in guards]
    return [r for r in relations if isinstance(r, sympy.Rel) and not isinstance(r, sympy.Ne)]


def _chooses_a_kernel(guard: Any) -> bool:
    """Whether a guard was made where a convolution's kernel is chosen, not in the model's code."""
    frame = guard.sloc.framework_loc
    return getattr(frame, "name", "") == "conv" and frame.filename.endswith("fake_impls.py")


def _simplified(environment: Any, relation: Any) -> Any:
    """A relation with known sizes put in, as it is where that would divide by zero."""
    try:
        return environment.replace(relation)
    except ZeroDivisionError:
        return relation


def fails(assumption: Any, sizes: Mapping[str, int]) -> bool:
    """Whether sizes, by symbol, contradict an assumption; a size of 1 never does (see above)."""
    symbols = {str(symbol): symbol for symbol in assumption.free_symbols}
    if not symbols.keys() <= sizes.keys() or any(sizes[name] == 1 for name in symbols):
        return False
    try:
        found = assumption.subs({symbol: sizes[n] for n, symbol in symbols.items()})
    except ZeroDivisionError:
        return False
    return bool(found == sympy.false)


def typical_size(
    size: int | torch.SymInt, typical: int, known: Mapping[str, int] | None = None
) -> float:
    """A size as a number.

    Each symbol counts as what it is known to be, or else as `typical`, or as one more than that if
    it would divide by 0.
    """
    if isinstance(size, int):
        return float(size)
    expression = size.node.expr
    given = [(s, known[str(s)]) for s in expression.free_symbols if known and str(s) in known]
    return _number(expression, typical, tuple(given))


@lru_cache(maxsize=4096)
def _number(expression: Any, typical: int, given: tuple[tuple[Any, int], ...]) -> float:
    """An expression with values put in for its symbols: those given, or what is typical."""
    for number in (typical, typical + 1):
        values = {**dict.fromkeys(expression.free_symbols, number), **dict(given)}
        with suppress(ZeroDivisionError):
            return float(expression.xreplace(values))
    return float(typical)


def grows_with(size: int | torch.SymInt, other: torch.SymInt) -> bool | None:
    """Whether a size is a multiple of another; None if it depends on it in another way.

    The other is a symbol of its own.
    """
    symbol = other.node.expr
    if isinstance(size, int) or symbol not in size.node.expr.free_symbols:
        return False
    rest = size.node.expr / symbol
    is_multiple = isinstance(symbol, sympy.Symbol) and symbol not in rest.free_symbols
    return True if is_multiple else None


def symbolic_dispatch() -> AbstractContextManager[Any]:
    """A context in which what ops are made of keeps symbolic sizes, rather than reading numbers."""
    return enable_python_dispatcher()


def composite(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an op is made of others wherever it is differentiated, and has no kernel of its own.

    Not so the questions that PyTorch asks a tensor, as of its device, and ops that run graphs.
    """
    if op.namespace == "prim" or not isinstance(op, torch._ops.OpOverload):
        return False
    return bool(autograd_would_have_decomposed(op, [*args, *kwargs.values()]))


def expression_of(size: int | torch.SymInt | torch.SymFloat | torch.SymBool) -> Any:
    """A size as an expression of sympy's."""
    return sympy.sympify(size) if isinstance(size, int) else size.node.expr


class _Arithmetic(PythonReferenceAnalysis):
    """What sizes are computed with; PyTorch divides whole numbers in expressions of sympy alone."""

    @staticmethod
    def int_truediv(one: Any, other: Any) -> Any:
        return one / other


def example_of(size: int | torch.SymInt) -> int | None:
    """A size in the example; None if it depends on values."""
    example: int | None = size if isinstance(size, int) else size.node.hint
    return example


def example_and_range(size: torch.SymInt) -> tuple[int, int | None, int | None] | None:
    """A size in the example, and the least and the most that it can be, if there are such.

    None if it depends on values.
    """
    example = example_of(size)
    if example is None:
        return None
    least = most = None
    with suppress(ValueRangeError):  # PyTorch does not find bounds of every quotient.
        bounds = size.node.shape_env.bound_sympy(size.node.expr)
        least, most = (int(b) if b.is_Integer else None for b in (bounds.lower, bounds.upper))
    return example, least, most


def new_symbols(mode: FakeTensorMode, result: Any) -> Any:
    """Where in an op's result the sizes are that depend on values; None if there are none.

    Inductor looks for them in a node's `meta["unbacked_bindings"]`.
    """
    return compute_unbacked_bindings(mode.shape_env, result)


def with_values(expression: Any, values: Mapping[Any, Any]) -> Any:
    """An expression with values put in for its symbols: anything that has Python's operators."""
    return sympy_interp(_Arithmetic, dict(values), expression)


def inductor(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph of ATen ops with Inductor, dynamic where its placeholders are symbolic."""
    with torch.no_grad(), unlike_symbols(), _mended_lowerings(inputs):
        return standalone_compile(graph_module, list(inputs), dynamic_shapes="from_graph")


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """How Inductor has ops written out that it has no lowering for, by overload."""
    import_module("torch._inductor.lowering")  # Some of them look for it, none imports it.
    from torch._inductor.decomposition import select_decomp_table  # It takes a second.

    table: Mapping[Any, Callable[..., Any]] = select_decomp_table()
    return table


_MENDED = "attnlrp_fx 2"
"""What tells apart, in Inductor's cache, what was compiled with other mends."""


@contextmanager
def _mended_lowerings(inputs: Sequence[Any]) -> Iterator[None]:
    """Have PyTorch's own kernels for what Inductor, of a graph with such inputs, compiles wrong.

    - A convolution's derivative, since torch 2.13: it takes the example's sizes for the only ones.
    - On CPUs, what adds up elements by their indices (torch 2.13). With one thread some sums are
      wrong, as UPerNet's in the zoo; why is not known. With more, it cannot write a kernel where
      all indices are one, as in a map of one pixel.
    """
    lowering: Any = import_module("torch._inductor.lowering")  # It takes a second.
    settings: Any = torch.compiler.config
    convolution_backward = torch.ops.aten.convolution_backward.default
    called = {
        convolution_backward: lowering.fallback_handler(
            convolution_backward, add_to_fallback_set=False
        )
    }
    falls_back = lowering.use_scatter_fallback
    tag = f"{settings.cache_key_tag} {_MENDED}"
    with ExitStack() as stack:
        stack.enter_context(patch.dict(lowering.lowerings, called))
        stack.enter_context(settings.patch(cache_key_tag=tag))
        if not any(isinstance(v, Tensor) and v.device.type != "cpu" for v in inputs):
            for name, mended in {
                "needs_fallback_due_to_atomic_add_limitations": lambda dtype: True,
                "use_scatter_fallback": lambda op, reduction, *given: (
                    reduction is not None or falls_back(op, reduction, *given)
                ),
            }.items():
                stack.enter_context(patch.object(lowering, name, mended))
        yield


_GRAPHS = count()
"""Numbers that tell graphs apart where Inductor records them for CUDA."""


def inductor_lowered(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """Compile a graph that is functional, and written out, and runs no other graph.

    Args:
        graph_module: it; its outputs are laid out as its metadata says.
    """
    from torch._inductor.compile_fx import (  # It takes a second, all of it.
        compile_fx_forward,
        compile_fx_inner,
    )
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V

    mode = fake_mode_of(graph_module)
    inputs = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    (output,) = graph_module.graph.find_nodes(op="output")
    # What convolutions make it lays out as it likes, and with it the views of that.
    returns_views = any(
        value._is_view()
        for value in fx.map_arg(output.args[0], lambda node: node.meta["val"])
        if isinstance(value, Tensor)
    )
    is_free = inductor_config.layout_optimization and not returns_views
    extra: Any = SimpleNamespace(
        cudagraphs=BoxedBool(inductor_config.triton.cudagraphs),
        graph_id=next(_GRAPHS),
        forward_device=BoxedDeviceIndex(None),
    )
    with ExitStack() as stack:
        for context in (
            torch.no_grad(),
            unlike_symbols(),
            tracing(TracingContext(mode)),
            V.set_fake_mode(mode),
            _mended_lowerings(inputs),
            inductor_config.patch(layout_optimization=is_free),
            enable_python_dispatcher(),
        ):
            stack.enter_context(context)
        compiled = compile_fx_forward(
            graph_module,
            inputs,
            num_orig_model_outputs=len(output.args[0]),
            num_example_inputs=len(inputs),
            compiler_config_extra=extra,
            inner_compile=partial(compile_fx_inner, cpp_wrapper=inductor_config.cpp_wrapper),
            is_inference=True,
        )
    return lambda *arguments: compiled(list(arguments))


@contextmanager
def kernels_meanwhile() -> Iterator[None]:
    """Inductor takes the next graph while the last one's kernels are compiled by its processes.

    They are ready when the context ends, by an error too: PyTorch remembers what it has made. In
    other threads it waits for them.
    """
    from torch._inductor.async_compile import AsyncCompile

    patched: Any = AsyncCompile
    wait, here = AsyncCompile.wait, threading.get_ident()
    with ExitStack() as waiting:

        def later(self: Any, scope: dict[str, Any]) -> None:
            if threading.get_ident() == here:
                waiting.callback(wait, self, scope)
            else:
                wait(self, scope)

        patched.wait = later
        try:
            yield
        finally:
            patched.wait = wait
