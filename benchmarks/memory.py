"""What keeping less costs: peak memory and time of one explanation in each memory mode.

    python benchmarks/memory.py                       # 16 layers, 4096 tokens, one row
    python benchmarks/memory.py --layers 4 --tokens 512 --rounds 1
    python benchmarks/memory.py --device cuda --dtype bfloat16

A llama with random weights, explained by the highest logit at the last position, the vocabulary
projection at that position alone, compiled with inductor. The predicted peak is that of the report,
for the program run op by op; the measured one is the allocator's, beside parameters and inputs.
Beside ours: the model's own forward pass, which keeps nothing, and the lxt-style peer of `peer.py`,
whose graph keeps what autograd does. Medians, contestants taking turns; the forward pass takes its
own, since the peer patches the model for as long as it is timed.
"""

import json
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import peer
import torch
import typer
from peaks import peak_of
from rich.console import Console
from rich.table import Table
from speed import llama, text
from timing import medians
from torch import Tensor

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule

RESULTS = Path(__file__).parent / "results"
FORWARD, PEER = "forward", "lxt-style, eager"
FAST, BALANCED, SMALL = "ours, fast", "ours, balanced", "ours, small"
console = Console()


def forward(model: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=1)


def compiled(
    model: Any, inputs: dict[str, Tensor], memory: str | int, backend: str
) -> ExplainableGraphModule:
    """An explainer that keeps so much, compiled at the size that it is measured at."""
    console.print(f"compiling, memory {memory}")
    example = {**inputs, "logits_to_keep": 1}
    return attnlrp_fx.compile(model, example, backend=backend, memory=memory)


def measure(
    layers: int, tokens: int, budget: int | None, rounds: int, device: str, dtype: str, backend: str
) -> list[dict[str, Any]]:
    """A row for each contestant; sizes in bytes."""
    model = llama(layers, tokens).to(device=device, dtype=getattr(torch, dtype))
    model.requires_grad_(False)
    inputs = text(model.config.vocab_size, tokens, device)
    explainers: dict[str, ExplainableGraphModule] = {}
    for memory in ("fast", "balanced", "small"):
        explainers[f"ours, {memory}"] = compiled(model, inputs, memory, backend)
    predicted = {name: larger_peak(each, inputs) for name, each in explainers.items()}
    # Unless asked for, half of the way between what is least and what is fast.
    allowed = budget or (predicted[FAST] + predicted[SMALL]) // 2
    within = f"ours, {allowed // 2**20} MiB"
    explainers[within] = compiled(model, inputs, allowed, backend)
    predicted[within] = larger_peak(explainers[within], inputs)
    ours: dict[str, Callable[[], Any]] = {
        name: partial(explainer, inputs) for name, explainer in explainers.items()
    }
    synchronise = torch.cuda.synchronize if device == "cuda" else None
    with peer.patched(model):
        theirs: dict[str, Callable[[], Any]] = {PEER: partial(peer.relevance, model, inputs)}
        seconds = medians({**theirs, **ours}, rounds, synchronise)
        measured = {name: peak_of(run, device) for name, run in {**theirs, **ours}.items()}
    plain = partial(forward, model, inputs)
    seconds |= medians({FORWARD: plain}, rounds, synchronise)
    measured[FORWARD] = peak_of(plain, device)
    expected = ours[FAST]().relevance["input_ids"].double()
    operations = {name: each.cost(**inputs).flops for name, each in explainers.items()}
    return [
        {
            "name": name,
            "predicted_peak": predicted.get(name),
            "measured_peak": measured[name],
            "seconds": seconds[name],
            "operations": operations.get(name),
            "difference": difference(expected, ours[name]()) if name in ours else None,
        }
        for name in (FORWARD, PEER, *ours)
    ]


def larger_peak(explainer: ExplainableGraphModule, inputs: dict[str, Tensor]) -> int:
    """The larger of both sides' predicted peaks, parameters apart."""
    cost = explainer.cost(**inputs)
    return max(cost.forward_peak, cost.relevance_peak)


def difference(expected: Tensor, found: attnlrp_fx.Explanation) -> float:
    """max |a − b| / max |a|"""
    relevance = found.relevance["input_ids"].double()
    return float((relevance - expected).abs().max() / expected.abs().max())


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the table, and how the least stands to the fastest."""
    by_name = {row["name"]: row for row in rows}
    fast, small = by_name[FAST], by_name[SMALL]
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("")
    for column in (
        "predicted peak (MiB)",
        "measured (MiB)",
        "/ fast",
        "seconds",
        "/ fast",
        "operations / fast",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        predicted, operations = row["predicted_peak"], row["operations"]
        table.add_row(
            row["name"],
            "" if predicted is None else f"{predicted / 2**20:.0f}",
            f"{row['measured_peak'] / 2**20:.0f}",
            f"{row['measured_peak'] / fast['measured_peak']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['seconds'] / fast['seconds']:.2f}",
            "" if operations is None else f"{operations / fast['operations']:.2f}",
        )
    console.print(table)
    peak = small["measured_peak"] / fast["measured_peak"]
    seconds = small["seconds"] / fast["seconds"]
    worst = max(row["difference"] or 0.0 for row in rows)
    console.print(f"small takes {peak:.2f} of fast's memory, in {seconds:.2f} times its time")
    console.print(f"largest difference from fast: {worst:.1e} (relative)")


def main(
    layers: Annotated[int, typer.Option(help="layers of the llama")] = 16,
    tokens: Annotated[int, typer.Option(help="tokens of the text")] = 4096,
    budget: Annotated[
        int | None, typer.Option(help="MiB of the budget; midway between small and fast otherwise")
    ] = None,
    rounds: Annotated[int, typer.Option(help="timed turns of each contestant")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="dtype of the model")] = "float32",
    backend: Annotated[str, typer.Option(help="inductor or eager")] = "inductor",
    threads: Annotated[
        int | None, typer.Option(help="of torch; 1 where other work shares the cores")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Measure peak memory and time of explanations that keep more or less."""
    if threads is not None:
        torch.set_num_threads(threads)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    allowed = None if budget is None else budget * 2**20
    rows = measure(layers, tokens, allowed, rounds, device, dtype, backend)
    show(f"llama, {layers} layers, {tokens} tokens, {backend}", rows)
    found = {
        "machine": f"{machine or platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": dtype,
        "backend": backend,
        "layers": layers,
        "tokens": tokens,
        "rounds": rounds,
        "rows": rows,
    }
    path = output or RESULTS / f"memory-{device}-{dtype}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
