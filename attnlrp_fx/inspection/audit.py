"""An audit: one explanation run op by op, with its ledger, and what speaks against trusting it."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, fx

from attnlrp_fx.calculus.tape import Audited, Reading, Tape
from attnlrp_fx.files import write_atomically
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.inspection.caveats import (
    Caveat,
    digits_kept,
    of_digits,
    of_relevance,
    of_softmax,
)
from attnlrp_fx.inspection.flow import flow_of
from attnlrp_fx.inspection.ledger import CAUSES, Book, Ledger
from attnlrp_fx.inspection.seeded import Seeds, of_outputs
from attnlrp_fx.targets import Chosen, dense

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Choose = Callable[[Sequence[Any], Mapping[str, Tensor]], tuple[Chosen, Seeds]]
"""From flat outputs and inputs to the target and its gradient."""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>{title}</title><style>
html{{color-scheme:light dark}} body{{font:14px/1.5 system-ui,sans-serif;margin:16px auto;
max-width:90em;padding:0 16px;background:light-dark(#fff,#1b1d22);
color:light-dark(#1f2328,#e6e8ec)}}
h1{{font-size:17px}} h2{{font-size:14px;margin-top:22px}} .picture{{overflow-x:auto}}
table{{border-collapse:collapse}} td,th{{padding:2px 14px 2px 0;text-align:left}}
td.n{{text-align:right;font-variant-numeric:tabular-nums}} .caveat{{border-inline-start:3px solid
#d627a0;padding-inline-start:10px;margin:8px 0}} small{{opacity:.7}}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


@dataclass(frozen=True)
class Audit:
    """Where one explanation's relevance went, and what speaks against trusting it."""

    ledger: Ledger
    relevance: Mapping[str, Tensor]
    """By explained input, as in an explanation."""
    target: str
    """What was explained."""
    caveats: tuple[Caveat, ...]
    """Reasons for distrust, each with its figure and a remedy; empty if none was found."""
    digits: Mapping[str, float] = field(default_factory=dict)
    """Decimal digits in which relevance agrees with that of the reference, by explained input;
    empty without a reference."""

    def figure(self) -> "Figure":
        """The flow of relevance as a matplotlib figure.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return flow_of(self.ledger).figure()

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page: the flow of relevance, the largest absorbers, the caveats.

        Args:
            path: where it is written, whole or not at all.
        """
        title = f"Ledger of {self.target}"
        page = _PAGE.format(title=html.escape(title), body="\n".join(self._sections()))
        if path is not None:
            write_atomically(path, page)
        return page

    def save(self, path: str | Path) -> None:
        """Write the flow of relevance, whole or not at all: a page (.html), or a picture.

        Raises:
            MissingExtraError: a picture is asked for, and matplotlib is not installed.
        """
        suffix = Path(path).suffix[1:].lower()
        if suffix == "html":
            self.to_html(path)
            return
        picture = BytesIO()
        self.figure().savefig(picture, format=suffix, dpi=150)
        write_atomically(path, picture.getvalue())

    def _sections(self) -> list[str]:
        ledger = self.ledger
        parts = [f'<div class="picture">{flow_of(ledger).to_svg()}</div>']
        for caveat in self.caveats:
            remedy = html.escape(caveat.remedy)
            parts.append(
                f'<div class="caveat">{html.escape(caveat.what)}<br><small>{remedy}</small></div>'
            )
        items = "".join(f"<li>{html.escape(text)}</li>" for text in ledger.sentences(10))
        parts.append(f"<h2>Largest absorbers</h2><ul>{items}</ul>")
        for heading, sums in self._tables():
            rows = "".join(
                f'<tr><td>{html.escape(name)}</td><td class="n">{value:.5g}</td>'
                f'<td class="n">{share}</td></tr>'
                for name, value, share in sums
            )
            parts.append(f"<h2>{heading}</h2><table>{rows}</table>")
        return parts

    def _tables(self) -> list[tuple[str, list[tuple[str, float, str]]]]:
        """What was absorbed by cause, by kind of op and by module, with shares of the target."""
        ledger = self.ledger

        def shares(sums: Mapping[str, float]) -> list[tuple[str, float, str]]:
            kept = [(name, value) for name, value in sums.items() if value][:12]
            return [(name or "model", v, _share(v, ledger.target)) for name, v in kept]

        causes = {CAUSES.get(cause, cause): value for cause, value in ledger.by_cause().items()}
        return [
            ("Reached", shares(ledger.inputs)),
            ("Absorbed by cause", shares(causes)),
            ("Absorbed by kind of op", shares(ledger.by_kind())),
            ("Absorbed by module", shares(ledger.by_module())),
        ]

    def __str__(self) -> str:
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        ledger = self.ledger
        yield f"[b]{self.target}[/b], value {ledger.target:.6g}"
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for _ in range(2):
            table.add_column(justify="right", no_wrap=True)
        for heading, sums in self._tables():
            for k, (name, value, share) in enumerate(sums):
                table.add_row(heading if k == 0 else "", name, f"{value:.5g}", share)
        table.add_row("Residual", "rounding", f"{ledger.residual:.2g}", "")
        yield table
        for text in ledger.sentences():
            yield f"• {text}"
        for name, kept in self.digits.items():
            yield f"relevance of '{name}': {kept:.1f} digits agree with the reference"
        for caveat in self.caveats:
            yield f"[bold magenta]{caveat.kind}[/bold magenta]: {caveat.what}"
            yield f"  [dim]{caveat.remedy}[/dim]"
        if not self.caveats:
            yield "no caveats"


