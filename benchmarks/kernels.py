"""Which kernels are faster on this CPU: what the compiler takes, against what PyTorch would.

    python benchmarks/kernels.py

Products of float32 rows with weights W, as they are ahead (x·Wᵀ) and back (g·W), by oneDNN and by
`torch.mm`; the complementary error function, of which GELU's factor is made, compiled with our
lowering and with Inductor's. Medians, both taking turns; below 1, ours is faster.
"""

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peaks import onednn_product
from rich.console import Console
from rich.table import Table
from timing import medians

from attnlrp_fx import torch_private

RESULTS = Path(__file__).parent / "results"
ROWS = (1, 8, 32, 128, 512, 1024)
WEIGHTS = ((64, 64), (256, 256), (512, 512), (576, 1536), (768, 3072), (3072, 768), (576, 49152))
console = Console(width=100)


def products(rounds: int) -> list[dict[str, Any]]:
    """oneDNN's time over that of `torch.mm`, by sizes."""
    found = []
    for inputs, outputs in WEIGHTS:
        weight = torch.randn(outputs, inputs)
        for rows in ROWS:
            ratios = {}
            for name, x, matrix in (
                ("ahead", torch.randn(rows, inputs), weight),
                ("back", torch.randn(rows, outputs), weight.mT),
            ):
                contestants: dict[str, Callable[[], Any]] = {
                    "onednn": partial(onednn_product, x, matrix),
                    "mm": partial(torch.mm, x, matrix.mT),
                }
                seconds = medians(contestants, rounds)
                ratios[name] = seconds["onednn"] / seconds["mm"]
            found.append({"inputs": inputs, "outputs": outputs, "rows": rows, **ratios})
    return found


def error_functions(rounds: int) -> dict[str, float]:
    """Seconds for 1024 x 3072 numbers."""
    numbers = torch.randn(1024, 3072)
    compiled: dict[str, Callable[..., Any]] = {
        "ours": torch.compile(
            lambda x: torch.erfc(x), backend=torch_private.inductor_differentiable, dynamic=False
        ),
        "theirs": torch.compile(lambda x: torch.erfc(x), dynamic=False),
    }
    return medians({name: partial(run, numbers) for name, run in compiled.items()}, rounds)


def main(rounds: Annotated[int, typer.Option(help="How often each is timed.")] = 31) -> None:
    """Time kernels, print a table, write `results/kernels-cpu.json`."""
    products_found, seconds = products(rounds), error_functions(rounds)
    table = Table(title="oneDNN / torch.mm, ahead and back, by rows", title_justify="left")
    table.add_column("weight", no_wrap=True)
    for rows in ROWS:
        table.add_column(str(rows), justify="right", no_wrap=True)
    for inputs, outputs in WEIGHTS:
        cells = [
            f"{one['ahead']:.2f}/{one['back']:.2f}"
            for one in products_found
            if (one["inputs"], one["outputs"]) == (inputs, outputs)
        ]
        table.add_row(f"{outputs} x {inputs}", *cells)
    console.print(table)
    ratio = seconds["ours"] / seconds["theirs"]
    console.print(
        f"erfc of 1024 x 3072 numbers: {1000 * seconds['ours']:.2f} ms, "
        f"{ratio:.2f} of Inductor's own"
    )
    record = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rounds": rounds,
        "products": products_found,
        "erfc": seconds,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kernels-cpu.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
