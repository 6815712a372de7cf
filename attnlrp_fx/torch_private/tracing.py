"""How models are captured and programs traced.

- `TRACING`: what tracing and compiling set (modes, patched methods, counters of symbols) belongs to
  the process, so that only one thread may do it at a time.
- `unlike_symbols`: export gives two dimensions of equal example size one symbol ("duck shapes"),
  which would tie the batch to whatever else has its size; only a private setting turns that off.
- `nothing_remembered`: PyTorch remembers what ops make of fake tensors; with symbolic sizes looking
  it up takes longer than finding it anew.
- `own_backwards`: no hook tells that an `autograd.Function` is called, so its `apply` is watched.
- `outside_of_tracing`: computing with real values while a model is traced.
- `symbolic_dispatch`, `composite`: while ops are recorded, those that PyTorch makes of others must
  be taken apart by what it has for symbolic sizes.
- `decompositions`: ops written out, for those whose own derivative is not exact.
- `lazy_graph_module`, `written_late`, `written`: graphs whose Python code is written when they are
  first called or shown. That takes a tenth of a compilation, and of most graphs nobody reads it.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch._dynamo.config as dynamo_config
import torch.fx.experimental._config as symbolic_shapes_config
from torch import fx, nn
from torch._decomp import get_decompositions
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache
from torch.fx._lazy_graph_module import _LazyGraphModule, _use_lazy_graph_module
from torch.utils._python_dispatch import (
    _disable_current_modes,
    autograd_would_have_decomposed,
)

TRACING = threading.RLock()
"""Held while a model is captured, and while a program is traced and compiled."""


@contextmanager
def unlike_symbols() -> Iterator[None]:
    """Give every dynamic dimension a symbol of its own while a model is captured."""
    config: Any = symbolic_shapes_config  # which makes itself a module with `patch`
    with config.patch(use_duck_shape=False):
        yield


@contextmanager
def nothing_remembered(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """A fake-tensor mode looks nothing up; if none is given, those that are made in it."""
    if mode is None:
        with dynamo_config.patch(fake_tensor_cache_enabled=False):
            yield
    else:
        with disable_fake_tensor_cache(mode):
            yield


@contextmanager
def own_backwards() -> Iterator[dict[str, None]]:
    """Which autograd functions that are not PyTorch's a model calls.

    Their forward alone is captured: what they hand back as a derivative leaves no trace in a graph.
    """
    called: dict[str, None] = {}
    function: Any = torch.autograd.Function
    apply = function.__dict__["apply"]

    def recorded(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            called[cls.__qualname__] = None
        return apply.__func__(cls, *args, **kwargs)

    function.apply = classmethod(recorded)
    try:
        yield called
    finally:
        function.apply = apply


def outside_of_tracing() -> AbstractContextManager[Any]:
    """A context in which ops on real tensors are computed, not traced."""
    return _disable_current_modes()


def symbolic_dispatch() -> AbstractContextManager[Any]:
    """A context in which what ops are made of keeps symbolic sizes, rather than reading numbers."""
    return enable_python_dispatcher()


def composite(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether an op is made of others wherever it is differentiated, and has no kernel of its own.

    Not so the questions that PyTorch asks a tensor, as of its device, and ops that run graphs.
    """
    if op.namespace == "prim" or not isinstance(op, torch._ops.OpOverload):
        return False
    return bool(autograd_would_have_decomposed(op, [*args, *kwargs.values()]))


def decompositions(ops: Sequence[Any]) -> dict[Any, Callable[..., Any]]:
    """PyTorch's own way of writing ops out in simpler ones, by overload."""
    return dict(get_decompositions(ops))


def lazy_graph_module(root: nn.Module | dict[str, Any], graph: fx.Graph) -> fx.GraphModule:
    """A graph module whose Python code is written when it is first called or shown."""
    return _LazyGraphModule(root, graph)


def written_late() -> AbstractContextManager[None]:
    """A context in which PyTorch makes graph modules of that kind, too."""
    context: AbstractContextManager[None] = _use_lazy_graph_module(True)
    return context


def written(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with its Python code: Dynamo cannot follow how it is written."""
    _LazyGraphModule.force_recompile(graph_module)
    return graph_module
