"""The paths that carry most of an explanation's relevance, from the target to the inputs.

Relevance on edges is taken apart into paths, the widest first: a path carries what its narrowest
edge has left, in magnitude, and takes that from all of its edges. So no relevance is counted twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx

from attnlrp_fx.inspection.ledger import Ledger


@dataclass(frozen=True)
class Path:
    """One way from the target to an input."""

    nodes: tuple[str, ...]
    """From the input to the output."""
    carried: float
    """The magnitude of the relevance that all of its edges have, and no path before it."""


def widest_paths(graph: "nx.DiGraph[str]", ledger: Ledger, count: int = 8) -> list[Path]:
    """Paths from explained inputs to outputs, the one that carries most first.

    Args:
        graph: the rewritten graph, as from `attnlrp_fx.inspection.graph.to_networkx`.
        ledger: an explanation's.
        count: the most paths.
    """
    left = {edge: abs(flow) for edge, flow in ledger.flows.items() if graph.has_edge(*edge)}
    order = list(nx.topological_sort(graph))
    found = []
    for _ in range(count):
        path = _widest(graph, order, left)
        if path is None:
            break
        found.append(path)
        for edge in zip(path.nodes, path.nodes[1:], strict=False):
            left[edge] -= path.carried
    return found


def _widest(
    graph: "nx.DiGraph[str]", order: Sequence[str], left: dict[tuple[str, str], float]
) -> Path | None:
    """The path whose narrowest edge has most left."""
    width: dict[str, float] = {}
    came: dict[str, str] = {}
    for name in order:
        edges = [(before, name) for before in graph.predecessors(name) if (before, name) in left]
        if not edges:
            width[name] = float("inf")
            continue
        width[name], best = max((min(width[a], left[a, b]), a) for a, b in edges)
        if width[name] > 0:
            came[name] = best
    ends = [n for n in came if not any((n, after) in left for after in graph.successors(n))]
    if not ends:
        return None
    end = max(ends, key=width.__getitem__)
    nodes = [end]
    while nodes[-1] in came:
        nodes.append(came[nodes[-1]])
    return Path(tuple(reversed(nodes)), width[end])
