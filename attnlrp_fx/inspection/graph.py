"""The rewritten graph as networkx, as Graphviz's DOT, and for Google's model-explorer.

Of the graph, what computes is shown: nodes that relevance passes through and constants among them,
without sizes, parameters and assertions. An edge goes as values do; with a ledger it has the
relevance that goes back along it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx as nx
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.files import write_atomically
from attnlrp_fx.graph.provenance import module_class, module_path, source_line, target_name
from attnlrp_fx.inspection.graphs import Graphs
from attnlrp_fx.inspection.ledger import Ledger
from attnlrp_fx.inspection.listing import line_of, shape_of

RULE_COLOURS: Mapping[str, str] = {
    "Epsilon": "#4e79a7",
    "Gamma": "#2f5d8a",
    "AlphaBeta": "#2f5d8a",
    "ZPlus": "#2f5d8a",
    "WSquare": "#2f5d8a",
    "Flat": "#2f5d8a",
    "ZBox": "#2f5d8a",
    "Uniform": "#e15759",
    "Identity": "#f28e2b",
    "Attention": "#b07aa1",
    "Taylor": "#9c755f",
    "StatisticConstant": "#59a14f",
    "Winner": "#edc948",
    "Join": "#76b7b2",
    "Pass": "#76b7b2",
    "Gradient": "#d62728",
    "source": "#000000",
    "": "#b8bdc4",
}
"""A colour a rule; those that look at a layer's weights share one, and "" is a constant's."""


def rule_name(node: fx.Node) -> str:
    """The rule at a node without its options, "source" at an explained input, "" at a constant."""
    if node.target is ops.source:
        return "source"
    name = str(node.meta.get("rule", "")).partition("(")[0]
    return "" if name in ("Constant", "Explained") else name


def colour_of(rule: str) -> str:
    """A rule's colour; of one that is not in the table, grey."""
    return RULE_COLOURS.get(rule, "#808890")


def shown(graphs: Graphs) -> list[fx.Node]:
    """The nodes that are drawn, in the graph's order."""
    reaching: set[fx.Node] = set()
    for node in reversed(graphs.rewritten.graph.nodes):
        is_read = node.op == "output" or any(user in reaching for user in node.users)
        if is_read and node.op != "get_attr" and (_is_value(node) or node.op == "output"):
            reaching.add(node)
    return [node for node in graphs.rewritten.graph.nodes if node in reaching]


def to_networkx(graphs: Graphs, ledger: Ledger | None = None) -> "nx.DiGraph[str]":
    """The rewritten graph as a directed graph.

    Nodes have op, rule, formula, kind, module, module_class, source, shape, constructed_by and
    authority; edges have, with a ledger, relevance.
    """
    graph: nx.DiGraph[str] = nx.DiGraph(composite=graphs.composite)
    nodes = shown(graphs)
    names = {node.name for node in nodes}
    for node in nodes:
        meta = node.meta
        graph.add_node(
            node.name,
            op=target_name(meta.get("op", node.target)),
            rule=str(meta.get("rule", "")),
            formula=str(meta.get("formula", "")),
            kind=str(meta.get("kind", "")),
            module=module_path(node),
            module_class=module_class(node),
            source=source_line(node),
            shape=shape_of(node),
            constructed_by=str(meta.get("constructed_by", "")),
            authority=str(meta.get("authority", "")),
        )
        for leaf in node.all_input_nodes:
            if leaf.name in names:
                flow = None if ledger is None else ledger.flows.get((leaf.name, node.name), 0.0)
                graph.add_edge(
                    leaf.name, node.name, **({} if flow is None else {"relevance": flow})
                )
    return graph


def to_dot(graphs: Graphs, ledger: Ledger | None = None) -> str:
    """The rewritten graph in Graphviz's language, a cluster a module."""
    graph = to_networkx(graphs, ledger)
    flows = [abs(value) for *_, value in graph.edges.data("relevance", default=0.0)]
    largest = max(flows, default=0.0) or 1.0
    lines = ["digraph rewritten {", "  rankdir=TB; node [shape=box, style=filled, fontsize=10];"]
    lines += _clusters(graph)
    for before, after, data in graph.edges.data():
        value, style = data.get("relevance"), ""
        if value is not None:
            colour = "#e87818" if value >= 0 else "#3a80d2"
            width = 0.4 + 6 * abs(value) / largest
            style = f' [penwidth={width:.2f}, color="{colour}", tooltip="{value:.6g}"]'
        lines.append(f"  {_quoted(before)} -> {_quoted(after)}{style};")
    return "\n".join([*lines, "}"]) + "\n"


