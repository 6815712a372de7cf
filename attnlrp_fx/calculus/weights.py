"""Relevance of parameters: what of a layer's relevance goes through each of its weights.

A layer hands R_ij from output j to input i, through the weight w_ji. Inputs get it added up over j;
a weight gets it added up over all the places where it is used (Hatefi et al. 2025,
arXiv 2506.13727):

    R_W = Σ_places R_ij = W ⊙ ∂,    ∂ = Σ_places a_j x_i,

the layer's own derivative in its weight, taken at what arrives at its outputs: with the ε-rule
their coefficients. Rules that share out by contributions do it in few such products (`Message`). So
Σ R_W is the relevance of the layer's input, and the bias gets what it absorbs, b ⊙ Σ_places a.

∂ is one matrix product for a whole batch. The sum of magnitudes over samples needs each sample's
own ∂, a batched product, where rows lie one behind the other in the layer's first dimension; where
they do not (tokens sorted by expert), it has to be asked for a sample at a time.
"""

import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from attnlrp_fx import ops
from attnlrp_fx.calculus.calls import Call, Message, Shares
from attnlrp_fx.calculus.contributions import Layer, layer_of, spread
from attnlrp_fx.calculus.pullbacks import stabilised
from attnlrp_fx.calculus.relevance import factored
from attnlrp_fx.calculus.windows import window_of
from attnlrp_fx.graph.operators import (
    aten,
    is_convolution,
    is_elementwise_op,
    is_matrix_product,
    is_op,
    leaves,
    packet,
    product_of,
)

CASTS = ("_to_copy", "clone", "contiguous")
VIEWS = ("view", "reshape", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze")
PARTS = ("slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind", "unflatten")
FLATTENS = {getattr(aten, n) for n in (*CASTS, "view", "reshape", "_unsafe_view", "flatten")}
"""Ops that leave elements in their order."""
RIGHT = (aten.mm, aten.matmul, aten.addmm)
"""Ops of a matrix on the left and one on the right."""


class Weight(NamedTuple):
    """The relevance of a parameter in a batch."""

    signed: Tensor
    """Σ R_W over the rows, in the parameter's shape, float32 or better."""
    absolute: Tensor
    """Σ |R_W| over the rows; of rows that were not told apart, |Σ R_W|."""


@dataclass(frozen=True)
class Weighing:
    """Which parameters' relevance a tape reads."""

    names: frozenset[str]
    rows: int | torch.SymInt | None
    """How many rows the batch has; None: that cannot be told."""


@dataclass(frozen=True)
class Operand:
    """A parameter, and how a layer's weight or bias is made of it."""

    name: str
    path: tuple[fx.Node, ...]
    """The nodes between, from the layer to the parameter: views, casts, and scalings (as of a
    merged BatchNorm), which hand relevance on as it is."""

    def relevance(self, at_layer: Tensor, values: Mapping[fx.Node, Any]) -> Tensor:
        """The parameter's relevance from that of what is read of it; the rest has none."""
        for node in self.path:
            if is_op(node, *CASTS, "mul"):
                continue
            made_of = _made_of(node)
            assert made_of is not None
            source = values[made_of].to(at_layer.dtype)
            (at_layer,) = torch.func.vjp(partial(_viewed, node, made_of), source)[1](at_layer)
        return at_layer


def weigh(
    node: fx.Node,
    call: Call,
    output: Any,
    received: tuple[Any, Any],
    shares: Shares,
    values: Mapping[fx.Node, Any],
    weighing: Weighing,
) -> tuple[dict[str, Weight], bool]:
    """The relevance of the parameters of a layer.

    Args:
        node: a node of a rewritten graph.
        call: its call.
        output: its value.
        received: the coefficient and the relevance that it received.
        shares: what its rule handed on.
        values: of all nodes.
        weighing: what is asked for.

    Returns:
        By name, nothing if the node is no layer with a parameter that is asked for; and whether
        the rows of the batch were told apart.
    """
    weight, bias = operands(node, weighing.names)
    if weight is None and bias is None:
        return {}, True
    layer = layer_of(call)
    messages, kept = shares.messages, shares.kept
    if not messages:
        c, r = received
        a = c if r is None else factored(output, c, r)[0]
        epsilon = call.parameters.get("epsilon", 0.0)
        a = stabilised(output, a, epsilon) if epsilon else a
        messages = (Message(layer.x, layer.weight, a),)
        kept = None if layer.bias is None else a * spread(layer, layer.bias)
    is_one = isinstance(weighing.rows, int) and weighing.rows == 1
    tells = is_convolution(call.op) or _as_matrices(layer, messages[0]) is not None
    leads = tells and _leads(_explained(node), weighing.rows, values)
    rows = weighing.rows if leads else None
    found = {}
    if weight is not None:
        parts = _through_weight(layer, messages, rows)
        found[weight.name] = Weight(*(weight.relevance(part, values) for part in parts))
    if bias is not None and kept is not None:
        parts = _through_bias(layer, kept, rows)
        found[bias.name] = Weight(*(bias.relevance(part, values) for part in parts))
    return found, is_one or rows is not None


def operands(node: fx.Node, names: Set[str]) -> tuple[Operand | None, Operand | None]:
    """The weight and the bias of a layer, as far as they are parameters of some names.

    A layer is a matrix product or a convolution of one explained value and one that is constant.
    """
    op, *args = node.args
    product = product_of(op)
    if product is None or not is_matrix_product(op):
        return None, None
    factors = [leaf for p in product.factors for leaf in leaves(args[p])]
    constant = [factor for factor in factors if not ops.is_explained(factor)]
    if len(factors) != 2 or len(constant) != 1:
        return None, None
    given = [args[p] for p in product.terms if p < len(args)] or [node.kwargs.get("bias")]
    terms = [term for term in given if isinstance(term, fx.Node) and not ops.is_explained(term)]
    bias = _operand(terms[0], names) if terms and terms[0].meta["val"].dim() == 1 else None
    return _operand(constant[0], names), bias


def _operand(node: fx.Node, names: Set[str]) -> Operand | None:
    path = []
    while node.op != "get_attr":
        source = _made_of(node)
        if source is None:
            return None
        path.append(node)
        node = source
    return Operand(str(node.target), tuple(path)) if node.target in names else None


def _made_of(node: fx.Node) -> fx.Node | None:
    """The one input of which a value has elements, each once; None if that is not so."""
    if node.target is operator.getitem:
        owner = node.args[0]
        assert isinstance(owner, fx.Node)
        return _made_of(owner)
    inputs = [leaf for leaf in node.all_input_nodes if isinstance(leaf.meta.get("val"), Tensor)]
    if is_op(node, "mul"):  # by something smaller
        size = node.meta["val"].numel()
        inputs = [leaf for leaf in inputs if leaf.meta["val"].numel() == size]
    is_part = is_op(node, *CASTS, *VIEWS, *PARTS, "mul")
    return inputs[0] if is_part and len(inputs) == 1 else None


def _viewed(node: fx.Node, made_of: fx.Node, x: Tensor) -> Tensor:
    """A part of a value, as a node takes it."""
    if node.target is operator.getitem:
        owner, which = node.args
        assert isinstance(owner, fx.Node)
        parts: Any = _viewed(owner, made_of, x)
        part: Tensor = parts[which]
        return part
    assert callable(node.target)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda leaf: x)
    found: Tensor = node.target(*args, **kwargs)
    return found


