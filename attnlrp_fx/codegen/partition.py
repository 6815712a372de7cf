"""Partition: cut a program where the seeds enter, and choose what crosses the cut.

The *forward* side computes the outputs, the *relevance* side everything that depends on a seed. A
value that both need is saved, or computed again from values that are. What to save is a minimum
cut (as in Chen et al. 2016 and AOTAutograd's partitioner): each value is an edge as wide as its
bytes; inputs are free; products, reductions and attention have a price at which they are computed
twice, by default an infinite one; views cost nothing. Among cuts of one width, the one nearest to
its use is taken: it leaves least to do again.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from attnlrp_fx.codegen.flops import operations
from attnlrp_fx.graph.operators import is_cheap, is_free, outputs_of
from attnlrp_fx.torch_private import fresh, lazy_graph_module, typical_size

SEED = "seed:"
"""How the names of seeds begin, which are numbered."""

TYPICAL = 64
"""What a symbolic size counts for when bytes are compared."""
NEARNESS = 0.01
"""How much wider an edge becomes with each step away from its use, as a share."""


@dataclass(frozen=True)
class Keeping:
    """What the forward side keeps for the relevance side, and what is computed again."""

    elementwise: bool = True
    """Whether elementwise ops may be computed on both sides; views, and values that take twice the
    bytes of what they are made of, always may."""
    price: float = math.inf
    """How many bytes an operation is worth that need not be done twice: at infinity products,
    reductions and attention are done once; at 0 nothing is kept but what regions hand on."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """What symbolic sizes count for."""


def split(
    program: fx.GraphModule, outputs: int, keeping: Keeping | None = None
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a program where the seeds enter.

    Args:
        program: placeholders whose `meta["part"]` is "seed" are the seeds; the first `outputs`
            results do not depend on them.
        outputs: how many results belong to the forward side.
        keeping: what is kept and what is computed again; None: elementwise ops alone are.

    Returns:
        forward: attributes and inputs → outputs and saved values;
        relevance: attributes, inputs, saved values and seeds → relevance and sums. Placeholders
        that a side does not use are left out; `node.meta["name"]` says what each one is.
    """
    graph = program.graph
    results = outputs_of(graph)
    needed = _closure(r for r in results[:outputs] if isinstance(r, fx.Node))
    needed |= {n for n in graph.nodes if n.target is operator.getitem and n.args[0] in needed}
    wanted = _closure(r for r in results[outputs:] if isinstance(r, fx.Node))
    seeded = _depends_on_seeds(graph)
    saved = _minimum_cut(graph, results[outputs:], needed, wanted, seeded, keeping or Keeping())
    inside = _closure((r for r in results[outputs:] if isinstance(r, fx.Node)), until=saved)
    forward = _extract(program, needed | _closure(saved), [], [*results[:outputs], *saved])
    relevance = _extract(program, inside - set(saved), saved, results[outputs:])
    return forward, relevance


def hoist(program: fx.GraphModule) -> tuple[fx.GraphModule, fx.GraphModule | None]:
    """Take out of a program what depends on its attributes alone: |W| and W⁺, merged weights.

    Args:
        program: placeholders of attributes have "attribute" as `meta["part"]`.

    Returns:
        rest: the program with these values as further inputs, named "derived:…";
        derived: attributes → these values, in that order; None if there are none.
    """
    constant: set[fx.Node] = set()
    for node in program.graph.nodes:
        inputs = node.all_input_nodes
        is_call = node.op == "call_function" and bool(inputs)
        if node.meta.get("part") == "attribute" or (
            is_call and all(leaf in constant for leaf in inputs)
        ):
            constant.add(node)
    derived = [n for n in program.graph.nodes if n in constant and _is_derived(n, constant)]
    if not derived:
        return program, None
    alone = _extract(program, _closure(derived), [], derived)
    rest = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in derived:
        values[node] = _further_input(rest, "derived", node)
    for node in program.graph.nodes:
        if node not in values:
            values[node] = rest.node_copy(node, values.__getitem__)
    rest.eliminate_dead_code()
    return lazy_graph_module(program, rest), alone


