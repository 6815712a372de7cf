"""Fake results that shapes alone tell: of the ops that programs are mostly made of.

PyTorch finds them by arithmetic of symbolic sizes in Python, a few milliseconds an op, up to 20.
Here sizes are compared as expressions. What is not plain is left to PyTorch, so that no size is
ever guessed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnlrp_fx.graph.operators import aten
from attnlrp_fx.torch_private import (
    expression_of,
    is_plain_fake,
    new_fake_mode,
    outside_of_tracing,
)

VIEWS = (aten.view.default, aten._unsafe_view.default)

Expressions = tuple[Any, ...]
Shapes = Sequence[Sequence[Any]]


def fake_result(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an op makes of fake tensors; NotImplemented where PyTorch has to find it.

    Args:
        op: an overload of an op.
        args: what it is called with, under the tensors' own fake-tensor mode, below autograd.
        kwargs: the same.
    """
    find = _view if op in VIEWS else _shaped if op in SHAPES else _elementwise
    if find is _elementwise and not _is_elementwise(op):
        return NotImplemented
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    is_placed = any(kwargs.get(name) is not None for name in ("device", "layout", "memory_format"))
    if is_placed or not tensors or not all(map(is_plain_fake, tensors)):
        return NotImplemented
    is_apart = len({value.device for value in tensors}) > 1
    return NotImplemented if is_apart else find(op, args, kwargs)


def _product(one: Tensor, other: Tensor) -> Shapes:
    fits = expression_of(one.shape[-1]) == expression_of(other.shape[-2])
    return [[*one.shape[:-1], other.shape[-1]]] if fits else []


def _reduced(value: Tensor, dim: Any, keepdim: bool = False, **options: Any) -> Shapes:
    if not dim or not is_contiguous(value):
        return []
    over = {d % value.dim() for d in dim}
    sizes = [1 if d in over else size for d, size in enumerate(value.shape)]
    return [[size for d, size in enumerate(sizes) if keepdim or d not in over]]


def _same(value: Tensor, *others: Any, **options: Any) -> Shapes:
    return [value.shape] if is_contiguous(value) else []


def _normed(value: Tensor, normed: Sequence[Any], *others: Any) -> Shapes:
    statistics = [*value.shape[: value.dim() - len(normed)], *[1] * len(normed)]
    return [value.shape, statistics, statistics] if is_contiguous(value) else []


SHAPES: Mapping[Any, Callable[..., Shapes]] = {
    aten.addmm.default: lambda _, one, other, **options: _product(one, other),
    aten.sum.dim_IntList: _reduced,
    aten.mean.dim: _reduced,
    aten._softmax.default: _same,
    aten._safe_softmax.default: _same,
    aten._to_copy.default: _same,
    aten.clone.default: _same,
    aten.native_layer_norm.default: _normed,
}
"""The shapes of an op's results, which are contiguous; nothing where that is not plain."""


