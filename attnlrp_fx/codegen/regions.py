"""Regions: a rewritten graph cut at its repeated blocks.

A transformer is the same block N times. `regions_of` finds stretches of nodes that repeat in the
graph's order, cuts the graph there, and gives regions of the same structure the same signature, so
that each distinct one is traced and compiled once. Only the graph decides, no name of a module
does: two nodes look alike if they call the same op with the same rule and constants on values of
the same sizes; two regions are alike if their nodes do, one by one, and are connected alike.

Where a stretch repeats, it may be cut at any of its nodes. The cut is where least crosses from one
repetition to the next: in a transformer, the residual stream alone.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.torch_private import expression_of, fresh, lazy_graph_module, typical_size

SHORTEST = 12
"""How many nodes a stretch must have to be worth a program of its own."""
LEAST_SAVED = 60
"""How many nodes must not be compiled again for a repetition to be worth its calls."""
TYPICAL = 64
"""What a symbolic size counts for when bytes are compared."""


@dataclass(frozen=True)
class Region:
    """A stretch of a rewritten graph, and what it exchanges with the rest."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    """Values of the model's inputs and of other regions that it reads."""
    attributes: tuple[str, ...]
    """The parameters, buffers and constants that it reads, by the model's own names."""
    outputs: tuple[fx.Node, ...]
    """Its values that other regions read, or the model returns."""
    signature: Hashable
    """Equal for regions that compute the same, apart from what they read."""

    def graph_module(self) -> fx.GraphModule:
        """The region as a graph of its own: its inputs are placeholders, explained ones marked."""
        graph = fx.Graph()
        values: dict[Any, fx.Node] = {}
        for node in self.inputs:
            values[node] = graph.placeholder(node.name)
            values[node].meta = {**node.meta, "val": fresh(node.meta["val"])}
        for node in self.inputs:
            if ops.is_explained(node):
                placeholder = values[node]
                values[node] = graph.call_function(ops.boundary, (placeholder,))
                values[node].meta = dict(placeholder.meta)

        def value(leaf: fx.Node) -> fx.Node:
            key = leaf.target if leaf.op == "get_attr" else leaf
            if key not in values:
                values[key] = graph.node_copy(leaf)
            return values[key]

        for node in self.nodes:
            for leaf in node.all_input_nodes:
                value(leaf)
            values[node] = graph.node_copy(node, value)
        graph.output(tuple(values[node] for node in self.outputs))
        owner = self.nodes[0].graph.owning_module
        assert owner is not None
        return lazy_graph_module(owner, graph)


def computed(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute something: all but inputs, boundaries, attributes and the output."""
    return [
        node
        for node in graph.nodes
        if node.op not in ("placeholder", "get_attr", "output") and node.target is not ops.boundary
    ]


def regions_of(
    graph_module: fx.GraphModule,
    attributes: Mapping[str, Tensor],
    seeded: Sequence[fx.Node] = (),
    cut: bool = True,
) -> list[Region]:
    """Cut a rewritten graph at its repeated blocks.

    Args:
        graph_module: the rewritten graph.
        attributes: the graph's tensors by name; their sizes and dtypes tell regions apart.
        seeded: values inside of the graph where a reverse pass may begin.
        cut: whether to cut at all.

    Returns:
        Regions in the graph's order, that together hold every node once; a single one where
        nothing repeats.
    """
    nodes = computed(graph_module.graph)
    results = [*outputs_of(graph_module.graph), *seeded]
    found: list[int] = []
    if cut:
        crossing = _Crossing(nodes)
        found = _kept(_cuts(_looks(nodes, attributes), 0, len(nodes), crossing), nodes, crossing)
    cuts = sorted({0, *found, len(nodes)})
    parts = [nodes[a:b] for a, b in pairwise(cuts)]
    return [_region(part, results, attributes) for part in parts]


def _looks(nodes: Sequence[fx.Node], attributes: Mapping[str, Tensor]) -> Tensor:
    """A number for each node, equal for nodes that look alike."""
    numbers: dict[Hashable, int] = {}

    def leaf(node: fx.Node) -> Hashable:
        if node.op == "get_attr":
            return _attribute(node, attributes)
        return node.op == "placeholder", _value(node)

    found = [numbers.setdefault(_call(node, leaf), len(numbers)) for node in nodes]
    return torch.tensor(found, dtype=torch.int64)


def _call(node: fx.Node, leaf: Callable[[fx.Node], Hashable]) -> Hashable:
    """What a node calls, with `leaf` of the nodes that it reads."""
    return str(node.target), _frozen((node.args, node.kwargs), leaf), _value(node)


def _frozen(argument: Any, leaf: Callable[[fx.Node], Hashable]) -> Hashable:
    """An argument as something to compare and to hash."""
    if isinstance(argument, fx.Node):
        return "node", leaf(argument)
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return "slice", tuple(_frozen(part, leaf) for part in parts)
    if isinstance(argument, Mapping):
        return tuple((str(key), _frozen(value, leaf)) for key, value in argument.items())
    if isinstance(argument, list | tuple):
        return type(argument).__name__, tuple(_frozen(part, leaf) for part in argument)
    return type(argument).__name__, str(argument)


def _value(node: fx.Node) -> Hashable:
    """Size and dtype of a node's value; of sizes read off tensors, that they are."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return tuple(_tensor(part) for part in value)
    return _tensor(value)


def _tensor(value: Any) -> Hashable:
    if not isinstance(value, Tensor):
        is_size = isinstance(value, int | torch.SymInt)
        return expression_of(value) if is_size else type(value).__name__
    shape = tuple(value.shape)
    sizes = "?" if free_unbacked_symbols(shape) else tuple(map(expression_of, shape))
    return sizes, str(value.dtype)


def _attribute(node: fx.Node, attributes: Mapping[str, Tensor]) -> Hashable:
    """Size and dtype of a parameter; anything else that a module holds is only like itself."""
    tensor = attributes.get(str(node.target))
    if tensor is None:
        return str(node.target)
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype), str(tensor.device)


