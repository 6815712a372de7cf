"""One small model, compiled once, that all tests of inspection look at."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule
from attnlrp_fx.inspection.audit import Audit


class Block(nn.Module):
    """Attention written out, and a gated layer with an activation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, 8) → the same."""
        h = self.norm(x)
        scores = self.query(h) @ self.key(h).transpose(-1, -2) / 8**0.5
        x = x + torch.softmax(scores, -1) @ self.value(h)
        gate = self.gate(x)
        return x + self.down(gate * torch.sigmoid(gate) * self.up(x))


class Small(nn.Module):
    """Tokens, three blocks, two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.classes = nn.Linear(8, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(batch, length) → (batch, 2)."""
        x = self.tokens(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.classes(F.dropout(x, 0.1, self.training).mean(1))


@dataclass(frozen=True)
class Looked:
    """What there is to look at."""

    explainer: ExplainableGraphModule
    inputs: Tensor
    audit: Audit


@functools.cache
def looked() -> Looked:
    """The small model in float64, compiled with the ledger on, and one audit of it."""
    torch.manual_seed(0)
    model = Small().double().eval()
    inputs = torch.randint(0, 20, (3, 5))
    explainer = attnlrp_fx.compile(model, inputs, backend="eager", audit=True)
    return Looked(explainer, inputs, explainer.audit(inputs))


def printed(shown: Any, **options: Any) -> str:
    """What a console prints."""
    console = Console(width=160, **options)
    with console.capture() as capture:
        console.print(shown)
    return capture.get()
