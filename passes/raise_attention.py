"""Raise attention written out in parts to one scaled dot-product attention.

    s = matmul(q, kᵀ)                             →  y = scaled_dot_product_attention(
    s = ops(s)                                            q, k, v, attn_mask=b, scale=c)
    y = matmul(softmax(s, -1), v)

Both products are read in one form, whether they are written as matmul, bmm, baddbmm or einsum.
The ops between them are replayed on the scale c and on a bias b, so that s = c·qkᵀ + b throughout:

    s · t, s / t           c·t, or q·t for a tensor;  b·t
    s + m                  b + m
    where(keep, s, f)      where(keep, b, f)          f ≤ −10⁴ masks: −∞ stays, else the least value
    max(s, f)              max(b, f)                  f as before
    view of the batch      view of q, k, b
    casts                  nothing

The least value of the dtype swallows any score, so that a row masked throughout stays uniform.

The rules of the parts and of the whole give the same relevance; the whole runs on a fused kernel.
Only in a row that is masked throughout by a finite fill does the whole let relevance through to
query and key where the parts do not. A bias that is explained, a cap on the scores, a column that
only the softmax sees, and scores or weights that are used elsewhere too leave the parts as they
are.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.analysis import explained_values
from attnlrp_fx.operators import aten, is_cast, is_op, is_structural, leaves
from attnlrp_fx.passes.base import PassContext, PassResult, finish, inherit, replace

MASKED = -1e4
"""A score at or below this one is meant to get no weight."""
STEPS = ("mul", "div", "add", "where", "masked_fill", "maximum", "max", "clamp_min", "clamp")
"""Ops that may stand between the scores and their softmax, beside casts and views."""
FUSED_RANK = 4
"""The fused kernels take (batch, heads, rows, features)."""


class _NearMiss(Exception):
    """Why something that looks like attention is left in its parts."""


def raise_attention(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace every written-out attention by the fused op."""
    result = PassResult("raise_attention")
    explained = explained_values(graph_module.graph)
    for node in list(graph_module.graph.nodes):
        weights = _weights(node) if node in explained else None
        if weights not in explained:
            continue
        try:
            written = _read(node, weights, explained)
        except _NearMiss as reason:
            result.miss(node, str(reason))
            continue
        new = _Writer(graph_module.graph, node, result.name).write(written)
        replace(node, new, result.name)
        explained.add(new)
        result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


@dataclass(frozen=True)
class _Operand:
    """A tensor, and the order of its dimensions that brings it to (batch..., rows, features)."""

    node: fx.Node
    order: tuple[int, ...]

    @property
    def shape(self) -> tuple[str, ...]:
        return tuple(_shape(self.node)[d] for d in self.order)


@dataclass(frozen=True)
class _Step:
    """One op between the products: what it does to scale, bias and batch, and with what."""

    does: str
    """"times", "over", "plus", "keep", "fill", "floor", "unfold"."""
    operand: Any
    """A number or a constant; for "keep" and "fill" the condition; for "unfold" the sizes."""
    value: float = 1.0
    """What masked scores are filled with; the factor of a constant that is added."""


@dataclass(frozen=True)
class _Written:
    """An attention as it was written: softmax(steps(query · keyᵀ)) · value."""

    query: _Operand
    key: _Operand
    value: _Operand
    steps: tuple[_Step, ...]
    out: tuple[int, ...]
    """The order of the result's dimensions, out of (batch..., query rows, value features)."""


# Reading: from the second product back to the first.


def _weights(node: fx.Node) -> fx.Node | None:
    """The factor of a product that is a softmax, views and the like apart; None if none is."""
    if is_op(node, "einsum"):
        factors = list(leaves(node.args[1]))
    else:
        factors = list(leaves(node.args[:1])) if is_op(node, "matmul", "bmm") else []
    for factor in factors:
        producer: Any = factor
        while is_structural(producer) or is_op(producer, *STEPS):
            producer = next(leaves(producer.args))
        if is_op(producer, "softmax", "_softmax"):
            return factor
    return None


