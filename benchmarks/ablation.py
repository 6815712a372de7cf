"""Does relevance find the neurons that matter? Ablate the top k and see the logit move.

    python benchmarks/ablation.py                                  # the three models, some minutes
    python benchmarks/ablation.py --models sentiment --samples 8

For each sample the neurons of all layers are ranked for the highest logit (of a language model, at
the last position): by relevance summed over positions, by its magnitudes summed, by mean
|activation| over positions, and at random. The first k are set to zero at every position, and the
logit is read again. What is reported is how far it falls, and how far it moves in either direction,
with 95 % bootstrap intervals over samples, and the difference from relevance within each sample,
which is what an interval must keep from zero.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import digits
import models
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnlrp_fx
from attnlrp_fx import Ablate, Explanation, Latent, Logit
from attnlrp_fx.evaluate.intervals import Interval, interval, paired_difference
from attnlrp_fx.loading import load

RESULTS = Path(__file__).parent / "results"
RELEVANCE, RANDOM = "relevance", "random"
SCORES: dict[str, Callable[[Latent], Tensor]] = {
    RELEVANCE: lambda latent: latent.unit_relevance[0].sum(0),
    "|relevance|": lambda latent: latent.unit_relevance[0].abs().sum(0),
    "|activation|": lambda latent: latent.unit_activation[0].abs().mean(0),
}
"""What neurons are ranked by, for the first row of a batch."""
CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo", "Egypt": "Cairo",
    "Russia": "Moscow", "Greece": "Athens", "Austria": "Vienna", "Cuba": "Havana", "Peru": "Lima",
    "Germany": "Berlin", "Portugal": "Lisbon", "Norway": "Oslo", "Sweden": "Stockholm",
    "Poland": "Warsaw", "Hungary": "Budapest", "Ireland": "Dublin", "Kenya": "Nairobi",
    "Iraq": "Baghdad", "Iran": "Tehran", "China": "Beijing", "Thailand": "Bangkok",
    "Finland": "Helsinki", "Denmark": "Copenhagen",
}  # fmt: skip
console = Console(width=150)


def sentiment(count: int) -> tuple[Any, list[dict[str, Tensor]], dict[str, Any]]:
    """The embedded classifier, on held-out sentences."""
    model, tokenizer = load()
    texts = [sentence for sentence, _ in models.movie_reviews("held_out")[:count]]
    return model, [dict(tokenizer(one, return_tensors="pt")) for one in texts], {}


def smollm2(count: int) -> tuple[Any, list[dict[str, Tensor]], dict[str, Any]]:
    """SmolLM2-135M, on the names of capitals."""
    model = AutoModelForCausalLM.from_pretrained(models.smollm2(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2())
    texts = [f"The capital of {country} is" for country in [*CAPITALS][:count]]
    inputs = [dict(tokenizer(one, return_tensors="pt")) for one in texts]
    return model, inputs, {"logits_to_keep": 1}


def digits_transformer(count: int) -> tuple[Any, list[dict[str, Tensor]], dict[str, Any]]:
    """The embedded transformer of pictures, on held-out digits in clutter."""
    model, processor = load("digits_transformer")
    images = digits.held_out(count, seed=1).images
    return model, [dict(processor(images=one, return_tensors="pt")) for one in images], {}


MODELS = {"sentiment": sentiment, "digits_transformer": digits_transformer, "smollm2": smollm2}


def ranking(explanation: Explanation, method: str, seed: int) -> list[tuple[str, int]]:
    """All neurons, first those that count most."""
    latents = explanation.latent.of_role("mlp.neurons")
    names = [(latent.name, unit) for latent in latents for unit in range(latent.units)]
    if method == RANDOM:
        order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    else:
        order = torch.cat([SCORES[method](latent) for latent in latents]).argsort(descending=True)
    return [names[i] for i in order.tolist()]


def ablated(neurons: Sequence[tuple[str, int]]) -> dict[str, Ablate]:
    """The intervention that sets some neurons to zero."""
    units: dict[str, list[int]] = {}
    for name, unit in neurons:
        units.setdefault(name, []).append(unit)
    return {name: Ablate(some) for name, some in units.items()}


class Measured(NamedTuple):
    """What was measured with the first k neurons by one method."""

    falls: list[float]
    """By how much the logit falls, for each sample."""
    ranked: list[set[tuple[str, int]]]
    """The neurons, for each sample."""


def moved(name: str, ks: Sequence[int], count: int) -> dict[tuple[str, int], Measured]:
    """By method and k, what happens."""
    model, samples, more = MODELS[name](count)
    console.print(f"{name}: compiling")
    explainer = attnlrp_fx.compile(
        model, {**samples[0], **more}, backend="eager", latent=["mlp.neurons"], editable=True
    )
    found: dict[tuple[str, int], Measured] = {}
    for number, inputs in enumerate(track(samples, name, console=console)):
        plain = explainer(inputs)
        target = Logit(int(plain.target_index[0]))
        for method in (*SCORES, RANDOM):
            ranked = ranking(plain, method, number)
            for k in ks:
                now = explainer(inputs, target=target, interventions=ablated(ranked[:k]))
                fall = float(plain.target_value[0] - now.target_value[0])
                measured = found.setdefault((method, k), Measured([], []))
                measured.falls.append(fall)
                measured.ranked.append({*ranked[:k]})
    return found


def ends(of: Interval) -> tuple[float, float, float]:
    return of.mean, of.low, of.high


def summary(found: Mapping[tuple[str, int], Measured]) -> list[dict[str, Any]]:
    """A row a method and k."""
    rows = []
    for (method, k), measured in found.items():
        fall, best = torch.tensor(measured.falls), torch.tensor(found[RELEVANCE, k].falls)
        rows.append(
            {
                "method": method,
                "k": k,
                "fall": ends(interval(fall)),
                "moved": ends(interval(fall.abs())),
                "relevance falls further by": ends(paired_difference(best, fall)),
                "relevance moves further by": ends(paired_difference(best.abs(), fall.abs())),
                "same in all": len(set.intersection(*measured.ranked)),
                "samples": len(measured.falls),
            }
        )
    return rows


def show(name: str, rows: list[dict[str, Any]]) -> None:
    """A table a model."""
    table = Table(title=f"{name}, {rows[0]['samples']} samples", title_justify="left", box=None)
    columns = ("fall", "moved", "relevance falls further by", "relevance moves further by")
    for column in ("neurons", "ranked by", "same in all", *columns):
        table.add_column(column)
    for row in sorted(rows, key=lambda row: int(row["k"])):
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*row[column]) for column in columns]
        shown = cells if row["method"] != RELEVANCE else [*cells[:2], "", ""]
        table.add_row(str(row["k"]), row["method"], str(row["same in all"]), *shown)
    console.print(table)


def main(
    names: Annotated[list[str] | None, typer.Option("--models", help="which models")] = None,
    k: Annotated[list[int] | None, typer.Option(help="how many neurons")] = None,
    samples: int = 24,
    output: Path | None = None,
) -> None:
    """Measure, print and write the tables."""
    found: dict[str, Any] = {"torch": torch.__version__}
    for name in names or list(MODELS):
        found[name] = summary(moved(name, k or [5, 20, 80], samples))
        show(name, found[name])
    path = output or RESULTS / "ablation.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
