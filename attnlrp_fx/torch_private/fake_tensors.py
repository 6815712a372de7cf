"""Tensors that have sizes and no values.

- `fake_mode_of`, `fresh`: the fake-tensor mode of a captured graph, in which it is traced again,
  so that both share their symbols; a fake tensor that is no view, which Inductor cannot take in.
- `is_plain_fake`: whether a fake tensor has sizes alone, so that what an op makes of it has, too.
- `new_fake_mode`, `storage_of`: tensors with sizes and no values, on any device; which of them
  share memory.
- `new_symbols`: where those sizes are that are not known before a program runs: Inductor looks for
  that in a graph's metadata.
"""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings


def fake_mode_of(graph_module: fx.GraphModule) -> FakeTensorMode:
    """The fake-tensor mode that a captured graph's values belong to."""
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            return value.fake_mode
    raise ValueError("the graph has no fake values: it was not captured by torch.export")


def fresh(value: Any) -> Any:
    """A fake tensor of the same sizes and strides that is nobody's view; anything else as it is."""
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(
            value.shape, value.stride(), dtype=value.dtype, device=value.device
        )


def is_plain_fake(value: Tensor) -> bool:
    """Whether it is a fake tensor with strides, for any values: of some, PyTorch knows them."""
    is_fake = isinstance(value, FakeTensor) and value.constant is None
    return is_fake and value.layout is torch.strided


def new_fake_mode() -> FakeTensorMode:
    """A mode in which tensors have sizes and no values; a graph's own constants may be real."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def storage_of(tensor: torch.Tensor) -> int:
    """What identifies the memory that a tensor lies in, for as long as it lives."""
    return int(tensor.untyped_storage()._cdata)


def new_symbols(mode: FakeTensorMode, result: Any) -> Any:
    """Where in an op's result the sizes are that depend on values; None if there are none.

    Inductor looks for them in a node's `meta["unbacked_bindings"]`.
    """
    return compute_unbacked_bindings(mode.shape_env, result)
