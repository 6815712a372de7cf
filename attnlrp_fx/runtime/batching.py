"""From the samples of a data set to batches that a captured model takes.

A sample is one row's inputs. A window of consecutive samples is read at a time; its samples are
sorted by length and cut into batches, so that rows of a batch are nearly equally long and memory
does not grow with the data set. Rows are padded on their right, only where that changes nothing:

- integer inputs with an attention mask that the model reads, along the dimension that they share
  with the mask (in inputs named "decoder_...", the decoder's mask);
- if what the target reads is found through the mask, or has no such dimension. A function of the
  outputs may read any position, and a position counted from the end is another one with padding.

Everything else shares a batch only with samples of its own sizes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from attnlrp_fx.capture.capture import flat_inputs
from attnlrp_fx.errors import AttnLRPError, InputError
from attnlrp_fx.runtime.layout import Input, Layout
from attnlrp_fx.targets import Contrast, Logit, LogProb, Target, TargetLike, as_target, changed

Targets = Sequence[TargetLike] | Callable[[Any], TargetLike]
"""A target a sample: by its number, or a function of the sample."""

PER_ROW = ("index", "position")
"""What of a target may be one for all rows, or one per row."""


@dataclass(frozen=True)
class Sample:
    """One row's inputs, unbatched."""

    number: int
    inputs: dict[str, Tensor]
    constants: dict[str, Any]
    target: Target | None
    kind: tuple[Any, ...]
    """Samples of one kind may share a batch."""
    length: int
    """How many tokens it has."""


@dataclass(frozen=True)
class Batch:
    """Rows of one kind, padded."""

    numbers: tuple[int, ...]
    """The sample of each row; further rows are copies of the last, and fill the batch."""
    inputs: dict[str, Tensor]
    constants: dict[str, Any]
    target: Target | None
    lengths: tuple[dict[str, int], ...]
    """By row and by input that may be padded: how many positions are its own."""
    tokens: int
    padded_tokens: int

    def pin_memory(self) -> "Batch":
        """The same in memory that a GPU can copy from by itself; called by the data loader."""
        pinned = {n: v.pin_memory() if v.is_cpu else v for n, v in self.inputs.items()}
        return replace(self, inputs=pinned)


@dataclass(frozen=True)
class Window:
    """The batches of consecutive samples, and what is wrong with the sample after them."""

    batches: list[Batch]
    error: AttnLRPError | None = None

    def __iter__(self) -> Iterator[Batch]:
        """The batches; then the error, if there is one."""
        yield from self.batches
        if self.error is not None:
            raise self.error

    def pin_memory(self) -> "Window":
        """The same with each batch pinned; called by the data loader."""
        return replace(self, batches=[batch.pin_memory() for batch in self.batches])


