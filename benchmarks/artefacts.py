"""What a saved explainer saves: seconds to compile, save, load, and to the first explanation.

    python benchmarks/artefacts.py [--layers 4 --layers 24] [--backend eager --backend inductor]

Random llamas of hidden size 512 (8 heads, 4 of keys and values, a vocabulary of 32,000), 128
tokens. Every figure is of a fresh process, without imports and making the model. *Compile* is
`attnlrp_fx.compile` up to the first explanation, *load* `attnlrp_fx.load` up to it; Inductor's
cache on disk is warm, as in the second process that uses a program. Both must agree to the bit
with eager, and to 1e-6 of the largest with Inductor.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

TOKENS = 128


def model_of(layers: int) -> Any:
    """A random llama, always the same."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def inputs_of() -> dict[str, Any]:
    """One row of tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 32_000, (1, TOKENS), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def compile_and_save(layers: int, backend: str, path: Path) -> dict[str, float]:
    """Seconds of compiling, of the first explanation, and of saving."""
    import attnlrp_fx

    model, inputs = model_of(layers), inputs_of()
    start = time.perf_counter()
    explainer = attnlrp_fx.compile(model, inputs, backend=backend)
    ready = time.perf_counter()
    explanation = explainer(inputs)
    explained = time.perf_counter()
    explainer.save(path)
    saved = time.perf_counter()
    torch.save(explanation.relevance["input_ids"], path.with_suffix(".relevance"))
    return {
        "compile": ready - start,
        "first": explained - ready,
        "save": saved - explained,
        "megabytes": path.stat().st_size / 1e6,
    }


def load_and_explain(backend: str, path: Path) -> dict[str, float]:
    """Seconds of loading, and of the first explanation; without transformers."""
    import attnlrp_fx

    inputs = inputs_of()
    start = time.perf_counter()
    explainer = attnlrp_fx.load(path, backend=backend)
    ready = time.perf_counter()
    relevance = explainer(inputs).relevance["input_ids"]
    explained = time.perf_counter()
    expected = torch.load(path.with_suffix(".relevance"))
    difference = float((relevance - expected).abs().max() / expected.abs().max())
    assert "transformers" not in sys.modules
    assert difference <= (0 if backend == "eager" else 1e-6), difference
    return {"load": ready - start, "loaded_first": explained - ready, "difference": difference}


def in_a_fresh_process(*arguments: str) -> dict[str, float]:
    """What a part of this script prints."""
    command = [sys.executable, __file__, "--part", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, action="append")
    parser.add_argument("--backend", action="append")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        kind, layers, backend, path = options.part
        if kind == "compile":
            print(json.dumps(compile_and_save(int(layers), backend, Path(path))))
        else:
            print(json.dumps(load_and_explain(backend, Path(path))))
        return
    columns = ("compile", "first explanation", "save", "MB", "load", "first explanation", "ratio")
    table = Table(title="seconds", title_justify="left", box=None)
    table.add_column("layers, backend")
    for column in (*columns, "largest difference"):
        table.add_column(column, justify="right")
    for layers in options.layers or [4, 24]:
        for backend in options.backend or ["eager", "inductor"]:
            with tempfile.TemporaryDirectory() as folder:
                part = (str(layers), backend, str(Path(folder) / "llama.lrp.pt2"))
                if backend == "inductor":
                    in_a_fresh_process("compile", *part)  # warms the cache
                made = in_a_fresh_process("compile", *part)
                found = in_a_fresh_process("load", *part)
            whole = made["compile"] + made["first"]
            again = found["load"] + found["loaded_first"]
            figures = (made["compile"], made["first"], made["save"], made["megabytes"])
            table.add_row(
                f"{layers}, {backend}",
                *(f"{figure:.1f}" for figure in figures),
                f"{found['load']:.1f}",
                f"{found['loaded_first']:.1f}",
                f"{again / whole:.2f}",
                f"{found['difference']:.1e}",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
