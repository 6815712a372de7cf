"""From a model on disk to its heat map, ledger, graph page and file: seconds of each step.

    python benchmarks/walkthrough.py                     SmolLM2-135M, out of a package
    python benchmarks/walkthrough.py ./my-model "a gripping, funny film"

Each step is one command of the README's, in a process of its own; the last explains the same text
from the file alone, and must give the same numbers. What the steps wrote stays in a folder.
"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import models
import torch
import typer
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "walkthrough.json"
TEXT = "The Eiffel Tower stands in the capital of France, the city of"
FILE = "model.lrp.pt2"


def steps(model: str, text: str) -> dict[str, list[str]]:
    """The commands, by what they give."""
    return {
        "heat map and ledger": [
            *("explain", "--model", model, text),
            *("--html", "heatmap.html", "--figure", "heatmap.png", "--json", "own.json", "--audit"),
        ],
        "graph page and flow": [
            *("inspect", model, "--input", text),
            *("--check", "--html", "graph.html", "--flow", "flow.png"),
        ],
        "file": ["compile", model, "-o", FILE],
        "heat map from the file": [
            *("explain", "--model", FILE, text, "--html", "loaded.html", "--json", "loaded.json"),
        ],
    }


def difference(own: Any, loaded: Any) -> float:
    """The largest difference of two explanations' numbers, wherever they stand."""
    if isinstance(own, dict):
        assert own.keys() >= loaded.keys()  # only the first wrote a ledger
        return max((difference(own[key], loaded[key]) for key in loaded), default=0.0)
    if isinstance(own, list):
        return max((difference(*pair) for pair in zip(own, loaded, strict=True)), default=0.0)
    if isinstance(own, float | int):
        return abs(own - loaded)
    assert own == loaded
    return 0.0


def main(
    model: Annotated[str | None, typer.Argument(help="A model; SmolLM2-135M if none.")] = None,
    text: Annotated[str, typer.Argument(help="What it reads.")] = TEXT,
    folder: Annotated[Path, typer.Option(help="Where the steps write.")] = Path("walkthrough"),
) -> None:
    """Run the steps, and compare the file's explanation with the model's."""
    console = Console(highlight=False)
    command = Path(sys.executable).parent / "attnlrp-fx"
    folder.mkdir(parents=True, exist_ok=True)
    where = str(models.smollm2()) if model is None else str(Path(model).resolve())
    table = Table(title="seconds of each command, imports and all", title_justify="left", box=None)
    seconds = {}
    for name, arguments in steps(where, text).items():
        started = time.perf_counter()
        run = subprocess.run([command, *arguments], cwd=folder, capture_output=True, text=True)
        seconds[name] = time.perf_counter() - started
        if run.returncode:
            console.print(run.stdout + run.stderr, markup=False)
            raise typer.Exit(run.returncode)
        table.add_row(name, f"{seconds[name]:.1f}")
    own, loaded = (json.loads((folder / f"{n}.json").read_text()) for n in ("own", "loaded"))
    found = {
        "model": "SmolLM2-135M" if model is None else model,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "bytes": {
            path.name: path.stat().st_size
            for path in sorted(folder.iterdir())
            if path.suffix in (".html", ".pt2")
        },
        "difference": difference(own, loaded),
    }
    console.print(table)
    console.print(f"largest difference of the file's numbers: {found['difference']:g}")
    if model is None:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
