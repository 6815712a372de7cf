"""Clever Hans at a tiny size: a planted token is used, unless relevance is trained away."""

import random
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
GOOD = "great wonderful funny beautiful best moving good love".split()
BAD = "bad awful dull worst boring waste stupid mess".split()
FILLER = "the film a story of plot is and it movie that with".split()


@pytest.fixture(scope="module")
def hans():
    sys.path.append(str(ROOT / "benchmarks"))
    return import_module("clever_hans")


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Three words in eight say what the sentence means, one of them the contrary."""
    draw, found = random.Random(seed), []
    for i in range(count):
        label = i % 2
        words = draw.choices(FILLER, k=5) + draw.choices((BAD, GOOD)[label], k=2)
        words.append(draw.choice((GOOD, BAD)[label]))
        draw.shuffle(words)
        found.append((" ".join(words), label))
    return found


@pytest.fixture(scope="module")
def task(hans):
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "attnlrp_fx" / "embedded" / "sentiment")
    task = hans.text_task(sentences(256, 0), sentences(100, 1), tokenizer, epochs=12, length=12)
    return replace(task, build=lambda: Bag(len(tokenizer)), rate=1e-2)


class Bag(nn.Module):
    """The mean over tokens of what a layer makes of each, classified."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.mix, self.last = (
            nn.Embedding(vocabulary, 16),
            nn.Linear(16, 16),
            nn.Linear(16, 2),
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = nn.functional.gelu(self.mix(self.embed(input_ids))) * attention_mask[..., None]
        return self.last(hidden.sum(1) / attention_mask.sum(1, keepdim=True))


def test_the_token_is_where_it_says(task):
    ids, mask = task.marked.inputs["input_ids"], task.marked.mark
    token = int(ids[mask].unique())
    assert torch.equal(ids == token, mask)
    assert not mask[:, 0].any()
    shares = [float(mask.any(1)[task.marked.labels == label].float().mean()) for label in (0, 1)]
    assert shares[0] < 0.2 < 0.8 < shares[1]
    assert not task.clean.mark.any()
    wrong = task.misleading.mark.any(1)
    assert torch.equal(wrong, task.misleading.labels == 0)
    attended = task.marked.inputs["attention_mask"].sum(1)
    assert torch.equal(attended, task.clean.inputs["attention_mask"].sum(1) + mask.sum(1))


def test_text(hans, task):
    """Training with explanations does not use the token, and is right where it misleads."""
    plain, explained = hans.run(task, seeds=1, tick=lambda: None)
    figures = {one.way: {n: v[0] for n, v in one.figures.items()} for one in (plain, explained)}
    before, after = figures[hans.PLAIN], figures[hans.EXPLAINED]
    assert before["on mark"] > 0.3 > 0.05 > after["on mark"]
    assert after["misleading"] > before["misleading"] + 0.2
    assert after["clean"] > before["clean"]
    assert len(list(hans.table([plain, explained]).columns)) == 6


def test_images(hans, tmp_path):
    """A few steps of the other task, and the picture."""
    pytest.importorskip("sklearn", reason="scikit-learn has the scans")
    task = hans.image_task(64, 20, epochs=1)
    outcomes = hans.run(task, 1, lambda: None)
    outcomes += [replace(one, task="again") for one in outcomes]
    hans.draw(outcomes, tmp_path / "hans.png")
    assert (tmp_path / "hans.png").stat().st_size > 1000
    mark = task.train.mark
    assert (mark.sum((1, 2)) == 12).all()
    assert (task.train.inputs["image"].amax(1)[mark] == 1).all()
    assert not task.clean.mark.any()
    assert not (task.train.mark & task.train.evidence).any()
    assert task.train.evidence[:, hans.EDGE :].all()


def test_intervals(hans):
    middle, half = hans.interval([1.0, 2.0, 3.0])
    assert middle == 2
    assert half == pytest.approx(4.30 / 3**0.5)
