"""Backends: what runs a program graph.

"eager" runs the graph as it is; "inductor" compiles it. A callable of (graph module, example
inputs), as for torch.compile, is a backend too.

What autograd goes through is compiled by `torch.compile`, which makes a program of the derivative
as well. It does so at the first call, and once more without gradients if it is called without.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_leaves

from attnlrp_fx import torch_private
from attnlrp_fx.codegen.trace import written_out
from attnlrp_fx.errors import BackendError

Runnable = Callable[..., Any]
Backend = Callable[[fx.GraphModule, Sequence[Any]], Runnable]


def eager(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
    """The graph as it is."""
    return graph_module.forward


def inductor(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
    """Compiled by Inductor.

    AOTAutograd, which traces graphs twice to make them functional and to write ops out, is left
    out: a program is functional, and traced here once more. Not so the branches of `torch.cond`,
    and not where a size depends on values: it would have another symbol each time.
    """
    has_branches = any(isinstance(part, fx.GraphModule) for part in graph_module.children())
    if has_branches or any(map(_depends_on_values, graph_module.graph.nodes)):
        return torch_private.inductor(graph_module, inputs)
    parts = torch_private.inductor_decompositions()
    return torch_private.inductor_lowered(written_out(graph_module, parts))


def _depends_on_values(node: fx.Node) -> bool:
    """Whether a size is only known when a program runs, as how many elements are not zero."""
    return bool(free_unbacked_symbols(tree_leaves(node.meta.get("val"))))


BACKENDS: Mapping[str, Backend] = {"eager": eager, "inductor": inductor}


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


def compile_graphs(
    graph_modules: Iterable[fx.GraphModule], backend: str | Backend, device: torch.device
) -> dict[fx.GraphModule, Runnable]:
    """Make program graphs runnable that run on a device.

    Raises:
        BackendError: the backend failed; the message names its own error.
    """
    compiler = backend_named(backend)
    # On GPUs it may run kernels to choose among them.
    is_unhurried = compiler is inductor and device.type == "cpu"
    meanwhile = torch_private.kernels_meanwhile if is_unhurried else nullcontext
    try:
        with meanwhile():
            return {
                half: compiler(
                    torch_private.written(half),
                    [node.meta["val"] for node in half.graph.find_nodes(op="placeholder")],
                )
                for half in graph_modules
            }
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        raise BackendError(
            f"backend '{backend}' could not compile the program",
            why=f"{type(error).__name__}: {reason[0][:300]}",
            remedy="use backend='eager', and report this with the model's config",
        ) from error
