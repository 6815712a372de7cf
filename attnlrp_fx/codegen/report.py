"""The compiler's report: what each pass did, where each rule stands, what was compiled."""

from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from attnlrp_fx.codegen.memory import MemoryPlan
from attnlrp_fx.passes.base import PassResult


@dataclass(frozen=True)
class Compilation:
    """One program that was traced and compiled."""

    device: str
    seeded: tuple[str, ...]
    """The outputs that a target may seed."""
    nodes: int
    """Nodes that were traced and compiled; those of regions that are alike count once."""
    regions: int
    """How many pieces the graph was cut into, at its repeated blocks."""
    distinct: int
    """How many of them are unlike each other: so many programs there are."""
    emit_seconds: float
    backend_seconds: float
    refused: tuple[str, ...] = ()
    """Why Inductor could not compile some programs, which run op by op: one reason for each."""
    derived_bytes: int = 0
    """What is kept of values made of parameters alone."""
    unpadded: bool = False
    """Whether it serves inputs without padding alone, whose attention needs no mask."""
    memory: MemoryPlan | None = None
    """What is kept of the forward side, if not as much as makes it fastest."""


@dataclass(frozen=True)
class RuleCount:
    """How often a rule stands at an op."""

    rule: str
    op: str
    count: int
    first: str
    """The first such node: module path and source line."""


@dataclass(frozen=True)
class Report:
    """What compiling a model did."""

    composite: str
    backend: str
    capture_seconds: float
    nodes: int
    """Nodes of the captured graph."""
    notes: tuple[str, ...]
    """What capture changed or gave up."""
    passes: tuple[PassResult, ...]
    rules: tuple[RuleCount, ...]
    fallbacks: tuple[str, ...]
    """Ops that no rule claimed and that fell through to their gradient: node and source line."""
    compilations: list[Compilation] = field(default_factory=list)

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield (
            f"composite [b]{self.composite}[/b], backend [b]{self.backend}[/b]; captured "
            f"{self.nodes} nodes in {self.capture_seconds:.1f} s"
        )
        for note in self.notes:
            yield f"  note: {note}"
        passes = Table(title="passes", title_justify="left", box=None)
        for column in ("pass", "changes", "near misses"):
            passes.add_column(column, overflow="fold")
        for result in self.passes:
            passes.add_row(result.name, str(result.changes), "\n".join(result.near_misses))
        yield passes
        rules = Table(title="rules", title_justify="left", box=None)
        for column in ("rule", "op", "count", "first at"):
            rules.add_column(column, overflow="fold")
        for row in self.rules:
            rules.add_row(row.rule, row.op, str(row.count), row.first)
        yield rules
        for fallback in self.fallbacks:
            yield f"  [b]gradient fallback[/b]: {fallback}"
        for done in self.compilations:
            yield (
                f"program for {', '.join(done.seeded)} on {done.device}"
                f"{', without padding' if done.unpadded else ''}: {done.nodes} nodes, "
                f"{done.distinct} distinct of {done.regions} regions, traced in "
                f"{done.emit_seconds:.1f} s, compiled in {done.backend_seconds:.1f} s"
            )
            for reason in done.refused:
                yield f"  note: a program runs op by op: {reason}"
            if done.derived_bytes:
                kept = done.derived_bytes / 2**20
                yield f"  note: keeps {kept:.1f} MiB of values made of parameters alone"
            if done.memory is not None:
                plan = done.memory
                yield (
                    f"  note: memory {plan.memory}: predicted peak {plan.peak / 2**20:.1f} MiB, "
                    f"{plan.fast_peak / 2**20:.1f} MiB if fast, {plan.operations:.2f} times the "
                    "operations, at the example's sizes"
                )
