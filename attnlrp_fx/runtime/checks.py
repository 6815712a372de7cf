"""Checks of a call's inputs against the captured graph, before anything runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.errors import InputError, NonFiniteError
from attnlrp_fx.graph.operators import is_op, outputs_of
from attnlrp_fx.graph.provenance import describe, module_path
from attnlrp_fx.graph.tokens import table_and_indices
from attnlrp_fx.torch_private import fails, lazy_graph_module, size_assumptions

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class InputChecks:
    """What the captured graph demands of its inputs.

    Args:
        graph_module: a captured graph, before or after rewriting.
        constants: inputs that were no tensors when the model was captured, or were held.
        own: placeholders that no caller fills.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        constants: Mapping[str, Any],
        own: Sequence[str] = (),
    ) -> None:
        self.constants = constants
        self.examples = {
            str(node.target): node.meta["val"]
            for node in graph_module.graph.find_nodes(op="placeholder")
            if node.target not in own
        }
        self._sizes = {
            name: [size if is_concrete_int(size) else str(size) for size in example.shape]
            for name, example in self.examples.items()
        }
        """Of each input a number for a size that was fixed, and a symbol's name for others."""
        self.lookups = _lookups(graph_module)
        self.positions = _positions_graph(graph_module, self.lookups, own)
        self.assumptions = size_assumptions(graph_module)
        self._fitting_symbols: set[tuple[tuple[str, int], ...]] = set()
        self._checked_sizes: set[tuple[tuple[int, ...], ...]] = set()

    def ordered(self, inputs: Mapping[str, Any], device: torch.device) -> list[Tensor]:
        """The inputs in the program's order, checked and on its device.

        Raises:
            InputError: a name, type, rank, size or dtype that does not fit, an index beyond its
                table, or sizes at which the model takes another path through its code.
        """
        self._check_names(inputs)
        values = [self._converted(name, inputs[name], device) for name in self.examples]
        symbols = self._check_sizes(dict(zip(self.examples, values, strict=True)))
        if device.type != "meta":
            self._check_indices(values)
        self._check_assumptions(symbols)
        return values

    def _check_names(self, inputs: Mapping[str, Any]) -> None:
        missing = [name for name in self.examples if name not in inputs]
        if missing:
            raise InputError(
                f"input '{missing[0]}' is missing",
                why=f"the model was compiled with: {', '.join(self.examples)}",
                remedy=f"pass {missing[0]}=...",
            )
        for name in inputs.keys() - self.examples.keys():
            if name not in self.constants:
                raise InputError(
                    f"there is no input '{name}'",
                    why=f"the model was compiled with: {', '.join(self.examples)}",
                    remedy="leave it out, or compile with it",
                )
            if not _same(inputs[name], self.constants[name]):
                raise InputError(
                    f"input '{name}' was compiled as the constant {_short(self.constants[name])}",
                    why="the model's path through its code depends on it",
                    remedy=f"compile again with {name}={_short(inputs[name])}",
                )

    def _converted(self, name: str, value: Any, device: torch.device) -> Tensor:
        example = self.examples[name]
        if not isinstance(value, Tensor):
            raise InputError(
                f"input '{name}' is a {type(value).__name__}, not a tensor",
                remedy='pass tensors; of a tokenizer, ask for return_tensors="pt"',
            )
        if value.dim() != example.dim():
            raise InputError(
                f"input '{name}' has shape {tuple(value.shape)}",
                why=f"it has {value.dim()} dimensions, the model was compiled with {example.dim()}",
            )
        if value.dtype != example.dtype:
            both_integers = value.dtype in INTEGERS and example.dtype in INTEGERS
            if not both_integers:
                raise InputError(
                    f"input '{name}' is {value.dtype}",
                    why=f"the model was compiled with {example.dtype}",
                    remedy=f"pass {name}.to({example.dtype})",
                )
        return value.to(device=device, dtype=example.dtype).contiguous()

    def _check_sizes(self, values: Mapping[str, Tensor]) -> dict[str, int]:
        """Fixed sizes are met; sizes that were one symbol are equal; nothing is empty.

        Returns:
            The size of each symbol.
        """
        sizes: dict[str, tuple[int, str]] = {}
        for name, value in values.items():
            if value.numel() == 0:
                raise InputError(
                    f"input '{name}' is empty: its shape is {tuple(value.shape)}",
                    remedy="pass at least one row and one token (an empty text has none)",
                )
            for dim, (size, expected) in enumerate(
                zip(value.shape, self._sizes[name], strict=True)
            ):
                if not isinstance(expected, str):
                    if size != expected:
                        raise InputError(
                            f"input '{name}' has shape {tuple(value.shape)}",
                            why=f"dimension {dim} was fixed to {expected} when it was captured",
                            remedy="compile again with example inputs of this size, and with "
                            "dynamic_shapes='auto'; report() says what the model fixes",
                        )
                    continue
                known, where = sizes.setdefault(expected, (size, f"{name}[{dim}]"))
                if known != size:
                    raise InputError(
                        f"input '{name}' has shape {tuple(value.shape)}",
                        why=f"dimension {dim} must equal {where}, which is {known}",
                    )
        return {symbol: size for symbol, (size, _) in sizes.items()}

    def _check_assumptions(self, symbols: Mapping[str, int]) -> None:
        """The sizes take the branches of the model's code that were captured; once for each set."""
        key = tuple(symbols.items())
        if key in self._fitting_symbols:
            return
        for assumption in self.assumptions:
            if fails(assumption, symbols):
                raise InputError(
                    "the model takes another path through its code at these sizes",
                    why=f"it was captured where {assumption}, with {dict(symbols)}",
                    remedy="compile again with example inputs of these sizes",
                )
        self._fitting_symbols.add(key)

    def _check_indices(self, values: list[Tensor]) -> None:
        """Token ids always; positions that follow from the sizes, once for each set of sizes."""
        by_name = dict(zip(self.examples, values, strict=True))
        for node, name, rows in self.lookups:
            if name is not None:
                self._check_range(node, by_name[name], rows, f"input '{name}'")
        sizes = tuple(tuple(value.shape) for value in values)
        if self.positions is None or sizes in self._checked_sizes:
            return
        computed = [entry for entry in self.lookups if entry[1] is None]
        try:
            with torch.no_grad():
                positions = self.positions(*values)
        except (RuntimeError, IndexError) as error:
            longest = max(rows for _, _, rows in computed)
            raise InputError(
                "the sequence is too long for the model's table of positions",
                why=str(error).strip().splitlines()[0],
                remedy=f"shorten the inputs (truncation=True, max_length={longest})",
            ) from error
        for (node, _, rows), index in zip(computed, positions, strict=True):
            self._check_range(node, index, rows, None)
        self._checked_sizes.add(sizes)

    def _check_range(self, node: fx.Node, index: Tensor, rows: int, what: str | None) -> None:
        low, high = (int(v) for v in torch.aminmax(index))
        if low >= 0 and high < rows:
            return
        wrong = low if low < 0 else high
        if what is None:
            raise InputError(
                f"the sequence is too long: it needs position {wrong}, the model has {rows}",
                where=describe(node),
                remedy=f"shorten the inputs (truncation=True, max_length={rows})",
            )
        raise InputError(
            f"{what} holds index {wrong}, its table '{module_path(node)}' has {rows} rows",
            where=describe(node),
            remedy="use the tokenizer that belongs to the model",
        )


