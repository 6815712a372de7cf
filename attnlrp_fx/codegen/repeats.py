"""Repeats: several seeds through one run of the relevance side, as further rows of the batch.

What the forward side saved for rows 1..B serves T seeds as rows 1..T·B, once it is repeated along
its batch. Where that is in each value, sizes tell: the batch's symbol is a dimension, or times
others where rows were flattened, the batch outermost. Sizes that are values grow, too. Where a
value has the batch in two places, or the program is of one batch size, there is no such way, and
seeds run one after another. That rows stay apart is looked up, not assumed: the first time, one
seed runs alone as well, and where it comes to another result, all do from then on.

It pays where a run is short beside its calls: small models, short texts, accelerators. What it
takes is memory, so as many seeds share a run as fit a budget.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlrp_fx.codegen.schedule import Call, Read, Schedule, Values
from attnlrp_fx.graph.operators import placeholders_of
from attnlrp_fx.torch_private import grows_with

BUDGET = {"cpu": 2**24}
"""The bytes of repeated values by type of device: on a CPU, what its caches hold."""
BUDGET_ELSEWHERE = 2**30
TOLERANCE = 1e-3
"""By how much of the largest relevance runs may differ: much less than if rows were mixed up."""


@dataclass(frozen=True)
class Repeats:
    """How what a relevance side reads grows with the batch."""

    dims: Mapping[int, int]
    """By slot of a tensor, the dimension along which it is repeated."""
    sizes: tuple[int, ...]
    """The slots of sizes that are a multiple of the batch."""

    def most(self, values: Values, seeds: int) -> int:
        """How many of some seeds fit the budget together; at least 1."""
        tensors = [value for s in self.dims if isinstance(value := values[s], Tensor)]
        if not tensors:
            return 1
        budget = BUDGET.get(tensors[0].device.type, BUDGET_ELSEWHERE)
        return max(1, min(seeds, budget // max(1, sum(t.nbytes for t in tensors))))

    def apply(self, values: Values, times: int) -> Values:
        """The slots for so many times the rows: all rows for the first seed, then for the next."""
        found = values.copy()
        for slot, dim in self.dims.items():
            if values[slot] is not None:
                found[slot] = _repeated(values[slot], dim, times)
        for slot in self.sizes:
            if values[slot] is not None:
                found[slot] = values[slot] * times
        return found


def _repeated(value: Tensor, dim: int, times: int) -> Tensor:
    """A tensor several times along a dimension, laid out in memory as it is."""
    sizes = [-1] * value.dim()
    for d in range(value.dim()):
        if value.stride(d) == 0 and d != dim:
            sizes[d] = value.shape[d]
            value = value.narrow(d, 0, 1)
    order = sorted(range(value.dim()), key=value.stride, reverse=True)
    counts = [times if d == dim else 1 for d in order]
    found = value.permute(order).repeat(counts)
    return found.permute([order.index(d) for d in range(value.dim())]).expand(sizes)


def repeats_of(schedule: Schedule) -> Repeats | None:
    """How a schedule's relevance side takes more rows; None if it cannot."""
    batch = _batch(schedule)
    if batch is None:
        return None
    made = {slot for step in schedule.relevance for slot in step.results} | {*schedule.seeds}
    dims: dict[int, int] = {}
    sizes: list[int] = []
    for step in schedule.relevance:
        for slot, node in zip(step.arguments, placeholders_of(step.graph_module), strict=True):
            if node.meta["part"] in ("attribute", "seed") or slot in made:
                continue
            value = node.meta["val"]
            if isinstance(value, Tensor):
                grow = [grows_with(size, batch) for size in value.shape]
                if None in grow or sum(map(bool, grow)) > 1:
                    return None
                if True in grow:
                    dims[slot] = grow.index(True)
            elif isinstance(value, torch.SymInt):
                grows = grows_with(value, batch)
                if grows is None:
                    return None
                if grows:
                    sizes.append(slot)
    return Repeats(dims, tuple(sizes)) if dims else None


def _batch(schedule: Schedule) -> torch.SymInt | None:
    """The batch's size: the first of every explained input."""
    found = [
        node.meta["val"].shape[0]
        for node in placeholders_of(schedule.rewritten)
        if str(node.target) in schedule.explained
    ]
    same = {str(size) for size in found}
    first = found[0] if len(same) == 1 else None
    return first if isinstance(first, torch.SymInt) else None


class Reverse:
    """Runs the relevance side of a schedule, for as many seeds at a time as it can.

    The ledger's sums and the relevance of latent values and parameters are each seed's own, and not
    told apart by rows: such seeds run one after another.

    Args:
        schedule: the schedule.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        returns_more = any(step.audited or step.latent for step in schedule.relevance)
        alone = returns_more or schedule.weighed
        self._repeats = None if alone else repeats_of(schedule)
        self._is_checked = False

    def at_a_time(self, values: Values, seeds: int) -> int:
        """How many of some seeds share a run."""
        return 1 if self._repeats is None or seeds < 2 else self._repeats.most(values, seeds)

    def run(self, values: Values, seeds: Sequence[Sequence[Tensor]], call: Call) -> list[Read]:
        """Take seeds back to the inputs.

        Args:
            values: the slots after the forward side; they are used up.
            seeds: for each of those that share the run a seed for each explained output.
            call: runs a step.
        """
        if self._repeats is None or len(seeds) == 1:
            kept = [values, *(values.copy() for _ in seeds[1:])]
            return [self._alone(v, s, call) for v, s in zip(reversed(kept), seeds, strict=True)]
        repeated = self._repeats.apply(values, len(seeds))
        joined = [torch.cat(parts) for parts in zip(*seeds, strict=True)]
        read = self._schedule.run_relevance(repeated, joined, call)
        parts = {n: r.chunk(len(seeds)) for n, r in read.relevance.items()}
        found = [Read({n: r[i] for n, r in parts.items()}) for i in range(len(seeds))]
        if not self._is_checked:
            alone = self._alone(values.copy(), seeds[-1], call)
            self._is_checked = _agree(alone, found[-1])
            if not self._is_checked:
                self._repeats = None
                return self.run(values, seeds, call)
        return found

    def _alone(self, values: Values, seeds: Sequence[Tensor], call: Call) -> Read:
        return self._schedule.run_relevance(values, seeds, call)


def _agree(one: Read, other: Read) -> bool:
    """Whether two runs read the same relevance, to rounding."""
    return all(
        bool(((r - other.relevance[n]).abs() <= TOLERANCE * r.abs().max()).all())
        for n, r in one.relevance.items()
    )
