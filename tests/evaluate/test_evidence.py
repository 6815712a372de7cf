"""Metrics of known evidence and intervals, against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from attnlrp_fx import InputError
from attnlrp_fx.evaluate import (
    evidence_share,
    intersection_over_union,
    interval,
    paired_difference,
    rank_accuracy,
    top1_in_evidence,
)

RELEVANCE = torch.tensor([[5.0, 4.0, 3.0, -9.0, 0.0], [1.0, 2.0, 8.0, 4.0, 5.0]])
EVIDENCE = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()


def test_by_hand():
    """Row 0: the highest three are 0, 1, 2, two of them evidence; row 1: exactly the evidence."""
    assert top1_in_evidence(RELEVANCE, EVIDENCE).tolist() == [0.0, 1.0]
    assert rank_accuracy(RELEVANCE, EVIDENCE).tolist() == [2 / 3, 1.0]
    assert intersection_over_union(RELEVANCE, EVIDENCE).tolist() == [2 / 4, 1.0]
    torch.testing.assert_close(
        evidence_share(RELEVANCE, EVIDENCE), torch.tensor([7 / 12, 13 / 20]).double()
    )


def test_candidates_are_all_that_compete():
    """Without place 0, which is the question, row 0 is right as well."""
    candidates = torch.ones_like(EVIDENCE)
    candidates[:, 0] = False
    assert top1_in_evidence(RELEVANCE, EVIDENCE, candidates).tolist() == [1.0, 1.0]
    shares = evidence_share(RELEVANCE, EVIDENCE, candidates)
    torch.testing.assert_close(shares, torch.tensor([1.0, 13 / 19]).double())


def test_the_pointing_game():
    """A hit two pixels beside the object counts with a tolerance of two."""
    relevance = torch.zeros(1, 6, 6)
    relevance[0, 3, 5] = 1
    evidence = torch.zeros(1, 6, 6, dtype=torch.bool)
    evidence[0, 3, 3] = True
    assert top1_in_evidence(relevance, evidence, tolerance=2).tolist() == [1.0]
    assert top1_in_evidence(relevance, evidence, tolerance=1).tolist() == [0.0]


def test_chance_is_the_share_of_evidence():
    torch.manual_seed(0)
    evidence = torch.rand(4000, 10) < 0.3
    evidence[:, 0] = True
    relevance = torch.randn(4000, 10)
    hits = top1_in_evidence(relevance, evidence) - evidence.double().mean(1)
    assert not interval(hits).excludes_zero


def test_intervals_cover_as_often_as_they_say():
    """Of 200 samples of a known mean, about 95 % of the intervals hold it."""
    draw = np.random.default_rng(0)
    found = [interval(draw.exponential(1.0, 60).tolist()) for _ in range(200)]
    covered = sum(one.low <= 1 <= one.high for one in found) / 200
    assert 0.90 <= covered <= 0.98
    assert all(math.isclose(one.reach, 0.25, rel_tol=0.8) for one in found)


def test_pairs_are_told_apart_where_intervals_overlap():
    draw = np.random.default_rng(0)
    a = draw.normal(0, 1, 50)
    b = a - 0.1 + draw.normal(0, 0.1, 50)
    assert interval(a.tolist()).low < interval(b.tolist()).high
    assert paired_difference(a.tolist(), b.tolist()).low > 0
    assert interval([2.0, 2.0]).reach == 0


def test_errors():
    with pytest.raises(InputError, match="row 1 has no evidence"):
        top1_in_evidence(RELEVANCE, EVIDENCE & torch.tensor([[True], [False]]))
    with pytest.raises(InputError, match="evidence has shape"):
        rank_accuracy(RELEVANCE, EVIDENCE[:, :4])
    with pytest.raises(InputError, match="no image"):
        top1_in_evidence(RELEVANCE, EVIDENCE, tolerance=1)
    with pytest.raises(InputError, match="pair them"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(InputError, match="an interval of"):
        interval([])
