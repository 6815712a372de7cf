"""`attnlrp-fx inspect`: the check and its exit code, and every file that it writes."""

from pathlib import Path
from unittest import mock

from typer.testing import CliRunner

from attnlrp_fx.cli import app
from attnlrp_fx.rules import composites
from attnlrp_fx.rules.composites import Composite

RUNNER = CliRunner()


def test_every_file(tmp_path: Path) -> None:
    names = ("graph.html", "graph.dot", "graph.json", "flow.png")
    html, dot, explorer, flow = (tmp_path / name for name in names)
    options = ["--html", html, "--dot", dot, "--model-explorer", explorer, "--flow", flow]
    shown = ["--check", "--audit", "--trace", "gelu", "--show", "rewritten", "--diff", "-q"]
    result = RUNNER.invoke(app, ["inspect", *map(str, options), *shown])
    assert result.exit_code == 0, result.output
    for path in (html, dot, explorer, flow, tmp_path / "graph.rule.json"):
        assert path.stat().st_size > 1000
    for part in (
        "all 78 ops on the path have a rule",
        "Absorbed by cause",
        "R_in = R_out",
        "def rewritten(",
    ):
        assert part in result.output


def test_an_op_without_a_rule_is_exit_code_1() -> None:
    entries = composites.COMPOSITES["attnlrp"].entries
    partial = Composite("partial", tuple(e for e in entries if e[0].kind != "activation"))
    with mock.patch.dict(composites.COMPOSITES, {"partial": partial}):  # type: ignore[arg-type]
        result = RUNNER.invoke(app, ["inspect", "--composite", "partial", "-q"])
    assert result.exit_code == 1
    assert "4 of 78 ops on the path have no rule" in result.output


def test_wrong_usage_is_one_line() -> None:
    for options in (["--flow", "flow.gif"], ["--html", "/nowhere/graph.html"]):
        result = RUNNER.invoke(app, ["inspect", *options])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
