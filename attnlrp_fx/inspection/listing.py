"""Graphs as readable Python: each line with the user's line, the rule, and what constructed it."""

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.syntax import Syntax
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.graph.provenance import module_class, module_path, short_line, target_name
from attnlrp_fx.inspection.graphs import Graphs

WIDTH = 72
"""The column at which comments begin."""
DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


@dataclass(frozen=True)
class Line:
    """One node as a line of Python."""

    node: str
    code: str
    shape: str
    rule: str
    """The rule that stands there; of a program's node, of the node that it is of."""
    constructed_by: str
    """The pass that made it; of a program's node, its side and the node that it is of."""
    module: str
    """Path and class of the module."""
    source: str
    """The user's line, its file without folders."""

    @property
    def comment(self) -> str:
        """Shape, rule and constructor."""
        return " · ".join(part for part in (self.shape, self.rule, self.constructed_by) if part)


@dataclass(frozen=True)
class Listing:
    """A graph as Python: `str(listing)` is plain, a terminal shows it in colours."""

    name: str
    arguments: tuple[str, ...]
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return "\n".join(self._written())

    def _written(self) -> Iterator[str]:
        yield f"def {self.name}({', '.join(self.arguments)}):"
        module, source = "", ""
        for line in self.lines:
            if line.module != module:
                module, source = line.module, ""
                yield ""
                yield f"    # {module or 'the model itself'}"
            if line.source and line.source != source:
                source = line.source
                yield f"    # {source}"
            code = f"    {line.code}"
            yield f"{code:<{WIDTH}}  # {line.comment}" if line.comment else code

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Syntax(str(self), "python", theme="ansi_dark", background_color="default")


def listing(graphs: Graphs, which: str) -> Listing:
    """One of the graphs as Python.

    Args:
        graphs: the graphs of a compiled model.
        which: "captured", "rewritten" or "program".

    Raises:
        InputError: there is no such graph.
    """
    graph_module = graphs.named(which)
    origin = {node.name: node for node in graphs.rewritten.graph.nodes}
    lines = [
        line_of(node, origin)
        for node in graph_module.graph.nodes
        if node.op not in ("placeholder", "get_attr")
    ]
    names = [node.name for node in graph_module.graph.find_nodes(op="placeholder")]
    if which == "program":  # hundreds of parameters
        names = [*names[:6], f"... {len(names) - 6} more"] if len(names) > 7 else names
    return Listing(which, tuple(names), tuple(lines))


def line_of(node: fx.Node, origin: dict[str, fx.Node] | None = None) -> Line:
    """One node as a line of Python.

    Args:
        node: a node of any of the graphs.
        origin: the rewritten graph's nodes by name, which a program's nodes say they are of.
    """
    custom = node.meta.get("custom") or {}
    told = (origin or {}).get(custom.get("from", ""), node)
    by = str(node.meta.get("constructed_by", ""))
    if told is not node:
        by = f"{custom['phase']} of {told.name}"
    path, kind = module_path(told), module_class(told)
    return Line(
        node=node.name,
        code=code_of(node),
        shape=shape_of(node),
        rule=str(told.meta.get("rule", "")),
        constructed_by=by,
        module=f"{path} ({kind})" if path and kind else path,
        source=short_line(told),
    )


def code_of(node: fx.Node) -> str:
    """A node as an assignment; parameters are attributes of self."""
    if node.op == "output":
        return f"return {written(node.args[0])}"
    if node.target is operator.getitem:
        return f"{node.name} = {written(node.args[0])}[{node.args[1]}]"
    arguments = [written(arg) for arg in node.args]
    arguments += [f"{key}={written(value)}" for key, value in node.kwargs.items()]
    is_module = node.op == "call_module"
    name = attribute(str(node.target)) if is_module else op_name(node.target)
    return f"{node.name} = {name}({', '.join(arguments)})"


def attribute(path: str) -> str:
    """What a module holds, as Python: "self.layers[0].weight"."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f"self.{path}")


def op_name(target: Any) -> str:
    """An op's name: "aten.gelu", "ops.identity", "math.floor"."""
    if target in ops.RELEVANCE_OPS or target in (ops.source, ops.boundary, *ops.MARKERS):
        return f"ops.{target.__name__}"
    return target_name(target).removesuffix(".default").removeprefix("_operator.")


def written(argument: Any) -> str:
    """An argument as Python."""
    if isinstance(argument, fx.Node):
        return attribute(str(argument.target)) if argument.op == "get_attr" else argument.name
    if isinstance(argument, list | tuple):
        inner = ", ".join(map(written, argument))
        return f"[{inner}]" if isinstance(argument, list) else f"({inner},)"
    if callable(argument):
        return op_name(argument)
    return repr(argument)


def shape_of(node: fx.Node) -> str:
    """dtype and sizes of a node's value: "f32[s0, 12]"."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return f"{len(value)} values"
    if not isinstance(value, Tensor):
        return ""
    name = str(value.dtype).removeprefix("torch.")
    for long, short in DTYPES.items():
        if name.startswith(long):
            name = short + name.removeprefix(long)
            break
    return f"{name}[{', '.join(map(str, value.shape))}]"
