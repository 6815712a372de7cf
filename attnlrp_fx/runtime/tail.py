"""A model from one of its explained values on, to be perturbed and differentiated.

Of token inputs the explained value is the embedding's output, of floating inputs the input. Every
row's target is known beforehand, so that a score is one number a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.runtime.modes import computing
from attnlrp_fx.targets import Chosen, Outputs, Target

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Tail:
    """The two parts of a model before and behind an explained value."""

    name: str
    """The input that the value stands for."""
    features: tuple[int, ...]
    """Dimensions of the value that a token's relevance is summed over."""
    head: fx.GraphModule
    rest: fx.GraphModule
    compiled: Callable[..., Any]
    """`rest`, as it is or compiled."""
    check: Callable[[Inputs], dict[str, Tensor]]
    """A call's inputs, checked and in order, with all that the graph takes."""
    outputs: Callable[[Any, Inputs], Outputs]
    """Flat outputs and inputs → what targets see."""

    def values(self, inputs: Inputs) -> Tensor:
        """The explained value of a batch, of tokens (batch, length, features), without gradient."""
        with computing():
            found: Tensor = self.head(*self.check(inputs).values())
        return found

    def choose(self, values: Tensor, inputs: Inputs, target: Target) -> Chosen:
        """The target where the explained value is another one; autograd can follow.

        Args:
            values: like what `values` returns, of the inputs' batch.
            inputs: everything else that the model reads.
            target: what is explained, a class or token named for each row.
        """
        return self.choose_by(self.compiled, values, inputs, target, differentiable=True)

    def choose_by(
        self,
        run: Callable[..., Any],
        values: Tensor,
        inputs: Inputs,
        target: Target,
        *,
        differentiable: bool = False,
    ) -> Chosen:
        """The same where the graph is run by something else, an interpreter that changes it, say.

        Args:
            run: called with what `rest` takes, returns flat outputs.
            values: as in `choose`.
            inputs: as in `choose`.
            target: as in `choose`.
            differentiable: whether autograd follows.
        """
        given = self.check(inputs)
        with computing(differentiable):
            flat = run(*given.values(), values)
            return target.choose(self.outputs(flat, given))

    def summed(self, relevance: Tensor) -> Tensor:
        """Something in the value's shape, summed over features: in the shape of relevance."""
        return relevance.sum(self.features) if self.features else relevance

    def spread(self, mask: Tensor) -> Tensor:
        """Something in the shape of relevance, as it broadcasts to the value."""
        for dim in self.features:
            mask = mask.unsqueeze(dim)
        return mask


def compiled_tail(rest: fx.GraphModule, backend: Any) -> Callable[..., Any]:
    """The tail as it runs: "eager" as it is, or through `torch.compile`."""
    if backend == "eager":
        return rest
    compiled: Callable[..., Any] = torch.compile(rest, backend=backend, dynamic=True)
    return compiled
