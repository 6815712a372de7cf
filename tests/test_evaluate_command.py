"""`attnlrp-fx evaluate` on the embedded classifier."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnlrp_fx.cli import app

EMBEDDED = Path(__file__).parent.parent / "attnlrp_fx" / "embedded" / "sentiment"
TEXTS = ["A gripping, beautiful film.", "It was a dull and tedious mess.", "Wonderful acting."]
EVIDENCE = [[12, 21], [9, 30], [0, 9]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = zip(TEXTS, EVIDENCE, strict=True)
    path.write_text("\n".join(json.dumps({"text": t, "evidence": e}) for t, e in rows))
    return path


def run(*arguments: str) -> str:
    """What the command prints, in one piece; exit code 0."""
    result = CliRunner().invoke(app, ["evaluate", *arguments, "--quiet"], env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    return result.output


def test_methods_are_ranked(data: Path, tmp_path: Path):
    """A table with each method, what it takes, and the evidence of the file; numbers as JSON."""
    numbers = tmp_path / "numbers.json"
    shown = run(
        str(EMBEDDED), str(data), "--methods", "attnlrp,random,grad-cam", "--json", str(numbers)
    )
    found = json.loads(numbers.read_text())
    ours, random = found["methods"]["attnlrp"], found["methods"]["random"]
    assert ours["samples"] == 3
    assert ours["ΔA^F"]["mean"] > random["ΔA^F"]["mean"]
    assert ours["top-1"]["mean"] == 1
    assert "no images" in found["left_out"]["grad-cam"]
    assert "attnlrp" in shown
    assert "top-1" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "attnlrp,shap"], "there is no method 'shap'"),
        (["--replace", "noise"], "replace is 'noise'"),
        (["--replace", "mask"], ""),
        (["--samples", "0"], "--samples is 0"),
        (["--column", "body"], "has no text 'body'"),
    ],
)
def test_errors_are_one_line(data: Path, arguments: list[str], message: str):
    command = ["evaluate", str(EMBEDDED), str(data), "--methods", "random", *arguments, "--quiet"]
    result = CliRunner().invoke(app, command)
    if not message:  # a mask token is there
        assert result.exit_code == 0, result.output
        return
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_spans_are_checked(tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "Short.", "evidence": [3, 99]}\n')
    result = CliRunner().invoke(app, ["evaluate", str(EMBEDDED), str(path), "--quiet"])
    assert "has no span of its text: [3, 99]" in result.stderr
    path.write_text('{"text": "Short.", "evidence": [0, 5]}\n{"text": "Short."}\n')
    result = CliRunner().invoke(app, ["evaluate", str(EMBEDDED), str(path), "--quiet"])
    assert "line 2 has no 'evidence', and others have" in result.stderr
