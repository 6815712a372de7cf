"""Latent roles: neurons, heads, the residual stream, experts and routers, found in the graph.

No name of a module or class plays a part:

- *mlp.neurons*: what a dense layer reads, if it was made of the outputs of dense layers by an
  activation, and by elementwise products and scalings at most (gated or not); not of experts that
  share one op, whose rows are each of another one;
- *attention.heads*: what attention returns, fused or written out, a feature vector for each head;
- *attention.weights*: the softmax of attention, for which it is written out;
- *residual*: a sum of two values of one shape, one of which the other was computed from: the stream
  before and after a branch is added to it;
- *router*: a dense layer's score of each expert, among which a selection chooses;
- *experts*: what each chosen expert contributes, its weight included, before they are added up.
"""

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.graph.analysis import explained_values, parameter_values
from attnlrp_fx.graph.operators import (
    Kind,
    factors_of,
    is_broadcast,
    is_convolution,
    is_elementwise,
    is_matrix_product,
    is_op,
    is_structural,
    kind_of,
    leaves,
)
from attnlrp_fx.rules.roles import Role, is_join, is_layer, roles

NORMALISED = ("_native_batch_norm_legit_no_training",)
"""Ops beside elementwise ones that rescale each neuron."""


class LatentRole(StrEnum):
    """What a latent value is in its model."""

    NEURONS = "mlp.neurons"
    HEADS = "attention.heads"
    WEIGHTS = "attention.weights"
    RESIDUAL = "residual"
    ROUTER = "router"
    EXPERTS = "experts"


@dataclass(frozen=True)
class Playing:
    """A value that plays a role."""

    value: fx.Node
    chosen: fx.Node | None = None
    """int64, (token, slot): of chosen experts, which each slot holds."""
    experts: int = 0
    """How many experts there are to choose from."""


class LatentRoles:
    """Finds the values of a graph that play a role.

    Args:
        graph: a graph in which what was decomposed has been raised.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.explained = explained_values(graph)

    def playing(self, role: LatentRole) -> list[Playing]:
        """The values that play a role, in the graph's order."""
        finders: dict[LatentRole, Callable[[], Iterator[Playing]]] = {
            LatentRole.NEURONS: self._neurons,
            LatentRole.HEADS: self._heads,
            LatentRole.WEIGHTS: self._weights,
            LatentRole.RESIDUAL: self._residual,
            LatentRole.ROUTER: self._router,
            LatentRole.EXPERTS: self._experts,
        }
        found = {playing.value: playing for playing in finders[role]()}
        return [found[node] for node in self.graph.nodes if node in found]

    @cached_property
    def _roles(self) -> dict[fx.Node, set[Role]]:
        return roles(self.graph, self.explained)

    @cached_property
    def _layers(self) -> set[fx.Node]:
        parameters = parameter_values(self.graph)
        return {
            node
            for node in self.explained
            if is_layer(node, self.explained, parameters) and not is_convolution(node.target)
        }

    def _neurons(self) -> Iterator[Playing]:
        for layer in self._layers:
            if any(
                _rank(factor) > 2 for factor in factors_of(layer) if factor not in self.explained
            ):
                continue  # weights chosen row by row: a neuron of one row is not that of another
            value = next(factor for factor in factors_of(layer) if factor in self.explained)
            while is_structural(value) and self._same_units(value):
                value = self._inputs(value)[0]
            if self._is_hidden(value):
                yield Playing(value)

    def _same_units(self, node: fx.Node) -> bool:
        """Whether a view or a cast of one value has its last dimension."""
        inputs = self._inputs(node)
        sizes = [x.meta["val"].shape[-1:] for x in (node, *inputs) if _is_tensor(x)]
        return len(inputs) == 1 and len(sizes) == 2 and str(sizes[0]) == str(sizes[1])

    def _is_hidden(self, value: fx.Node) -> bool:
        """Whether dense layers, an activation and elementwise products alone made a value."""
        activated = False
        seen: set[fx.Node] = set()
        stack = [value]
        while stack:
            node = stack.pop()
            if node in seen or node in self._layers:
                continue
            seen.add(node)
            kind = kind_of(node, self.explained)
            inputs = self._inputs(node)
            is_scaling = is_elementwise(node) and len(inputs) == 1 and kind is Kind.LINEAR
            is_part = (is_structural(node) or is_op(node, *NORMALISED)) and len(inputs) == 1
            is_product = is_op(node, "mul") and kind is Kind.PRODUCT
            if not (kind is Kind.ACTIVATION or is_scaling or is_part or is_product):
                return False
            activated |= kind is Kind.ACTIVATION
            stack += inputs
        return activated

    def _heads(self) -> Iterator[Playing]:
        for node in self.explained:
            if self._is_attention(node) and _rank(node) == 4:
                yield Playing(node)

    def _is_attention(self, node: fx.Node) -> bool:
        """Whether a node is attention, or multiplies its weights with values."""
        if kind_of(node, self.explained) is Kind.ATTENTION:
            return True
        factors = factors_of(node) if is_matrix_product(node.target) else []
        return any(self._is_weights(factor) for factor in factors)

    def _is_weights(self, node: fx.Node) -> bool:
        while is_structural(node) and len(self._inputs(node)) == 1:
            node = self._inputs(node)[0]
        return Role.WEIGHTS in self._roles.get(node, ()) and _rank(node) == 4

    def _weights(self) -> Iterator[Playing]:
        for node in self.explained:
            if is_matrix_product(node.target):
                for factor in factors_of(node):
                    if factor in self.explained and self._is_weights(factor):
                        yield Playing(factor)

    def _residual(self) -> Iterator[Playing]:
        before: dict[fx.Node, int] = {}  # the nodes that a value is computed from, as flags
        flag: dict[fx.Node, int] = {}
        for node in self.graph.nodes:
            if node in self.explained:
                flag[node] = 1 << len(flag)
                before[node] = 0
                for leaf in self._inputs(node):
                    before[node] |= before[leaf] | flag[leaf]
                if is_join(node, self.explained):
                    a, b = (self._uncast(leaf) for leaf in node.args)
                    if flag[a] & before[b] or flag[b] & before[a]:
                        yield Playing(node)

    def _uncast(self, node: Any) -> fx.Node:
        while is_structural(node) and len(self._inputs(node)) == 1:
            node = self._inputs(node)[0]
        assert isinstance(node, fx.Node)
        return node

    def _router(self) -> Iterator[Playing]:
        for routing in self._routings():
            for selection in self._selections(routing):
                yield Playing(self._scores(selection))

    def _routings(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.target is ops.routing]

    def _selections(self, routing: fx.Node) -> Iterator[fx.Node]:
        """The selections whose results weigh experts."""
        seen: set[fx.Node] = set()
        stack = [routing]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if is_op(node, "topk", "sort", "max") and node.args[0] in self.explained:
                yield node
            elif not is_matrix_product(node.target):
                stack += node.all_input_nodes

    def _scores(self, selection: fx.Node) -> fx.Node:
        """What the router's layer gave, or else what is chosen from."""
        chosen_from = node = selection.all_input_nodes[0]
        while node not in self._layers:
            inputs = self._inputs(node)
            kind = kind_of(node, self.explained)
            known = (Kind.SOFTMAX, Kind.ACTIVATION, Kind.LINEAR)
            if len(inputs) != 1 or kind not in known or _rank(inputs[0]) != _rank(node):
                return chosen_from
            node = inputs[0]
        return node

    def _experts(self) -> Iterator[Playing]:
        for routing in self._routings():
            for product in routing.users:
                found = self._contribution(product, routing)
                if found is not None:
                    yield found

    def _contribution(self, product: fx.Node, routing: fx.Node) -> Playing | None:
        """What experts contribute: the last value behind the product before they are added up."""
        if product not in self.explained or not is_broadcast(routing, product):
            return None
        selection = next(self._selections(routing), None)
        if selection is None:
            return None
        experts = int(self._scores(selection).meta["val"].shape[-1])
        chosen = next((u for u in selection.users if u.args[1:] == (1,) and _is_integer(u)), None)
        node = product
        while True:
            if _rank(node) == 3 and chosen is not None and _leads(node, chosen):
                return Playing(node, chosen, experts)
            users = [user for user in node.users if user in self.explained]
            moves = len(users) == 1 and (is_structural(users[0]) or is_op(users[0], "index"))
            if not moves:
                break
            node = users[0]
        return None

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [leaf for leaf in leaves((node.args, node.kwargs)) if leaf in self.explained]


