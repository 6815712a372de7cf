"""Relevance of a model's parameters over a data set, to prune or quantise by.

R_W = W ⊙ ∂ (Hatefi et al. 2025, arXiv 2506.13727; see `attnlrp_fx.calculus.weights`), summed over
samples: signed, and by magnitude. Only the sums are kept, so memory does not grow with the data.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from attnlrp_fx.calculus.weights import Weight
from attnlrp_fx.errors import InputError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.runtime.batching import Batch
from attnlrp_fx.runtime.layout import Layout
from attnlrp_fx.runtime.loader import Bar, Explains, load_batches
from attnlrp_fx.runtime.running import Sums, Weighed
from attnlrp_fx.targets import Target

SCHEMA = "attnlrp_fx.weight_relevance/1"

LARGEST = 2**28
"""How many bytes one layer's weights may take that are summed a row at a time."""


class Weighs(Explains, Protocol):
    """What is read of an explainable graph module, which is made a layer above."""

    def weigh(
        self, inputs: Mapping[str, Any], target: Target | None, rows: int, sums: Sums
    ) -> Weighed:
        """Add the relevance of parameters in a batch's first rows to sums."""
        ...


@dataclass(frozen=True, repr=False)
class WeightRelevance(Mapping[str, Tensor]):
    """Relevance of parameters, summed over a data set; a mapping by the model's own names.

    It holds the weights and biases of all layers, linear or convolutions, that relevance passed
    through. A parameter that several layers share has the sum of what it has in each.
    """

    signed: dict[str, Tensor]
    """Σ R_W over samples, in the parameter's shape, float32 or better. Of a weight, summed, it is
    the relevance of its layer's input; of a bias, what it absorbed."""
    absolute: dict[str, Tensor]
    """Σ |R_W| over samples, and over the layers that share the parameter."""
    samples: int
    """How many samples were summed."""

    def __getitem__(self, name: str) -> Tensor:
        return self.signed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.signed)

    def __len__(self) -> int:
        return len(self.signed)

    def __repr__(self) -> str:
        return f"WeightRelevance({len(self)} parameters, {self.samples:,} samples)"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            OSError: the directory of `path` does not exist or cannot be written.
        """
        about = {"schema": SCHEMA, "samples": json.dumps(self.samples)}
        tensors = {f"signed.{name}": value.contiguous() for name, value in self.signed.items()}
        tensors |= {f"absolute.{name}": v.contiguous() for name, v in self.absolute.items()}
        write_atomically(path, save(tensors, about))

    @classmethod
    def load(cls, path: str | Path) -> "WeightRelevance":
        """Read what `save` wrote.

        Raises:
            InputError: the file is none of these.
        """
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                if about.get("schema") != SCHEMA:
                    raise InputError(
                        f"'{path}' holds no relevance of weights",
                        why=f"its schema is {about.get('schema', 'missing')}, not {SCHEMA}",
                        remedy="name a file that WeightRelevance.save wrote",
                    )
                found: dict[str, dict[str, Tensor]] = {"signed": {}, "absolute": {}}
                for key in file.keys():  # noqa: SIM118  # safetensors' file is no mapping
                    kind, _, name = key.partition(".")
                    found[kind][name] = file.get_tensor(key)
        except SafetensorError as error:
            raise InputError(f"'{path}' cannot be read", why=str(error)) from error
        return cls(found["signed"], found["absolute"], json.loads(about["samples"]))


def weight_relevance(
    explainer: Weighs,
    dataset: Any,
    *,
    batch_size: int | None = None,
    progress: bool = True,
    **options: Any,
) -> WeightRelevance:
    """Sum the relevance of parameters over a data set.

    Args:
        explainer: an explainable graph module.
        dataset: as in `map_dataset`.
        batch_size: the most rows of a batch; None: 32, or fewer, so that the largest layer's
            weights, once for each row, take 256 MiB at most.
        progress: whether a progress bar is shown, on a terminal's standard error.
        **options: what else `load_batches` takes.

    Raises:
        InputError, TargetError: as in `map_dataset`; or there is no sample, or no layer.
    """
    if batch_size is None:
        largest = max((p.nbytes for p in explainer.model.parameters()), default=1)
        most = Layout.of(explainer._running.convention).rows or 32
        batch_size = max(1, min(most, LARGEST // max(1, largest)))
    loaded = load_batches(explainer, dataset, batch_size=batch_size, **options)
    rows_told_apart, samples, sums = True, 0, Sums()
    with Bar(loaded.total, progress) as bar:
        for batch in loaded:
            found: Weighed | None = None
            if rows_told_apart or len(batch.numbers) == 1:
                found = loaded.run(batch, _adding(explainer, batch, sums))
                rows_told_apart = found.rows_told_apart
            if found is None or not (rows_told_apart or len(batch.numbers) == 1):
                found = Weighed(sums, False)
                for row in range(len(batch.numbers)):
                    alone = loaded.batcher.alone(batch, row)
                    found = loaded.run(alone, _adding(explainer, alone, found.sums))
            sums = found.sums
            samples += len(batch.numbers)
            bar.advance(len(batch.numbers), batch.tokens)
    if not sums:
        raise InputError(
            "there is no relevance of weights",
            why="relevance passed through no layer with parameters" if samples else "no samples",
            remedy="" if samples else "pass a data set that is not empty",
        )
    names = _names(explainer)
    ordered = sorted(sums, key=lambda name: list(names).index(name))
    found_by_name: dict[str, Weight] = {}
    for name in ordered:
        held, own = found_by_name.get(names[name]), sums[name]
        found_by_name[names[name]] = own if held is None else Weight(*map(Tensor.add, held, own))
    return WeightRelevance(
        {name: weight.signed.cpu() for name, weight in found_by_name.items()},
        {name: weight.absolute.cpu() for name, weight in found_by_name.items()},
        samples,
    )


def _adding(explainer: Weighs, batch: Batch, sums: Sums) -> Any:
    """A call that adds a batch to sums; rows that only fill it do not count."""
    return lambda inputs, target: explainer.weigh(inputs, target, len(batch.numbers), sums)


def _names(explainer: Explains) -> dict[str, str]:
    """By a parameter's name in the graph, the first that the model has for it."""
    model: nn.Module = explainer.model
    named = list(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(named)}
    values = explainer._running.attributes.values()
    found = {name: first[id(v)] for name, v in values.items() if id(v) in first}
    order = [name for name, _ in named]
    return dict(sorted(found.items(), key=lambda item: order.index(item[1])))
