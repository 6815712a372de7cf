"""Full-size models without their memory: captured, rewritten and emitted on the meta device.

    python benchmarks/full_size.py            # LLaMA-2-7b, Mixtral 8x7b, Flan-T5-XL, ViT-L/16
    python benchmarks/full_size.py --models llama-2-7b --tokens 4096 --dtype float32

Parameters have their real sizes and no values, from configs written out here. The program is the
one that the default backend compiles, emitted for the CPU; operations and memory are estimates of
`attnlrp_fx.cost`, of one explanation of one row. Language models compute the logits of the last
position alone; the encoder-decoder has 64 target tokens, the image its 197 patches.

The estimate of memory is checked on a small version of each model, which has values and runs: the
most that intermediates take in a whole call, against the record of the CPU's allocator. Kernels
that allocate a buffer for themselves, as convolutions do, take more than estimated.
"""

import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig, T5Config, ViTConfig

import attnlrp_fx
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.codegen.attributes import Attributes
from attnlrp_fx.codegen.cost import FORMULAS, schedule_cost
from attnlrp_fx.codegen.emit import EmitOptions
from attnlrp_fx.codegen.regions import regions_of
from attnlrp_fx.codegen.schedule import schedule
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.passes import PassContext, run_passes
from attnlrp_fx.rules.composites import COMPOSITES

RESULTS = Path(__file__).parent / "results" / "full-size.json"
TARGETS = 64
"""Target tokens of an encoder-decoder."""
CPU, META = torch.device("cpu"), torch.device("meta")

console = Console()


@dataclass(frozen=True)
class Model:
    """A real config, and what makes it small."""

    model_class: str
    config: Callable[..., PretrainedConfig]
    full: dict[str, Any]
    small: dict[str, Any]
    inputs: Callable[[int, torch.dtype], dict[str, Any]]
    """(tokens, dtype) → inputs on the CPU."""

    def build(self, **changes: Any) -> Any:
        config = self.config(**{**self.full, **changes})
        return getattr(transformers, self.model_class)(config).eval()


def ids(tokens: int) -> Tensor:
    return torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(0))


