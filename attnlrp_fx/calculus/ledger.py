"""The ledger: where relevance goes, node by node.

For every node, Σ y·c_y = Σ_inputs x·c_x + absorbed, and over the graph the explained inputs'
relevance and everything absorbed add up to the target's value. What a node absorbs is not taken as
the difference where a law gives it: a rule on an affine op absorbs Σ f(0)·c, with f(0) the op's
output at zero explained inputs, and nothing else. Only softmax, attention and plain gradients,
which absorb by design, are entered by difference. So the sum closes only if every pullback obeys
its law.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.calculus.calls import Call, Shares, parts_of
from attnlrp_fx.calculus.pullbacks import stabilised
from attnlrp_fx.calculus.quotients import intercept
from attnlrp_fx.graph.operators import is_structural_op, product_of
from attnlrp_fx.graph.provenance import module_path, source_line

TOKENS_MOVED, CONSTANT_TOKENS = "Move()", "tokens that the model puts in"
"""The entry of an op that moves token indices and puts constant ones among them."""


def node_sums(
    relevance_op: ops.Op, call: Call, output: Any, c: Any, shares: Shares, r: Any = None
) -> Tensor:
    """What one node receives, passes on and absorbs.

    Args:
        relevance_op: the op that stands there.
        call: the op that it wraps.
        output: its value.
        c: the coefficient that its pullback took on; None if there was none.
        shares: what it handed on.
        r: relevance that it handed on as it came, if it did.

    Returns:
        float64 tensor (3,): Σ y·c_y, Σ x·c_x over the explained inputs, absorbed.
    """
    nothing = torch.zeros((), dtype=torch.float64, device=call.primals[0].device)
    lost = nothing if shares.absorbed is None else shares.absorbed
    arrived = nothing if r is None else sum((_total(part) for part in parts_of(r)), start=nothing)
    handed = sum((_total(part) for part in shares.relevance if part is not None), start=nothing)
    sums = torch.stack([arrived + lost, handed, arrived - handed + lost])
    if c is None:
        return sums
    outputs, cs = parts_of(output), parts_of(c)
    received = sum_of(outputs, cs)
    passed = sum_of(call.primals, shares.coefficients)
    by_design = relevance_op in (ops.taylor, ops.gradient) or (
        relevance_op is ops.attention
        and (
            call.parameters.get("weights", 0.5) > 0
            or not any(p is not None for p in shares.coefficients)
        )
    )
    absorbed = received - passed if by_design else _absorbed(relevance_op, call, outputs, cs)
    return sums + torch.stack([received, passed, absorbed])


def shared_sums(call: Call, output: Any, c: Any, r: Any, shares: Shares) -> Tensor:
    """The same of a rule that reads relevance itself, and says what it absorbs."""
    nothing = torch.zeros((), dtype=torch.float64, device=call.primals[0].device)
    received = nothing if c is None else sum_of(parts_of(output), parts_of(c))
    if r is not None:
        received = received + sum(_total(part) for part in parts_of(r))
    passed = sum((_total(part) for part in shares.relevance if part is not None), start=nothing)
    if shares.coefficients:
        passed = passed + sum_of(call.primals, shares.coefficients)
    absorbed = nothing if shares.absorbed is None else shares.absorbed
    return torch.stack([received, passed, absorbed])


def _total(relevance: Tensor) -> Tensor:
    return relevance.sum(dtype=torch.float64)


def sum_of(values: Sequence[Tensor], coefficients: Sequence[Tensor | None]) -> Tensor:
    """Σ x·c in float64; where c is zero the value does not count, infinite as it may be.

    Of complex values, pairs of reals, it is Σ Re(x̄·c).
    """
    total = torch.zeros((), dtype=torch.float64, device=values[0].device)
    for x, c in zip(values, coefficients, strict=True):
        if c is not None and (x.is_floating_point() or x.is_complex()):
            product = (x.conj() * c).real if x.is_complex() else x * c
            total = total + torch.where(c == 0, 0.0, product).sum(dtype=torch.float64)
    return total


def _absorbed(
    relevance_op: ops.Op, call: Call, outputs: Sequence[Tensor], cs: Sequence[Tensor]
) -> Tensor:
    """Σ f(0)·c, and what ε keeps."""
    zero = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    epsilon = call.parameters.get("epsilon", 0.0)
    if epsilon:
        passed = [stabilised(z, c, epsilon) for z, c in zip(outputs, cs, strict=True)]
        kept = [c - part for c, part in zip(cs, passed, strict=True)]
        return sum_of(outputs, kept) + _at_zero(relevance_op, call, passed, zero)
    return _at_zero(relevance_op, call, cs, zero)


def _at_zero(relevance_op: ops.Op, call: Call, cs: Sequence[Tensor], zero: Tensor) -> Tensor:
    """Σ f(0)·c of the op at zero explained inputs; an infinite input is a mask, and takes all."""
    product = product_of(call.op)
    if product is not None:
        terms = [call.args[p] for p in product.terms if p < len(call.args)]
        terms = [call.kwargs.get("bias")] if "bias" in call.kwargs else terms
        constant = [
            t for t, p in zip(terms, product.terms, strict=False) if p not in call.positions
        ]
        if not any(isinstance(t, Tensor) for t in constant):
            return zero
    elif relevance_op is ops.identity:
        x = call.primals[0]
        masked = torch.where(torch.isinf(x), call.function(x), intercept(call.function, x))
        return sum_of([masked], cs)
    elif relevance_op is ops.winner or is_structural_op(call.op):
        return zero
    output = call.function(*[torch.zeros_like(primal) for primal in call.primals])
    return sum_of(parts_of(output), cs)


def read_ledger(
    nodes: Sequence[fx.Node],
    sums: Tensor,
    *,
    target: float,
    seeded: float,
    inputs: dict[str, float],
) -> "Ledger":
    """A ledger from what a program returned.

    Args:
        nodes: the nodes that relevance passed through, in the program's order (reverse).
        sums: (nodes, 3), as from `node_sums`.
        target: the target's value.
        seeded: Σ y·c over the seeded outputs; what a target that is not linear keeps is the rest.
        inputs: relevance of each explained input.
    """
    kept = Entry("target", "seed", "", "", "target", target, seeded, target - seeded)
    entries = [
        Entry(
            node.name,
            node.meta.get("rule", TOKENS_MOVED),
            module_path(node),
            source_line(node),
            node.meta.get("absorbs", CONSTANT_TOKENS),
            *(float(value) for value in row),
        )
        for node, row in zip(nodes, sums.tolist(), strict=True)
    ]
    return Ledger(target, inputs, (*reversed(entries), kept))


@dataclass(frozen=True)
class Entry:
    """One node's line in the ledger, summed over the batch."""

    node: str
    """Name of the node in the rewritten graph."""
    rule: str
    """The rule that stands there."""
    module: str
    """Path of the module that it was captured in."""
    source: str
    """The user's source line."""
    reason: str
    """Why the rule may absorb relevance."""
    received: float
    passed: float
    absorbed: float


