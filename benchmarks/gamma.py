"""What rules that look at weights cost: ours against plain passes and zennit, in one process.

    python benchmarks/gamma.py             # ViT-B/16 and ResNet-50, batches of 1 and 4, 224 pixels
    python benchmarks/gamma.py --models vit --batch 1 --backends eager --rounds 3
    python benchmarks/gamma.py --device cuda --batch 32

Random weights. Every contestant explains the highest logit of each image, the relevance of every
pixel. On ViT-B/16 ours runs "attnlrp" (ε = 0), "attnlrp-vision" (γ in the patch convolution and the
MLPs, ε in the projections), and γ at every linear layer and the convolution; zennit's Gamma stands
at exactly those layers, and the rest of the model is plain gradient. On ResNet-50 both run
EpsilonPlus, batch norms merged.

Two plain passes are given, since a backward pass is two things: as in training, the gradient with
respect to the parameters and the pixels; and the gradient with respect to the pixels alone, which
leaves out the product that makes each weight's gradient, a third of the work. Medians, contestants
taking turns. Threads wait for each other: where other work shares the cores, `--threads 1` is what
can be compared.
"""

import copy
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import convolutional
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from timing import medians
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification
from zennit_environment import VERSION, ZennitError, zennit
from zennit_peer import merging

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Composite, Match
from attnlrp_fx.rules.rules import Gamma

RESULTS = Path(__file__).parent / "results"
FORWARD = "forward"
TO_PIXELS = "forward + backward, to the pixels"
TRAINING = "forward + backward, in training"
ZENNIT = "zennit"
GAMMA = 0.25

console = Console(width=110)

GAMMA_EVERYWHERE = COMPOSITES["attnlrp"].with_rules(
    (Match(role="convolution"), Gamma(GAMMA)),
    (Match(role="dense"), Gamma(GAMMA)),
)


@dataclass(frozen=True)
class Subject:
    """A model and what explains it."""

    make: Callable[[int], nn.Module]
    """From the image size to a model with random weights."""
    ours: Mapping[str, Composite]
    """What to compile, by title; the last one does what zennit's does."""
    theirs: Callable[[Any], Any]
    """From the module zennit to a composite of zennit's."""
    comparable: bool
    """Whether the last of ours and zennit's are the same relevance, not the same work alone."""


def vit(image_size: int) -> nn.Module:
    """ViT-B/16."""
    config = ViTConfig(image_size=image_size, num_labels=1000)
    return ViTForImageClassification(config).eval()


def resnet50(image_size: int) -> nn.Module:
    """ResNet-50, batch norms as if trained."""
    model = convolutional.resnet50()
    return convolutional.calibrated(model, torch.randn(8, 3, image_size, image_size))


def their_gamma(zennit: Any) -> Any:
    """zennit's Gamma at linear layers and convolutions, and nothing else."""
    layers = [(zennit.types.Linear, zennit.rules.Gamma(GAMMA))]
    return zennit.composites.LayerMapComposite(layers)


def their_epsilon_plus(zennit: Any) -> Any:
    """zennit's EpsilonPlus, batch norms merged."""
    return zennit.composites.EpsilonPlus(canonizers=[merging(zennit)])


SUBJECTS: Mapping[str, Subject] = {
    "vit": Subject(
        vit,
        {
            "attnlrp": COMPOSITES["attnlrp"],
            "attnlrp-vision": COMPOSITES["attnlrp-vision"],
            "gamma everywhere": GAMMA_EVERYWHERE,
        },
        their_gamma,
        comparable=False,
    ),
    "resnet50": Subject(
        resnet50,
        {"attnlrp": COMPOSITES["attnlrp"], "epsilon-plus": COMPOSITES["epsilon-plus"]},
        their_epsilon_plus,
        comparable=True,
    ),
}


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The logits, of a model that returns them or of one of transformers'."""
    outputs = model(images)
    return getattr(outputs, "logits", outputs)


