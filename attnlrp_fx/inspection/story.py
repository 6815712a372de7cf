"""One node's story: the user's line, the pass that claimed it, its rule, its program."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text
from torch import fx, nn

from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.provenance import module_class, module_path, source_line, target_name
from attnlrp_fx.inspection.graphs import Graphs
from attnlrp_fx.inspection.listing import Line, line_of

SHOWN = 12
"""How many lines of each side are printed."""


@dataclass(frozen=True)
class Story:
    """What became of one node of the captured graph, or where one of the rewritten came from."""

    node: str
    op: str
    module: str
    source: str
    """The user's line."""
    claimed_by: str
    """The pass that took the node into a pattern, or made it; "" if it is as it was captured."""
    into: str
    """The node of the rewritten graph that it is now, or is part of; "" if nothing needs it."""
    parts: tuple[str, ...]
    """The captured nodes that this node was made of."""
    rule: str
    """The rule that stands there; "" where no relevance passes."""
    authority: str
    """The entry of the composite that gave the rule."""
    formula: str
    rewritten: str
    """Its line in the rewritten graph."""
    program: tuple[Line, ...]
    """Its lines in the program, forward and relevance."""
    near_misses: tuple[tuple[str, str], ...]
    """The passes that almost took it into their patterns, and why they did not."""

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        rule = Text.assemble((self.rule, "cyan"), "  ", self.formula) if self.rule else None
        rows: list[tuple[str, Any]] = [
            ("source", self.source),
            ("module", self.module),
            ("claimed by", self.claimed_by and f"{self.claimed_by}, into '{self.into}'"),
            ("made of", ", ".join(self.parts)),
            ("rule", rule or "none: no relevance passes here"),
            ("by", self.authority),
            ("rewritten", self.rewritten),
        ]
        for name, value in rows:
            if value:
                table.add_row(name, value if isinstance(value, Text) else Text(str(value)))
        for side in ("forward", "relevance"):
            lines = [line for line in self.program if line.constructed_by.startswith(side)]
            texts = [f"{line.code}  # {line.shape}" for line in lines[:SHOWN]]
            texts += [f"... {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            if texts:
                table.add_row(side, Text("\n".join(texts)))
        for name, reason in self.near_misses:
            table.add_row("near miss", Text(f"{name}: {reason}"))
        yield Group(Text.assemble((self.node, "bold"), f"  {self.op}"), table)


@dataclass(frozen=True)
class Stories:
    """The stories of a module's nodes, in the graph's order."""

    module: str
    stories: tuple[Story, ...]

    def __len__(self) -> int:
        return len(self.stories)

    def __getitem__(self, index: int) -> Story:
        return self.stories[index]

    def __str__(self) -> str:
        return "\n".join(map(str, self.stories))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.stories


def trace(
    graphs: Graphs, what: str | fx.Node | nn.Module, model: nn.Module | None = None
) -> Story | Stories:
    """The story of a node, or of all nodes of a module that relevance passes through.

    Args:
        graphs: the graphs of a compiled model.
        what: a node or its name, in the captured or the rewritten graph; a module's path; or a
            module of the model.
        model: the model, to find a module's path in.

    Raises:
        InputError: there is no such node or module.
    """
    if isinstance(what, nn.Module):
        paths = [name for name, module in (model or what).named_modules() if module is what]
        name = paths[0] if paths else type(what).__name__
    else:
        name = what.name if isinstance(what, fx.Node) else what
    rewritten = {node.name: node for node in graphs.rewritten.graph.nodes}
    if not isinstance(what, nn.Module):
        if name in rewritten:
            return _story(graphs, rewritten[name], rewritten[name])
        if name in graphs.claims:
            claim = graphs.claims[name]
            return _story(graphs, claim.node, claim.into, claim.claimed_by)
    found = [node for node in graphs.nodes_of(name) if "rule" in node.meta]
    if not found:
        known = [*rewritten, *graphs.claims]
        raise InputError(
            f"there is no node and no module '{name}' that relevance passes through",
            remedy=f"look at explainer.show('rewritten'); nodes are called: {_some(known)}",
        )
    return Stories(name, tuple(_story(graphs, node, node) for node in found))


def _story(graphs: Graphs, node: fx.Node, into: fx.Node | None, claimed_by: str = "") -> Story:
    meta = {} if into is None else into.meta
    program = [
        line_of(line, {n.name: n for n in [into]} if into is not None else {})
        for line in graphs.program.graph.nodes
        if into is not None and (line.meta.get("custom") or {}).get("from") == into.name
    ]
    made_of = graphs.made_of.get(into.name, ()) if into is not None else ()
    path = module_path(node)
    made_by = str(meta.get("constructed_by", "")) if into is node else ""
    names = dict.fromkeys([node.name, *(part.name for part in made_of)])
    return Story(
        node=node.name,
        op=target_name(node.meta.get("op", node.target)),
        module=f"{path} ({module_class(node)})" if path else "",
        source=source_line(node),
        claimed_by=claimed_by or (made_by if made_by != "assign_rules" else ""),
        into="" if into is None else into.name,
        parts=tuple(part.name for part in made_of if part.name != node.name),
        rule=str(meta.get("rule", "")),
        authority=str(meta.get("authority", "")),
        formula=str(meta.get("formula", "")),
        rewritten="" if into is None else line_of(into).code,
        program=tuple(program),
        near_misses=tuple(miss for name in names for miss in graphs.near_misses(name)),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
