"""Where a node comes from: module path, module class and the user's own source line."""

import re
from typing import Any

import torch
from torch import fx

_FRAME = re.compile(
    r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n\s*(?P<code>.*)'
)


def module_path(node: fx.Node) -> str:
    """The path of the innermost module that a node was captured in, '' for the root."""
    stack = _modules(node)
    return readable_path(stack[-1][0]) if stack else ""


def module_class(node: fx.Node) -> str:
    """The class name of the innermost module that a node was captured in, '' if unknown."""
    stack = _modules(node)
    if not stack:
        return ""
    owner = stack[-1][1]
    name = owner if isinstance(owner, str) else owner.__qualname__
    return name.rsplit(".", 1)[-1]


def _modules(node: fx.Node) -> list[tuple[str, Any]]:
    """Path and class of the modules around a node; export has a placeholder where there is none."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [entry for entry in stack if not entry[0].startswith("_empty_nn_module_stack")]


def source_line(node: fx.Node) -> str:
    """The innermost line outside PyTorch that produced a node, as 'file:line: code'."""
    frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
    if not frames:
        return ""
    own = [frame for frame in frames if "/torch/" not in frame["file"]]
    frame = (own or frames)[-1]
    return f"{frame['file']}:{frame['line']}: {frame['code'].strip()}"


def short_source(node: fx.Node) -> str:
    """The user's line as 'file.py:line', for tables."""
    return re.sub(r"^.*/([^/:]+:\d+): .*$", r"\1", source_line(node))


def short_line(node: fx.Node) -> str:
    """The user's line with its code, the file without its folders."""
    return re.sub(r"^.*/([^/:]+:\d+: )", r"\1", source_line(node))


def describe(node: fx.Node) -> str:
    """One line that tells a person which node is meant."""
    parts = [f"node '{node.name}' ({target_name(node.meta.get('op', node.target))})"]
    path = module_path(node)
    parts += [f"in {path} ({module_class(node)})"] if path else []
    line = source_line(node)
    parts += [f"at {line}"] if line else []
    return " ".join(parts)


def target_name(target: object) -> str:
    """The name of a node's target as the user knows it: 'aten.silu.default', 'operator.getitem'."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if callable(target):
        return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"
    return str(target)


def readable_path(path: str) -> str:
    """The path as the user writes it, without export's `L['self']` and `._modules['..']`."""
    path = re.sub(r"L\['self'\]\.?", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]", r".\1", path)
    return path.lstrip(".")