@dataclass(frozen=True)
class Ledger:
    """Where the target's relevance went: inputs + absorbed = target (law 1)."""

    target: float
    """The explained value, summed over the batch."""
    inputs: dict[str, float]
    """Relevance of each explained input, summed over the batch and all of its elements."""
    entries: tuple[Entry, ...]
    """One entry a node that relevance passed through, in the graph's order."""

    @property
    def absorbed(self) -> float:
        """Everything that did not reach an input."""
        return sum(entry.absorbed for entry in self.entries)

    @property
    def residual(self) -> float:
        """target − inputs − absorbed: zero to the precision of the arithmetic."""
        return self.target - sum(self.inputs.values()) - self.absorbed

    def by_reason(self) -> dict[str, float]:
        """Absorbed relevance by reason, largest first."""
        totals: dict[str, float] = {}
        for entry in self.entries:
            totals[entry.reason] = totals.get(entry.reason, 0.0) + entry.absorbed
        return dict(sorted(totals.items(), key=lambda item: -abs(item[1])))

    def largest(self, count: int = 10) -> list[Entry]:
        """The entries that absorb most, largest first."""
        absorbing = [entry for entry in self.entries if entry.absorbed]
        return sorted(absorbing, key=lambda entry: -abs(entry.absorbed))[:count]

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
            row = (entry.module, entry.node, entry.reason, f"{value:.5g}", self._percent(value))
            table.add_row(*row)
        rest = self.absorbed - sum(entry.absorbed for entry in shown)
        others = f"{len(self.entries) - len(shown)} others"
        table.add_row(others, "", "absorbed", f"{rest:.5g}", self._percent(rest))
        table.add_row("residual", "", "rounding", f"{self.residual:.2g}", "")
        yield table

    def _percent(self, value: float) -> str:
        return f"{100 * value / self.target:.1f}" if self.target else "-"
