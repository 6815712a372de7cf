"""Sequences whose evidence is known, and small models that answer questions about them.

Every sequence is drawn at random, and only a few of its tokens decide about the answer: changing
any other token changes nothing. An explanation of a right answer can therefore be right or wrong.

    recall    a decoder reads pairs of key and value, then a key: which value?  evidence: the pair
    experts   the same with a mixture of experts
    needle    a classifier reads noise, in it a marker and a class: which class?   evidence: both;
              other classes stand around without the marker
    pointer   an encoder-decoder reads facts (subject, relation, answer), then a subject and a
              relation: which answer? Other facts share either of them.  evidence: the fact

    python benchmarks/evidence.py                train all, print accuracies; minutes on two cores
    python benchmarks/evidence.py --tasks recall

Trained models are kept under `~/.cache/attnlrp_fx/evidence` (`models.py` says how to move that).
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from models import cache_directory
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Generator, Tensor
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

RECIPE = 1
"""Part of every trained model's name: raise it when tasks or training change."""

BATCH = 64
LEARNT = 0.9
"""The share of right answers in training at which the level rises."""

ENOUGH = 0.995
"""Training ends when this share of held-out answers is right."""

CHECKED_EVERY = 250
"""Steps between two looks at held-out answers."""

QUERIES = 8
"""How many questions a training sequence of `recall` has; others have one."""

KEYS, VALUES, PAIRS = 16, 16, 8
NOISE, CLASSES, NEEDLE_LENGTH, DISTRACTORS = 40, 6, 32, 4
SUBJECTS, RELATIONS, ANSWERS, FACTS = 8, 4, 16, 5
PAD, START, ASK = 0, 1, 2


@dataclass(frozen=True)
class Samples:
    """Sequences, their answers, and where the evidence is."""

    inputs: dict[str, Tensor]
    """What the model reads, each (count, length) int64."""
    answers: Tensor
    """(count,): the token or class that is right."""
    evidence: Tensor
    """(count, length) bool, of `input_ids`."""
    candidates: Tensor
    """(count, length) bool: the context, without the question; evidence is looked for there."""


@dataclass(frozen=True)
class Task:
    """A task: its sequences, and the model that learns it."""

    name: str
    draw: Callable[[int, int], Samples]
    """(count, seed) → samples."""
    train: Callable[[int, int, int], tuple[dict[str, Tensor], Tensor]]
    """(count, seed, level) → inputs, and labels in the shape of the logits without classes, -100
    where there is none. The level is how many pairs or facts there are at most: it rises while the
    model learns."""
    build: Callable[[], PreTrainedModel]
    steps: int
    """After so many steps training ends in any case."""
    rate: float = 2e-3


