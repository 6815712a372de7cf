"""The paths that most of an explanation's relevance takes, from the target to the inputs.

Of what a node receives, each value that it reads gets a share, in magnitude, and what it absorbs
has the rest. A path takes the product of the shares along it: as a walk would that at each node
goes on by chance. So shares of all paths and of all that is absorbed add up to one.
"""

from dataclasses import dataclass

import networkx as nx

from attnlrp_fx.inspection.ledger import Ledger


@dataclass(frozen=True)
class Path:
    """One way from the target to an input."""

    nodes: tuple[str, ...]
    """From the input to the output."""
    share: float
    """How much of the target's relevance, in magnitude, takes it."""


def main_paths(graph: "nx.DiGraph[str]", ledger: Ledger, count: int = 8) -> list[Path]:
    """The paths that most relevance takes, the first first.

    Args:
        graph: the rewritten graph, as from `attnlrp_fx.inspection.graph.to_networkx`.
        ledger: an explanation's.
        count: the most paths.
    """
    flows = {
        edge: abs(flow) for edge, flow in ledger.flows.items() if flow and graph.has_edge(*edge)
    }
    kept = {entry.node: sum(map(abs, entry.causes.values())) for entry in ledger.entries}
    whole = dict(kept)
    for (_, reader), flow in flows.items():
        whole[reader] = whole.get(reader, 0.0) + flow
    taken: dict[str, list[Path]] = {}
    ends: list[Path] = []
    for name in reversed(list(nx.topological_sort(graph))):
        readers = [reader for reader in graph.successors(name) if (name, reader) in flows]
        arriving = [
            Path((name, *path.nodes), path.share * flows[name, reader] / whole[reader])
            for reader in readers
            for path in taken[reader]
        ]
        best = sorted(arriving, key=lambda path: -path.share)[:count]
        taken[name] = best or ([] if readers else [Path((name,), 1.0)])
        if best and not any((before, name) in flows for before in graph.predecessors(name)):
            ends += best
    return sorted(ends, key=lambda path: -path.share)[:count]
