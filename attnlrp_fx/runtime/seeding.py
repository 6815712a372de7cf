"""Seeding: a target's gradient with respect to the outputs, and where it enters a program.

Most targets know their gradient, a few numbers at one place of each row; one that is a function of
the outputs is differentiated. Behind a head the gradient enters as a few rows of its weights.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.codegen.heads import head_of
from attnlrp_fx.codegen.schedule import Schedule
from attnlrp_fx.errors import TargetError
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.neurons import LATENT
from attnlrp_fx.targets import (
    Chosen,
    Convention,
    LatentPlaces,
    Outputs,
    Seed,
    Target,
    dense,
    outputs_as_seen,
)

Seeds = dict[int, "list[Seed] | Tensor"]
"""By flat output a target's gradient: a list of `Seed`, or a tensor of the output's shape."""


def seeds_of(
    target: Target,
    rewritten: fx.GraphModule,
    convention: Convention,
    flat: Sequence[Any],
    given: Mapping[str, Tensor],
    latent: LatentPlaces | None = None,
    seen: Outputs | None = None,
) -> tuple[Chosen, Seeds]:
    """The target, and its gradient with respect to each output that it reads.

    Args:
        target: what is explained.
        rewritten: the rewritten graph.
        convention: what is known of its outputs.
        flat: the flat outputs.
        given: the inputs.
        latent: where latent values are among the flat outputs.
        seen: the outputs as targets see them, if that is known.

    Raises:
        TargetError: it reads none, or one that nothing explained leads to.
    """
    chosen = target.choose(seen or outputs_as_seen(convention, flat, given, latent))
    places = {name: i for i, name in enumerate(convention.output_names)}
    places |= {LATENT + name: i for name, (i, _) in (latent or {}).items()}
    seeds: Seeds = {}
    for seed in chosen.seeds:
        some = seeds.setdefault(places[seed.output], [])
        assert isinstance(some, list)
        some.append(seed)
    if not seeds:
        chosen, seeds = _differentiated(target, convention, flat, given)
    outputs = outputs_of(rewritten.graph)
    for i in seeds:
        if not ops.is_explained(outputs[i]):
            raise TargetError(
                f"output '{convention.output_names[i]}' does not depend on what is explained",
                remedy="choose another output, or explain other inputs",
            )
    return chosen, seeds


def _differentiated(
    target: Target, convention: Convention, flat: Sequence[Any], given: Mapping[str, Tensor]
) -> tuple[Chosen, Seeds]:
    """A target that does not know its own gradient, and its gradient."""
    with torch.enable_grad():
        watched = list(flat)
        floating = [i for i, v in enumerate(flat) if _is_floating(v)]
        for i in floating:
            watched[i] = flat[i].detach().requires_grad_()
        chosen = target.choose(outputs_as_seen(convention, watched, given))
        if not chosen.value.requires_grad:
            raise TargetError(
                "the target does not depend on the model's floating outputs",
                where=str(target),
                remedy="compute it from them, without detaching",
            )
        leaves = [watched[i] for i in floating]
        found = torch.autograd.grad(chosen.value.sum(), leaves, allow_unused=True)
    return chosen, {i: s for i, s in zip(floating, found, strict=True) if s is not None}


def entering(
    made: Schedule, seeds: Seeds, flat: Sequence[Any], attributes: Mapping[str, Tensor]
) -> list[Tensor]:
    """The seed of each explained output where it enters: there, or behind its head."""
    outputs, found = outputs_of(made.rewritten.graph), []
    for i, node in made.seeded.items():
        head = head_of(outputs[i]) if node is not outputs[i] else None
        if head is None:
            found.append(dense(seeds.get(i, ()), flat[i]))
        else:
            found.append(head.pull(seeds.get(i, ()), attributes[head.weight], flat[i]))
    return found


def kinds_of(targets: Sequence[Target]) -> tuple[Any, ...]:
    """Targets of the same kinds read the same outputs."""
    return tuple(dict.fromkeys(_kind(target) for target in targets))


def _kind(target: Target) -> tuple[Any, ...]:
    return (
        type(target),
        getattr(target, "output", getattr(target, "site", None)),
        getattr(target, "index", None) is None,
        getattr(target, "function", None),
    )


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
