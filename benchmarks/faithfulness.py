"""Whether explanations are faithful: every method on every task, as in Table 1 of the paper.

    python benchmarks/faithfulness.py                                  the whole table
    python benchmarks/faithfulness.py --tasks lm --methods attnlrp --methods ig
    python benchmarks/faithfulness.py --restart                        forget what was measured
    python benchmarks/faithfulness.py --search                         rules on other samples

ΔA^F is the area between the curves of the target's logit when the least and the most relevant
tokens (patches of an image) are set to zero first (Achtibat et al. 2024), in logits; higher is
better. Of known evidence, *top-1* is how often the most relevant token of the context, or pixel, is
evidence. Means with 95 % intervals by bootstrap over samples. Bold: no other method is better on
the samples that both have, by a paired test; methods with fewer than 8 samples are never bold.

A run that was stopped goes on where it was: each method of each task is kept as soon as it is
measured. Tables go to `results/faithfulness.md`, numbers to `.json`, curves to `.png`.
"""

import json
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from faithfulness_tasks import TASKS, Prepared, Task
from models import cache_directory
from peaks import peak_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from attnlrp_fx import COMPOSITES, Attention, Composite, Gamma, InputError, Match
from attnlrp_fx.evaluate import (
    METHODS,
    Measured,
    Method,
    Scores,
    interval,
    measure,
    paired_difference,
)
from attnlrp_fx.evaluate.measuring import ABSOLUTE, AREA
from attnlrp_fx.evaluate.methods import KernelShap, Occlusion, Relevance
from attnlrp_fx.files import write_atomically
from attnlrp_fx.graph.operators import Kind
from attnlrp_fx.rules.roles import Role
from attnlrp_fx.rules.rules import Constant, Epsilon, Gradient, Join, Rule, ZPlus

RESULTS = Path(__file__).parent / "results"
EXPENSIVE = ("ig", "smoothgrad", "kernel-shap", "occlusion", "atman")
"""What runs the model many times, and gets fewer samples."""

VISION = ("grad-cam", "attnlrp-vision")
TEXT = ("attnlrp-contrast",)
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def methods_of(task: Task) -> dict[str, Method]:
    """The methods that a task is measured with."""
    unfit = TEXT if task.is_vision else VISION
    found = {name: method for name, method in METHODS.items() if name not in unfit}
    if task.is_vision:
        found |= {"occlusion": Occlusion(patch=4), "kernel-shap": KernelShap(patch=4)}
    return found


def state_file() -> Path:
    """What has been measured so far, sample by sample."""
    return cache_directory() / "faithfulness.json"


def read_state() -> dict[str, Any]:
    """By task and method; empty if there is none."""
    path = state_file()
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def keep(task: str, method: str, found: dict[str, Any]) -> dict[str, Any]:
    """Add one measurement to what another process may have added to meanwhile; all of it."""
    state = read_state()
    state.setdefault(task, {})[method] = found
    state_file().parent.mkdir(parents=True, exist_ok=True)
    write_atomically(state_file(), json.dumps(state))
    return state


def first_samples(prepared: Prepared, count: int) -> Prepared:
    """As many whole batches as give that many samples."""
    kept, seen = [], 0
    for batch, question in prepared.questions:
        if seen < count:
            kept.append((batch, question))
            seen += len(question)
    return Prepared(prepared.subject, kept, prepared.perturbation)


def memory_of(prepared: Prepared, method: Method) -> int:
    """The most bytes that explaining one sample holds at a time, parameters apart."""
    batch, _ = prepared.questions[0]
    inputs = {name: value[:1] for name, value in batch.inputs.items()}
    one = prepared.subject.ask(inputs)
    return peak_of(lambda: method(prepared.subject, one.inputs, one.target), "cpu")


def measure_method(prepared: Prepared, task: Task, name: str, method: Method) -> dict[str, Any]:
    """One method on one task: figures of each sample, or why there are none."""
    count = task.few if name in EXPENSIVE else task.samples
    some = first_samples(prepared, count)
    try:
        found = measure(
            some.subject,
            some.questions,
            method,
            some.perturbation,
            probabilities=task.probabilities,
            absolute=task.absolute,
        )
    except InputError as error:
        return {"left_out": error.what}
    return {
        "figures": {key: [round(v, 5) for v in values] for key, values in found.figures.items()},
        "curves": found.curves,
        "seconds": found.seconds,
        "samples": found.samples,
        "memory": memory_of(some, method),
    }


