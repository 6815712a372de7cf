"""Slow oracles of the rules for layers and joins: relevance shared out literally, by matrices.

A layer is put into the form z = M x + b by taking unit vectors through it. Then, by every rule's
formula, output j has contributions q_ij of its inputs and k_j of its bias, and input i receives
R_i = Σ_j q_ij R_j / (Σ_i q_ij + k_j + ε sign), with 0/0 = 0 and sign(0) = 1; k_j's share, ε's, and
all of R_j where nothing contributes are absorbed.

`Step` and its kin take relevance R, never a coefficient, through whole networks, layer by layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import references as ref
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnlrp_fx import AlphaBeta, Epsilon, Flat, Gamma, Rule, WSquare, ZBox, ZPlus

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Dense:
    """A layer on flattened values, a whole batch at once."""

    matrix: Tensor
    """(outputs, inputs)."""
    bias: Tensor
    """(outputs,)."""
    reads: Tensor
    """(outputs, inputs), whether an output reads an input, whatever the weight is."""


def dense(layer: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> Dense:
    """The matrix and the bias of a layer of an input and a weight."""
    bias = layer(torch.zeros_like(x), weight)
    matrix = _columns(lambda unit: layer(unit, weight) - bias, x)
    ones = torch.ones_like(weight)
    at_zero = layer(torch.zeros_like(x), ones)
    reads = _columns(lambda unit: layer(unit, ones) - at_zero, x)
    return Dense(matrix, bias.reshape(-1), reads.abs() > 0.5)


def _columns(linear: Function, x: Tensor) -> Tensor:
    units = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    return torch.stack([linear(unit).reshape(-1) for unit in units], 1)


def share_out(rule: Rule, layer: Dense, x: Tensor, relevance: Tensor) -> tuple[Tensor, float]:
    """Relevance of the inputs, in x's shape, and what is absorbed."""
    of_outputs = relevance.reshape(-1)
    stabiliser = getattr(rule, "epsilon", 0.0)
    received, absorbed = torch.zeros(x.numel(), dtype=x.dtype), 0.0
    for share, contributions, kept in _contributions(rule, layer, x):
        total = contributions.sum(1) + kept
        total = total + stabiliser * torch.where(total >= 0, 1.0, -1.0).to(x.dtype)
        per_unit = ref.ratio(share * of_outputs, total)
        nothing = total == 0
        received = received + contributions.T @ per_unit
        absorbed += float(((total - contributions.sum(1)) * per_unit).sum())
        absorbed += float((share * of_outputs)[nothing].sum())
    return received.reshape(x.shape), absorbed


def _contributions(rule: Rule, layer: Dense, x: Tensor) -> list[tuple[float, Tensor, Tensor]]:
    """The share of relevance, what each input contributes to each output, what the bias does."""
    row, b = layer.matrix, layer.bias
    z = row * x.reshape(-1)
    of_plus, of_minus, b_plus, b_minus = *_parts(z), *_parts(b)
    match rule:
        case Epsilon():
            return [(1.0, z, b)]
        case Gamma(gamma=gamma):
            is_positive = z.sum(1) + b > 0
            of_sign = torch.where(is_positive[:, None], of_plus, of_minus)
            b_of_sign = torch.where(is_positive, b_plus, b_minus)
            return [(1.0, z + gamma * of_sign, b + gamma * b_of_sign)]
        case AlphaBeta(alpha=alpha, beta=beta):
            return [(alpha, of_plus, b_plus), (-beta, of_minus, b_minus)]
        case ZPlus():
            return [(1.0, of_plus, b_plus)]
        case WSquare():
            return [(1.0, row.square(), b.square())]
        case Flat():
            return [(1.0, layer.reads.to(x.dtype), 0 * b)]
        case ZBox():
            low, high = _ends(rule, x)
            return [(1.0, z - low * row.clamp(min=0) - high * row.clamp(max=0), 0 * b)]
    raise AssertionError(rule)