def _clusters(graph: "nx.DiGraph[str]") -> Iterator[str]:
    """The nodes, those of one module in one cluster inside of its parent's."""
    tree: dict[Any, Any] = {}
    for name, data in graph.nodes.data():
        place = tree
        for part in filter(None, data["module"].split(".")):
            place = place.setdefault(("module", part), {})
        place[name] = data
    yield from _cluster(tree, "", "  ")


def _cluster(place: Mapping[Any, Any], path: str, indent: str) -> Iterator[str]:
    for key, value in place.items():
        if isinstance(key, tuple):
            inner = f"{path}.{key[1]}".lstrip(".")
            yield f"{indent}subgraph {_quoted('cluster_' + inner)} {{ label={_quoted(inner)};"
            yield from _cluster(value, inner, indent + "  ")
            yield f"{indent}}}"
        else:
            rule = value["rule"].partition("(")[0]
            label = f"{key}\n{value['op']}\n{value['rule']}".rstrip()
            colour = colour_of("" if rule == "Constant" else rule)
            tip = value["source"] or value["module"]
            yield (
                f'{indent}{_quoted(key)} [label={_quoted(label)}, fillcolor="{colour}55", '
                f"tooltip={_quoted(tip)}];"
            )


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


@dataclass(frozen=True)
class ModelExplorerFiles:
    """What Google's model-explorer (ai-edge-model-explorer) opens, as its JSON files hold it."""

    graph: Mapping[str, Any]
    """A collection of one graph; nodes lie in the namespace of their module."""
    node_data: Mapping[str, Mapping[str, Any]]
    """By name: the rule at each node and, with a ledger, the relevance that it received."""

    def write(self, path: str | Path) -> list[Path]:
        """Write the graph, and beside it a file for each node data: "graph.rule.json".

        Returns:
            The files, each written whole or not at all.
        """
        goal = Path(path)
        written = {goal: self.graph}
        for name, data in self.node_data.items():
            written[goal.with_name(f"{goal.stem}.{name}.json")] = data
        for file, content in written.items():
            write_atomically(file, json.dumps(content))
        return list(written)


def to_model_explorer(graphs: Graphs, ledger: Ledger | None = None) -> ModelExplorerFiles:
    """The rewritten graph for model-explorer."""
    graph = to_networkx(graphs, ledger)
    by_name = {node.name: node for node in graphs.rewritten.graph.nodes}
    nodes = []
    for name, data in graph.nodes.data():
        attributes = {
            key: data[key]
            for key in "op rule formula kind authority constructed_by source shape".split()
            if data[key]
        }
        attributes["code"] = line_of(by_name[name]).code
        nodes.append(
            {
                "id": name,
                "label": data["op"].removesuffix(".default"),
                "namespace": data["module"].replace(".", "/"),
                "attrs": [{"key": key, "value": value} for key, value in attributes.items()],
                "incomingEdges": [
                    {"sourceNodeId": before, "sourceNodeOutputId": "0", "targetNodeInputId": str(k)}
                    for k, before in enumerate(graph.predecessors(name))
                ],
                "outputsMetadata": [
                    {"id": "0", "attrs": [{"key": "tensor_shape", "value": data["shape"]}]}
                ],
            }
        )
    node_data = {"rule": {"rewritten": _rules_as_data(graph)}}
    if ledger is not None:
        node_data["relevance"] = {"rewritten": _relevance_as_data(graph, ledger)}
    collection = {"label": graphs.composite, "graphs": [{"id": "rewritten", "nodes": nodes}]}
    return ModelExplorerFiles(collection, node_data)


def _rules_as_data(graph: "nx.DiGraph[str]") -> dict[str, Any]:
    """The rule at each node, in its colour; the viewer wants a number, which counts the rules."""
    rules = dict.fromkeys(d["rule"] for _, d in graph.nodes.data() if d["rule"])
    number = {rule: i for i, rule in enumerate(rules)}
    results = {
        name: {"value": number[data["rule"]], "bgColor": colour_of(data["rule"].partition("(")[0])}
        for name, data in graph.nodes.data()
        if data["rule"]
    }
    return {
        "name": f"rule: {', '.join(f'{i} {rule}' for rule, i in number.items())}",
        "results": results,
    }


def _relevance_as_data(graph: "nx.DiGraph[str]", ledger: Ledger) -> dict[str, Any]:
    """The relevance that each node received."""
    received = {entry.node: entry.received for entry in ledger.entries if entry.node in graph}
    gradient = [{"stop": 0, "bgColor": "#3a80d2"}, {"stop": 1, "bgColor": "#e87818"}]
    results = {name: {"value": value} for name, value in received.items()}
    return {"name": "relevance", "results": results, "gradient": gradient}


def _is_value(node: fx.Node) -> bool:
    """Whether a node's value is a tensor, or several."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (
        isinstance(value, list | tuple) and any(isinstance(part, Tensor) for part in value)
    )
