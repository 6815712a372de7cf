"""A table of the relevance of every text: right, and resumable after a kill at any point."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import example, tiny_classifier
from typer.testing import CliRunner

import attnlrp_fx
from attnlrp_fx import InputError, write_relevance
from attnlrp_fx.cli import app
from attnlrp_fx.statistics import relevance

pq = pytest.importorskip("pyarrow.parquet")

WORDS = "the film was a slow and clever but dull story with great acting".split()


def texts(count: int) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) + "." for _ in range(count)]


TEXTS = texts(21)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A classifier, and a file of it."""
    model, tokenizer = tiny_classifier()
    explainer = attnlrp_fx.compile(model, example(tokenizer), backend="eager", tokenizer=tokenizer)
    path = tmp_path_factory.mktemp("saved") / "sentiment.lrp.pt2"
    explainer.save(path)
    return explainer, path


def test_every_row_is_that_of_its_text(saved: tuple[Any, Path], tmp_path: Path) -> None:
    explainer, _ = saved
    path = tmp_path / "table.parquet"
    done = write_relevance(explainer, TEXTS, path, batch_size=4, window=2, every=0, progress=False)
    assert (done.samples, done.batches) == (21, 6)
    assert done.tokens_per_second > 0
    rows = pq.read_table(path).to_pylist()
    assert [row["index"] for row in rows] == list(range(21))
    assert [row["text"] for row in rows] == TEXTS
    assert [p.name for p in tmp_path.iterdir()] == ["table.parquet"]
    for row in rows[::5]:
        one = explainer(explainer.tokenizer(row["text"], return_tensors="pt"))
        expected = one.relevance["input_ids"][0]
        torch.testing.assert_close(torch.tensor(row["relevance"]), expected, atol=1e-6, rtol=1e-4)
        assert row["tokens"] == one.tokens["input_ids"][0]
        assert row["token_ids"] == one.inputs["input_ids"][0].tolist()
        assert (row["target"], row["target_index"]) == (one.labels[0], int(one.target_index[0]))
        assert row["value"] == pytest.approx(float(one.target_value[0]), abs=1e-5)
        assert row["absorbed"] == pytest.approx(row["value"] - sum(row["relevance"]), abs=1e-5)


def test_errors_lose_nothing(saved: tuple[Any, Path], tmp_path: Path) -> None:
    explainer, _ = saved
    path, options = tmp_path / "t.parquet", {"batch_size": 2, "window": 1, "progress": False}
    wrong = [*TEXTS[:5], " "]
    with pytest.raises(InputError, match="sample 5"):
        write_relevance(explainer, wrong, path, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet.parts"]
    assert any(
        p.name.startswith("part-00000000-") for p in (tmp_path / "t.parquet.parts").iterdir()
    )
    with pytest.raises(InputError, match="belongs to another run"):
        write_relevance(explainer, TEXTS[:5], path, **options)
    with pytest.raises(InputError, match="no samples"):
        write_relevance(explainer, [], tmp_path / "empty.parquet", **options)
    whole = tmp_path / "whole.parquet"
    write_relevance(explainer, TEXTS[:5], whole, **options)
    assert write_relevance(explainer, TEXTS[:5], whole, **options).samples == 0  # done before
    with pytest.raises(InputError, match=r"table of another run[\s\S]*samples: 5, not 21"):
        write_relevance(explainer, TEXTS, whole, **options)
    whole.write_text("something else")
    with pytest.raises(InputError, match="no table of relevance"):
        write_relevance(explainer, TEXTS, whole, **options)


RUN = """
import sys
import attnlrp_fx.statistics.relevance as relevance
from attnlrp_fx.cli import app
written = relevance.write_relevance
def often(*args, **options):
    return written(*args, **{**options, "every": 0.0, "window": 1})
relevance.write_relevance = often
print("ready", flush=True)
app(sys.argv[1:])
"""


def test_killed(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """A process is killed: the next goes on, and the table is that of a run without kills."""
    explainer, file = saved
    data, table = tmp_path / "texts.jsonl", tmp_path / "table.parquet"
    many = texts(100)
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in many))
    command = [sys.executable, "-c", RUN, "explain", str(file), "--input", str(data)]
    command += ["--output", str(table), "--batch-size", "2", "--backend", "eager", "-q"]
    parts = tmp_path / "table.parquet.parts"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wanted = random.Random().randint(1, 30)
    while process.poll() is None and _done(parts) < wanted:
        time.sleep(0.002)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not table.exists()
    assert 0 < _done(parts) < 50
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "100 texts" in done.stdout
    assert "tokens" in done.stdout
    whole = tmp_path / "whole.parquet"
    write_relevance(explainer, many, whole, batch_size=2, window=1, progress=False)
    assert pq.read_table(table).to_pylist() == pq.read_table(whole).to_pylist()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "table.parquet",
        "texts.jsonl",
        "whole.parquet",
    ]


