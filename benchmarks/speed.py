"""What one explanation costs: ours against plain passes and an lxt-style peer, in one process.

    python benchmarks/speed.py                        # every case below; the record
    python benchmarks/speed.py --cases llama --rounds 5 --no-compile-peer
    python benchmarks/speed.py --cases small --rounds 101 --no-compile-peer
    python benchmarks/speed.py --device cuda --dtype bfloat16
    python benchmarks/speed.py --curve                # time by depth and by length, ours alone

Cases: an 8-layer llama, SmolLM2-135M with its real weights, a classifier of BERT-base's sizes on a
batch of 8, and a small model on a short text, where all is overhead. Every contestant computes the
relevance of all tokens for the highest logit at the last position (of the classifier, for the
highest class), with the vocabulary projection at that position alone. The lxt-style peer is
`peer.py`, which `lxt_peer.py` checks against the real lxt. Medians, contestants taking turns; the
plain passes take theirs in a second round with ours, since the peer patches the model for as long
as it is timed. *Floor* is the operations of ours, by `explainer.cost`, at the speed of the
machine's fastest product of two 1024 x 1024 matrices. A case's results replace its earlier ones.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import models
import peer
import torch
import typer
from peaks import matrix_peak
from rich.console import Console
from rich.table import Table
from timing import medians
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import attnlrp_fx

RESULTS = Path(__file__).parent / "results"
console = Console()


def llama(layers: int = 8, tokens: int = 2048) -> LlamaForCausalLM:
    """A llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=max(tokens, 2048),
    )
    return LlamaForCausalLM(config).eval()


def smollm2() -> Any:
    """SmolLM2-135M-Instruct with its real weights."""
    return AutoModelForCausalLM.from_pretrained(models.smollm2(), dtype=torch.float32).eval()


def bert() -> BertForSequenceClassification:
    """A classifier of BERT-base's sizes with random weights."""
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(num_labels=4)).eval()


def small() -> LlamaForCausalLM:
    """Two layers of hidden size 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Case:
    """A model and the texts that it is timed on."""

    model: Callable[[], Any]
    lengths: tuple[int, ...]
    rows: int = 1


CASES = {
    "llama": Case(llama, (128, 512)),
    "smollm2": Case(smollm2, (32, 128, 512)),
    "bert": Case(bert, (128,), rows=8),
    "small": Case(small, (16,)),
}
OURS = "ours, inductor"
COMPILED_PEER = "lxt-style, torch.compile"


def text(vocabulary: int, length: int, device: str, rows: int = 1) -> dict[str, Tensor]:
    """A random text."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def forward(model: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**inputs, **_alone(model))


def forward_backward(model: Any, inputs: dict[str, Tensor]) -> None:
    """Gradient of the highest logit with respect to the embeddings."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    mask = inputs["attention_mask"]
    logits = model(inputs_embeds=embeds, attention_mask=mask, **_alone(model)).logits
    torch.autograd.grad(logits.flatten(0, -2).amax(-1).sum(), embeds)


def _alone(model: Any) -> dict[str, Any]:
    """What keeps a language model from projecting every position."""
    is_causal = hasattr(model, "lm_head")
    return {"use_cache": False, "logits_to_keep": 1} if is_causal else {}


def explainer_of(model: Any, example: dict[str, Tensor], backend: str) -> Any:
    """Ours, compiled."""
    return attnlrp_fx.compile(model, {**example, **_alone(model)}, backend=backend)


def measure(name: str, rounds: int, device: str, dtype: str, compile_peer: bool) -> dict[str, Any]:
    """All contestants on one case."""
    case = CASES[name]
    model = case.model().to(device=device, dtype=getattr(torch, dtype))
    model.requires_grad_(False)
    vocabulary = model.config.vocab_size
    example = text(vocabulary, 64, device, case.rows)
    compile_seconds: dict[str, float] = {}
    explainers = {}
    for backend in ("eager", "inductor"):
        console.print(f"{name}: compiling ours, {backend}")
        start = time.perf_counter()
        explainers[backend] = explainer_of(model, example, backend)
        compile_seconds[f"ours, {backend}"] = time.perf_counter() - start
    measured: dict[str, Any] = {"lengths": {}, "compile_seconds": compile_seconds}
    synchronise = torch.cuda.synchronize if device == "cuda" else None
    with peer.patched(model):
        compiled = torch.compile(model, dynamic=True)
        if compile_peer:
            console.print(f"{name}: compiling the lxt-style peer")
            start = time.perf_counter()
            for length in (48, 64, 80):
                peer.relevance(compiled, text(vocabulary, length, device, case.rows))
            compile_seconds[COMPILED_PEER] = time.perf_counter() - start
        for length in case.lengths:
            inputs = text(vocabulary, length, device, case.rows)
            contestants: dict[str, Callable[[], Any]] = {
                "lxt-style, eager": lambda inputs=inputs: peer.relevance(model, inputs),
                COMPILED_PEER: lambda inputs=inputs: peer.relevance(compiled, inputs),
                "ours, eager": lambda inputs=inputs: explainers["eager"](inputs),
                OURS: lambda inputs=inputs: explainers["inductor"](inputs),
            }
            if not compile_peer:
                del contestants[COMPILED_PEER]
            seconds = medians(contestants, rounds, synchronise)
            theirs = peer.relevance(model, inputs).double()
            ours = explainers["inductor"](inputs).relevance["input_ids"].double()
            measured["lengths"][str(length)] = {
                "seconds": seconds,
                "ratio": ratios(seconds, OURS),
                "difference": float((theirs - ours).abs().max() / theirs.abs().max()),
                "operations": explainers["eager"].cost(inputs).flops,
            }
    for length in case.lengths:
        inputs = text(vocabulary, length, device, case.rows)
        plain: dict[str, Callable[[], Any]] = {
            "forward": lambda inputs=inputs: forward(model, inputs),
            "forward + backward": lambda inputs=inputs: forward_backward(model, inputs),
            OURS: lambda inputs=inputs: explainers["inductor"](inputs),
        }
        seconds = medians(plain, rounds, synchronise)
        found = measured["lengths"][str(length)]
        found["ratio"] = ratios(seconds, OURS) | found["ratio"]
        found["seconds"] = seconds | found["seconds"]
    return measured


def ratios(seconds: dict[str, float], name: str) -> dict[str, float]:
    """One contestant's time over each one's, of those that took turns with it."""
    return {contestant: seconds[name] / value for contestant, value in seconds.items()}


def show(name: str, measured: dict[str, Any], peak: float) -> None:
    """Print one case's tables."""
    for length, found in measured["lengths"].items():
        seconds = found["seconds"]
        title = f"{name}, {CASES[name].rows} x {length} tokens"
        table = Table(title=title, title_justify="left")
        table.add_column("")
        for column in ("milliseconds", "ours, inductor / this", "ready after (s)"):
            table.add_column(column, justify="right")
        for contestant, value in sorted(seconds.items(), key=lambda item: item[1]):
            ready = measured["compile_seconds"].get(contestant)
            table.add_row(
                contestant,
                f"{1000 * value:.2f}",
                f"{found['ratio'][contestant]:.2f}",
                "" if ready is None else f"{ready:.0f}",
            )
        floor = found["operations"] / peak
        table.add_row("floor", f"{1000 * floor:.2f}", f"{seconds[OURS] / floor:.2f}", "")
        console.print(table)
        console.print(
            f"{found['operations'] / 1e9:.1f} GFLOP; largest difference from the peer: "
            f"{found['difference']:.1e} (relative)\n"
        )