def _read(node: fx.Node, weights: fx.Node, explained: Set[fx.Node]) -> _Written:
    """The attention that ends in a product of weights and value."""
    value, out = _value(node, weights)
    chain = _chain(weights, explained)
    query, key = _query_and_key(chain[0])
    if query.shape[:-2] != key.shape[:-2] or value.shape[:-2] != _shape(weights)[:-2]:
        raise _NearMiss("query, key and value have unlike batches")
    query, key = (_in_dtype(operand, value.node) for operand in (query, key))
    dtype = query.node.meta["val"].dtype
    steps = _product_steps(chain[0], explained)
    shape, folded = _shape(chain[0]), False
    for before, after in pairwise(chain):
        if is_op(after, "softmax", "_softmax") or is_cast(after):
            continue
        if is_op(after, "view", "_unsafe_view", "reshape"):
            folded, shape, step = _batch_step(before, after, folded, shape, steps)
            steps += [step] if step else []
            continue
        if _shape(after) != _shape(before):
            raise _NearMiss(f"'{after.name}' enlarges the scores")
        steps.append(_step(after, before, dtype))
        operand = steps[-1].operand
        if folded and isinstance(operand, fx.Node) and operand.meta["val"].dim() > 2:
            raise _NearMiss(f"'{after.name}' masks scores whose batch is folded")
    return _Written(query, key, value, tuple(steps), out)


def _chain(weights: fx.Node, explained: Set[fx.Node]) -> list[fx.Node]:
    """The nodes from the product of query and key to the weights, in order."""
    chain = [weights]
    softmaxes = 0
    while not is_op(chain[-1], "matmul", "bmm", "baddbmm", "einsum"):
        node = chain[-1]
        if is_op(node, "softmax", "_softmax"):
            softmaxes += 1
            if node.args[1] not in (-1, node.meta["val"].dim() - 1):
                raise _NearMiss("the softmax is not over the last dimension")
        elif not softmaxes and not _keeps_scores(node):
            raise _NearMiss(f"the weights are not the whole softmax, but its '{node.name}'")
        elif softmaxes > 1 or not (_keeps_scores(node) or is_op(node, *STEPS)):
            raise _NearMiss(
                f"the scores come from '{node.name}', not from a product of query and key"
            )
        sources = [leaf for leaf in _inputs(node) if leaf in explained]
        if len(sources) != 1:
            raise _NearMiss(
                f"'{node.name}' combines explained values: what it adds is not a constant mask"
            )
        chain.append(sources[0])
    for node in chain:
        if sum(node in _inputs(user) for user in node.users) > 1:
            raise _NearMiss(f"'{node.name}' is used elsewhere too")
    return chain[::-1]


def _inputs(node: fx.Node) -> list[fx.Node]:
    """What a node computes with: not what it only takes the size, shape or dtype of."""
    if is_op(node, "sym_size"):
        return []
    return list(leaves(node.args[:1] if is_structural(node) else (node.args, node.kwargs)))


def _keeps_scores(node: fx.Node) -> bool:
    """Whether a node is a cast, or a view that leaves the last two dimensions alone."""
    if is_op(node, "view", "_unsafe_view", "reshape"):
        return _shape(node)[-2:] == _shape(node.args[0])[-2:]
    return is_cast(node)


def _step(node: fx.Node, scores: fx.Node, dtype: torch.dtype) -> _Step:
    """What an op does to the scores."""
    first, *rest = node.args
    if is_op(node, "masked_fill"):
        return _Step("fill", rest[0], _fill(rest[1], node))
    if is_op(node, "where"):
        kept, filled = ("keep", rest[1]) if rest[0] is scores else ("fill", rest[0])
        return _Step(kept, first, _fill(filled, node))
    if is_op(node, "maximum", "max", "clamp_min", "clamp"):
        bound = rest[0] if first is scores and rest else first
        if len(rest) > 1 and rest[1] is not None:
            raise _NearMiss(f"'{node.name}' caps the scores")
        return _Step("floor", _fill(bound, node))
    operand = rest[0] if first is scores else first
    number = _number(operand)
    if is_op(node, "mul"):
        return _Step("times", _scale(operand, node, dtype) if number is None else number)
    if is_op(node, "div"):
        if first is not scores or node.kwargs.get("rounding_mode"):
            raise _NearMiss(f"'{node.name}' divides by the scores, or rounds")
        return _Step("over", _scale(operand, node, dtype) if number is None else number)
    if node.kwargs.get("alpha", 1) != 1:
        raise _NearMiss(f"'{node.name}' does not simply add a mask")
    return _Step("plus", _fitting(operand, node, dtype) if number is None else number)


