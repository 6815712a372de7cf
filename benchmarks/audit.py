"""What the ledger costs that is left on: explanations with `audit=True` against those without.

    python benchmarks/audit.py                 # the 8-layer llama of speed.py, 128 and 512 tokens
    python benchmarks/audit.py --backends eager --tokens 128 --layers 2 --rounds 5

Both explainers of a backend take turns in one process; medians are compared.
"""

import json
import os
import platform
from collections.abc import Callable
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
console = Console()


def measure(backend: str, model: Any, lengths: list[int], rounds: int) -> list[dict[str, Any]]:
    """Medians with and without the ledger, at each length."""
    vocabulary = model.config.vocab_size
    example = {**text(vocabulary, 64, "cpu"), "logits_to_keep": 1}
    plain, audited = (
        attnlrp_fx.compile(model, example, backend=backend, audit=audit) for audit in (False, True)
    )
    found = []
    for length in lengths:
        inputs = text(vocabulary, length, "cpu")
        contestants: dict[str, Callable[[], Any]] = {
            "plain": lambda inputs=inputs: plain(inputs),
            "audited": lambda inputs=inputs: audited(inputs),
        }
        seconds = medians(contestants, rounds)
        ledger = audited(inputs).ledger
        found.append(
            {
                "backend": backend,
                "tokens": length,
                **seconds,
                "ratio": seconds["audited"] / seconds["plain"],
                "entries": len(ledger.entries),
                "residual": abs(ledger.residual / ledger.target),
            }
        )
    return found


def main(
    backends: Annotated[list[str] | None, typer.Option(help="eager, inductor")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="sequence lengths")] = None,
    layers: Annotated[int, typer.Option(help="layers of the llama")] = 8,
    rounds: Annotated[int, typer.Option(help="timed turns of each")] = 15,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Time explanations with and without the ledger."""
    model = llama(layers)
    model.requires_grad_(False)
    results = []
    for backend in backends or ["eager", "inductor"]:
        results += measure(backend, model, tokens or [128, 512], rounds)
    table = Table(title=f"a llama of {layers} layers", title_justify="left")
    for column in ("backend", "tokens", "ms", "ms, audited", "ratio", "entries", "residual"):
        table.add_column(column, justify="right")
    for row in results:
        times = (f"{1000 * row[key]:.1f}" for key in ("plain", "audited"))
        table.add_row(
            row["backend"],
            str(row["tokens"]),
            *times,
            f"{row['ratio']:.3f}",
            str(row["entries"]),
            f"{row['residual']:.1e}",
        )
    console.print(table)
    found = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "layers": layers,
        "results": results,
    }
    path = output or RESULTS / "audit.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
