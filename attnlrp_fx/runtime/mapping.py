"""Explain a whole data set: batches of nearly equal lengths in, one explanation a sample out.

Nothing differs from explaining one sample at a time, to rounding: rows are padded only where that
changes nothing (see `attnlrp_fx.runtime.batching`), and what was added is cut off again. Results
come in the order of the data set. Memory holds a window of samples, or two, and what was explained
of one before its turn came.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnlrp_fx.runtime.batching import Batch, Targets
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.loader import Bar, Explains, Loaded, load_batches
from attnlrp_fx.targets import TargetLike


@dataclass(frozen=True)
class Throughput:
    """What was explained, and how fast."""

    samples: int = 0
    tokens: int = 0
    """Tokens of the samples; 0 if the model reads none."""
    padded_tokens: int = 0
    """Tokens of the batches, padding and rows that only fill a batch among them."""
    batches: int = 0
    seconds: float = 0.0
    """Spent on loading and explaining; what the caller does with explanations does not count."""

    @property
    def samples_per_second(self) -> float:
        """Samples explained in a second."""
        return self.samples / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of samples explained in a second, padding left out."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def padding(self) -> float:
        """The share of tokens computed for nothing, from 0 to 1."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    def __str__(self) -> str:
        text = f"{self.samples:,} samples in {self.seconds:.1f} s, {self.samples_per_second:.4g}/s"
        if not self.padded_tokens:
            return text
        tokens = f"{self.tokens:,} tokens, {self.tokens_per_second:,.0f}/s"
        return f"{text}; {tokens}; {100 * self.padding:.0f} % padding"


class Mapped(Iterator[Explanation]):
    """The explanations of a data set, one a sample, in its order; made by `map_dataset`.

    An iterator: nothing is computed before it is asked for, and it can be gone through once. Where
    a loop is left early, `close` it, or use it in a `with` statement, to end the progress bar and
    what loads samples ahead.
    """

    def __init__(self, explained: "_Explained") -> None:
        self._explained = explained
        self._results = explained.results()

    @property
    def throughput(self) -> Throughput:
        """What has been explained so far, and how fast; of all when the iterator is finished."""
        return self._explained.throughput

    def __next__(self) -> Explanation:
        start = time.perf_counter()
        try:
            return next(self._results)
        finally:
            self._explained.add(seconds=time.perf_counter() - start)

    def close(self) -> None:
        """Stop here."""
        self._results.close()

    def __enter__(self) -> "Mapped":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def map_dataset(
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
    outputs: bool = False,
    progress: bool = True,
) -> Mapped:
    """Explain every sample of a data set.

    Each explanation has one row and no padding, lies in main memory, and equals that of the sample
    alone to rounding. Of a model on a GPU, batches are copied from pinned memory.

    Args:
        explainer: an explainable graph module.
        dataset: samples, in anything that can be iterated, or a `torch.utils.data.Dataset`. A
            sample is a text (of an explainer compiled with a tokenizer), a mapping of inputs by
            name, one row each (tensors, arrays or lists of numbers, as of a tokenizer or a table),
            or a tensor, of a model with one input. Lengths may differ.
        batch_size: the most rows of a batch; None: 32, or what the model was fixed to.
        max_tokens: the most tokens of a batch, padding counted; one sample that has more is a batch
            of its own.
        target: as in a call, for all samples; an index or a position may be one per sample.
        targets: instead, a target for each sample: in a sequence, or by a function of the sample.
        window: how many full batches are loaded, and sorted by length, together. More mean less
            padding, and more memory.
        workers: processes that load ahead; with 0, samples are loaded between batches. What can
            only be iterated is loaded by one at most.
        pad: whether unlike lengths may share a batch. If not, only equal ones do: for models that
            padding changes although there is a mask, as a convolution over the sequence may.
        outputs: whether explanations keep the model's outputs; else they are None. Of a language
            model they are large, and a window of them may wait for its turn.
        progress: whether a progress bar is shown, on a terminal's standard error.

    Returns:
        An iterator with one explanation a sample, in the order of the data set; its `throughput`
        says how fast it went. The ledger is a batch's: rows have one only with batch_size=1.

    Raises:
        InputError: a size is less than 1, or the model takes another number of rows, or this is no
            data set. While iterating, a sample that is unfit, with its number, once all before it
            have been returned.
        TargetError: while iterating, a sample's outputs do not have the target.

    Example:
        >>> import attnlrp_fx
        >>> from attnlrp_fx.loading import load
        >>> from attnlrp_fx.runtime.mapping import map_dataset
        >>> model, tokenizer = load()
        >>> example = tokenizer("any text", return_tensors="pt")
        >>> explainer = attnlrp_fx.compile(model, example, backend="eager", tokenizer=tokenizer)
        >>> texts = ["The performances are wonderful.", "Dull.", "It was a waste of time."]
        >>> mapped = map_dataset(explainer, texts, batch_size=2)
        >>> for explanation in mapped:
        ...     print(explanation.labels[0], explanation.top(1)[0][0].token)
        positive wonderful
        negative dull
        negative waste
        >>> mapped.throughput.samples, mapped.throughput.batches
        (3, 2)
    """
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
    return Mapped(_Explained(explainer, loaded, outputs, progress))


