"""Agreement with zennit: every rule alone, and every composite, on networks with random weights.

A row a rule or composite, a column a network, and three numbers a cell. Each is the largest
difference over the largest relevance of an image's input, for its highest logit:

1. between ours and zennit's in float32, of the median image;
2. between zennit's own in float32 and in float64, of the median image;
3. between ours and zennit's in float64, of the worst image.

The third tells rounding from error. In float32 it is the median image's, since where a sum of two
signed branches happens to be as small as the stabiliser, rounding moves a relevance by per cents,
zennit's and ours alike; a few images in a hundred have such a sum.

A rule alone stands at every linear layer and convolution; joins and average pools have the epsilon
rule, and activations pass relevance on, as in all of zennit's composites.

zennit sees residual sums as its own `Sum` modules, ours as plain additions. Batch norms are merged
into the convolutions before them, by zennit's canonizer and by our pass. After its merge zennit
leaves a batch norm that still divides by √(1 + eps); that is mended for the comparison (`merging`),
and the last line says how much it is.

    python benchmarks/zennit_peer.py          exit status 1 if a difference is above tolerance
    python benchmarks/zennit_peer.py --networks resnet18 --cases Gamma --cases epsilon-plus
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import convolutional
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from zennit_environment import VERSION, ZennitError, zennit

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Composite, Match
from attnlrp_fx.errors import AttnLRPError
from attnlrp_fx.rules.composites import epsilon_gamma_box
from attnlrp_fx.rules.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Pass,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
)

RESULTS = Path(__file__).parent / "results"
TOLERANCE = (1e-5, 1e-10)
"""The difference allowed in float32 and in float64."""
FINER = 2.0**-29
"""A rounding in float64, as a share of one in float32."""
SLACK = 4.0
"""How much of zennit's own rounding a difference may be; zennit's and ours add up."""
STABILISER = 1e-6
LOW, HIGH = -3.0, 3.0
LOWS, HIGHS = (-3.2, -3.0, -3.1), (3.0, 3.3, 3.1)
"""A box for each channel."""

console = Console(width=120)


@dataclass(frozen=True)
class Network:
    """A model and what goes into it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    """Of the input, batch first."""

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model, and an input within the box of `ZBox`."""
        torch.manual_seed(0)
        model = convolutional.calibrated(self.make(), torch.randn(64, *self.shape[1:]))
        return model, torch.randn(self.shape).clamp(LOW, HIGH)


NETWORKS: Mapping[str, Network] = {
    "mlp": Network(convolutional.mlp, (16, 20)),
    "mlp, gelu": Network(partial(convolutional.mlp, nn.GELU), (16, 20)),
    "mlp, softplus": Network(partial(convolutional.mlp, nn.Softplus), (16, 20)),
    "vgg": Network(partial(convolutional.vgg, batch_norm=False), (16, 3, 32, 32)),
    "vgg, batch norm": Network(partial(convolutional.vgg, batch_norm=True), (16, 3, 32, 32)),
    "varied": Network(convolutional.varied, (16, 3, 32, 32)),
    "resnet18": Network(convolutional.resnet18, (16, 3, 64, 64)),
}


@dataclass(frozen=True)
class Case:
    """One rule or composite on both sides."""

    ours: Composite
    theirs: Callable[[Any, list[Any]], Any]
    """From the module zennit and a list of canonizers to a composite of zennit's."""
    images_only: bool = False
    """zennit's box is for a convolution that comes first, ours for any layer."""

    def fits(self, network: Network) -> bool:
        return len(network.shape) == 4 or not self.images_only


def alone(rule: Rule) -> Composite:
    """Ours with one rule at every linear layer and convolution."""
    weighted = ("convolution", "projection", "dense", "first")
    return COMPOSITES["attnlrp"].with_rules(
        *((Match(role=role), rule) for role in weighted),
        (Match(kind="linear"), Epsilon(STABILISER)),
        (Match(kind="activation"), Pass()),
    )


def their_alone(name: str, options: Mapping[str, Any], zennit: Any, canonizers: list[Any]) -> Any:
    """zennit's with one rule at every linear layer and convolution."""
    types, rules = zennit.types, zennit.rules
    layers = [
        (types.Activation, rules.Pass()),
        (zennit.layer.Sum, rules.Norm()),
        (types.AvgPool, rules.Norm()),
        (types.BatchNorm, rules.Pass()),
        (types.Linear, getattr(rules, name)(**options)),
    ]
    return zennit.composites.LayerMapComposite(layers, canonizers=canonizers)


