"""What latent relevance costs: all neurons of all layers beside the plain explanation.

    python benchmarks/latent.py                              # the 8-layer llama of speed.py
    python benchmarks/latent.py --tokens 64 --layers 2 --rounds 3 --backends eager

Both programs are timed in one process, taking turns; ratios are of medians. Each explains the
highest logit at the last position, with the vocabulary projection at that position alone.
"""

import json
import os
import platform
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from speed import llama, text
from timing import medians

import attnlrp_fx

RESULTS = Path(__file__).parent / "results"
PLAIN = "plain"
SITES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "neurons": {"latent": ["mlp.neurons"]},
    "neurons, heads, residual": {"latent": ["mlp.neurons", "attention.heads", "residual"]},
    "neurons, editable": {"latent": ["mlp.neurons"], "editable": True},
}
console = Console()


def measure(model: Any, backend: str, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Each set of latent values against none, at each length."""
    vocabulary = model.config.vocab_size
    example = {**text(vocabulary, 64, "cpu"), "logits_to_keep": 1}
    explainers, ready = {}, {}
    for name, options in SITES.items():
        console.print(f"compiling {name}, {backend}")
        start = time.perf_counter()
        explainers[name] = attnlrp_fx.compile(model, example, backend=backend, **options)
        ready[name] = time.perf_counter() - start
    found = []
    for length in lengths:
        inputs = text(vocabulary, length, "cpu")
        runs = {
            name: lambda explainer=explainer, inputs=inputs: explainer(inputs)
            for name, explainer in explainers.items()
        }
        seconds = medians(runs, rounds)
        same = explainers["neurons"](inputs).relevance["input_ids"]
        plain = explainers[PLAIN](inputs).relevance["input_ids"]
        found.append(
            {
                "backend": backend,
                "tokens": length,
                "seconds": seconds,
                "ratio": {name: s / seconds[PLAIN] for name, s in seconds.items()},
                "difference": float((same - plain).abs().max() / plain.abs().max()),
                "ready": ready,
            }
        )
    return found


def show(results: list[dict[str, Any]]) -> None:
    """A line a backend and length."""
    table = Table(box=None)
    for column in ("backend", "tokens", PLAIN, *[f"{name}, / {PLAIN}" for name in [*SITES][1:]]):
        table.add_column(column)
    for one in results:
        ratios = [f"{one['ratio'][name]:.3f}" for name in [*SITES][1:]]
        plain = f"{1000 * one['seconds'][PLAIN]:.0f} ms"
        table.add_row(one["backend"], str(one["tokens"]), plain, *ratios)
    console.print(table)


def main(
    tokens: Annotated[list[int] | None, typer.Option(help="lengths")] = None,
    layers: int = 8,
    rounds: int = 15,
    backends: Annotated[list[str] | None, typer.Option(help="eager, inductor")] = None,
    output: Path | None = None,
) -> None:
    """Measure, print and write the table."""
    model = llama(layers).requires_grad_(False)
    results = []
    for backend in backends or ["eager", "inductor"]:
        results += measure(model, backend, tokens or [128, 512], rounds)
        torch.compiler.reset()
        show(results)
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "layers": layers,
        "rounds": rounds,
        "results": results,
    }
    path = output or RESULTS / "latent.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
