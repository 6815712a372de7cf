"""Where Inductor's way of compiling an op is not ours."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_MENDED = "attnlrp_fx 2"
"""What tells apart, in Inductor's cache, what was compiled with other mends."""


@contextmanager
def mended_lowerings(inputs: Sequence[Any]) -> Iterator[None]:
    """Have PyTorch's own kernels for what Inductor, of a graph with such inputs, compiles wrong.

    - A convolution's derivative, since torch 2.13: it takes the example's sizes for the only ones.
    - On CPUs, what adds up elements by their indices (torch 2.13). With one thread some sums are
      wrong, as UPerNet's in the zoo; why is not known. With more, it cannot write a kernel where
      all indices are one, as in a map of one pixel.
    """
    lowering: Any = import_module("torch._inductor.lowering")  # It takes a second.
    settings: Any = torch.compiler.config
    convolution_backward = torch.ops.aten.convolution_backward.default
    called = {
        convolution_backward: lowering.fallback_handler(
            convolution_backward, add_to_fallback_set=False
        )
    }
    falls_back = lowering.use_scatter_fallback
    tag = f"{settings.cache_key_tag} {_MENDED}"
    with ExitStack() as stack:
        stack.enter_context(patch.dict(lowering.lowerings, called))
        stack.enter_context(settings.patch(cache_key_tag=tag))
        if not any(isinstance(v, Tensor) and v.device.type != "cpu" for v in inputs):
            for name, mended in {
                "needs_fallback_due_to_atomic_add_limitations": lambda dtype: True,
                "use_scatter_fallback": lambda op, reduction, *given: (
                    reduction is not None or falls_back(op, reduction, *given)
                ),
            }.items():
                stack.enter_context(patch.object(lowering, name, mended))
        yield