def _generator(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def _pick(count: int, some: int, of: int, draw: Generator) -> Tensor:
    """(count, some) different numbers below `of`."""
    return torch.rand(count, of, generator=draw).argsort(1)[:, :some]


def _pairs(count: int, draw: Generator, pairs: int = PAIRS) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (count, pairs) as tokens, and the sequence of them behind a start token."""
    keys = _pick(count, pairs, KEYS, draw) + 3
    values = torch.randint(VALUES, (count, pairs), generator=draw) + 3 + KEYS
    sequence = torch.stack([keys, values], 2).flatten(1)
    return keys, values, torch.cat([torch.full((count, 1), START), sequence], 1)


def recall_samples(count: int, seed: int) -> Samples:
    """A sequence of pairs and one question."""
    draw = _generator(seed)
    keys, values, context = _pairs(count, draw)
    asked = torch.randint(PAIRS, (count, 1), generator=draw)
    ids = torch.cat([context, torch.full((count, 1), ASK), keys.gather(1, asked)], 1)
    places = torch.arange(ids.shape[1])
    first = 1 + 2 * asked
    evidence = (places == first) | (places == first + 1)
    candidates = (places < context.shape[1]).expand_as(evidence)
    return Samples({"input_ids": ids}, values.gather(1, asked)[:, 0], evidence, candidates)


def recall_training(count: int, seed: int, level: int) -> tuple[dict[str, Tensor], Tensor]:
    """A sequence of pairs and several questions with their answers."""
    draw = _generator(seed)
    pairs = min(level, PAIRS)
    keys, values, context = _pairs(count, draw, pairs)
    asked = torch.randint(pairs, (count, QUERIES), generator=draw)
    key, value = keys.gather(1, asked), values.gather(1, asked)
    questions = torch.stack([torch.full_like(key, ASK), key, value], 2).flatten(1)
    ids = torch.cat([context, questions], 1)
    labels = torch.full_like(ids, -100)
    labels[:, context.shape[1] + 1 :: 3] = value
    return {"input_ids": ids}, labels


def needle_samples(count: int, seed: int) -> Samples:
    """Noise with a marker and a class behind it, and classes without marker."""
    draw = _generator(seed)
    marker, first_class = 2, 3
    noise = first_class + CLASSES
    ids = torch.randint(NOISE, (count, NEEDLE_LENGTH), generator=draw) + noise
    ids[:, 0] = START
    slots = _pick(count, DISTRACTORS + 1, (NEEDLE_LENGTH - 1) // 2, draw) * 2 + 1
    classes = torch.randint(CLASSES, slots.shape, generator=draw)
    ids.scatter_(1, slots + 1, classes + first_class)
    ids.scatter_(1, slots[:, :1], marker)
    places = torch.arange(NEEDLE_LENGTH)
    evidence = (places == slots[:, :1]) | (places == slots[:, :1] + 1)
    return Samples({"input_ids": ids}, classes[:, 0], evidence, torch.ones_like(evidence))


def needle_training(count: int, seed: int, level: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same, with classes as labels."""
    samples = needle_samples(count, seed)
    return samples.inputs, samples.answers


def pointer_samples(count: int, seed: int, facts_of: int = FACTS) -> Samples:
    """Facts of three tokens and a stop, then a question of two."""
    draw = _generator(seed)
    size = (count, facts_of)
    subject = torch.randint(SUBJECTS, size, generator=draw)
    relation = torch.randint(RELATIONS, size, generator=draw)
    subject[:, 1], relation[:, 1] = subject[:, 0], (relation[:, 0] + 1) % RELATIONS
    if facts_of > 2:
        subject[:, 2], relation[:, 2] = (subject[:, 0] + 1) % SUBJECTS, relation[:, 0]
    for other in range(3, facts_of):  # never the fact that is asked for
        same = (subject[:, other] == subject[:, 0]) & (relation[:, other] == relation[:, 0])
        relation[same, other] = (relation[same, other] + 1) % RELATIONS
    answer = _pick(count, facts_of, ANSWERS, draw)
    order = _pick(count, facts_of, facts_of, draw)
    first_relation, first_answer = 3 + SUBJECTS, 3 + SUBJECTS + RELATIONS
    tokens = [subject + 3, relation + first_relation, answer + first_answer]
    facts = torch.stack([*tokens, torch.full_like(subject, START)], 2)
    facts = facts.gather(1, order[..., None].expand_as(facts))
    asked = [tokens[0][:, 0], tokens[1][:, 0]]
    question = torch.stack([torch.full((count,), ASK), *asked], 1)
    ids = torch.cat([facts.flatten(1), question], 1)
    start = 4 * (order == 0).int().argmax(1, keepdim=True)
    places = torch.arange(ids.shape[1])
    evidence = (places >= start) & (places < start + 3)
    candidates = (places < 4 * facts_of).expand_as(evidence)
    inputs = {"input_ids": ids, "decoder_input_ids": torch.full((count, 1), PAD)}
    return Samples(inputs, tokens[2][:, 0], evidence, candidates)


def pointer_training(count: int, seed: int, level: int) -> tuple[dict[str, Tensor], Tensor]:
    """The same, with the answer as the decoder's first token."""
    samples = pointer_samples(count, seed, min(level, FACTS))
    return samples.inputs, samples.answers[:, None]


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**_DECODER, num_hidden_layers=2))


