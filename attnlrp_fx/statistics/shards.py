"""Statistics by engines that have processes of their own: Hugging Face `datasets`, Ray Data.

Such an engine maps a function over blocks of a table, wherever it likes, and starts again what
fails. `PartialStatistics` is that function: a block of samples in, one row with its statistics out.
`merge_statistics` puts the rows together. What comes out is what one process would have collected,
sums apart, which are added in another order.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attnlrp_fx.errors import InputError
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.runtime.loader import load_batches
from attnlrp_fx.statistics import store
from attnlrp_fx.statistics.collect import explained, finish
from attnlrp_fx.statistics.report import LatentStatistics
from attnlrp_fx.statistics.tables import Statistics

MakeExplainer = Callable[[], ExplainableGraphModule]


class PartialStatistics:
    """Maps a block of samples to a row with its statistics.

    Args:
        make_explainer: called once in each process; a function of a module, that can be pickled.
        column: the column of texts; None: a sample is a mapping of all columns.
        number: the column of the samples' numbers, where the engine gives none beside the block.
        top, context: as in `latent_statistics`.
        **options: what else `load_batches` takes: `batch_size`, `max_tokens`, `target`, `window`.

    Example (`datasets`)::

        block = PartialStatistics(make_explainer)
        rows = dataset.map(
            block, batched=True, batch_size=1000, with_indices=True, num_proc=4,
            remove_columns=dataset.column_names, writer_batch_size=1,
        )
        statistics = merge_statistics((row["statistics"] for row in rows), "neurons")

    Example (Ray Data)::

        rows = dataset.map_batches(
            PartialStatistics, fn_constructor_args=(make_explainer,), batch_size=1000, concurrency=4
        )
        statistics = merge_statistics((row["statistics"] for row in rows.iter_rows()), "neurons")
    """

    def __init__(
        self,
        make_explainer: MakeExplainer,
        *,
        column: str | None = "text",
        number: str = "number",
        top: int = 5,
        context: int = 32,
        **options: Any,
    ) -> None:
        self._make_explainer = make_explainer
        self._column, self._number = column, number
        self._statistics = {"top": top, "context": context}
        self._options = options
        self._explainer: ExplainableGraphModule | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_explainer": None}

    def __call__(
        self, block: Mapping[str, Sequence[Any]], numbers: Sequence[int] | None = None
    ) -> dict[str, list[bytes]]:
        """Statistics of a block.

        Args:
            block: columns of a table.
            numbers: the samples' numbers in the whole data set.

        Raises:
            InputError: a column is missing, or a sample does not fit.
            TargetError: a sample's outputs do not have the target.
        """
        if self._explainer is None:
            self._explainer = self._make_explainer()
        if numbers is None:
            numbers = self._of(block, self._number)
        if self._column is not None:
            samples: list[Any] = [str(text) for text in self._of(block, self._column)]
        else:
            names = [name for name in block if name != self._number]
            lines = zip(*(block[name] for name in names), strict=True)
            samples = [dict(zip(names, line, strict=True)) for line in lines]
        own = torch.tensor([int(number) for number in numbers])
        statistics = Statistics(**self._statistics)
        loaded = load_batches(self._explainer, samples, **self._options)
        for window in loaded.windows():
            for rows, explanation, _ in explained(self._explainer, loaded, window):
                numbered = rows._replace(numbers=own[rows.numbers])
                statistics.update(explanation.latent, numbered)
        return {"statistics": [store.as_bytes(statistics)]}

    def _of(self, block: Mapping[str, Sequence[Any]], column: str) -> Sequence[Any]:
        if column not in block:
            raise InputError(
                f"there is no column '{column}'",
                why=f"the block has: {', '.join(block)}",
                remedy="name the column of texts, and that of numbers, or let the engine number "
                "samples (with_indices=True)",
            )
        return block[column]


def merge_statistics(
    parts: Iterable[bytes], directory: str | Path, tokenizer: Any = None
) -> LatentStatistics:
    """Put the statistics of parts of a data set together, and write them as a run does.

    Args:
        parts: what `PartialStatistics` returned, one part at a time.
        directory: a new one.
        tokenizer: spells the tokens of top samples.

    Raises:
        InputError: there are no parts, or the directory is not empty.
        MissingExtraError: pyarrow is not installed.
    """
    store.need_pyarrow()
    goal = Path(directory)
    whole: Statistics | None = None
    count = 0
    for part in parts:
        found = store.from_bytes(part)
        count += 1
        if whole is None:
            whole = found
        else:
            whole.merge(found)
    if whole is None:
        raise InputError("there are no statistics to merge", remedy="pass at least one part")
    store.claim(goal, {"merged": count, "samples": whole.samples})
    finish(goal, whole, tokenizer)
    return LatentStatistics.open(goal)
