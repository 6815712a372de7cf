"""Constants that are broadcast over a batch, where the batch's dimensions are regrouped.

A mask of shape (windows, 1, rows, columns) belongs to scores of shape (images, windows, heads,
rows, columns). Where these are computed as (images · windows, heads, rows, columns), the mask is
brought there by an expand and a reshape. Sizes are compared as text; where one depends on the
inputs, it is taken from a node that has it.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from attnlrp_fx.graph.matrix_products import NearMiss, shape_of
from attnlrp_fx.graph.operators import aten, leaves

Size = int | fx.Node | tuple[fx.Node, int]
"""A number, the node that computes it, or a tensor and which of its dimensions has it."""
View = tuple[Any, tuple[Size, ...]]
"""An op, expand or reshape, and the sizes that it gives."""


def views_between(
    operand: Any, here: tuple[str, ...], there: tuple[str, ...], sizes: Mapping[str, Size]
) -> tuple[View, ...]:
    """The views that bring a constant of scores whose batch is here to the batch there.

    What is broadcast over all dimensions that are regrouped stays so; else it is repeated.
    """
    shape = shape_of(operand) if isinstance(operand, fx.Node) else ()
    if here == there or len(shape) <= 2:
        return ()
    sizes = {**sizes, **{text: (operand, d) for d, text in enumerate(shape)}}
    batch = ("1",) * (len(here) + 2 - len(shape)) + shape[:-2]
    head = _common(here, there)
    tail = _common(here[head:][::-1], there[head:][::-1])
    regrouped = slice(head, len(here) - tail)
    ends = batch[:head], (*batch[len(here) - tail :], *shape[-2:])
    new = there[head : len(there) - tail]
    wanted = []
    if set(batch[regrouped]) <= {"1"}:
        new = ("1",) * len(new)
    elif batch[regrouped] != here[regrouped]:
        wanted.append((aten.expand.default, (*ends[0], *here[regrouped], *ends[1])))
    wanted.append((aten.reshape.default, (*ends[0], *new, *ends[1])))
    return tuple((op, tuple(size_of(text, sizes) for text in texts)) for op, texts in wanted)


def known_sizes(tensors: Sequence[fx.Node], but_not: Sequence[fx.Node]) -> dict[str, Size]:
    """Where sizes that depend on the inputs are to be had, before the last of some nodes.

    Tensors are asked first; those nodes, which are to go, are not.
    """
    found: dict[str, Size] = {}
    for tensor in tensors:
        found |= {text: (tensor, d) for d, text in enumerate(shape_of(tensor))}
    last = but_not[-1]
    for node in takewhile(lambda node: node is not last, last.graph.nodes):
        asked = set(leaves(node.args)) & set(but_not)
        if isinstance(node.meta.get("val"), torch.SymInt) and not asked:
            found.setdefault(str(node.meta["val"]), node)
    return found


def size_of(text: str, sizes: Mapping[str, Size]) -> Size:
    """Where a size is to be had."""
    if text.isdigit():
        return int(text)
    if text not in sizes:
        raise NearMiss(f"the scores have a batch of {text}, which nothing else has")
    return sizes[text]


def _common(first: Sequence[str], second: Sequence[str]) -> int:
    """How many sizes two shapes begin with alike."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
