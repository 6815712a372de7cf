"""Training with explanations: what a step costs, and whether its gradients are right.

    python benchmarks/training.py                          # both tables, some minutes
    python benchmarks/training.py --only gradients
    python benchmarks/training.py --only steps --layers 2 --tokens 64 --rounds 1 --backends eager

*Gradients*: a loss that is not linear in the relevance, differentiated by every parameter, tables
of embeddings among them, and by pixels, of small models in float64, beside central differences of
fourth order along a random direction of each tensor; largest difference over largest derivative.
The lxt-style efficient form (`peer.py`: patched modules that hold ratios and statistics constant)
is differentiated the same way on the models that it patches: it computes the same relevance, and
its gradient is another.

*Steps*: forward, backward and nothing else of a llama with random weights, float32. `task`: the
next-token loss. `task + explanation`: both losses from one program, one logit a row explained;
with `memory="small"` each block is a checkpoint. `two passes`: the task's loss of the model itself,
the explanation's of the program, as `ExplanationLossMixin` does it. Medians, contestants taking
turns; peaks are the allocator's, beside parameters, gradients counted.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import peer
import torch
import torch.nn.functional as F
import typer
from peaks import peak_of
from rich.console import Console
from rich.table import Table
from timing import medians
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Composite, Join, Logit, Match, WSquare, epsilon_gamma_box
from attnlrp_fx.passes import PIPELINE, drop_assertions, promote_casts
from attnlrp_fx.training import share_outside

RESULTS = Path(__file__).parent / "results"
EXACT = (drop_assertions, promote_casts, *PIPELINE)
"""The pipeline, with a model's own casts to float32 promoted to float64."""
STEP = 2e-6
"""Of the central differences: where the error of their fourth order is below that of rounding."""
console = Console(width=110)
Relevance = Callable[[], Tensor]


# Gradients


class Convolutional(nn.Module):
    """Convolutions with norms and a residual join."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.batch, self.group = nn.BatchNorm2d(6), nn.GroupNorm(2, 6)
        self.last = nn.Linear(96, 5)

    def forward(self, image: Tensor) -> Tensor:
        hidden = torch.relu(self.batch(self.first(image)))
        hidden = hidden + F.silu(self.group(self.second(hidden)))
        logits: Tensor = self.last(F.max_pool2d(hidden, 2).flatten(1))
        return logits


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT = {"vocab_size": 61, "max_position_embeddings": 32, "pad_token_id": 0, **SMALL}


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 61, (2, 6), generator=torch.Generator().manual_seed(1))}


def pixels(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1}


MODELS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **TEXT)), ids),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**TEXT, num_labels=3)), ids),
    "vit": (
        lambda: ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, num_labels=5, **SMALL)
        ),
        lambda: pixels("pixel_values"),
    ),
    "convolutional": (Convolutional, lambda: pixels("image")),
}
JOINS = COMPOSITES["epsilon-plus"].with_rules((Match(role="join"), Join("magnitude")))
SQUARES = COMPOSITES["attnlrp"].with_rules((Match(role="first"), WSquare()))
LANGUAGE: tuple[str | Composite, ...] = ("attnlrp", "cp-lrp", "gradient")
VISION: tuple[str | Composite, ...] = (
    *LANGUAGE,
    "attnlrp-vision",
    "epsilon-plus",
    "epsilon-plus-flat",
    "epsilon-alpha2-beta1",
    "epsilon-alpha2-beta1-flat",
    epsilon_gamma_box(-1.0, 1.0),
    JOINS,
    SQUARES,
)


def drawn(name: str) -> nn.Module:
    """A small model in float64 with all parameters drawn, so that none vanishes by chance."""
    torch.manual_seed(0)
    model = MODELS[name][0]().double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() < 2:
                parameter.normal_(1.0 if "norm" in key.lower() and "weight" in key else 0.0, 0.2)
            else:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5)
    return model


def loss_of(relevance: Tensor) -> Tensor:
    weights = torch.linspace(-1, 2, relevance.numel(), dtype=relevance.dtype)
    flat = relevance.flatten()
    return (weights * (flat + flat.square())).sum()


def differences(leaves: Mapping[str, Tensor], relevance: Relevance) -> float:
    """The largest difference between autograd's derivative and the central one, over the largest.

    Args:
        leaves: by name, what the loss is differentiated by; each along a random direction.
        relevance: computes it.
    """
    tensors = list(leaves.values())
    found = torch.autograd.grad(
        loss_of(relevance()), tensors, materialize_grads=True, allow_unused=True
    )
    generator = torch.Generator().manual_seed(0)
    wrong, largest = 0.0, 0.0
    for leaf, gradient in zip(tensors, found, strict=True):
        way = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        way /= way.norm()
        expected = _central(leaf, way, relevance)
        wrong = max(wrong, abs(float((gradient * way).sum()) - expected))
        largest = max(largest, abs(expected))
    return wrong / largest


def _central(leaf: Tensor, way: Tensor, relevance: Relevance) -> float:
    start = leaf.detach().clone()

    def at(multiple: float) -> float:
        with torch.no_grad():
            leaf.copy_(start + multiple * STEP * way)
        return float(loss_of(relevance()).detach())

    value = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * STEP)
    with torch.no_grad():
        leaf.copy_(start)
    return value


def gradients(names: list[str]) -> Iterator[dict[str, Any]]:
    """For each model and composite how far gradients are off, and the same of the peer's."""
    for name in names:
        composites = LANGUAGE if name in ("llama", "bert") else VISION
        for composite in composites:
            model, inputs = drawn(name), MODELS[name][1]()
            explainer = attnlrp_fx.compile(
                model,
                inputs,
                composite=composite,
                target=1,
                backend="eager",
                dynamic_shapes=None,
                differentiable=True,
                passes=EXACT,
            )
            leaves: dict[str, Tensor] = dict(model.named_parameters())
            leaves |= {n: v.requires_grad_() for n, v in inputs.items() if v.is_floating_point()}

            def relevance(explainer: Any = explainer, inputs: Any = inputs) -> Tensor:
                (found,) = explainer(inputs).relevance.values()
                return found

            row: dict[str, Any] = {
                "model": name,
                "composite": composite if isinstance(composite, str) else composite.name,
                "tensors": len(leaves),
                "ours": differences(leaves, relevance),
            }
            if name in ("llama", "bert") and composite == "attnlrp":
                row["lxt-style"] = differences(*_peer(name))
            yield row
            console.print(".", end="")


