"""A page of the graph: one file, no network; folded by module, an explanation laid over it."""

import html
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import networkx as nx

from attnlrp_fx.inspection.graph import colour_of, rule_name, to_networkx
from attnlrp_fx.inspection.graphs import Graphs
from attnlrp_fx.inspection.layout import Group, folded
from attnlrp_fx.inspection.ledger import Ledger
from attnlrp_fx.inspection.listing import line_of
from attnlrp_fx.inspection.paths import main_paths

_DIGITS = 6
_DOCUMENT = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{css}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<span id="facts"></span>
<label>colour <select id="colour"></select></label>
<button id="fold" title="Fold everything">fold all</button>
<button id="fit" title="Show everything that is unfolded">fit</button>
<span class="find"><input id="search" type="search"
 placeholder="find a node, op, rule, module, line" autocomplete="off" spellcheck="false">
<span id="found"></span></span>
</header>
<main>
<canvas id="graph" tabindex="0" aria-label="the graph"></canvas>
<ol id="results" hidden></ol>
<div id="legend"></div>
<aside id="panel"></aside>
</main>
<script type="application/json" id="data">{data}</script>
<script>
{script}
</script>
</body>
</html>
"""


@cache
def _asset(name: str) -> str:
    return (files("attnlrp_fx.inspection") / name).read_text(encoding="utf-8")


def page(graphs: Graphs, ledger: Ledger | None, title: str) -> str:
    """The page of a rewritten graph.

    Args:
        graphs: the graphs of a compiled model.
        ledger: an explanation's, whose relevance is laid over the graph; None: none is.
        title: what the page is called.
    """
    data = json.dumps(page_data(graphs, ledger), ensure_ascii=False, separators=(",", ":"))
    return _DOCUMENT.format(
        title=html.escape(title),
        css=_asset("page.css"),
        script=_asset("page.js"),
        data=data.replace("<", "\\u003c"),
    )


class _Strings:
    """Strings, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def of(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def page_data(graphs: Graphs, ledger: Ledger | None) -> dict[str, Any]:
    """What the page's script reads.

    Items are nodes first, in the graph's order, and then groups, the root first of them. Strings
    are numbers of a table.
    """
    graph = to_networkx(graphs, ledger)
    root = folded(graph)
    strings = _Strings()
    number = {name: i for i, name in enumerate(graph)}
    groups = list(root.groups())
    place = {id(group): len(number) + i for i, group in enumerate(groups)}

    def item(child: Group | str) -> int:
        return place[id(child)] if isinstance(child, Group) else number[child]

    by_name = {node.name: node for node in graphs.rewritten.graph.nodes}
    entries = {} if ledger is None else {entry.node: entry for entry in ledger.entries}
    nodes = []
    for name, data in graph.nodes.data():
        texts = {
            "op": data["op"].removesuffix(".default"),
            "rule": data["rule"],
            "formula": data["formula"],
            "by": data["authority"],
            "made": data["constructed_by"],
            "module": data["module"],
            "class": data["module_class"],
            "source": data["source"],
            "shape": data["shape"],
        }
        made_of = [part.name for part in graphs.made_of.get(name, ()) if part.name != name]
        misses = [
            f"{by}: {miss}" for one in (name, *made_of) for by, miss in graphs.near_misses(one)
        ]
        found: dict[str, Any] = {key: strings.of(text) for key, text in texts.items() if text}
        found |= {"name": name, "kind": strings.of(rule_name(by_name[name]))}
        found |= {"code": line_of(by_name[name]).code}
        found |= {"parts": made_of} if made_of else {}
        found |= {"misses": misses} if misses else {}
        if name in entries:
            causes = {cause: _short(v) for cause, v in entries[name].causes.items() if v}
            found |= {"r": _short(entries[name].received), "causes": causes}
        nodes.append(found)
    kinds = dict.fromkeys(rule_name(by_name[name]) for name in graph)
    return {
        "strings": list(strings.numbers),
        "nodes": nodes,
        "edges": [
            [number[a], number[b], *([] if r is None else [_short(r)])]
            for a, b, r in _relevance(graph)
        ],
        "groups": [
            {
                "name": group.name,
                "path": group.path,
                "kind": group.kind,
                "rows": [[item(child) for child in row] for row in group.rows],
            }
            for group in groups
        ],
        "colours": {kind: colour_of(kind) for kind in kinds},
        "composite": graphs.composite,
        "ledger": None if ledger is None else _summary(ledger),
        "paths": []
        if ledger is None
        else [
            {"nodes": [number[name] for name in path.nodes], "share": _short(path.share)}
            for path in main_paths(graph, ledger)
        ],
    }


def _summary(ledger: Ledger) -> Mapping[str, Any]:
    return {
        "target": _short(ledger.target),
        "inputs": {name: _short(value) for name, value in ledger.inputs.items()},
        "causes": {cause: _short(value) for cause, value in ledger.by_cause().items()},
        "sentences": ledger.sentences(),
    }


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _relevance(graph: "nx.DiGraph[str]") -> Iterator[tuple[str, str, float | None]]:
    """Edges with their relevance."""
    for before, after, data in graph.edges.data():
        yield before, after, data.get("relevance")