def audit(
    rewritten: fx.GraphModule,
    attributes: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    choose: Choose,
    *,
    target: str,
    masks: Mapping[str, Tensor] | None = None,
    device: torch.device | None = None,
    reference: torch.dtype | None = None,
) -> Audit:
    """Run a rewritten graph op by op, forward and in reverse, and read everything off.

    Args:
        rewritten: the graph.
        attributes: its tensors by name.
        given: its inputs by name, in order.
        choose: evaluates the target on flat outputs.
        target: what the target is called.
        masks: of token inputs, 0 for padding.
        device: where constants that the graph creates are put; None leaves the captured device.
        reference: a wider dtype, in which everything is run once more to see how many digits hold.
    """
    tape, reading, chosen, seeds = _run(rewritten, attributes, given, choose, device)
    flat = [tape.env[n] if isinstance(n, fx.Node) else n for n in outputs_of(rewritten.graph)]
    ledger = Book(rewritten.graph).read(
        {key: float(value) for key, value in reading.postings.items()},
        target=float(chosen.value.detach().double().sum()),
        seeded=of_outputs(seeds, flat, rewritten),
        inputs={name: float(r.double().sum()) for name, r in reading.relevance.items()},
    )
    caveats = [*of_relevance(reading.relevance, masks), *of_softmax(tape)]
    digits: dict[str, float] = {}
    if reference is not None:
        wide = {name: _widened(value, reference) for name, value in attributes.items()}
        inputs = {name: _widened(value, reference) for name, value in given.items()}
        again = _run(rewritten, wide, inputs, choose, device, reference)[1]
        digits = digits_kept(reading.relevance, again.relevance)
        caveats += of_digits(digits, reference)
    return Audit(ledger, reading.relevance, target, tuple(caveats), digits)


def _run(
    rewritten: fx.GraphModule,
    attributes: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    choose: Choose,
    device: torch.device | None,
    widest: torch.dtype | None = None,
) -> tuple[Tape, Reading, Chosen, Seeds]:
    """One run; widened, with every floating dtype that the graph names replaced."""
    with torch.no_grad():
        tape = Tape(rewritten, attributes, device, widest=widest)
        flat = tape.run(*given.values())
        chosen, seeds = choose(flat, given)
        outputs = outputs_of(rewritten.graph)
        starting = {outputs[i]: dense(seed, flat[i]) for i, seed in seeds.items()}
        return tape, tape.reverse(starting, Audited.EVERY), chosen, seeds


def _widened(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _share(value: float, target: float) -> str:
    return f"{100 * value / target:.1f} %" if target else "-"
