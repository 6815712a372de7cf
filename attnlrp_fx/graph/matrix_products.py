"""Batched matrix products in one form, whether they are written as matmul, bmm, baddbmm or einsum.

    scores = query · keyᵀ      (batch..., rows, features) and (batch..., columns, features)
    result = weights · value   (batch..., rows, columns) and (batch..., columns, features)

An operand is a tensor and the order of its dimensions that brings it to this form. Where it has
just been transposed, it is the tensor from before that.
"""

from dataclasses import dataclass
from typing import Any, cast

from torch import fx

from attnlrp_fx.graph.operators import is_op, leaves


class NearMiss(Exception):
    """Why a graph almost has the form that is looked for."""


@dataclass(frozen=True)
class Operand:
    """A tensor, and the order of its dimensions that brings it to (batch..., rows, features)."""

    node: fx.Node
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[str, ...]:
        return tuple(shape_of(self.node)[d] for d in self.order)


def shape_of(node: Any) -> tuple[str, ...]:
    """Sizes as text: equal text is equal size for every input, and comparing adds no guard."""
    return tuple(map(str, node.meta["val"].shape))


def query_and_key(node: fx.Node) -> tuple[Operand, Operand]:
    """Query and key of scores (batch..., query rows, key rows)."""
    if not is_op(node, "einsum"):
        first, second = node.args[1:3] if is_op(node, "baddbmm") else node.args[:2]
        *batch, rows, columns = _straight(second).order
        return _straight(first), _untransposed(_straight(second, (*batch, columns, rows)))
    left, right, out = _factors(node)
    outer, row, column = out[:-2], out[-2], out[-1]
    if row not in left.letters:
        left, right = right, left
    (summed,) = set(left.letters) & set(right.letters) - set(out)
    query, key = left.ordered(outer + row + summed), right.ordered(outer + column + summed)
    if query is None or key is None:
        raise NearMiss(f"'{node.name}' does not order its scores as (batch, query, key)")
    return query, _untransposed(key)


def value_of(node: fx.Node, weights: fx.Node) -> tuple[Operand, tuple[int, ...]]:
    """The value of a product with weights, and the order of the product's dimensions."""
    if not is_op(node, "einsum"):
        return _straight(node.args[1]), _straight(node).order
    left, right, out = _factors(node)
    if left.node is not weights:
        left, right = right, left
    outer, row, summed = left.letters[:-2], left.letters[-2], left.letters[-1]
    feature = "".join(set(out) - set(left.letters))
    value = right.ordered(outer + summed + feature)
    if value is None or sorted(out) != sorted(outer + row + feature):
        raise NearMiss(f"'{node.name}' is no product of weights (batch, query, key) and value")
    return value, tuple((outer + row + feature).index(letter) for letter in out)


@dataclass(frozen=True)
class _Factor:
    """A factor of an einsum."""

    node: fx.Node
    letters: str

    def ordered(self, wanted: str) -> Operand | None:
        """The factor with its dimensions in the wanted order, None if it has others."""
        if sorted(self.letters) != sorted(wanted):
            return None
        return Operand(self.node, tuple(self.letters.index(letter) for letter in wanted))


def _factors(node: fx.Node) -> tuple[_Factor, _Factor, str]:
    """The factors of an einsum that is a batched matrix product, and its output's letters."""
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    factors = [_Factor(*pair) for pair in zip(leaves(node.args[1]), inputs.split(","), strict=True)]
    repeated = any(len(set(word)) < len(word) for word in (*inputs.split(","), out))
    if len(factors) != 2 or not arrow or "." in equation or repeated or len(out) < 2:
        raise NearMiss(f"'{node.name}' is no plain product of two factors: '{equation}'")
    left, right = factors
    if len(set(left.letters) & set(right.letters) - set(out)) != 1:
        raise NearMiss(f"'{node.name}' does not sum over one index: '{equation}'")
    return left, right, out


def _straight(node: Any, order: tuple[int, ...] | None = None) -> Operand:
    """A tensor as it is, or in another order."""
    return Operand(node, order or tuple(range(node.meta["val"].dim())))


def _untransposed(operand: Operand) -> Operand:
    """The same tensor taken from before the transpositions that its order undoes."""
    node, order = operand.node, operand.order
    while order != tuple(range(len(order))) and is_op(node, "transpose", "permute"):
        rank = len(order)
        before, *dims = cast("list[Any]", node.args)
        if is_op(node, "permute"):
            moved = [d % rank for d in dims[0]]
        else:
            i, j = (d % rank for d in dims)
            moved = list(range(rank))
            moved[i], moved[j] = j, i
        node, order = before, tuple(moved[d] for d in order)
    return Operand(node, order)
