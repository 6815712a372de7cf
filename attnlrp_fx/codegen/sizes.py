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

from attnlrp_fx.errors import RuleError
from attnlrp_fx.graph.operators import aten
from attnlrp_fx.torch_private import SIZE_FUNCTIONS, expression_of, with_values


class UnreadableSize(RuleError):
    """A size does not follow from those of a graph's inputs, as far as we can see."""


Symbolic = torch.SymInt | torch.SymFloat | torch.SymBool


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
        self._known: dict[Any, fx.Node] = {}
        self._places = _places(node for node in placeholders if node not in self._seeds)

    def know(self, size: Any, node: fx.Node) -> None:
        """A node that has a size's value."""
        self._known.setdefault(expression_of(size), node)

    def node(self, size: Symbolic) -> fx.Node | int | float | bool:
        """What stands in the graph for a size: a node, or the number that it always is.

        Raises:
            UnreadableSize: no value has a size that it could be computed from.
        """
        expression = expression_of(size)
        if not expression.free_symbols:
            if isinstance(size, torch.SymInt):
                return int(size)
            return float(size) if isinstance(size, torch.SymFloat) else bool(size)
        return self.made(expression)

    def made(self, expression: Any) -> fx.Node:
        """A node for a size, by an expression that has symbols.

        Raises:
            UnreadableSize: as above.
        """
        if expression not in self._known:
            self._known[expression] = self._made(expression)
        return self._known[expression]

    def _made(self, expression: Any) -> fx.Node:
        if expression in self._places:
            return self._read(self._places[expression])
        formula, places = self._formula(expression)
        values = {
            symbol: fx.Proxy(self._read(places[symbol]), self._tracer)
            for symbol in sorted(formula.free_symbols, key=str)
        }
        found: fx.Node = with_values(formula, values).node
        for node in _without_value(found):
            args = fx.node.map_arg(node.args, lambda leaf: leaf.meta["val"])
            node.meta["val"] = node.target(*args)  # type: ignore[operator]  # a function of sizes
        return found

    def _formula(self, expression: Any) -> tuple[Any, Mapping[Any, Place]]:
        """A size as a formula of such that can be read, and where each is."""
        nodes = {e: Place(n) for e, n in self._known.items()}
        places = {**self._places, **nodes}
        formula = _solved(expression, places)
        if formula is None:  # Of values in between, and anew: some symbols have become others.
            others = [node for node in self._graph.nodes if node not in self._seeds]
            places = {**_places([*others, *self._seeds]), **nodes}
            formula = _solved(expression, places)
        if formula is None:
            raise UnreadableSize(
                f"no input of a program has a size that {expression} follows from",
                remedy="report this with the model's config",
            )
        return formula, places

    def _read(self, place: Place) -> fx.Node:
        """A node that reads a size off a value."""
        node, dim = place
        if dim is None:
            return node
        size = node.meta["val"].shape[dim]
        known = self._known.get(expression_of(size))
        if known is not None:
            return known
        with self._graph.inserting_after(self._last if node.op == "placeholder" else node):
            read = self._graph.call_function(aten.sym_size.int, (node, dim))
        read.meta["val"] = size
        self.know(size, read)
        return read


def _solved(expression: Any, places: dict[Any, Place]) -> Any:
    """An expression without symbols that cannot be read; None if it has no such form.

    What stands for the wholes that it is then made of is added to the places.
    """
    missing = {symbol for symbol in expression.free_symbols if symbol not in places}
    if not missing:
        return expression
    if (rounded := _of_solved_parts(expression, places)) is not None:
        return rounded
    wholes = {sympy.Dummy("whole", integer=True): w for w in places if w.free_symbols & missing}
    found = _reduced(expression, wholes, places)
    if found is not None:
        places |= {symbol: places[whole] for symbol, whole in wholes.items()}
    return found


def _of_solved_parts(expression: Any, places: dict[Any, Place]) -> Any:
    """The same of what is rounded, if what it is made of can be read; of a polynomial, None."""
    if isinstance(expression, sympy.Add | sympy.Mul | sympy.Symbol):
        return None
    parts = [_solved(part, places) for part in expression.args]
    return None if any(part is None for part in parts) else expression.func(*parts)


def _reduced(expression: Any, wholes: Mapping[Any, Any], places: dict[Any, Place]) -> Any:
    """An expression as a quotient of polynomials in what can be read, wholes by their symbols.

    It is divided by what the wholes say, in the unknowns: symbols, and what is rounded.
    """
    unknowns: dict[Any, Any] = {}

    def polynomial(part: Any, is_wanted: bool) -> Any:
        if part.free_symbols <= places.keys():
            return part
        if isinstance(part, sympy.Add | sympy.Mul):
            return part.func(*(polynomial(term, is_wanted) for term in part.args))
        if is_wanted and (rounded := _of_solved_parts(part, places)) is not None:
            return rounded
        return unknowns.setdefault(part, sympy.Dummy("unknown", integer=True))

    wanted = polynomial(expression, True)
    relations = [polynomial(whole, False) - symbol for symbol, whole in wholes.items()]
    if not relations:
        return None
    try:
        rest = sympy.reduced(wanted, relations, *unknowns.values(), order="lex")[1]
    except sympy.PolynomialError:
        return None
    if rest.free_symbols & set(unknowns.values()):
        return None
    numerator, denominator = sympy.fraction(sympy.together(rest))
    quotient = SIZE_FUNCTIONS["FloorDiv"]
    return numerator if denominator == 1 else quotient(numerator, denominator)


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
