"""Grouped matrix products as an op of ours: y[s] = x[s] · W[e], rows in order of their expert e.

Where PyTorch has no kernel for them, transformers has an op of its own, which a graph that is read
without transformers cannot have. This one computes the same, with the same bits.
"""

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("attnlrp_fx::grouped_mm", mutates_args=())
def grouped_mm(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    """Products of consecutive rows with one matrix each.

    Args:
        input: (rows, in), sorted by matrix.
        weight: (matrices, in, out).
        offs: (matrices,), integers: where each matrix's rows end.

    Returns:
        (rows, out); zero behind the last end.
    """
    output = input.new_zeros(input.shape[0], weight.shape[2])
    start = 0
    for matrix, end in zip(weight, offs.tolist(), strict=True):
        if start != end:
            torch.mm(input[start:end], matrix, out=output[start:end])
        start = end
    return output


@torch.library.custom_op("attnlrp_fx::grouped_outer", mutates_args=())
def _grouped_outer(input: Tensor, grad: Tensor, offs: Tensor) -> Tensor:
    """The products' derivative by the matrices: (matrices, in, out)."""
    output = input.new_zeros(offs.shape[0], input.shape[1], grad.shape[1])
    start = 0
    for matrix, end in zip(output, offs.tolist(), strict=True):
        if start != end:
            torch.mm(input[start:end].T, grad[start:end], out=matrix)
        start = end
    return output


@grouped_mm.register_fake
def _(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[2])


@_grouped_outer.register_fake
def _(input: Tensor, grad: Tensor, offs: Tensor) -> Tensor:
    return input.new_empty(offs.shape[0], input.shape[1], grad.shape[1])


def _keep(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    input, weight, offs = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_mm(grad, weight.mT, offs), _grouped_outer(input, grad, offs), None


grouped_mm.register_autograd(_backward, setup_context=_keep)
