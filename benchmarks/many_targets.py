"""Many targets of one text: ours from one forward pass against single runs of an lxt-style peer.

    python benchmarks/many_targets.py                  # 64 classes, 256 positions, 8 layers
    python benchmarks/many_targets.py --tokens 16 --layers 2 --targets 4 --rounds 1

The model is the llama of `speed.py`. Two questions: why each of many classes at the last position
(vocabulary projection at that position alone), and why each next token at every position. The peer
of `peer.py` explains one target a run, with the projection at one position. For the second question
it runs on the whole text each time, as users of such libraries do, and is given the last position,
which costs the same as any other. One run of the peer is timed and multiplied by the number of
targets; ours is timed whole. Medians, contestants taking turns. *Floor* is the operations of ours,
by `explainer.cost`, at the speed of the machine's fastest product of two 1024 x 1024 matrices.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peer
import torch
import typer
from peaks import matrix_peak
from rich.console import Console
from rich.table import Table
from speed import llama, text
from timing import medians
from torch import Tensor

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, Logit

RESULTS = Path(__file__).parent / "results"
OURS, ALONE, PEER = "ours, together", "ours, one by one", "lxt-style, one by one"
console = Console()


def compiled(model: Any, backend: str, **more: Any) -> tuple[ExplainableGraphModule, float]:
    """An explainer, and the seconds that it took."""
    start = time.perf_counter()
    example = {**text(model.config.vocab_size, 64, "cpu"), **more}
    explainer = attnlrp_fx.compile(model, example, backend=backend)
    return explainer, time.perf_counter() - start


def classes(
    model: Any, length: int, targets: int, backend: str, rounds: int, peak: float
) -> dict[str, Any]:
    """Classes at the last position."""
    vocabulary = model.config.vocab_size
    explainer, ready = compiled(model, backend, logits_to_keep=1)
    inputs = text(vocabulary, length, "cpu")
    index = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0))[:targets]
    with peer.patched(model):
        contestants: dict[str, Callable[[], Any]] = {
            OURS: lambda: explainer(inputs, target=Logit(index[None])),
            ALONE: lambda: explainer(inputs, target=Logit(int(index[-1]))),
            PEER: lambda: peer.relevance(model, inputs, int(index[-1])),
        }
        seconds = medians(contestants, rounds)
        theirs = [peer.relevance(model, inputs, int(i)) for i in index[:3]]
    ours = explainer(inputs, target=Logit(index[None])).relevance["input_ids"][0]
    cost = explainer.cost(inputs)
    flops = cost.forward_flops + targets * cost.relevance_flops
    return {
        "question": f"{targets} classes at the last of {length} tokens",
        "targets": targets,
        "ready": ready,
        **summary(seconds, targets, flops, peak),
        "difference": max(
            difference(a, b[0]) for a, b in zip(ours[: len(theirs)], theirs, strict=True)
        ),
    }


def positions(
    model: Any, length: int, chunk: int, backend: str, rounds: int, peak: float
) -> dict[str, Any]:
    """The next token at every position."""
    explainer, ready = compiled(model, backend)
    inputs = text(model.config.vocab_size, length + 1, "cpu")
    ids = inputs["input_ids"]

    def prefix(end: int) -> dict[str, Tensor]:
        return {name: value[:, :end] for name, value in inputs.items()}

    def by_peer(end: int) -> Tensor:
        return peer.relevance(model, prefix(end), int(ids[0, end]))

    with peer.patched(model):
        contestants: dict[str, Callable[[], Any]] = {
            OURS: lambda: explainer.explain_generation(inputs, start=1, chunk=chunk),
            ALONE: lambda: explainer(prefix(length), target=Logit(int(ids[0, -1]))),
            PEER: lambda: by_peer(length),
        }
        seconds = medians(contestants, rounds)
        ends = sorted({1, length // 2, length})
        theirs = [by_peer(end) for end in ends]
    ours = explainer.explain_generation(inputs, start=1, chunk=chunk).relevance["input_ids"][0]
    flops = 0
    for first in range(1, length + 1, chunk):
        end = min(first + chunk - 1, length)
        cost = explainer.cost(prefix(end))
        flops += cost.forward_flops + (end - first + 1) * cost.relevance_flops
    return {
        "question": f"the next token at each of {length} positions",
        "targets": length,
        "chunk": chunk,
        "ready": ready,
        **summary(seconds, length, flops, peak),
        "difference": max(
            difference(ours[end - 1, :end], b[0]) for end, b in zip(ends, theirs, strict=True)
        ),
    }


def summary(seconds: dict[str, float], targets: int, flops: int, peak: float) -> dict[str, Any]:
    """Times of all targets, those of single runs multiplied; ratios; the floor."""
    total = {n: value * (1 if n == OURS else targets) for n, value in seconds.items()}
    return {
        "seconds": total,
        "ratio": {name: total[OURS] / value for name, value in total.items()},
        "flops": flops,
        "floor": flops / peak,
    }


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, relative to the largest relevance."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def show(found: dict[str, Any]) -> None:
    """Print one question's table."""
    table = Table(title=found["question"], title_justify="left")
    table.add_column("")
    for column in ("seconds", "ms a target", "ours / this"):
        table.add_column(column, justify="right")
    rows = sorted(found["seconds"].items(), key=lambda item: item[1])
    for name, value in [("floor", found["floor"]), *rows]:
        ratio = found["seconds"][OURS] / value
        table.add_row(
            name, f"{value:.2f}", f"{1000 * value / found['targets']:.1f}", f"{ratio:.2f}"
        )
    console.print(table)
    console.print(
        f"{found['flops'] / 1e12:.3f} TFLOP; ready after {found['ready']:.0f} s; "
        f"largest difference from the peer: {found['difference']:.1e} (relative)\n"
    )


def main(
    tokens: Annotated[int, typer.Option(help="length of the text, and positions explained")] = 256,
    targets: Annotated[int, typer.Option(help="classes explained at the last position")] = 64,
    chunk: Annotated[int, typer.Option(help="positions that share a run of the model")] = 16,
    layers: Annotated[int, typer.Option(help="layers of the model")] = 8,
    backend: Annotated[str, typer.Option(help="eager or inductor")] = "inductor",
    rounds: Annotated[int, typer.Option(help="timed turns of each contestant")] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Time many targets together against one at a time."""
    model = llama(layers).requires_grad_(False)
    peak = matrix_peak()
    console.print(f"fastest product of matrices: {peak / 1e9:.0f} GFLOP/s")
    results = [classes(model, tokens, targets, backend, rounds, peak)]
    show(results[-1])
    results.append(positions(model, tokens, chunk, backend, rounds, peak))
    show(results[-1])
    found = {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "dtype": "float32",
        "backend": backend,
        "layers": layers,
        "rounds": rounds,
        "peak": peak,
        "results": results,
    }
    path = output or RESULTS / "many-targets-cpu-float32.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
