"""Around the run of a program: modes of PyTorch, and what is said when memory is short."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from attnlrp_fx.capture.autocast import without_autocast
from attnlrp_fx.errors import OutOfMemoryError

P = ParamSpec("P")
R = TypeVar("R")


def not_traced(function: Callable[P, R]) -> Callable[P, R]:
    """A function that `torch.compile` around it calls, and does not look into."""
    wrapped: Callable[P, R] = torch.compiler.disable(function)
    return wrapped


@contextmanager
def computing(differentiable: bool = False) -> Iterator[None]:
    """Run a program: in the dtypes that it was captured with, and with gradients or without.

    Args:
        differentiable: whether autograd may follow it, if it follows what surrounds the call.
    """
    follows = differentiable and torch.is_grad_enabled()
    with (
        torch.inference_mode(False),  # which turns gradients on
        torch.set_grad_enabled(follows),
        without_autocast(),
    ):
        yield


@contextmanager
def short_of_memory(remedies: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Say what helps if a batch does not fit into memory.

    Raises:
        OutOfMemoryError: an allocation failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # of a CPU's memory PyTorch raises the latter
        is_short = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_short and "can't allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(
            "there is not enough memory to explain this batch",
            why=" ".join(str(error).split())[:300],
            remedy=", or ".join(remedies()),
        ) from error