def _is_derived(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a value of constants is computed, and is read, or a view of it is, by what is not."""
    if node.op == "placeholder" or not isinstance(node.meta.get("val"), Tensor):
        return False
    if is_free(node):
        return False
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user not in constant:
            return True
        if is_free(user):
            stack += user.users
    return False


def _closure(nodes: Iterable[fx.Node], until: Sequence[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and everything they are computed from, not looking behind `until`."""
    found: set[fx.Node] = set()
    stop = set(until)
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            if node not in stop:
                stack.extend(node.all_input_nodes)
    return found


def _depends_on_seeds(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.meta.get("part") == "seed" or any(leaf in found for leaf in node.all_input_nodes):
            found.add(node)
    return found


def _minimum_cut(
    graph: fx.Graph,
    results: Sequence[Any],
    needed: set[fx.Node],
    wanted: set[fx.Node],
    seeded: set[fx.Node],
    keeping: Keeping,
) -> list[fx.Node]:
    """The values to save, in the graph's order."""
    flow: nx.DiGraph[Any] = nx.DiGraph()
    flow.add_nodes_from(("inputs", "relevance"))
    unseeded = wanted - seeded
    candidates = [n for n in graph.nodes if n in unseeded and n.op == "call_function"]
    direct = {r for r in results if isinstance(r, fx.Node)}
    distance: dict[fx.Node, int] = {}
    for node in reversed(candidates):
        users = [user for user in node.users if user in wanted]
        is_used = node in direct or any(user in seeded for user in users)
        further = [distance[user] for user in users if user in distance]
        distance[node] = 0 if is_used else 1 + min(further, default=0)
        width = _bytes(node, keeping.sizes) * (1 + NEARNESS * min(distance[node], 50))
        flow.add_edge((node, "in"), (node, "out"), capacity=width)
        again = _price(node, keeping)
        if node in needed and again:
            flow.add_edge("inputs", (node, "in"), capacity=again)
        if is_used:
            flow.add_edge((node, "out"), "relevance")
        for user in users:
            if user not in seeded and user.op == "call_function":
                flow.add_edge((node, "out"), (user, "in"))
    _, (near, _) = nx.minimum_cut(flow, "inputs", "relevance")
    return [n for n in candidates if (n, "in") in near and (n, "out") not in near]


def _bytes(node: fx.Node, sizes: Mapping[str, int]) -> float:
    """How much saving a value takes; infinite for what cannot be saved."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        count = 1.0
        for size in value.shape:
            count *= typical_size(size, TYPICAL, sizes)
        return count * value.dtype.itemsize
    return math.inf if isinstance(value, list | tuple) else 8.0


def _price(node: fx.Node, keeping: Keeping) -> float:
    """What it costs, in bytes, to compute a value once more that the forward side has."""
    value = node.meta.get("val")
    if isinstance(value, int | float | torch.SymInt | torch.SymFloat) or is_free(node):
        # A part of several outputs costs what their op does.
        apart = node.target is operator.getitem and keeping.price == math.inf
        return math.inf if apart else 0.0
    if is_cheap(node) and (keeping.elementwise or _widens(node, keeping.sizes)):
        return 0.0
    if keeping.price in (0.0, math.inf):
        return keeping.price
    return keeping.price * typical_size(operations(node), TYPICAL, keeping.sizes)


def _further_input(graph: fx.Graph, part: str, node: fx.Node) -> fx.Node:
    """A placeholder for a value that is computed elsewhere, named like no other."""
    new = graph.placeholder(f"{part}_{node.name}")
    new.target = new.name
    name = f"{part}:{node.name}"
    new.meta = {"val": fresh(node.meta["val"]), "name": name, "part": part}
    return new


def _widens(node: fx.Node, sizes: Mapping[str, int]) -> bool:
    """Whether a value takes twice the bytes of what it is made of, as a mask of floats does."""
    made_of = [leaf for leaf in node.all_input_nodes if isinstance(leaf.meta.get("val"), Tensor)]
    return _bytes(node, sizes) >= 2 * sum(_bytes(leaf, sizes) for leaf in made_of) > 0


def _extract(
    program: fx.GraphModule, inside: set[fx.Node], saved: Sequence[fx.Node], results: Sequence[Any]
) -> fx.GraphModule:
    """A graph of some of a program's nodes, with saved values as further inputs."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node in inside:
            values[node] = graph.node_copy(node)
    for node in saved:
        values[node] = _further_input(graph, "saved", node)
    for node in program.graph.nodes:
        if node in inside and node.op not in ("placeholder", "output"):
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(fx.node.map_arg(list(results), values.__getitem__))
    return lazy_graph_module(program, graph)