def forward(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        logits_of(model, images)


def gradients(model: nn.Module, images: Tensor) -> None:
    """Gradient of the highest logits with respect to the pixels, and to what requires it."""
    images = images.clone().requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    highest = logits_of(model, images).amax(-1).sum()
    torch.autograd.grad(highest, (images, *trained), allow_unused=True)


def zennit_relevance(hooked: nn.Module, images: Tensor) -> Tensor:
    """Relevance of the pixels by the rules that are hooked into a model."""
    images = images.clone().requires_grad_()
    logits = logits_of(hooked, images)
    highest, index = logits.detach().max(1, keepdim=True)
    seed = torch.zeros_like(logits).scatter(1, index, highest)
    return torch.autograd.grad(logits, images, seed)[0].detach()


@dataclass(frozen=True)
class Setting:
    """How to measure."""

    batches: tuple[int, ...]
    image_size: int
    backends: tuple[str, ...]
    rounds: int
    device: str
    dtype: torch.dtype

    def images(self, batch: int) -> Tensor:
        """Random images."""
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(batch, 3, self.image_size, self.image_size, generator=generator)
        return images.to(self.device, self.dtype)


def measure(name: str, setting: Setting, zennit: Any) -> dict[str, Any]:
    """All contestants on one model."""
    subject = SUBJECTS[name]
    torch.manual_seed(0)
    model = subject.make(setting.image_size).to(setting.device, setting.dtype)
    trained = copy.deepcopy(model)
    model.requires_grad_(False)
    compile_seconds: dict[str, float] = {}
    contestants: dict[str, Callable[[Tensor], Any]] = {
        FORWARD: partial(forward, model),
        TO_PIXELS: partial(gradients, model),
        TRAINING: partial(gradients, trained),
    }
    for title, composite in subject.ours.items():
        for backend in setting.backends:
            contestant = f"ours, {title}, {backend}"
            console.print(f"{name}: compiling {contestant}")
            start = time.perf_counter()
            contestants[contestant] = attnlrp_fx.compile(
                model, setting.images(2), composite=composite, backend=backend
            )
            compile_seconds[contestant] = time.perf_counter() - start
    # Registered once, on a copy: setting the hooks up is not timed.
    hooked = convolutional.with_joins(model, lambda: convolutional.SumOf(zennit.layer.Sum()))
    composite = subject.theirs(zennit)
    composite.register(hooked)
    contestants[ZENNIT] = partial(zennit_relevance, hooked)
    wanted = [f"ours, {list(subject.ours)[-1]}, {backend}" for backend in setting.backends]
    measured: dict[str, Any] = {"model": name, "compile_seconds": compile_seconds, "batches": {}}
    for batch in setting.batches:
        console.print(f"{name}, batch {batch}: {setting.rounds} rounds of {len(contestants)} turns")
        images = setting.images(batch)
        turns = {title: partial(run, images) for title, run in contestants.items()}
        synchronise = torch.cuda.synchronize if setting.device == "cuda" else None
        seconds = medians(turns, setting.rounds, synchronise)
        found: dict[str, Any] = {
            "seconds": seconds,
            "ratio": {
                reference: {title: value / seconds[reference] for title, value in seconds.items()}
                for reference in (FORWARD, TO_PIXELS, TRAINING)
            },
            "zennit_over_ours": {title: seconds[ZENNIT] / seconds[title] for title in wanted},
        }
        if subject.comparable:
            expected = turns[ZENNIT]()
            found["difference"] = {
                title: difference(expected, _relevance(turns[title]())) for title in wanted
            }
            found["difference_float64"] = exact_difference(subject, model, images, zennit)
        measured["batches"][batch] = found
    composite.remove()
    return measured


def exact_difference(subject: Subject, model: nn.Module, images: Tensor, zennit: Any) -> float:
    """Between ours and zennit's relevance in float64, which tells rounding from error."""
    model, images = copy.deepcopy(model).double(), images.double()
    hooked = convolutional.with_joins(model, lambda: convolutional.SumOf(zennit.layer.Sum()))
    with subject.theirs(zennit).context(hooked):
        expected = zennit_relevance(hooked, images)
    *_, composite = subject.ours.values()
    explainer = attnlrp_fx.compile(model, images, composite=composite, backend="eager")
    return difference(expected, _relevance(explainer(images)))


def difference(expected: Tensor, found: Tensor) -> float:
    """max |a − b| / max |a|"""
    return float((expected - found).abs().max() / expected.abs().max())


def _relevance(explanation: attnlrp_fx.Explanation) -> Tensor:
    (relevance,) = explanation.relevance.values()
    return relevance


def show(measured: dict[str, Any]) -> None:
    """Print one model's tables."""
    for batch, found in measured["batches"].items():
        table = Table(title=f"{measured['model']}, batch {batch}", title_justify="left", box=None)
        table.add_column("")
        table.add_column("milliseconds", justify="right")
        for reference in found["ratio"]:
            table.add_column(f"/ {reference.rpartition(', ')[-1]}", justify="right")
        table.add_column("ready after (s)", justify="right")
        for title, value in found["seconds"].items():
            ready = measured["compile_seconds"].get(title)
            table.add_row(
                title,
                f"{1000 * value:.0f}",
                *(f"{ratios[title]:.2f}" for ratios in found["ratio"].values()),
                "" if ready is None else f"{ready:.0f}",
            )
        console.print(table)
        for title, ratio in found["zennit_over_ours"].items():
            console.print(f"{title}: {ratio:.2f} times as fast as zennit's")
        for title, value in found.get("difference", {}).items():
            console.print(
                f"{title}: differs from zennit's by {value:.1e} of the largest relevance, "
                f"in float64 {found['difference_float64']:.1e}"
            )
        console.print()


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help=", ".join(SUBJECTS))] = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes")] = None,
    image_size: Annotated[int, typer.Option(help="height and width of the images")] = 224,
    backends: Annotated[list[str] | None, typer.Option(help="eager, inductor")] = None,
    rounds: Annotated[int, typer.Option(help="timed turns of each contestant")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="dtype of the models")] = "float32",
    threads: Annotated[
        int | None,
        typer.Option(help="of torch; 1 where other work shares the cores"),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file of the results")] = None,
) -> None:
    """Time explanations with rules that look at weights against zennit and plain passes."""
    try:
        peer = zennit()
    except ZennitError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    if threads is not None:
        torch.set_num_threads(threads)
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    found: dict[str, Any] = {
        "machine": f"{machine or platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zennit": VERSION,
        "dtype": dtype,
        "image_size": image_size,
        "rounds": rounds,
    }
    console.print(", ".join(f"{key} {value}" for key, value in found.items()), highlight=False)
    setting = Setting(
        tuple(batch or (1, 4)),
        image_size,
        tuple(backends or ("eager", "inductor")),
        rounds,
        device,
        getattr(torch, dtype),
    )
    found["results"] = []
    for name in names or list(SUBJECTS):
        found["results"].append(measure(name, setting, peer))
        torch.compiler.reset()
        show(found["results"][-1])
    path = output or RESULTS / f"gamma-{device}-{dtype}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
