"""Losses of relevance: scalars to add to a task's loss, one formula each.

All take relevance R (batch, ...), as it comes out of an explainer that was compiled with
`differentiable=True`, with any dimensions behind the batch, which count as one, of n elements; and
masks and maps that broadcast to it. All return a scalar, the mean over rows, in the dtype of the
relevance (float32 or better).

Relevance scales with the explained value. A loss of R itself is also made small by small logits; a
loss of shares of it is not.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlrp_fx.errors import InputError


def outside_mask(relevance: Tensor, mask: Tensor) -> Tensor:
    """Relevance where there should be none: Σ_i (1 − m_i) R_i².

    "Right for the right reasons" (Ross, Hughes and Doshi-Velez 2017, arXiv 1703.03717, eq. 1), with
    relevance in place of the input's gradient.

    Args:
        relevance: (batch, ...).
        mask: true, or 1, where relevance may lie; broadcasts to relevance.

    Raises:
        InputError: the shapes do not fit.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import outside_mask
        >>> outside_mask(torch.tensor([[2.0, -1.0, 3.0]]), torch.tensor([True, False, False]))
        tensor(10.)
    """
    rows, (inside,) = _rows(relevance, mask)
    return (rows.square() * (1 - inside)).sum(1).mean()


def share_outside(relevance: Tensor, mask: Tensor) -> Tensor:
    """The share of relevance where there should be none: Σ_i (1 − m_i) |R_i| / Σ_i |R_i|.

    `outside_mask` on shares, in [0, 1]: no smaller for smaller logits. A row without relevance has
    no share outside.

    Args:
        relevance: (batch, ...).
        mask: true, or 1, where relevance may lie; broadcasts to relevance.

    Raises:
        InputError: the shapes do not fit.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import share_outside
        >>> share_outside(torch.tensor([[2.0, -1.0, 1.0]]), torch.tensor([True, False, True]))
        tensor(0.2500)
    """
    rows, (inside,) = _rows(relevance, mask)
    return (_shares(rows) * (1 - inside)).sum(1).mean()


def alignment(relevance: Tensor, wanted: Tensor) -> Tensor:
    """How far relevance is from a given map: 1 − cos(R, M) = ½ ‖R/‖R‖ − M/‖M‖‖².

    The squared distance of Liu and Avci 2019 (arXiv 1906.08286), of unit vectors, so that the map
    says where relevance should lie and not how much. In [0, 2]; 1 for a row without relevance.

    Args:
        relevance: (batch, ...).
        wanted: the map M, of any scale; broadcasts to relevance.

    Raises:
        InputError: the shapes do not fit.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import alignment
        >>> alignment(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.4000)
    """
    rows, (goal,) = _rows(relevance, wanted)
    return (1 - (F.normalize(rows, dim=1) * F.normalize(goal, dim=1)).sum(1)).mean()


def consistency(relevance: Tensor, other: Tensor) -> Tensor:
    """How unlike the relevance of two inputs is that should be explained alike: 1 − cos(R, R').

    Of an input and a changed one (Guo et al. 2019, "Visual attention consistency under image
    transforms for multi-label image classification", CVPR), both brought to one frame beforehand: a
    mirrored image's relevance mirrored back. Gradients go to both.

    Args:
        relevance: (batch, ...).
        other: of the same shape.

    Raises:
        InputError: the shapes do not fit.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import consistency
        >>> image, mirrored = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 3.0]]])
        >>> consistency(image, mirrored.flip(-1))
        tensor(0.4000)
    """
    if relevance.shape != other.shape:
        raise InputError(
            f"relevance {tuple(relevance.shape)} and {tuple(other.shape)} cannot be compared",
            remedy="bring both to the same frame",
        )
    return alignment(relevance, other)


def sparsity(relevance: Tensor, mask: Tensor | None = None) -> Tensor:
    """How evenly relevance is spread: (‖R‖₁/‖R‖₂ − 1) / (√n − 1), 0 on one element, 1 on all alike.

    One minus the sparseness of Hoyer 2004 (JMLR 5, "Non-negative matrix factorization with
    sparseness constraints"); it does not depend on the scale.

    Args:
        relevance: (batch, ...).
        mask: true, or 1, for the n elements that count, as those that are no padding; None: all.

    Raises:
        InputError: the shapes do not fit.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import sparsity
        >>> sparsity(torch.tensor([[0.0, 5.0, 0.0, 0.0]])), sparsity(torch.ones(1, 4))
        (tensor(0.), tensor(1.))
    """
    ones = torch.ones_like(relevance) if mask is None else mask
    rows, (counts,) = _rows(relevance, ones)
    n = counts.sum(1)
    spread = F.normalize(rows * counts, dim=1).abs().sum(1)
    return ((spread - 1) / (n.sqrt() - 1).clamp(min=torch.finfo(rows.dtype).eps)).clamp(0).mean()


def background(relevance: Tensor, mask: Tensor, *, decay: float = 1.0, soft: float = 1.0) -> Tensor:
    """Attention to the background: −log(1 − b/(b + E)) = log(1 + b/E), b its pooled relevance.

    ISNet's background loss (Bassi, Dertkigil and Cavalli 2024, Nature Communications 15:291): |R|
    of the background over its mean on the foreground, in descending order weighted by dᵏ (global
    weighted ranked pooling), squashed by b/(b + E), and a cross-entropy against none.

    Args:
        relevance: (batch, ...).
        mask: true, or 1, for the foreground; broadcasts to relevance.
        decay: d, in (0, 1]: 1 takes the mean over the background, less counts its hot spots more.
        soft: E, the background's relevance in units of the foreground's mean that counts as half.

    Raises:
        InputError: the shapes or the options do not fit.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import background
        >>> background(torch.tensor([[2.0, -1.0, 1.0]]), torch.tensor([True, False, False]))
        tensor(0.4055)
    """
    if not 0 < decay <= 1 or soft <= 0:
        raise InputError(
            f"decay is {decay} and soft {soft}", remedy="use decay in (0, 1] and soft above 0"
        )
    rows, (inside,) = _rows(relevance, mask)
    magnitude, tiny = rows.abs(), torch.finfo(rows.dtype).tiny
    within = (magnitude * inside).sum(1) / inside.sum(1).clamp(min=1)
    ranked = (magnitude * (1 - inside)).sort(1, descending=True).values
    # Only as many ranks count as the background has elements.
    ranks = torch.arange(rows.shape[1], device=rows.device)
    weights = decay ** ranks.to(rows.dtype) * (ranks < (1 - inside).sum(1, keepdim=True))
    pooled = (ranked * weights).sum(1) / weights.sum(1).clamp(min=tiny)
    return torch.log1p(pooled / (within.clamp(min=tiny) * soft)).mean()


def foreground(relevance: Tensor, mask: Tensor, *, least: float, most: float) -> Tensor:
    """Foreground relevance out of range: ((least − f)⁺ + (f − most)⁺)² / least², f = Σ m_i |R_i|.

    ISNet's foreground loss (Bassi et al. 2024, as in `background`): beside a background loss, whose
    unit is the foreground's relevance, it keeps that from vanishing or growing without bounds.

    Args:
        relevance: (batch, ...).
        mask: true, or 1, for the foreground; broadcasts to relevance.
        least: the least relevance that it should have, above 0.
        most: the most.

    Raises:
        InputError: the shapes or the range do not fit.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import foreground
        >>> foreground(torch.tensor([[2.0, -1.0]]), torch.tensor([True, True]), least=1, most=2)
        tensor(1.)
    """
    if not 0 < least <= most:
        raise InputError(f"the range is {least} to {most}", remedy="use 0 < least <= most")
    rows, (inside,) = _rows(relevance, mask)
    found = (rows.abs() * inside).sum(1)
    beyond = (least - found).clamp(min=0) + (found - most).clamp(min=0)
    return (beyond / least).square().mean()


def _rows(relevance: Tensor, *others: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Relevance as (batch, n), and what belongs to it in its shape and dtype."""
    if relevance.dim() < 2:
        raise InputError(f"relevance has shape {tuple(relevance.shape)}, not (batch, ...)")
    found = []
    for other in others:
        try:
            spread = torch.broadcast_to(other, relevance.shape)
        except RuntimeError as error:
            raise InputError(
                f"a mask or map of shape {tuple(other.shape)} does not fit relevance "
                f"of shape {tuple(relevance.shape)}",
                remedy="give it a shape that broadcasts: (batch, 1, height, width) for images",
            ) from error
        found.append(spread.to(relevance.device, relevance.dtype).flatten(1))
    return relevance.flatten(1), found


def _shares(rows: Tensor) -> Tensor:
    magnitude = rows.abs()
    return magnitude / magnitude.sum(1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
