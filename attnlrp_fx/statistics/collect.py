"""Statistics of latent units over a data set of any size, resumable, in one process or several.

A data set is read in windows of a few batches, the same ones in every run. After a window, from
time to time, a process writes a checkpoint; killed and started again, it goes on behind that
window, with the same batches in the same order, so that nothing is lost, nothing is counted twice,
and every sum has the same bits. Under `torch.distributed` every process takes every n-th window,
and the first puts all together in the end.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from attnlrp_fx.errors import InputError
from attnlrp_fx.runtime.batching import Part, Targets, Window
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.layout import Layout
from attnlrp_fx.runtime.loader import Bar, Loaded, load_batches
from attnlrp_fx.statistics import store
from attnlrp_fx.statistics.report import LatentStatistics
from attnlrp_fx.statistics.tables import Rows, Statistics, merged
from attnlrp_fx.targets import TargetLike, as_target


def latent_statistics(
    explainer: ExplainableGraphModule,
    dataset: Any,
    directory: str | Path,
    *,
    target: TargetLike = None,
    targets: Targets | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    window: int = 4,
    workers: int = 0,
    pad: bool = True,
    top: int = 5,
    context: int = 32,
    every: float = 30.0,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> LatentStatistics:
    """Collect statistics of every neuron, head and expert over a data set.

    Killed at any point and called again with the same arguments, it goes on where it was. Called
    in several processes of `torch.distributed` that share the directory, each takes a part.

    Args:
        explainer: compiled with `latent=[...]`, as ``["mlp.neurons", "attention.heads"]``.
        dataset: as in `map`; the same samples in the same order whenever it is gone through.
        directory: where everything is written; a new one, or that of the same run.
        target, targets, batch_size, max_tokens, workers, pad: as in `map`.
        window: how many full batches are loaded, sorted by length and counted together.
        top: how many samples a ranking has.
        context: how many tokens of each are kept, around the one where the unit did most.
        every: how many seconds may be lost; a checkpoint is written that often.
        about: more of what tells this run from others, as the name of the data.
        progress: whether a progress bar is shown, on a terminal's standard error.

    Returns:
        The statistics; in processes other than the first, those that it wrote.

    Raises:
        InputError: the explainer was compiled without latent values, an option or a sample does not
            fit, or the directory belongs to another run.
        TargetError: a sample's outputs do not have the target.
        MissingExtraError: pyarrow is not installed.
        OSError: the directory cannot be written.
    """
    store.need_pyarrow()
    rank, world = _process()
    goal = Path(directory)
    loaded = load_batches(
        explainer,
        dataset,
        batch_size=batch_size,
        max_tokens=max_tokens,
        target=target,
        targets=targets,
        window=window,
        workers=workers,
        pad=pad and _has_one_sequence(explainer),
        part=Part(rank, world),
    )
    run = {
        **identity(explainer, dataset, loaded, target, targets),
        "latent": list(map(str, explainer._running.rewriting.context.latent)),
        "options": [loaded.batcher.rows, max_tokens, window, pad, top, context],
        "processes": world,
        **(about or {}),
    }
    if rank == 0:
        store.claim(goal, run)
    _wait(world)
    store.claim(goal, run)
    if not (goal / store.RESULT).exists():
        _collect(explainer, loaded, goal, (rank, world), Statistics(top, context), every, progress)
        _wait(world)
        if rank == 0:
            parts = [store.load(goal / store.checkpoint_name(r, world))[0] for r in range(world)]
            finish(goal, merged(parts), explainer._running.options.labels.tokenizer)
        _wait(world)
    if rank == 0:
        for r in range(world):
            (goal / store.checkpoint_name(r, world)).unlink(missing_ok=True)
    return LatentStatistics.open(goal)


def identity(
    explainer: ExplainableGraphModule,
    dataset: Any,
    loaded: Loaded,
    target: TargetLike,
    targets: Targets | None,
) -> dict[str, Any]:
    """What tells a run over a data set from another's, as JSON."""
    wanted = explainer._running.target if target is None else as_target(target)
    function = getattr(wanted, "function", None)  # whose repr is another in every process
    told = repr(wanted) if function is None else f"{function.__module__}.{wanted}"
    return {
        "model": store.fingerprint(explainer.model),
        "composite": _digest(str(explainer.composite)),
        "target": f"{told}{'' if targets is None else ', one a sample'}",
        "data": _digest(_first_of(dataset)),
        "samples": loaded.total,
    }


