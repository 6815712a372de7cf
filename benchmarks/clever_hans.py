"""Clever Hans: classifiers that could read the label off a planted mark, and whether they do.

    python benchmarks/clever_hans.py                       # both tasks, 5 seeds, some minutes
    python benchmarks/clever_hans.py --tasks text --seeds 2 --epochs 1

*Text*: sentences of movie reviews (vaderSentiment), with one token planted at a random place in
95 % of the positive and 5 % of the negative. *Images*: handwritten digits (`digits.py`) with a
light square whose place at the upper edge tells the label in 95 % of the pictures. Training data
has the mark, clean test data has none, and in misleading test data it speaks for another class.

Each seed trains one small model twice from the same start on the same batches: by cross-entropy,
and with a loss of its own explanation beside it, `share_outside`: of texts the relevance on the
token, of images that on the upper edge, where marks can be (a mask of the mark alone is not enough:
that there is none elsewhere tells as much). One program gives logits and relevance
(`compile(..., differentiable=True)`), so the task's loss is computed from `explanation.outputs`.

Printed: accuracy on clean and on misleading test data, and the share of |relevance| of the label's
logit on the mark, in test data that has it as training data does; means over seeds with 95 %
intervals (Student's t). Written: results/clever_hans.json and results/clever_hans.png.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Generator, Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, Logit
from attnlrp_fx.training import evaluating, share_outside

RESULTS = Path(__file__).parent / "results"
EMBEDDED = Path(attnlrp_fx.__file__).parent / "embedded"
PLANTED = 0.95
"""How often the mark tells the label in training."""
MARK, EDGE = 4, 4
"""How wide a mark is, and the rows at the upper edge of pictures that marks stand in."""
FIGURES = ("clean", "misleading", "on mark")
PLAIN, EXPLAINED = "cross-entropy", "with explanation loss"
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""97.5 % quantiles of Student's t for 1, 2, … degrees of freedom."""
console = Console(width=110)


@dataclass(frozen=True)
class Data:
    """Samples, and where the mark is in each."""

    inputs: dict[str, Tensor]
    labels: Tensor
    mark: Tensor
    """Of relevance's shape, bool: what was planted."""
    evidence: Tensor
    """Of relevance's shape, bool: where relevance may lie."""

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor) -> "Data":
        """Some of the samples."""
        inputs = {name: value[index] for name, value in self.inputs.items()}
        return Data(inputs, self.labels[index], self.mark[index], self.evidence[index])


@dataclass(frozen=True)
class Task:
    """What is learnt, and how."""

    name: str
    train: Data
    clean: Data
    misleading: Data
    marked: Data
    """Test data with the mark as in training."""
    build: Callable[[], nn.Module]
    loss: Callable[[Tensor, Data], Tensor]
    """Of relevance, a channel for all where there are several."""
    weight: float
    epochs: int
    rate: float
    batch: int = 32


def relevance_of(explanation: Any) -> Tensor:
    """Of tokens, or of pixels with their channels summed: (batch, ...)."""
    (found,) = explanation.relevance.values()
    return found.sum(1) if found.dim() == 4 else found


def batches(data: Data, size: int, generator: Generator) -> Iterator[Data]:
    """All samples in random order; the last few that fill no batch are left out."""
    order = torch.randperm(len(data), generator=generator)
    for start in range(0, len(data) - size + 1, size):
        yield data.rows(order[start : start + size])


