"""Before and after, side by side."""

import re
from pathlib import Path

from inspected import looked, printed


def test_every_node_stands_on_its_side() -> None:
    explainer = looked().explainer
    found = explainer.diff()
    shown = {"placeholder", "get_attr"}
    for graph_module, lines in (
        (explainer.captured, [row.before for row in found.rows]),
        (explainer.rewritten, [row.after for row in found.rows]),
    ):
        names = [node.name for node in graph_module.graph.nodes if node.op not in shown]
        assert [line.node for line in lines if line is not None] == names


def test_what_became_of_a_line() -> None:
    rows = {(row.before or row.after).node: row for row in looked().explainer.diff().rows}  # type: ignore[union-attr]
    gone = rows["softmax"]
    assert (gone.kind, gone.after) == ("gone", None)
    assert re.fullmatch(r"raise_attention → \w+", gone.told)
    assert rows["linear"].kind == "rule"
    assert rows["linear"].after is not None
    assert rows["linear"].after.rule == "Epsilon()"


def test_printed_and_as_a_page(tmp_path: Path) -> None:
    found = looked().explainer.diff()
    text = printed(found)
    assert "rewritten, composite attnlrp" in text
    assert "raise_attention →" in text
    page = found.to_html(tmp_path / "diff.html")
    assert (tmp_path / "diff.html").read_text() == page
    assert '<tr class="gone"' in page
    assert "http" not in page
