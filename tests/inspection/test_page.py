"""The page in a real browser: it loads, folds, finds, and says nothing in the console."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
from inspected import looked

from attnlrp_fx.inspection.layout import Group, folded
from attnlrp_fx.inspection.page import page_data
from attnlrp_fx.inspection.paths import main_paths

FLAGS = """--headless --no-sandbox --disable-gpu --disable-background-networking
    --disable-component-update --disable-sync --no-first-run""".split()


def test_the_page_is_one_file(tmp_path: Path) -> None:
    """No address but the name of SVG's language; no text of the model can end the script."""
    found = looked()
    text = found.explainer.graph_page(tmp_path / "graph.html", found.audit.ledger, "a <b> model")
    assert (tmp_path / "graph.html").read_text() == text
    assert not re.search(r"https?://|@import|src=", text)
    assert "<title>a &lt;b&gt; model</title>" in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None
    assert len(json.loads(data[1])["nodes"]) == found.explainer.to_networkx().number_of_nodes()


def test_layout_holds_every_node_once_below_what_it_reads() -> None:
    graph = looked().explainer.to_networkx()
    root = folded(graph)
    assert sorted(root.nodes()) == sorted(graph)
    for group in root.groups():
        assert sorted(map(id, group.children)) == sorted(id(c) for row in group.rows for c in row)
        row_of = {
            child: i for i, row in enumerate(group.rows) for child in row if isinstance(child, str)
        }
        for before, after in graph.edges:
            if before in row_of and after in row_of:
                assert row_of[before] < row_of[after]


def test_layers_of_one_structure_are_a_stack() -> None:
    """By structure alone: here two of three, since the last is computed for one position."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    none = dict.fromkeys(("shape", "module_class", "source", "module"), "")
    graph.add_node("start", op="source", rule="", **none)
    for i, op in enumerate(["a", "b", "a", "b", "a", "c"]):
        data = dict.fromkeys(("shape", "module_class", "source"), "")
        module = f"odd{'xyz'[i // 2]}.inner"
        graph.add_node(f"n{i}", op=op, rule="R", module=module, **data)
        graph.add_edge(f"n{i - 1}" if i else "start", f"n{i}")
    _, stack, other = folded(graph).children
    assert isinstance(stack, Group)
    assert isinstance(other, Group)
    assert (stack.kind, stack.name, list(stack.nodes())) == (
        "stack",
        "oddx … oddy",
        ["n0", "n1", "n2", "n3"],
    )
    assert (other.kind, other.name) == ("module", "oddz")


def test_paths_share_out_the_target() -> None:
    """From an input to the output, connected; all shares and all that is absorbed are one."""
    found = looked()
    graph = found.explainer.to_networkx(found.audit.ledger)
    paths = main_paths(graph, found.audit.ledger)
    shares = [path.share for path in paths]
    assert shares == sorted(shares, reverse=True)
    assert len({path.nodes for path in paths}) == len(paths) == 8
    for path in paths:
        assert (path.nodes[0], path.nodes[-1]) == ("input_ids", "output")
        assert nx.is_path(graph, path.nodes)
    every = main_paths(graph, found.audit.ledger, 10**4)
    assert 0 < sum(path.share for path in every) < 1


def test_data_without_a_ledger() -> None:
    data = page_data(looked().explainer._graphs_as_seen, None)
    assert (data["ledger"], data["paths"]) == (None, [])
    assert all(len(edge) == 2 for edge in data["edges"])


@pytest.fixture(scope="module")
def browsed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[str]]]:
    """The page in chromium, and what its console says."""
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no chromium")
    path = tmp_path_factory.mktemp("page") / "graph.html"
    looked().explainer.graph_page(path, looked().audit.ledger)
    said: list[str] = []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: said.append(request.url) if "file:" not in request.url else None,
        )
        page.goto(path.as_uri())
        yield page, said
        browser.close()


def test_in_a_browser(browsed: tuple[Any, list[str]]) -> None:
    """Loads folded; a click unfolds and folds; search reveals; colours and paths change."""
    page, said = browsed
    folded_count = page.evaluate("graph.seen")
    assert folded_count < 8
    place = page.evaluate("graph.centre('blocks')")
    page.mouse.click(place["x"], place["y"])
    assert page.evaluate("graph.seen") > folded_count
    place = page.evaluate("graph.centre('blocks')")
    page.mouse.click(place["x"], place["y"])
    assert page.evaluate("graph.seen") == folded_count

    page.fill("#search", "attention(weights blocks.1")
    assert page.text_content("#found") == "1 found"
    page.press("#search", "Enter")
    panel = page.text_content("#panel")
    for part in (
        "Attention(weights=0.5)",
        "kind=attention",
        "torch.softmax(scores, -1)",
        "softmax",
    ):
        assert part in panel
    assert page.evaluate("graph.seen") > folded_count
    page.fill("#search", "no such thing")
    assert page.text_content("#found") == "0 found"

    for colour in ("relevance", "absorbed", "rule"):
        page.select_option("#colour", colour)
    page.click("#fold")
    assert page.evaluate("graph.seen") == folded_count
    page.evaluate("choose(-1)")
    page.click("#panel ol button")
    assert page.evaluate("onPath.size") > 10
    page.evaluate("graph.unfold()")
    assert page.evaluate("graph.seen") == page.evaluate("N")
    pixels = page.evaluate(
        "[...ink.getImageData(0, 0, canvas.width, canvas.height).data].filter((v, i) => i % 4 == 0)"
        ".reduce((seen, v) => seen.add(v), new Set()).size"
    )
    assert pixels > 20, "something is drawn"
    assert said == []
