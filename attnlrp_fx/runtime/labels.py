"""Names for what an explanation shows: tokens, padding, classes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Labels:
    """What a tokenizer and a model's config know.

    Args:
        tokenizer: anything with `convert_ids_to_tokens`.
        id2label: class names by index, as in a transformers config.
    """

    tokenizer: Any = None
    id2label: Mapping[int, str] | None = None

    def tokens(
        self, inputs: Mapping[str, Tensor], relevance: Iterable[str]
    ) -> dict[str, list[list[str]]] | None:
        """The token strings of every explained token input, padding kept."""
        names = [n for n in relevance if not inputs[n].is_floating_point() and inputs[n].dim() == 2]
        if self.tokenizer is None or not names:
            return None
        convert = self.tokenizer.convert_ids_to_tokens
        rows = {name: inputs[name].tolist() for name in names if name.endswith("input_ids")}
        return {name: [list(map(str, convert(row))) for row in ids] for name, ids in rows.items()}

    def masks(
        self, inputs: Mapping[str, Tensor], relevance: Iterable[str]
    ) -> dict[str, Tensor] | None:
        """The attention mask that belongs to each explained token input."""
        found = {}
        for name in relevance:
            prefix = "decoder_" if name.startswith("decoder_") else ""
            mask = inputs.get(f"{prefix}attention_mask")
            if mask is not None and mask.shape == inputs[name].shape:
                found[name] = mask
        return found or None

    def of_index(self, index: Tensor | None, classes: int, is_token: bool) -> list[str] | None:
        """What a class index means, as text, for each row.

        Args:
            index: (batch,) indices, None if the target has none.
            classes: size of the output's last dimension.
            is_token: whether the output is one of scores over the vocabulary.
        """
        if index is None or index.is_meta:
            return None
        ids = index.tolist()
        if self.id2label is not None and len(self.id2label) == classes:
            return [str(self.id2label.get(i, i)) for i in ids]
        if is_token and self.tokenizer is not None:
            return [str(self.tokenizer.decode([i])) for i in ids]
        return [str(i) for i in ids]
