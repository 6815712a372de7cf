"""The relevance of every text of a data set, as one Parquet file, resumable.

While a run lasts, what is done lies beside the file, in a directory of the same name and ".parts":

    run.json                            whose run it is: model, rules, data, options
    part-00000000-00000012.parquet      the rows of the first twelve windows of the data set

A part is written whole or not at all, and its name says what it holds. So a run that was killed
goes on behind the last part, with the same windows; in the end the parts are put together, again
whole or not at all.
"""

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from attnlrp_fx.errors import InputError
from attnlrp_fx.files import write_atomically, writing_atomically
from attnlrp_fx.runtime.batching import Batch, Targets
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.loader import Bar, Loaded, load_batches
from attnlrp_fx.runtime.mapping import Throughput, explained_rows
from attnlrp_fx.statistics import store
from attnlrp_fx.statistics.collect import identity
from attnlrp_fx.targets import TargetLike

if TYPE_CHECKING:
    import pyarrow as pa

_PART = re.compile(r"part-(\d{8})-(\d{8})\.parquet")


def write_relevance(
    explainer: ExplainableGraphModule,
    dataset: Any,
    path: str | Path,
    *,
    target: TargetLike = None,
    targets: Targets | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    window: int = 4,
    workers: int = 0,
    pad: bool = True,
    every: float = 30.0,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> Throughput:
    """Explain every sample of a data set, and write a table with a row a sample.

    Columns: `index` (int64, the sample's number), `text` (null if samples are no texts), `tokens`
    (list of texts; null without a tokenizer), `token_ids` (list of int64), `relevance` (list of
    float32), `target` (what was explained, as text), `target_index` (int64), `value` (float64, the
    explained value) and `absorbed` (float64, value − Σ relevance: what biases, softmax and the like
    kept). Of a model with several explained inputs, `token_ids` and `relevance` are of the first,
    and those of the others have the input's name behind them, as `relevance:decoder_input_ids`.

    Killed at any point and called again with the same arguments, it goes on where it was; called
    again when it is done, it does nothing.

    Args:
        explainer: compiled with a tokenizer, if samples are texts.
        dataset: as in `map`; the same samples in the same order whenever it is gone through.
        path: the file; beside it, a directory of parts while the run lasts.
        target, targets, batch_size, max_tokens, workers, pad: as in `map`.
        window: how many full batches are loaded, and sorted by length, together.
        every: how many seconds may be lost; a part is written that often.
        about: more of what tells this run from others, as the name of the data.
        progress: whether a progress bar is shown, on a terminal's standard error.

    Returns:
        What this call explained, and how fast.

    Raises:
        InputError: an option or a sample does not fit, the path is no place for a file, or there is
            the file, or the directory, of another run.
        TargetError: a sample's outputs do not have the target.
        MissingExtraError: pyarrow is not installed.
        OSError: the file cannot be written.
    """
    store.need_pyarrow()
    goal = Path(path)
    if goal.is_dir() or not goal.resolve().parent.is_dir():
        raise InputError(
            f"cannot write '{path}'", remedy="name a file in a directory that is there"
        )
    loaded = load_batches(
        explainer,
        dataset,
        batch_size=batch_size,
        max_tokens=max_tokens,
        target=target,
        targets=targets,
        window=window,
        workers=workers,
        pad=pad,
    )
    run = {
        **identity(explainer, dataset, loaded, target, targets),
        "options": [loaded.batcher.rows, max_tokens, window, pad],
        **(about or {}),
    }
    parts = goal.with_name(f"{goal.name}.parts")
    if goal.exists():
        _check_done(goal, run)
        shutil.rmtree(parts, ignore_errors=True)
        return Throughput()
    store.claim(parts, run)
    writing = _Writing(explainer, loaded, parts, every)
    with Bar(loaded.total, progress, writing.rows) as bar:
        writing.go_on(_samples(dataset), bar)
    _put_together(parts, goal, run)
    return writing.throughput


class _Writing:
    """Writes the parts of a run, from where it was left."""

    def __init__(
        self, explainer: ExplainableGraphModule, loaded: Loaded, parts: Path, every: float
    ) -> None:
        self._explainer, self._loaded, self._parts, self._every = explainer, loaded, parts, every
        self._done, self.rows = _progress_of(parts)
        self._tables: list[Any] = []
        self._last = self._start = time.monotonic()
        self.throughput = Throughput()

    def go_on(self, samples: Iterator[Any], bar: Bar) -> None:
        """Explain the rest; whole windows are kept, whatever happens in the next."""
        samples = islice(samples, self.rows, None)
        try:
            for window in self._loaded.windows(self._done):
                found: dict[int, Explanation] = {}
                for batch in window:
                    rows = explained_rows(self._explainer, self._loaded, batch)
                    found |= zip(batch.numbers, rows, strict=True)
                    self._count(batch)
                    bar.advance(len(batch.numbers), batch.tokens)
                numbers = sorted(found)
                texts = list(islice(samples, len(numbers)))
                self._tables.append(_table([found[n] for n in numbers], numbers, texts))
                if time.monotonic() - self._last >= self._every:
                    self._write()
        finally:
            self._write()

    def _count(self, batch: Batch) -> None:
        was = self.throughput
        self.throughput = Throughput(
            was.samples + len(batch.numbers),
            was.tokens + batch.tokens,
            was.padded_tokens + batch.padded_tokens,
            was.batches + 1,
            time.monotonic() - self._start,
        )

    def _write(self) -> None:
        if self._tables:
            end = self._done + len(self._tables)
            _write_part(self._parts, self._done, end, self._tables)
            self._done, self._tables, self._last = end, [], time.monotonic()


def _samples(dataset: Any) -> Iterator[Any]:
    """The samples in order, once more."""
    if isinstance(dataset, Dataset) and hasattr(dataset, "__len__"):
        return (dataset[i] for i in range(len(dataset)))
    return iter(dataset)


def _check_done(goal: Path, run: Mapping[str, Any]) -> None:
    """Raise InputError if a file is not the result of a run."""
    parquet = store.need_pyarrow()
    try:
        metadata = parquet.read_schema(goal).metadata or {}
        was = json.loads(metadata[b"attnlrp_fx"])
    except Exception as error:
        raise InputError(
            f"'{goal}' is there already, and no table of relevance", remedy="name another file"
        ) from error
    if was != json.loads(json.dumps(run)):
        raise InputError(
            f"'{goal}' is there already, the table of another run",
            why=", ".join(f"{k}: {was.get(k)}, not {run[k]}" for k in run if was.get(k) != run[k]),
            remedy="name another file",
        )


def _progress_of(parts: Path) -> tuple[int, int]:
    """How many windows, and how many rows, are done."""
    parquet = store.need_pyarrow()
    done = rows = 0
    for first, last, path in _parts(parts):
        if first != done:
            raise InputError(
                f"directory '{parts}' lacks a part", remedy="remove it, to begin again"
            )
        done, rows = last, rows + parquet.read_metadata(path).num_rows
    return done, rows


def _parts(directory: Path) -> list[tuple[int, int, Path]]:
    found = ((_PART.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted((int(m[1]), int(m[2]), path) for m, path in found if m is not None)


def _write_part(directory: Path, first: int, last: int, tables: Sequence[Any]) -> None:
    import pyarrow as pa

    content = BytesIO()
    store.need_pyarrow().write_table(pa.concat_tables(tables), content)
    write_atomically(directory / f"part-{first:08}-{last:08}.parquet", content.getvalue())


def _put_together(parts: Path, goal: Path, run: Mapping[str, Any]) -> None:
    """One file of all parts, in order."""
    parquet = store.need_pyarrow()
    paths = [path for _, _, path in _parts(parts)]
    if not paths:
        raise InputError("there is nothing to write", why="the data set has no samples")
    schema = parquet.read_schema(paths[0]).with_metadata({"attnlrp_fx": json.dumps(run)})
    with writing_atomically(goal) as file, parquet.ParquetWriter(file, schema) as writer:
        for path in paths:
            writer.write_table(parquet.read_table(path).cast(schema))
    shutil.rmtree(parts)


def _table(
    rows: Sequence[Explanation], numbers: Sequence[int], samples: Sequence[Any]
) -> "pa.Table":
    """The rows of some explanations, each of one sample."""
    import pyarrow as pa

    names = list(rows[0].relevance)
    values = [float(row.target_value[0]) for row in rows]
    sums = [sum(float(r.double().sum()) for r in row.relevance.values()) for row in rows]
    columns: dict[str, Any] = {
        "index": pa.array(numbers, pa.int64()),
        "text": pa.array([s if isinstance(s, str) else None for s in samples], pa.string()),
    }
    for name in names:
        suffix = "" if name == names[0] else f":{name}"
        columns |= dict(_of_input(rows, name, suffix))
    labels = [None if row.labels is None else row.labels[0] for row in rows]
    indices = [None if row.target_index is None else int(row.target_index[0]) for row in rows]
    return pa.table(
        columns
        | {
            "target": pa.array(labels, pa.string()),
            "target_index": pa.array(indices, pa.int64()),
            "value": pa.array(values, pa.float64()),
            "absorbed": pa.array(
                [value - sum_ for value, sum_ in zip(values, sums, strict=True)], pa.float64()
            ),
        }
    )


def _of_input(rows: Sequence[Explanation], name: str, suffix: str) -> Iterator[tuple[str, Any]]:
    """The columns of one input: tokens, ids and relevance."""
    import pyarrow as pa

    tokens = [None if row.tokens is None else row.tokens.get(name, [None])[0] for row in rows]
    is_ids = not rows[0].inputs[name].is_floating_point()
    ids = [row.inputs[name].flatten().tolist() if is_ids else None for row in rows]
    relevance = [row.relevance[name].flatten().float().numpy() for row in rows]
    yield f"tokens{suffix}", pa.array(tokens, pa.list_(pa.string()))
    yield f"token_ids{suffix}", pa.array(ids, pa.list_(pa.int64()))
    yield f"relevance{suffix}", pa.array(relevance, pa.list_(pa.float32()))
