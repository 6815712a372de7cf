"""Masking: a rewritten graph run with parts of what it explains set to zero.

Of a token it is the looked-up embedding that is zero, wherever that is read, as in perturbation
tests of explanations (Achtibat et al. 2024); of a floating input, the element itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.calculus.tape import Runner
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.provenance import describe


class Masked(Runner):
    """Interpreter of a rewritten graph that keeps some of its sources' elements.

    Args:
        rewritten: the rewritten graph.
        keep: by explained input, bool, in the shape of its relevance or one that broadcasts to it:
            false where the value is zero.
        attributes: as in `Runner`.
        device: as in `Runner`.
    """

    def __init__(
        self,
        rewritten: fx.GraphModule,
        keep: Mapping[str, Tensor],
        attributes: Mapping[str, Any],
        device: torch.device | None,
    ) -> None:
        super().__init__(rewritten, attributes, device)
        self.keep = keep

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        keep = self.keep.get(str(n.kwargs["name"])) if n.target is ops.source else None
        if keep is None:
            return value
        ids = n.kwargs.get("ids")
        if isinstance(ids, fx.Node):
            keep = _of_features(keep, self.env[ids], value, n)
        return torch.where(keep, value, 0)


def _of_features(keep: Tensor, ids: Tensor, value: Tensor, node: fx.Node) -> Tensor:
    """A mask of indices as one of what they looked up."""
    if keep.numel() != ids.numel():
        raise InputError(
            f"the tokens of '{node.kwargs['name']}' cannot be masked",
            where=describe(node),
            why="the model cuts or repeats them before it looks them up",
            remedy="explain the embeddings (inputs_embeds) instead",
        )
    kept: Sequence[int] = node.kwargs.get("keep") or range(ids.dim())  # type: ignore[assignment]
    shape = [size if d in kept else 1 for d, size in enumerate(value.shape)]
    return keep.reshape(shape)
