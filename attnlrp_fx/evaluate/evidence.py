"""Explanations against evidence that is known: the answer's span, an object's pixels.

Each function takes relevance and evidence (batch, places), or with more dimensions, and returns one
number a row. `candidates` are the places that compete, the context without the question, say.
"""

import torch
from torch import Tensor

from attnlrp_fx.errors import InputError


def top1_in_evidence(
    relevance: Tensor, evidence: Tensor, candidates: Tensor | None = None, *, tolerance: int = 0
) -> Tensor:
    """1 where the most relevant place is evidence, 0 where it is not.

    Of images this is the pointing game (Zhang et al. 2018): `tolerance` is how many pixels the hit
    may lie beside the object.

    Raises:
        InputError: shapes differ, or a row has no evidence.
    """
    flat, known = _flat(relevance, evidence, candidates)
    if tolerance:
        if evidence.dim() != 3:
            raise InputError(
                f"evidence of shape {tuple(evidence.shape)} is no image",
                remedy="leave tolerance out, or pass (batch, height, width)",
            )
        size = 2 * tolerance + 1
        grown = torch.nn.functional.max_pool2d(evidence[:, None].float(), size, 1, tolerance)
        known = grown[:, 0].flatten(1) > 0
    return known.gather(1, flat.argmax(1, keepdim=True))[:, 0].double()


def intersection_over_union(
    relevance: Tensor, evidence: Tensor, candidates: Tensor | None = None
) -> Tensor:
    """Of the k most relevant places and k places of evidence, those in both over those in either.

    Raises:
        InputError: shapes differ, or a row has no evidence.
    """
    flat, known = _flat(relevance, evidence, candidates)
    both = (_highest(flat, known.sum(1)) & known).sum(1).double()
    return both / (2 * known.sum(1) - both)


def rank_accuracy(relevance: Tensor, evidence: Tensor, candidates: Tensor | None = None) -> Tensor:
    """The share of evidence among the k most relevant places, k places being evidence.

    Arras et al. 2022 (CLEVR-XAI), relevance rank accuracy.

    Raises:
        InputError: shapes differ, or a row has no evidence.
    """
    flat, known = _flat(relevance, evidence, candidates)
    return (_highest(flat, known.sum(1)) & known).sum(1).double() / known.sum(1)


def evidence_share(relevance: Tensor, evidence: Tensor, candidates: Tensor | None = None) -> Tensor:
    """The share of positive relevance that lies on evidence; 0 where none is positive.

    Arras et al. 2022, relevance mass accuracy.

    Raises:
        InputError: shapes differ, or a row has no evidence.
    """
    flat, known = _flat(relevance, evidence, candidates)
    positive = flat.clamp(min=0).double()
    return (positive * known).sum(1) / positive.sum(1).clamp(min=torch.finfo(torch.float64).tiny)


def _flat(relevance: Tensor, evidence: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
    """Relevance and evidence as (batch, places), what does not compete at −∞."""
    for name, other in (("evidence", evidence), ("candidates", candidates)):
        if other is not None and other.shape != relevance.shape:
            raise InputError(
                f"{name} has shape {tuple(other.shape)}, relevance {tuple(relevance.shape)}",
                remedy="pass both with one number a token or pixel",
            )
    known = evidence.flatten(1).bool()
    if not bool(known.any(1).all()):
        row = int((~known.any(1)).nonzero()[0])
        raise InputError(f"row {row} has no evidence", remedy="leave it out")
    flat = relevance.flatten(1)
    if candidates is not None:
        flat = flat.masked_fill(~candidates.flatten(1).bool(), -torch.inf)
    return flat, known


def _highest(flat: Tensor, counts: Tensor) -> Tensor:
    """(batch, places) bool: as many of the highest of each row as it has evidence."""
    order = flat.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(flat.shape[1], device=flat.device).expand_as(flat)
    return torch.empty_like(order).scatter_(1, order, places) < counts[:, None]