def _lookups(graph_module: fx.GraphModule) -> list[tuple[fx.Node, str | None, int]]:
    """Each look-up of a table: the node, the input that its indices are, the table's rows."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not is_op(node, "embedding"):
            continue
        table_and_ids = table_and_indices(node)
        assert table_and_ids is not None
        table, ids = table_and_ids
        if table.op != "get_attr" or not isinstance(ids, fx.Node):
            continue
        rows = int(graph_module.get_parameter(str(table.target)).shape[0])
        source = ids if ids.op == "placeholder" else None
        found.append((node, str(source.target) if source else None, rows))
    return found


def _positions_graph(
    graph_module: fx.GraphModule,
    lookups: list[tuple[fx.Node, str | None, int]],
    own: Sequence[str],
) -> fx.GraphModule | None:
    """The part of a graph that computes indices which are not inputs themselves."""
    found = [table_and_indices(node) for node, name, _ in lookups if name is None]
    wanted = [indices for _, indices in filter(None, found)]
    if not wanted:
        return None
    needed: set[fx.Node] = set()
    stack = list(wanted)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node in needed or (node.op == "placeholder" and node.target not in own):
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output([values[node] for node in wanted])
    return lazy_graph_module(graph_module, graph)


def find_non_finite(
    rewritten: fx.GraphModule,
    attributes: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    seeds: Mapping[int, Tensor],
) -> None:
    """Run a rewritten graph and its pullbacks node by node, looking for NaN and infinity.

    Args:
        rewritten: the rewritten graph.
        attributes: its tensors by name.
        inputs: its inputs, in order.
        seeds: the coefficient of each seeded flat output.

    Raises:
        NonFiniteError: naming the input, or the first node whose value or coefficient is not
            finite. Infinities of constants (masks) do not count.
    """
    for name, value in inputs.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"input '{name}' holds NaN or infinity")

    def watch(node: fx.Node, phase: str, value: Any) -> None:
        parts = value if isinstance(value, list | tuple) else [value]
        floating = (p for p in parts if isinstance(p, Tensor) and p.is_floating_point())
        if not all(bool(torch.isfinite(part).all()) for part in floating):
            raise NonFiniteError(
                f"NaN or infinity arises in the {phase} pass",
                where=describe(node),
                why="its value" if phase == "forward" else "the coefficient that it receives",
                remedy="look for overflow at this line; try float32 or wider",
            )

    with torch.no_grad():
        tape = Tape(rewritten, attributes, watch=watch)
        tape.run(*inputs.values())
        outputs = outputs_of(rewritten.graph)
        tape.reverse({outputs[i]: seed for i, seed in seeds.items()})


def _same(value: Any, constant: Any) -> bool:
    """Whether an input is what the model was compiled with."""
    if isinstance(value, Tensor) and isinstance(constant, Tensor):
        return torch.equal(value.cpu(), constant.cpu())
    return bool(type(value) is type(constant) and value == constant)


def _short(value: Any) -> str:
    """A value in one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
