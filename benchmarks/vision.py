"""Whether explanations of images find the evidence: composites side by side, on trained models.

    python benchmarks/vision.py                    # both embedded models, 200 pictures each
    python benchmarks/vision.py --models digits_convolutional --pictures 50
    python benchmarks/vision.py --tune             # the γ of the transformer's roles, by `tune`
    python benchmarks/vision.py --picture          # results/digits.png: composites side by side

The pictures are held out from training and show one handwritten digit in clutter (`digits.py`), so
the evidence is known: the digit's pixels. Of the pictures that a model gets right, by composite:

    evidence   positive relevance that falls on the digit's pixels, as a share of all of it
    box        the same for the digit's bounding box
    hit        how often the most relevant pixel lies in the box
    deletion   mean logit while the most relevant patches go first (lower is better)
    insertion  mean logit while the least relevant go first, which read backwards is insertion of
               the most relevant (higher is better)
    ΔA^F       insertion − deletion (Achtibat et al. 2024)

Means with 95 % intervals by bootstrap over pictures. The rules for residual joins of Otsuki et al.
2024 (by magnitude, equal) stand beside the plain sum.
"""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import digits
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageClassification

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Composite, Join, Match, ZBox, epsilon_gamma_box
from attnlrp_fx.evaluate import Subject

RESULTS = Path(__file__).parent / "results"
EMBEDDED = Path(attnlrp_fx.__file__).parent / "embedded"
FIGURES = ("evidence", "box", "hit", "deletion", "insertion", "ΔA^F")
SHARES = ("evidence", "box", "hit")
console = Console(width=110)


@dataclass(frozen=True)
class Data:
    """Held-out pictures as a model takes them, and where their evidence is."""

    pixel_values: Tensor
    labels: Tensor
    masks: Tensor
    """(count, height, width) bool."""
    boxes: Tensor


def load(name: str) -> tuple[Any, Any]:
    """An embedded model and its processor."""
    model = AutoModelForImageClassification.from_pretrained(EMBEDDED / name).eval()
    return model, AutoImageProcessor.from_pretrained(EMBEDDED / name)


def held_out(model: Any, processor: Any, count: int) -> Data:
    """The pictures among `count` that a model gets right."""
    pictures = digits.held_out(count, seed=1)
    pixels = processor(images=list(pictures.images), return_tensors="pt")["pixel_values"]
    labels = torch.as_tensor(pictures.labels)
    with torch.no_grad():
        right = torch.cat([model(part).logits.argmax(1) for part in pixels.split(64)]) == labels
    masks, boxes = torch.as_tensor(pictures.masks), torch.as_tensor(digits.boxes(pictures.masks))
    return Data(pixels[right], labels[right], masks[right], boxes[right])


def composites(processor: Any) -> dict[str, Composite]:
    """Every composite by name, those of convolutional networks with each rule for joins."""
    box = ZBox.normalised(processor.image_mean, processor.image_std)
    found = {**COMPOSITES, "epsilon-gamma-box": epsilon_gamma_box(box.low, box.high)}
    for name in ("attnlrp", "epsilon-plus", "attnlrp-vision"):
        for split in ("magnitude", "equal"):
            joined = COMPOSITES[name].with_rules((Match(role="join"), Join(split)))
            found[f"{name}, joins {split}"] = joined
    return found