@dataclass(frozen=True)
class Batcher:
    """Makes the batches of a window.

    Raises:
        InputError: a size is less than 1, or the model takes another number of rows, or there are
            no tokens to count.
    """

    layout: Layout
    target: Target
    """The target where none is given."""
    chosen: TargetLike = None
    """The target of all samples, or a target with an index or a position for each."""
    targets: Targets | None = None
    tokenizer: Any = None
    padding: int = 0
    """The token that rows are padded with."""
    batch_size: int | None = None
    max_tokens: int | None = None
    window: int = 16
    rows: int = field(init=False)
    """The most rows of a batch."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_tokens", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}", remedy=f"pass a {name} of 1 or more")
        fixed = self.layout.rows
        if fixed is not None and self.batch_size is not None and self.batch_size > fixed:
            raise InputError(
                f"a batch_size of {self.batch_size} does not fit the model",
                why=f"its batch was fixed to {fixed} when it was captured",
                remedy=f"pass batch_size={fixed}, or compile with dynamic_shapes='auto'",
            )
        if self.max_tokens is not None and not self.layout.counted:
            raise InputError(
                "max_tokens counts tokens, and this model reads none",
                why=f"its inputs are: {', '.join(self.layout.inputs)}",
                remedy="pass batch_size alone",
            )
        if self.chosen is not None and self.targets is not None:
            raise InputError("both target and targets are given", remedy="pass one of them")
        object.__setattr__(self, "rows", self.batch_size or fixed or 32)

    @property
    def samples(self) -> int:
        """How many samples are a window."""
        return self.window * self.rows

    def __call__(self, numbered: Sequence[tuple[int, Any]]) -> Window:
        """The batches of some samples with their numbers, up to the first that is unfit."""
        samples, error = [], None
        texts = []
        for _, raw in numbered:
            if isinstance(raw, str):
                if not raw.strip() or not callable(self.tokenizer):
                    break
                texts.append(raw)
        tokenized = self._tokenized(texts)
        try:
            for number, raw in numbered:
                samples.append(self._sample(number, raw, tokenized))
        except AttnLRPError as found:
            error = found
        with torch.no_grad():
            return Window(self._batches(samples), error)

    def _tokenized(self, texts: list[str]) -> Iterator[dict[str, Any]]:
        """The inputs of texts, all cut into tokens at once; no more than the model takes."""
        if texts:
            encoded = self.tokenizer(texts)
            names = [name for name in encoded if name in self.layout.inputs]
            for values in zip(*(encoded[name] for name in names), strict=True):
                yield dict(zip(names, values, strict=True))

    def alone(self, batch: Batch, row: int) -> Batch:
        """One row of a batch as a batch."""
        own = batch.lengths[row]
        inputs = {n: v[row, : own[n]] if n in own else v[row] for n, v in batch.inputs.items()}
        target = None if batch.target is None else _of_sample(batch.target, row)
        return self._batch([Sample(batch.numbers[row], inputs, batch.constants, target, (), 0)])

    # One sample

    def _sample(self, number: int, raw: Any, tokenized: Iterator[dict[str, Any]]) -> Sample:
        """Check a sample and make tensors of it.

        Raises:
            InputError: it is of an unknown type, an empty text, or does not fit the model.
        """
        where = f"sample {number}"
        if isinstance(raw, str):
            if not callable(self.tokenizer):
                raise InputError(
                    "a text needs a tokenizer",
                    where=where,
                    remedy="compile with tokenizer=..., or pass mappings of inputs",
                )
            if not raw.strip():
                raise InputError("a text is empty", where=where, remedy="leave it out")
            given: Mapping[str, Any] = next(tokenized)
        elif isinstance(raw, Mapping):
            given = raw
        elif isinstance(raw, Tensor):
            given = {next(iter(self.layout.inputs)): raw}
        else:
            raise InputError(
                f"a sample cannot be a {type(raw).__name__}",
                where=where,
                remedy="samples are texts, mappings of inputs by name (one row each), or tensors",
            )
        target = self._target(number, raw)
        inputs, constants = self._split(given, where)
        pads = self.layout.same_if_padded(self.target if target is None else target)
        inputs = self._without_padding(inputs, where) if pads else inputs
        sizes = tuple(
            (value.dtype, value.shape[1:] if self._pads(name, pads) else value.shape)
            for name, value in inputs.items()
        )
        kind = (sizes, repr(constants), _kind(target))
        length = sum(inputs[name].shape[0] for name in self.layout.counted)
        return Sample(number, inputs, constants, target, kind, length)

    def _target(self, number: int, raw: Any) -> Target | None:
        """A sample's own target."""
        if self.targets is None:
            return None if self.chosen is None else _of_sample(as_target(self.chosen), number)
        if callable(self.targets):
            found = self.targets(raw)
        else:
            try:
                found = self.targets[number]
            except (IndexError, KeyError) as error:
                raise InputError(
                    "there is no target for a sample", where=f"sample {number}"
                ) from error
        index: Any = found
        if isinstance(found, Tensor) or (hasattr(found, "__index__") and found is not None):
            found = int(index)
        return None if found is None else as_target(found)

    def _split(
        self, given: Mapping[str, Any], where: str
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors of a row in the model's order, and its constants."""
        known = self.layout.inputs
        wanted = {name: _as_tensor(value, known.get(name)) for name, value in given.items()}
        flat = flat_inputs(wanted)
        why = f"the model was compiled with: {', '.join(known)}"
        if missing := [name for name in known if name not in flat]:
            raise InputError(
                f"input '{missing[0]}' is missing",
                where=where,
                why=f"{why}; the sample has: {', '.join(flat) or 'nothing'}",
                remedy="every sample needs every input",
            )
        if more := [n for n in flat if n not in known and n not in self.layout.constants]:
            raise InputError(
                f"there is no input '{more[0]}'",
                where=where,
                why=why,
                remedy="leave it out of the samples, or compile with it",
            )
        inputs = {name: _row(name, flat[name], wanted, where) for name, wanted in known.items()}
        return inputs, {name: value for name, value in flat.items() if name not in known}

    def _without_padding(self, inputs: dict[str, Tensor], where: str) -> dict[str, Tensor]:
        """A row without what its masks exclude at its right end."""
        cut = dict(inputs)
        for mask in {wanted.mask for wanted in self.layout.inputs.values()} - {""}:
            length = inputs[mask].shape[0]
            real = inputs[mask].nonzero()
            last = int(real.max()) + 1 if len(real) else length
            for name, wanted in self.layout.inputs.items():
                if wanted.mask != mask:
                    continue
                if inputs[name].shape[0] != length:
                    raise InputError(
                        f"input '{name}' has {inputs[name].shape[0]} positions",
                        where=where,
                        why=f"its mask '{mask}' has {length}",
                    )
                cut[name] = inputs[name][:last]
        return cut

    def _pads(self, name: str, allowed: bool) -> bool:
        wanted = self.layout.inputs[name]
        return bool(wanted.mask) and (allowed or wanted.length is not None)

    # Many samples

    def _batches(self, samples: list[Sample]) -> list[Batch]:
        """Samples of one kind side by side, the shortest first; in the order of the data set."""
        kinds: dict[tuple[Any, ...], list[Sample]] = {}
        for sample in samples:
            kinds.setdefault(sample.kind, []).append(sample)
        batches = []
        for of_kind in kinds.values():
            rows: list[Sample] = []
            widths = self._widths(None)
            for sample in sorted(of_kind, key=lambda sample: sample.length):
                wider = [max(pair) for pair in zip(widths, self._widths(sample), strict=True)]
                if rows and self._is_too_much(len(rows) + 1, sum(wider)):
                    batches.append(self._batch(rows))
                    rows, wider = [], self._widths(sample)
                rows.append(sample)
                widths = wider
            batches.append(self._batch(rows))
        return sorted(batches, key=lambda batch: min(batch.numbers))

    def _widths(self, sample: Sample | None) -> list[int]:
        """The positions of each input of tokens, in one row."""
        fixed = [self.layout.inputs[name].length or 0 for name in self.layout.counted]
        if sample is None:
            return fixed
        own = (sample.inputs[name].shape[0] for name in self.layout.counted)
        return [max(pair) for pair in zip(fixed, own, strict=True)]

    def _is_too_much(self, rows: int, tokens: int) -> bool:
        over = self.max_tokens is not None and rows * tokens > self.max_tokens
        return over or rows > self.rows

    def _batch(self, rows: list[Sample]) -> Batch:
        first = rows[0]
        missing = 0 if self.layout.rows is None else self.layout.rows - len(rows)
        filled = rows + [rows[-1]] * missing
        inputs = {
            name: self._stacked(name, [r.inputs[name] for r in filled]) for name in first.inputs
        }
        return Batch(
            numbers=tuple(row.number for row in rows),
            inputs=inputs,
            constants=first.constants,
            target=_merged([row.target for row in filled]),
            lengths=tuple(
                {n: v.shape[0] for n, v in row.inputs.items() if self.layout.inputs[n].mask}
                for row in rows
            ),
            tokens=sum(row.length for row in rows),
            padded_tokens=sum(inputs[name].numel() for name in self.layout.counted),
        )

    def _stacked(self, name: str, rows: list[Tensor]) -> Tensor:
        """One input of all rows, padded to the longest, or to the model's one length."""
        wanted = self.layout.inputs[name]
        if not wanted.mask:
            return torch.stack(rows)
        length = max(wanted.length or 0, *(row.shape[0] for row in rows))
        fill = self.padding if name in self.layout.counted else 0
        batch = rows[0].new_full((len(rows), length, *rows[0].shape[1:]), fill)
        for row, value in zip(batch, rows, strict=True):
            row[: value.shape[0]] = value
        return batch


def _as_tensor(value: Any, wanted: Input | None) -> Any:
    """Arrays and lists of numbers as tensors, lists of floats in the model's dtype."""
    if wanted is None or isinstance(value, Tensor | Mapping) or value is None:
        return value
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value
    is_list = isinstance(value, list | tuple)
    floats = found.is_floating_point() and wanted.dtype.is_floating_point
    return found.to(wanted.dtype) if is_list and floats else found


def _row(name: str, value: Any, wanted: Input, where: str) -> Tensor:
    """One input of one row, unbatched, in the model's dtype where nothing is lost by that."""
    if not isinstance(value, Tensor):
        raise InputError(
            f"input '{name}' is a {type(value).__name__}, not a tensor",
            where=where,
            remedy="pass tensors, arrays or lists of numbers",
        )
    row: Tensor = value.squeeze(0) if value.dim() == wanted.rank else value
    if row.dim() != wanted.rank - 1:
        raise InputError(
            f"input '{name}' has shape {tuple(value.shape)}",
            where=where,
            why=f"one row of it has {wanted.rank - 1} dimensions",
            remedy="a sample is one row",
        )
    if row.numel() == 0:
        raise InputError(f"input '{name}' is empty", where=where, remedy="leave the sample out")
    integers = not row.is_floating_point() and not wanted.dtype.is_floating_point
    if integers and torch.bool not in (row.dtype, wanted.dtype):
        row = row.to(wanted.dtype)
    return row


# Targets


def _of_sample(target: Target, number: int) -> Target:
    """The target of one sample, where it says what is explained of each."""
    changes = {}
    for name in PER_ROW:
        value = getattr(target, name, None) if _is_ours(target) else None
        if value is not None and torch.as_tensor(value).dim():
            if not 0 <= number < len(value):
                raise InputError(
                    f"the target has no {name} for a sample",
                    where=f"sample {number}",
                    why=f"it has {len(value)}",
                    remedy="pass one for all samples, or one per sample",
                )
            changes[name] = value[number]
    return changed(target, **changes) if changes else target


def _is_ours(target: Target | None) -> bool:
    return isinstance(target, Logit | Contrast | LogProb)


def _kind(target: Target | None) -> tuple[Any, ...]:
    """Targets of one kind can be asked for together, each in its row."""
    if not _is_ours(target):
        return (type(target), id(getattr(target, "function", target)))
    rest = {n: v for n, v in vars(target).items() if n not in PER_ROW}
    shapes = (
        None if v is None else torch.as_tensor(v).dim() for v in map(vars(target).get, PER_ROW)
    )
    return (type(target), repr(rest), *shapes)


def _merged(targets: Sequence[Target | None]) -> Target | None:
    """One target for a batch out of its rows', which are of one kind."""
    first = targets[0]
    if first is None or not _is_ours(first):
        return first
    found = {name: [getattr(target, name) for target in targets] for name in PER_ROW}
    given = {name: values for name, values in found.items() if values[0] is not None}
    rows = {
        name: torch.cat([torch.as_tensor(value, device="cpu").reshape(-1) for value in values])
        for name, values in given.items()
    }
    return changed(first, **rows)


# Data sets


class Part(NamedTuple):
    """Some of a data set's windows: every `step`-th from the one numbered `first` on."""

    first: int = 0
    step: int = 1
    done: int = 0
    """How many windows of this part are left out at its beginning."""

    @property
    def start(self) -> int:
        """The number of its first window."""
        return self.first + self.done * self.step


WHOLE = Part()


class Windows(Dataset[Window]):
    """The windows of a data set that can be read at any place."""

    def __init__(self, dataset: Any, batcher: Batcher, part: Part = WHOLE) -> None:
        self.dataset, self.batcher, self.part = dataset, batcher, part

    def __len__(self) -> int:
        windows = -(-len(self.dataset) // self.batcher.samples)
        return max(0, -(-(windows - self.part.start) // self.part.step))

    def __getitem__(self, number: int) -> Window:
        start = (self.part.start + number * self.part.step) * self.batcher.samples
        stop = min(start + self.batcher.samples, len(self.dataset))
        return self.batcher([(i, self.dataset[i]) for i in range(start, stop)])


class StreamedWindows(IterableDataset[Window]):
    """The windows of a data set that is read from its beginning."""

    def __init__(self, dataset: Iterable[Any], batcher: Batcher, part: Part = WHOLE) -> None:
        self.dataset, self.batcher, self.part = dataset, batcher, part

    def __iter__(self) -> Iterator[Window]:
        numbered = iter(enumerate(self.dataset))
        for number in count():
            chunk = list(islice(numbered, self.batcher.samples))
            if not chunk:
                return
            behind = number - self.part.start
            if behind >= 0 and behind % self.part.step == 0:
                yield self.batcher(chunk)


def windows_of(dataset: Any, batcher: Batcher, part: Part = WHOLE) -> Windows | StreamedWindows:
    """A data set of windows from one of samples.

    Raises:
        InputError: it is no data set.
    """
    if isinstance(dataset, str | Mapping):
        raise InputError(
            f"a {type(dataset).__name__} is not a data set",
            why="it is one sample, or one batch",
            remedy="pass a list of samples; call the explainer on a batch",
        )
    streamed = isinstance(dataset, IterableDataset)
    if isinstance(dataset, Sequence | Dataset) and not streamed and hasattr(dataset, "__len__"):
        return Windows(dataset, batcher, part)
    if not isinstance(dataset, Iterable):
        raise InputError(
            f"a {type(dataset).__name__} is not a data set",
            remedy="pass an iterable of samples, or a torch.utils.data.Dataset",
        )
    return StreamedWindows(dataset, batcher, part)
