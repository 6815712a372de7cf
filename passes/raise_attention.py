"""Raise attention written out in parts to one scaled dot-product attention.

    s = matmul(q, kᵀ)                             →  y = scaled_dot_product_attention(
    s = ops(s)                                            q, k, v, attn_mask=b, scale=c)
    y = matmul(softmax(s, -1), v)

Both products are read in one form, whether they are written as matmul, bmm, baddbmm or einsum.
The ops between them are replayed on the scale c and on a bias b, so that s = c·qkᵀ + b throughout:

    s · t, s / t           c·t, or q·t for a tensor;  b·t
    s + m, s − m           b + m, b − m
    where(keep, s, f)      where(keep, b, f)          f ≤ −10⁴ masks: −∞ stays, else the least value
    max(s, f)              max(b, f)                  f as before
    s − rowmax(s)          nothing                    it changes no weight
    view of the batch      view of m                  or of q and k, where they are folded
    casts                  nothing

A constant m is brought to the batch of q and k by views, and is repeated only where a dimension
over which it is broadcast is regrouped with one that it has. The fused op gets four dimensions.

The rules of the parts and of the whole give the same relevance; the whole runs on a fused kernel.
The least value of the dtype swallows any score, so that a row masked throughout stays uniform. Only
what is explained of such a row itself differs: the kernels that run the whole keep the logarithm of
its sum, which that value swallows too. Where it is masked by −∞, the whole gives zero for NaN.

A bias that is explained, a cap on the scores, a column that only the softmax sees, and scores or
weights that are used elsewhere too leave the parts as they are.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from dataclasses import replace as replace_fields
from itertools import pairwise
from operator import attrgetter, getitem
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.batch_views import Size, View, known_sizes, size_of, views_between
from attnlrp_fx.graph.matrix_products import NearMiss, Operand, query_and_key, shape_of, value_of
from attnlrp_fx.graph.operators import aten, is_cast, is_op, is_structural, leaves
from attnlrp_fx.passes.base import PassContext, PassResult, finish, inherit, replace

MASKED = -1e4
"""A score at or below this one is meant to get no weight."""
STEPS = ("mul", "div", "add", "sub", "where", "masked_fill", "maximum", "max", "clamp_min", "clamp")
"""Ops that may stand between the scores and their softmax, beside casts and views."""
REGROUPS = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
"""Views that keep elements in their order."""
FUSED_RANK = 4
"""The fused kernels take (batch, heads, rows, features)."""


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
        except NearMiss as reason:
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
class _Step:
    """One op between the products: what it does to scale and bias, and with what."""

    does: str
    """"times", "over", "plus", "keep", "fill", "floor"."""
    operand: Any
    """A number or a constant; for "keep" and "fill" the condition."""
    value: float = 1.0
    """What masked scores are filled with; the factor of a constant that is added."""
    views: tuple[View, ...] = ()
    """What brings the constant to the batch of the fused op."""


@dataclass(frozen=True)
class _Written:
    """An attention as it was written: softmax(steps(query · keyᵀ)) · value."""

    query: Operand
    key: Operand
    value: Operand
    steps: tuple[_Step, ...]
    batch: tuple[Size, ...] | None
    """The batch of the fused op; None: the query's own."""
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
    value, out = value_of(node, weights)
    chain = _chain(weights, explained)
    query, key = query_and_key(chain[0])
    if query.shape[:-2] != key.shape[:-2] or value.shape[:-2] != shape_of(weights)[:-2]:
        raise NearMiss("query, key and value have unlike batches")
    query, key = (_in_dtype(operand, value.node) for operand in (query, key))
    batch = _fused_batch(chain)
    sizes = known_sizes([x.node for x in (query, key, value)], chain)
    dtype = query.node.meta["val"].dtype
    read = [(chain[0], step) for step in _product_steps(chain[0], explained)]
    for before, after in pairwise(chain):
        if is_op(after, "softmax", "_softmax") or _keeps_scores(after) or _maximum(after):
            continue
        if shape_of(after) != shape_of(before):
            raise NearMiss(f"'{after.name}' enlarges the scores")
        read.append((after, _step(after, before, dtype)))
    steps = [
        replace_fields(step, views=views_between(step.operand, shape_of(at)[:-2], batch, sizes))
        for at, step in read
    ]
    own = batch == query.shape[:-2]
    given = None if own else tuple(size_of(text, sizes) for text in batch)
    return _Written(query, key, value, tuple(steps), given, out)


