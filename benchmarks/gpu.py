"""Full-size models on a GPU: what an explanation costs, and how much of the card it uses.

    python benchmarks/gpu.py                              # LLaMA-2-7b, Mixtral 8x7b, ViT-L/16
    python benchmarks/gpu.py --models llama-2-7b --tokens 2048 --tokens 8192
    python benchmarks/gpu.py --device cpu --tiny          # the same path on small models

The real configs of `full_size.py`, in bfloat16, random weights made on the device; of a model that
does not fit, as many layers as fit in a share of the memory that is free. A text is one row without
a padding mask, the vocabulary projection at its last position alone; an image model gets as many
images as make up the tokens, at least one. Contestants: the forward pass; forward and backward, to
the embeddings or the pixels; the lxt-style peer of `peer.py`, which leaves Mixtral's experts their
plain gradient; ours, run op by op and compiled, in every memory mode, each compiled once, at
`EXAMPLE` tokens, and run at all lengths.

The fraction of the card's peak is operations (of a matrix product two for each multiplication and
addition; what is computed again counts) over time, over what one large product achieves. Peaks of
memory leave out parameters. What runs out of memory is noted, and the run goes on. Each row is
written at once; one that is in the file, of the same machine and versions, is not measured again.
"""

import gc
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import full_size
import peer
import torch
import transformers
import typer
from peaks import peak_of
from rich.console import Console
from rich.table import Table
from timing import medians
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import attnlrp_fx
from attnlrp_fx.codegen.flops import FORMULAS

RESULTS = Path(__file__).parent / "results"
MODELS = ("llama-2-7b", "mixtral-8x7b", "vit-l-16")
LENGTHS, TINY_LENGTHS = (512, 2048, 8192, 32768), (16, 48)
EXAMPLE = 2048
FORWARD, BACKWARD, PEER = "forward", "forward + backward", "lxt-style"
MODES = ("fast", "balanced", "small")
PATCHES = 197
"""Tokens of an image of 224 pixels."""
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}

Inputs = dict[str, Any]
console = Console()


@dataclass(frozen=True)
class Setting:
    """Where and how to measure."""

    device: str
    dtype: torch.dtype
    tiny: bool
    rounds: int
    share: float
    """Of the free memory, for parameters."""

    @property
    def synchronise(self) -> Callable[[], Any] | None:
        return torch.cuda.synchronize if self.device == "cuda" else None


@dataclass(frozen=True)
class Contestant:
    """Something to measure, ready to run."""

    run: Callable[[Inputs], Any]
    operations: Callable[[Inputs], int]


def config_of(name: str, setting: Setting) -> dict[str, Any]:
    """What a model is built with, other than its full config."""
    described = full_size.MODELS[name]
    if setting.tiny:
        return {**described.small, **TINY}
    layers = min(described.full["num_hidden_layers"], layers_that_fit(name, setting))
    return {"num_hidden_layers": layers}


