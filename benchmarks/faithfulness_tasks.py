"""The tasks of `faithfulness.py`: a compiled model, samples, and how many each method gets.

    lm              SmolLM2-135M, the next word of English text (editorials of VADER's collection)
    sentiment       the embedded classifier, held-out movie-review sentences
    movies          MiniLM, fine-tuned on movie-review sentences (`fine_tune.py`), held-out ones
    mails           the same on mails, ham and spam; the first 48 tokens of held-out ones
    reactions       the 50-class classifier of rxnfp, reactions drawn from ten named templates
    digits-vit      the embedded vision transformer, held-out digits in clutter; evidence: the digit
    digits-resnet   the same for the embedded convolutional network
    recall, experts, needle, pointer: sequences with known evidence, see `evidence.py`

Of classifiers with known answers, samples that the model gets right are explained; of the others,
what the model says.
"""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits
import evidence
import fine_tune
import models
import torch
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import attnlrp_fx
from attnlrp_fx.evaluate import Batch, Perturbation, Question, Subject
from attnlrp_fx.loading import load

EMBEDDED = Path(attnlrp_fx.__file__).parent / "embedded"
STEPS = 9
LM_TOKENS = 32
PATCH = 4


@dataclass(frozen=True)
class Prepared:
    """A task ready to be measured."""

    subject: Subject
    questions: Sequence[tuple[Batch, Question]]
    perturbation: Perturbation


@dataclass(frozen=True)
class Task:
    """A task by name."""

    name: str
    prepare: Callable[[int, int], Prepared]
    """(samples, split) → the task; another split has other samples."""
    samples: int
    few: int
    """How many samples the methods get that run the model many times."""
    minutes: float
    """What all methods took when the table was made, on one core."""
    is_vision: bool = False
    probabilities: bool = False
    absolute: bool = False


def _asked(subject: Subject, batches: Sequence[Batch]) -> list[tuple[Batch, Question]]:
    return [(batch, subject.ask(batch.inputs, batch.target)) for batch in batches]


def language_model(samples: int, split: int) -> Prepared:
    """Pieces of running text, cut at a token; the next one is explained."""
    directory = models.smollm2()
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = editorials(tokenizer, samples, split)
    example = {"input_ids": ids[:2, :-1], "use_cache": False, "logits_to_keep": 1}
    subject = Subject.compile(model, example, tokenizer=tokenizer)
    batches = [Batch({"input_ids": part}) for part in ids.split(4)]
    return Prepared(subject, _asked(subject, batches), Perturbation(steps=STEPS, rows=32))


def editorials(tokenizer: Any, samples: int, split: int) -> Tensor:
    """(samples, LM_TOKENS) tokens of newspaper text, each piece from another place."""
    sentences = models.editorials()
    ids = tokenizer(" ".join(sentences))["input_ids"]
    starts = list(range(0, len(ids) - LM_TOKENS, 2 * LM_TOKENS))
    random.Random(0).shuffle(starts)
    chosen = starts[split * 1000 : split * 1000 + samples]
    return torch.tensor([ids[start : start + LM_TOKENS] for start in chosen])


def sentiment(samples: int, split: int) -> Prepared:
    """Held-out sentences that the embedded classifier gets right."""
    model, tokenizer = load()
    reviews = models.movie_reviews("held_out")[split * 500 :]
    return _classifier(model, tokenizer, _right(model, tokenizer, reviews, samples), 25)


@torch.no_grad()
def _right(model: Any, tokenizer: Any, texts: Sequence[tuple[str, int]], samples: int) -> list[str]:
    """The first texts that a classifier gets right."""
    encoded = ((t, label, tokenizer(t, return_tensors="pt", truncation=True)) for t, label in texts)
    found = (t for t, label, one in encoded if int(model(**one).logits.argmax()) == label)
    return list(itertools.islice(found, samples))


def _fine_tuned(name: str) -> Callable[[int, int], Prepared]:
    def prepare(samples: int, split: int) -> Prepared:
        directory, task = fine_tune.trained(name), fine_tune.TASKS[name]
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.model_max_length = task.length
        texts = task.texts("held_out")[split * 400 :]
        return _classifier(model, tokenizer, _right(model, tokenizer, texts, samples), 20)

    return prepare


def reactions(samples: int, split: int) -> Prepared:
    """Reactions drawn from templates, and the class that the model finds."""
    directory = models.reactions()
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return _classifier(model, tokenizer, drawn_reactions(samples, split), 8)


def _classifier(model: Any, tokenizer: Any, texts: list[str], size: int) -> Prepared:
    texts = sorted(texts, key=len)
    options = {"return_tensors": "pt", "padding": True, "truncation": True}
    batches = [
        Batch(dict(tokenizer(texts[start : start + size], **options)))
        for start in range(0, len(texts), size)
    ]
    inputs = {n: v for n, v in batches[0].inputs.items() if n != "token_type_ids"}
    subject = Subject.compile(model, inputs, tokenizer=tokenizer)
    batches = [Batch({name: b.inputs[name] for name in inputs}) for b in batches]
    return Prepared(subject, _asked(subject, batches), Perturbation(steps=STEPS, rows=128))


