"""Pruning by relevance: how accurate a trained model stays when its least weights go.

    python benchmarks/pruning.py                          # the three embedded models, 10 minutes
    python benchmarks/pruning.py --models digits_convolutional --samples 64

Weights are ranked on samples of the training data, by
- *relevance*: |Σ R_W| over samples, R_W = W ⊙ ∂ for the logit of the true class, as SparC3 does
  (Hatefi et al. 2025, arXiv 2506.13727), and *relevance, absolute*: Σ |R_W|;
- *gradient*: the same with the gradient in the place of relevance, |Σ W ⊙ ∂logit/∂W|, and absolute;
- *magnitude*: |W|; and at *random*.
The lowest go, the same share in every layer but the last: single *weights*, or whole *neurons*
(rows of a weight with their bias), which are ranked by the sum over the row. Nothing is trained
afterwards. Accuracy on held-out data; that of *random* is the mean over --seeds orders. The area is
the mean accuracy over all sparsities.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import digits
import models
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx.loading import load

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Scores = Mapping[str, Tensor]
console = Console(width=110)


class Trained(NamedTuple):
    """A trained model, what ranks its weights, and what judges it."""

    model: nn.Module
    composite: str
    samples: list[dict[str, Tensor]]
    labels: list[int]
    held_out: list[tuple[dict[str, Tensor], Tensor]]
    """Batches and their labels."""

    def accuracy(self) -> float:
        """The share of held-out samples that it gets right."""
        right = count = 0
        with torch.inference_mode():
            for inputs, labels in self.held_out:
                right += int((self.model(**inputs).logits.argmax(-1) == labels).sum())
                count += len(labels)
        return right / count


def sentiment(samples: int, judged: int) -> Trained:
    """The embedded classifier of film reviews."""
    model, tokenizer = load("sentiment")
    chosen = torch.Generator().manual_seed(0)
    training = models.movie_reviews("train")
    order = torch.randperm(len(training), generator=chosen).tolist()[:samples]
    rows = [dict(tokenizer(training[i][0], truncation=True, return_tensors="pt")) for i in order]
    judges = sorted(models.movie_reviews("held_out")[:judged], key=lambda review: len(review[0]))
    batches = []
    for start in range(0, len(judges), 64):
        texts, labels = zip(*judges[start : start + 64], strict=True)
        inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        batches.append((dict(inputs), torch.tensor(labels)))
    return Trained(model, "attnlrp", rows, [training[i][1] for i in order], batches)


def pictures(name: str, samples: int, judged: int) -> Trained:
    """An embedded classifier of digits."""
    model, processor = load(name)

    def read(of: digits.Pictures) -> Tensor:
        pixels: Tensor = processor(images=list(of.images), return_tensors="pt")["pixel_values"]
        return pixels

    training, judges = digits.training(samples, seed=7), digits.held_out(judged, seed=1)
    rows = [{"pixel_values": image[None]} for image in read(training)]
    labels = torch.as_tensor(judges.labels)
    parts = zip(read(judges).split(128), labels.split(128), strict=True)
    batches = [({"pixel_values": part}, own) for part, own in parts]
    return Trained(model, "attnlrp-vision", rows, list(map(int, training.labels)), batches)


MODELS: dict[str, Callable[[int, int], Trained]] = {
    "sentiment": sentiment,
    "digits_transformer": lambda *sizes: pictures("digits_transformer", *sizes),
    "digits_convolutional": lambda *sizes: pictures("digits_convolutional", *sizes),
}


def scored(trained: Trained, seeds: int) -> dict[str, list[Scores]]:
    """What each criterion says of every weight; of random ones, one for each seed."""
    target = attnlrp_fx.Logit(torch.tensor(trained.labels))
    found: dict[str, list[Scores]] = {}
    explainer = None
    for name, composite in (("relevance", trained.composite), ("gradient", "gradient")):
        if explainer is None:
            example = {n: torch.cat([v, v]) for n, v in trained.samples[0].items()}
            explainer = attnlrp_fx.compile(
                trained.model, example, composite=composite, backend="eager"
            )
        else:
            explainer = explainer.with_composite(composite)
        relevance = explainer.weight_relevance(trained.samples, target=target)
        weights = {n: v for n, v in relevance.items() if v.dim() > 1}
        found[name] = [{n: v.abs() for n, v in weights.items()}]
        found[f"{name}, absolute"] = [{n: relevance.absolute[n] for n in weights}]
    names = list(found["relevance"][0])[:-1]  # all but the head
    parameters = dict(trained.model.named_parameters())
    found = {criterion: [{n: s[0][n] for n in names}] for criterion, s in found.items()}
    found["magnitude"] = [{n: parameters[n].detach().abs() for n in names}]
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    found["random"] = [
        {n: torch.rand(parameters[n].shape, generator=g) for n in names} for g in generators
    ]
    return found


@contextmanager
def pruned(model: nn.Module, scores: Scores, sparsity: float, unit: str) -> Iterator[None]:
    """The model without the lowest weights, or neurons, of each layer."""
    parameters = dict(model.named_parameters())
    touched = [n for name in scores for n in (name, _bias(name)) if n in parameters]
    kept = {name: parameters[name].detach().clone() for name in touched}
    with torch.no_grad():
        for name, score in scores.items():
            ranked = score.flatten(1).sum(1) if unit == "neurons" else score.flatten()
            lowest = ranked.argsort(stable=True)[: int(sparsity * len(ranked))]
            if unit == "weights":
                parameters[name].view(-1)[lowest] = 0
                continue
            parameters[name][lowest] = 0
            if _bias(name) in parameters:
                parameters[_bias(name)][lowest] = 0
        try:
            yield
        finally:
            for name, value in kept.items():
                parameters[name].copy_(value)


def _bias(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def measure(name: str, samples: int, judged: int, seeds: int) -> dict[str, Any]:
    """One model: accuracy by unit, criterion and sparsity."""
    trained = MODELS[name](samples, judged)
    console.print(f"{name}: relevance of weights on {samples} samples")
    criteria = scored(trained, seeds)
    whole = trained.accuracy()
    curves: dict[str, dict[str, list[float]]] = {}
    for unit in ("weights", "neurons"):
        curves[unit] = {}
        for criterion, several in criteria.items():
            curve = []
            for sparsity in SPARSITIES:
                found = [whole] if not sparsity else []
                for scores in several if sparsity else ():
                    with pruned(trained.model, scores, sparsity, unit):
                        found.append(trained.accuracy())
                curve.append(sum(found) / len(found))
            curves[unit][criterion] = curve
        show(name, unit, curves[unit])
    assert trained.accuracy() == whole, "the model is not what it was"
    counted = sum(score.numel() for score in criteria["magnitude"][0].values())
    return {
        "model": name,
        "composite": trained.composite,
        "samples": samples,
        "held_out": sum(len(labels) for _, labels in trained.held_out),
        "weights": counted,
        "accuracy": curves,
    }


def area(curve: list[float]) -> float:
    """The mean accuracy over sparsities."""
    return sum(curve) / len(curve)


def show(name: str, unit: str, curves: Mapping[str, list[float]]) -> None:
    """Print a table: a line a criterion, a column a sparsity."""
    table = Table(title=f"{name}: accuracy in %, share of {unit} removed", title_justify="left")
    table.add_column("by")
    for sparsity in SPARSITIES:
        table.add_column(f"{100 * sparsity:.0f} %", justify="right")
    table.add_column("area", justify="right")
    for criterion, curve in sorted(curves.items(), key=lambda item: -area(item[1])):
        table.add_row(criterion, *(f"{100 * a:.1f}" for a in curve), f"{100 * area(curve):.1f}")
    console.print(table)


def draw(measured: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over sparsity, a panel for each model and unit."""
    from matplotlib.figure import Figure

    units = ("weights", "neurons")
    figure = Figure(figsize=(4 * len(measured), 6), layout="constrained")
    panels = figure.subplots(len(units), len(measured), squeeze=False, sharey="col")
    for column, found in enumerate(measured):
        for row, unit in enumerate(units):
            panel = panels[row][column]
            for criterion, curve in found["accuracy"][unit].items():
                dashed = "--" if "absolute" in criterion else "-"
                panel.plot(SPARSITIES, [100 * a for a in curve], dashed, label=criterion)
            panel.set_title(f"{found['model']}, {unit}")
            panel.set_xlabel("share removed")
            panel.set_ylabel("accuracy, %")
    panels[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=100)


def main(
    chosen: Annotated[
        list[str] | None, typer.Option("--models", help=f"Some of: {', '.join(MODELS)}.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Training samples that rank weights.")] = 256,
    judged: Annotated[int, typer.Option(help="Held-out samples that judge.")] = 1000,
    seeds: Annotated[int, typer.Option(help="Orders of random pruning.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the JSON goes.")] = RESULTS / "pruning.json",
) -> None:
    """Measure, print tables, write JSON and a picture beside it."""
    measured = [measure(name, samples, judged, seeds) for name in chosen or MODELS]
    about = {"torch": torch.__version__, "python": platform.python_version()}
    about |= {"sparsities": list(SPARSITIES)}
    text = json.dumps({**about, "models": measured}, indent=1, ensure_ascii=False)
    out.write_text(text + "\n")
    draw(measured, out.with_suffix(".png"))
    console.print(f"written to {out} and {out.with_suffix('.png').name}")


if __name__ == "__main__":
    typer.run(main)
