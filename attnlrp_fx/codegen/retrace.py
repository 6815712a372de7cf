"""Programs traced once more for a compiler: in simpler ops, and in symbols of their own.

A program's sizes are told in the symbols of the model's. Inductor reads symbols off its inputs, and
cannot where they have no such dimension, as when convolutions left what is made of one; and of what
is rounded, as the number of chunks of a text, it does not know much after a long time. So here each
size of an input is a symbol or a polynomial in such, and what is rounded is a symbol, too: a size
that a program takes as one more input.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from attnlrp_fx.codegen.fakes import order_of
from attnlrp_fx.codegen.sizes import Sizes, UnreadableSize
from attnlrp_fx.codegen.trace import Input, Trace
from attnlrp_fx.graph.operators import outputs_of, placeholders_of
from attnlrp_fx.torch_private import (
    SymbolicSizes,
    example_and_range,
    expression_of,
    lazy_graph_module,
    nothing_remembered,
)


class Retraced(NamedTuple):
    """A program for a compiler."""

    program: fx.GraphModule
    """It takes what it was made of took, and then the sizes."""
    sizes: fx.GraphModule | None
    """Computes them from what the program was made of takes; None if there are none."""


def retraced(program: fx.GraphModule, parts: Mapping[Any, Callable[..., Any]]) -> Retraced:
    """A traced program with ops written out in others, and symbols of its own.

    Args:
        program: it is left as it is. What it returns is laid out as before.
        parts: how to write ops out, by overload.
    """
    placeholders = placeholders_of(program)
    own = _Own(program)
    with nothing_remembered(own.sizes.mode), own.sizes.mode, torch.no_grad():
        values = [own.like(node.meta["val"]) for node in placeholders]
        given = [Input("input", n.name, v) for n, v in zip(placeholders, values, strict=True)]
        rounded = [Input("input", "size", size) for size in own.computed()]
        trace = Trace([*given, *rounded], parts, own.sizes.mode)
        with trace.recording():
            found = _Interpreter(program, own).run(*values)
            expected = fx.map_arg(outputs_of(program.graph), lambda node: node.meta["val"])
            results = [_laid_out(*pair) for pair in zip(found, expected, strict=True)]
    return Retraced(trace.graph_module(results), own.computing())


class _Own:
    """A program's sizes in symbols of its own.

    Attributes:
        sizes: of such symbols.
    """

    def __init__(self, program: fx.GraphModule) -> None:
        self._graph = fx.Graph()
        values = [node.meta["val"] for node in placeholders_of(program)]
        for i, value in enumerate(values):
            self._graph.placeholder(f"x{i}").meta = {"val": value, "part": "input"}
        self._outside = Sizes(self._graph)
        self._known: dict[Any, Any] = {}
        """By expression what it is in new symbols; None if that is not known before it runs."""
        self._examples: dict[Any, tuple[int, int | None, int | None]] = {}
        self._unknown: list[Any] = []
        self._computed: dict[Any, fx.Node] = {}
        """By symbol the node that computes it outside."""
        tensors = [value for value in values if isinstance(value, Tensor)]
        dims = [size for value in tensors for size in value.shape]
        sizes: list[Any] = [*(value for value in values if isinstance(value, torch.SymInt)), *dims]
        for size in sorted(sizes, key=lambda size: not expression_of(size).is_Symbol):
            self._take(size)
        for size in (size for value in tensors for size in value.stride()):
            self._told(expression_of(size))
        for node in program.graph.nodes:
            if isinstance(size := node.meta.get("val"), torch.SymInt):
                self._told(expression_of(size))
        self.sizes = SymbolicSizes(self._examples, [])
        self._names = {symbol: self.sizes.unknown() for symbol in self._unknown}

    def size(self, size: Any) -> Any:
        """A size of the program in new symbols; None if it is not known before it runs."""
        expression = self._told(expression_of(size))
        return None if expression is None else self.sizes.size(expression.xreplace(self._names))

    def like(self, value: Any) -> Any:
        """A fake tensor like another of the program's inputs, or a size like another."""
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if not isinstance(value, Tensor):
            return value
        shape, strides = list(map(self.size, value.shape)), list(map(self.size, value.stride()))
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)

    def computed(self) -> list[Any]:
        """The sizes that a program takes as inputs."""
        return [self.sizes.size(symbol.xreplace(self._names)) for symbol in self._computed]

    def computing(self) -> fx.GraphModule | None:
        """What computes them."""
        if not self._computed:
            return None
        self._graph.output(list(self._computed.values()))
        return lazy_graph_module({}, self._graph)

    def _take(self, size: Any) -> None:
        """Let a size of an input be a polynomial in those before it, or else a new symbol."""
        expression = expression_of(size)
        if expression in self._known:
            return
        symbols = expression.free_symbols
        is_polynomial = not expression.is_Symbol and not expression.atoms(sympy.Function)
        if is_polynomial and symbols <= self._known.keys():
            self._known[expression] = expression.xreplace(self._known)
        else:
            self._known[expression] = self._symbol(size)

    def _told(self, expression: Any) -> Any:
        if expression not in self._known:
            if isinstance(expression, sympy.Add | sympy.Mul) or expression.is_Pow:
                parts = list(map(self._told, expression.args))
                is_told = all(part is not None for part in parts)
                self._known[expression] = expression.func(*parts) if is_told else None
            elif expression.is_Number:
                self._known[expression] = expression
            else:
                self._known[expression] = self._rounded(expression)
        return self._known[expression]

    def _rounded(self, expression: Any) -> Any:
        """A symbol for what is computed outside."""
        try:
            node = self._outside.made(expression)
        except UnreadableSize:
            return None
        symbol = self._symbol(node.meta["val"])
        self._computed[symbol] = node
        return symbol

    def _symbol(self, size: Any) -> Any:
        found = example_and_range(size)
        if found is None:
            symbol = sympy.Dummy("unknown", integer=True)
            self._unknown.append(symbol)
            return symbol
        least = found[1]
        is_known = (
            {} if least is None or least < 0 else {"positive" if least else "nonnegative": True}
        )
        symbol = sympy.Symbol(f"s{len(self._examples)}", integer=True, **is_known)
        self._examples[symbol] = found
        return symbol


class _Interpreter(fx.Interpreter):
    """Runs a program, its sizes told in new symbols where they can be."""

    def __init__(self, program: fx.GraphModule, own: _Own) -> None:
        super().__init__(program)
        self._own = own

    def run_node(self, n: fx.Node) -> Any:
        size = n.meta.get("val")
        if isinstance(size, torch.SymInt) and n.op == "call_function":
            told = self._own.size(size)
            if told is not None:
                return told
        return super().run_node(n)


def _laid_out(value: Any, like: Any) -> Any:
    """A value with its dimensions in the order of another of its shape, copied if need be."""
    if not isinstance(value, Tensor):
        return value
    order = order_of(like)
    if order is None or order_of(value) == order:
        return value
    copy = value.permute(order).clone(memory_format=torch.contiguous_format)
    return copy.permute([order.index(dim) for dim in range(value.dim())])