class _Crossing:
    """What crosses from one stretch of nodes to the next."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        order = {node: i for i, node in enumerate(nodes)}
        self._widths = [_width(node) for node in nodes]
        self._last = [
            max((order.get(user, len(nodes)) for user in node.users), default=i)
            for i, node in enumerate(nodes)
        ]

    def width(self, start: int, cut: int) -> float:
        """Bytes of the values made in [start, cut) that are read from `cut` on."""
        return sum(self._widths[i] for i in range(start, cut) if self._last[i] >= cut)


def _width(node: fx.Node) -> float:
    """The bytes of a node's value; infinite for what cannot be handed from region to region."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
        return 8.0 if not free_unbacked_symbols(value) else float("inf")
    if not isinstance(value, Tensor) or free_unbacked_symbols(tuple(value.shape)):
        return float("inf")
    count = float(value.dtype.itemsize)
    for size in value.shape:
        count *= typical_size(size, TYPICAL)
    return count


def _cuts(looks: Tensor, start: int, end: int, crossing: _Crossing) -> set[int]:
    """Where to cut the nodes in [start, end): around repeated blocks, and inside of them."""
    found = _most_repeated(looks[start:end])
    if found is None:
        return set()
    at, period, length = found
    at += start
    places = _placed(at, period, length, crossing)
    if places is None:
        return set()
    first, last = places[0], places[-1]
    inner = {cut - first for cut in _cuts(looks, first, first + period, crossing)}
    inside = {begin + offset for begin in places[:-1] for offset in inner}
    outside = _cuts(looks, start, first, crossing) | _cuts(looks, last, end, crossing)
    return {*places, *inside, *outside}


def _kept(cuts: set[int], nodes: Sequence[fx.Node], crossing: _Crossing) -> list[int]:
    """The cuts that nothing crosses that cannot, each before a stretch that makes a tensor.

    All copies of a block are cut inside where the first may be, yet another can be wired otherwise.
    A stretch that makes sizes alone is no graph to trace.
    """
    possible = sorted(cut for cut in cuts if crossing.width(0, cut) < float("inf"))
    return [
        cut
        for cut, end in pairwise([*possible, len(nodes)])
        if any(isinstance(node.meta.get("val"), Tensor) for node in nodes[cut:end])
    ]


def _most_repeated(looks: Tensor) -> tuple[int, int, int] | None:
    """The stretch whose repetition saves most: where it begins, its period, how long it goes on."""
    best: tuple[int, int, int] | None = None
    saved = LEAST_SAVED - 1
    for period in range(SHORTEST, len(looks) // 2 + 1):
        unlike = (looks[:-period] != looks[period:]).nonzero()[:, 0]
        ends = torch.cat([unlike, torch.tensor([len(looks) - period])])
        begins = torch.cat([torch.tensor([0]), unlike + 1])
        longest = int((ends - begins).argmax())
        same = int(ends[longest] - begins[longest])
        if same // period * period > saved:
            best = int(begins[longest]), period, same + period
            saved = same // period * period
    return best


def _placed(at: int, period: int, length: int, crossing: _Crossing) -> list[int] | None:
    """Cuts, one period apart, where least crosses; None if something cannot cross anywhere."""
    choices = []
    for offset in range(min(period, length - period + 1)):
        count = (length - offset) // period
        first = at + offset
        places = [first + i * period for i in range(count + 1)]
        if count < 2 or (count - 1) * period < LEAST_SAVED:
            continue
        widest = max(crossing.width(a, b) for a, b in pairwise(places))
        outer = crossing.width(0, first)
        if max(widest, outer) < float("inf"):
            choices.append((widest, -count, offset, places))
    return min(choices)[-1] if choices else None


def _region(
    nodes: Sequence[fx.Node], results: Sequence[Any], attributes: Mapping[str, Tensor]
) -> Region:
    """A stretch of nodes with what it reads, what is read of it, and its signature."""
    local = {node: i for i, node in enumerate(nodes)}
    inputs: dict[fx.Node, int] = {}
    read: dict[str, int] = {}
    returned = {result for result in results if isinstance(result, fx.Node)}

    def leaf(node: fx.Node) -> Hashable:
        if node in local:
            return "local", local[node]
        if node.op == "get_attr":
            look = _attribute(node, attributes)
            if node.target not in attributes:
                return look
            return "attribute", read.setdefault(str(node.target), len(read)), look
        number = inputs.setdefault(node, len(inputs))
        return "input", number, _value(node), ops.is_explained(node)

    calls = tuple(_call(node, leaf) for node in nodes)
    outputs = [
        node for node in nodes if node in returned or any(user not in local for user in node.users)
    ]
    handed = tuple(local[node] for node in outputs)
    return Region(tuple(nodes), tuple(inputs), tuple(read), tuple(outputs), (calls, handed))
