"""What a data set costs: one sample at a time against `map` with several batch sizes.

    python benchmarks/throughput.py                    # the embedded classifier, 256 texts
    python benchmarks/throughput.py --models smollm2 --samples 64
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --batch-sizes 64 --workers 2

Texts are random words of the model's vocabulary, their lengths log-normal, cut off at --longest.
Tokenizing counts. *As they come* leaves out the sorting by length. Medians, contestants taking
turns; tokens per second are the texts' own, padding left out.
"""

import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import models
import torch
import typer
from rich.console import Console
from rich.table import Table
from timing import medians
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnlrp_fx
from attnlrp_fx.loading import load
from attnlrp_fx.runtime.mapping import Throughput, map_dataset

RESULTS = Path(__file__).parent / "results"
ONE_BY_ONE = "one by one"
console = Console()


class Loaded(NamedTuple):
    """A model and what compiles with its texts."""

    model: Any
    tokenizer: Any
    more: dict[str, Any]


def sentiment() -> Loaded:
    """The embedded classifier."""
    return Loaded(*load(), {})


def smollm2() -> Loaded:
    """SmolLM2-135M-Instruct with its real weights."""
    directory = models.smollm2()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return Loaded(model, AutoTokenizer.from_pretrained(directory), {})


MODELS: dict[str, Callable[[], Loaded]] = {"sentiment": sentiment, "smollm2": smollm2}


def random_texts(tokenizer: Any, samples: int, median: int, longest: int) -> list[str]:
    """Texts of random words, of unlike lengths."""
    words = sorted({w.strip("Ġ▁") for w in tokenizer.get_vocab() if w.strip("Ġ▁").isalpha()})
    generator = torch.Generator().manual_seed(0)
    lengths = torch.empty(samples).log_normal_(mean=0.0, std=0.7, generator=generator) * median
    drawn = [
        torch.randint(len(words), (int(length),), generator=generator).tolist()
        for length in lengths.clamp(1, longest)
    ]
    texts = [" ".join(words[i] for i in text) for text in drawn]
    cut = tokenizer(texts, truncation=True, max_length=longest, add_special_tokens=False)
    return [tokenizer.decode(ids) for ids in cut["input_ids"]]


def measure(
    name: str,
    samples: int,
    median: int,
    longest: int,
    batch_sizes: list[int],
    backend: str,
    rounds: int,
    workers: int,
    device: str,
    dtype: str,
) -> dict[str, Any]:
    """All contestants on one model."""
    model, tokenizer, more = MODELS[name]()
    model.to(device=device, dtype=getattr(torch, dtype))
    texts = random_texts(tokenizer, samples, median, longest)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    console.print(f"{name}: compiling, {backend}")
    example = tokenizer(texts[:2], return_tensors="pt", padding=True).to(device)
    explainer = attnlrp_fx.compile(model, {**example, **more}, backend=backend, tokenizer=tokenizer)
    tokens = sum(map(len, tokenizer(texts)["input_ids"]))
    found: dict[str, list[Tensor]] = {}
    went: dict[str, Throughput] = {}

    def one_by_one() -> None:
        inputs = (tokenizer([text], return_tensors="pt") for text in texts)
        found[ONE_BY_ONE] = [explainer(each).relevance["input_ids"].cpu() for each in inputs]

    def mapped(contestant: str, **options: Any) -> None:
        results = map_dataset(explainer, texts, workers=workers, progress=False, **options)
        found[contestant] = [each.relevance["input_ids"] for each in results]
        went[contestant] = results.throughput

    contestants: dict[str, Callable[[], Any]] = {ONE_BY_ONE: one_by_one}
    for size in batch_sizes:
        for contestant, window in ((f"map, {size}", 16), (f"map, {size}, as they come", 1)):
            contestants[contestant] = lambda contestant=contestant, size=size, window=window: (
                mapped(contestant, batch_size=size, window=window)
            )
    console.print(f"{name}: explaining {samples} texts, {tokens:,} tokens, {rounds + 1} times")
    seconds = medians(contestants, rounds, torch.cuda.synchronize if device == "cuda" else None)
    return {
        "model": name,
        "backend": backend,
        "samples": samples,
        "tokens": tokens,
        "longest": max(row.shape[1] for row in found[ONE_BY_ONE]),
        "contestants": {
            contestant: {
                "seconds": value,
                "samples_per_second": samples / value,
                "tokens_per_second": tokens / value,
                "padding": went[contestant].padding if contestant in went else 0.0,
                "batches": went[contestant].batches if contestant in went else samples,
                "difference": difference(found[contestant], found[ONE_BY_ONE]),
            }
            for contestant, value in seconds.items()
        },
    }


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest over all texts, each relative to the text's largest relevance."""
    pairs = zip(found, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def show(measured: dict[str, Any]) -> None:
    """Print one model's table."""
    title = f"{measured['model']}, {measured['samples']} texts, {measured['tokens']:,} tokens"
    table = Table(title=f"{title}, {measured['backend']}", title_justify="left")
    table.add_column("")
    for column in ("texts / s", "tokens / s", "speed-up", "padding", "difference"):
        table.add_column(column, justify="right")
    slow = measured["contestants"][ONE_BY_ONE]["seconds"]
    for name, row in measured["contestants"].items():
        table.add_row(
            name,
            f"{row['samples_per_second']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{slow / row['seconds']:.2f}",
            f"{100 * row['padding']:.0f} %",
            f"{row['difference']:.1e}",
        )
    console.print(table)


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="sentiment, smollm2")] = None,
    samples: Annotated[int, typer.Option(help="texts")] = 256,
    median: Annotated[int, typer.Option(help="words of the median text")] = 12,
    longest: Annotated[int, typer.Option(help="tokens of the longest text, about")] = 100,
    batch_sizes: Annotated[list[int] | None, typer.Option(help="rows of a batch")] = None,
    backend: Annotated[str, typer.Option(help="eager or inductor")] = "inductor",
    rounds: Annotated[int, typer.Option(help="timed turns of each contestant")] = 5,
    workers: Annotated[int, typer.Option(help="processes that load ahead")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="dtype of the models")] = "float32",
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Time a data set one by one and in batches."""
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    results = []
    for name in names or ["sentiment"]:
        sizes = batch_sizes or [4, 16, 64]
        results.append(
            measure(name, samples, median, longest, sizes, backend, rounds, workers, device, dtype)
        )
        torch.compiler.reset()
        show(results[-1])
    found = {
        "machine": f"{machine or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "dtype": dtype,
        "rounds": rounds,
        "workers": workers,
        "results": results,
    }
    path = output or RESULTS / f"throughput-{device}-{dtype}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
