"""The one place where PyTorch's private API is used.

- `unlike_symbols`: export gives two dimensions of equal example size one symbol ("duck shapes"),
  which would tie the batch to whatever else has its size; only a private setting turns that off.
- `inductor`: compiling a graph that nobody will differentiate, with the symbols of its own
  placeholders, needs `standalone_compile`, exported from `torch._inductor` without documentation.
- `fake_mode_of`, `fresh`: the fake-tensor mode of a captured graph, in which it is traced again,
  so that both share their symbols; a fake tensor that is no view, which Inductor cannot take in.
- `typical_size`: what a symbolic size would be, from its expression.

`tests/test_torch_private.py` uses each of them, so that an upgrade fails loudly.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx.experimental._config as symbolic_shapes_config
from torch import fx
from torch._inductor import standalone_compile
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


@contextmanager
def unlike_symbols() -> Iterator[None]:
    """Give every dynamic dimension a symbol of its own while a model is captured."""
    with symbolic_shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield


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


def typical_size(size: int | torch.SymInt, typical: int) -> float:
    """A size as a number, each of its symbols counted as `typical`."""
    if isinstance(size, int):
        return float(size)
    expression = size.node.expr
    return float(expression.subs(dict.fromkeys(expression.free_symbols, typical)))


def inductor(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph of ATen ops with Inductor, dynamic where its placeholders are symbolic."""
    with torch.no_grad(), unlike_symbols():
        return standalone_compile(graph_module, list(inputs), dynamic_shapes="from_graph")
