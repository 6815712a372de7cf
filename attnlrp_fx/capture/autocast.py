"""Autocast: where a model is captured under it, its casts are ops of the graph.

What has the casts is then rewritten, traced and run with autocast off, whatever surrounds a call:
it would put casts where the rules' own arithmetic stands.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")


def autocasting() -> list[str]:
    """The types of devices for which autocast is on."""
    return [kind for kind in DEVICE_TYPES if torch.is_autocast_enabled(kind)]


@contextmanager
def without_autocast() -> Iterator[None]:
    """A context in which ops compute in the dtypes that they are given."""
    with ExitStack() as stack:
        for kind in autocasting():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield
