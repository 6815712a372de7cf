"""What the target's seed puts into the ledger: where it enters, and at the heads that it skips."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from attnlrp_fx.calculus.postings import Account
from attnlrp_fx.codegen.heads import head_of
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.targets import Seed

Seeds = Mapping[int, Sequence[Seed] | Tensor]


def of_outputs(seeds: Seeds, flat: Sequence[Any], rewritten: fx.GraphModule) -> dict[str, float]:
    """Σ y·c of each node that a target seeds.

    Args:
        seeds: by flat output the target's gradient.
        flat: the flat outputs.
        rewritten: the rewritten graph.
    """
    outputs = outputs_of(rewritten.graph)
    found: dict[str, float] = {}
    for i, seed in seeds.items():
        name = outputs[i].name
        found[name] = found.get(name, 0.0) + _weighted(seed, flat[i])
    return found


def of_heads(
    seeds: Seeds,
    flat: Sequence[Any],
    entries: Mapping[int, fx.Node],
    rewritten: fx.GraphModule,
    attributes: Mapping[str, Tensor],
) -> dict[tuple[str, Account], float]:
    """The postings of heads behind which seeds entered a program: no program has posted them.

    Args:
        seeds: by flat output the target's gradient.
        flat: the flat outputs.
        entries: by flat output the node at which its seed entered.
        rewritten: the rewritten graph.
        attributes: the model's tensors by name.
    """
    outputs = outputs_of(rewritten.graph)
    found: dict[tuple[str, Account], float] = {}
    for i, seed in seeds.items():
        head = head_of(outputs[i])
        if head is None or entries.get(i) is outputs[i]:
            continue
        given = outputs[i].args[3] if len(outputs[i].args) > 3 else outputs[i].kwargs.get("bias")
        kept = 0.0
        if isinstance(given, fx.Node) and given.op == "get_attr":
            kept = _weighted(seed, attributes[str(given.target)].expand(flat[i].shape))
            found[outputs[i].name, "bias"] = kept
        found[outputs[i].name, 0] = _weighted(seed, flat[i]) - kept
    return found


def _weighted(seeds: Sequence[Seed] | Tensor, output: Tensor) -> float:
    """Σ of an output's elements times a gradient, in float64."""
    if isinstance(seeds, Tensor):
        return float((output.double() * seeds.double()).sum())
    return sum(float((seed.of(output).double() * seed.weight.double()).sum()) for seed in seeds)
