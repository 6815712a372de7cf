"""The windows of a convolution: which inputs each place of its output reads.

A convolution is y[l] = Σ_k w[k] x[stride·l + dilation·k − padding], of one, two or three
dimensions, in groups of channels; a transposed one swaps x and y. With the windows written out, the
derivative in the weight is a matrix product, of each row by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp_fx.calculus.calls import Call
from attnlrp_fx.graph.operators import aten, packet

TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)


@dataclass(frozen=True)
class Window:
    """What a convolution reads at each place, a number for each spatial dimension."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    paddings: tuple[tuple[int, int], ...]
    """Before and after."""
    dilations: tuple[int, ...]
    groups: int
    transposed: bool

    def places(self, x: Tensor) -> Tensor:
        """What stands in the window at each place: (batch, channels, *places, *sizes)."""
        padded = [end for pair in reversed(self.paddings) for end in pair]
        windows = torch.nn.functional.pad(x, padded) if any(padded) else x
        dims = zip(self.sizes, self.strides, self.dilations, strict=True)
        for dim, (size, stride, dilation) in enumerate(dims, 2):
            windows = windows.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
        return windows


def window_of(call: Call) -> Window:
    """The window of a call of a convolution."""
    op, sizes = packet(call.op), tuple(call.args[1].shape[2:])
    names: tuple[str, ...] = ("stride", "padding", "dilation", "groups")
    if op is aten.convolution:
        names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    elif op in TRANSPOSED:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    given = {**dict(zip(names, call.args[3:], strict=False)), **call.kwargs}
    dilations = _each(given.get("dilation", 1), sizes)
    return Window(
        sizes=sizes,
        strides=_each(given.get("stride", 1), sizes),
        paddings=_ends(given.get("padding", 0), sizes, dilations),
        dilations=dilations,
        groups=int(given.get("groups", 1)),
        transposed=op in TRANSPOSED or bool(given.get("transposed", False)),
    )


def _each(value: Any, sizes: Sequence[int]) -> tuple[int, ...]:
    """A number for each dimension, where one may stand for all."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(values * len(sizes) if len(values) == 1 else values)


def _ends(
    padding: Any, sizes: Sequence[int], dilations: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Padding before and after, in each dimension."""
    if padding == "same":
        missing = [(size - 1) * dilation for size, dilation in zip(sizes, dilations, strict=True)]
        return tuple((all // 2, all - all // 2) for all in missing)
    return tuple((each, each) for each in _each(0 if padding == "valid" else padding, sizes))
