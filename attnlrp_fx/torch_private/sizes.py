"""Sizes made of symbols.

- `SymbolicSizes`, `SIZE_FUNCTIONS`: fake values with symbolic sizes, of a graph that was saved, and
  the functions that PyTorch writes such sizes with.
- `size_assumptions`, `fails`: the branches that capture took by size; `torch.export` would check
  them at run time only in the calling convention that a rewritten graph no longer has.
- `typical_size`, `grows_with`: what a symbolic size would be, and whether it is a multiple of
  another, from their expressions.
- `expression_of`, `with_values`: sizes by their expressions, which a traced graph computes.
- `example_of`, `example_and_range`: what is known of a size before a program runs.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, wraps
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions as size_functions
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.reference import PythonReferenceAnalysis
from torch.utils._sympy.value_ranges import ValueRangeError

from attnlrp_fx.torch_private.fake_tensors import fake_mode_of
from attnlrp_fx.torch_private.tracing import nothing_remembered

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


def with_values(expression: Any, values: Mapping[Any, Any]) -> Any:
    """An expression with values put in for its symbols: anything that has Python's operators."""
    return sympy_interp(_Arithmetic, dict(values), expression)
