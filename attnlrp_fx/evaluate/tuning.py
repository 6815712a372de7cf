"""Tuning: which γ makes explanations of a user's own data most faithful.

`tune` tries every combination of γ for roles of layers (the convolutions, the linear layers), on
the user's data, and scores each by its perturbation curves. γ helps most where gradients are noisy,
in vision transformers above all (Achtibat et al. 2024, Table 4), and how much of it helps depends
on the model.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from attnlrp_fx.compiler import compile
from attnlrp_fx.errors import InputError
from attnlrp_fx.evaluate.faithfulness import Perturbation, perturbation_curves
from attnlrp_fx.evaluate.subjects import Subject
from attnlrp_fx.rules.composites import Composite, Match, composite_named
from attnlrp_fx.rules.roles import Role
from attnlrp_fx.rules.rules import Gamma
from attnlrp_fx.targets import TargetLike

GAMMAS: Mapping[str, Sequence[float]] = {
    Role.CONVOLUTION: (0.0, 0.1, 0.25, 0.5, 1.0),
    Role.DENSE: (0.0, 0.01, 0.05, 0.1, 0.25),
}
"""What is tried if nothing else is asked for; 0 is the ε rule."""


@dataclass(frozen=True)
class Trial:
    """One combination of γ and how faithful its explanations are."""

    gammas: dict[str, float]
    """γ by role."""
    score: float
    """ΔA^F: the mean over rows of the area between LeRF and MoRF curves; higher is better."""
    error: float
    """Standard error of the mean over rows; NaN of a single row."""
    composite: Composite


@dataclass(frozen=True)
class Tuning:
    """What a search found, best first; prints as a table."""

    trials: tuple[Trial, ...]
    rows: int
    """How many rows of data each trial explained."""

    @property
    def best(self) -> Trial:
        """The trial with the highest score."""
        return self.trials[0]

    @property
    def composite(self) -> Composite:
        """The best trial's composite, for `compile`."""
        return self.best.composite

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"faithfulness by γ, {self.rows} rows", title_justify="left", box=None)
        for role in self.best.gammas:
            table.add_column(f"γ {role}", justify="right")
        for column in ("ΔA^F", "±"):
            table.add_column(column, justify="right")
        for trial in self.trials:
            style = "bold" if trial is self.best else ""
            cells = [f"{gamma:g}" for gamma in trial.gammas.values()]
            table.add_row(*cells, f"{trial.score:.4g}", f"{trial.error:.2g}", style=style)
        yield table


def tune(
    model: nn.Module,
    data: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]],
    *,
    gammas: Mapping[str, Sequence[float]] = GAMMAS,
    composite: str | Composite = "attnlrp-vision",
    target: TargetLike = None,
    input: str | None = None,
    perturbation: Perturbation | None = None,
    progress: bool = True,
    **options: Any,
) -> Tuning:
    """Find the γ of each role whose explanations are most faithful on some data.

    Every combination is tried on every row. Rows count for the differences between combinations:
    a dozen tell large ones from none; look at the column ± before believing a small one.

    Args:
        model: a module in evaluation mode.
        data: one batch of inputs by name, or several.
        gammas: by role (of `attnlrp_fx.rules.roles.Role`), the values of γ to try; 0 is the ε rule.
        composite: what decides about everything that no role claims.
        target: as in `compile`.
        input: the input to perturb, where several are explained.
        perturbation: how inputs are taken away.
        progress: whether a progress bar is shown.
        **options: anything else that `compile` takes.

    Raises:
        InputError: there is no data, or nothing to try, or a role does not exist.
        ValueError: a γ is negative.

    Example:
        >>> import torch, attnlrp_fx
        >>> net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = {"input": torch.randn(5, 8)}
        >>> found = attnlrp_fx.tune(net.eval(), data, gammas={"dense": (0, 0.25)}, progress=False)
        >>> len(found.trials), found.trials[-1].composite.name.startswith("attnlrp-vision with")
        (2, True)
    """
    batches = [dict(data)] if isinstance(data, Mapping) else [dict(batch) for batch in data]
    if not batches:
        raise InputError("there is no data to tune on")
    if not gammas or not all(gammas.values()):
        raise InputError("there is no γ to try", remedy="pass gammas={role: (values, ...)}")
    base = composite_named(composite)
    subject = Subject(
        compile(
            model,
            batches[0],
            **{"backend": "eager", "composite": base, "target": target, **options},
        ),
        input,
    )
    combinations = [
        dict(zip(gammas, values, strict=True)) for values in itertools.product(*gammas.values())
    ]
    trials = []
    questions = [subject.ask(batch, target) for batch in batches]
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("tuning γ", total=len(combinations) * len(batches))
        for chosen in combinations:
            composite = with_gammas(base, chosen)
            tried = subject.explainer.with_composite(composite)
            areas = []
            for question in questions:
                relevance = tried(question.inputs, target=question.target).relevance[subject.name]
                curves = perturbation_curves(question, relevance, perturbation=perturbation)
                areas.append(curves.area)
                bar.advance(task)
            area = torch.cat(areas).double()
            error = float(area.std()) / math.sqrt(len(area)) if len(area) > 1 else math.nan
            trials.append(Trial(chosen, float(area.mean()), error, composite))
    ordered = sorted(trials, key=lambda trial: -trial.score)
    return Tuning(tuple(ordered), sum(next(iter(b.values())).shape[0] for b in batches))


def with_gammas(composite: Composite, gammas: Mapping[str, float]) -> Composite:
    """A composite with a γ for each role, in the place of what it says of that role alone.

    What it says of no role comes first, in the order given.
    """
    rules = {Match(role=role): Gamma(gamma) for role, gamma in gammas.items()}
    known = {match for match, _ in composite.entries}
    new = [(match, rule) for match, rule in rules.items() if match not in known]
    kept = [(match, rules.get(match, rule)) for match, rule in composite.entries]
    said = ", ".join(f"γ {role} {gamma:g}" for role, gamma in gammas.items())
    return Composite(f"{composite.name} with {said}", (*new, *kept))