def _shaped(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shapes = SHAPES[op](*args, **kwargs)
    if not shapes:
        return NotImplemented
    results = [
        torch.empty(shape, dtype=dtype, device=args[0].device)
        for shape, dtype in zip(shapes, _dtypes(op, args, kwargs), strict=True)
    ]
    return results[0] if len(results) == 1 else tuple(results)


def _view(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value, shape = args
    sizes = viewed_sizes(value, shape) if is_contiguous(value) else None
    if sizes is None:
        return NotImplemented
    return torch.as_strided(value, sizes, [math.prod(sizes[i + 1 :]) for i in range(len(sizes))])


def viewed_sizes(value: Tensor, shape: Sequence[Any]) -> list[Any] | None:
    """The sizes of a view, the one that is told by the others, too; None if that is not plain."""
    count, sizes = value.numel(), list(shape)
    inferred = [i for i, size in enumerate(sizes) if isinstance(size, int) and size == -1]
    if inferred:
        rest = math.prod(size for i, size in enumerate(sizes) if i not in inferred)
        if isinstance(rest, int) and rest == 0:
            return None
        sizes[inferred[0]] = count // rest
    return sizes if expression_of(math.prod(sizes)) == expression_of(count) else None


def _elementwise(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    leaves = pytree.tree_leaves((args, kwargs))
    laid_out = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not laid_out:
        return NotImplemented
    shapes = list(map(_shape, laid_out))
    whole = next((i for i, w in enumerate(shapes) if all(_fits(s, w) for s in shapes)), None)
    # The first that is as large as the result gives it its strides, unless one before it does.
    if whole is None or not (
        all(map(is_contiguous, laid_out)) or (whole == 0 and order_of(laid_out[0]) is not None)
    ):
        return NotImplemented
    like = laid_out[whole]
    (dtype,) = _dtypes(op, args, kwargs)
    if is_contiguous(like):  # whose strides need not be multiplied out again
        return torch.empty(like.shape, dtype=dtype, device=like.device)
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype, device=like.device)


@cache
def _is_elementwise(op: Any) -> bool:
    """Whether an op gives one new tensor, each element of one element of each operand."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    returns = op._schema.returns
    return (
        torch.Tag.pointwise in op.tags
        and not op._schema.is_mutable
        and [str(value.type) for value in returns] == ["Tensor"]
        and returns[0].alias_info is None
    )


def _dtypes(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.dtype, ...]:
    """The dtypes of an op's results."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return _dtypes_of_kinds(op, spec, tuple(map(_kind, leaves)), torch.get_default_dtype())


def _kind(leaf: Any) -> Any:
    """What of an argument decides an op's dtypes: of sizes, that they are numbers."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.dim(), leaf.device
    for symbolic, number in ((torch.SymInt, 1), (torch.SymFloat, 1.0), (torch.SymBool, True)):
        if isinstance(leaf, symbolic):
            return type(number), number
    return type(leaf), leaf


@lru_cache(4096)
def _dtypes_of_kinds(
    op: Any, spec: pytree.TreeSpec, kinds: tuple[Any, ...], default: torch.dtype
) -> tuple[torch.dtype, ...]:
    """The same, of tensors with one element; integers may become the default dtype."""
    with outside_of_tracing(), new_fake_mode():
        leaves = [
            torch.empty([1] * kind[1], dtype=kind[0], device=kind[2]) if len(kind) == 3 else kind[1]
            for kind in kinds
        ]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        if op is aten.native_layer_norm.default:
            args = (args[0], [1] * len(args[1]), *args[2:])
        results = op(*args, **kwargs)
        return tuple(value.dtype for value in pytree.tree_leaves(results))


def order_of(value: Tensor) -> tuple[int, ...] | None:
    """Dimensions by stride, largest first; None if there may be gaps or overlaps between them."""
    return _order(_shape(value), _strides(value))


def _strides(value: Tensor) -> Expressions:
    """Strides as expressions."""
    return tuple(map(expression_of, value.stride()))


def is_contiguous(value: Tensor) -> bool:
    """Whether it is for sure."""
    return order_of(value) == tuple(range(value.dim()))


def _shape(value: Tensor) -> Expressions:
    return tuple(map(expression_of, value.shape))


@lru_cache(4096)
def _order(shape: Expressions, strides: Expressions) -> tuple[int, ...] | None:
    order: list[int] = []
    expected, left = expression_of(1), list(range(len(shape)))
    while left:
        # From the last: of two dimensions with one stride, one has a single element.
        fitting = [d for d in reversed(left) if strides[d] == expected]
        if not fitting:
            return None
        found = next((d for d in fitting if shape[d] == 1), fitting[0])
        left.remove(found)
        order.insert(0, found)
        expected = expected * shape[found]
    return tuple(order)


@lru_cache(4096)
def _fits(shape: Expressions, whole: Expressions) -> bool:
    """Whether a shape is broadcast to another without a doubt."""
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(size in (1, other) for size, other in pairs)
