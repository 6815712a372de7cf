"""Parts of an input that go together: tokens, patches of an image, or single elements."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnlrp_fx.evaluate.subjects import Question


@dataclass(frozen=True)
class Parts:
    """Which part each place of an input belongs to."""

    numbers: Tensor
    """(places) int64, the same for every row."""
    present: Tensor
    """(batch, parts) bool: false for padding, which stays as it is."""

    @classmethod
    def of(cls, question: Question, edge: int | None = None) -> "Parts":
        """Parts of a batch: of images patches, or else every place by itself.

        Args:
            question: the batch.
            edge: of a patch in pixels; None: a 14th of the shorter side, at least one pixel.
        """
        batch, *places = question.shape
        device = question.values.device
        if not question.subject.tail.features and question.values.dim() == 4:
            height, width = places
            edge = edge or max(1, min(height, width) // 14)
            columns = math.ceil(width / edge)
            down = torch.arange(height, device=device) // edge
            numbers = down[:, None] * columns + torch.arange(width, device=device) // edge
            present = torch.ones(batch, int(numbers[-1, -1]) + 1, dtype=torch.bool, device=device)
            return cls(numbers, present)
        numbers = torch.arange(math.prod(places), device=device).reshape(places)
        return cls(numbers, question.present.flatten(1))

    @property
    def counts(self) -> Tensor:
        """(batch,): how many parts a row has."""
        return self.present.sum(1)

    def sums(self, relevance: Tensor) -> Tensor:
        """(batch, places) → (batch, parts): relevance of each part."""
        flat = relevance.flatten(1)
        found = flat.new_zeros(self.present.shape)
        return found.index_add_(1, self.numbers.flatten(), flat)

    def spread(self, parts: Tensor) -> Tensor:
        """(n, parts) → (n, places)."""
        return parts[:, self.numbers]

    def ranks(self, relevance: Tensor, descending: bool) -> Tensor:
        """(batch, parts): each part's place in the order; padding is never reached."""
        order = torch.argsort(relevance, dim=1, descending=descending, stable=True)
        present = self.present.gather(1, order)
        places = torch.where(present, present.cumsum(1) - 1, self.present.shape[1] + 1)
        return torch.empty_like(places).scatter_(1, order, places)
