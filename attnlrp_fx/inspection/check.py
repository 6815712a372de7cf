"""Did I miss a matmul? Every op between explained inputs and outputs, its rule, by which authority.

What is listed are the model's own ops, as they were captured, whatever passes made of them: each is
followed to the node of the rewritten graph that it is, or is part of.
"""

from collections import Counter
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import fx

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import is_matrix_product
from attnlrp_fx.graph.provenance import describe, module_path, short_source, target_name
from attnlrp_fx.inspection.graphs import Graphs
from attnlrp_fx.passes.assign_rules import FALLBACK

NOT_NEEDED = "no relevance: its users hold it constant, or nothing needs it"


@dataclass(frozen=True)
class Checked:
    """Alike ops of the model: how many, and what answers for them."""

    op: str
    is_product: bool
    """Whether it is a matrix product, a convolution or a linear layer."""
    rule: str
    authority: str
    """The composite's entry and, of a pattern, the pass that recognised it; "" if there is none."""
    count: int
    first: str
    """Module and source line of the first."""


@dataclass(frozen=True)
class PathCheck:
    """Every op on the path, with its rule."""

    composite: str
    rows: tuple[Checked, ...]
    missing: tuple[str, ...]
    """Ops without a rule: node, module and source line."""

    @property
    def ops(self) -> int:
        """How many ops are on the path."""
        return sum(row.count for row in self.rows)

    @property
    def products(self) -> int:
        """How many of them are matrix products."""
        return sum(row.count for row in self.rows if row.is_product)

    @property
    def verdict(self) -> str:
        """The answer in one sentence."""
        if not self.missing:
            return (
                f"all {self.ops} ops on the path have a rule, {self.products} matrix products "
                "among them"
            )
        return f"{len(self.missing)} of {self.ops} ops on the path have no rule"

    def __str__(self) -> str:
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"composite {self.composite}", title_justify="left", box=None)
        for column in ("op of the model", "count", "rule", "by", "first at"):
            table.add_column(column, justify="right" if column == "count" else "left")
        for row in self.rows:
            style = "" if row.authority else "bold red"
            name = f"[b]{row.op}[/b]" if row.is_product else row.op
            cells = (name, str(row.count), row.rule or "none", row.authority, row.first)
            table.add_row(*cells, style=style)
        yield table
        for place in self.missing:
            yield f"[bold red]no rule[/bold red]: {place}"
        yield ("[green]✓[/green] " if not self.missing else "[red]✗[/red] ") + self.verdict


def check(graphs: Graphs) -> PathCheck:
    """Follow every op on the path to its rule.

    Args:
        graphs: of a model compiled with fallback="gradient": ops that fell back have no rule.
    """
    counts: Counter[tuple[str, bool, str, str]] = Counter()
    first: dict[tuple[str, bool, str, str], fx.Node] = {}
    missing = []
    for node in graphs.on_the_path:
        claim = graphs.claims[node.name]
        rule, authority = _answer(claim.into, claim.claimed_by)
        if not authority:
            missing.append(describe(node))
        key = target_name(node.target), is_matrix_product(node.target), rule, authority
        counts[key] += 1
        first.setdefault(key, node)
    order = sorted(counts, key=lambda key: (bool(key[3]), not key[1], -counts[key]))
    rows = [
        Checked(*key, counts[key], f"{module_path(first[key])} {short_source(first[key])}".strip())
        for key in order
    ]
    return PathCheck(graphs.composite, tuple(rows), tuple(missing))


def _answer(into: fx.Node | None, claimed_by: str) -> tuple[str, str]:
    """The rule of what an op is now, and who gave it; no authority if nobody did."""
    if into is not None and into.meta.get("authority") == FALLBACK:
        return "", ""
    by = [f"{claimed_by}" if claimed_by else ""]
    if into is None or (into.target not in ops.RELEVANCE_OPS and "rule" not in into.meta):
        return "-", ", ".join([*filter(None, by), NOT_NEEDED])
    by.append(str(into.meta.get("authority", "")))
    return str(into.meta.get("rule", "")), ", ".join(filter(None, by)) or "part of several outputs"
