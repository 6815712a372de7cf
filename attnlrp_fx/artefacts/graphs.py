"""A captured graph from what `torch.export.save` wrote of it.

Of the schema (`torch._export.serde.schema`, version 8) all is read that a captured graph has, and
the rest is an error: no subgraphs, no custom objects, no ops but PyTorch's own (`aten`, functional,
and arithmetic of sizes). Types are checked, names are looked up in tables, and nothing is run.
"""

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from attnlrp_fx.artefacts.expressions import expression_of
from attnlrp_fx.torch_private import SymbolicSizes, lazy_graph_module

T = TypeVar("T")

SCHEMA_VERSION = 8

DTYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
_MEMORY_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_STRIDED = 7
_KEYWORD = 2

SIZE_OPERATORS: Mapping[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in (
            "add",
            "and_",
            "eq",
            "floordiv",
            "ge",
            "gt",
            "le",
            "lt",
            "mod",
            "mul",
            "ne",
            "neg",
            "or_",
            "pos",
            "pow",
            "sub",
            "truediv",
        )
    },
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not")
    },
    "math.trunc": math.trunc,
}
"""What computes sizes from sizes, by the names that torch.export gives it."""

_FORBIDDEN = frozenset({"from_file"})
"""Functional ops that do more than compute."""


def check_operator(target: Any) -> None:
    """Raise ValueError if an op is none that a saved graph may have."""
    if target is torch.ops.attnlrp_fx.grouped_mm.default:
        return
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace != "aten":
            raise ValueError(f"{target} is not one of PyTorch's own")
        if target._schema.is_mutable:
            raise ValueError(f"{target} writes in place")
        if target._opname in _FORBIDDEN:
            raise ValueError(f"{target} does more than compute")
    elif target not in (*SIZE_OPERATORS.values(), operator.getitem):
        raise ValueError(f"{target} is no op of PyTorch's")


def operator_named(name: Any) -> Any:
    """The op of a name, looked up and not run.

    Raises:
        ValueError: there is none, or a graph may not have it.
    """
    if name in SIZE_OPERATORS:
        return SIZE_OPERATORS[name]
    parts = name.split(".")
    if len(parts) != 5 or parts[:3] not in (
        ["torch", "ops", "aten"],
        ["torch", "ops", "attnlrp_fx"],
    ):
        raise ValueError(f"'{name}' is no op of PyTorch's")
    packet = getattr(getattr(torch.ops, parts[2]), parts[3], None)
    target = getattr(packet, parts[4], None)
    if not isinstance(target, torch._ops.OpOverload):
        raise ValueError(f"this PyTorch has no op '{name}'")
    check_operator(target)
    return target


def read_graph(
    program: Mapping[str, Any],
    assumptions: Sequence[str],
    root: nn.Module,
    moved: Mapping[torch.device, torch.device],
    inputs: Sequence[str],
) -> fx.GraphModule:
    """A captured graph.

    Args:
        program: an exported program in torch.export's schema.
        assumptions: what capture assumed about sizes.
        root: has the tensors that the graph reads, by the names in the program's signature.
        moved: where values go that were on some device when the graph was captured.
        inputs: the model's own names of its inputs, in order.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: it is not what `exported_program` writes.
    """
    version = _is(program["schema_version"]["major"], int)
    if version != SCHEMA_VERSION:
        raise ValueError(f"its graph is of version {version}, this reads {SCHEMA_VERSION}")
    written = program["graph_module"]["graph"]
    sizes = SymbolicSizes(
        _typical(written, program["range_constraints"]), list(map(expression_of, assumptions))
    )
    reader = _Reader(written, sizes, root, moved)
    return reader.read(program["graph_module"]["signature"], inputs)


