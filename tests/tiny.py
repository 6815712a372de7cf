"""A text classifier as small as can be, with the embedded model's tokenizer."""

import functools
from typing import Any

from models import randomised, transformers_model
from torch import nn

from attnlrp_fx.loading import load

SENTENCES = ["The plot is thin, but the performances are wonderful.", "Dull."]


@functools.cache
def tiny_classifier() -> tuple[nn.Module, Any]:
    """The model, with random weights, and the tokenizer."""
    _, tokenizer = load()

    def build() -> nn.Module:
        return transformers_model(
            "bert",
            "BertForSequenceClassification",
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=64,
            id2label={0: "negative", 1: "positive"},
        )

    return randomised(build).eval(), tokenizer


def example(tokenizer: Any) -> dict[str, Any]:
    """Two sentences, one padded."""
    return dict(tokenizer(SENTENCES, return_tensors="pt", padding=True))