def _explained(node: fx.Node) -> fx.Node:
    """The explained input of a layer."""
    return next(leaf for leaf in leaves((node.args, node.kwargs)) if ops.is_explained(leaf))


def _leads(node: fx.Node, rows: Any, values: Mapping[fx.Node, Any]) -> bool:
    """Whether a value's first dimension is the batch's, or begins with it in row-major order."""
    while isinstance(rows, torch.SymInt):
        if statically_known_true(values[node].shape[0] == rows):
            return True
        inputs = [leaf for leaf in leaves((node.args, node.kwargs)) if ops.is_explained(leaf)]
        op = node.args[0] if node.args else None
        if len(inputs) != 1 or node.target in ops.MARKERS:
            return False
        (before,) = inputs
        length, was = values[node].shape[0], values[before].shape[0]
        keeps = is_elementwise_op(op) or is_matrix_product(op) or node.target is ops.norm
        is_same = keeps and statically_known_true(length == was)
        if not is_same and packet(op) not in FLATTENS:
            return False
        node = before
    return False


def _through_weight(layer: Layer, messages: Sequence[Message], rows: Any) -> tuple[Tensor, Tensor]:
    """Relevance through each weight, the sums over rows of it and of its magnitude."""
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    if rows is None:
        parts = [m.weight * _product(layer, m).to(wide) for m in messages]
        signed = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return signed, signed.abs()
    by_row = [_products(layer, m, rows).to(wide) for m in messages]
    if len(messages) == 1:  # the weight is the same for each row
        (only,), weight = by_row, messages[0].weight
        return weight * only.sum(0), weight.abs() * only.abs().sum(0)
    total: Any = sum(m.weight * part for m, part in zip(messages, by_row, strict=True))
    return total.sum(0), total.abs().sum(0)


def _product(layer: Layer, message: Message) -> Tensor:
    """∂ = Σ a x over all places."""
    if (pair := _as_matrices(layer, message)) is not None:
        left, right = (part.reshape(-1, part.shape[-1]) for part in pair)
        return left.t() @ right
    return layer.derivative(message.x, message.weight, message.a)


def _products(layer: Layer, message: Message, rows: Any) -> Tensor:
    """∂ of each row, (rows, *shape of the weight)."""
    if (pair := _as_matrices(layer, message)) is not None:
        left, right = (part.reshape(rows, -1, part.shape[-1]) for part in pair)
        return left.transpose(1, 2) @ right
    window = window_of(layer.call)
    read, other = (message.a, message.x) if window.transposed else (message.x, message.a)
    length, groups = other[0, 0].numel(), window.groups
    places = window.places(read).flatten(2 + len(window.sizes))
    places = places.movedim(-1, 2).reshape(rows, groups, -1, length)
    found = other.reshape(rows, groups, -1, length) @ places.transpose(2, 3)
    return found.reshape(rows, *message.weight.shape)


def _as_matrices(layer: Layer, message: Message) -> tuple[Tensor, Tensor] | None:
    """The pair whose outer product over the last dimensions is ∂, of a product by one matrix."""
    if message.weight.dim() == 2 and packet(layer.call.op) is aten.linear:
        return message.a, message.x
    if message.weight.dim() == 2 and packet(layer.call.op) in RIGHT and layer.given_last:
        return message.x, message.a
    return None


def _through_bias(layer: Layer, kept: Tensor, rows: Any) -> tuple[Tensor, Tensor]:
    """What the bias absorbs, by channel, the sums over rows of it and of its magnitude."""
    channels_last = kept.movedim(1, -1) if is_convolution(layer.call.op) else kept
    wide = torch.promote_types(kept.dtype, torch.float32)
    size = channels_last.shape[-1]
    if rows is None:
        signed = channels_last.reshape(-1, size).sum(0, dtype=wide)
        return signed, signed.abs()
    by_row = channels_last.reshape(rows, -1, size).sum(1, dtype=wide)
    return by_row.sum(0), by_row.abs().sum(0)