def curve(rounds: int, device: str, dtype: str, peak: float) -> list[dict[str, Any]]:
    """Ours by depth, and by length, beside its operations."""
    rows = []
    for layers, lengths in ((8, (512, 1024, 2048, 4096)), (16, (512,)), (32, (512,))):
        model = llama(layers, 4096).to(device=device, dtype=getattr(torch, dtype))
        explainer = explainer_of(model, text(32000, 64, device), "inductor")
        for length in lengths:
            inputs = text(32000, length, device)
            seconds = medians({OURS: partial(explainer, inputs)}, rounds)[OURS]
            operations = explainer.cost(inputs).flops
            row = {"layers": layers, "tokens": length, "seconds": seconds}
            rows.append(row | {"operations": operations, "floor": operations / peak})
    table = Table(title="llama by depth and length", title_justify="left")
    for column in ("layers", "tokens", "milliseconds", "/ 8 x 512", "GFLOP", "/ 8 x 512", "floor"):
        table.add_column(column, justify="right")
    first = rows[0]
    for row in rows:
        table.add_row(
            str(row["layers"]),
            str(row["tokens"]),
            f"{1000 * row['seconds']:.0f}",
            f"{row['seconds'] / first['seconds']:.2f}",
            f"{row['operations'] / 1e9:.0f}",
            f"{row['operations'] / first['operations']:.2f}",
            f"{1000 * row['floor']:.0f} ms",
        )
    console.print(table)
    return rows


def main(
    cases: Annotated[list[str] | None, typer.Option(help=", ".join(CASES))] = None,
    rounds: Annotated[int, typer.Option(help="timed turns of each contestant")] = 11,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="dtype of the models")] = "float32",
    compile_peer: Annotated[
        bool, typer.Option(help="also the peer under torch.compile: many minutes on 30 layers")
    ] = True,
    by_size: Annotated[bool, typer.Option("--curve", help="depths and lengths instead")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Time explanations against the peer and plain passes."""
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    path = output or RESULTS / f"speed-{device}-{dtype}.json"
    found = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    peak = matrix_peak()
    found |= {
        "machine": f"{machine or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "dtype": dtype,
    }
    console.print(f"fastest product of matrices: {peak / 1e9:.0f} GFLOP/s")
    if by_size:
        found["curve"] = {
            "rounds": rounds,
            "peak": peak,
            "rows": curve(rounds, device, dtype, peak),
        }
    for name in () if by_size else cases or CASES:
        measured = measure(name, rounds, device, dtype, compile_peer)
        torch.compiler.reset()
        show(name, measured, peak)
        found["cases"][name] = {"rounds": rounds, "peak": peak, **measured}
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
