"""What latent values and their statistics cost beside a plain explanation.

    python benchmarks/neurons.py                       # 8-layer llama, and SmolLM2
    python benchmarks/neurons.py --models llama --rows 32 --rounds 3

All neurons of all layers: *latent* explains with them as further results; *statistics* is a whole
run of `latent_statistics` into a new directory, checkpoints, rankings with heat maps and tables
included. All of one process, taking turns, in batches of --batch rows of --tokens random tokens;
medians. The rankings are empty at first and change most at the beginning: the more --rows, the
less they cost.
"""

import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from speed import MODELS
from timing import medians

import attnlrp_fx

RESULTS = Path(__file__).parent / "results"
PLAIN = "plain explanation"
console = Console()


def measure(
    name: str, rows: int, batch: int, tokens: int, roles: list[str], backend: str, rounds: int
) -> dict[str, Any]:
    """All contestants on one model."""
    model = MODELS[name]()
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    example = {"input_ids": ids[:2], "attention_mask": mask[:2], "logits_to_keep": 1}
    explainers = {}
    for latent in ((), tuple(roles)):
        console.print(f"{name}: compiling, {backend}, latent: {', '.join(latent) or 'none'}")
        explainers[latent] = attnlrp_fx.compile(model, example, backend=backend, latent=latent)
    plain, latents = explainers.values()

    def each(explainer: Any) -> None:
        for start in range(0, rows, batch):
            part = slice(start, start + batch)
            explainer(input_ids=ids[part], attention_mask=mask[part])

    samples = [
        {"input_ids": i, "attention_mask": m, "logits_to_keep": 1}
        for i, m in zip(ids, mask, strict=True)
    ]

    def statistics() -> None:
        with tempfile.TemporaryDirectory() as directory:
            attnlrp_fx.latent_statistics(
                latents, samples, directory, batch_size=batch, progress=False
            )

    contestants: dict[str, Callable[[], Any]] = {
        PLAIN: lambda: each(plain),
        "latent": lambda: each(latents),
        "statistics": statistics,
    }
    console.print(f"{name}: {rows} rows of {tokens} tokens, {rounds + 1} times")
    seconds = medians(contestants, rounds)
    found = latents(input_ids=ids[:1], attention_mask=mask[:1]).latent.values()
    return {
        "model": name,
        "backend": backend,
        "rows": rows,
        "tokens": tokens,
        "batch": batch,
        "roles": roles,
        "units": sum(latent.unit_relevance.shape[2] for latent in found),
        "seconds": seconds,
        "ratio": {contestant: value / seconds[PLAIN] for contestant, value in seconds.items()},
    }


def show(found: dict[str, Any]) -> None:
    """Print one model's table."""
    title = f"{found['model']}, {found['backend']}: {found['units']:,} units"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("milliseconds a row", f"/ {PLAIN}"):
        table.add_column(column, justify="right")
    for contestant, seconds in found["seconds"].items():
        ratio = found["ratio"][contestant]
        table.add_row(contestant, f"{1000 * seconds / found['rows']:.1f}", f"{ratio:.2f}")
    console.print(table)


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="llama, smollm2")] = None,
    rows: Annotated[int, typer.Option(help="Rows of the data set.")] = 64,
    batch: Annotated[int, typer.Option(help="Rows of a batch.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a row.")] = 128,
    roles: Annotated[list[str] | None, typer.Option(help="What is counted.")] = None,
    backend: Annotated[str, typer.Option(help="inductor or eager")] = "inductor",
    rounds: Annotated[int, typer.Option(help="Timed turns of each contestant.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "neurons.json",
) -> None:
    """Measure, print tables, write JSON."""
    results = []
    for name in names or list(MODELS):
        wanted = roles or ["mlp.neurons"]
        results.append(measure(name, rows, batch, tokens, wanted, backend, rounds))
        torch.compiler.reset()
        show(results[-1])
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    about = {"machine": machine, "torch": torch.__version__, "results": results}
    out.write_text(json.dumps(about, indent=1) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
