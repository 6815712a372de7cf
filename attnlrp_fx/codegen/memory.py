"""Memory: how much of the forward side is kept for the relevance side.

"fast" keeps every product, and computes again only what costs no more than reading it. "small"
keeps what regions hand to each other, and computes each region once more when relevance reaches it
(Chen et al. 2016, arXiv 1604.06174). Between them, a price says how many bytes an operation is
worth that need not be done twice; each region's minimum cut then keeps what is dear for its size.
A budget is met by the highest price whose predicted peak lies within it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor, fx

from attnlrp_fx.codegen.cost import Cost, schedule_cost
from attnlrp_fx.codegen.flops import operations
from attnlrp_fx.codegen.partition import TYPICAL, Keeping
from attnlrp_fx.codegen.schedule import Schedule
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.operators import is_cheap, is_free
from attnlrp_fx.torch_private import typical_size

Memory = str | int
"""How much to keep: "fast", "balanced", "small", or a budget in bytes."""

PRICES = 16
"""Among how many prices a budget is met."""


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen, with its predicted peaks at the example's sizes, in bytes."""

    memory: Memory
    peak: int
    """The most that everything but parameters and inputs takes at a time."""
    fast_peak: int
    """The same under "fast"."""
    operations: float
    """Floating-point operations over those of "fast"."""


def check_memory(memory: Memory) -> None:
    """Raise InputError if this is no way to say how much to keep."""
    is_bytes = isinstance(memory, int) and not isinstance(memory, bool) and memory > 0
    if not is_bytes and memory not in ("fast", "balanced", "small"):
        raise InputError(
            f"memory is {memory!r}", remedy="use 'fast', 'balanced', 'small', or a number of bytes"
        )


def planned(
    schedule: Schedule, memory: Memory, example: Mapping[str, Tensor], keeping: Keeping
) -> tuple[Schedule, MemoryPlan | None]:
    """A schedule that keeps as much as asked for.

    Args:
        schedule: as traced, which is "fast".
        memory: how much to keep; "balanced" is half of the peak that "fast" has, or as near to it
            as can be.
        example: inputs of the sizes that a budget is for.
        keeping: how elementwise ops are treated, and what symbolic sizes count for.

    Raises:
        InputError: a budget is less than "small" takes.
    """
    if memory == "fast":
        return schedule, None

    @cache
    def at(price: float) -> tuple[Schedule, Cost]:
        found = schedule.keeping(Keeping(keeping.elementwise, price, keeping.sizes))
        return found, schedule_cost(found, example)

    fast = schedule_cost(schedule, example)
    small = at(0.0)
    budget = _peak(fast) // 2 if memory == "balanced" else 0 if memory == "small" else int(memory)
    best = small
    prices = _prices(schedule, keeping.sizes)
    while prices and budget:
        middle = prices.pop(len(prices) // 2)
        fits = _peak(at(middle)[1]) <= budget
        best = at(middle) if fits else best
        prices = [price for price in prices if (price > middle) == fits]
    if isinstance(memory, int):
        if _peak(fast) <= budget:
            best = schedule, fast
        elif _peak(best[1]) > budget:
            raise InputError(
                f"memory is {memory} bytes, and keeping least takes {_peak(best[1])}",
                why="this is the predicted peak at the example inputs' sizes, without parameters",
                remedy="allow more, or pass example inputs of the size that you will explain",
            )
    plan = MemoryPlan(memory, _peak(best[1]), _peak(fast), best[1].flops / max(fast.flops, 1))
    return best[0], plan


def _peak(cost: Cost) -> int:
    return max(cost.forward_peak, cost.relevance_peak)


def _prices(schedule: Schedule, sizes: Mapping[str, int]) -> list[float]:
    """Prices, ascending, between which cuts may differ: the bytes an operation of each product."""
    found = set()
    for program in schedule.distinct:
        for node in program.graph_module.graph.nodes:
            worth = _worth(node, sizes)
            if worth:
                found.add(worth * 1.01)
    ordered = sorted(found)
    step = max(1, len(ordered) // PRICES)
    return ordered[::step]


def _worth(node: fx.Node, sizes: Mapping[str, int]) -> float:
    """The bytes of a product's value over its operations; 0 for what is no product."""
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    tensors = [part for part in parts if isinstance(part, Tensor)]
    if node.op != "call_function" or is_free(node) or is_cheap(node) or not tensors:
        return 0.0
    count = sum(typical_size(t.numel(), TYPICAL, sizes) * t.dtype.itemsize for t in tensors)
    return count / max(typical_size(operations(node), TYPICAL, sizes), 1.0)