def _parts(z: Tensor) -> tuple[Tensor, Tensor]:
    """z⁺ and z⁻."""
    return z.clamp(min=0), z.clamp(max=0)


def _ends(rule: ZBox, x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the most that each element can be; several of them go along dimension 1."""

    def end(value: float | Sequence[float]) -> Tensor:
        values = torch.tensor(value, dtype=x.dtype)
        shape = [-1 if d == 1 else 1 for d in range(x.dim())] if values.dim() else []
        return values.reshape(shape).expand(x.shape).reshape(-1)

    return end(rule.low), end(rule.high)


def join(split: str, a: Tensor, b: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """R |a| / (|a| + |b|) and R |b| / (|a| + |b|), or half each (Otsuki et al. 2024)."""
    if split == "equal":
        return relevance / 2, relevance / 2
    total = a.abs() + b.abs()
    return ref.ratio(a.abs() * relevance, total), ref.ratio(b.abs() * relevance, total)


class Step:
    """A step of a network: what it computes, and R of its input from R of its output."""

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def back(self, x: Tensor, relevance: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass
class Layer(Step):
    """A module with a weight, by a rule."""

    module: nn.Module
    rule: Rule

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found

    def back(self, x: Tensor, relevance: Tensor) -> Tensor:
        def layer(x: Tensor, weight: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(self.module, {"weight": weight}, (x,))
            return found

        weight = self.module.get_parameter("weight").detach()
        return share_out(self.rule, dense(layer, x, weight), x, relevance)[0]


@dataclass
class Relu(Step):
    """R passes (eq. 9)."""

    def __call__(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def back(self, x: Tensor, relevance: Tensor) -> Tensor:
        return relevance


@dataclass
class Affine(Step):
    """Whatever is linear and has no weights, by the ε rule: pools, sums, views, slices."""

    function: Function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def back(self, x: Tensor, relevance: Tensor) -> Tensor:
        return ref.affine(self.function, x, relevance)


@dataclass
class Moved(Step):
    """What only moves elements about: each takes its relevance back, zero or not."""

    function: Function

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def back(self, x: Tensor, relevance: Tensor) -> Tensor:
        places = torch.arange(1, x.numel() + 1, dtype=x.dtype).reshape(x.shape)
        received = torch.zeros(x.numel() + 1, dtype=x.dtype)
        came_from = self.function(places).reshape(-1).long().tolist()
        for place, r in zip(came_from, relevance.reshape(-1).tolist(), strict=True):
            received[place] += r
        return received[1:].reshape(x.shape)


@dataclass
class MaxPool(Step):
    """The winner of a window takes all; the first of equals."""

    size: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.size)

    def back(self, x: Tensor, relevance: Tensor) -> Tensor:
        received, size = torch.zeros_like(x), self.size
        batch, channels, rows, columns = relevance.shape
        for b in range(batch):
            for c in range(channels):
                for i in range(rows):
                    for j in range(columns):
                        window = x[b, c, i * size : (i + 1) * size, j * size : (j + 1) * size]
                        places = [(m, n) for m in range(size) for n in range(size)]
                        m, n = max(places, key=lambda at, w=window: float(w[at]))
                        received[b, c, i * size + m, j * size + n] += relevance[b, c, i, j]
        return received


class Network(nn.Module):
    """Steps in a row, as a module."""

    def __init__(self, *steps: Step) -> None:
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(step.module for step in steps if isinstance(step, Layer))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → any shape."""
        for step in self.steps:
            x = step(x)
        return x


@torch.no_grad()
def propagate(steps: Sequence[Step], x: Tensor, relevance: Tensor) -> Tensor:
    """R of a network's input from R of its output, step by step."""
    values = [x]
    for step in steps:
        values.append(step(values[-1]))
    for step, value in reversed(list(zip(steps, values[:-1], strict=True))):
        relevance = step.back(value, relevance)
    return relevance
