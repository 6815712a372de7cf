"""Modes of PyTorch's in which programs run, whatever surrounds a call."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def computing(device: torch.device, differentiable: bool = False) -> Iterator[None]:
    """Run a program: in the dtypes that it was captured with, and with gradients or without.

    Args:
        device: where it runs.
        differentiable: whether autograd may follow it, if it follows what surrounds the call.
    """
    follows = differentiable and torch.is_grad_enabled()
    with (
        torch.inference_mode(False),  # which turns gradients on
        torch.set_grad_enabled(follows),
        torch.autocast(device.type, enabled=False),
    ):
        yield
