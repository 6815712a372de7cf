"""Modes of PyTorch's in which programs run, whatever surrounds a call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from attnlrp_fx.capture.autocast import without_autocast

P = ParamSpec("P")
R = TypeVar("R")


def not_traced(function: Callable[P, R]) -> Callable[P, R]:
    """A function that `torch.compile` around it calls, and does not look into."""
    wrapped: Callable[P, R] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
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
