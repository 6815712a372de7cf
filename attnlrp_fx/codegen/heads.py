"""Heads: the linear layer behind which an output stands, taken back for a few classes alone.

A target reads few of a vocabulary's logits, at one position of each row. What its seed becomes at
the input of the projection is a weighted sum of as many rows of the projection's weights; a program
that starts there never reads the rest of that matrix on its way back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import aten
from attnlrp_fx.targets import Seed


@dataclass(frozen=True)
class Head:
    """A projection whose output the model returns."""

    projected: fx.Node
    """The explained value that it projects, (..., features)."""
    weight: str
    """The name of its weights, (classes, features)."""

    def pull(self, seeds: Sequence[Seed] | Tensor, weight: Tensor, output: Tensor) -> Tensor:
        """The coefficient of what is projected.

        Args:
            seeds: at the projection's output; a tensor is the whole gradient.
            weight: (classes, features).
            output: the projection's output, (batch, ..., classes); only its shape is read.

        Returns:
            (batch, ..., features), in the dtype of the weights.
        """
        if isinstance(seeds, Tensor):
            return (seeds @ weight).contiguous()
        classes, features = weight.shape
        batch, places = output.shape[0], output[0, ..., 0].numel()
        wide = torch.promote_types(weight.dtype, torch.float32)
        found = torch.zeros(batch, places, features, dtype=wide, device=weight.device)
        for seed in seeds:
            if seed.index is None and seed.position is None and places > 1:
                found += seed.dense(output).to(wide).reshape(batch, places, classes) @ weight.to(
                    wide
                )
                continue
            place, rows = _rows(seed, weight.to(wide) if seed.index is None else weight)
            where = place[..., None].expand(rows.shape)
            found.scatter_add_(1, where, rows.to(wide))
        return found.reshape(*output.shape[:-1], features).to(weight.dtype)


def _rows(seed: Seed, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where a seed's rows belong, (batch, K), and what they are, (batch, K, features)."""
    position = seed.position
    if seed.index is None:
        if position is None:
            batch = seed.weight.shape[0]  # which `len` would make a number while it is traced
            position = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        return position[:, None], (seed.weight.to(weight.dtype) @ weight)[:, None]
    rows = weight[seed.index % len(weight)] * seed.weight[..., None]
    if position is None:
        return seed.index // len(weight), rows
    return position[:, None].expand_as(seed.index), rows


def head_of(output: Any) -> Head | None:
    """The head of a rewritten graph's output; None if none of a plain rule stands there."""
    if not isinstance(output, fx.Node) or output.target not in (ops.linear, ops.gradient):
        return None
    op, *arguments = output.args
    if op is not aten.linear.default or output.kwargs.get("epsilon"):
        return None
    projected, weight = arguments[:2]
    if not isinstance(projected, fx.Node) or not isinstance(weight, fx.Node):
        return None
    explained = [node for node in output.all_input_nodes if ops.is_explained(node)]
    if weight.op != "get_attr" or explained != [projected]:
        return None
    return Head(projected, str(weight.target))
