"""Classifiers of ordinary size for `faithfulness.py`: MiniLM, fine-tuned on one core in minutes.

    python benchmarks/fine_tune.py              both, and how many of the held-out texts are right
    python benchmarks/fine_tune.py movies

*movies*: sentences of movie reviews, negative and positive. *mails*: subjects and bodies of mails,
ham and spam. Word embeddings stay as they are. Held-out texts are read once, at the end. Trained
models are kept in the cache of `models.py`, as directories for `from_pretrained`.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from models import Split, cache_directory, mails, minilm, movie_reviews
from rich.console import Console
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

RECIPE = 1
"""Part of a trained model's name: raise it when the training changes."""


@dataclass(frozen=True)
class Task:
    """Labelled texts, and how MiniLM learns them."""

    texts: Callable[[Split], list[tuple[str, int]]]
    labels: tuple[str, str]
    length: int
    """Texts are cut to that many tokens."""
    most: int
    """At most that many texts are trained on."""
    epochs: float


TASKS: Mapping[str, Task] = {
    "movies": Task(movie_reviews, ("negative", "positive"), 64, 10_000, 2),
    "mails": Task(mails, ("ham", "spam"), 48, 2_000, 1),
}


def directory_of(name: str) -> Path:
    """Where a task's trained model is kept."""
    return cache_directory() / "models" / f"minilm-{name}-{RECIPE}"


def trained(name: str, console: Console | None = None) -> Path:
    """The trained model's directory; it is trained first if there is none."""
    if not directory_of(name).is_dir():
        train(name, console or Console(stderr=True))
    return directory_of(name)


def encoded(tokenizer: Any, texts: list[tuple[str, int]], length: int) -> list[dict[str, Any]]:
    """Token ids, masks and labels, one text each."""
    given = tokenizer([text for text, _ in texts], truncation=True, max_length=length)
    return [
        {
            "input_ids": given["input_ids"][i],
            "attention_mask": given["attention_mask"][i],
            "labels": label,
        }
        for i, (_, label) in enumerate(texts)
    ]


def train(name: str, console: Console) -> None:
    """Fine-tune, and keep model, tokenizer and held-out accuracy."""
    task, started = TASKS[name], time.perf_counter()
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(), id2label=dict(enumerate(task.labels))
    )
    model.get_input_embeddings().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    partial = directory_of(name).with_suffix(f".partial-{os.getpid()}")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(partial),
            per_device_train_batch_size=32,
            per_device_eval_batch_size=128,
            num_train_epochs=task.epochs,
            learning_rate=1e-4,
            warmup_steps=20,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            dataloader_pin_memory=False,
            report_to="none",
            seed=0,
        ),
        train_dataset=encoded(tokenizer, task.texts("train")[: task.most], task.length),
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {
            "accuracy": float((found.predictions.argmax(1) == found.label_ids).mean())
        },
    )
    trainer.train()
    right = trainer.evaluate(encoded(tokenizer, task.texts("held_out"), task.length))
    about = {
        "accuracy": right["eval_accuracy"],
        "texts": len(task.texts("held_out")),
        "seconds": round(time.perf_counter() - started),
    }
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "about.json").write_text(json.dumps(about) + "\n")
    try:
        partial.rename(directory_of(name))
    except OSError:  # another run was faster
        shutil.rmtree(partial)


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Which; all if none.")] = None,
) -> None:
    """Train what is not there, and print how many held-out texts are right."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    console = Console(highlight=False)
    for name in names or TASKS:
        about = json.loads((trained(name, console) / "about.json").read_text())
        console.print(
            f"{name}: {about['accuracy']:.1%} of {about['texts']:,} held-out texts right, "
            f"trained in {about['seconds']} s: {directory_of(name)}"
        )


if __name__ == "__main__":
    typer.run(main)
