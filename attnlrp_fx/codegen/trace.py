"""Tracing: the ops that a function calls on fake tensors, as one flat graph of ATen.

A dispatch mode below autograd and functorch writes down every op. A size that it is called with is
computed in the graph from its expression, of the inputs' sizes, so that the arithmetic of sizes
need not be followed: `make_fx` does, of every size that anything asks for, and takes longer.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from attnlrp_fx.codegen.sizes import Sizes
from attnlrp_fx.torch_private import composite, symbolic_dispatch

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


class Input(NamedTuple):
    """An input of a traced program."""

    part: str
    """What it is: "attribute", "input" or "seed"."""
    name: str
    value: Any
    """A fake tensor, or a symbolic size."""


class Trace:
    """A graph that is being traced.

    Args:
        inputs: what the program takes; their sizes are all that its sizes are computed from, as far
            as they are no seeds'.
        written_out: how to write ops out in others, by overload.
    """

    def __init__(
        self, inputs: Sequence[Input], written_out: Mapping[Any, Callable[..., Any]] | None = None
    ) -> None:
        self.graph = fx.Graph()
        self.written_out = written_out or {}
        self.origin: dict[str, str] = {}
        """Where ops come from: a node of another graph, and which side."""
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, fx.Node] = {}
        for part, name, value in inputs:
            self._take(part, name, value)
        self.sizes = Sizes(self.graph)

    def run(self, function: Callable[[], Sequence[Any]]) -> fx.GraphModule:
        """The ops that a function calls on the inputs' values, and what it returns."""
        with ExitStack() as stack:
            stack.enter_context(symbolic_dispatch())
            stack.enter_context(_Recorder(self))
            results = function()
        self.graph.output([self._argument(result) for result in results])
        for node in self.graph.nodes:
            if isinstance(value := node.meta.get("val"), Tensor) and value.requires_grad:
                node.meta["val"] = value.detach()
        return fx.GraphModule(self.constants, self.graph)

    @contextmanager
    def at(self, node: fx.Node, phase: str) -> Iterator[None]:
        """Say of which node, and which side, the ops are that are called meanwhile."""
        before, self.origin = self.origin, {"from": node.name, "phase": phase}
        yield
        self.origin = before

    def called(self, op: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Write down a call."""
        name = self.graph._target_to_str(op.overloadpacket.__name__)
        args = fx.node.map_aggregate(args, self._argument)
        kwargs = fx.node.map_aggregate(kwargs, self._argument)
        node = self.graph.create_node("call_function", op, args, kwargs, name)
        if self.origin:
            node.meta["custom"] = self.origin
        self._keep(node, result)

    def _take(self, part: str, name: str, value: Any) -> None:
        readable = re.sub(r"\W", "_", name)
        node = self.graph.placeholder(f"_{readable}" if readable[0].isdigit() else readable)
        node.target = node.name
        node.meta = {"val": value, "name": name, "part": part}
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node

    def _keep(self, node: fx.Node, result: Any) -> None:
        """Remember which node a result is of; nodes hold results, so that none is another's."""
        node.meta["val"] = result
        if isinstance(result, Tensor):
            self._nodes[id(result)] = node
        elif isinstance(result, SYMBOLIC):
            self.sizes.know(result, node)
        elif isinstance(result, list | tuple):
            for i, part in enumerate(result):
                if isinstance(part, (Tensor, *SYMBOLIC)):
                    item = self.graph.call_function(operator.getitem, (node, i))
                    item.meta = dict(node.meta)
                    self._keep(item, part)

    def _argument(self, value: Any) -> Any:
        """A value as a graph's argument: the node that it is of."""
        if isinstance(value, Tensor):
            node = self._nodes.get(id(value))
            return self._constant(value) if node is None else node
        return self.sizes.node(value) if isinstance(value, SYMBOLIC) else value

    def _constant(self, value: Tensor) -> fx.Node:
        """A tensor that the function made of numbers."""
        name = f"_tensor_constant{len(self.constants)}"
        self.constants[name] = value
        node = self.graph.get_attr(name)
        node.meta["val"] = value
        self._nodes[id(value)] = node
        return node


class _Recorder(TorchDispatchMode):
    """Tells a trace of every op that is called."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # It has no types.
        self._trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        trace = self._trace
        if func in trace.written_out:
            with self:
                result = trace.written_out[func](*args, **kwargs)
            if result is not NotImplemented:
                return result
        if composite(func, args, kwargs):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if func.namespace != "prim":
            trace.called(func, args, kwargs, result)
        return result
