"""The ledger: where relevance goes, node by node.

For every node, Σ y·c_y = Σ_inputs x·c_x + absorbed, and over the graph the explained inputs'
relevance and everything absorbed add up to the target's value (law 1). What is measured of a node,
and what a law gives, is with `attnlrp_fx.calculus.postings`; a `Book` knows the graph and makes a
ledger of the postings of one explanation, in float64. What a node absorbs by design, as softmax
does, is what it does not pass on; all else is given by a law, so the sum closes only if every
pullback obeys its.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.calculus.postings import (
    TOKENS_MOVED,
    Account,
    absorbs_by_design,
    explained_inputs,
    is_carrier,
)
from attnlrp_fx.errors import MissingExtraError
from attnlrp_fx.graph.provenance import module_path, source_line

if TYPE_CHECKING:
    import pandas as pd

CAUSES: Mapping[str, str] = {
    "bias": "a bias",
    "shift": "the shift of a norm",
    "constant": "a constant that is added",
    "softmax": "softmax",
    "intercept": "an activation's value at 0",
    "epsilon": "the stabiliser ε",
    "zero": "a zero that has no share to pass on",
    "gradient": "a plain gradient",
    "target": "a target that is not linear in the outputs",
}
"""What absorbs relevance, in words. Other causes are kinds of op under the Taylor rule."""


@dataclass(frozen=True)
class Entry:
    """One node's line in the ledger, summed over the batch."""

    node: str
    """Name of the node in the rewritten graph."""
    rule: str
    """The rule that stands there."""
    kind: str
    """The kind of its op."""
    module: str
    """Path of the module that it was captured in."""
    source: str
    """The user's source line."""
    received: float
    passed: float
    causes: Mapping[str, float] = field(default_factory=dict)
    """What it absorbed, by cause."""

    @property
    def absorbed(self) -> float:
        """What did not go on to a value that is explained."""
        return sum(self.causes.values())

    @property
    def cause(self) -> str:
        """What absorbed most of it; "" if nothing could."""
        return max(self.causes, key=lambda cause: abs(self.causes[cause]), default="")

    @property
    def discrepancy(self) -> float:
        """received − passed − absorbed: what rounding lost here."""
        return self.received - self.passed - self.absorbed


