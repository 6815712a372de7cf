"""The benchmark on a slice: a task whose model is made here, two methods, tables, resuming."""

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from attnlrp_fx.evaluate import Batch, Perturbation, Subject

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmarks_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by name, and the tests have a module `models` too."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("models", "evidence", "faithfulness", "faithfulness_tasks"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The script, with one small task, and everything that it writes in a temporary place."""
    benchmarks_first(monkeypatch)
    monkeypatch.setenv("ATTNLRP_FX_CACHE", str(tmp_path / "cache"))
    import faithfulness
    import faithfulness_tasks

    def prepare(samples: int, split: int) -> faithfulness_tasks.Prepared:
        torch.manual_seed(split)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        subject = Subject.compile(model, torch.randn(2, 6))
        known = torch.zeros(samples, 6, dtype=torch.bool)
        known[:, 2] = True
        batch = Batch({"input": torch.randn(samples, 6)}, evidence=known)
        asked = [(batch, subject.ask(batch.inputs))]
        return faithfulness_tasks.Prepared(subject, asked, Perturbation(steps=5))

    small = faithfulness_tasks.Task("small", prepare, 30, 10, 0.1)
    monkeypatch.setattr(faithfulness, "TASKS", {"small": small})
    monkeypatch.setattr(faithfulness, "RESULTS", tmp_path)
    return faithfulness


def test_a_slice(benchmark, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What was measured is kept and not measured again; what cannot be is left out with reason."""
    benchmark.main(tasks=["small"], methods=["attnlrp", "random", "rollout"])
    text = (tmp_path / "faithfulness.md").read_text()
    assert "| attnlrp | **" in text
    assert "- small, rollout: there is no attention" in text
    numbers = json.loads((tmp_path / "faithfulness.json").read_text())["tasks"]["small"]
    assert numbers["behind attnlrp"]["random"][1] > 0
    assert numbers["methods"]["attnlrp"]["samples"] == 30
    assert (tmp_path / "faithfulness.png").stat().st_size > 10_000
    first = json.loads(benchmark.state_file().read_text())["small"]["attnlrp"]
    capsys.readouterr()
    benchmark.main(tasks=["small"], methods=["attnlrp", "ig"])
    assert "1 measurements to make" in capsys.readouterr().out
    state = json.loads(benchmark.state_file().read_text())["small"]
    assert state["attnlrp"] == first
    assert state["ig"]["samples"] == 30  # whole batches


def test_evidence_decides(monkeypatch: pytest.MonkeyPatch):
    """Every drawn answer follows from the evidence alone, and from nothing less."""
    benchmarks_first(monkeypatch)
    import evidence

    recall = evidence.TASKS["recall"].draw(50, 0)
    ids = recall.inputs["input_ids"]
    for row in range(50):
        key, value = ids[row, recall.evidence[row]].tolist()
        assert key == ids[row, -1]
        assert value == recall.answers[row]
        assert (ids[row, :-1] == key).sum() == 1
    pointer = evidence.TASKS["pointer"].draw(50, 0)
    ids = pointer.inputs["input_ids"]
    for row in range(50):
        subject, relation, answer = ids[row, pointer.evidence[row]].tolist()
        assert [subject, relation] == ids[row, -2:].tolist()
        assert answer == pointer.answers[row]
        facts = ids[row, pointer.candidates[row]].reshape(-1, 4)[:, :2]
        assert (facts == torch.tensor([subject, relation])).all(1).sum() == 1
        assert (facts == torch.tensor([subject, relation])).any(1).sum() >= 3
    needle = evidence.TASKS["needle"].draw(50, 0)
    for row in range(50):
        marker, chosen = needle.inputs["input_ids"][row, needle.evidence[row]].tolist()
        assert (needle.inputs["input_ids"][row] == marker).sum() == 1
        assert chosen - 3 == needle.answers[row]


def test_search(benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Candidates on the other split, AttnLRP among them; what is known is not measured again."""
    quiet = Console(quiet=True)
    benchmark.search(["small"], 12, ["gates constant"], quiet)
    lines = (tmp_path / "search.md").read_text().splitlines()
    assert lines[0] == "small, 12 samples"
    assert lines[2] == "| rules | ΔA^F | ahead of attnlrp, paired |"
    assert {line.split(" | ")[0] for line in lines[4:]} == {"| attnlrp", "| gates constant"}
    assert all("0.00 (0.00 to 0.00) |" in line for line in lines[4:])  # there is no gate

    def never(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(benchmark, "measure", never)
    benchmark.search(["small"], 12, ["gates constant"], quiet)
    with pytest.raises(AssertionError, match="measured again"):
        benchmark.search(["small"], 13, ["gates constant"], quiet)
    numbers = json.loads((tmp_path / "search.json").read_text())
    found = numbers["small, 12 samples"]
    assert found["attnlrp"] == found["gates constant"]
