"""Statistics of latent units: the right numbers, whatever happens to the processes on the way."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import Tensor, distributed, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, InputError, LatentStatistics, latent_statistics
from attnlrp_fx.statistics import store
from attnlrp_fx.statistics.collect import finish, identity
from attnlrp_fx.statistics.shards import PartialStatistics, merge_statistics
from attnlrp_fx.statistics.tables import KINDS, Statistics


@pytest.fixture(autouse=True)
def same_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` leaves another object in the place of `os.environ`, which rich does not see."""
    monkeypatch.setattr(os, "environ", os.environ)


WORDS = "the a film plot is was very not good bad dull funny long short and but so far too".split()
TOP, CONTEXT = 3, 4
processes = multiprocessing.get_context("fork")


class Words:
    """A tokenizer of a few words."""

    pad_token_id = 0

    def __call__(self, texts: Any, **_: Any) -> dict[str, Any]:
        ids = [[1 + WORDS.index(word) for word in text.split()] for text in texts]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return ["<pad>" if i == 0 else WORDS[i - 1] for i in ids]


class Reader(nn.Module):
    """Word by word, then the mean: a feed-forward block and a gated one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(WORDS) + 1, 8)
        self.up, self.act, self.down = nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(batch, length) twice → (batch, 2)."""
        x = self.embed(input_ids)
        x = x + self.down(self.act(self.up(x)))
        kept = attention_mask[..., None].to(x.dtype)
        return self.head((x * kept).sum(1) / kept.sum(1))  # type: ignore[no-any-return]


def make_explainer() -> ExplainableGraphModule:
    torch.manual_seed(0)
    model = Reader().eval()
    example = {"input_ids": torch.ones(3, 5, dtype=torch.int64)}
    example["attention_mask"] = torch.ones_like(example["input_ids"])
    return attnlrp_fx.compile(
        model, example, backend="eager", tokenizer=Words(), latent=["mlp.neurons"]
    )


@pytest.fixture(scope="module")
def explainer() -> ExplainableGraphModule:
    return make_explainer()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    drawn = random.Random(0)
    return [" ".join(drawn.choices(WORDS, k=drawn.randint(1, 9))) for _ in range(60)]


def collect(
    explainer: ExplainableGraphModule, texts: Any, directory: Path, **options: Any
) -> LatentStatistics:
    own = {"batch_size": 3, "window": 2, "top": TOP, "context": CONTEXT, "progress": False}
    return latent_statistics(explainer, texts, directory, **{**own, **options})