def text(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.ones(1, tokens, dtype=torch.int64)
    return {"input_ids": ids(tokens), "attention_mask": mask, "logits_to_keep": 1}


def translation(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    mask = torch.ones(1, tokens, dtype=torch.int64)
    return {"input_ids": ids(tokens), "attention_mask": mask, "decoder_input_ids": ids(TARGETS)}


def image(tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    return {"pixel_values": torch.ones(1, 3, 224, 224, dtype=dtype)}


SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
MODELS = {
    "llama-2-7b": Model(
        "LlamaForCausalLM",
        LlamaConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "max_position_embeddings": 4096,
        },
        {**SMALL, "num_attention_heads": 8},
        text,
    ),
    "mixtral-8x7b": Model(
        "MixtralForCausalLM",
        MixtralConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        {**SMALL, "num_attention_heads": 8, "num_key_value_heads": 2},
        text,
    ),
    "flan-t5-xl": Model(
        "T5ForConditionalGeneration",
        T5Config,
        {
            "vocab_size": 32128,
            "d_model": 2048,
            "d_kv": 64,
            "d_ff": 5120,
            "num_layers": 24,
            "num_heads": 32,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
        },
        {"d_model": 256, "d_kv": 32, "d_ff": 640, "num_layers": 2, "num_heads": 8},
        translation,
    ),
    "vit-l-16": Model(
        "ViTForImageClassification",
        ViTConfig,
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_labels": 1000,
        },
        {**SMALL, "num_attention_heads": 8},
        image,
    ),
}


@dataclass(frozen=True)
class Row:
    """What was found out about one model; sizes in bytes."""

    model: str
    parameters: int
    captured: int
    """Nodes of the captured graph, of the rewritten one, and of the programs."""
    rewritten: int
    program: int
    regions: int
    """How many pieces the graph was cut into, and how many of them are unlike each other."""
    distinct: int
    capture_seconds: float
    rewrite_seconds: float
    emit_seconds: float
    cost_seconds: float
    fixed: list[str]
    """Dimensions of the inputs that the capture fixed."""
    plain_flops: int
    """Of the model's own forward pass."""
    forward_flops: int
    relevance_flops: int
    parameter_bytes: int
    saved: int
    forward_peak: int
    relevance_peak: int
    peak: int
    checked: float
    """Estimated over measured peak of intermediates, on the small version."""


def on_meta(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(META) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def measure(name: str, tokens: int, dtype: torch.dtype) -> Row:
    """Capture, rewrite and emit one model, and estimate what its program takes."""
    described = MODELS[name]
    with META:
        model = described.build().to(dtype)
    inputs = on_meta(described.inputs(tokens, dtype))
    clock = [time.perf_counter()]

    def stage(text: str) -> None:
        clock.append(time.perf_counter())
        console.print(f"{name}: {text} after {clock[-1] - clock[0]:.0f} s")

    captured = capture(model, inputs)
    stage("captured")
    nodes = len(captured.graph_module.graph.nodes)
    rewritten = captured.graph_module
    run_passes(rewritten, PassContext(None, COMPOSITES["attnlrp"], "error"))
    stage("rewritten")
    attributes = Attributes(model, rewritten).values()
    explained = captured.output_names.index("logits")
    programs = schedule(
        rewritten,
        regions_of(rewritten, attributes),
        {explained: outputs_of(rewritten.graph)[explained]},
        attributes,
        EmitOptions(device=CPU, captured_device=META),
    )
    stage("emitted")
    cost = schedule_cost(programs, {n: v for n, v in inputs.items() if isinstance(v, Tensor)})
    stage("counted")
    seconds = [after - before for before, after in pairwise(clock)]
    return Row(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        captured=nodes,
        rewritten=len(rewritten.graph.nodes),
        program=sum(len(each.graph_module.graph.nodes) for each in programs.distinct),
        regions=len(programs.programs),
        distinct=len(programs.distinct),
        capture_seconds=seconds[0],
        rewrite_seconds=seconds[1],
        emit_seconds=seconds[2],
        cost_seconds=seconds[3],
        fixed=fixed_dimensions(rewritten),
        plain_flops=plain_flops(model, inputs),
        forward_flops=cost.forward_flops,
        relevance_flops=cost.relevance_flops,
        parameter_bytes=cost.parameters,
        saved=cost.saved,
        forward_peak=cost.forward_peak,
        relevance_peak=cost.relevance_peak,
        peak=cost.peak,
        checked=estimated_over_measured(described, tokens, dtype),
    )


def fixed_dimensions(graph_module: fx.GraphModule) -> list[str]:
    """Dimensions of the inputs that another call cannot have otherwise."""
    return [
        f"{node.target}[{d}] = {size}"
        for node in graph_module.graph.find_nodes(op="placeholder")
        for d, size in enumerate(node.meta["val"].shape)
        if is_concrete_int(size)
    ]


def plain_flops(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Operations of the model itself, as PyTorch counts them on the meta device.

    A mask of ones is left out, since transformers looks at its values.
    """
    formulas = {op: formula for op, formula in FORMULAS.items() if not isinstance(op, str)}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model(**{name: value for name, value in inputs.items() if name != "attention_mask"})
    return int(counter.get_total_flops())


def estimated_over_measured(described: Model, tokens: int, dtype: torch.dtype) -> float:
    """Peak of the intermediates of one call of a small version, estimated over measured."""
    torch.manual_seed(0)
    model = described.build(**described.small).to(dtype)
    inputs = described.inputs(tokens, dtype)
    explainer = attnlrp_fx.compile(model, inputs, backend="eager")
    explainer(**inputs)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        explainer(**inputs)
    live = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    cost = explainer.cost(**inputs)
    return (cost.peak - cost.parameters) / most


def main(
    models: Annotated[list[str], typer.Option(help="which of the models")] = list(MODELS),  # noqa: B006
    tokens: Annotated[int, typer.Option(help="tokens of a text")] = 512,
    dtype: Annotated[str, typer.Option(help="of parameters and activations")] = "bfloat16",
    output: Annotated[Path, typer.Option(help="where figures are written")] = RESULTS,
) -> None:
    """Capture, rewrite and emit full-size models, and say what their programs take."""
    start = time.perf_counter()
    rows = [measure(name, tokens, getattr(torch, dtype)) for name in models]
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokens": tokens,
        "dtype": dtype,
        "seconds": time.perf_counter() - start,
        "resident_bytes": resident,
        "rows": [asdict(row) for row in rows],
    }
    output.write_text(json.dumps(found, indent=1) + "\n")
    console.print(table(rows))
    for row in rows:
        console.print(f"{row.model}: fixed: {', '.join(row.fixed) or 'nothing'}")
    console.print(f"{found['seconds']:.0f} s in all, at most {resident / 2**30:.1f} GiB resident")


def table(rows: list[Row]) -> Table:
    """Figures, a model a row."""
    found = Table(title="full size, on meta")
    for heading in (
        "model",
        "parameters",
        "nodes: captured",
        "programs",
        "regions",
        "seconds: capture",
        "rewrite",
        "emit",
        "TFLOP: forward",
        "with relevance",
        "ratio",
        "GiB: parameters",
        "intermediates",
        "peak",
        "estimated / measured",
    ):
        found.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        flops = row.forward_flops + row.relevance_flops
        found.add_row(
            row.model,
            f"{row.parameters / 1e9:.2f} G",
            f"{row.captured}",
            f"{row.program}",
            f"{row.distinct} of {row.regions}",
            f"{row.capture_seconds:.0f}",
            f"{row.rewrite_seconds:.0f}",
            f"{row.emit_seconds:.0f}",
            f"{row.plain_flops / 1e12:.2f}",
            f"{flops / 1e12:.2f}",
            f"{flops / row.plain_flops:.2f}",
            f"{row.parameter_bytes / 2**30:.2f}",
            f"{(row.peak - row.parameter_bytes) / 2**30:.2f}",
            f"{row.peak / 2**30:.2f}",
            f"{row.checked:.3f}",
        )
    return found


if __name__ == "__main__":
    typer.run(main)
