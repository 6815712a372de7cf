"""Caveats: reasons to distrust an explanation, each with its figure and what to do about it.

They are measured while a graph runs op by op, with every value and coefficient at hand.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.calculus.tape import Tape
from attnlrp_fx.graph.provenance import module_path

CANCELS, FIRST, SATURATED, DIGITS = 10.0, 0.5, 0.5, 2.0
"""From where on there is a caveat: Σ|R| / |ΣR|, the first token's share of Σ|R|, the share of
queries whose softmax is saturated; and below how many digits."""
ONE_HOT = 0.999
"""A softmax is saturated where its largest weight exceeds this."""


@dataclass(frozen=True)
class Caveat:
    """One reason for distrust."""

    kind: str
    """"cancelling", "first token", "precision" or "saturated softmax"."""
    figure: float
    what: str
    """The finding in one sentence."""
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}; {self.remedy}"


def of_relevance(
    relevance: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
) -> list[Caveat]:
    """What relevance itself says: it cancels, or the first token has most of it.

    Args:
        relevance: by explained input, (batch, ...).
        masks: of token inputs, (batch, sequence): 0 for padding.
    """
    found = []
    for name, values in relevance.items():
        rows = values.double().flatten(1) if values.dim() > 1 else values.double()[:, None]
        gross, net = rows.abs().sum(1), rows.sum(1).abs()
        ratio = (
            float(torch.where(net > 0, gross / net.clamp(min=1e-300), torch.inf)[gross > 0].max())
            if bool((gross > 0).any())
            else 1.0
        )
        if ratio > CANCELS:
            found.append(
                Caveat(
                    "cancelling",
                    ratio,
                    f"relevance of '{name}' cancels: Σ|R| is {ratio:.3g} times |ΣR|",
                    "read it as for and against, not as shares of the target; rules with γ "
                    "(composite='attnlrp-vision'), or a Contrast target, cancel less",
                )
            )
        mask = (masks or {}).get(name)
        if values.dim() == 2 and values.shape[1] > 3:
            share = _share_of_first(rows.abs(), mask)
            if share > FIRST:
                found.append(
                    Caveat(
                        "first token",
                        share,
                        f"the first token takes {share:.0%} of Σ|R| of '{name}'",
                        "models park attention there (an attention sink): leave it out when tokens "
                        "are compared, or explain a Contrast, in which it mostly cancels",
                    )
                )
    return found


def _share_of_first(magnitudes: Tensor, mask: Tensor | None) -> float:
    """The largest share, over rows, of the first token that is no padding."""
    kept = torch.ones_like(magnitudes) if mask is None else (mask != 0).to(magnitudes)
    magnitudes = magnitudes * kept
    first = magnitudes.gather(1, kept.argmax(1, keepdim=True))[:, 0]
    total = magnitudes.sum(1)
    return float(torch.where(total > 0, first / total.clamp(min=1e-300), 0.0).max())


def of_softmax(tape: Tape) -> list[Caveat]:
    """Softmax that is one-hot nearly everywhere, of a tape that has run: the worst node."""
    worst: tuple[float, fx.Node] | None = None
    for node, call in tape.calls.items():
        if node.target is ops.attention:
            weights = _attention_weights(*call.args, **call.kwargs)
        elif node.target is ops.taylor and node.meta.get("kind") == "softmax":
            weights = tape.env[node].movedim(int(call.args[1]), -1)
            weights = weights if bool((weights >= 0).all()) else weights.exp()
        else:
            continue
        visible = (weights > 0).sum(-1) > 1
        if bool(visible.any()):
            share = float((weights.amax(-1)[visible] > ONE_HOT).double().mean())
            worst = max(worst or (share, node), (share, node), key=lambda found: found[0])
    if worst is None or worst[0] <= SATURATED:
        return []
    share, node = worst
    return [
        Caveat(
            "saturated softmax",
            share,
            f"{share:.0%} of the softmax rows in {module_path(node) or node.name} are saturated: "
            f"one weight is above {ONE_HOT}",
            "its derivative is nearly 0 there, so that queries and keys get next to nothing: "
            "use composite='best', which integrates it from zero, or compare with "
            "composite='cp-lrp', which holds the weights constant",
        )
    ]


def _attention_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The weights that a fused attention does not return, (..., queries, keys)."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = (query.float() @ key.float().transpose(-2, -1)) * (
        1 / math.sqrt(query.shape[-1]) if scale is None else scale
    )
    if is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, -1).nan_to_num(0.0)


def digits_kept(
    relevance: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> dict[str, float]:
    """Decimal digits in which relevance agrees with that of a wider dtype, by explained input:
    −log₁₀ of the largest difference over the largest relevance."""
    found = {}
    for name, values in relevance.items():
        wide = reference[name].double()
        largest = float(wide.abs().max())
        error = float((values.double() - wide).abs().max())
        found[name] = 17.0 if error == 0 else max(0.0, -math.log10(error / (largest or error)))
    return found


def of_digits(digits: Mapping[str, float], dtype: torch.dtype) -> list[Caveat]:
    """Relevance of which fewer than two digits are left."""
    return [
        Caveat(
            "precision",
            kept,
            f"relevance of '{name}' agrees with {str(dtype).removeprefix('torch.')} in "
            f"{kept:.1f} digits",
            f"explain with the model in {str(dtype).removeprefix('torch.')}: model.to({dtype})",
        )
        for name, kept in digits.items()
        if kept < DIGITS
    ]