def layers_that_fit(name: str, setting: Setting) -> int:
    """How many layers' parameters fit in the share of the free memory."""
    sizes = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = full_size.MODELS[name].build(num_hidden_layers=layers)
        sizes.append(sum(p.numel() for p in model.parameters()) * setting.dtype.itemsize)
    free = torch.cuda.mem_get_info()[0] if setting.device == "cuda" else 0
    layer = sizes[1] - sizes[0]
    return max(1, int((setting.share * free - (sizes[0] - layer)) // layer))


def build(name: str, config: dict[str, Any], setting: Setting) -> nn.Module:
    """A model with random weights, made where and as it will be."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            model: nn.Module = full_size.MODELS[name].build(**config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def inputs_of(name: str, tokens: int, setting: Setting) -> Inputs:
    """Tensors of about so many tokens."""
    given = full_size.MODELS[name].inputs(tokens, setting.dtype)
    if "pixel_values" in given:
        images = max(1, round(tokens / PATCHES))
        given = {"pixel_values": torch.randn(images, 3, 224, 224, dtype=setting.dtype)}
    names = ("input_ids", "pixel_values")
    return {n: v.to(setting.device) for n, v in given.items() if n in names}


def logits_of(model: Any, inputs: Inputs) -> Tensor:
    """The explained position's logits."""
    causal = {"logits_to_keep": 1, "use_cache": False} if "pixel_values" not in inputs else {}
    logits: Tensor = model(**inputs, **causal).logits
    return logits[:, -1] if logits.dim() == 3 else logits


@torch.no_grad()
def forward(model: Any, inputs: Inputs) -> Tensor:
    return logits_of(model, inputs)


def gradient_times_input(model: Any, inputs: Inputs) -> Tensor:
    """Of the highest logit, by the tokens' embeddings or the pixels."""
    inputs = dict(inputs)
    name = "pixel_values" if "pixel_values" in inputs else "inputs_embeds"
    if name == "inputs_embeds":
        inputs[name] = model.get_input_embeddings()(inputs.pop("input_ids"))
    point = inputs[name].detach().requires_grad_()
    with torch.enable_grad():
        inputs[name] = point.view_as(point)  # the counter of operations cannot watch leaves
        highest = logits_of(model, inputs).amax(-1).sum()
        (gradient,) = torch.autograd.grad(highest, point)
    return point.detach() * gradient


def counted(run: Callable[[Inputs], Any], inputs: Inputs) -> int:
    """Operations of a call, as PyTorch counts them."""
    formulas = {op: formula for op, formula in FORMULAS.items() if not isinstance(op, str)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run(inputs)
    return int(counter.get_total_flops())


@contextmanager
def contestant(title: str, model: Any, name: str, setting: Setting) -> Iterator[Contestant]:
    """One contestant, for as long as it takes its turns."""
    if title in (FORWARD, BACKWARD):
        run = partial(forward if title == FORWARD else gradient_times_input, model)
        yield Contestant(run, partial(counted, run))
    elif title == PEER:
        with peer.patched(model):
            run = partial(gradient_times_input, model)
            yield Contestant(run, partial(counted, run))
    else:
        _, backend, memory = title.split(", ")
        example = inputs_of(name, TINY_LENGTHS[-1] if setting.tiny else EXAMPLE, setting)
        causal = {"logits_to_keep": 1} if "input_ids" in example else {}
        explainer = attnlrp_fx.compile(model, {**example, **causal}, backend=backend, memory=memory)
        yield Contestant(explainer, lambda inputs: explainer.cost(inputs).flops)
        torch.compiler.reset()


def measure(made: Contestant, inputs: Inputs, peak: float, setting: Setting) -> dict[str, Any]:
    """Milliseconds, bytes, operations and the fraction of the card's peak."""
    made.run(inputs)
    taken = peak_of(lambda: made.run(inputs), setting.device)
    seconds = medians({"": lambda: made.run(inputs)}, setting.rounds, setting.synchronise)[""]
    operations = made.operations(inputs)
    return {
        "milliseconds": 1000 * seconds,
        "peak_bytes": taken,
        "operations": operations,
        "fraction": operations / seconds / peak,
    }


def matrix_peak(setting: Setting) -> float:
    """Operations a second of one large matrix product."""
    size = 256 if setting.tiny else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=setting.dtype) for _ in range(2))
    seconds = medians({"": lambda: torch.mm(a, b)}, 20, setting.synchronise)[""]
    return 2 * size**3 / seconds


def reason(error: Exception) -> str:
    """Why a row has no figures."""
    causes = [error, error.__cause__]
    if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
        return "out of memory"
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"


def clear(setting: Setting) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.empty_cache()


class Record:
    """Rows, in a file from the moment that they are known."""

    def __init__(self, path: Path, heading: dict[str, Any]) -> None:
        self.path, self.heading = path, heading
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            found = json.loads(path.read_text())
            known = ("machine", "torch", "transformers", "dtype", "tiny")
            if all(found["heading"][name] == heading[name] for name in known):
                self.rows = found["rows"]

    def has(self, **key: Any) -> bool:
        return any(all(row[k] == v for k, v in key.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self.path.parent.mkdir(exist_ok=True)
        content = {"heading": self.heading, "rows": self.rows}
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def measure_model(
    name: str, lengths: list[int], titles: list[str], peak: float, setting: Setting, record: Record
) -> None:
    """All contestants on one model, at all lengths."""
    config = config_of(name, setting)
    layers = config["num_hidden_layers"]
    key = {"model": name, "layers": layers}
    wanted = {
        title: [n for n in lengths if not record.has(**key, contestant=title, tokens=n)]
        for title in titles
    }
    if not any(wanted.values()):
        return
    console.print(f"{name}: {layers} layers")
    model = build(name, config, setting)
    for title, left in wanted.items():
        if left:
            turn(title, model, name, left, key, peak, setting, record)
        clear(setting)


def turn(
    title: str,
    model: nn.Module,
    name: str,
    lengths: list[int],
    key: dict[str, Any],
    peak: float,
    setting: Setting,
    record: Record,
) -> None:
    """One contestant at all lengths; a row for each, with figures or with the reason for none."""

    def add(tokens: int, found: dict[str, Any]) -> None:
        record.add({**key, "contestant": title, "tokens": tokens, **found})
        shown = found.get("error") or f"{found['milliseconds']:.1f} ms"
        console.print(f"{name}, {title}, {tokens} tokens: {shown}", markup=False)

    left = list(lengths)
    try:
        with contestant(title, model, name, setting) as made:
            while left:
                try:
                    found = measure(made, inputs_of(name, left[0], setting), peak, setting)
                except (RuntimeError, attnlrp_fx.AttnLRPError) as error:
                    found = {"error": reason(error)}
                clear(setting)
                add(left.pop(0), found)
    except (RuntimeError, NotImplementedError, attnlrp_fx.AttnLRPError) as error:
        for tokens in left:  # it could not be made ready
            add(tokens, {"error": reason(error)})


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each model and length."""
    groups: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["layers"], row["tokens"]), []).append(row)
    for (name, layers, tokens), group in groups.items():
        table = Table(
            title=f"{name}, {layers} layers, {tokens} tokens", title_justify="left", box=None
        )
        table.add_column("")
        for column in ("milliseconds", "/ forward", "peak (MiB)", "TFLOP", "of the card's peak"):
            table.add_column(column, justify="right")
        plain = next((r.get("milliseconds") for r in group if r["contestant"] == FORWARD), None)
        for row in group:
            if "error" in row:
                table.add_row(row["contestant"], row["error"])
                continue
            table.add_row(
                row["contestant"],
                f"{row['milliseconds']:.1f}",
                f"{row['milliseconds'] / plain:.2f}" if plain else "",
                f"{row['peak_bytes'] / 2**20:.0f}",
                f"{row['operations'] / 1e12:.2f}",
                f"{100 * row['fraction']:.0f} %",
            )
        console.print(table)


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help=", ".join(MODELS))] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="tokens of a text")] = None,
    backends: Annotated[list[str] | None, typer.Option(help="eager, inductor")] = None,
    rounds: Annotated[int, typer.Option(help="timed turns")] = 5,
    share: Annotated[float, typer.Option(help="of the free memory, for parameters")] = 0.5,
    device: Annotated[str, typer.Option(help="cuda, or cpu with --tiny")] = "cuda",
    dtype: Annotated[str, typer.Option(help="of parameters and activations")] = "bfloat16",
    tiny: Annotated[bool, typer.Option("--tiny", help="small models: does it run at all?")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Measure full-size models on a GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        console.print("error: there is no GPU that PyTorch can use", style="red")
        raise typer.Exit(1)
    if device != "cuda" and not tiny:
        console.print("error: full-size models need a GPU; add --tiny", style="red")
        raise typer.Exit(1)
    setting = Setting(device, getattr(torch, dtype), tiny, rounds, share)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    peak = matrix_peak(setting)
    heading = {
        "machine": machine,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": dtype,
        "tiny": tiny,
        "rounds": rounds,
        "matrix_peak": peak,
    }
    console.print(f"{machine}: {peak / 1e12:.2f} TFLOP/s in one matrix product", highlight=False)
    record = Record(output or RESULTS / f"gpu-{dtype}{'-tiny' if tiny else ''}.json", heading)
    titles = [FORWARD, BACKWARD, PEER]
    titles += [f"ours, {b}, {m}" for b in backends or ("eager", "inductor") for m in MODES]
    lengths = list(tokens or (TINY_LENGTHS if tiny else LENGTHS))
    for name in names or MODELS:
        measure_model(name, lengths, titles, peak, setting, record)
        clear(setting)
    show(record.rows)


if __name__ == "__main__":
    typer.run(main)