def test_stopped_anywhere(
    saved: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was being done when it stopped: nothing is lost, nothing is there twice."""
    explainer, _ = saved
    options = {"batch_size": 2, "window": 1, "every": 0, "progress": False}
    write_relevance(explainer, TEXTS, tmp_path / "whole.parquet", **options)
    expected = pq.read_table(tmp_path / "whole.parquet").to_pylist()
    places = ("explained_rows", "_table", "write_atomically", "_put_together", "writing_atomically")
    for number in range(12):
        draw, table = random.Random(number), tmp_path / f"{number}.parquet"
        stops = 0
        while not table.exists():
            assert stops < 40
            with monkeypatch.context() as patch:
                place, after = draw.choice(places), draw.randint(0, 9)
                patch.setattr(relevance, place, _stopping(getattr(relevance, place), after))
                try:
                    write_relevance(explainer, TEXTS, table, **options)
                except KeyboardInterrupt:
                    stops += 1
        assert pq.read_table(table).to_pylist() == expected
        write_relevance(explainer, TEXTS, table, **options)
        assert not (tmp_path / f"{number}.parquet.parts").exists()


def _stopping(function: Any, after: int) -> Any:
    """A function that is interrupted at one of its calls, before it has done anything."""
    calls = iter(range(after + 1))

    def stopping(*args: Any, **options: Any) -> Any:
        if next(calls, None) == after:
            raise KeyboardInterrupt
        return function(*args, **options)

    return stopping


def _done(parts: Path) -> int:
    """How many windows are done."""
    ends = [int(path.stem.rpartition("-")[2]) for path in parts.glob("part-*.parquet")]
    return max(ends, default=0)


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "160"})


def error_of(result: Any) -> str:
    assert (result.exit_code, result.stdout) == (1, "")
    message: str = result.stderr.strip().splitlines()[-1]
    return message.removeprefix("error: ")


def test_the_commands(saved: tuple[Any, Path], tmp_path: Path) -> None:
    """A model compiled to a file, a text and a data set explained with it."""
    model, file = tmp_path / "model", tmp_path / "model.lrp.pt2"
    for part in tiny_classifier():
        part.save_pretrained(model)
    compiled = run("compile", model, "-o", file, "--target", "positive")
    assert compiled.exit_code == 0, compiled.stderr
    assert "model.lrp.pt2: 1.2 MB" in compiled.stdout
    shown = run("explain", "--model", file, TEXTS[0], "--target", "negative", "--audit")
    assert shown.exit_code == 0, shown.stderr
    assert "negative" in shown.stdout
    assert "softmax" in shown.stdout
    data, table = tmp_path / "texts.txt", tmp_path / "table.parquet"
    data.write_text("\n".join(TEXTS))
    options = ("--input", data, "--backend", "eager")
    done = run("explain", file, *options, "--output", table, "--length", 5)
    assert done.exit_code == 0, done.stderr
    assert "21 texts; 21 samples in" in done.stdout
    rows = pq.read_table(table).to_pylist()
    assert {row["target"] for row in rows} == {"positive"}
    assert max(len(row["tokens"]) for row in rows) == 5
    assert "done before" in run("explain", file, *options, "--output", table, "--length", 5).stdout
    other = tmp_path / "model.parquet"
    done = run("explain", model, *options, "--output", other, "--target", 1, "--length", 5)
    assert done.exit_code == 0, done.stderr
    again = pq.read_table(other).to_pylist()
    assert [row["tokens"] for row in again] == [row["tokens"] for row in rows]
    assert [row["value"] for row in again] == pytest.approx(
        [row["value"] for row in rows], abs=1e-5
    )


def test_wrong_usage(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, file = saved
    data = tmp_path / "texts.txt"
    data.write_text("one\n")
    assert "--input needs a place" in error_of(run("explain", file, "--input", data))
    assert "belong together" in error_of(run("explain", file, "--output", "t.parquet"))
    assert run("explain").exit_code == 2
    assert "end it with .lrp.pt2" in error_of(run("compile", "x", "-o", tmp_path / "x.bin"))
    shown = run("explain", "--model", file, "one", "--target", "lukewarm")
    assert "no label 'lukewarm'" in error_of(shown)
    assert "leave the other options out" in error_of(
        run("explain", "--model", file, "one", "--position", 0)
    )
    assert "there is no file" in error_of(run("explain", "--model", tmp_path / "n.pt2", "one"))
