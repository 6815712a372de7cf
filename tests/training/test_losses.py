"""Losses of relevance, against their formulas written out element by element."""

import math

import pytest
import torch
from torch import Tensor

from attnlrp_fx import InputError
from attnlrp_fx.training import (
    alignment,
    background,
    consistency,
    foreground,
    outside_mask,
    share_outside,
    sparsity,
)

R = torch.tensor([[0.5, -2.0, 3.0, 0.0, 1.5], [-1.0, 0.25, -0.5, 4.0, 0.0]], dtype=torch.float64)
M = torch.tensor([[1, 0, 1, 0, 0], [1, 1, 0, 0, 1]], dtype=torch.bool)
GOAL = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0], dtype=torch.float64)


def rows() -> list[tuple[list[float], list[bool]]]:
    return list(zip(R.tolist(), M.tolist(), strict=True))


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_outside_mask():
    expected = mean(sum(r * r for r, m in zip(*row, strict=True) if not m) for row in rows())
    assert float(outside_mask(R, M)) == pytest.approx(expected, rel=1e-12)


def test_share_outside():
    expected = mean(
        sum(abs(r) for r, m in zip(*row, strict=True) if not m) / sum(map(abs, row[0]))
        for row in rows()
    )
    assert float(share_outside(R, M)) == pytest.approx(expected, rel=1e-12)
    assert float(share_outside(1e-3 * R, M)) == pytest.approx(expected, rel=1e-12)


def test_alignment():
    goal = GOAL.tolist()
    expected = mean(
        1
        - sum(r * g for r, g in zip(row, goal, strict=True))
        / math.dist(row, [0] * 5)
        / math.dist(goal, [0] * 5)
        for row in R.tolist()
    )
    assert float(alignment(R, GOAL)) == pytest.approx(expected, rel=1e-12)
    assert float(alignment(3 * R, R)) == pytest.approx(0, abs=1e-12)
    assert float(alignment(R, -R)) == pytest.approx(2)


def test_consistency():
    assert float(consistency(R, R.flip(1))) == pytest.approx(float(alignment(R, R.flip(1))))
    with pytest.raises(InputError, match="cannot be compared"):
        consistency(R, R[:, :4])


def test_sparsity():
    def spread(values: list[float]) -> float:
        n, length = len(values), math.dist(values, [0] * len(values))
        return (sum(map(abs, values)) / length - 1) / (math.sqrt(n) - 1)

    assert float(sparsity(R)) == pytest.approx(mean(map(spread, R.tolist())), rel=1e-12)
    left = [[r for r, m in zip(*row, strict=True) if m] for row in rows()]
    assert float(sparsity(R, M)) == pytest.approx(mean(map(spread, left)), rel=1e-12)
    assert float(sparsity(torch.ones(2, 1))) == 0


def test_background():
    def attention(values: list[float], mask: list[bool], decay: float, soft: float) -> float:
        inside = [abs(r) for r, m in zip(values, mask, strict=True) if m]
        behind = sorted((abs(r) for r, m in zip(values, mask, strict=True) if not m), reverse=True)
        weights = [decay**k for k in range(len(behind))]
        pooled = sum(w * r for w, r in zip(weights, behind, strict=True)) / sum(weights)
        b = pooled / mean(inside)
        return -math.log(1 - b / (b + soft))

    for decay, soft in ((1.0, 1.0), (0.7, 2.5)):
        expected = mean(attention(*row, decay, soft) for row in rows())
        assert float(background(R, M, decay=decay, soft=soft)) == pytest.approx(expected, rel=1e-12)
    for wrong in ({"decay": 0.0}, {"decay": 1.5}, {"soft": 0.0}):
        with pytest.raises(InputError, match="use decay in"):
            background(R, M, **wrong)


def test_foreground():
    expected = mean(
        (max(2 - f, 0) + max(f - 3, 0)) ** 2 / 4
        for f in (sum(abs(r) for r, m in zip(*row, strict=True) if m) for row in rows())
    )
    assert expected > 0
    assert float(foreground(R, M, least=2, most=3)) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="0 < least <= most"):
        foreground(R, M, least=3, most=2)


LOSSES = {
    "outside_mask": lambda r: outside_mask(r, M),
    "share_outside": lambda r: share_outside(r, M),
    "alignment": lambda r: alignment(r, GOAL),
    "consistency": lambda r: consistency(r, R.to(r.dtype)),
    "sparsity": sparsity,
    "background": lambda r: background(r, M, decay=0.9),
    "foreground": lambda r: foreground(r, M, least=2, most=3),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    """Right where relevance is, and finite where there is none at all."""
    loss = LOSSES[name]
    moved = (R + torch.linspace(0.1, 0.2, 10, dtype=R.dtype).reshape(2, 5)).requires_grad_()
    assert torch.autograd.gradcheck(loss, (moved,))
    nothing = torch.zeros(2, 5, requires_grad=True)
    value: Tensor = loss(nothing)
    (gradient,) = torch.autograd.grad(value, nothing)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


def test_masks_broadcast_to_images():
    image, mask = R.reshape(2, 1, 5).expand(2, 3, 5), M.reshape(2, 1, 5)
    assert float(outside_mask(image, mask)) == pytest.approx(3 * float(outside_mask(R, M)))
    with pytest.raises(InputError, match="does not fit relevance"):
        outside_mask(R, M[:, :3])
    with pytest.raises(InputError, match=r"not \(batch, ...\)"):
        sparsity(R[0])
