"""Where Inductor's way of compiling an op is not ours.

Inductor keeps how it compiles each op in a table, and asks functions of its module `lowering` which
kernels it has; neither can be told otherwise but by putting something else in their place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch import Tensor

from attnlrp_fx.torch_private.instructions import wait_for_instructions

_MENDED = "attnlrp_fx 3"
"""What tells apart, in Inductor's cache, what was compiled with other lowerings."""

_Lowering = Callable[..., Any]
aten = torch.ops.aten


@contextmanager
def mended_lowerings(inputs: Sequence[Any]) -> Iterator[None]:
    """Have other kernels for what Inductor, of a graph with such inputs, compiles wrong or slow.

    Wrong, so that PyTorch's own kernels are taken:

    - A convolution's derivative, since torch 2.13: it takes the example's sizes for the only ones.
    - On CPUs, what adds up elements by their indices (torch 2.13). With one thread some sums are
      wrong, as UPerNet's in the zoo; why is not known. With more, it cannot write a kernel where
      all indices are one, as in a map of one pixel.

    Slow, on CPUs (`benchmarks/kernels.py`):

    - Products with weights in float32: oneDNN's are faster than MKL's, which PyTorch calls.
    - The complementary error function, of which the factor of GELU is made.
    """
    wait_for_instructions()
    lowering: Any = import_module("torch._inductor.lowering")  # It takes a second.
    settings: Any = torch.compiler.config
    convolution = aten.convolution_backward.default
    lowerings = {convolution: lowering.fallback_handler(convolution, add_to_fallback_set=False)}
    patched: dict[str, _Lowering] = {}
    has_onednn = _has_onednn()
    if not any(isinstance(v, Tensor) and v.device.type != "cpu" for v in inputs):
        lowerings |= _error_functions(lowering)
        if has_onednn:
            lowerings |= _products(lowering)
        falls_back = lowering.use_scatter_fallback
        patched = {
            "needs_fallback_due_to_atomic_add_limitations": lambda dtype: True,
            "use_scatter_fallback": lambda op, reduction, *given: (
                reduction is not None or falls_back(op, reduction, *given)
            ),
        }
    tag = f"{settings.cache_key_tag} {_MENDED} {'oneDNN' if has_onednn else ''}"
    with ExitStack() as stack:
        stack.enter_context(patch.dict(lowering.lowerings, lowerings))
        stack.enter_context(settings.patch(cache_key_tag=tag))
        for name, mended in patched.items():
            stack.enter_context(patch.object(lowering, name, mended))
        yield


def _has_onednn() -> bool:
    """Whether oneDNN is there, and wanted, where PyTorch would call MKL."""
    library = torch.backends.mkldnn
    return torch.backends.mkl.is_available() and library.is_available() and bool(library.enabled)


_WORTHWHILE = 1 << 18
"""Elements of a matrix from which oneDNN wins at nearly any number of rows: of smaller ones, its
calls themselves are most of the time."""


def _products(lowering: Any) -> Mapping[Any, _Lowering]:
    """x·W and b + x·W with matrices W whose sizes are known."""
    ir: Any = import_module("torch._inductor.ir")
    onednn: Any = import_module("torch._inductor.mkldnn_ir")
    table = lowering.lowerings

    def is_ours(x: Any, weight: Any) -> bool:
        rows, columns = weight.get_size()
        return (
            x.get_dtype() is weight.get_dtype() is torch.float32
            and all(isinstance(size, int | sympy.Integer) for size in (rows, columns))
            and rows * columns >= _WORTHWHILE
        )

    def product(x: Any, weight: Any, bias: Any = None) -> Any:
        realised = ir.ExternKernel.realize_input
        inputs = [realised(x), realised(table[aten.permute](weight, [1, 0]))]
        constants: list[Any] = ["none", [-1], ""]  # What is done to the product: nothing.
        if bias is None:
            constants = [None, *constants]
        else:  # It takes a bias for contiguous.
            inputs.append(ir.ExternKernel.require_contiguous(realised(bias)))
        size = [x.get_size()[0], weight.get_size()[1]]
        layout = ir.FixedLayout(device=x.get_device(), dtype=torch.float32, size=size)
        kernel = onednn.LinearUnary(layout=layout, inputs=inputs, constant_args=constants)
        return ir.TensorBox.create(onednn._create_output_node(kernel))

    theirs, theirs_and_sum = table[aten.mm.default], table[aten.addmm.default]

    def mm(x: Any, weight: Any, **settings: Any) -> Any:
        if settings or not is_ours(x, weight):
            return theirs(x, weight, **settings)
        return product(x, weight)

    def addmm(other: Any, x: Any, weight: Any, **settings: Any) -> Any:
        if settings or not is_ours(x, weight):
            return theirs_and_sum(other, x, weight, **settings)
        if list(other.get_size()) == [weight.get_size()[1]]:
            return product(x, weight, other)
        return table[aten.add](product(x, weight), other)

    return {aten.mm.default: mm, aten.addmm.default: addmm}


_ERFC = (
    *(-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806),
    *(0.27886807, -1.13520398, 1.48851587, -0.82215223, 0.17087277),
)
"""log(erfc(z)·exp(z²)/t) in powers of t = 1/(1 + z/2), to 1.2e-7 for z ≥ 0 (Press et al.,
Numerical Recipes, 2nd ed., 1992, §6.2)."""


def _error_functions(lowering: Any) -> Mapping[Any, _Lowering]:
    """erfc in float32, in which less precise numbers are computed, too."""
    virtualized: Any = import_module("torch._inductor.virtualized")
    theirs = lowering.lowerings[aten.erfc.default]

    def erfc(x: Any) -> Any:
        ops = virtualized.ops

        def number(value: float) -> Any:
            return ops.constant(value, torch.float32)

        z = ops.abs(x)
        t = number(1.0) / (number(1.0) + number(0.5) * z)
        exponent = number(0.0)
        for coefficient in reversed(_ERFC):
            exponent = exponent * t + number(coefficient)
        right = t * ops.exp(exponent - z * z)
        return ops.where(x < number(0.0), number(2.0) - right, right)

    def lowered(x: Any) -> Any:
        is_single = x.get_dtype() in (torch.float32, torch.bfloat16, torch.float16)
        return lowering.make_pointwise(erfc)(x) if is_single else theirs(x)

    return {aten.erfc.default: lowered}
