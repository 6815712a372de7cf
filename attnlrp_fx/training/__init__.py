"""Explanations as part of training: losses of relevance, and what trainers log of it.

    explainer = attnlrp_fx.compile(model, inputs, differentiable=True)
    explanation = explainer(inputs, target=labels)
    loss = task + outside_mask(explanation.relevance["input_ids"], evidence)
    loss.backward()

`losses` are plain functions of tensors, `monitor` explains fixed samples at intervals;
`trainer` (Hugging Face), `lightning` and `tensorboard` need the extra `attnlrp_fx[train]`.
"""

from attnlrp_fx.training.losses import (
    alignment,
    background,
    consistency,
    foreground,
    outside_mask,
    share_outside,
    sparsity,
)
from attnlrp_fx.training.monitor import Monitor, Record, RelevanceStatistics, evaluating

__all__ = [
    "Monitor",
    "Record",
    "RelevanceStatistics",
    "alignment",
    "background",
    "consistency",
    "evaluating",
    "foreground",
    "outside_mask",
    "share_outside",
    "sparsity",
]
