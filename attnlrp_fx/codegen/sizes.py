"""Sizes of a graph that is being traced: each is read off an input or computed from such, once.

Tracing knows a size by its expression. Most symbols are a dimension of an input; one that is not
is a dimension of a value whose size is found when the program runs (of `nonzero`), or what an
input's dimension is made of, and is solved for.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from attnlrp_fx.graph.operators import aten
from attnlrp_fx.torch_private import expression_of, solved_for, with_values

Symbolic = torch.SymInt | torch.SymFloat | torch.SymBool


class Sizes:
    """Nodes for the sizes that a graph's ops are called with.

    Args:
        graph: its placeholders are there already; their `meta["part"]` says which are seeds, whose
            sizes are read where nothing else has them.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._tracer = fx.proxy.GraphAppendingTracer(graph)
        placeholders = graph.find_nodes(op="placeholder")
        self._last = placeholders[-1]
        self._seeds = [node for node in placeholders if node.meta["part"] == "seed"]
        self._known: dict[Any, fx.Node | int | float | bool] = {}
        inputs = [node for node in placeholders if node.meta["part"] != "seed"]
        self._readable = _dimensions(inputs)
        for node in inputs:  # Inductor does not know that such an input is the size of another.
            size = node.meta["val"]
            if isinstance(size, torch.SymInt) and expression_of(size) not in self._readable:
                self.know(size, node)

    def know(self, size: Any, node: fx.Node) -> None:
        """A node that has a size's value."""
        self._known.setdefault(expression_of(size), node)

    def node(self, size: Symbolic) -> fx.Node | int | float | bool:
        """What stands in the graph for a size: a node, or the number that it always is.

        Raises:
            ValueError: no value has a size that it could be computed from.
        """
        expression = expression_of(size)
        if expression not in self._known:
            self._known[expression] = self._made(size, expression)
        return self._known[expression]

    def _made(self, size: Symbolic, expression: Any) -> fx.Node | int | float | bool:
        if not expression.free_symbols:
            if isinstance(size, torch.SymInt):
                return int(size)
            return float(size) if isinstance(size, torch.SymFloat) else bool(size)
        if expression in self._readable:
            return self._read(*self._readable[expression])
        return self._computed(expression)

    def _computed(self, expression: Any) -> fx.Node:
        """Nodes that compute an expression of symbols."""
        values = {
            symbol: fx.Proxy(self._of_symbol(symbol), self._tracer)
            for symbol in sorted(expression.free_symbols, key=str)
        }
        found: fx.Node = with_values(expression, values).node
        for node in _without_value(found):
            args = fx.node.map_arg(node.args, lambda leaf: leaf.meta["val"])
            node.meta["val"] = node.target(*args)  # type: ignore[operator]
        return found

    def _of_symbol(self, symbol: Any) -> fx.Node:
        """The node of one symbol."""
        if symbol not in self._known:
            self._known[symbol] = self._found(symbol)
        node = self._known[symbol]
        assert isinstance(node, fx.Node)
        return node

    def _found(self, symbol: Any) -> fx.Node:
        if symbol in self._readable:
            return self._read(*self._readable[symbol])
        others = [node for node in self._graph.nodes if node not in self._seeds]
        dimensions = _dimensions([*others, *self._seeds])  # anew: some symbols became others
        if symbol in dimensions:
            return self._read(*dimensions[symbol])
        for expression, place in dimensions.items():
            others = expression.free_symbols - {symbol}
            if symbol in expression.free_symbols and others <= self._known.keys():
                solution = solved_for(expression, symbol)
                if solution is not None:
                    whole, formula = solution
                    self._known[whole] = self._read(*place)
                    return self._computed(formula)
        raise ValueError(f"no input has a size that {symbol} follows from")

    def _read(self, node: fx.Node, dim: int) -> fx.Node:
        """A node that reads a size off a value."""
        with self._graph.inserting_after(self._last if node.op == "placeholder" else node):
            read = self._graph.call_function(aten.sym_size.int, (node, dim))
        read.meta["val"] = node.meta["val"].shape[dim]
        return read


def _without_value(node: fx.Node) -> Iterator[fx.Node]:
    """A node and what it is made of, in order, as far as it has no value yet."""
    if "val" not in node.meta:
        for leaf in node.all_input_nodes:
            yield from _without_value(leaf)
        yield node


def _dimensions(nodes: Iterable[fx.Node]) -> dict[Any, tuple[fx.Node, int]]:
    """By the expression of a symbolic size where it can be read; the first place of each."""
    found: dict[Any, tuple[fx.Node, int]] = {}
    for node in nodes:
        for dim, size in enumerate(getattr(node.meta.get("val"), "shape", ())):
            if isinstance(size, torch.SymInt):
                found.setdefault(expression_of(size), (node, dim))
    return found