def scores_of(state: Mapping[str, Any]) -> Scores:
    """What was measured of a task."""
    scores = Scores()
    for name, found in state.items():
        if "left_out" in found:
            scores.left_out[name] = found["left_out"]
        else:
            scores.methods[name] = Measured(
                found["figures"], found["seconds"], found["curves"], found["samples"]
            )
    return scores


def tables(state: Mapping[str, Any]) -> str:
    """Markdown: ΔA^F, known evidence, and what each method takes."""
    scores = {task: scores_of(state[task]) for task in TASKS if task in state}
    names = [name for name in METHODS if any(name in one.methods for one in scores.values())]
    parts = []
    for figure, title in (
        (
            AREA,
            "ΔA^F, in logits; bold: no other method is better on the same samples (paired, 95 %)",
        ),
        (ABSOLUTE, "ΔA^F where parts are ranked by the magnitude of their relevance"),
        ("top-1", "top-1, the share of samples whose most relevant place is evidence"),
    ):
        having = {
            t: s for t, s in scores.items() if any(figure in m.figures for m in s.methods.values())
        }
        if having:
            parts.append(_table(title, names, having, figure))
    parts.append(_costs(names, scores, state))
    missing = [
        f"- {t}, {name}: {why}" for t, s in scores.items() for name, why in s.left_out.items()
    ]
    return "\n\n".join(parts) + ("\n\nLeft out:\n\n" + "\n".join(missing) if missing else "") + "\n"


