"""Tracing: the ops that a function calls on fake tensors, as one flat graph of ATen.

A dispatch mode below autograd and functorch writes down every op. A size that it is called with is
computed in the graph from its expression, of the inputs' sizes, so that the arithmetic of sizes
need not be followed: `make_fx` does, of every size that anything asks for, and takes longer.
"""

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from attnlrp_fx.codegen.fakes import fake_result
from attnlrp_fx.codegen.sizes import Sizes
from attnlrp_fx.torch_private import (
    composite,
    lazy_graph_module,
    new_symbols,
    symbolic_dispatch,
)

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
        mode: the mode of the fake tensors, if nodes shall tell which sizes are new with them, for
            they depend on values.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        written_out: Mapping[Any, Callable[..., Any]] | None = None,
        mode: Any = None,
    ) -> None:
        self.graph = fx.Graph()
        self.written_out = written_out or {}
        self._mode = mode
        self.place: tuple[fx.Node, str] | None = None
        """Where ops come from: a node of another graph, and which side."""
        self.constants: dict[str, Tensor | fx.GraphModule] = {}
        """What was not computed: tensors made of numbers, and branches of `torch.cond`."""
        self._nodes: dict[int, fx.Node] = {}
        for part, name, value in inputs:
            self._take(part, name, value)
        self.sizes = Sizes(self.graph)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write down what is called meanwhile."""
        with symbolic_dispatch(), _Recorder(self):
            yield

    def graph_module(self, results: Sequence[Any]) -> fx.GraphModule:
        """What was recorded, as a program that returns these of its values."""
        self.graph.output([self._argument(result) for result in results])
        for node in self.graph.nodes:
            if isinstance(value := node.meta.get("val"), Tensor) and value.requires_grad:
                node.meta["val"] = value.detach()
        return lazy_graph_module(self.constants, self.graph)

    @contextmanager
    def at(self, node: fx.Node, phase: str) -> Iterator[None]:
        """Say of which node, and which side, the ops are that are called meanwhile."""
        before, self.place = self.place, (node, phase)
        yield
        self.place = before  # After an error, it is where that was.

    def called(self, op: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Write down a call."""
        is_op = isinstance(op, torch._ops.OpOverload)
        name = op.overloadpacket.__name__ if is_op else op.__name__
        args = fx.node.map_aggregate(args, self._argument)
        kwargs = fx.node.map_aggregate(kwargs, self._argument)
        node = self.graph.create_node("call_function", op, args, kwargs, name)
        if self._mode is not None and (found := new_symbols(self._mode, result)):
            node.meta["unbacked_bindings"] = found
        if self.place is not None:
            node.meta["custom"] = {"from": self.place[0].name, "phase": self.place[1]}
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
        if isinstance(value, Tensor | fx.GraphModule):
            node = self._nodes.get(id(value))
            return self._constant(value) if node is None else node
        return self.sizes.node(value) if isinstance(value, SYMBOLIC) else value

    def _constant(self, value: Tensor | fx.GraphModule) -> fx.Node:
        """A tensor made of numbers, or a graph that an op runs."""
        name = f"_constant{len(self.constants)}"
        self.constants[name] = value
        node = self.graph.get_attr(name)
        node.meta["val"] = value
        self._nodes[id(value)] = node
        return node


class _Recorder(TorchDispatchMode):
    """Tells a trace of every op that is called."""

    supports_higher_order_operators = True

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # It has no types.
        self._trace = trace

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        parts = self._trace.written_out.get(func)
        if parts is None and composite(func, args, kwargs):
            parts = func.decompose
        if parts is not None:
            with self:
                result = parts(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = fake_result(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if func.namespace != "prim":
            self._trace.called(func, args, kwargs, result)
        return result