def their_composite(
    name: str, options: Mapping[str, Any], zennit: Any, canonizers: list[Any]
) -> Any:
    """A composite of zennit's."""
    return getattr(zennit.composites, name)(**options, canonizers=canonizers)


def _image(channels: tuple[float, ...]) -> Tensor:
    return torch.tensor(channels, dtype=torch.float64)[None, :, None, None]


def _rule(rule: Rule, **options: float) -> Case:
    """A rule whose class has the same name on both sides; zennit's stabiliser is its default."""
    return Case(alone(rule), partial(their_alone, type(rule).__name__, options))


def _composite(ours: Composite, name: str, **options: float) -> Case:
    return Case(ours, partial(their_composite, name, options))


CASES: Mapping[str, Case] = {
    "Epsilon": _rule(Epsilon(STABILISER)),
    "Epsilon, 0.25": _rule(Epsilon(0.25), epsilon=0.25),
    "Gamma": _rule(Gamma(epsilon=STABILISER)),
    "Gamma, 2": _rule(Gamma(2.0, epsilon=STABILISER), gamma=2.0),
    "ZPlus": _rule(ZPlus(epsilon=STABILISER)),
    "AlphaBeta": _rule(AlphaBeta(epsilon=STABILISER)),
    "AlphaBeta, 1.5": _rule(AlphaBeta(1.5, 0.5, epsilon=STABILISER), alpha=1.5, beta=0.5),
    "WSquare": _rule(WSquare(epsilon=STABILISER)),
    "Flat": _rule(Flat(epsilon=STABILISER)),
    "ZBox": _rule(ZBox(LOW, HIGH, epsilon=STABILISER), low=LOW, high=HIGH),
    "epsilon-plus": _composite(COMPOSITES["epsilon-plus"], "EpsilonPlus"),
    "epsilon-plus-flat": _composite(COMPOSITES["epsilon-plus-flat"], "EpsilonPlusFlat"),
    "epsilon-alpha2-beta1": _composite(COMPOSITES["epsilon-alpha2-beta1"], "EpsilonAlpha2Beta1"),
    "epsilon-alpha2-beta1-flat": _composite(
        COMPOSITES["epsilon-alpha2-beta1-flat"], "EpsilonAlpha2Beta1Flat"
    ),
    "epsilon-gamma-box": Case(
        epsilon_gamma_box(LOWS, HIGHS),
        partial(their_composite, "EpsilonGammaBox", {"low": _image(LOWS), "high": _image(HIGHS)}),
        images_only=True,
    ),
}


def merging(zennit: Any, exact: bool = True) -> Any:
    """zennit's canonizer that merges batch norms.

    Args:
        zennit: the module.
        exact: set the merged batch norm's eps to 0, so that it is the identity.
    """

    class Exact(zennit.canonizers.SequentialMergeBatchNorm):  # type: ignore[misc, name-defined]
        def register(self, linears: Any, batch_norm: Any) -> None:
            super().register(linears, batch_norm)
            self.eps, batch_norm.eps = batch_norm.eps, 0.0

        def remove(self) -> None:
            super().remove()
            self.batch_norm.eps = self.eps

    return Exact() if exact else zennit.canonizers.SequentialMergeBatchNorm()


def zennit_relevance(
    zennit: Any, case: Case, model: nn.Module, inputs: Tensor, exact: bool = True
) -> tuple[Tensor, Tensor]:
    """Relevance of the input by zennit, and the explained logits."""
    model = convolutional.with_joins(model, lambda: convolutional.SumOf(zennit.layer.Sum()))
    with case.theirs(zennit, [merging(zennit, exact)]).context(model) as hooked:
        inputs = inputs.clone().requires_grad_()
        logits = hooked(inputs)
        highest, index = logits.detach().max(1, keepdim=True)
        seed = torch.zeros_like(logits).scatter(1, index, highest)
        (relevance,) = torch.autograd.grad(logits, inputs, seed)
    return relevance.detach(), highest[:, 0]