def _peer(name: str) -> tuple[dict[str, Tensor], Relevance]:
    """The peer's relevance under autograd, with a graph of its own derivative."""
    model, inputs = drawn(name), MODELS[name][1]()

    def relevance() -> Tensor:
        with peer.patched(model):
            model.requires_grad_(True)
            embeds = model.get_input_embeddings()(inputs["input_ids"])
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                logits = model(inputs_embeds=embeds).logits
                explained = logits[:, -1, 1] if logits.dim() == 3 else logits[:, 1]
                (c,) = torch.autograd.grad(explained.sum(), embeds, create_graph=True)
        return (embeds * c).sum(-1)

    return dict(model.named_parameters()), relevance


# Steps


def steps(
    layers: int, tokens: int, rounds: int, backends: list[str]
) -> Iterator[tuple[str, float, int]]:
    """For each way of making a step: its name, median seconds, peak bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=layers,
        num_attention_heads=8,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    given = {"input_ids": torch.randint(3, 8000, (4, tokens))}
    allowed = torch.ones(tokens, dtype=torch.bool)
    allowed[0] = False

    def task(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), given["input_ids"][:, 1:].flatten())

    def explained(explanation: Any) -> Tensor:
        return share_outside(explanation.relevance["input_ids"], allowed)

    def stepping(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def step() -> None:
            model.zero_grad()
            loss().backward()

        return step

    def both(explainer: Any) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            explanation = explainer(given, target=Logit(5))
            return task(explanation.outputs.logits) + explained(explanation)

        return loss

    def apart(explainer: Any) -> Callable[[], Tensor]:
        def loss() -> Tensor:
            return task(model(**given).logits) + explained(explainer(given, target=Logit(5)))

        return loss

    contestants = {"task": stepping(lambda: task(model(**given).logits))}
    for backend in backends:
        for memory in ("fast", "small"):
            console.print(f"compiling, {backend}, memory {memory}")
            explainer = attnlrp_fx.compile(
                model, given, backend=backend, memory=memory, differentiable=True
            )
            how = f"{backend}, {memory}"
            contestants[f"task + explanation, {how}"] = stepping(both(explainer))
            if memory == "fast":
                contestants[f"two passes, {how}"] = stepping(apart(explainer))
        if backend == "inductor":
            compiled = torch.compile(model)

            def alone(compiled: Any = compiled) -> Tensor:
                return task(compiled(**given).logits)

            contestants["task, torch.compile"] = stepping(alone)
    seconds = medians(contestants, rounds)
    for name, step in contestants.items():
        model.zero_grad()  # or what is freed of the last step's gradients would count
        yield name, seconds[name], peak_of(step, "cpu")


def main(
    only: Annotated[str, typer.Option(help="gradients or steps; nothing: both")] = "",
    models: Annotated[str, typer.Option(help="for gradients")] = ",".join(MODELS),
    layers: Annotated[int, typer.Option(help="of the llama for steps")] = 6,
    tokens: Annotated[int, typer.Option(help="of each of its 4 rows")] = 128,
    rounds: Annotated[int, typer.Option(help="how often each step is timed")] = 5,
    backends: Annotated[str, typer.Option(help="for steps")] = "eager,inductor",
    write: Annotated[bool, typer.Option(help="whether results/training.json is written")] = True,
) -> None:
    """Measure, print and write."""
    path = RESULTS / "training.json"
    record: dict[str, Any] = json.loads(path.read_text()) if only and path.exists() else {}
    record |= {"torch": torch.__version__, "machine": platform.platform()}
    record["threads"] = torch.get_num_threads()
    if only in ("", "gradients"):
        record["gradients"] = list(gradients(models.split(",")))
        table = Table("model", "composite", "ours", "lxt-style", title="gradients, relative error")
        for row in record["gradients"]:
            cells = [f"{row[key]:.1e}" if key in row else "" for key in ("ours", "lxt-style")]
            table.add_row(row["model"], row["composite"], *cells)
        console.print()
        console.print(table)
    if only in ("", "steps"):
        found = list(steps(layers, tokens, rounds, backends.split(",")))
        record["steps"] = [{"step": n, "seconds": s, "peak": p} for n, s, p in found]
        record["sizes"] = {"layers": layers, "tokens": tokens, "rows": 4}
        _, least, narrow = found[0]
        table = Table("step", "ms", "/ task", "peak, MiB", "/ task", title="a training step")
        for name, took, peak in found:
            times, bytes_ = f"{took / least:.2f}", f"{peak / narrow:.2f}"
            table.add_row(name, f"{1000 * took:.0f}", times, f"{peak / 2**20:.0f}", bytes_)
        console.print(table)
    if write:
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
