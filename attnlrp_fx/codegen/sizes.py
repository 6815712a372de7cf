"""Sizes of a graph that is being traced: each is read off an input or computed from such, once.

Tracing knows a size by its expression. Most symbols of it are a dimension of an input. A region may
have inputs whose dimensions are made of a symbol that is none itself, as a length that convolutions
left: what other sizes have in common with those is solved for.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from attnlrp_fx.graph.operators import aten
from attnlrp_fx.torch_private import expression_of, solved_for, with_values

Symbolic = torch.SymInt | torch.SymFloat | torch.SymBool

STEPS = 4
"""How many parts of one size are solved for at most."""


class Place(NamedTuple):
    """Where a size can be read."""

    node: fx.Node
    dim: int | None = None
    """None: the node is the size itself."""


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
        self._places = _places(node for node in placeholders if node not in self._seeds)

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
        if expression in self._places:
            return self._read(self._places[expression])
        formula, places = self._formula(expression)
        values = {
            symbol: fx.Proxy(self._at(symbol, places[symbol]), self._tracer)
            for symbol in sorted(formula.free_symbols, key=str)
        }
        found: fx.Node = with_values(formula, values).node
        for node in _without_value(found):
            args = fx.node.map_arg(node.args, lambda leaf: leaf.meta["val"])
            node.meta["val"] = node.target(*args)  # type: ignore[operator]
        return found

    def _formula(self, expression: Any) -> tuple[Any, Mapping[Any, Place]]:
        """A size as a formula of such that can be read, and where each is."""
        nodes = {e: Place(n) for e, n in self._known.items() if isinstance(n, fx.Node)}
        places = {**self._places, **nodes}
        formula = _solved(expression, places)
        if formula is None:  # Of values in between, and anew: some symbols have become others.
            others = [node for node in self._graph.nodes if node not in self._seeds]
            places = {**_places([*others, *self._seeds]), **nodes}
            formula = _solved(expression, places)
        if formula is None:
            raise ValueError(f"no input has a size that {expression} follows from")
        return formula, places

    def _at(self, symbol: Any, place: Place) -> fx.Node:
        """The node of a symbol that can be read."""
        if symbol not in self._known:
            self._known[symbol] = self._read(place)
        node = self._known[symbol]
        assert isinstance(node, fx.Node)
        return node

    def _read(self, place: Place) -> fx.Node:
        """A node that reads a size off a value."""
        node, dim = place
        if dim is None:
            return node
        size = node.meta["val"].shape[dim]
        known = self._known.get(expression_of(size))
        if isinstance(known, fx.Node):
            return known
        with self._graph.inserting_after(self._last if node.op == "placeholder" else node):
            read = self._graph.call_function(aten.sym_size.int, (node, dim))
        read.meta["val"] = size
        self.know(size, read)
        return read


def _solved(expression: Any, places: dict[Any, Place], steps: int = STEPS) -> Any:
    """An expression without symbols that cannot be read; None if that fails.

    What stands for a whole that a part was solved from is added to the places.
    """
    missing = {symbol for symbol in expression.free_symbols if symbol not in places}
    if not missing:
        return expression
    wholes = [item for item in places.items() if item[0].free_symbols & missing]
    for part in _parts(expression, missing) if steps else ():
        for whole, place in wholes:
            solution = solved_for(whole, part) if whole.has(part) else None
            if solution is None:
                continue
            symbol, formula = solution
            places[symbol] = place
            changed = sympy.expand(expression.xreplace({part: formula}))
            found = _solved(changed, places, steps - 1)
            if found is not None:
                return found
    return None


def _parts(expression: Any, missing: set[Any]) -> list[Any]:
    """The symbols that are missing, and what is rounded and made of them; the largest first."""
    parts = dict.fromkeys(sympy.preorder_traversal(expression))
    return [
        part
        for part in parts
        if part in missing or (isinstance(part, sympy.Function) and part.free_symbols & missing)
    ]


def _places(nodes: Iterable[fx.Node]) -> dict[Any, Place]:
    """By the expression of a symbolic size the first place where it can be read.

    A tensor's rather than an input that is a size: Inductor does not know whose that is.
    """
    found: dict[Any, Place] = {}
    sizes: dict[Any, Place] = {}
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            sizes.setdefault(expression_of(value), Place(node))
        for dim, size in enumerate(getattr(value, "shape", ())):
            if isinstance(size, torch.SymInt):
                found.setdefault(expression_of(size), Place(node, dim))
    return {**sizes, **found}


def _without_value(node: fx.Node) -> Iterator[fx.Node]:
    """A node and what it is made of, in order, as far as it has no value yet."""
    if "val" not in node.meta:
        for leaf in node.all_input_nodes:
            yield from _without_value(leaf)
        yield node
