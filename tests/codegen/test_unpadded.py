"""Attention without masks: which masks are taken for a flag, and when that holds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule
from attnlrp_fx.codegen.unpadded import Unpadded, unpadded

WINDOW = 6


def causal(ids: Tensor, mask: Tensor) -> Tensor:
    length = ids.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return seen & mask[:, None, None, :].bool()


def padding(ids: Tensor, mask: Tensor) -> Tensor:
    return mask[:, None, None, :].bool()


def added(ids: Tensor, mask: Tensor) -> Tensor:
    seen = causal(ids, mask)
    zeros = torch.zeros(seen.shape, dtype=torch.float64)
    return zeros.masked_fill(~seen, torch.finfo(torch.float64).min)


def sliding(ids: Tensor, mask: Tensor) -> Tensor:
    steps = torch.arange(ids.shape[1])
    return causal(ids, mask) & (steps[None, :] > steps[:, None] - WINDOW)


def of_tokens(ids: Tensor, mask: Tensor) -> Tensor:
    return (ids != 0)[:, None, None, :] & mask[:, None, None, :].bool()


def distances(ids: Tensor, mask: Tensor) -> Tensor:
    """ALiBi: a mask that weighs."""
    steps = torch.arange(ids.shape[1])
    return added(ids, mask) - 0.1 * (steps[:, None] - steps[None, :]).abs()


class Attending(nn.Module):
    """One layer of attention, and a class of the last token or of all."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.make_mask = mask
        self.embedding = nn.Embedding(20, 8)
        self.projections = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in self.projections)
        mask = self.make_mask(input_ids, attention_mask)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        logits: Tensor = self.head(x + attended.transpose(1, 2).flatten(-2))
        return logits


def text(rows: int, length: int, cut: int = 0) -> dict[str, Tensor]:
    """A random text; of its first row some tokens at the end are padding."""
    ids = torch.randint(1, 20, (rows, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[0, length - cut :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def compiled(
    mask: Callable[[Tensor, Tensor], Tensor], cut: int = 0, **options: bool
) -> ExplainableGraphModule:
    model = Attending(mask).double().eval()
    return attnlrp_fx.compile(model, text(2, 5, cut), backend="eager", **options)


def found(explainer: ExplainableGraphModule, example: dict[str, Tensor]) -> Unpadded | None:
    return unpadded(explainer.rewritten, example, explainer._running.attributes.values())


def calls(graph_module: torch.fx.GraphModule) -> list[str]:
    return [line.strip() for line in graph_module.code.splitlines() if "ops_attention(" in line]


@pytest.mark.parametrize(
    ("mask", "flag"), [(causal, True), (added, True), (sliding, True), (padding, False)]
)
def test_a_mask_becomes_a_flag(mask: Callable[[Tensor, Tensor], Tensor], flag: bool) -> None:
    explainer = compiled(mask)
    (served,) = explainer._running.programs.compiled
    assert served.unpadded
    without = found(explainer, text(2, 5))
    assert without is not None
    assert without.causal == (flag,)
    assert without.inputs == ("attention_mask",)
    (call,) = calls(without.rewritten)
    assert ("is_causal = True" in call) is flag
    assert "attention_mask" not in without.rewritten.code.split("return")[0].split(":", 1)[1]
    names = {node.name for node in without.rewritten.graph.nodes}
    assert names <= {node.name for node in explainer.rewritten.graph.nodes}


@pytest.mark.parametrize("mask", [of_tokens, distances])
def test_masks_that_say_more_stay(mask: Callable[[Tensor, Tensor], Tensor]) -> None:
    explainer = compiled(mask)
    assert found(explainer, text(2, 5)) is None
    assert [served.unpadded for served in explainer._running.programs.compiled] == [False]


def test_an_example_with_padding_makes_one_program_for_all() -> None:
    explainer = compiled(causal, cut=2)
    explainer(text(3, 7))
    explainer(text(3, 7, cut=3))
    assert [served.unpadded for served in explainer._running.programs.compiled] == [False]


@pytest.mark.parametrize("mask", [causal, added, sliding, padding])
@pytest.mark.parametrize("given", [text(1, 1), text(3, 4), text(2, 9), text(3, 5, cut=2)])
def test_equals_the_program_with_masks(
    mask: Callable[[Tensor, Tensor], Tensor], given: dict[str, Tensor]
) -> None:
    ours, masked = compiled(mask)(**given), compiled(mask, cut=2)(**given)
    torch.testing.assert_close(ours.relevance, masked.relevance, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.outputs, masked.outputs, rtol=0, atol=1e-12)


def test_compiles_for_padding_once_it_is_there() -> None:
    explainer = compiled(causal)
    explainer(text(4, 9))
    assert explainer.compilations == 1
    explainer(text(4, 9, cut=1))
    explainer(text(2, 6, cut=2))
    assert explainer.compilations == 2
    assert [made.unpadded for made in explainer.report().compilations] == [True, False]
    assert "without padding" in str(explainer.report())


def test_kinds_are_looked_up_at_every_size() -> None:
    """Within its window a sliding mask is causal; beyond it another program serves."""
    explainer = compiled(sliding)
    explainer(text(1, WINDOW))
    assert explainer.compilations == 1
    beyond = explainer(text(1, WINDOW + 1))
    assert explainer.compilations == 2
    whole = compiled(sliding, cut=1)(text(1, WINDOW + 1))
    torch.testing.assert_close(beyond.relevance, whole.relevance, rtol=0, atol=1e-12)


def test_the_ledger_closes() -> None:
    ledger = compiled(causal, audit=True)(text(2, 6)).ledger
    assert ledger is not None
    assert abs(ledger.residual) < 1e-12


def test_one_token_tells_nothing() -> None:
    assert found(compiled(causal), text(2, 1)) is None