def _chain(weights: fx.Node, explained: Set[fx.Node]) -> list[fx.Node]:
    """The nodes from the product of query and key to the weights, in order."""
    chain, maxima = [weights], set[fx.Node]()
    softmaxes = 0
    while not is_op(chain[-1], "matmul", "bmm", "baddbmm", "einsum"):
        node = chain[-1]
        if is_op(node, "softmax", "_softmax"):
            softmaxes += 1
            if node.args[1] not in (-1, node.meta["val"].dim() - 1):
                raise NearMiss("the softmax is not over the last dimension")
        elif not softmaxes and not _keeps_scores(node):
            raise NearMiss(f"the weights are not the whole softmax, but its '{node.name}'")
        elif softmaxes > 1 or not (_keeps_scores(node) or is_op(node, *STEPS)):
            raise NearMiss(
                f"the scores come from '{node.name}', not from a product of query and key"
            )
        maximum = _maximum(node)
        sources = [x for x in _inputs(node) if x in explained and x not in maximum]
        if len(sources) != 1:
            raise NearMiss(
                f"'{node.name}' combines explained values: what it adds is not a constant mask"
            )
        chain.append(sources[0])
        maxima.update(maximum)
    for node in (*chain, *maxima):
        users = [user for user in node.users if node in _inputs(user)]
        if sum(user not in maxima for user in users) > 1:
            raise NearMiss(f"'{node.name}' is used elsewhere too")
    return chain[::-1]


def _maximum(node: fx.Node) -> list[fx.Node]:
    """The nodes that compute the maximum of each row of scores, if that is what a node subtracts.

    It changes no weight, and as the pullback of a softmax adds up to zero, no coefficient.
    """
    if not is_op(node, "sub") or not isinstance(node.args[1], fx.Node):
        return []
    scores: Any = node.args[0]
    found: list[fx.Node] = [node.args[1]]
    while is_cast(found[-1]) or is_op(found[-1], *REGROUPS) or found[-1].target is getitem:
        found += leaves(found[-1].args[:1])
    if not is_op(found[-1], "amax", "max") or found[-1].args[0] is not scores:
        return []
    last = node.meta["val"].dim() - 1
    over = found[-1].args[1:2]
    is_row = over in ((-1,), (last,), ([-1],), ([last],))
    fits = shape_of(found[0]) == (*shape_of(node)[:-1], "1")
    return found if is_row and fits else []


def _inputs(node: fx.Node) -> list[fx.Node]:
    """What a node computes with: not what it only takes the size, shape or dtype of."""
    if is_op(node, "sym_size"):
        return []
    return list(leaves(node.args[:1] if is_structural(node) else (node.args, node.kwargs)))


def _keeps_scores(node: fx.Node) -> bool:
    """Whether a node is a cast, or a view that leaves the last two dimensions alone."""
    if is_op(node, *REGROUPS):
        return shape_of(node)[-2:] == shape_of(node.args[0])[-2:]
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
            raise NearMiss(f"'{node.name}' caps the scores")
        return _Step("floor", _fill(bound, node))
    operand = rest[0] if first is scores else first
    number = _number(operand)
    if is_op(node, "mul"):
        return _Step("times", _scale(operand, node, dtype) if number is None else number)
    if is_op(node, "div"):
        if first is not scores or node.kwargs.get("rounding_mode"):
            raise NearMiss(f"'{node.name}' divides by the scores, or rounds")
        return _Step("over", _scale(operand, node, dtype) if number is None else number)
    if node.kwargs.get("alpha", 1) != 1 or (is_op(node, "sub") and first is not scores):
        raise NearMiss(f"'{node.name}' does not simply add a mask")
    sign = -1.0 if is_op(node, "sub") else 1.0
    return _Step("plus", _fitting(operand, node, dtype) if number is None else number, sign)


