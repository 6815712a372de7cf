"""Generation: every predicted token of a text, explained by the tokens before it.

A causal model computes the same for a prefix as for the whole text, and nothing behind a token
takes part in its prediction. So targets are taken in chunks, and each chunk runs on the text up to
its last target. Whether the model is causal is not assumed: each longer run predicts the chunk
before once more, and where a value differs, everything is explained on the whole text; so it is
where the model takes the whole and not a prefix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from attnlrp_fx.errors import InputError, TargetError
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.explanations import Explanations
from attnlrp_fx.targets import Logit, Target

TOLERANCE, ROUNDINGS = 1e-3, 8
"""How far a value may differ, as a share of the largest, between a prefix and a longer one, or how
many roundings of its dtype, whichever is more: less than a token that was not there before would
change. Models in half precision were seen to differ by up to two roundings."""


class Explains(Protocol):
    """What explaining generations needs of an explainer."""

    def explain_many(
        self,
        targets: Sequence[Target],
        inputs: Mapping[str, Tensor],
        whole: Mapping[str, Tensor] | None = None,
    ) -> tuple[Explanations, Any]:
        """Explanations of one batch, and what a target that names no output reads.

        `whole` are inputs of which `inputs` are a prefix: relevance of what follows is zero.
        """
        ...

    def lengths_like(self, name: str) -> tuple[str, ...]:
        """The inputs whose second dimension is that of an input, if it is dynamic."""
        ...


def explain_generation(
    explainer: Explains,
    inputs: Mapping[str, Tensor],
    start: int,
    sequence: str | None = None,
    chunk: int = 16,
) -> Explanations:
    """Explain the logit of every token from a position on, as predicted by those before it.

    Args:
        explainer: of a model that predicts each next token.
        inputs: the whole text with all that the model needs.
        start: the first token to explain: the length of the prompt; 1 or more.
        sequence: the input whose tokens are predicted, (batch, length); None:
            "decoder_input_ids" if there is one, or else "input_ids".
        chunk: how many targets share a run of the model.

    Returns:
        One explanation a token, `relevance` (batch, length − start, length): in each row of this
        matrix, what lies at or behind the token itself is zero. `outputs` are None.

    Raises:
        InputError: there is no such input, or nothing to explain in it, or the model does not
            return logits for every position.
    """
    name = sequence or ("decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids")
    if name not in inputs:
        raise InputError(
            f"there is no input '{name}' whose tokens could have been predicted",
            remedy=f"pass sequence=, one of: {', '.join(inputs)}",
        )
    ids = inputs[name]
    length = ids.shape[1] if ids.dim() == 2 else 0
    if not 1 <= start < length:
        raise InputError(
            f"start is {start}, the text has {length} tokens",
            why="the first token is predicted by none, and tokens up to the last are explained",
            remedy=f"choose start from 1 to {length - 1}" if length > 1 else "pass a longer text",
        )
    if chunk < 1:
        raise InputError(f"chunk is {chunk}", remedy="pass 1 or more")
    targets = [Logit(ids[:, i], position=i - 1) for i in range(start, length)]
    together = explainer.lengths_like(name)
    if together and len(targets) > chunk:
        found = _by_prefix(explainer, inputs, targets, together, start, chunk)
        if found is not None:
            return found
    explained, _ = _explained(explainer, inputs, targets, inputs, length)
    return Explanations(tuple(explained))


def _by_prefix(
    explainer: Explains,
    inputs: Mapping[str, Tensor],
    targets: Sequence[Logit],
    together: Sequence[str],
    start: int,
    chunk: int,
) -> Explanations | None:
    """Chunk by chunk on the text up to its last target; None if the model looks ahead."""
    found: list[Explanation] = []
    for first in range(0, len(targets), chunk):
        some = targets[first : first + chunk]
        end = start + first + len(some)
        prefix = {
            n: v[:, : end - 1].contiguous() if n in together else v for n, v in inputs.items()
        }
        try:
            explained, logits = _explained(explainer, prefix, some, inputs, end - 1)
        except InputError:
            return None
        before = found[-chunk:]
        if before and not _predicts(logits, targets[first - len(before) : first], before):
            return None
        found += explained
    return Explanations(tuple(found))


def _explained(
    explainer: Explains,
    prefix: Mapping[str, Tensor],
    targets: Sequence[Logit],
    whole: Mapping[str, Tensor],
    length: int,
) -> tuple[list[Explanation], Tensor]:
    remedy = "compile a language model, without logits_to_keep"
    try:
        explanations, logits = explainer.explain_many(targets, prefix, whole)
    except TargetError as error:
        raise InputError(
            "the model does not return a prediction of every token",
            why=" ".join(part for part in (error.what, error.why) if part),
            remedy=remedy,
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[1] != length:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
        raise InputError(
            f"the model returns scores of shape {shape} for {length} tokens",
            why="every token's own prediction is needed",
            remedy=remedy,
        )
    return [replace(one, outputs=None) for one in explanations], logits


def _predicts(logits: Tensor, targets: Sequence[Logit], before: Sequence[Explanation]) -> bool:
    """Whether logits of a longer prefix are those that were explained on a shorter one."""
    tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(logits.dtype).eps)
    for target, explanation in zip(targets, before, strict=True):
        assert isinstance(target.index, Tensor)
        assert isinstance(target.position, int)
        row = logits[:, target.position].to(explanation.target_value.dtype)
        value = row.gather(1, target.index[:, None].to(row.device, torch.int64))[:, 0]
        if bool(((value - explanation.target_value).abs() > tolerance * row.abs().amax(1)).any()):
            return False
    return True