def _mixtral() -> PreTrainedModel:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**_DECODER, **experts, num_hidden_layers=2))


_DECODER: Mapping[str, Any] = {
    "vocab_size": 3 + KEYS + VALUES,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": START,
    "eos_token_id": None,
    "pad_token_id": PAD,
}


def _bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=3 + CLASSES + NOISE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=NEEDLE_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )
    return BertForSequenceClassification(config)


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=3 + SUBJECTS + RELATIONS + ANSWERS,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=3,
        num_decoder_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return T5ForConditionalGeneration(config)


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("recall", recall_samples, recall_training, _llama, 6000),
        Task("experts", recall_samples, recall_training, _mixtral, 6000),
        Task("needle", needle_samples, needle_training, _bert, 6000),
        Task("pointer", pointer_samples, pointer_training, _t5, 8000),
    )
}


def directory(name: str) -> Path:
    """Where a task's trained model is kept."""
    return cache_directory() / "evidence" / f"{name}-{RECIPE}"


def load(name: str, console: Console | None = None) -> PreTrainedModel:
    """A task's model, trained first if there is none."""
    where = directory(name)
    if not where.is_dir():
        train(TASKS[name], where, console or Console(stderr=True))
    built = TASKS[name].build()
    config = AutoConfig.from_pretrained(where)
    model: PreTrainedModel = type(built).from_pretrained(where, config=config)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def predictions(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """(count,): the highest token or class, of a sequence at its last position."""
    rows = []
    for start in range(0, len(inputs["input_ids"]), 256):
        logits = model(**{n: v[start : start + 256] for n, v in inputs.items()}).logits
        rows.append((logits[:, -1] if logits.dim() == 3 else logits).argmax(-1))
    return torch.cat(rows)


def accuracy(model: PreTrainedModel, samples: Samples) -> float:
    """The share of right answers."""
    return float((predictions(model, samples.inputs) == samples.answers).double().mean())


def train(task: Task, where: Path, console: Console) -> float:
    """Train a task's model, and publish it when held-out answers are right; its accuracy."""
    torch.manual_seed(0)
    model = task.build()
    optimiser = torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1.0, (step + 1) / 200))
    held_out = task.draw(1000, 1)
    start, reached, level, right = time.perf_counter(), 0.0, 2, 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        shown = bar.add_task(task.name, total=task.steps)
        for step in range(task.steps):
            inputs, labels = task.train(BATCH, 1000 + step, level)
            logits = model.train()(**inputs).logits
            asked = labels >= 0
            share = (logits.argmax(-1)[asked] == labels[asked]).float().mean()
            right = 0.95 * right + 0.05 * float(share)
            if right > LEARNT:
                level, right = level + 1, 0.0
            loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            bar.advance(shown)
            if step % CHECKED_EVERY == CHECKED_EVERY - 1:
                reached = accuracy(model.eval(), held_out)
                bar.update(shown, description=f"{task.name}: {reached:.1%} right")
                if reached >= ENOUGH:
                    break
    console.print(
        f"{task.name}: {reached:.1%} of 1,000 held-out answers right after {step + 1:,} steps, "
        f"{time.perf_counter() - start:.0f} s",
        highlight=False,
    )
    where.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where.parent, prefix="partial-") as workspace:
        built = Path(workspace) / "built"
        model.save_pretrained(built)
        shutil.rmtree(where, ignore_errors=True)
        built.rename(where)
    return reached


def main(
    tasks: Annotated[list[str] | None, typer.Option(help="Which tasks; all if none.")] = None,
) -> None:
    """Train the models that the cache does not have, and print how well each answers."""
    transformers_logging.disable_progress_bar()
    console = Console()
    for name in tasks or TASKS:
        model = load(name, console)
        share = accuracy(model, TASKS[name].draw(1000, 2))
        size = sum(parameter.numel() for parameter in model.parameters())
        console.print(
            f"{name}: {share:.1%} of 1,000 other answers right, {size:,} parameters: "
            f"{directory(name)}",
            highlight=False,
        )


if __name__ == "__main__":
    typer.run(main)
