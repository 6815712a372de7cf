"""The most that a call holds in memory at a time, and the most that the machine computes a second.

Memory is counted beside what was there before: on the CPU by the record of PyTorch's allocator, on
CUDA by its statistics.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_of(run: Callable[[], Any], device: str) -> int:
    """The most bytes that a call holds at a time, what it returns included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    del kept
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def onednn_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x·weightᵀ by oneDNN, which has no public name."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def matrix_peak(tries: int = 20) -> float:
    """Operations a second of the fastest of several products of matrices, by MKL and oneDNN."""
    a, b = torch.randn(2, 1024, 1024)
    products: list[Callable[[], Any]] = [partial(torch.mm, a, b)]
    if torch.backends.mkldnn.is_available():
        products.append(partial(onednn_product, a, b))
    best = float("inf")
    for product in products * tries:
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
