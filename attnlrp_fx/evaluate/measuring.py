"""Methods measured on data: figures of each sample, means with intervals, one table.

table = measured(subject, batches, ["attnlrp", "ig"])
print(table); table.to_dict()
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from attnlrp_fx.errors import InputError
from attnlrp_fx.evaluate.evidence import (
    evidence_share,
    intersection_over_union,
    top1_in_evidence,
)
from attnlrp_fx.evaluate.faithfulness import Perturbation, perturbation_curves
from attnlrp_fx.evaluate.intervals import Interval, interval, paired_difference
from attnlrp_fx.evaluate.methods import Method, method_named
from attnlrp_fx.evaluate.subjects import Inputs, Question, Subject, of_rows
from attnlrp_fx.targets import TargetLike

ENOUGH = 8
"""Samples that a method needs in order to be called first."""

AREA = "ΔA^F"
ABSOLUTE = "ΔA^F by |R|"
FIGURES: Mapping[str, str] = {
    AREA: "area between the curves, least and most relevant parts first; higher is better",
    ABSOLUTE: "the same where parts are ranked by the magnitude of their relevance",
    "AOPC": "mean fall of the target, most relevant parts first; higher is better",
    "compr.": "comprehensiveness: mean fall of the probability without them; higher is better",
    "suff.": "sufficiency: mean fall of the probability with them alone; lower is better",
    "top-1": "how often the most relevant place is evidence",
    "IoU": "of as many places as are evidence, the most relevant: intersection over union",
    "mass": "share of positive relevance on evidence",
}
"""What each figure is."""


@dataclass(frozen=True)
class Batch:
    """Samples to explain together."""

    inputs: Inputs
    target: TargetLike = None
    evidence: Tensor | None = None
    """(batch, places) bool, where it is known."""
    candidates: Tensor | None = None
    """(batch, places) bool: the places among which evidence is looked for; None: all."""

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass
class Measured:
    """One method's figures."""

    figures: dict[str, list[float]] = field(default_factory=dict)
    """By name, a number a sample."""
    seconds: float = 0.0
    """Of explaining, a sample."""
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Mean "morf" and "lerf" over samples, step by step."""
    samples: int = 0

    def interval(self, figure: str) -> Interval:
        """The mean and its 95 % interval."""
        return interval(self.figures[figure])


def measure(
    subject: Subject,
    questions: Sequence[tuple[Batch, Question]],
    method: Method,
    perturbation: Perturbation | None = None,
    *,
    probabilities: bool = False,
    absolute: bool = False,
    on_batch: Callable[[], None] = lambda: None,
) -> Measured:
    """The figures of one method on batches that have been asked about.

    Args:
        subject: the model.
        questions: batches, and what is explained of them.
        method: makes explanations.
        perturbation: how inputs are taken away.
        probabilities: whether comprehensiveness and sufficiency are measured too.
        absolute: whether parts are ranked by magnitude too.
        on_batch: called after each batch.
    """
    options = perturbation or Perturbation()
    found: dict[str, list[Tensor]] = {}
    curves: dict[str, list[Tensor]] = {"morf": [], "lerf": []}
    seconds, samples = 0.0, 0
    for number, (batch, question) in enumerate(questions):
        if number == 0:  # compiles what it needs
            first = {name: value[:1] for name, value in question.inputs.items()}
            method(subject, first, of_rows(question.target, question.rows[:1]))
        start = time.perf_counter()
        relevance = method(subject, question.inputs, question.target)
        seconds += time.perf_counter() - start
        samples += len(question)
        drawn = perturbation_curves(question, relevance, perturbation=options)
        new = {AREA: drawn.area, "AOPC": drawn.aopc}
        curves["morf"].append(drawn.morf)
        curves["lerf"].append(drawn.lerf)
        if absolute:
            by_magnitude = replace(options, ranking="absolute")
            drawn = perturbation_curves(question, relevance, perturbation=by_magnitude)
            new[ABSOLUTE] = drawn.area
        if probabilities:
            likely = replace(options, score="probability")
            falls = perturbation_curves(question, relevance, perturbation=likely)
            new |= {"compr.": falls.comprehensiveness, "suff.": falls.sufficiency}
        if batch.evidence is not None:
            known = (relevance, batch.evidence, batch.candidates)
            new |= {
                "top-1": top1_in_evidence(*known),
                "IoU": intersection_over_union(*known),
                "mass": evidence_share(*known),
            }
        for name, values in new.items():
            found.setdefault(name, []).append(values)
        on_batch()
    if not samples:
        raise InputError("there is nothing to measure on", remedy="pass at least one batch")
    return Measured(
        {name: torch.cat(values).double().tolist() for name, values in found.items()},
        seconds / samples,
        {name: torch.cat(values).double().mean(0).tolist() for name, values in curves.items()},
        samples,
    )


@dataclass
class Scores:
    """The figures of several methods on the same samples; prints as a table."""

    methods: dict[str, Measured] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """By method, why it has no figures."""

    def best(self, figure: str = AREA) -> str:
        """The method with the highest mean."""
        having = [name for name, one in self.methods.items() if figure in one.figures]
        return max(having, key=lambda name: self.methods[name].interval(figure).mean)

    def is_first(self, name: str, figure: str = AREA) -> bool:
        """Whether no other method is better on the samples that both have (paired, 95 %).

        Of methods with fewer than `ENOUGH` samples nothing is said: they are not first.
        """
        mine = self.methods[name].figures[figure]
        if len(mine) < ENOUGH <= max(one.samples for one in self.methods.values()):
            return False
        return not any(
            self.gap(other, name, figure).low > 0
            for other, one in self.methods.items()
            if other != name and len(one.figures.get(figure, ())) >= min(ENOUGH, len(mine))
        )

    def gap(self, better: str, worse: str, figure: str = AREA) -> Interval:
        """The paired difference of two methods on the first samples, which both have."""
        a, b = self.methods[better].figures[figure], self.methods[worse].figures[figure]
        count = min(len(a), len(b))
        return paired_difference(a[:count], b[:count])

    def to_dict(self) -> dict[str, Any]:
        """Means, intervals, seconds and samples, for JSON."""
        return {
            "methods": {
                name: {
                    "samples": one.samples,
                    "seconds": one.seconds,
                    **{
                        figure: {"mean": i.mean, "low": i.low, "high": i.high}
                        for figure in one.figures
                        for i in [one.interval(figure)]
                    },
                }
                for name, one in self.methods.items()
            },
            "left_out": self.left_out,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """All but AOPC, which says half of what ΔA^F says."""
        known = {figure for one in self.methods.values() for figure in one.figures}
        figures = [figure for figure in FIGURES if figure in known - {"AOPC"}]
        table = Table(box=None)
        table.add_column("method", no_wrap=True, min_width=max(map(len, self.methods)))
        for column in (*figures, "seconds", "samples"):
            table.add_column(column, justify="right", no_wrap=True)
        ranked = sorted(
            self.methods, key=lambda name: -self.methods[name].interval(figures[0]).mean
        )
        for name in ranked:
            one = self.methods[name]
            tied = self.is_first(name, figures[0])
            cells = [str(one.interval(f)) if f in one.figures else "" for f in figures]
            cells += [f"{one.seconds:.2g}", str(one.samples)]
            table.add_row(name, *cells, style="bold" if tied else "")
        yield table
        yield f"bold: no other has a higher {figures[0]} on the same samples (paired, 95 %)"
        for name, why in self.left_out.items():
            yield f"{name}: {why}"


def measured(
    subject: Subject,
    batches: Iterable[Batch],
    methods: Sequence[str] | Mapping[str, Method],
    perturbation: Perturbation | None = None,
    *,
    probabilities: bool = False,
    progress: bool = True,
) -> Scores:
    """Several methods on the same samples.

    Args:
        subject: the model.
        batches: the samples.
        methods: names of methods, or methods by name; one that the model has nothing for is left
            out with the reason.
        perturbation: how inputs are taken away.
        probabilities: whether comprehensiveness and sufficiency are measured too.
        progress: whether a progress bar with the time left is shown, on standard error.

    Raises:
        InputError: there is no method of a name, or no sample, or no method can be used.
        MissingExtraError: scipy or captum is not installed, and needed.

    Example:
        >>> import torch
        >>> from attnlrp_fx.evaluate import Batch, Subject, measured
        >>> net = torch.nn.Linear(4, 2).eval()
        >>> subject = Subject.compile(net, torch.randn(3, 4))
        >>> batch = Batch({"input": torch.randn(20, 4)})
        >>> scores = measured(subject, [batch], ["attnlrp", "random"], progress=False)
        >>> scores.best()
        'attnlrp'
    """
    chosen = (
        methods if isinstance(methods, Mapping) else {name: method_named(name) for name in methods}
    )
    questions = [(batch, subject.ask(batch.inputs, batch.target)) for batch in batches]
    scores = Scores()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=Console(stderr=True), disable=not progress, transient=True
    ) as bar:
        task = bar.add_task("", total=len(chosen) * len(questions))
        for number, (name, method) in enumerate(chosen.items(), 1):
            bar.update(task, description=name)
            try:
                scores.methods[name] = measure(
                    subject,
                    questions,
                    method,
                    perturbation,
                    probabilities=probabilities,
                    on_batch=lambda: bar.advance(task),
                )
            except InputError as error:
                if not questions or len(chosen) == 1:
                    raise
                scores.left_out[name] = error.what
                bar.update(task, completed=number * len(questions))
    if not scores.methods:
        raise InputError("no method could be used", why="; ".join(scores.left_out.values()))
    return scores
