"""Backends: what runs a program graph.

"eager" runs the graph as it is; "inductor" compiles it. A callable of (graph module, example
inputs), as for torch.compile, is a backend too.

What autograd goes through is compiled by `torch.compile`, which makes a program of the derivative
as well. It does so at the first call, and once more without gradients if it is called without.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import torch_private
from attnlrp_fx.errors import BackendError

Runnable = Callable[..., Any]
Backend = Callable[[fx.GraphModule, Sequence[Any]], Runnable]


def eager(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
    """The graph as it is."""
    return graph_module.forward


BACKENDS: Mapping[str, Backend] = {"eager": eager, "inductor": torch_private.inductor}


def backend_named(backend: str | Backend) -> Backend:
    """A backend by its name, or as it is.

    Raises:
        BackendError: there is no backend of that name.
    """
    if not isinstance(backend, str):
        return backend
    if backend not in BACKENDS:
        raise BackendError(
            f"there is no backend '{backend}'",
            remedy=f"use one of: {', '.join(BACKENDS)}, or pass a callable",
        )
    return BACKENDS[backend]


def compile_differentiable(graph_module: fx.GraphModule, backend: str | Backend) -> Runnable:
    """Make a program graph runnable under autograd."""
    graph_module = torch_private.written(graph_module)
    if backend == "eager":
        return eager(graph_module, ())
    compiled: Runnable = torch.compile(graph_module, backend=backend, dynamic=True, fullgraph=True)

    def runnable(*arguments: Any) -> Any:
        # Whether an argument is a view of something would be part of what is compiled for.
        return compiled(
            *[a if not isinstance(a, Tensor) or a.requires_grad else a.detach() for a in arguments]
        )

    return runnable


def compile_graph(graph_module: fx.GraphModule, backend: str | Backend) -> Runnable:
    """Make a program graph runnable.

    Raises:
        BackendError: the backend failed; the message names its own error.
    """
    inputs = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    compiler = backend_named(backend)
    try:
        return compiler(torch_private.written(graph_module), inputs)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise BackendError(
            f"backend '{backend}' could not compile the program",
            why=f"{type(error).__name__}: {reason[0][:300]}",
            remedy="use backend='eager', and report this with the model's config",
        ) from error
