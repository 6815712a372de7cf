"""The three graphs of a compiled model, and which node of one is which of another.

A captured node either is in the rewritten graph still, under its name; or a pass put another in its
place; or it went, together with others, into a pattern that a pass recognised: then it is claimed
by the first node behind it that is there. Program nodes carry the rewritten node that they are of.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.calculus.postings import explained_inputs, is_carrier
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.operators import value_inputs
from attnlrp_fx.graph.provenance import module_path
from attnlrp_fx.passes.base import PassResult


@dataclass(frozen=True)
class Claim:
    """What became of one node of the captured graph."""

    node: fx.Node
    claimed_by: str
    """The pass that took it out of the graph; "" if it is there still."""
    into: fx.Node | None
    """The node of the rewritten graph that it is, or is a part of; None if nothing needs it."""


@dataclass(frozen=True)
class Graphs:
    """What inspection looks at."""

    captured: fx.GraphModule
    rewritten: fx.GraphModule
    results: tuple[PassResult, ...]
    """What each pass did."""
    composite: str
    trace: Callable[[], fx.GraphModule]
    """Makes the program as one graph, or gives the one that is there."""

    @cached_property
    def program(self) -> fx.GraphModule:
        """What runs, as one graph."""
        return self.trace()

    def named(self, which: str) -> fx.GraphModule:
        """One of the three.

        Raises:
            InputError: there is none of that name.
        """
        if which not in GRAPHS:
            raise InputError(
                f"there is no graph '{which}'", remedy=f"use one of: {', '.join(GRAPHS)}"
            )
        graph_module: fx.GraphModule = getattr(self, which)
        return graph_module

    @cached_property
    def claims(self) -> Mapping[str, Claim]:
        """What became of each captured node, by its name."""
        remaining = {node.name: node for node in self.rewritten.graph.nodes}
        standing = {
            name: _heart(node)
            for node in self.rewritten.graph.nodes
            for name in node.meta.get("stands_for", ())
        }
        removed = {name: result.name for result in self.results for name in result.removed}
        found: dict[str, Claim] = {}
        for node in reversed(self.captured.graph.nodes):
            into = remaining.get(node.name) or standing.get(node.name)
            if into is None:
                behind = (found[user.name].into for user in node.users if user.name in found)
                into = next((n for n in behind if n is not None and n.op != "output"), None)
            found[node.name] = Claim(node, removed.get(node.name, ""), into)
        return found

    @cached_property
    def made_of(self) -> Mapping[str, tuple[fx.Node, ...]]:
        """The captured nodes that each rewritten node is or was made of, in order."""
        found: dict[str, list[fx.Node]] = {}
        for claim in reversed(list(self.claims.values())):
            if claim.into is not None:
                found.setdefault(claim.into.name, []).append(claim.node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def near_misses(self, name: str) -> list[tuple[str, str]]:
        """The passes that almost took a node for part of their pattern, and why they did not."""
        return [
            (result.name, miss)
            for result in self.results
            for miss in result.near_misses
            if miss.startswith(f"node '{name}' ")
        ]

    def nodes_of(self, module: str) -> list[fx.Node]:
        """The rewritten graph's nodes that were captured in a module, or in one inside of it."""
        return [
            node
            for node in self.rewritten.graph.nodes
            if (path := module_path(node)) == module or path.startswith(f"{module}.")
        ]

    @cached_property
    def on_the_path(self) -> list[fx.Node]:
        """The captured nodes, in order, whose values lie between explained inputs and outputs."""
        sources = [node for node in self.rewritten.graph.nodes if node.target is ops.source]
        begin = {leaf.name for node in sources for leaf in node.all_input_nodes[:1]}
        reached = {node for node in self.captured.graph.nodes if node.name in begin}
        for node in self.captured.graph.nodes:
            if node.op not in ("placeholder", "get_attr", "output") and any(
                leaf in reached for leaf in value_inputs(node)
            ):
                reached.add(node)
        needed: set[fx.Node] = set()
        stack = [*self.captured.graph.output_node().all_input_nodes]
        while stack:
            node = stack.pop()
            if node in reached and node not in needed:
                needed.add(node)
                stack += value_inputs(node)
        return [
            node
            for node in self.captured.graph.nodes
            if node in needed and node.name not in begin and is_floating(node)
        ]


def _heart(node: fx.Node) -> fx.Node:
    """Of what a pass put in a node's place, the op itself rather than the views behind it."""
    made_by = node.meta.get("constructed_by")
    while node.target in ops.RELEVANCE_OPS and is_carrier(node):
        (before,) = explained_inputs(node)
        if before.meta.get("constructed_by") != made_by or before.target is ops.source:
            break
        node = before
    return node


GRAPHS = ("captured", "rewritten", "program")


def is_floating(node: fx.Node) -> bool:
    """Whether a node's value, or one of its values, is floating."""
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return any(part.is_floating_point() or part.is_complex() for part in tensors)