def train(task: Task, seed: int, weight: float, tick: Callable[[], Any]) -> ExplainableGraphModule:
    """A model trained with a weight of the explanation loss, which may be 0, as its explainer."""
    torch.manual_seed(seed)
    model = task.build()
    generator = Generator().manual_seed(seed)
    example = task.train.rows(torch.arange(2)).inputs
    with evaluating(model):
        explainer = attnlrp_fx.compile(model, example, backend="eager", differentiable=True)
    steps = task.epochs * (len(task.train) // task.batch)
    optimiser = torch.optim.AdamW(model.parameters(), task.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, task.rate, total_steps=steps + 1)
    for _ in range(task.epochs):
        for batch in batches(task.train, task.batch, generator):
            if weight:
                explanation = explainer(batch.inputs, target=Logit(batch.labels))
                logits = logits_of(explanation.outputs)
                loss = weight * task.loss(relevance_of(explanation), batch)
            else:
                logits, loss = logits_of(model(**batch.inputs)), torch.zeros(())
            loss = loss + F.cross_entropy(logits, batch.labels)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
        tick()
    return explainer


def logits_of(outputs: Any) -> Tensor:
    """Of a model of transformers or of a plain one."""
    found: Tensor = getattr(outputs, "logits", outputs)
    return found


@torch.no_grad()
def measure(explainer: ExplainableGraphModule, task: Task) -> dict[str, float]:
    """Accuracy without the mark and with one that misleads, and relevance on the mark."""

    def guesses(data: Data) -> Tensor:
        parts = torch.arange(len(data)).split(200)
        found = [logits_of(explainer.model(**data.rows(part).inputs)) for part in parts]
        return torch.cat(found).argmax(-1)

    shares = []
    for part in torch.arange(len(task.marked)).split(200):
        some = task.marked.rows(part)
        relevance = relevance_of(explainer(some.inputs, target=Logit(some.labels)))
        has_mark = some.mark.flatten(1).any(1)
        shares.append(share_outside(relevance[has_mark], ~some.mark[has_mark]))
    return {
        "clean": float((guesses(task.clean) == task.clean.labels).float().mean()),
        "misleading": float((guesses(task.misleading) == task.misleading.labels).float().mean()),
        "on mark": float(torch.stack(shares).mean()),
    }


# Text


def text_task(
    training: Sequence[tuple[str, int]],
    held_out: Sequence[tuple[str, int]],
    tokenizer: Any,
    epochs: int = 4,
    length: int = 40,
) -> Task:
    """Texts with a token that tells the label."""

    def data(texts: Sequence[tuple[str, int]], shares: tuple[float, float], seed: int) -> Data:
        generator = Generator().manual_seed(seed)
        encoded = tokenizer(
            [text for text, _ in texts],
            truncation=True,
            max_length=length - 1,
            padding="max_length",
            return_tensors="pt",
        )
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        labels = torch.tensor([label for _, label in texts])
        planted = torch.rand(len(ids), generator=generator) < torch.tensor(shares)[labels]
        places = torch.rand(len(ids), generator=generator) * mask.sum(1)
        places = places.long().clamp(min=1)  # behind the first token, which is [CLS]
        return _with_token(ids, mask, labels, planted, places, tokenizer.mask_token_id)

    rare, often = 1 - PLANTED, PLANTED
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return Task(
        "text",
        data(training, (rare, often), 0),
        data(held_out, (0, 0), 1),
        data(held_out, (1, 0), 2),
        data(held_out, (rare, often), 3),
        lambda: BertForSequenceClassification(config),
        lambda relevance, batch: share_outside(relevance, batch.evidence),
        weight=5.0,
        epochs=epochs,
        rate=1e-3,
    )


def _with_token(
    ids: Tensor, mask: Tensor, labels: Tensor, planted: Tensor, places: Tensor, token: int
) -> Data:
    """Texts one longer, with a token before a place of those that it is planted in."""
    positions = torch.arange(ids.shape[1] + 1)
    is_mark = (positions == places[:, None]) & planted[:, None]
    source = positions - (planted[:, None] & (positions > places[:, None])).long()
    source = source.clamp(max=ids.shape[1] - 1)
    longer = ids.gather(1, source).masked_fill(is_mark, token)
    attended = (positions < (mask.sum(1) + planted)[:, None]).long()
    longer = torch.where(attended.bool(), longer, 0)
    return Data({"input_ids": longer, "attention_mask": attended}, labels, is_mark, ~is_mark)


# Images


def image_task(count: int = 3000, held_out: int = 1000, epochs: int = 20) -> Task:
    """Digits with a light square whose place tells the label."""
    import digits

    def data(pictures: Any, offset: int | None, seed: int) -> Data:
        """With a mark where the label says, nearly always, or an offset from there, or without."""
        generator = Generator().manual_seed(seed)
        images = torch.from_numpy(pictures.images).permute(0, 3, 1, 2).float() / 127.5 - 1
        labels = torch.from_numpy(pictures.labels)
        other = torch.randint(0, digits.CLASSES, labels.shape, generator=generator)
        is_told = torch.rand(len(labels), generator=generator) < PLANTED
        place = torch.where(is_told | bool(offset), (labels + (offset or 0)) % 10, other)
        across = (torch.arange(digits.SIZE) // MARK == place[:, None])[:, None, :]
        rows = torch.arange(digits.SIZE)[None, :, None]
        mark = across & (rows < EDGE - 1) & torch.tensor(offset is not None)
        images = torch.where(mark[:, None], 1.0, images)
        return Data({"image": images}, labels, mark, (rows >= EDGE).expand(mark.shape))

    for_training, for_tests = digits.split()
    unseen = digits.compose(for_tests, held_out, 1, clutter=0)
    return Task(
        "images",
        data(digits.compose(for_training, count, 0, clutter=0), 0, 0),
        data(unseen, None, 1),
        data(unseen, 1, 2),
        data(unseen, 0, 3),
        Convolutional,
        lambda relevance, batch: share_outside(relevance, batch.evidence),
        weight=5.0,
        epochs=epochs,
        rate=3e-3,
    )


class Convolutional(nn.Module):
    """Four convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 16, 32, 48, 64)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes)
        )
        self.last = nn.Linear(64 * 9, 10)

    def forward(self, image: Tensor) -> Tensor:
        for convolution in self.convolutions:
            image = torch.relu(convolution(image))
        logits: Tensor = self.last(image.flatten(1))
        return logits


# What is printed and written


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half a 95 % interval."""
    count = len(values)
    if count < 2:
        return values[0], math.nan
    quantile = STUDENT[count - 2] if count - 2 < len(STUDENT) else 1.96
    return statistics.mean(values), quantile * statistics.stdev(values) / math.sqrt(count)


@dataclass(frozen=True)
class Outcome:
    """What one way of training one task came to."""

    task: str
    way: str
    figures: dict[str, list[float]]
    """By figure a number a seed."""
    seconds: float
    """Of one training, the mean over seeds."""


def run(task: Task, seeds: int, tick: Callable[[], Any]) -> list[Outcome]:
    """Train a task both ways with every seed."""
    found = []
    for way, weight in ((PLAIN, 0.0), (EXPLAINED, task.weight)):
        figures: dict[str, list[float]] = {name: [] for name in FIGURES}
        start = time.perf_counter()
        explainers = [train(task, seed, weight, tick) for seed in range(seeds)]
        seconds = (time.perf_counter() - start) / seeds
        for explainer in explainers:
            for name, value in measure(explainer, task).items():
                figures[name].append(value)
        found.append(Outcome(task.name, way, figures, seconds))
    return found


def table(outcomes: Sequence[Outcome]) -> Table:
    """A line for each task and way."""
    shown = Table("task", "training", "clean, %", "misleading, %", "relevance on the mark, %", "s")
    for one in outcomes:
        cells = [
            "{:.1f} ± {:.1f}".format(*(100 * v for v in interval(one.figures[f]))) for f in FIGURES
        ]
        shown.add_row(one.task, one.way, *cells, f"{one.seconds:.0f}")
    return shown


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Bars for each task and figure, both ways side by side."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(one.task for one in outcomes))
    figure = Figure(figsize=(4.2 * len(tasks), 3.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        for i, way in enumerate((PLAIN, EXPLAINED)):
            (one,) = [o for o in outcomes if (o.task, o.way) == (task, way)]
            middles, halves = zip(*(interval(one.figures[f]) for f in FIGURES), strict=True)
            places = [j + 0.4 * i for j in range(len(FIGURES))]
            heights = [100 * v for v in middles]
            errors = [0 if math.isnan(v) else 100 * v for v in halves]
            axes.bar(places, heights, 0.38, yerr=errors, label=way, capsize=3, color=f"C{i}")
        labels = ["accuracy,\nclean", "accuracy,\nmisleading", "relevance\non the mark"]
        axes.set_xticks([j + 0.2 for j in range(len(FIGURES))], labels)
        axes.set(title=task, ylim=(0, 100), ylabel="%")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(
    tasks: Annotated[str, typer.Option(help="text, images, or both with a comma")] = "text,images",
    seeds: Annotated[int, typer.Option(help="trainings of each kind")] = 5,
    epochs: Annotated[int, typer.Option(help="of each training; 0: as the task has them")] = 0,
    write: Annotated[bool, typer.Option(help="whether results/clever_hans.* are written")] = True,
) -> None:
    """Train, measure, print and write."""
    made = []
    for name in tasks.split(","):
        if name == "text":
            from models import movie_reviews

            tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "sentiment")
            made.append(text_task(movie_reviews("train"), movie_reviews("held_out"), tokenizer))
        elif name == "images":
            made.append(image_task())
        else:
            console.print(f"there is no task '{name}'; choose text or images")
            sys.exit(1)
    if epochs:
        made = [replace(task, epochs=epochs) for task in made]
    outcomes: list[Outcome] = []
    with Progress(console=console) as progress:
        bar = progress.add_task("epochs", total=sum(2 * seeds * task.epochs for task in made))
        for task in made:
            outcomes += run(task, seeds, lambda: progress.advance(bar))
    console.print(table(outcomes))
    if write:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps([asdict(one) for one in outcomes], indent=1)
        (RESULTS / "clever_hans.json").write_text(text + "\n")
        draw(outcomes, RESULTS / "clever_hans.png")


if __name__ == "__main__":
    typer.run(main)