def _fill(value: Any, node: fx.Node) -> float:
    """The number that masked scores are filled with."""
    number = _number(value)
    if number is None or number > MASKED:
        raise NearMiss(f"'{node.name}' fills scores with what is no large negative number")
    return number


def _scale(operand: Any, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A constant that scales all scores of a query alike."""
    fitting = _fitting(operand, node, dtype)
    value = fitting.meta["val"]
    if value.dim() and value.shape[-1] != 1:
        raise NearMiss(f"'{node.name}' scales the scores of a query one by one")
    return fitting


def _fitting(operand: Any, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A constant tensor that the query's dtype can hold."""
    value = operand.meta["val"]
    if not isinstance(value, Tensor):
        raise NearMiss(f"'{node.name}' takes a number that depends on the input's size")
    if value.dim() and torch.promote_types(value.dtype, dtype) != dtype:
        raise NearMiss(f"'{node.name}' takes a {value.dtype}, which does not fit into {dtype}")
    assert isinstance(operand, fx.Node)
    return operand


def _fused_batch(chain: Sequence[fx.Node]) -> tuple[str, ...]:
    """The batch of the fused op: that of the product, unless it is folded and unfolds later."""
    batches = [shape_of(node)[:-2] for node in chain]
    return batches[0] if len(batches[0]) > 1 else max(batches, key=len)


def _in_dtype(operand: Operand, like: fx.Node) -> Operand:
    """An operand without the casts that the fused op makes itself."""
    node, dtype = operand.node, like.meta["val"].dtype
    while node.meta["val"].dtype != dtype and is_cast(node):
        node = node.args[0]  # type: ignore[assignment]
    if node.meta["val"].dtype != dtype:
        raise NearMiss(f"'{node.name}' and '{like.name}' have unlike dtypes")
    return Operand(node, operand.order)


def _product_steps(node: fx.Node, explained: Set[fx.Node]) -> list[_Step]:
    """The steps that a product brings along: baddbmm is beta · bias + alpha · product."""
    if not is_op(node, "baddbmm"):
        return []
    bias, left, _ = node.args[:3]
    if bias in explained:
        raise NearMiss(f"'{node.name}' adds an explained value: it is not a constant mask")
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
        if written.batch is not None:
            batch = [self.size(size) for size in written.batch]
            self.query, self.key = (self.batched(x, batch) for x in (self.query, self.key))
        for step in written.steps:
            getattr(self, step.does)(step)
        regrouped = shape_of(value)[:-2] != shape_of(self.query)[:-2]
        own = self.sizes(value)[:-2]
        if regrouped:
            value = self.batched(value, self.sizes(self.query)[:-2])
        y = self.fused(self.query, self.key, value)
        if regrouped:
            y = self.batched(y, own)
        return self.ordered(Operand(y, written.out))

    def fused(self, query: fx.Node, key: fx.Node, value: fx.Node) -> fx.Node:
        """The fused op, in four dimensions; a mask has two of them or all, and query's dtype."""
        mask = self.bias and self.cast(self.bias)
        batch = self.sizes(query)[:-2]
        operands = [query, key, value]
        missing = range(len(batch), FUSED_RANK - 2)
        for _ in missing:
            operands = [self.call(aten.unsqueeze.default, x, 0) for x in operands]
        if len(batch) > FUSED_RANK - 2:
            outer = _cut(shape_of(query)[:-2], shape_of(mask)[:-2] if mask else ())
            folded = [batch[0], -1] if outer == 1 else [-1, batch[-1]]
            operands = [self.batched(x, folded) for x in operands]
            mask = mask and self.folded(mask, batch, outer)
        while mask and mask.meta["val"].dim() not in (2, FUSED_RANK):
            mask = self.call(aten.unsqueeze.default, mask, 0)
        kwargs = {"scale": self.scale, **({"attn_mask": mask} if mask else {})}
        y = self.call(aten.scaled_dot_product_attention.default, *operands, **kwargs)
        for _ in missing:
            y = self.call(aten.squeeze.dim, y, 0)
        return self.batched(y, batch) if len(batch) > FUSED_RANK - 2 else y

    def folded(self, mask: fx.Node, batch: Sequence[Any], outer: int) -> fx.Node:
        """A mask whose batch goes to two dimensions, repeated where it is broadcast in part."""
        own = shape_of(mask)[:-2]
        if not own:
            return mask
        own = ("1",) * (len(batch) - len(own)) + own
        sizes = [*([1] * (len(batch) + 2 - mask.meta["val"].dim())), *self.sizes(mask)]
        two: list[Any] = []
        for part in (slice(0, outer), slice(outer, len(batch))):
            if set(own[part]) <= {"1"}:
                two.append(1)
            else:
                sizes[part] = batch[part]
                two.append(batch[part][0] if part.stop - part.start == 1 else -1)
        mask = self.call(aten.expand.default, mask, sizes)
        return self.batched(mask, two)

    def times(self, step: _Step) -> None:
        operand = self.moved(step.operand, step)
        self._scaled(aten.mul.Tensor, operand, operand)

    def over(self, step: _Step) -> None:
        operand = self.moved(step.operand, step)
        inverse = operand if isinstance(operand, fx.Node) else 1 / operand
        self._scaled(aten.div.Tensor, operand, inverse)

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
        added = self.moved(added, step)
        self.bias = added if self.bias is None else self.call(aten.add.Tensor, self.bias, added)

    def keep(self, step: _Step) -> None:
        kept = self.moved(step.operand, step)
        bias = self._bias_like(kept)
        self.bias = self.call(aten.where.ScalarOther, kept, bias, self._least(step.value))

    def fill(self, step: _Step) -> None:
        filled = self.moved(step.operand, step)
        bias = self._bias_like(filled)
        self.bias = self.call(aten.masked_fill.Scalar, bias, filled, self._least(step.value))

    def floor(self, step: _Step) -> None:
        if self.bias is not None:
            self.bias = self.call(aten.clamp_min.default, self.bias, self._least(step.operand))

    def _bias_like(self, condition: fx.Node) -> fx.Node:
        if self.bias is not None:
            return self.bias
        dtype = self.query.meta["val"].dtype
        return self.call(aten.zeros_like.default, condition, dtype=dtype)

    def _least(self, value: float) -> float:
        """−∞ stays, any other mask is the least value of the dtype."""
        return value if value == -torch.inf else torch.finfo(self.query.meta["val"].dtype).min

    def moved(self, operand: Any, step: _Step) -> Any:
        """A step's constant at the batch of the fused op."""
        for op, sizes in step.views:
            operand = self.call(op, operand, [self.size(size) for size in sizes])
        return operand

    def cast(self, node: fx.Node) -> fx.Node:
        dtype = self.query.meta["val"].dtype
        if node.meta["val"].dtype == dtype:
            return node
        return self.call(aten._to_copy.default, node, dtype=dtype)

    def ordered(self, operand: Operand) -> fx.Node:
        if operand.order == tuple(range(len(operand.order))):
            return operand.node
        return self.call(aten.permute.default, operand.node, list(operand.order))

    def batched(self, node: fx.Node, batch: Sequence[Any]) -> fx.Node:
        """A tensor with its batch in other dimensions."""
        return self.call(aten.reshape.default, node, [*batch, *self.sizes(node)[-2:]])

    def size(self, size: Size) -> Any:
        """A size as an argument."""
        return self.call(aten.sym_size.int, *size) if isinstance(size, tuple) else size

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


def _cut(batch: tuple[str, ...], mask: tuple[str, ...]) -> int:
    """How many dimensions of a batch to fold first: one, or all but one.

    Better so that a mask is broadcast over both folded parts or neither, and need not be repeated.
    """
    own = ("1",) * (len(batch) - len(mask)) + mask
    mixed = [a == b for a, b in zip(own, batch, strict=True)]
    return min((1, len(batch) - 1), key=lambda i: len({*mixed[:i]}) + len({*mixed[i:]}))
