"""What the tests of passes share: small graphs, their text, and what they compute."""

import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnlrp_fx import ops
from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.passes import NORMALISE, PassContext, assign_rules, mark_sources, run_passes


class Written(nn.Module):
    """A function as a module, with whatever parameters it needs.

    The function takes the module and `x`, and `mask` where there is one.
    """

    def __init__(self, function: Callable[..., Any], **parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        given = (x,) if mask is None else (x, mask)
        return self.function(self, *given)


def captured(
    module: nn.Module, inputs: Mapping[str, Tensor], *, dynamic: bool = False
) -> fx.GraphModule:
    """The graph that capture hands to the passes."""
    graph_module = capture(module.eval(), inputs, "auto" if dynamic else None).graph_module
    return copy_of(graph_module)


def prepared(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    explain: tuple[str, ...] | None = ("x",),
    dynamic: bool = False,
) -> fx.GraphModule:
    """The graph that the raising passes get: normalised, with its sources marked."""
    graph_module = captured(module, inputs, dynamic=dynamic)
    run_passes(graph_module, PassContext(explain), (*NORMALISE, mark_sources))
    return graph_module


def copy_of(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph once more, on the same parameters."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return fx.GraphModule(graph_module, graph)


def run(graph_module: fx.GraphModule, inputs: Mapping[str, Tensor]) -> list[Any]:
    """The graph's flat outputs."""
    with torch.no_grad():
        return list(graph_module(*inputs.values()))


def relevance(
    graph_module: fx.GraphModule,
    inputs: Mapping[str, Tensor],
    seed: Tensor,
    context: PassContext | None = None,
) -> dict[str, Tensor]:
    """Relevance of the inputs for the graph's first output, by the eager tape."""
    graph_module = copy_of(graph_module)
    run_passes(graph_module, context or PassContext(), (assign_rules,))
    tape = Tape(graph_module)
    with torch.no_grad():
        tape.run(*inputs.values())
        return tape.reverse({graph_module.graph.output_node().args[0][0]: seed}).relevance


def text(graph_module: fx.GraphModule) -> str:
    """One line a call, names counted by op, without devices: stable from release to release."""
    names: dict[fx.Node, str] = {}
    counts: Counter[str] = Counter()
    lines = []
    for node in graph_module.graph.nodes:
        base = _target(node).rpartition(".")[2] if node.op.startswith("call") else node.name
        counts[base] += 1
        names[node] = base if counts[base] == 1 else f"{base}_{counts[base] - 1}"
        if node.op == "placeholder" or node.op == "get_attr":
            continue
        args = [_show(a, names) for a in node.args]
        dropped = ("device", "pin_memory", "layout", "memory_format")
        args += [f"{k}={_show(v, names)}" for k, v in node.kwargs.items() if k not in dropped]
        call = f"{names[node]} = {_target(node)}({', '.join(args)})"
        if len(call) > 88:
            call = f"{names[node]} = {_target(node)}(\n    {', '.join(args)}\n)"
        lines.append(f"return {args[0]}" if node.op == "output" else call)
    return "\n".join(lines)


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return f"aten.{node.target.overloadpacket.__name__}"
    if node.op == "call_module":
        return f"self.{node.target}"
    if getattr(ops, getattr(node.target, "__name__", ""), None) is node.target:
        return f"ops.{node.target.__name__}"
    if node.target is operator.getitem:
        return "getitem"
    return getattr(node.target, "__name__", str(node.target))


def _show(value: Any, names: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_show(item, names) for item in value)}]"
    if isinstance(value, torch._ops.OpOverload):
        return f"aten.{value.overloadpacket.__name__}"
    if isinstance(value, float):
        return f"{value:.6g}"
    return repr(value) if isinstance(value, str) else str(value)