def _fill(value: Any, node: fx.Node) -> float:
    """The number that masked scores are filled with."""
    number = _number(value)
    if number is None or number > MASKED:
        raise _NearMiss(f"'{node.name}' fills scores with what is no large negative number")
    return number


def _scale(operand: Any, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A constant that scales all scores of a query alike."""
    fitting = _fitting(operand, node, dtype)
    value = fitting.meta["val"]
    if value.dim() and value.shape[-1] != 1:
        raise _NearMiss(f"'{node.name}' scales the scores of a query one by one")
    return fitting


def _fitting(operand: Any, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A constant tensor that the query's dtype can hold."""
    value = operand.meta["val"]
    if not isinstance(value, Tensor):
        raise _NearMiss(f"'{node.name}' takes a number that depends on the input's size")
    if value.dim() and torch.promote_types(value.dtype, dtype) != dtype:
        raise _NearMiss(f"'{node.name}' takes a {value.dtype}, which does not fit into {dtype}")
    assert isinstance(operand, fx.Node)
    return operand


def _batch_step(
    before: fx.Node, after: fx.Node, folded: bool, shape: tuple[str, ...], steps: Sequence[_Step]
) -> tuple[bool, tuple[str, ...], _Step | None]:
    """A view of the scores' batch: (whether it is folded now, its largest shape, a step)."""
    now = _shape(after)
    if now == shape:
        return False, shape, None
    if len(now) < len(shape):
        return True, shape, None
    if folded or len(now) == len(shape):
        raise _NearMiss(f"'{after.name}' regroups the batch")
    for step in steps:
        if isinstance(step.operand, fx.Node):
            batch = _shape(step.operand)[:-2]
            if set(batch) - {"1"} and batch != _shape(before)[:-2]:
                raise _NearMiss(f"'{after.name}' splits a batch over which the mask is broadcast")
    sizes = after.args[1]
    return False, now, _Step("unfold", tuple(sizes[:-2]))  # type: ignore[index,arg-type]


def _in_dtype(operand: _Operand, like: fx.Node) -> _Operand:
    """An operand without the casts that the fused op makes itself."""
    node, dtype = operand.node, like.meta["val"].dtype
    while node.meta["val"].dtype != dtype and is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    if node.meta["val"].dtype != dtype:
        raise _NearMiss(f"'{node.name}' and '{like.name}' have unlike dtypes")
    return _Operand(node, operand.order)


# The two products, in one form.


def _query_and_key(node: fx.Node) -> tuple[_Operand, _Operand]:
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
        raise _NearMiss(f"'{node.name}' does not order its scores as (batch, query, key)")
    return query, _untransposed(key)


def _value(node: fx.Node, weights: fx.Node) -> tuple[_Operand, tuple[int, ...]]:
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
        raise _NearMiss(f"'{node.name}' is no product of weights (batch, query, key) and value")
    return value, tuple((outer + row + feature).index(letter) for letter in out)


@dataclass(frozen=True)
class _Factor:
    """A factor of an einsum."""

    node: fx.Node
    letters: str

    def ordered(self, wanted: str) -> _Operand | None:
        """The factor with its dimensions in the wanted order, None if it has others."""
        if sorted(self.letters) != sorted(wanted):
            return None
        return _Operand(self.node, tuple(self.letters.index(letter) for letter in wanted))


def _factors(node: fx.Node) -> tuple[_Factor, _Factor, str]:
    """The factors of an einsum that is a batched matrix product, and its output's letters."""
    equation = str(node.args[0]).replace(" ", "")
    inputs, arrow, out = equation.partition("->")
    factors = [_Factor(*pair) for pair in zip(leaves(node.args[1]), inputs.split(","), strict=True)]
    repeated = any(len(set(word)) < len(word) for word in (*inputs.split(","), out))
    if len(factors) != 2 or not arrow or "." in equation or repeated or len(out) < 2:
        raise _NearMiss(f"'{node.name}' is no plain product of two factors: '{equation}'")
    left, right = factors
    if len(set(left.letters) & set(right.letters) - set(out)) != 1:
        raise _NearMiss(f"'{node.name}' does not sum over one index: '{equation}'")
    return left, right, out


def _straight(node: Any, order: tuple[int, ...] | None = None) -> _Operand:
    """A tensor as it is, or in another order."""
    return _Operand(node, order or tuple(range(node.meta["val"].dim())))


def _untransposed(operand: _Operand) -> _Operand:
    """The same tensor taken from before the transpositions that its order undoes."""
    node, order = operand.node, operand.order
    while order != tuple(range(len(order))) and is_op(node, "transpose", "permute"):
        rank = len(order)
        if is_op(node, "permute"):
            moved = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]
        else:
            i, j = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
            moved = list(range(rank))
            moved[i], moved[j] = j, i
        node, order = node.args[0], tuple(moved[d] for d in order)  # type: ignore[assignment]
    return _Operand(node, order)


