"""Postings: what is added up of each node for the ledger, in few and cheap sums.

An edge from a value x to a node that it goes into carries Σ x·c + Σ r, of the coefficient and the
relevance that the node hands to x. Edges are all that is measured of what nodes receive and pass
on: a value receives from all of its users together. A view, or a cast, passes on what it receives,
and is not measured at all. Where few sums are wanted, no more edges are measured than the rest
follows from by law: of a node's edges one is what the others and what it absorbs leave over, and
factors of a product have equal shares. But what comes out of an op that absorbs by design, and what
reaches a source, always is measured: else a rule that breaks its law would not show.

What a node absorbs is not taken as a difference where a law gives it: a rule on an affine op
absorbs Σ f(0)·c, with f(0) the op's output at zero explained inputs, and ε what it keeps. Only
softmax, attention and plain gradients, which absorb by design, are entered by difference, when the
ledger is read.

Sums are dot products in the values' own precision, float32 or better; all else is done in float64
by who reads them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from attnlrp_fx import ops
from attnlrp_fx.calculus.calls import Call, Shares, parts_of
from attnlrp_fx.calculus.pullbacks import stabilised
from attnlrp_fx.calculus.quotients import intercept
from attnlrp_fx.graph.operators import (
    aten,
    is_convolution,
    is_homogeneous,
    is_structural_op,
    leaves,
    packet,
    product_of,
    rearranges,
)

Account = int | str
"""What a posting is of: what goes to the k-th explained input, or a cause of what stays."""
TOKENS_MOVED = "tokens that the model puts in"
"""The cause of what an op keeps that moves token indices and puts constant ones among them."""
Postings = dict[tuple[str, Account], Tensor]
"""By node and account a scalar."""


def is_carrier(node: fx.Node) -> bool:
    """Whether a node of a rewritten graph passes on all that it receives, to one value."""
    if node.target not in (ops.linear, ops.gradient):
        return False
    return is_structural_op(node.args[0]) and len(explained_inputs(node)) == 1


def explained_inputs(node: fx.Node) -> list[fx.Node]:
    """The explained values that a node reads, one for each place where one stands."""
    return [leaf for leaf in leaves((node.args, node.kwargs)) if ops.is_explained(leaf)]


def absorbs_by_design(node: fx.Node, passes_on: bool) -> bool:
    """Whether what a node absorbs is what it does not pass on, rather than given by a law."""
    if node.target in (ops.taylor, ops.gradient):
        return True
    explains_weights = node.kwargs.get("weights", 0.5) != 0
    return node.target is ops.attention and bool(explains_weights or not passes_on)


def postings_of(
    node: fx.Node,
    call: Call,
    output: Any,
    c: Any,
    shares: Shares,
    r: Any = None,
    few: bool = False,
) -> dict[Account, Tensor]:
    """What one node passes on to each explained input, and what it absorbs.

    Args:
        node: a node with a relevance op.
        call: the op that it wraps.
        output: its value.
        c: the coefficient that its pullback took on; None if there was none.
        shares: what it handed on.
        r: relevance that it handed on as it came, if it did.
        few: whether edges are left out that follow from others.

    Returns:
        Scalars, float32 or better, by account. Of a node that absorbs by design, the accounts of
        causes hold only what else it absorbs.
    """
    found: dict[Account, Tensor] = dict(shares.absorbed.items())
    if is_carrier(node):
        return found
    none = [None] * len(call.primals)
    coefficients, relevance = shares.coefficients or none, shares.relevance or none
    inputs = explained_inputs(node)
    handed = list(zip(call.primals, coefficients, relevance, strict=True))
    follows: set[int] = set()
    if few and all(own is not None or other is not None for _, own, other in handed):
        follows = _following(node, inputs, call.factors)
    for k, (x, own, other) in enumerate(handed):
        if k in follows:
            continue
        carried = [] if own is None else edge(x, own, may_be_infinite(inputs[k]))
        carried += [] if other is None else [total(other)]
        if carried:
            found[k] = sum(carried[1:], start=carried[0])
    if c is not None and not absorbs_by_design(node, any(p is not None for p in coefficients)):
        found |= _by_law(node, call, parts_of(output), parts_of(c))
    if r is not None and rearranges(call.op):
        passed = [-total(part) for part in relevance if part is not None]
        kept = torch.stack([*map(total, parts_of(r)), *passed]).sum()
        found["constant"] = found["constant"] + kept if "constant" in found else kept
    return found


def _following(node: fx.Node, inputs: Sequence[fx.Node], factors: int) -> set[int]:
    """The edges of a node that follow from its others, and from what it receives and absorbs."""
    if node.target is ops.attention or absorbs_by_design(node, True):
        return set()
    free = [k for k, value in enumerate(inputs) if not _is_measured(value)]
    has_equal_shares = node.target is ops.uniform and factors == len(inputs)
    return set(free if has_equal_shares else free[:1])


def _is_measured(value: fx.Node) -> bool:
    """Whether what a value receives must be measured."""
    while value.target not in (ops.source, ops.boundary, *ops.LATENT):
        if value.target in ops.RELEVANCE_OPS and not is_carrier(value):
            return value.target is ops.attention or absorbs_by_design(value, True)
        value = explained_inputs(value)[0]
    return True


def total(relevance: Tensor) -> Tensor:
    """Σ r, in float32 or better."""
    return relevance.sum(dtype=torch.promote_types(relevance.dtype, torch.float32))


def edge(x: Tensor, c: Tensor, guarded: bool = False) -> list[Tensor]:
    """Σ x·c, of complex values, pairs of reals, Σ Re(x̄·c); nothing where x is of integers.

    Guarded, an infinite value counts nothing where its coefficient is zero.
    """
    if x.is_complex():
        return [(x.conj() * c).real.sum()]
    if not x.is_floating_point():
        return []
    wide = torch.promote_types(x.dtype, torch.float32)
    x, c = x.to(wide), c.to(wide)
    if guarded:
        largest = torch.finfo(wide).max
        x = x.clamp(-largest, largest)
    if x.is_contiguous() and c.is_contiguous():
        return [torch.dot(x.reshape(-1), c.reshape(-1))]
    return [(x * c).sum()]  # flattening would copy both


UNMASKED = ("linear", "matmul", "mm", "bmm", "conv1d", "conv2d", "conv3d", "softmax", "_softmax")
"""Ops whose result an infinite mask does not reach, beside norms and attention."""


def may_be_infinite(node: fx.Node) -> bool:
    """Whether an explained value may have been masked with infinity, as far as one can see."""
    seen, stack = set(), [node]
    while stack:
        leaf = stack.pop()
        if leaf in seen:
            continue
        seen.add(leaf)
        if leaf.target is ops.boundary:
            return True
        if leaf.target in (ops.source, ops.norm, ops.attention):
            continue
        op = packet(leaf.args[0]) if leaf.target in ops.RELEVANCE_OPS else None
        if op in _UNMASKED:
            continue
        if (
            op is not None
            and not is_structural_op(leaf.args[0])
            and product_of(leaf.args[0]) is None
        ):
            others = [other for other in leaves(leaf.args[1:]) if not ops.is_explained(other)]
            numbers = [n for n in leaf.args[1:] if isinstance(n, float) and math.isinf(n)]
            if numbers or any(other.op != "get_attr" for other in others):
                return True
        stack += [other for other in leaf.all_input_nodes if ops.is_explained(other)]
    return False


_UNMASKED = frozenset(getattr(aten, name) for name in UNMASKED)


def _by_law(
    node: fx.Node, call: Call, outputs: Sequence[Tensor], cs: Sequence[Tensor]
) -> Mapping[Account, Tensor]:
    """Σ f(0)·c, and what ε keeps."""
    epsilon = call.parameters.get("epsilon", 0.0)
    if not epsilon:
        return _at_zero(node, call, cs)
    passed = [stabilised(z, c, epsilon) for z, c in zip(outputs, cs, strict=True)]
    pairs = zip(outputs, cs, passed, strict=True)
    kept = [part for z, c, p in pairs for part in edge(z, c - p, guarded=True)]
    return {"epsilon": sum(kept[1:], start=kept[0]), **_at_zero(node, call, passed)}


def _at_zero(node: fx.Node, call: Call, cs: Sequence[Tensor]) -> Mapping[Account, Tensor]:
    """Σ f(0)·c of the op at zero explained inputs; an infinite input is a mask, and takes all."""
    product = product_of(call.op)
    if product is not None:
        return _of_terms(call, product.terms, cs[0])
    tensors = sum(isinstance(leaf, Tensor) for leaf in tree_leaves((call.args, call.kwargs)))
    if (
        node.target is ops.winner
        or is_structural_op(call.op)
        or is_homogeneous(call.op, tensors, len(call.primals))
    ):
        return {}
    if node.target is ops.identity:
        if node.meta.get("vanishes"):
            return {}
        x = call.primals[0]
        masked = torch.where(torch.isinf(x), call.function(x), intercept(call.function, x))
        return {"intercept": edge(masked, cs[0], guarded=True)[0]}
    if node.target is ops.norm and packet(call.op) in _SHIFTS:
        return _of_shift(call, cs[0])
    output = parts_of(call.function(*[torch.zeros_like(primal) for primal in call.primals]))
    sums = [part for y, c in zip(output, cs, strict=True) for part in edge(y, c, guarded=True)]
    if not sums:
        return {}
    return {_cause(node): sum(sums[1:], start=sums[0])}


def _of_terms(call: Call, terms: Sequence[int], c: Tensor) -> Mapping[Account, Tensor]:
    """What is added to a product, if it is a constant: a bias."""
    given: list[tuple[Any, Any]] = [(p, call.args[p]) for p in terms if p < len(call.args)]
    if "bias" in call.kwargs:
        given = [("bias", call.kwargs["bias"])]
    for position, bias in given:
        if isinstance(bias, Tensor) and position not in call.positions:
            if is_convolution(call.op):
                bias = bias.reshape(-1, *[1] * (call.args[1].dim() - 2))
            return _broadcast("bias", bias * call.kwargs.get("beta", 1), c)
    return {}


_SHIFTS = {aten.layer_norm: 3, aten.group_norm: 3, aten.rms_norm: None}
"""Norms that add one number to each element or channel, and the argument that it is."""


def _of_shift(call: Call, c: Tensor) -> Mapping[Account, Tensor]:
    """What a norm adds."""
    place = _SHIFTS[packet(call.op)]
    shift = None
    if place is not None:
        shift = call.args[place] if len(call.args) > place else call.kwargs.get("bias")
    if shift is None:
        return {}
    if packet(call.op) is aten.group_norm:
        shift = shift.reshape(-1, *[1] * (call.primals[0].dim() - 2))
    return _broadcast("shift", shift, c)


def _broadcast(cause: str, constant: Tensor, c: Tensor) -> Mapping[Account, Tensor]:
    """Σ constant·c of a constant that is broadcast to the output."""
    wide = torch.promote_types(c.dtype, torch.float32)
    return {cause: edge(constant, c.to(wide).sum_to_size(constant.shape))[0]}


def _cause(node: fx.Node) -> str:
    """What a constant is called that an op adds: a bias if it is a parameter."""
    others = [leaf for leaf in leaves(node.args[1:]) if not ops.is_explained(leaf)]
    return "bias" if any(leaf.op == "get_attr" for leaf in others) else "constant"