TEMPLATES = (
    "O=C(O){R}.N{S}>>O=C(N{S}){R}",
    "{X}c1ccc(Br)cc1.OB(O)c1ccc({Y})cc1>>{X}c1ccc(-c2ccc({Y})cc2)cc1",
    "O=C(O){R}.O{S}>>O=C(O{S}){R}",
    "CC(C)(C)OC(=O)N{S}>>N{S}",
    "COC(=O){R}>>O=C(O){R}",
    "O=Cc1ccc({Y})cc1.N{S}>>N({S})Cc1ccc({Y})cc1",
    "O=[N+]([O-])c1ccc({Y})cc1>>Nc1ccc({Y})cc1",
    "O=S(=O)(Cl)c1ccc({Y})cc1.N{S}>>O=S(=O)(N{S})c1ccc({Y})cc1",
    "Oc1ccc({Y})cc1.Br{S}>>O({S})c1ccc({Y})cc1",
    "Brc1ccc({Y})cc1.N{S}>>N({S})c1ccc({Y})cc1",
)
"""Amide and Suzuki coupling, esterification, removal of Boc, hydrolysis, reductive amination,
reduction of a nitro group, sulfonamide, Williamson ether, Buchwald-Hartwig amination."""

GROUPS: Mapping[str, Sequence[str]] = {
    "R": ("C", "CC", "CCC", "C1CC1", "c1ccccc1", "c1ccc(F)cc1", "c1ccncc1", "CCOC", "Cc1ccccc1"),
    "S": ("CC", "CCC", "CCOC", "Cc1ccccc1", "CCc1ccccc1", "Cc1ccc(Cl)cc1", "CC(C)C", "CC1CCCCC1"),
    "X": ("C", "CO", "F", "Cl", "N#C", "CC", "CC(=O)"),
    "Y": ("C", "OC", "F", "Cl", "C#N", "CC", "C(C)=O", "C(F)(F)F"),
}


def drawn_reactions(samples: int, split: int) -> list[str]:
    """Different reactions, templates in turn; those of another split are others."""
    every: list[list[str]] = []
    for template in TEMPLATES:
        names = [name for name in GROUPS if "{" + name + "}" in template]
        filled = [
            template.format(**dict(zip(names, groups, strict=True)))
            for groups in itertools.product(*(GROUPS[name] for name in names))
        ]
        random.Random(0).shuffle(filled)
        every.append(filled[split::2])
    longest = max(len(filled) for filled in every)
    rounds = (filled[i] for i in range(longest) for filled in every if i < len(filled))
    return list(itertools.islice(rounds, samples))


def _digits(name: str) -> Callable[[int, int], Prepared]:
    def prepare(samples: int, split: int) -> Prepared:
        model = AutoModelForImageClassification.from_pretrained(EMBEDDED / name).eval()
        processor = AutoImageProcessor.from_pretrained(EMBEDDED / name)
        pictures = digits.held_out(2 * samples, seed=11 + split)
        pixels = processor(images=list(pictures.images), return_tensors="pt")["pixel_values"]
        labels, masks = torch.as_tensor(pictures.labels), torch.as_tensor(pictures.masks)
        with torch.no_grad():
            right = (model(pixels).logits.argmax(1) == labels).nonzero()[:samples, 0]
        subject = Subject.compile(
            model, {"pixel_values": pixels[:2]}, composite="attnlrp-vision", processor=processor
        )
        batches = [
            Batch({"pixel_values": pixels[some]}, evidence=masks[some]) for some in right.split(20)
        ]
        options = Perturbation(steps=STEPS, patch=PATCH, rows=128)
        return Prepared(subject, _asked(subject, batches), options)

    return prepare


def _known(name: str) -> Callable[[int, int], Prepared]:
    def prepare(samples: int, split: int) -> Prepared:
        model = evidence.load(name)
        drawn = evidence.TASKS[name].draw(2 * samples, 100 + split)
        right = evidence.predictions(model, drawn.inputs) == drawn.answers
        chosen = right.nonzero()[:samples, 0]
        example = {key: value[:2] for key, value in drawn.inputs.items()}
        extra = {"use_cache": False} if model.config.architectures[0].endswith("LM") else {}
        subject = Subject.compile(model, {**example, **extra}, input="input_ids")
        batches = [
            Batch(
                {key: value[some] for key, value in drawn.inputs.items()},
                evidence=drawn.evidence[some],
                candidates=drawn.candidates[some],
            )
            for some in chosen.split(50)
        ]
        options = Perturbation(steps=STEPS, rows=256)
        return Prepared(subject, _asked(subject, batches), options)

    return prepare


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("lm", language_model, 160, 16, 80.0),
        Task("sentiment", sentiment, 100, 100, 2.0, probabilities=True, absolute=True),
        Task("movies", _fine_tuned("movies"), 60, 20, 3.0),
        Task("mails", _fine_tuned("mails"), 60, 20, 5.0),
        Task("reactions", reactions, 24, 8, 4.0),
        Task("recall", _known("recall"), 100, 50, 0.7, absolute=True),
        Task("experts", _known("experts"), 100, 50, 1.0, absolute=True),
        Task("needle", _known("needle"), 100, 50, 0.7, absolute=True),
        Task("pointer", _known("pointer"), 100, 50, 0.7, absolute=True),
        Task("digits-vit", _digits("digits_transformer"), 40, 20, 3.0, is_vision=True),
        Task("digits-resnet", _digits("digits_convolutional"), 40, 20, 3.0, is_vision=True),
    )
}