@dataclass(frozen=True)
class Ledger:
    """Where the target's relevance went: inputs + absorbed = target (law 1)."""

    target: float
    """The explained value, summed over the batch."""
    inputs: Mapping[str, float]
    """Relevance of each explained input, summed over the batch and all of its elements."""
    entries: tuple[Entry, ...]
    """One entry a node that relevance passed through, in the graph's order."""
    flows: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Relevance that a node, the second, hands to a value that it reads, the first."""

    @property
    def absorbed(self) -> float:
        """Everything that did not reach an input."""
        return sum(entry.absorbed for entry in self.entries)

    @property
    def residual(self) -> float:
        """target − inputs − absorbed: zero to the precision of the arithmetic."""
        return self.target - sum(self.inputs.values()) - self.absorbed

    def by_cause(self) -> dict[str, float]:
        """Absorbed relevance by cause, largest first."""
        return _largest_first((c, v) for entry in self.entries for c, v in entry.causes.items())

    def by_kind(self) -> dict[str, float]:
        """Absorbed relevance by kind of op, largest first."""
        return _largest_first((entry.kind, entry.absorbed) for entry in self.entries)

    def by_module(self, depth: int | None = None) -> dict[str, float]:
        """Absorbed relevance by module, largest first.

        Args:
            depth: how many parts of a module's path count; None: all.
        """
        return _largest_first(
            (".".join(entry.module.split(".")[:depth]), entry.absorbed) for entry in self.entries
        )

    def largest(self, count: int = 10) -> list[Entry]:
        """The entries that absorb most, largest first."""
        absorbing = [entry for entry in self.entries if entry.absorbed]
        return sorted(absorbing, key=lambda entry: -abs(entry.absorbed))[:count]

    def sentences(self, count: int = 5) -> list[str]:
        """The largest absorbers in plain words, as shares of the target.

        Of alike parts of one module, several heads' softmax, say, each has a sentence of its own.
        """
        parts = [(e, cause, v) for e in self.entries for cause, v in e.causes.items() if v]
        parts.sort(key=lambda part: -abs(part[2]))
        return [self._sentence(*part) for part in parts[:count]]

    def to_pandas(self) -> "pd.DataFrame":
        """One row a node and cause, "" and 0 where it absorbed nothing.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError(
                "A DataFrame needs pandas.",
                why=str(error),
                remedy="pip install 'attnlrp_fx[pandas]'",
            ) from error
        rows = [
            (e.node, e.rule, e.kind, e.module, e.source, e.received, e.passed, cause, absorbed)
            for e in self.entries
            for cause, absorbed in (e.causes or {"": 0.0}).items()
        ]
        columns = "node rule kind module source received passed cause absorbed".split()
        return pd.DataFrame(rows, columns=columns)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"ledger: target {self.target:.6g}", title_justify="left", box=None)
        table.add_column("where", overflow="fold", ratio=1)
        for column in ("node", "why"):
            table.add_column(column, no_wrap=True)
        for column in ("relevance", "% of target"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, value in self.inputs.items():
            table.add_row(f"[b]{name}[/b]", "", "reached", f"{value:.5g}", self._percent(value))
        shown = self.largest()
        for entry in shown:
            value = entry.absorbed
            row = (entry.module, entry.node, entry.cause, f"{value:.5g}", self._percent(value))
            table.add_row(*row)
        rest = self.absorbed - sum(entry.absorbed for entry in shown)
        others = f"{len(self.entries) - len(shown)} others"
        table.add_row(others, "", "absorbed", f"{rest:.5g}", self._percent(rest))
        table.add_row("residual", "", "rounding", f"{self.residual:.2g}", "")
        yield table

    def _percent(self, value: float) -> str:
        return f"{100 * value / self.target:.1f}" if self.target else "-"

    def _sentence(self, entry: Entry, cause: str, value: float) -> str:
        share = f"{abs(100 * value / self.target):.3g} %" if self.target else f"{abs(value):.3g}"
        verb = "absorbs" if not self.target or value / self.target > 0 else "adds"
        what = {"bias": "bias", "shift": "shift", "intercept": "intercept"}.get(cause)
        place = _place(entry.module)
        if cause == "target":
            return f"the target itself, not linear in the outputs, {verb} {share}"
        if what is not None:
            return f"the {what} of {place or entry.node} {verb} {share}"
        where = f"in {place}" if place else ""
        node = f"('{entry.node}')" if cause != "softmax" or not place else ""
        parts = (CAUSES.get(cause, cause), where, node, verb, share)
        return " ".join(part for part in parts if part)


def _place(module: str) -> str:
    """A module's path in words: "attention.output.dense of layer 3"."""
    numbered = re.match(
        r"^(?:.*\.)?(?P<name>[^.\d][^.]*)\.(?P<number>\d+)(?:\.(?P<rest>.*))?$", module
    )
    if numbered is None:
        return module
    name = numbered["name"].removesuffix("s") if len(numbered["name"]) > 2 else numbered["name"]
    part = numbered["rest"]
    return f"{part} in {name} {numbered['number']}" if part else f"{name} {numbered['number']}"


def _largest_first(parts: Iterable[tuple[str, float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for key, value in parts:
        totals[key] = totals.get(key, 0.0) + value
    return dict(sorted(totals.items(), key=lambda item: -abs(item[1])))


@dataclass(frozen=True)
class _Line:
    """What is known of a node before anything is explained."""

    node: fx.Node
    inputs: tuple[str, ...]
    """The explained values that it reads; of a source, what it stands for."""
    described: tuple[str, str, str, str, str]
    is_carrier: bool
    """Whether it passes on all that it receives, to one value."""
    has_rule: bool


class Book:
    """What the ledgers of one rewritten graph share: its nodes, in reverse.

    Args:
        graph: the rewritten graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._lines: list[_Line] = []
        self._output = graph.output_node().name
        for node in reversed(graph.nodes):
            is_relevance = node.target in ops.RELEVANCE_OPS
            if is_relevance:
                read = explained_inputs(node)
            elif node.target is ops.source:
                origin = node.kwargs.get("ids", node.args[0])
                read = [origin] if isinstance(origin, fx.Node) else []
            elif ops.is_explained(node):
                read = node.all_input_nodes[:1]
            elif node.op == "call_function":
                read = []
            else:
                continue
            described = (
                node.name,
                str(node.meta.get("rule", "Move()")),
                str(node.meta.get("kind", "tokens")),
                module_path(node),
                source_line(node),
            )
            carries = not is_relevance or is_carrier(node)
            names = tuple(leaf.name for leaf in read)
            self._lines.append(_Line(node, names, described, bool(read) and carries, is_relevance))

    def read(
        self,
        postings: Mapping[tuple[str, Account], float],
        *,
        target: float,
        seeded: Mapping[str, float],
        inputs: Mapping[str, float],
    ) -> Ledger:
        """A ledger of what a program posted.

        Args:
            postings: by node and account, summed over the batch.
            target: the target's value.
            seeded: Σ y·c of each node that the target seeds; what a target that is not linear
                keeps is the rest.
            inputs: relevance of each explained input.
        """
        by_node: dict[str, dict[Account, float]] = {}
        for (name, account), value in postings.items():
            by_node.setdefault(name, {})[account] = value
        received = dict(seeded)
        flows = {(name, self._output): value for name, value in seeded.items()}
        entries = []
        for line in self._lines:
            name = line.node.name
            posted = by_node.get(name, {})
            if name not in received and not posted:
                continue
            arrived = received.get(name, 0.0)
            passed = {k: v for k, v in posted.items() if isinstance(k, int)}
            if line.is_carrier and not posted:
                passed = {0: arrived}
            elif line.has_rule and not absorbs_by_design(line.node, bool(passed)):
                passed |= _following(line, arrived, posted)
            for k, value in passed.items() if line.inputs else ():
                edge = line.inputs[k], name
                flows[edge] = flows.get(edge, 0.0) + value
                if line.node.target is not ops.source:
                    received[line.inputs[k]] = received.get(line.inputs[k], 0.0) + value
            handed = sum(passed.values())
            causes = {k: v for k, v in posted.items() if isinstance(k, str)}
            if TOKENS_MOVED in causes:
                arrived = handed + causes[TOKENS_MOVED]
            elif not line.has_rule and not causes:
                continue
            elif (
                line.has_rule and not line.is_carrier and absorbs_by_design(line.node, bool(passed))
            ):
                causes[_cause_by_design(line.node)] = arrived - handed - sum(causes.values())
            entries.append(Entry(*line.described, arrived, handed, causes))
        whole = sum(seeded.values())
        last = Entry("target", "seed", "target", "", "", target, whole, {"target": target - whole})
        return Ledger(target, inputs, (*reversed(entries), last), flows)


def _following(line: _Line, arrived: float, posted: Mapping[Account, float]) -> dict[int, float]:
    """What goes to the values whose edges were not posted: what is left, in equal shares."""
    missing = [k for k in range(len(line.inputs)) if k not in posted]
    if len(missing) > 1 and line.node.target is not ops.uniform:
        return {}  # nothing was handed to them
    return {k: (arrived - sum(posted.values())) / len(missing) for k in missing}


def _cause_by_design(node: fx.Node) -> str:
    """Why a node absorbs what no law gives."""
    if node.target is ops.attention or (
        node.target is ops.taylor and node.meta.get("kind") == "softmax"
    ):
        return "softmax"
    return "gradient" if node.target is ops.gradient else str(node.meta.get("kind", "taylor"))