def our_relevance(case: Case, model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of the input by this package, eager backend, and the explained logits."""
    explainer = attnlrp_fx.compile(
        model, inputs, composite=case.ours, backend="eager", dynamic_shapes=None
    )
    explanation = explainer(inputs)
    (relevance,) = explanation.relevance.values()
    return relevance, explanation.target_value


def differences(reference: Tensor, candidate: Tensor) -> Tensor:
    """max |a − b| / max |a| of each row."""
    apart = (reference - candidate).abs().flatten(1).amax(1)
    return apart / reference.abs().flatten(1).amax(1)


@dataclass(frozen=True)
class Agreement:
    """What one cell says."""

    float32: float
    """Between ours and zennit's relevance, median row."""
    rounding: float
    """Between zennit's relevance in float32 and in float64, median row."""
    worst_rounding: float
    """The same, worst row."""
    float64: float
    """Between ours and zennit's relevance, worst row."""
    logit: float
    """Between the logits that ours and zennit's explain, float64, worst row."""
    problem: str | None = None
    """Why ours explained nothing."""

    @property
    def agrees(self) -> bool:
        """False where a difference is NaN, too.

        Where zennit's own rounding is above the tolerance, no two programs can agree any better: of
        the median row in float32, and of the worst, scaled to float64.
        """
        single, double = TOLERANCE
        return self.float32 <= max(single, SLACK * self.rounding) and self.float64 <= max(
            double, SLACK * self.worst_rounding * FINER
        )


def compare(zennit: Any, case: Case, network: Network) -> Agreement:
    """One rule or composite on one network."""
    model, inputs = network.build()
    precise, precise_inputs = copy.deepcopy(model).double(), inputs.double()
    expected, _ = zennit_relevance(zennit, case, model, inputs)
    exact, logit = zennit_relevance(zennit, case, precise, precise_inputs)
    roundings = differences(exact, expected.double())
    rounding, worst = float(roundings.median()), float(roundings.max())
    try:
        found, _ = our_relevance(case, model, inputs)
        found_exact, value = our_relevance(case, precise, precise_inputs)
    except AttnLRPError as error:
        nan = float("nan")
        return Agreement(nan, rounding, worst, nan, nan, str(error))
    return Agreement(
        float(differences(expected, found).median()),
        rounding,
        worst,
        float(differences(exact, found_exact).max()),
        float(differences(logit[:, None], value[:, None]).max()),
    )


def inexactness(zennit: Any) -> float:
    """How much zennit's relevance changes when its merged batch norms are the identity."""
    model, inputs = NETWORKS["resnet18"].build()
    model, inputs = model.double(), inputs.double()
    case = CASES["epsilon-plus"]
    exact, _ = zennit_relevance(zennit, case, model, inputs)
    plain, _ = zennit_relevance(zennit, case, model, inputs, exact=False)
    return float(differences(exact, plain).median())


def _cell(found: Agreement) -> str:
    numbers = (found.float32, found.rounding, found.float64)
    return f"[{'green' if found.agrees else 'red'}]" + "\n".join(f"{x:.1e}" for x in numbers)


def main(
    networks: Annotated[list[str] | None, typer.Option(help=", ".join(NETWORKS))] = None,
    cases: Annotated[list[str] | None, typer.Option(help=", ".join(CASES))] = None,
    output: Annotated[Path, typer.Option(help="JSON file of the results")] = RESULTS
    / "zennit.json",
) -> None:
    """Print the table; exit with 1 if a difference is above the tolerance."""
    try:
        peer = zennit()
    except ZennitError as error:
        console.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(1) from error
    chosen = {name: NETWORKS[name] for name in networks or NETWORKS}
    table = Table(
        title="ours against zennit, float32\nzennit's rounding\nours against zennit, float64",
        box=None,
    )
    for column in ("", *chosen):
        table.add_column(column, justify="right" if column else "left")
    results: dict[str, dict[str, Agreement]] = {name: {} for name in cases or CASES}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(results) * len(chosen))
        for name, row in results.items():
            for title, network in chosen.items():
                progress.update(task, description=f"{name}, {title}")
                if CASES[name].fits(network):
                    row[title] = compare(peer, CASES[name], network)
                progress.advance(task)
            table.add_row(name, *(_cell(row[title]) if title in row else "–" for title in chosen))
    console.print(table)
    for name, row in results.items():
        for title, found in row.items():
            if found.problem:
                console.print(f"{name}, {title}: {found.problem}", style="red", markup=False)
    change = inexactness(peer)
    console.print(
        f"zennit's merged batch norms as they are, dividing by √(1 + eps), change its own relevance"
        f" by {change:.1e} (epsilon-plus, resnet18, median image, float64)"
    )
    written = {
        "zennit": VERSION,
        "torch": torch.__version__,
        "merged_batch_norm_eps": change,
        "results": {
            name: {title: vars(found) for title, found in row.items()}
            for name, row in results.items()
        },
    }
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps(written, indent=1) + "\n")
    if not all(found.agrees for row in results.values() for found in row.values()):
        console.print("[red]a difference is above the tolerance")
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