def _product_steps(node: fx.Node, explained: Set[fx.Node]) -> list[_Step]:
    """The steps that a product brings along: baddbmm is beta · bias + alpha · product."""
    if not is_op(node, "baddbmm"):
        return []
    bias, left, _ = node.args[:3]
    if bias in explained:
        raise _NearMiss(f"'{node.name}' adds an explained value: it is not a constant mask")
    steps = [_Step("times", float(node.kwargs.get("alpha", 1)))]  # type: ignore[arg-type]
    beta = float(node.kwargs.get("beta", 1))  # type: ignore[arg-type]
    fitting = _fitting(bias, node, left.meta["val"].dtype)  # type: ignore[union-attr]
    return [*steps, _Step("plus", fitting, beta)] if beta else steps


def _number(value: Any) -> float | None:
    """The number that an argument is, whether it stands there or in a tensor of one element."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    if is_op(value, "full") and value.args[0] == []:
        return _number(value.args[1])
    if is_op(value, "scalar_tensor", "lift_fresh_copy", "detach", "detach_") or is_cast(value):
        return _number(value.args[0])
    if value.op == "get_attr" and "lifted_tensor" in str(value.target):
        constant = attrgetter(str(value.target))(value.graph.owning_module)
        return float(constant) if constant.dim() == 0 else None
    return None


def _shape(node: Any) -> tuple[str, ...]:
    """Sizes as text: equal text is equal size for every input, and comparing adds no guard."""
    return tuple(map(str, node.meta["val"].shape))


# Writing.


class _Writer:
    """Writes one fused attention before the product that it replaces."""

    def __init__(self, graph: fx.Graph, node: fx.Node, name: str) -> None:
        self.graph = graph
        self.node = node
        self.name = name
        self.scale = 1.0
        self.bias: fx.Node | None = None

    def write(self, written: _Written) -> fx.Node:
        """The nodes that compute what was written, the last of them returned."""
        self.query, self.key = self.ordered(written.query), self.ordered(written.key)
        value = self.ordered(written.value)
        batch = self.sizes(value)[:-2]
        for step in written.steps:
            getattr(self, step.does)(step)
        rank = self.query.meta["val"].dim()
        folded = len(batch) < rank - 2
        if folded:
            value = self.batched(value, self.sizes(self.query)[:-2])
        operands = [self.query, self.key, value]
        for _ in range(rank, FUSED_RANK):
            operands = [self.call(aten.unsqueeze.default, x, 0) for x in operands]
        y = self.fused(*operands)
        for _ in range(rank, FUSED_RANK):
            y = self.call(aten.squeeze.dim, y, 0)
        if folded:
            y = self.batched(y, batch)
        return self.ordered(_Operand(y, written.out))

    def fused(self, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node:
        """The fused op; a mask has two dimensions or all of them, and the query's dtype."""
        kwargs: dict[str, Any] = {"scale": self.scale}
        if self.bias is not None:
            mask = self.cast(self.bias)
            while mask.meta["val"].dim() not in (2, query.meta["val"].dim()):
                mask = self.call(aten.unsqueeze.default, mask, 0)
            kwargs["attn_mask"] = mask
        return self.call(aten.scaled_dot_product_attention.default, query, key, value, **kwargs)

    def times(self, step: _Step) -> None:
        self._scaled(aten.mul.Tensor, step.operand, step.operand)

    def over(self, step: _Step) -> None:
        inverse = step.operand if isinstance(step.operand, fx.Node) else 1 / step.operand
        self._scaled(aten.div.Tensor, step.operand, inverse)

    def _scaled(self, op: Any, operand: Any, factor: Any) -> None:
        """Numbers go to the scale, tensors to the query, and both to the bias."""
        if isinstance(operand, fx.Node):
            self.query = self.call(op, self.query, operand)
        else:
            self.scale *= factor
        if self.bias is not None:
            self.bias = self.call(op, self.bias, operand)

    def plus(self, step: _Step) -> None:
        """A number added to all scores alike changes no weight."""
        if not isinstance(step.operand, fx.Node):
            return
        added = self.cast(step.operand)
        if step.value != 1:
            added = self.call(aten.mul.Tensor, added, step.value)
        self.bias = added if self.bias is None else self.call(aten.add.Tensor, self.bias, added)

    def keep(self, step: _Step) -> None:
        bias = self._bias_like(step.operand)
        self.bias = self.call(aten.where.ScalarOther, step.operand, bias, self._least(step.value))

    def fill(self, step: _Step) -> None:
        bias = self._bias_like(step.operand)
        self.bias = self.call(aten.masked_fill.Scalar, bias, step.operand, self._least(step.value))

    def floor(self, step: _Step) -> None:
        if self.bias is not None:
            self.bias = self.call(aten.clamp_min.default, self.bias, self._least(step.operand))

    def unfold(self, step: _Step) -> None:
        bias = self.bias
        if bias is not None and set(_shape(bias)[:-2]) - {"1"}:
            self.bias = self.batched(bias, step.operand)
        self.query, self.key = (self.batched(x, step.operand) for x in (self.query, self.key))

    def _bias_like(self, condition: fx.Node) -> fx.Node:
        if self.bias is not None:
            return self.bias
        dtype = self.query.meta["val"].dtype
        return self.call(aten.zeros_like.default, condition, dtype=dtype)

    def _least(self, value: float) -> float:
        """−∞ stays, any other mask is the least value of the dtype."""
        return value if value == -torch.inf else torch.finfo(self.query.meta["val"].dtype).min

    def cast(self, node: fx.Node) -> fx.Node:
        dtype = self.query.meta["val"].dtype
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(aten._to_copy.default, node, dtype=dtype)

    def ordered(self, operand: _Operand) -> fx.Node:
        if operand.order == tuple(range(len(operand.order))):
            return operand.node
        return self.call(aten.permute.default, operand.node, list(operand.order))

    def batched(self, node: fx.Node, batch: Sequence[Any]) -> fx.Node:
        """A tensor with its batch in other dimensions."""
        return self.call(aten.reshape.default, node, [*batch, *self.sizes(node)[-2:]])

    def sizes(self, node: fx.Node) -> list[Any]:
        """A tensor's sizes, as numbers or nodes."""
        sizes = node.meta["val"].shape
        return [
            size if isinstance(size, int) else self.call(aten.sym_size.int, node, d)
            for d, size in enumerate(sizes)
        ]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node with its value and the provenance of the product."""
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, args, kwargs)
        inherit(new, self.node, self.name)
        values = fx.node.map_arg((new.args, new.kwargs), lambda leaf: leaf.meta["val"])
        new.meta["val"] = target(*values[0], **values[1])
        return new