@pytest.fixture(scope="module")
def whole(
    explainer: ExplainableGraphModule,
    texts: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The directory of a run that nothing happened to."""
    directory: Path = tmp_path_factory.mktemp("whole")
    collect(explainer, texts, directory)
    return directory


def test_numbers_and_rankings(
    explainer: ExplainableGraphModule, texts: list[str], whole: Path
) -> None:
    """Against every sample by itself, unpadded."""
    (site,) = LatentStatistics.open(whole).values()
    tables: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for text in texts:
        ids = torch.tensor(Words()([text])["input_ids"])
        explanation = explainer(input_ids=ids, attention_mask=torch.ones_like(ids))
        (latent,) = explanation.latent.values()
        for kind in KINDS:
            tables[kind].append(getattr(latent, f"unit_{kind}")[0].double())
    for kind in KINDS:
        every = torch.cat(tables[kind])
        assert int(site.count) == len(every)
        assert_close(site.mean(kind), every.mean(0), rtol=1e-5, atol=1e-7)
        assert_close(site.mean_absolute(kind), every.abs().mean(0), rtol=1e-5, atol=1e-7)
        assert_close(site.maxima[kind], every.amax(0), rtol=1e-5, atol=1e-7)
        by_sample = [t.amax(0) if kind == "activation" else t.sum(0) for t in tables[kind]]
        scores = torch.stack(by_sample)
        for unit in range(len(site)):
            found = site.rankings[kind].of_unit(unit)
            best = scores[:, unit].sort(descending=True, stable=True)
            assert_close(torch.tensor([t.score for t in found]).double(), best.values[:TOP])
            for top in found:
                own = tables[kind][top.sample][:, unit]
                peak = int(own.abs().argmax())
                end = top.start + len(top.values)
                assert top.start <= peak < end
                assert len(top.values) == min(CONTEXT, len(own))
                assert_close(torch.tensor(top.values).double(), own[top.start : end])
                ids = Words()([texts[top.sample]])["input_ids"][0]
                assert list(top.tokens) == ids[top.start : end]


def test_tables_and_pictures(whole: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    found = LatentStatistics.open(whole)
    assert found.samples == 60
    units = parquet.read_table(whole / store.UNITS).to_pandas()
    assert units.equals(found.to_pandas())
    assert len(units) == 6
    assert units["relevance_mean"].tolist() == next(iter(found.values())).mean("relevance").tolist()
    top = parquet.read_table(whole / store.TOP).to_pandas()
    assert len(top) == 6 * TOP * len(KINDS)
    (first, *_) = found.largest(2)
    assert first.mean_absolute["relevance"] == units["relevance_mean_absolute"].max()
    line = top[(top["index"] == first.index) & (top["kind"] == "relevance") & (top["rank"] == 0)]
    best = first.top["relevance"][0]
    assert line["tokens"].item().tolist() == first._spelled(best)
    console = Console(width=100, record=True, file=StringIO())
    console.print(first)
    said = console.export_text()
    assert f"neuron {first.index} of {first.site}" in said
    assert f"most relevance, 1: sample {best.sample}" in said
    page = first.to_html(tmp_path / "neuron.html")
    assert page == (tmp_path / "neuron.html").read_text()
    assert all(f">{word}<" in page for word in first._spelled(best))
    assert json.loads(json.dumps(first.to_dict()))["top"]["relevance"][0]["sample"] == best.sample


def run(body: Callable[[], Any]) -> Any:
    """A process of its own, with all that is compiled here."""
    process = processes.Process(target=body)
    process.start()
    return process


def result(directory: Path) -> bytes:
    return (directory / store.RESULT).read_bytes()


def test_killed_at_random(
    explainer: ExplainableGraphModule, texts: list[str], whole: Path, tmp_path: Path
) -> None:
    """Again and again, at any time: in the end every bit is that of the run that was not."""
    drawn, killed = random.Random(1), 0

    class Slow(list[str]):
        def __getitem__(self, index: Any) -> Any:
            time.sleep(0.01)
            return super().__getitem__(index)

    while not (tmp_path / "run" / store.RESULT).exists():
        process = run(lambda: collect(explainer, Slow(texts), tmp_path / "run", every=0))
        process.join(drawn.uniform(0.01, 0.12) * (1 + killed / 5))
        if process.is_alive():
            process.kill()
            killed += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    assert killed >= 3
    collect(explainer, texts, tmp_path / "run")
    assert result(tmp_path / "run") == result(whole)
    assert not list((tmp_path / "run").glob("part-*"))


@pytest.mark.parametrize("place", ["before", "after"])
def test_killed_while_a_file_is_written(
    explainer: ExplainableGraphModule, texts: list[str], whole: Path, tmp_path: Path, place: str
) -> None:
    """At every file: before it takes its place, and after."""
    replace = os.replace

    def body(fatal: int) -> None:
        count = 0

        def fatally(source: Any, goal: Any) -> None:
            nonlocal count
            count += 1
            if place == "after":
                replace(source, goal)
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            if place == "before":
                replace(source, goal)

        os.replace = fatally  # type: ignore[assignment]
        collect(explainer, texts, tmp_path / "run", every=0)

    codes = []
    for fatal in (1, 2, 3, 2, 1, 5, 2, 2, 1, 1, 1, 99):
        process = run(lambda fatal=fatal: body(fatal))  # type: ignore[misc]
        process.join()
        codes.append(process.exitcode)
    assert codes.count(-signal.SIGKILL) >= 8
    assert codes[-1] == 0
    assert not list((tmp_path / "run").glob("part-*"))
    assert result(tmp_path / "run") == result(whole)


def same(found: LatentStatistics, whole: Path) -> None:
    """Counts, maxima and rankings exactly, sums up to the order of additions."""
    expected = LatentStatistics.open(whole)
    assert found.samples == expected.samples
    assert list(found) == list(expected)
    for name, site in expected.items():
        ours = dict(found[name].tensors())
        for part, value in site.tensors():
            exact = not part.endswith((".sum", ".absolute"))
            most = 0.0 if exact else 1e-12
            assert_close(ours[part], value, rtol=most, atol=most, equal_nan=True)


def test_two_processes(
    explainer: ExplainableGraphModule, texts: list[str], whole: Path, tmp_path: Path
) -> None:
    """torch.distributed: each takes its windows; both are killed first, and go on."""

    def body(rank: int, attempt: int) -> None:
        class Fatal(list[str]):
            def __getitem__(self, index: Any) -> Any:
                if attempt == 0 and rank == 1 and index > 40:
                    os.kill(os.getpid(), signal.SIGKILL)
                return super().__getitem__(index)

        meeting = f"file://{tmp_path}/meeting-{attempt}"
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        same(collect(explainer, Fatal(texts), tmp_path / "run", every=0), whole)
        distributed.destroy_process_group()

    for attempt, codes in enumerate([[-signal.SIGKILL, -signal.SIGKILL], [0, 0]]):
        both = [run(lambda r=r, a=attempt: body(r, a)) for r in range(2)]  # type: ignore[misc]
        both[1].join()
        if attempt == 0:
            both[0].kill()
        both[0].join()
        assert [process.exitcode for process in both] == codes
        assert (tmp_path / "run" / store.RESULT).exists() == (attempt == 1)
    same(LatentStatistics.open(tmp_path / "run"), whole)
    with pytest.raises(InputError, match="processes: 2, not 1"):
        collect(explainer, texts, tmp_path / "run")


def test_a_stream_gives_the_same(
    explainer: ExplainableGraphModule, texts: list[str], whole: Path, tmp_path: Path
) -> None:
    """What can only be gone through; left in the middle, it is gone through again from there."""

    class Stream:
        def __init__(self, breaks: int) -> None:
            self.breaks = breaks

        def __iter__(self) -> Iterator[str]:
            for i, text in enumerate(texts):
                if i == self.breaks:
                    raise ConnectionError("the line is dead")
                yield text

    with pytest.raises(ConnectionError):
        collect(explainer, Stream(40), tmp_path / "run", every=0)
    with pytest.raises(InputError, match="is not finished"):
        LatentStatistics.open(tmp_path / "run")
    same(collect(explainer, Stream(99), tmp_path / "run"), whole)


def test_a_directory_of_another_run(
    explainer: ExplainableGraphModule, texts: list[str], whole: Path, tmp_path: Path
) -> None:
    collect(explainer, texts, whole)  # the same: it is done
    with pytest.raises(InputError, match=r"data: \w+, not"):
        collect(explainer, texts[1:], whole)
    with pytest.raises(InputError, match="options: "):
        collect(explainer, texts, whole, top=2)
    with pytest.raises(InputError, match="target: "):
        collect(explainer, texts, whole, target=1)
    one, other = (identity(explainer, texts, mock.Mock(total=1), t, None) for t in (0, 1))
    assert one["target"] != other["target"]
    with pytest.raises(InputError, match="composite: "):
        collect(explainer.with_composite("gradient"), texts, whole)
    with pytest.raises(InputError, match="name: unknown, not x"):
        collect(explainer, texts, whole, about={"name": "x"})
    weight = explainer.model.get_parameter("head.weight")
    with torch.no_grad():
        weight.mul_(2)
        try:
            with pytest.raises(InputError, match="model: "):
                collect(explainer, texts, whole)
        finally:
            weight.div_(2)
    (tmp_path / "thesis.doc").write_text("all my work")
    with pytest.raises(InputError, match=r"is not empty\n.*it holds thesis\.doc"):
        collect(explainer, texts, tmp_path)
    with pytest.raises(InputError, match="no run was made there"):
        LatentStatistics.open(tmp_path)
    with pytest.raises(InputError, match="has no samples"):
        collect(explainer, [], tmp_path / "nothing")
    with pytest.raises(InputError, match="has no unit 6"):
        LatentStatistics.open(whole).unit(next(iter(LatentStatistics.open(whole))), 6)


def test_without_latent_values(tmp_path: Path) -> None:
    plain = attnlrp_fx.compile(nn.Linear(3, 2).eval(), torch.ones(2, 3), backend="eager")
    with pytest.raises(InputError, match="no latent values"):
        latent_statistics(plain, [torch.ones(3)], tmp_path, progress=False)


def test_blocks_of_a_table(
    explainer: ExplainableGraphModule, texts: list[str], whole: Path, tmp_path: Path
) -> None:
    """As Ray Data calls it: columns, with numbers among them, in any order."""
    block = PartialStatistics(lambda: explainer, top=TOP, context=CONTEXT, batch_size=3, window=2)
    numbers = list(range(60))
    parts = [
        block({"text": [texts[i] for i in some], "number": some})["statistics"][0]
        for some in (numbers[30:54], numbers[:30], numbers[54:])
    ]
    same(merge_statistics(parts, tmp_path / "run", Words()), whole)
    with pytest.raises(InputError, match="no column 'number'"):
        block({"text": texts})
    with pytest.raises(InputError, match="no statistics to merge"):
        merge_statistics([], tmp_path / "other")


def test_hugging_face_datasets(texts: list[str], whole: Path, tmp_path: Path) -> None:
    """Two processes of `datasets.map`."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": texts})
    rows = table.map(
        PartialStatistics(make_explainer, top=TOP, context=CONTEXT, batch_size=3, window=2),
        batched=True,
        batch_size=30,
        with_indices=True,
        num_proc=2,
        remove_columns=["text"],
        load_from_cache_file=False,
    )
    assert len(rows) == 2
    same(merge_statistics((row["statistics"] for row in rows), tmp_path / "run", Words()), whole)


def test_ties_go_to_the_first_sample() -> None:
    """In whatever order samples come, and however they are parted."""
    from attnlrp_fx.statistics.tables import Ranking, Rows

    scores = torch.tensor([[1.0], [2.0], [2.0], [1.0], [2.0], [0.0]]).double()
    orders = ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 4, 5, 2, 1])
    for order in orders:
        ranking = Ranking.empty(1, 4, 1)
        for i in order:
            rows = Rows(torch.tensor([i]), None, None)
            ranking.update(scores[i : i + 1], torch.ones(1, 1, 1), rows)
        assert ranking.numbers.tolist() == [[1, 2, 4, 0]]
    with pytest.raises(InputError, match="top is 0"):
        Statistics(top=0)
    with pytest.raises(InputError, match="no samples"):
        finish(Path("nowhere"), Statistics())
