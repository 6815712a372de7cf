"""The graph for other tools: networkx, Graphviz, model-explorer."""

import json
from pathlib import Path

import networkx as nx
import pytest
from inspected import looked

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import leaves


def test_networkx_has_every_explained_node_and_edge() -> None:
    explainer = looked().explainer
    graph = explainer.to_networkx()
    assert nx.is_directed_acyclic_graph(graph)
    for node in explainer.rewritten.graph.nodes:
        if ops.is_explained(node):
            assert graph.nodes[node.name]["rule"] == str(node.meta.get("rule", ""))
            read = [leaf for leaf in leaves((node.args, node.kwargs)) if ops.is_explained(leaf)]
            assert all(graph.has_edge(leaf.name, node.name) for leaf in read)
    attention = [d for _, d in graph.nodes.data() if d["rule"].startswith("Attention")]
    assert [d["module"] for d in attention] == [f"blocks.{i}" for i in range(3)]
    assert all(d["kind"] == "attention" and "inspected.py" in d["source"] for d in attention)


def test_relevance_flows_along_edges() -> None:
    """What goes into a node's value from all of its readers is what its entry received."""
    found = looked()
    ledger = found.audit.ledger
    graph = found.explainer.to_networkx(ledger)
    for entry in ledger.entries[:-1]:
        flows = [d["relevance"] for *_, d in graph.out_edges(entry.node, data=True)]
        assert sum(flows) == pytest.approx(entry.received, abs=1e-12)
        back = [d["relevance"] for *_, d in graph.in_edges(entry.node, data=True)]
        assert sum(back) == pytest.approx(entry.passed, abs=1e-12)


def test_dot_is_balanced_and_has_widths() -> None:
    found = looked()
    text = found.explainer.to_dot(found.audit.ledger)
    assert text.startswith("digraph rewritten {")
    assert text.count("{") == text.count("}")
    assert 'subgraph "cluster_blocks.1" { label="blocks.1";' in text
    graph = found.explainer.to_networkx()
    assert text.count(" -> ") == graph.number_of_edges()
    assert "penwidth=6.40" in text
    assert "penwidth" not in found.explainer.to_dot()


def test_model_explorer_files(tmp_path: Path) -> None:
    """Namespaces, edges, and rules and relevance as node data; each a file of JSON."""
    found = looked()
    files = found.explainer.to_model_explorer(found.audit.ledger).write(tmp_path / "graph.json")
    assert [file.name for file in files] == [
        "graph.json",
        "graph.rule.json",
        "graph.relevance.json",
    ]
    collection, rule, relevance = (json.loads(file.read_text()) for file in files)
    (graph,) = collection["graphs"]
    names = {node["id"] for node in graph["nodes"]}
    for node in graph["nodes"]:
        assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= names
    assert {node["namespace"] for node in graph["nodes"]} >= {"blocks/0/norm", "classes", ""}
    assert set(rule["rewritten"]["results"]) <= names
    received = {e.node: e.received for e in found.audit.ledger.entries}
    for name, result in relevance["rewritten"]["results"].items():
        assert received[name] == result["value"]
    assert set(found.explainer.to_model_explorer().node_data) == {"rule"}


def test_model_explorer_takes_them() -> None:
    """The viewer's own classes are made of them, field by field, nothing left over."""
    dacite = pytest.importorskip("dacite")
    builder = pytest.importorskip("model_explorer.graph_builder")
    data = pytest.importorskip("model_explorer.node_data_builder")
    found = looked()
    files = found.explainer.to_model_explorer(found.audit.ledger)
    strict = dacite.Config(strict=True)
    collection = dacite.from_dict(builder.GraphCollection, files.graph, config=strict)
    assert len(collection.graphs[0].nodes) == found.explainer.to_networkx().number_of_nodes()
    for part in files.node_data.values():
        model = dacite.from_dict(data.ModelNodeData, {"graphsData": part}, config=strict)
        assert model.graphsData["rewritten"].results
