"""How programs are compiled.

- `inductor`, `inductor_lowered`, `inductor_decompositions`: compiling a graph that nobody will
  differentiate, with the symbols of its own placeholders. `standalone_compile`, exported from
  `torch._inductor` without documentation, traces it twice before; `compile_fx_forward` takes what
  is functional, and written out in the ops that Inductor has, as it is.
- `inductor_differentiable`: the same of one that autograd goes through, for `torch.compile`, whose
  own backend has Inductor's lowerings.
- `kernels_meanwhile`: Inductor waits for the kernels of each graph before it takes the next.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config as inductor_config
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._inductor import standalone_compile

from attnlrp_fx.torch_private.fake_tensors import fake_mode_of
from attnlrp_fx.torch_private.lowerings import mended_lowerings
from attnlrp_fx.torch_private.tracing import TRACING, unlike_symbols


def inductor(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph of ATen ops with Inductor, dynamic where its placeholders are symbolic."""
    with torch.no_grad(), unlike_symbols(), mended_lowerings(inputs):
        return standalone_compile(graph_module, list(inputs), dynamic_shapes="from_graph")


def inductor_decompositions() -> Mapping[Any, Callable[..., Any]]:
    """How Inductor has ops written out that it has no lowering for, by overload."""
    import_module("torch._inductor.lowering")  # Some of them look for it, none imports it.
    from torch._inductor.decomposition import select_decomp_table  # It takes a second.

    table: Mapping[Any, Callable[..., Any]] = select_decomp_table()
    return table


def inductor_differentiable(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Compile a graph and its derivative, as a backend of `torch.compile`."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    def inner(graph_module: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        with TRACING, mended_lowerings(inputs):
            return compile_fx_inner(graph_module, inputs, **settings)

    with TRACING, mended_lowerings(inputs):  # for the cache; the derivative is compiled later
        return compile_fx(graph_module, inputs, inner_compile=inner)


_GRAPHS = count()
"""Numbers that tell graphs apart where Inductor records them for CUDA."""


def inductor_lowered(graph_module: fx.GraphModule, in_cpp: bool) -> Callable[..., Any]:
    """Compile a graph that is functional, and written out, and runs no other graph.

    Args:
        graph_module: it; its outputs are laid out as its metadata says.
        in_cpp: whether C++ calls its kernels, or Python.
    """
    from torch._inductor.compile_fx import (  # It takes a second, all of it.
        compile_fx_forward,
        compile_fx_inner,
    )
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.utils import BoxedBool
    from torch._inductor.virtualized import V

    mode = fake_mode_of(graph_module)
    inputs = [node.meta["val"] for node in graph_module.graph.find_nodes(op="placeholder")]
    (output,) = graph_module.graph.find_nodes(op="output")
    # What convolutions make it lays out as it likes, and with it the views of that.
    returns_views = any(
        value._is_view()
        for value in fx.map_arg(output.args[0], lambda node: node.meta["val"])
        if isinstance(value, Tensor)
    )
    is_free = inductor_config.layout_optimization and not returns_views
    extra: Any = SimpleNamespace(
        cudagraphs=BoxedBool(inductor_config.triton.cudagraphs),
        graph_id=next(_GRAPHS),
        forward_device=BoxedDeviceIndex(None),
    )
    with ExitStack() as stack:
        for context in (
            torch.no_grad(),
            unlike_symbols(),
            tracing(TracingContext(mode)),
            V.set_fake_mode(mode),
            mended_lowerings(inputs),
            inductor_config.patch(layout_optimization=is_free, cpp_wrapper=in_cpp),
            enable_python_dispatcher(),
        ):
            stack.enter_context(context)
        compiled = compile_fx_forward(
            graph_module,
            inputs,
            num_orig_model_outputs=len(output.args[0]),
            num_example_inputs=len(inputs),
            compiler_config_extra=extra,
            inner_compile=partial(compile_fx_inner, cpp_wrapper=in_cpp),
            is_inference=True,
        )
    return lambda *arguments: compiled(list(arguments))


@contextmanager
def kernels_meanwhile() -> Iterator[None]:
    """Inductor takes the next graph while the last one's kernels are compiled, by other processes.

    They are ready when the context ends, by an error too: PyTorch remembers what it has made. In
    other threads it waits for them.

    Raises:
        Exception: what the compiler of kernels raises, when the context ends.
    """
    from torch._inductor.async_compile import AsyncCompile, get_compile_threads
    from torch._inductor.codecache import CppWrapperCodeCache

    wait, load, here = AsyncCompile.wait, CppWrapperCodeCache.load_pybinding, threading.get_ident()
    with ExitStack() as waiting:

        def later(self: Any, scope: dict[str, Any]) -> None:
            if threading.get_ident() == here:
                waiting.callback(wait, self, scope)
            else:
                wait(self, scope)

        def loaded_later(*given: Any, **settings: Any) -> Callable[..., Any]:
            if threading.get_ident() != here:
                return load(*given, **settings)  # type: ignore[no-any-return]
            if get_compile_threads() > 1:
                settings["submit_fn"] = AsyncCompile.submit
            ready = CppWrapperCodeCache.load_pybinding_async(*given, **settings)
            waiting.callback(ready)
            return lambda arguments: ready()(arguments)

        with (
            patch.object(AsyncCompile, "wait", later),
            patch.object(CppWrapperCodeCache, "load_pybinding", loaded_later),
        ):
            yield
