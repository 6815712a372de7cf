"""Timing on noisy machines: contestants take turns, medians are compared within one process."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def medians(
    contestants: Mapping[str, Callable[[], Any]],
    rounds: int,
    synchronise: Callable[[], Any] | None = None,
) -> dict[str, float]:
    """Median seconds of each contestant over rounds in which all take a turn.

    Args:
        contestants: what to time, by name; each is called once beforehand.
        rounds: how often each is timed.
        synchronise: called before a clock is read, for devices that run behind.
    """
    wait = synchronise or (lambda: None)
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