def _table(title: str, names: list[str], scores: Mapping[str, Scores], figure: str) -> str:
    lines = [f"{title}", "", "| | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for name in names:
        if not any(figure in s.methods[name].figures for s in scores.values() if name in s.methods):
            continue
        cells = []
        for one in scores.values():
            if name not in one.methods or figure not in one.methods[name].figures:
                cells.append("")
                continue
            found = one.methods[name].interval(figure)
            is_first = one.is_first(name, figure)
            text = (
                f"{found.mean:.0%}"
                if figure == "top-1"
                else f"{found.mean:.2f} ± {found.reach:.2f}"
            )
            cells.append(f"**{text}**" if is_first else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    counts = [
        sorted({m.samples for m in one.methods.values()}, reverse=True) for one in scores.values()
    ]
    lines.append("| samples | " + " | ".join(" / ".join(map(str, c)) for c in counts) + " |")
    return "\n".join(lines)


def _costs(names: list[str], scores: Mapping[str, Scores], state: Mapping[str, Any]) -> str:
    lines = ["Seconds a sample, one core; of the first task also MiB at most for one sample", ""]
    lines += ["| | MiB | " + " | ".join(scores) + " |", "|---" * (len(scores) + 2) + "|"]
    first = next(iter(scores))
    for name in names:
        kept = state[first].get(name, {}).get("memory")
        cells = [
            f"{one.methods[name].seconds:.2g}" if name in one.methods else ""
            for one in scores.values()
        ]
        memory = "" if kept is None else f"{kept / 2**20:.3g}"
        lines.append(f"| {name} | {memory} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(state: Mapping[str, Any], path: Path) -> None:
    """Mean curves of a few methods, a panel a task: least relevant first above, most below."""
    from matplotlib.figure import Figure

    shown = ("attnlrp", "best", "attnlrp-vision", "cp-lrp", "gradient-rollout", "ig", "random")
    tasks = [name for name in TASKS if name in state]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, name in zip(axes, tasks, strict=False):
        for number, method in enumerate(shown):
            curves = state[name].get(method, {}).get("curves")
            if curves:
                share = torch.linspace(0, 1, len(curves["morf"]))
                axis.plot(share, curves["lerf"], color=f"C{number}", label=method)
                axis.plot(share, curves["morf"], color=f"C{number}", linestyle="--")
        axis.set_title(name)
        axis.set_xlabel("share set to zero")
        axis.set_ylabel("logit")
    for axis in axes[len(tasks) :]:
        axis.axis("off")
    handles = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        [f"{label}: least relevant first (dashed: most)" for label in handles],
        loc="outside lower center",
        ncols=2,
        fontsize=8,
    )
    figure.savefig(path, dpi=110)


def write(state: Mapping[str, Any], name: str = "faithfulness") -> str:
    """Tables, numbers and curves of what was measured."""
    text = tables(state)
    about = {"torch": torch.__version__, "python": platform.python_version()}
    summary = {
        task: {
            **scores_of(state[task]).to_dict(),
            "behind attnlrp": _differences(scores_of(state[task]), task),
            "memory": {n: m["memory"] for n, m in state[task].items() if "memory" in m},
        }
        for task in state
    }
    numbers = json.dumps({**about, "tasks": summary}, indent=1, ensure_ascii=False)
    write_atomically(RESULTS / f"{name}.json", numbers + "\n")
    write_atomically(RESULTS / f"{name}.md", text)
    draw(state, RESULTS / f"{name}.png")
    return text


def _differences(scores: Scores, task: str) -> dict[str, list[float]]:
    """AttnLRP − each method, paired: mean, low, high."""
    ours = "attnlrp-vision" if TASKS[task].is_vision else "attnlrp"
    if ours not in scores.methods:
        return {}
    found = {}
    for name in scores.methods:
        gap = scores.gap(ours, name)
        found[name] = [gap.mean, gap.low, gap.high]
    return found


def candidates() -> dict[str, Composite]:
    """One or two changes each to the rules of AttnLRP, CP-LRP or "best"."""
    base, held, best = (COMPOSITES[name] for name in ("attnlrp", "cp-lrp", "best"))
    gate = (Match(role=Role.GATE), Constant())
    join = (Match(role=Role.JOIN), Join("magnitude"))

    def attention(weights: float, points: int = 0) -> tuple[Match, Rule]:
        return Match(kind=Kind.ATTENTION), Attention(weights, points)

    def dense(rule: Rule) -> tuple[Match, Rule]:
        return Match(role=Role.DENSE), rule

    def gradient(kind: Kind) -> tuple[Match, Rule]:
        return Match(kind=kind), Gradient()

    changes: dict[str, tuple[Composite, tuple[tuple[Match, Rule], ...]]] = {
        "attention weights 0": (base, (attention(0.0),)),
        "attention weights 0.25": (base, (attention(0.25),)),
        "gates constant": (base, (gate,)),
        "joins by magnitude": (base, (join,)),
        "γ 0.1 in dense layers": (base, (dense(Gamma(0.1)),)),
        "gradient of activations": (base, (gradient(Kind.ACTIVATION),)),
        "gradient of attention": (base, (gradient(Kind.ATTENTION),)),
        "gradient of attention and products": (
            base,
            (gradient(Kind.ATTENTION), gradient(Kind.PRODUCT)),
        ),
        "cp-lrp, joins by magnitude": (held, (join,)),
        "cp-lrp, γ 0.1 in dense layers": (held, (dense(Gamma(0.1)),)),
        "cp-lrp, ε 0.1 in dense layers": (held, (dense(Epsilon(0.1)),)),
        "cp-lrp, z⁺ in dense layers": (held, (dense(ZPlus()),)),
        "cp-lrp, gradient of activations": (held, (gradient(Kind.ACTIVATION),)),
        "best, gradient of activations": (best, (gradient(Kind.ACTIVATION),)),
        "integrated, attention weights 0.5": (base, (attention(0.5, 8),)),
        "integrated, attention weights 0.75": (base, (attention(0.75, 8),)),
        "integrated, attention weights 0.5, gates constant": (base, (attention(0.5, 8), gate)),
        "integrated, attention weights 0.25, gates constant": (base, (attention(0.25, 8), gate)),
    }
    changed = {name: start.with_rules(*entries) for name, (start, entries) in changes.items()}
    return {"attnlrp": base, "cp-lrp": held, "best": best, **changed}


def search(tasks: list[str], samples: int, names: Collection[str], console: Console) -> None:
    """ΔA^F of candidate rules on samples that the table does not use.

    Args:
        tasks: names of tasks.
        samples: how many; another number may be other samples. A candidate that was measured on as
            many is not measured again.
        names: which candidates; all if empty. AttnLRP is always among them.
        console: where the table goes, beside `results/search.md` and `.json`.
    """
    kept = cache_directory() / "search.json"
    state: dict[str, dict[str, list[float]]] = (
        json.loads(kept.read_text()) if kept.is_file() else {}
    )
    chosen = {
        name: candidate
        for name, candidate in candidates().items()
        if not names or name in {"attnlrp", *names}
    }
    for name in tasks:
        found = state.setdefault(f"{name}, {samples} samples", {})
        todo = [n for n in chosen if n not in found]
        prepared = TASKS[name].prepare(samples, 1) if todo else None
        for candidate in todo:
            assert prepared is not None
            method = Relevance(chosen[candidate])
            one = measure(prepared.subject, prepared.questions, method, prepared.perturbation)
            found[candidate] = [round(value, 5) for value in one.figures[AREA]]
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(kept, json.dumps(state))
    text = searched(state)
    write_atomically(RESULTS / "search.md", text)
    write_atomically(
        RESULTS / "search.json", json.dumps(state, indent=1, ensure_ascii=False) + "\n"
    )
    console.print(text)


def searched(state: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Markdown: ΔA^F of each candidate, and how far it is ahead of AttnLRP on the same samples."""
    parts = []
    for task, found in state.items():
        lines = [task, "", "| rules | ΔA^F | ahead of attnlrp, paired |", "|---" * 3 + "|"]
        for name in sorted(found, key=lambda name: -interval(found[name]).mean):
            mean = interval(found[name])
            gap = paired_difference(found[name], found["attnlrp"])
            ahead = f"{gap.mean:.2f} ({gap.low:.2f} to {gap.high:.2f})"
            cells = (name, f"{mean.mean:.2f} ± {mean.reach:.2f}", ahead)
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def main(
    tasks: Annotated[list[str] | None, typer.Option(help="Which tasks; all if none.")] = None,
    methods: Annotated[list[str] | None, typer.Option(help="Which methods; all if none.")] = None,
    restart: Annotated[bool, typer.Option(help="Forget what was measured.")] = False,
    searching: Annotated[bool, typer.Option("--search", help="Compare candidate rules.")] = False,
    samples: Annotated[int, typer.Option(help="Samples of --search.")] = 40,
) -> None:
    """Measure what is not measured yet, and write tables, numbers and curves."""
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    console = Console(width=130, highlight=False)
    chosen = [TASKS[name] for name in tasks or TASKS]
    if searching:
        search([task.name for task in chosen], samples, methods or (), console)
        return
    if restart:
        state_file().unlink(missing_ok=True)
    state = read_state()
    todo = {
        task.name: sorted(
            (
                name
                for name in methods_of(task)
                if name in (methods or METHODS) and name not in state.get(task.name, {})
            ),
            key=lambda name: name in EXPENSIVE,
        )
        for task in chosen
    }
    minutes = sum(task.minutes * len(todo[task.name]) / len(methods_of(task)) for task in chosen)
    console.print(
        f"{sum(map(len, todo.values()))} measurements to make, about {minutes:.0f} minutes on one "
        "core, trained models apart"
    )
    started = time.perf_counter()
    with Progress(*COLUMNS, console=console) as bar:
        shown = bar.add_task("", total=sum(map(len, todo.values())))
        for task in chosen:
            if not todo[task.name]:
                continue
            bar.update(shown, description=f"{task.name}: preparing")
            prepared = task.prepare(task.samples, 0)
            for name in todo[task.name]:
                bar.update(shown, description=f"{task.name}: {name}")
                begun = time.perf_counter()
                found = measure_method(prepared, task, name, methods_of(task)[name])
                state = keep(task.name, name, found)
                bar.advance(shown)
                if not console.is_terminal:
                    took = time.perf_counter() - begun
                    console.print(f"{task.name}, {name}: {took:.0f} s")
    console.print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    console.print(write(state))


if __name__ == "__main__":
    typer.run(main)
