"""Backends: what runs a program graph.

"eager" runs the graph as it is; "inductor" compiles it. A callable of (graph module, example
inputs), as for torch.compile, is a backend too.

What autograd goes through is compiled by `torch.compile`, which makes a program of the derivative
as well. It does so at the first call, and once more without gradients if it is called without.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from attnlrp_fx import torch_private
from attnlrp_fx.codegen.fakes import VIEWS
from attnlrp_fx.codegen.regrouped import regrouped
from attnlrp_fx.codegen.retrace import retraced
from attnlrp_fx.errors import BackendError
from attnlrp_fx.graph.operators import placeholders_of

Runnable = Callable[..., Any]
Backend = Callable[[fx.GraphModule, Sequence[Any]], Runnable]


def eager(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Runnable:
    """The graph as it is."""
    return graph_module.forward


def inductor(graph_module: fx.GraphModule, inputs: Sequence[Any], in_cpp: bool = False) -> Runnable:
    """Compiled by Inductor; what calls its kernels is in Python, or in C++.

    AOTAutograd, which traces graphs twice to make them functional and to write ops out, is left
    out: a program is functional, and traced here once more. Not so the branches of `torch.cond`.
    """
    if any(isinstance(part, fx.GraphModule) for part in graph_module.children()):
        return torch_private.inductor(graph_module, inputs)
    parts = {**torch_private.inductor_decompositions(), **dict.fromkeys(VIEWS, regrouped)}
    program, sizes = retraced(graph_module, parts)
    compiled = torch_private.inductor_lowered(program, in_cpp)
    if sizes is None:
        return compiled
    computed = torch_private.written(sizes).forward
    return lambda *arguments: compiled(*arguments, *computed(*arguments))


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
    if backend == "inductor":
        backend = torch_private.inductor_differentiable
    compiled: Runnable = torch.compile(graph_module, backend=backend, dynamic=True, fullgraph=True)

    def runnable(*arguments: Any) -> Any:
        # Whether an argument is a view of something would be part of what is compiled for.
        return compiled(
            *[a if not isinstance(a, Tensor) or a.requires_grad else a.detach() for a in arguments]
        )

    return runnable


def prepare(backend: str | Backend, device: torch.device) -> None:
    """Start what a backend needs anyway, and can do while a model is captured."""
    if backend == "inductor" and device.type == "cpu":
        torch_private.instructions_meanwhile()


class Runnables(NamedTuple):
    """Program graphs that a backend was given."""

    runnables: Mapping[fx.GraphModule, Runnable]
    refused: tuple[str, ...] = ()
    """Why Inductor could not take some, one reason for each: they run op by op."""


def compile_graphs(
    graph_modules: Iterable[fx.GraphModule], backend: str | Backend, device: torch.device
) -> Runnables:
    """Make program graphs runnable that run on a device.

    What Inductor cannot take runs op by op, with a warning, if it took others of them.

    Raises:
        BackendError: the backend failed; the message names its own error.
    """
    compiler = backend_named(backend)
    try:
        if compiler is inductor:
            runnables, refused = _by_inductor(list(graph_modules), device)
        else:
            runnables = {half: _compiled(half, compiler) for half in graph_modules}
            refused = []
        if len(refused) == len(runnables) > 0:
            raise refused[0]
    except Exception as error:
        raise BackendError(
            f"backend '{backend}' could not compile the program",
            why=_reason(error),
            remedy="use backend='eager', and report this with the model's config",
        ) from error
    reasons = tuple(map(_reason, refused))
    if reasons:
        warnings.warn(
            f"{len(reasons)} of {len(runnables)} programs run op by op, for Inductor could not "
            f"compile them ({reasons[0]}); please report this with the model's config",
            stacklevel=2,
        )
    return Runnables(runnables, reasons)


def _compiled(graph_module: fx.GraphModule, compiler: Backend) -> Runnable:
    inputs = [node.meta["val"] for node in placeholders_of(graph_module)]
    return compiler(torch_private.written(graph_module), inputs)


def _by_inductor(
    graph_modules: Sequence[fx.GraphModule], device: torch.device
) -> tuple[dict[fx.GraphModule, Runnable], list[Exception]]:
    """By program graph what runs it, and why Inductor could not take some.

    On CPUs C++ calls the kernels, which is most of a small model's time in Python; where it
    cannot, Python does.
    """
    if device.type != "cpu":  # It may run kernels to choose among them.
        return _each_by_inductor(graph_modules, [inductor])
    compilers: list[Backend] = [partial(inductor, in_cpp=True), inductor]
    try:
        with torch_private.kernels_meanwhile():
            return _each_by_inductor(graph_modules, compilers)
    except Exception:  # of the compiler of C++, perhaps: of which program, it does not say
        with torch_private.kernels_meanwhile():
            return _each_by_inductor(graph_modules, compilers[1:])


def _each_by_inductor(
    graph_modules: Sequence[fx.GraphModule], compilers: Sequence[Backend]
) -> tuple[dict[fx.GraphModule, Runnable], list[Exception]]:
    runnables: dict[fx.GraphModule, Runnable] = {}
    refused: list[Exception] = []
    for graph_module in graph_modules:
        errors: list[Exception] = []
        for compiler in compilers:
            try:
                runnables[graph_module] = _compiled(graph_module, compiler)
                break
            except Exception as error:
                errors.append(error)
        else:
            refused.append(errors[-1])
            runnables[graph_module] = eager(graph_module, ())
    return runnables, refused


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
