"""The transposes of the linear ops that most of a graph consists of, written out.

A linear op's pullback is its transpose, which `torch.func.vjp` finds for any op. For the ops of
this table it is one line, and tracing that line is several times faster. For a linear layer it is
needed, too: traced under functorch, one with a bias reads its input's sizes as plain numbers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnlrp_fx.graph.grouped import grouped_mm
from attnlrp_fx.graph.operators import aten, packet

Transpose = Callable[[Tensor], Sequence[Tensor]]


def transpose_of(
    op: Any, args: Sequence[Any], kwargs: dict[str, Any], primals: Sequence[Tensor], y: Tensor
) -> Transpose | None:
    """The transpose of an op in what it explains, None where the table's line does not hold.

    Args:
        op: an overload that the table has.
        args: its arguments.
        kwargs: its keyword arguments.
        primals: the explained ones among the arguments.
        y: its output.
    """
    entry = TRANSPOSES[packet(op)]
    if len(primals) > 1 and packet(op) is not aten.add:
        return None
    if entry in (_summed, _scaled) and any(x.shape != y.shape for x in primals):
        return None
    return entry(args, kwargs, primals)


def _reshaped(args: Any, kwargs: Any, primals: Any) -> Transpose:
    shape = primals[0].shape
    return lambda c: [c.reshape(shape)]


def _matrix(args: Any, kwargs: Any, primals: Any) -> Transpose | None:
    x, weight = args[:2]
    return (lambda c: [c @ weight]) if x is primals[0] and weight.dim() == 2 else None


def _scaled(args: Any, kwargs: Any, primals: Any) -> Transpose | None:
    other = args[1] if args[0] is primals[0] else args[0]
    if primals[0].is_complex() or (isinstance(other, Tensor) and other.is_complex()):
        return None
    return lambda c: [c * other]


def _summed(args: Any, kwargs: Any, primals: Any) -> Transpose | None:
    return (lambda c: [c] * len(primals)) if kwargs.get("alpha", 1) == 1 else None


def _cast(args: Any, kwargs: Any, primals: Any) -> Transpose:
    dtype = primals[0].dtype
    return lambda c: [c.to(dtype)]


def _grouped(product: Callable[..., Tensor]) -> Callable[[Any, Any, Any], Transpose | None]:
    """y = product(x, weight, offsets), for rows x of (S, in) and matrices (E, in, out)."""

    def transpose(args: Any, kwargs: Any, primals: Any) -> Transpose | None:
        x, weight = args[:2]
        offsets = args[2] if len(args) > 2 else kwargs.get("offs")
        if x is not primals[0] or x.dim() != 2 or weight.dim() != 3:
            return None
        matrices = weight.transpose(1, 2)
        return lambda c: [product(c.contiguous(), matrices, offsets)]

    return transpose


TRANSPOSES: dict[Any, Callable[[Any, Any, Any], Transpose | None]] = {
    aten.linear: _matrix,
    aten._grouped_mm: _grouped(aten._grouped_mm),
    "transformers::grouped_mm_fallback": _grouped(
        lambda *args: torch.ops.transformers.grouped_mm_fallback(*args)
    ),
    "attnlrp_fx::grouped_mm": _grouped(grouped_mm),
    aten.view: _reshaped,
    aten.reshape: _reshaped,
    aten._unsafe_view: _reshaped,
    aten.flatten: _reshaped,
    aten.unsqueeze: _reshaped,
    aten.squeeze: _reshaped,
    aten.transpose: lambda args, kwargs, primals: lambda c: [c.transpose(args[1], args[2])],
    aten.add: _summed,
    aten.mul: _scaled,
    aten._to_copy: _cast,
    aten.to: _cast,
    aten.clone: _summed,
    aten.contiguous: _summed,
    aten.neg: lambda args, kwargs, primals: lambda c: [-c],
}