def _typical(
    written: Mapping[str, Any], ranges: Mapping[str, Any]
) -> dict[Any, tuple[int, int, int | None]]:
    """Each symbol's example and range, read off the inputs."""
    found: dict[Any, tuple[int, int, int | None]] = {}
    for given in written["inputs"]:
        for size in written["tensor_values"][given["as_tensor"]["name"]]["sizes"]:
            if "as_expr" in size:
                symbol = expression_of(size["as_expr"]["expr_str"])
                if not symbol.is_Symbol:
                    raise ValueError(f"an input's size is {symbol}")
                limits = ranges.get(str(symbol), {})
                least, most = limits.get("min_val"), limits.get("max_val")
                example = _is(size["as_expr"]["hint"]["as_int"], int)
                least = 2 if least is None else max(_is(least, int), 0)
                most = None if most is None else _is(most, int)
                if not least <= example <= (example if most is None else most):
                    raise ValueError(f"{symbol} is {example}, out of its range")
                found[symbol] = (example, least, most)
    return found


class _Reader:
    """Makes nodes of what a graph's JSON says."""

    def __init__(
        self,
        written: Mapping[str, Any],
        sizes: SymbolicSizes,
        root: nn.Module,
        moved: Mapping[torch.device, torch.device],
    ) -> None:
        self.written, self.sizes, self.root, self.moved = written, sizes, root, moved
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.alike: dict[Any, Tensor] = {}
        """A value of each layout that there is: making one of symbolic sizes takes long."""

    def read(self, signature: Mapping[str, Any], inputs: Sequence[str]) -> fx.GraphModule:
        names = [given["as_tensor"]["name"] for given in self.written["inputs"]]
        specs = signature["input_specs"]
        called = iter(inputs)
        for name, spec in zip(names, specs, strict=True):
            self._input(name, spec, _is(next(called), str) if "user_input" in spec else "")
        if next(called, None) is not None:
            raise ValueError("the graph lacks an input")
        for node in self.written["nodes"]:
            self._node(node)
        self.graph.output([self._value(value) for value in self.written["outputs"]])
        graph_module = lazy_graph_module(self.root, self.graph)
        graph_module.graph.lint()
        return graph_module

    def _input(self, name: str, spec: Mapping[str, Any], called: str) -> None:
        ((kind, described),) = spec.items()
        value = self._tensor_value(name)
        if kind == "user_input":
            node = self.graph.placeholder(called)
        else:
            key = {
                "parameter": "parameter_name",
                "buffer": "buffer_name",
                "tensor_constant": "tensor_constant_name",
            }[kind]
            target = _is(described[key], str)
            held = self._held(target)
            if held.shape != value.shape or held.dtype != value.dtype:
                raise ValueError(f"tensor '{target}' is not what the graph reads")
            node = self.graph.get_attr(target)
        self._know(name, node, value)

    def _held(self, target: str) -> Tensor:
        found: Any = self.root
        for part in target.split("."):
            found = getattr(found, part)
        return _is(found, Tensor)

    def _know(self, name: str, node: fx.Node, value: Any) -> None:
        if name in self.nodes or not name.isidentifier():
            raise ValueError(f"'{name}' is no name for a value, or is one twice")
        node._rename(name)
        node.meta["val"] = value
        self.nodes[name] = node

    def _node(self, written: Mapping[str, Any]) -> None:
        target = operator_named(written["target"])
        args, kwargs = [], {}
        for given in written["inputs"]:
            if given["kind"] == _KEYWORD:
                kwargs[_is(given["name"], str)] = self._value(given["arg"])
            else:
                args.append(self._value(given["arg"]))
        node = self.graph.call_function(target, tuple(args), kwargs)
        node.meta |= _metadata(written["metadata"])
        outputs = written["outputs"]
        if len(outputs) == 1 and "as_tensors" not in outputs[0]:
            self._know(self._output_name(outputs[0]), node, self._output_value(outputs[0]))
            return
        parts = outputs
        if len(outputs) == 1:
            parts = [{"as_tensor": each} for each in outputs[0]["as_tensors"]]
        values = [self._output_value(part) for part in parts]
        self._know(written["name"], node, values if len(outputs) == 1 else tuple(values))
        for i, (part, value) in enumerate(zip(parts, values, strict=True)):
            name = self._output_name(part)
            if value is not None and not name.startswith(f"{written['name']}_unused_"):
                item = self.graph.call_function(operator.getitem, (node, i))
                item.meta |= _metadata(written["metadata"])
                self._know(name, item, value)

    def _output_name(self, written: Mapping[str, Any]) -> str:
        ((kind, value),) = written.items()
        if kind == "as_none":
            return ""
        return _is(value["name" if kind == "as_tensor" else "as_name"], str)

    def _output_value(self, written: Mapping[str, Any]) -> Any:
        ((kind, _),) = written.items()
        if kind == "as_none":
            return None
        name = self._output_name(written)
        if kind == "as_tensor":
            described = self.written["tensor_values"][name]
            layout = json.dumps({k: v for k, v in described.items() if k != "requires_grad"})
            if layout not in self.alike:
                self.alike[layout] = self._tensor_value(name)
            with self.sizes.mode, torch.no_grad():
                return self.alike[layout].detach()
        if kind == "as_sym_int":
            return self._size(self.written["sym_int_values"][name])
        raise ValueError(f"an op returns {kind}")

    def _tensor_value(self, name: str) -> Tensor:
        described = self.written["tensor_values"][name]
        if described["layout"] != _STRIDED:
            raise ValueError(f"value '{name}' is not strided")
        shape = tuple(map(self._size, described["sizes"]))
        strides = tuple(map(self._size, described["strides"]))
        dtype, device = DTYPES[described["dtype"]], self._device(described["device"])
        with self.sizes.mode:
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def _device(self, written: Mapping[str, Any]) -> torch.device:
        index = written["index"]
        number = [] if index is None else [_is(index, int)]
        found = torch.device(_is(written["type"], str), *number)
        return self.moved.get(found, found)

    def _size(self, written: Mapping[str, Any]) -> int | torch.SymInt:
        if "as_int" in written:
            return _is(written["as_int"], int)
        return self.sizes.size(expression_of(written["as_expr"]["expr_str"]))

    def _value(self, written: Mapping[str, Any]) -> Any:
        """An argument, or an output."""
        ((kind, value),) = written.items()
        if kind == "as_none":
            return None
        if kind in _PLAIN:
            return _is(value, _PLAIN[kind])
        if kind in _PLAIN_LISTS:
            return [_is(each, _PLAIN_LISTS[kind]) for each in value]
        if kind in _TABLES:
            return _TABLES[kind][value]
        if kind == "as_tensor":
            return self.nodes[value["name"]]
        if kind == "as_tensors":
            return [self.nodes[each["name"]] for each in value]
        if kind == "as_optional_tensors":
            return [self._value(each) for each in value]
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._symbolic(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return [self._symbolic(each) for each in value]
        if kind == "as_device":
            return self._device(value)
        if kind == "as_layout" and value == _STRIDED:
            return torch.strided
        raise ValueError(f"an op takes {kind}")

    def _symbolic(self, written: Mapping[str, Any]) -> Any:
        ((kind, value),) = written.items()
        return self.nodes[value] if kind == "as_name" else _is(value, _PLAIN[kind])


_PLAIN: Mapping[str, type] = {"as_int": int, "as_float": float, "as_bool": bool, "as_string": str}
_PLAIN_LISTS: Mapping[str, type] = {
    "as_ints": int,
    "as_floats": float,
    "as_bools": bool,
    "as_strings": str,
}
_TABLES: Mapping[str, Mapping[Any, Any]] = {
    "as_scalar_type": DTYPES,
    "as_memory_format": _MEMORY_FORMATS,
}


def _is(value: Any, kind: type[T]) -> T:
    """A value of a type, and of no other: a bool is no int."""
    found: Any = value
    if kind is float and type(value) is int:
        found = float(value)
    elif type(value) is not kind and not (kind is Tensor and isinstance(value, Tensor)):
        raise TypeError(f"{value!r:.60} is no {kind.__name__}")
    checked: T = found
    return checked


def _metadata(written: Mapping[str, Any]) -> dict[str, Any]:
    """Where a node comes from: texts to show."""
    found: dict[str, Any] = {}
    if trace := written.get("stack_trace"):
        found["stack_trace"] = _is(trace, str)
    if stack := written.get("nn_module_stack"):
        found["nn_module_stack"] = dict(map(_module, _is(stack, str).split(";")))
    return found


def _module(text: str) -> tuple[str, tuple[str, str]]:
    """ "key,path,class"; a class may have commas in brackets, a path has none."""
    key, path, name = text.split(",", 2)
    return key, (path, name)
