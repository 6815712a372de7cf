"""Before and after: the captured and the rewritten graph side by side."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import fx

from attnlrp_fx.files import write_atomically
from attnlrp_fx.inspection.graphs import Graphs
from attnlrp_fx.inspection.listing import Line, line_of

STYLES = {"as it was": "dim", "rule": "", "gone": "red", "new": "green"}
"""How a terminal shows each kind of row."""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>captured and rewritten</title><style>
html{{color-scheme:light dark;font:13px/1.5 ui-monospace,Menlo,Consolas,monospace}}
body{{margin:16px;background:light-dark(#fff,#1b1d22);color:light-dark(#1f2328,#e6e8ec)}}
table{{border-collapse:collapse;width:100%;table-layout:fixed}}
th{{text-align:left;position:sticky;top:0;background:light-dark(#fff,#1b1d22)}}
td{{padding:1px 8px;vertical-align:top;overflow-wrap:anywhere;white-space:pre-wrap}}
small{{opacity:.7}} .same{{opacity:.55}}
.gone td:first-child{{background:light-dark(#ffebe9,#4b1c1c)}}
.new td:last-child{{background:light-dark(#dafbe1,#17381f)}}
.rule td:last-child{{background:light-dark(#eef4ff,#1d2b45)}}
.where td{{padding-top:12px;font-weight:600}}
</style></head><body><table><thead><tr><th>captured</th><th>rewritten, composite {composite}</th>
</tr></thead><tbody>
{rows}
</tbody></table></body></html>
"""


@dataclass(frozen=True)
class Row:
    """A node before and after; None on the side where it is not."""

    kind: str
    """"as it was", "rule", "gone" or "new"."""
    before: Line | None
    after: Line | None
    told: str = ""
    """Which pass took it, into what."""


@dataclass(frozen=True)
class Difference:
    """The captured and the rewritten graph, row by row."""

    rows: tuple[Row, ...]
    composite: str

    def __str__(self) -> str:
        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page of both sides; written to `path`, whole or not at all, if given."""
        page = _PAGE.format(composite=html.escape(self.composite), rows="\n".join(self._html()))
        if path is not None:
            write_atomically(path, page)
        return page

    def _html(self) -> Iterator[str]:
        module = ""
        for row in self.rows:
            line = row.after or row.before
            assert line is not None
            if line.module != module:
                module = line.module
                yield f'<tr class="where"><td colspan="2">{html.escape(module)}</td></tr>'
            cells = []
            for side, note in ((row.before, row.told), (row.after, "")):
                code = "" if side is None else html.escape(side.code)
                comment = note or ("" if side is None or side is row.before else side.rule)
                cells.append(f"{code} <small>{html.escape(comment)}</small>" if code else "")
            kind = "same" if row.kind == "as it was" else row.kind
            yield (
                f'<tr class="{kind}" title="{html.escape(line.source)}">'
                f"<td>{cells[0]}</td><td>{cells[1]}</td></tr>"
            )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(box=None, pad_edge=False, show_lines=False)
        table.add_column("captured", ratio=1, overflow="fold")
        table.add_column("", no_wrap=True)
        table.add_column(f"rewritten, composite {self.composite}", ratio=1, overflow="fold")
        module = ""
        for row in self.rows:
            line = row.after or row.before
            assert line is not None
            if line.module != module:
                module = line.module
                table.add_row(Text(module, style="bold"), "", "")
            mark = {"gone": "−", "new": "+", "rule": "›"}.get(row.kind, "")
            before = Text("" if row.before is None else row.before.code)
            if row.told:
                before.append(f"  # {row.told}", style="dim")
            after = Text("" if row.after is None else row.after.code)
            if row.after is not None and row.after.rule:
                after.append(f"  # {row.after.rule}", style="cyan")
            style = STYLES[row.kind]
            before.stylize(style if row.kind != "new" else "")
            after.stylize(style)
            table.add_row(before, mark, after)
        yield table


def difference(graphs: Graphs) -> Difference:
    """Both graphs side by side, aligned by nodes that are in both."""
    before, after = _shown(graphs.captured), _shown(graphs.rewritten)
    names = [node.name for node in before], [node.name for node in after]
    rows: list[Row] = []
    for tag, a, b, c, d in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if tag == "equal":
            for old, new in zip(before[a:b], after[c:d], strict=True):
                kind = "rule" if "rule" in new.meta else "as it was"
                rows.append(Row(kind, line_of(old), line_of(new)))
            continue
        for old in before[a:b]:
            claim = graphs.claims[old.name]
            into = f" → {claim.into.name}" if claim.into is not None else ""
            told = f"{claim.claimed_by}{into}" if claim.claimed_by else ""
            rows.append(Row("gone", line_of(old), None, told))
        rows += [Row("new", None, line_of(new)) for new in after[c:d]]
    return Difference(tuple(rows), graphs.composite)


def _shown(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [n for n in graph_module.graph.nodes if n.op not in ("placeholder", "get_attr")]