def figures(explainer: Any, data: Data, batch: int, patch: int) -> dict[str, Tensor]:
    """Each figure of each picture."""
    found: dict[str, list[Tensor]] = {name: [] for name in FIGURES}
    for start in range(0, len(data.labels), batch):
        rows = slice(start, start + batch)
        inputs = {"pixel_values": data.pixel_values[rows]}
        target = attnlrp_fx.Logit(data.labels[rows])
        explanation = explainer(inputs, target=target)
        relevance = explanation.relevance["pixel_values"].sum(1)
        positive = relevance.clamp(min=0)
        total = positive.sum((1, 2))
        found["evidence"].append((positive * data.masks[rows]).sum((1, 2)) / total)
        found["box"].append((positive * data.boxes[rows]).sum((1, 2)) / total)
        most = relevance.flatten(1).argmax(1, keepdim=True)
        found["hit"].append(data.boxes[rows].flatten(1).gather(1, most)[:, 0].float())
        curves = attnlrp_fx.perturbation_curves(
            Subject(explainer).ask(inputs, target),
            relevance,
            perturbation=attnlrp_fx.Perturbation(steps=16, patch=patch, rows=256),
        )
        found["deletion"].append(curves.morf.mean(1))
        found["insertion"].append(curves.lerf.mean(1))
        found["ΔA^F"].append(curves.area)
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def interval(values: Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """The mean and its 95 % interval by bootstrap."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = values[chosen].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    return float(values.mean()), float(low), float(high)


def measure(name: str, pictures: int, batch: int, patch: int) -> dict[str, Any]:
    """One model: every composite's figures."""
    model, processor = load(name)
    data = held_out(model, processor, pictures)
    chance = float(data.masks.double().mean()), float(data.boxes.double().mean())
    start = time.perf_counter()
    example = {"pixel_values": data.pixel_values[:batch]}
    first = attnlrp_fx.compile(model, example, backend="eager")
    rows = {}
    wanted = composites(processor)
    with Progress(transient=True, console=console) as progress:
        task = progress.add_task(name, total=len(wanted))
        for title, composite in wanted.items():
            found = figures(first.with_composite(composite), data, batch, patch)
            rows[title] = {figure: interval(values) for figure, values in found.items()}
            progress.advance(task)
    table = Table(
        title=f"{name}: {len(data.labels)} of {pictures} pictures right; by chance "
        f"{chance[0]:.1%} of relevance on the digit, {chance[1]:.1%} in its box",
        title_justify="left",
        box=None,
    )
    table.add_column("composite", no_wrap=True)
    for figure in FIGURES:
        unit = " %" if figure in SHARES else ""
        table.add_column(figure + unit, justify="right", no_wrap=True)
    for title, values in rows.items():
        table.add_row(title, *(_cell(values[figure], figure) for figure in FIGURES))
    console.print(table)
    return {
        "model": name,
        "pictures": pictures,
        "right": len(data.labels),
        "chance": {"evidence": chance[0], "box": chance[1]},
        "composites": rows,
        "seconds": time.perf_counter() - start,
    }


def _cell(value: Sequence[float], figure: str) -> str:
    mean, low, high = value
    if figure in SHARES:
        return f"{100 * mean:.1f} ±{50 * (high - low):.1f}"
    return f"{mean:.2f} ±{(high - low) / 2:.2f}"


def tuned(pictures: int) -> dict[str, Any]:
    """γ of the transformer's roles on pictures that the table above does not use."""
    model, processor = load("digits_transformer")
    found = digits.held_out(pictures, seed=2)
    pixels = processor(images=list(found.images), return_tensors="pt")["pixel_values"]
    batches = [{"pixel_values": part} for part in pixels.split(32)]
    tuning = attnlrp_fx.tune(model, batches, perturbation=attnlrp_fx.Perturbation(rows=256))
    console.print(tuning)
    return {
        "rows": tuning.rows,
        "trials": [{"gammas": t.gammas, "score": t.score, "error": t.error} for t in tuning.trials],
    }


def draw(path: Path) -> None:
    """Composites side by side on an example image, for the convolutional model."""
    model, processor = load("digits_convolutional")
    image = Image.open(EMBEDDED / "images" / "digit-5.png")
    explanations = {
        name: attnlrp_fx.explain_image(model, processor, image, composite=name)
        for name in ("gradient", "epsilon-plus", "attnlrp-vision")
    }
    attnlrp_fx.Comparison(explanations).figure().savefig(path, dpi=100)


def main(
    models: Annotated[list[str], typer.Option(help="Which embedded models.")] = [  # noqa: B006
        "digits_transformer",
        "digits_convolutional",
    ],
    pictures: Annotated[int, typer.Option(help="Held-out pictures.")] = 200,
    batch: Annotated[int, typer.Option(help="Pictures explained at a time.")] = 50,
    patch: Annotated[int, typer.Option(help="Edge of a patch of the curves, in pixels.")] = 4,
    tune: Annotated[bool, typer.Option(help="Search the transformer's γ instead.")] = False,
    picture: Annotated[bool, typer.Option(help="Draw the README's picture instead.")] = False,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "vision.json",
) -> None:
    """Measure, print tables, write JSON."""
    if picture:
        draw(RESULTS / "digits.png")
        return
    if tune:
        measured = {"tuning": tuned(pictures)}
        out = out.with_name("vision-tuning.json")
    else:
        measured = {"models": [measure(name, pictures, batch, patch) for name in models]}
    about = {"torch": torch.__version__, "python": platform.python_version()}
    out.write_text(json.dumps({**about, **measured}, indent=1, ensure_ascii=False) + "\n")
    console.print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