class _Explained:
    """What `Mapped` goes through: windows to batches to rows, put in order."""

    def __init__(self, explainer: Explains, loaded: Loaded, outputs: bool, progress: bool) -> None:
        self.explainer, self.loaded, self.outputs = explainer, loaded, outputs
        self.progress = progress
        self.throughput = Throughput()

    def add(self, **more: float) -> None:
        """Count what was done."""
        was = vars(self.throughput)
        self.throughput = replace(self.throughput, **{n: was[n] + v for n, v in more.items()})

    def results(self) -> Generator[Explanation]:
        """The explanations in the order of the data set."""
        waiting: dict[int, Explanation] = {}
        due = 0
        with Bar(self.loaded.total, self.progress) as bar:
            for batch in self.loaded:
                rows = explained_rows(self.explainer, self.loaded, batch, self.outputs)
                waiting |= zip(batch.numbers, rows, strict=True)
                self.add(
                    samples=len(batch.numbers),
                    tokens=batch.tokens,
                    padded_tokens=batch.padded_tokens,
                    batches=1,
                )
                bar.advance(len(batch.numbers), batch.tokens)
                while due in waiting:
                    yield waiting.pop(due)
                    due += 1


def explained_rows(
    explainer: Explains, loaded: Loaded, batch: Batch, outputs: bool = False
) -> list[Explanation]:
    """The explanation of each sample of a batch, in main memory; see `map_dataset`."""
    with torch.no_grad():
        explanation: Explanation = loaded.run(batch, explainer)
    whole = explanation.outputs
    explanation = _in_main_memory(replace(explanation, outputs=None))
    rows = [explanation.row(i, lengths) for i, lengths in enumerate(batch.lengths)]
    if outputs:
        names = explainer._running.convention.output_names
        kept = (_outputs(whole, names, loaded, batch, i) for i in range(len(rows)))
        rows = [replace(row, outputs=own) for row, own in zip(rows, kept, strict=True)]
    return rows


def _outputs(whole: Any, names: Sequence[str], loaded: Loaded, batch: Batch, row: int) -> Any:
    """The model's outputs of one row, without what padding added to them."""
    leaves, spec = pytree.tree_flatten(whole)
    rows = len(next(iter(batch.inputs.values())))
    found = []
    for name, leaf in zip(names, leaves, strict=True):
        if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == rows:
            leaf = leaf[row : row + 1]
            for dim, mask in enumerate(loaded.batcher.layout.outputs.get(name, ())):
                if mask and leaf.shape[dim] == batch.inputs[mask].shape[1]:
                    leaf = leaf.narrow(dim, 0, batch.lengths[row][mask])
            leaf = leaf.clone() if leaf.is_cpu else leaf.cpu()
        found.append(leaf)
    return pytree.tree_unflatten(found, spec)


def _in_main_memory(explanation: Explanation) -> Explanation:
    """The same, of values on a GPU a copy."""

    def moved(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in values.items()}

    index = explanation.target_index
    return replace(
        explanation,
        relevance=moved(explanation.relevance),
        target_value=explanation.target_value.cpu(),
        inputs=moved(explanation.inputs),
        mask=explanation.mask and moved(explanation.mask),
        target_index=None if index is None else index.cpu(),
    )
