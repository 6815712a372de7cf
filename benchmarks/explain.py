"""What one explanation costs: ours against plain passes and an lxt-style peer, in one process.

    python benchmarks/explain.py           # SmolLM2-135M and an 8-layer llama, 128 and 512 tokens
    python benchmarks/explain.py --models llama --tokens 128 --rounds 5
    python benchmarks/explain.py --device cuda --dtype bfloat16

Every contestant computes the relevance of all tokens for the highest logit at the last position,
with the vocabulary projection at that position alone. The lxt-style peer is `peer.py`, which
`lxt_peer.py` checks against the real lxt. Medians, contestants taking turns; the plain passes take
theirs in a second round with ours, since the peer patches the model for as long as it is timed.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import models
import peer
import torch
import typer
from rich.console import Console
from rich.table import Table
from timing import medians
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import attnlrp_fx

RESULTS = Path(__file__).parent / "results"
console = Console()


def llama(layers: int = 8) -> LlamaForCausalLM:
    """A llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def smollm2() -> Any:
    """SmolLM2-135M-Instruct with its real weights."""
    return AutoModelForCausalLM.from_pretrained(models.smollm2(), dtype=torch.float32).eval()


OURS = "ours, inductor"
COMPILED_PEER = "lxt-style, torch.compile"
MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "smollm2": smollm2}


def forward(model: Any, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=1)


def forward_backward(model: Any, inputs: dict[str, Tensor]) -> None:
    """Gradient of the highest logit with respect to the embeddings."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    mask = inputs["attention_mask"]
    logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, logits_to_keep=1)
    torch.autograd.grad(logits.logits[:, -1].amax(-1).sum(), embeds)


def measure(
    name: str, lengths: list[int], rounds: int, device: str, dtype: str, compile_peer: bool
) -> dict[str, Any]:
    """All contestants on one model."""
    model = MODELS[name]().to(device=device, dtype=getattr(torch, dtype))
    model.requires_grad_(False)
    vocabulary = model.config.vocab_size
    example = text(vocabulary, 64, device)
    compile_seconds: dict[str, float] = {}
    explainers = {}
    for backend in ("eager", "inductor"):
        console.print(f"{name}: compiling ours, {backend}")
        start = time.perf_counter()
        explainers[backend] = attnlrp_fx.compile(
            model, {**example, "logits_to_keep": 1}, backend=backend
        )
        compile_seconds[f"ours, {backend}"] = time.perf_counter() - start
    measured: dict[str, Any] = {"model": name, "lengths": {}, "compile_seconds": compile_seconds}
    synchronise = torch.cuda.synchronize if device == "cuda" else None
    with peer.patched(model):
        compiled = torch.compile(model, dynamic=True)
        if compile_peer:
            console.print(f"{name}: compiling the lxt-style peer")
            start = time.perf_counter()
            for length in (48, 64, 80):
                peer.relevance(compiled, text(vocabulary, length, device))
            compile_seconds[COMPILED_PEER] = time.perf_counter() - start
        for length in lengths:
            inputs = text(vocabulary, length, device)
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
            difference = float((theirs - ours).abs().max() / theirs.abs().max())
            measured["lengths"][length] = {
                "seconds": seconds,
                "ratio": ratios(seconds, OURS),
                "difference": difference,
            }
    for length in lengths:
        inputs = text(vocabulary, length, device)
        plain: dict[str, Callable[[], Any]] = {
            "forward": lambda inputs=inputs: forward(model, inputs),
            "forward + backward": lambda inputs=inputs: forward_backward(model, inputs),
            OURS: lambda inputs=inputs: explainers["inductor"](inputs),
        }
        seconds = medians(plain, rounds, synchronise)
        found = measured["lengths"][length]
        found["ratio"] = ratios(seconds, OURS) | found["ratio"]
        found["seconds"] = seconds | found["seconds"]
    return measured


def ratios(seconds: dict[str, float], name: str) -> dict[str, float]:
    """One contestant's time over each one's, of those that took turns with it."""
    return {contestant: seconds[name] / value for contestant, value in seconds.items()}


def text(vocabulary: int, length: int, device: str) -> dict[str, Tensor]:
    """A random text of one row."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, vocabulary, (1, length), generator=generator)
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def show(measured: dict[str, Any]) -> None:
    """Print one model's tables."""
    for length, found in measured["lengths"].items():
        seconds = found["seconds"]
        table = Table(title=f"{measured['model']}, {length} tokens", title_justify="left")
        table.add_column("")
        for column in ("milliseconds", "ours, inductor / this", "ready after (s)"):
            table.add_column(column, justify="right")
        for name, value in sorted(seconds.items(), key=lambda item: item[1]):
            ready = measured["compile_seconds"].get(name)
            table.add_row(
                name,
                f"{1000 * value:.1f}",
                f"{found['ratio'][name]:.2f}",
                "" if ready is None else f"{ready:.0f}",
            )
        console.print(table)
        console.print(f"largest difference from the peer: {found['difference']:.1e} (relative)\n")


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="llama, smollm2")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="sequence lengths")] = None,
    rounds: Annotated[int, typer.Option(help="timed turns of each contestant")] = 11,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="dtype of the models")] = "float32",
    compile_peer: Annotated[
        bool, typer.Option(help="also the peer under torch.compile: many minutes on 30 layers")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Time explanations against the peer and plain passes."""
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    results = []
    for name in names or list(MODELS):
        results.append(measure(name, tokens or [128, 512], rounds, device, dtype, compile_peer))
        torch.compiler.reset()
        show(results[-1])
    found = {
        "machine": f"{machine or platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "dtype": dtype,
        "rounds": rounds,
        "results": results,
    }
    path = output or RESULTS / f"explain-{device}-{dtype}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