def dims_of(value: fx.Node, role: LatentRole | None, explained: Set[fx.Node]) -> tuple[str, ...]:
    """The meaning of each of a value's dimensions."""
    rank = _rank(value)
    leading = _leading(value)
    if role is LatentRole.HEADS:
        return leading, "head", "position", "feature"
    if role is LatentRole.WEIGHTS:
        return leading, "head", "query", "key"
    if role is LatentRole.EXPERTS:
        return leading, "slot", "feature"
    named = {LatentRole.NEURONS: "neuron", LatentRole.ROUTER: "expert"}
    last = "feature" if role is None else named.get(role, "feature")
    if rank == 1:
        return (last,)
    if rank > 2 and role is None and _has_channels(value, explained):
        return leading, "channel", *["position"] * (rank - 2)
    return leading, *["position"] * (rank - 2), last


def _leading(value: fx.Node) -> str:
    """What the first dimension of a value is."""
    size = str(value.meta["val"].shape[0])
    sources = [node for node in value.graph.nodes if node.target is ops.source]
    placeholders = value.graph.find_nodes(op="placeholder")
    names = {node.kwargs["name"] for node in sources}
    shapes = [node.meta["val"].shape for node in placeholders if node.target in names]
    if any(size == str(shape[0]) for shape in shapes):
        return "batch"
    if any(len(shape) > 1 and size == str(shape[0] * shape[1]) for shape in shapes):
        return "token"
    return "row"


def _has_channels(value: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a convolution, a pool or the like made a value, elementwise ops apart."""
    node = value
    channelled = ("group_norm", "instance_norm", "_native_batch_norm_legit_no_training")
    while True:
        if is_convolution(node.target) or is_op(node, *channelled):
            return True
        inputs = [leaf for leaf in leaves((node.args, node.kwargs)) if leaf in explained]
        pools = is_op(node, "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d")
        is_pointwise = is_elementwise(node) or kind_of(node, explained) is Kind.ACTIVATION
        if not inputs or not (pools or is_pointwise) or _rank(inputs[0]) != _rank(value):
            return False
        node = inputs[0]


def _leads(value: fx.Node, chosen: fx.Node) -> bool:
    """Whether a value's first two dimensions are those of the chosen experts."""
    shape = list(map(str, value.meta["val"].shape))
    return shape[:2] == list(map(str, chosen.meta["val"].shape))


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_integer(node: fx.Node) -> bool:
    return _is_tensor(node) and not node.meta["val"].is_floating_point()
