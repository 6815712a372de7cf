"""How long until the first explanation: by depth, without and with what the last run left behind.

    python benchmarks/compile_time.py                          # llamas and SmolLM2, the record
    python benchmarks/compile_time.py --layers 4 --layers 32 --flat
    python benchmarks/compile_time.py --layers 2 --no-smollm2

Every measurement is a fresh process. "Cold" begins with an empty cache of Inductor's, "warm" with
the one that the cold process has left; "file" loads what the cold process saved (`explainer.save`),
with that cache, and has neither a model to make nor anything to capture. The llamas have hidden
size 512 and random weights; SmolLM2 has its real ones. Seconds of each stage are by the clock of
that process: imports, building the model or loading its weights, capture, rewriting (with the one
forward pass that finds the default target), tracing the programs, compiling them, and the first
explanation, of 64 tokens. "All" is from the process's start to the first explanation, "ready"
leaves out imports and the model.
With `--flat`, the same without regions, where all layers are one program.
"""

import time

STARTED = time.time()

import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from itertools import pairwise  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Any  # noqa: E402

import models  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

import attnlrp_fx  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "compile-time-cpu-float32.json"
STAGES = ("imports", "model", "capture", "rewriting", "tracing", "backend", "load", "explanation")
FILE = "explainer.lrp.pt2"
SMOLLM2 = "smollm2"
TOKENS = 64
console = Console(width=120)


def llama(layers: int) -> Any:
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


def text(vocabulary: int, length: int) -> dict[str, Tensor]:
    """A random text of one row."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(3, vocabulary, (1, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loaded_here(path: Path, begun: float) -> dict[str, float]:
    """Seconds of each stage in this process where an explainer is loaded from a file."""
    clock = [begun, time.time()]
    explainer = attnlrp_fx.load(path)
    clock.append(time.time())
    explainer(text(1000, TOKENS))
    clock.append(time.time())
    spent = [after - before for before, after in pairwise(clock)]
    return dict(zip(("imports", "load", "explanation"), spent, strict=True))


def measured_here(
    subject: str, regions: bool, begun: float, save: Path | None = None
) -> dict[str, float]:
    """Seconds of each stage in this process, up to the first explanation; then it is saved."""
    clock = [begun, time.time()]
    if subject == SMOLLM2:
        model = AutoModelForCausalLM.from_pretrained(models.smollm2(), dtype=torch.float32).eval()
    else:
        model = llama(int(subject))
    inputs = text(model.config.vocab_size, TOKENS)
    # Each line says what begins: capturing, rewriting, tracing, compiling.
    explainer = attnlrp_fx.compile(
        model,
        {**inputs, "logits_to_keep": 1},
        regions=regions,
        on_stage=lambda line: clock.append(time.time()),
    )
    clock.append(time.time())
    explainer(inputs)
    clock.append(time.time())
    spent = [after - before for before, after in pairwise(clock)]
    if save is not None:
        explainer.save(save)
    return dict(zip((stage for stage in STAGES if stage != "load"), spent, strict=True))


def in_a_process(subject: str, regions: bool, state: str, cache: str) -> dict[str, float]:
    """The same in a process of its own, with all that Inductor keeps in a folder."""
    command = [sys.executable, __file__, "--measure", subject, "--state", state]
    command += ["--file", str(Path(cache) / FILE)]
    command += ["--begun", str(time.time()), *(() if regions else ("--flat",))]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = environment["TMPDIR"] = cache  # precompiled headers
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode:
        console.print(run.stderr[-2000:], markup=False)
        raise typer.Exit(1)
    found: dict[str, float] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def measure(subject: str, regions: bool) -> list[dict[str, Any]]:
    """A row of each process: the cold one, the warm one, and the one that loads a file."""
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm", "file"):
            console.print(f"{_title(subject)}, regions {regions}, {state}")
            seconds = in_a_process(subject, regions, state, cache)
            rows.append({"model": subject, "regions": regions, "state": state, "seconds": seconds})
    return rows


def ready(row: dict[str, Any]) -> float:
    """Seconds to the first explanation, without imports and the model."""
    return sum(value for stage, value in row["seconds"].items() if stage not in STAGES[:2])


def _title(subject: str) -> str:
    return "SmolLM2, 30 layers" if subject == SMOLLM2 else f"llama, {subject} layers"


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, and how the deepest llama stands to the shallowest."""
    table = Table(title="seconds to the first explanation", title_justify="left", box=None)
    table.add_column("")
    for column in (*STAGES, "ready", "all"):
        table.add_column(column, justify="right")
    for row in rows:
        seconds = row["seconds"]
        table.add_row(
            f"{_title(row['model'])}, {row['state']}{'' if row['regions'] else ', flat'}",
            *(f"{seconds[stage]:.1f}" if stage in seconds else "" for stage in STAGES),
            f"{ready(row):.1f}",
            f"{sum(seconds.values()):.1f}",
        )
    console.print(table)
    for regions in (True, False):
        for state in ("cold", "warm", "file"):
            llamas = [
                row
                for row in rows
                if (row["regions"], row["state"]) == (regions, state) and row["model"] != SMOLLM2
            ]
            if len(llamas) > 1:
                shallow, deep = llamas[0], llamas[-1]
                console.print(
                    f"{deep['model']} layers over {shallow['model']}, {state}"
                    f"{'' if regions else ', flat'}: ready {ready(deep) / ready(shallow):.2f}"
                )


def main(
    layers: Annotated[list[int] | None, typer.Option(help="depths of the llamas")] = None,
    smollm2: Annotated[bool, typer.Option(help="also SmolLM2-135M")] = True,
    flat: Annotated[bool, typer.Option("--flat", help="also without regions")] = False,
    output: Annotated[Path, typer.Option(help="JSON file of the results")] = RESULTS,
    measured: Annotated[str | None, typer.Option("--measure", hidden=True)] = None,
    begun: Annotated[float, typer.Option(hidden=True)] = STARTED,
    state: Annotated[str, typer.Option(hidden=True)] = "cold",
    file: Annotated[Path, typer.Option(hidden=True)] = Path(FILE),
) -> None:
    """Time how long it takes until a model is explained for the first time."""
    if measured is not None:
        if state == "file":
            found_here = loaded_here(file, begun)
        else:
            save = file if state == "cold" else None
            found_here = measured_here(measured, not flat, begun, save)
        print(json.dumps(found_here))
        return
    subjects = [str(depth) for depth in sorted(layers or (4, 8, 16, 32))]
    if smollm2:
        models.smollm2()  # fetched once, and not timed
        subjects.append(SMOLLM2)
    rows: list[dict[str, Any]] = []
    for regions in (True, False) if flat else (True,):
        for subject in subjects:
            rows += measure(subject, regions)
            found = {
                "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
                "torch": torch.__version__,
                "tokens": TOKENS,
                "rows": rows,
            }
            output.write_text(json.dumps(found, indent=1) + "\n")
    show(rows)


if __name__ == "__main__":
    typer.run(main)