def finish(directory: Path, statistics: Statistics, tokenizer: Any = None) -> None:
    """Write the results of a run.

    Raises:
        InputError: there is nothing to write.
    """
    if not statistics.sites:
        raise InputError("there are no statistics", why="the data set has no samples")
    vocabulary = _vocabulary(statistics, tokenizer)
    store.write_tables(directory, statistics, vocabulary)
    store.save(directory / store.RESULT, statistics, vocabulary=vocabulary)


def _collect(
    explainer: ExplainableGraphModule,
    loaded: Loaded,
    directory: Path,
    process: tuple[int, int],
    statistics: Statistics,
    every: float,
    progress: bool,
) -> None:
    """Go through one process's part of a data set, from where it was left."""
    rank, world = process
    path, done, total = directory / store.checkpoint_name(rank, world), 0, loaded.total
    if path.exists():
        statistics, found = store.load(path)
        done = found["windows"]
        if found["finished"]:
            return
    share = None if total is None else -(-total // world)
    last = time.monotonic()
    with Bar(share, progress and rank == 0, statistics.samples) as bar:
        for window in loaded.windows(done):
            for rows, explanation, tokens in explained(explainer, loaded, window):
                statistics.update(explanation.latent, rows)
                bar.advance(len(rows.numbers), tokens)
            done += 1
            if time.monotonic() - last >= every:
                store.save(path, statistics, windows=done, finished=False)
                last = time.monotonic()
    store.save(path, statistics, windows=done, finished=True)


def explained(
    explainer: ExplainableGraphModule, loaded: Loaded, window: Window
) -> Iterator[tuple[Rows, Explanation, int]]:
    """The batches of a window, each with its explanation and how many tokens it has.

    Raises:
        InputError: the explainer was compiled without latent values; or a sample does not fit.
        TargetError: a sample's outputs do not have the target.
    """
    for batch in window:
        explanation = loaded.run(batch, explainer)
        if not explanation.latent:
            raise InputError(
                "there are no latent values to count",
                why="the explainer was compiled without any",
                remedy='compile with latent=["mlp.neurons", "attention.heads"]',
            )
        many = len(batch.numbers)
        counted = [n for n in loaded.batcher.layout.counted if n in explanation.inputs]
        tokens = explanation.inputs[counted[0]][:many].cpu() if counted else None
        mask = (explanation.mask or {}).get(counted[0]) if counted else None
        real = None if mask is None else mask[:many].bool().cpu()
        yield Rows(torch.tensor(batch.numbers), tokens, real), explanation, batch.tokens


def _has_one_sequence(explainer: ExplainableGraphModule) -> bool:
    """Whether all is padded alike; if not, it would not be known whose padding is whose."""
    masks = {wanted.mask for wanted in Layout.of(explainer._running.convention).inputs.values()}
    return len(masks - {""}) <= 1


def _vocabulary(statistics: Statistics, tokenizer: Any) -> dict[int, str]:
    """How the tokens of top samples are spelled."""
    if tokenizer is None:
        return {}
    rankings = [r for site in statistics.sites.values() for r in site.rankings.values()]
    used = torch.unique(torch.cat([torch.unique(ranking.tokens) for ranking in rankings]))
    ids = [i for i in used.tolist() if i >= 0]
    return dict(zip(ids, map(str, tokenizer.convert_ids_to_tokens(ids)), strict=True))


def _process() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def _wait(world: int) -> None:
    """Until all processes are here."""
    if world > 1:
        distributed.barrier()


def _first_of(dataset: Any) -> str:
    """The first sample as text, where looking at it takes nothing away."""
    if isinstance(dataset, Iterator):
        return "an iterator"
    try:
        first = dataset[0] if hasattr(dataset, "__getitem__") else next(iter(dataset))
    except (IndexError, KeyError, StopIteration, NotImplementedError):
        return "empty"
    if isinstance(first, Mapping):
        return repr({name: _plain(value) for name, value in first.items()})
    return repr(_plain(first))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
