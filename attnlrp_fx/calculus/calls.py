"""Calls of ops as functions of their explained inputs, and their vector-Jacobian products."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attnlrp_fx import ops
from attnlrp_fx.graph.operators import packet
from attnlrp_fx.graph.transposes import TRANSPOSES, transpose_of

Pullback = Callable[[Any], Sequence[Tensor | None]]
"""From the coefficient of an op's output to those of its explained inputs."""


@dataclass(frozen=True)
class Call:
    """One call of an op, seen as a function of its explained inputs alone."""

    op: ops.Op
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    primals: tuple[Tensor, ...]
    """The explained inputs' values, one for each place where one stands."""
    positions: tuple[int | str, ...]
    """The argument in which each of them stands."""
    function: Callable[..., Any]
    """primals → the op's output."""
    factors: int
    """How many of the primals are factors of a product."""
    is_factor: tuple[bool, ...]
    parameters: dict[str, Any] = field(default_factory=dict)
    """The rule's parameters."""


def vjp(call: Call) -> tuple[Any, Pullback]:
    """The op's own vector-Jacobian product, of that op alone."""
    if packet(call.op) in TRANSPOSES:
        output = call.function(*call.primals)
        transpose = transpose_of(call.op, call.args, call.kwargs, call.primals, output)
        if transpose is not None:
            return output, transpose

    if getattr(call.op, "namespace", "aten") != "aten":
        return _by_autograd(call)

    def function(*primals: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        output = call.function(*primals)
        return tuple(part for part in parts_of(output) if _is_differentiable(part)), output

    pulled = torch.func.vjp(function, *call.primals, has_aux=True)
    pull, output = pulled[1], pulled[-1]

    def pullback(c: Any) -> Any:
        parts = zip(parts_of(c), parts_of(output), strict=True)
        return pull(tuple(c for c, y in parts if _is_differentiable(y)))

    return output, pullback


def _by_autograd(call: Call) -> tuple[Any, Pullback]:
    """The same for a custom op: functorch cannot differentiate what was registered for one."""
    with torch.enable_grad():
        primals = [primal.detach().requires_grad_() for primal in call.primals]
        tracked = call.function(*primals)

    def pullback(c: Any) -> Any:
        pairs = zip(parts_of(tracked), parts_of(c), strict=True)
        outputs, cs = zip(*[(y, c) for y, c in pairs if y.requires_grad], strict=True)
        return torch.autograd.grad(outputs, primals, cs, retain_graph=True, allow_unused=True)

    return tree_map_only(Tensor, Tensor.detach, tracked), pullback


def parts_of(value: Any) -> list[Tensor]:
    """The outputs of an op, or their coefficients, as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _is_differentiable(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


@dataclass(frozen=True)
class Message:
    """Part of the relevance R_ij that a layer hands from output j to input i: x_i w_ji a_j.

    A rule that does not share out by the layer's own x and w says by which.
    """

    x: Tensor
    weight: Tensor
    a: Tensor


@dataclass(frozen=True)
class Shares:
    """What an op hands on of the relevance R of its output, to each explained input."""

    coefficients: Sequence[Tensor | None] = ()
    """Shares that are x·c, as coefficients c; empty if none is."""
    relevance: Sequence[Tensor | None] = ()
    """Shares that do not factor by the input, which may be zero; empty if all do."""
    absorbed: Mapping[str, Tensor] = field(default_factory=dict)
    """Scalars by cause: what is handed on to no explained input."""
    messages: Sequence[Message] = ()
    """Of a layer, what its coefficients and relevance are sums of; empty: its own products."""
    kept: Tensor | None = None
    """Beside messages: what the bias absorbs, in the output's shape; None: there is none."""


@dataclass(frozen=True)
class Explicit:
    """A pullback that reads the relevance R = z·c of an op's output, rather than c."""

    share: Callable[[Tensor], Shares]
