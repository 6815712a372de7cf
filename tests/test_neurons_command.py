"""The commands for statistics of a data set, with the embedded classifier."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from attnlrp_fx import LatentStatistics
from attnlrp_fx.cli import app

TEXTS = ["A gripping, funny film.", "Dull.", "It was a complete waste of time.", "Not bad!"]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})


def error_of(result: Any) -> str:
    assert (result.exit_code, result.stdout) == (1, "")
    message: str = result.stderr.strip().splitlines()[-1]
    return message.removeprefix("error: ")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps({"review": text}) + "\n\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def directory(data: Path) -> Path:
    """A finished run."""
    out = data.parent / "out"
    options = ("--out", out, "--column", "review", "--backend", "eager", "--length", 6, "--top", 2)
    result = run("neurons", "sentiment", data, *options)
    assert result.exit_code == 0, result.stderr
    assert "3 sites" not in result.stdout
    assert "4 samples" in result.stdout
    assert "capturing the model" in result.stderr
    return out


def test_what_was_collected(directory: Path) -> None:
    found = LatentStatistics.open(directory)
    assert {site.unit for site in found.values()} == {"neuron", "head"}
    (head, *_) = found.largest(1, "head")
    best = head.top["activation"][0]
    assert len(best.tokens) <= 6  # texts are cut
    assert head._spelled(best)[-1] == "[SEP]"


def test_one_unit(directory: Path, tmp_path: Path) -> None:
    listed = run("neuron", directory, "--count", 3)
    assert listed.exit_code == 0
    assert len(listed.stdout.strip().splitlines()) == 5
    html, numbers = tmp_path / "n.html", tmp_path / "n.json"
    pattern = "*layer.2.intermediate*"
    shown = run("neuron", directory, pattern, 17, "--html", html, "--json", numbers)
    assert shown.exit_code == 0, shown.stderr
    assert "neuron 17 of bert.encoder.layer.2.intermediate" in shown.stdout
    assert "highest activation, 1: sample" in shown.stdout
    assert html.read_text().startswith("<!doctype html>")
    assert json.loads(numbers.read_text())["index"] == 17


def test_errors(directory: Path, data: Path, tmp_path: Path) -> None:
    options = ("--out", directory, "--backend", "eager")
    assert "there is no 'nothing.txt'" in error_of(run("neurons", "x", "nothing.txt", *options))
    message = error_of(run("neurons", "sentiment", data, *options))
    assert f"line 1 of '{data}' has no text 'text'; it has: review" in message
    torn = tmp_path / "torn.jsonl"
    torn.write_text('"one"\n{"text": \n')
    assert f"line 2 of '{torn}' is no JSON" in error_of(run("neurons", "sentiment", torn, *options))
    (tmp_path / "empty.txt").write_text("\n \n")
    message = error_of(run("neurons", "sentiment", tmp_path / "empty.txt", *options))
    assert "holds no texts" in message
    assert "no run was made there" in error_of(run("neuron", tmp_path))
    assert "3 sites match '*intermediate*'" in error_of(run("neuron", directory, "*intermediate*"))
    assert "has no unit 4096" in error_of(run("neuron", directory, "*layer.0.inter*", 4096))
    assert "no unit to write about" in error_of(run("neuron", directory, "--html", tmp_path / "x"))


def test_another_run_in_its_directory(directory: Path, data: Path) -> None:
    options = ("--out", directory, "--backend", "eager", "--length", 6, "--top", 3)
    message = error_of(run("neurons", "sentiment", data, "--column", "review", *options))
    assert "belongs to another run; options: " in message
