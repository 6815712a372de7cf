"""The batches of a data set, loaded ahead, run one after another, with progress shown.

What maps a data set, sums over it or collects statistics of it goes through `Loaded`. An error is
that of the sample that it is about, found by running the rows of its batch alone.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console
from rich.errors import LiveError
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attnlrp_fx.errors import AttnLRPError, InputError, TargetError
from attnlrp_fx.runtime.batching import (
    PER_ROW,
    WHOLE,
    Batch,
    Batcher,
    Part,
    Targets,
    Window,
    Windows,
    windows_of,
)
from attnlrp_fx.runtime.layout import Layout
from attnlrp_fx.runtime.running import Running
from attnlrp_fx.targets import TargetLike

Result = TypeVar("Result")


class Explains(Protocol):
    """What is read of an explainable graph module, which is made a layer above."""

    model: nn.Module

    @property
    def __call__(self) -> Any: ...

    @property
    def _running(self) -> Running: ...


@dataclass(frozen=True)
class Loaded:
    """The batches of a data set; made by `load_batches`."""

    loader: DataLoader[Window]
    batcher: Batcher
    device: torch.device
    total: int | None
    """How many samples there are, if that is known."""

    def __iter__(self) -> Iterator[Batch]:
        """The batches in order; what is wrong with a sample is raised after all before it."""
        for window in self.windows():
            yield from window

    def windows(self, done: int = 0) -> Iterator[Window]:
        """The windows in order, without the first ones of them."""
        windows: Any = self.loader.dataset
        windows.part = windows.part._replace(done=done)
        yield from self.loader

    def run(self, batch: Batch, call: Callable[..., Result]) -> Result:
        """Call with a batch's inputs, where the model is, and its target.

        Raises:
            InputError, TargetError: as the call does, of the first sample that fails by itself.
        """
        try:
            return self._run(batch, call)
        except (InputError, TargetError) as error:
            raise self._blamed(batch, call, error) from error

    def _run(self, batch: Batch, call: Callable[..., Result]) -> Result:
        inputs = {n: v.to(self.device, non_blocking=True) for n, v in batch.inputs.items()}
        return call({**inputs, **batch.constants}, target=batch.target)

    def _blamed(self, batch: Batch, call: Callable[..., Any], error: AttnLRPError) -> AttnLRPError:
        """The same error, of the sample that it is about."""
        where = f"samples {', '.join(map(str, sorted(batch.numbers)))}"
        for row, number in enumerate(batch.numbers):
            try:
                self._run(self.batcher.alone(batch, row), call)
            except (InputError, TargetError) as found:
                error, where = found, f"sample {number}"
                break
        where = f"{where}: {error.where}" if error.where else where
        return type(error)(error.what, where=where, why=error.why, remedy=error.remedy)


def load_batches(
    explainer: Explains,
    dataset: Any,
    *,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    target: TargetLike = None,
    targets: Targets | None = None,
    window: int = 16,
    workers: int = 0,
    pad: bool = True,
    part: Part = WHOLE,
) -> Loaded:
    """The batches of a data set; what the other options mean is with `map_dataset`.

    Args:
        part: which of the windows.

    Raises:
        InputError: an option does not fit, or this is no data set.
    """
    if workers < 0:
        raise InputError(f"workers is {workers}", remedy="pass workers of 0 or more")
    tokenizer = explainer._running.options.labels.tokenizer
    batcher = Batcher(
        layout=Layout.of(explainer._running.convention, pad),
        target=explainer._running.target,
        chosen=target,
        targets=targets,
        tokenizer=tokenizer,
        padding=padding_of(tokenizer, explainer.model),
        batch_size=batch_size,
        max_tokens=max_tokens,
        window=window,
    )
    windows = windows_of(dataset, batcher, part)
    total = len(dataset) if hasattr(dataset, "__len__") else None
    if total is not None:
        _check_targets(total, targets if targets is not None else target)
    device = explainer._running.attributes.device()
    many = workers if isinstance(windows, Windows) else min(workers, 1)
    loader = DataLoader(
        windows,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=many,
        prefetch_factor=1 if many else None,  # a window: the next is loaded while one is explained
        pin_memory=device.type == "cuda",
        worker_init_fn=_quiet_tokenizers,
        generator=torch.Generator(),  # the default one is the user's
    )
    return Loaded(loader, batcher, device, total)


def padding_of(tokenizer: Any, model: nn.Module) -> int:
    """The token to pad with: any will do under a mask, but some models look for it themselves."""
    config = getattr(model, "config", None)
    found = (
        getattr(tokenizer, "pad_token_id", None),
        getattr(config, "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    return next((each for each in found if isinstance(each, int) and each >= 0), 0)


def _check_targets(total: int, targets: Any) -> None:
    """Raise InputError if there is not one target for each sample."""
    rows = [targets, *(getattr(targets, name, None) for name in PER_ROW)]
    for each in rows:
        is_scalar = isinstance(each, Tensor) and each.dim() == 0
        if hasattr(each, "__len__") and not is_scalar and len(each) != total:
            raise InputError(
                f"there are {len(each)} targets for {total} samples",
                remedy="pass one for all, or one per sample",
            )


def _unchanged(window: Any) -> Any:
    """Windows need no collation."""
    return window


def _quiet_tokenizers(worker: int) -> None:
    """A forked tokenizer uses one thread; say so before it warns about it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Bar:
    """Samples done, tokens per second and the time left, on a terminal's standard error."""

    def __init__(self, total: int | None, wanted: bool, done: int = 0) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )
        shown = wanted and (console.is_terminal or console.is_jupyter)
        self._progress = Progress(*columns, console=console, transient=True, disable=not shown)
        self._task = self._progress.add_task("explaining", total=total, completed=done, speed="")
        self._tokens = 0

    def __enter__(self) -> "Bar":
        try:
            self._progress.start()
        except LiveError:  # another bar is shown: this one stays away
            self._progress.disable = True
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, samples: int, tokens: int) -> None:
        """Show that a batch is done."""
        self._tokens += tokens
        elapsed = self._progress.tasks[0].elapsed or 0.0
        speed = f"{self._tokens / elapsed:,.0f} tokens/s" if self._tokens and elapsed else ""
        self._progress.update(self._task, advance=samples, speed=speed)
