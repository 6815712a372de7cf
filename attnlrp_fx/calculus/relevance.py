"""Relevance of a value from what it received: R = x·c + r.

c is a coefficient, r relevance that does not factor by the value. Either may be None, and both are
lists where an op has several outputs.
"""

from typing import Any

import torch
from torch import Tensor


def relevance_of(value: Any, c: Any, r: Any) -> Any:
    """R = x·c + r, in the value's shape."""
    if isinstance(value, list | tuple):
        none = [None] * len(value)
        return [relevance_of(*part) for part in zip(value, c or none, r or none, strict=True)]
    if c is None:
        return torch.zeros_like(value) if r is None else r
    return value * c if r is None else value * c + r


def factored(value: Any, c: Any, r: Any) -> tuple[Any, Tensor]:
    """The coefficient c + r/x, and what is lost of r where x is zero, summed."""
    if isinstance(value, list | tuple):
        none = [None] * len(value)
        parts = [factored(*part) for part in zip(value, c or none, r, strict=True)]
        return [part for part, _ in parts], torch.stack([lost for _, lost in parts]).sum()
    if not value.is_floating_point():
        return r, r.new_zeros(())
    nothing = value == 0
    coefficient = torch.where(nothing, 0, r / torch.where(nothing, 1, value))
    lost = torch.where(nothing, r, 0).sum(dtype=torch.promote_types(r.dtype, torch.float32))
    return coefficient if c is None else c + coefficient, lost
