"""Views whose dimensions share their elements otherwise, as a matrix's that is shifted row by row.

Inductor would compute each index of such a view by divisions, in whatever reads it, and with
symbolic sizes it is long about it. Said by strides, the view is of a value that lies in memory.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from attnlrp_fx.codegen.fakes import is_contiguous, viewed_sizes
from attnlrp_fx.graph.operators import aten
from attnlrp_fx.torch_private import example_of


def regrouped(value: Tensor, shape: Sequence[Any]) -> Any:
    """What a view of a fake tensor is written out in; NotImplemented if it stays as it is."""
    sizes = viewed_sizes(value, shape) if is_contiguous(value) else None
    if sizes is None or not _shares_otherwise(value.shape, sizes):
        return NotImplemented
    strides = [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]
    return aten.as_strided.default(value, sizes, strides)


def _shares_otherwise(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether somewhere several dimensions become several: split and merged at once."""
    sizes, others = ([e for e in map(example_of, s) if e is not None] for s in (before, after))
    if (len(sizes), len(others)) != (len(before), len(after)):
        return False  # Some depend on values.
    while sizes and others:
        one, other = [sizes.pop()], [others.pop()]
        while math.prod(one) != math.prod(other):
            smaller, rest = (one, sizes) if math.prod(one) < math.prod(other) else (other, others)
            if not rest:
                return False
            smaller.append(rest.pop())
        if all(sum(size != 1 for size in group) > 1 for group in (one, other)):
            return True
    return False
