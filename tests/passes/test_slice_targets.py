"""Only what the target's position needs is computed, and it is the same."""

import functools
from typing import Any

import pytest
import torch
from models import BY_NAME
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import Contrast, ExplainableGraphModule, InputError, Logit, LogProb
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.targets import Target

F64 = torch.float64
TARGETS: dict[str, Any] = {
    "default": None,
    "one position": Logit(3, position=2),
    "from the end": Contrast(2, position=-1),
    "one a row": LogProb(None, position=[1, 0, 2]),
}
NAMES = ["llama", "gpt2", "t5", "mixtral"]


def compiled(name: str, **options: Any) -> ExplainableGraphModule:
    case = BY_NAME[name]
    model, inputs = case.model().double(), case.example(2, 6)
    return attnlrp_fx.compile(model, inputs, backend="eager", **options)


@functools.cache
def whole_llama() -> ExplainableGraphModule:
    """One that every test may ask for anything."""
    return compiled("llama")


@functools.cache
def sliced_llama() -> ExplainableGraphModule:
    """The same with its targets sliced."""
    return compiled("llama", target_slice=True)


@pytest.fixture(scope="module", params=NAMES)
def both(request: pytest.FixtureRequest) -> Any:
    sliced = compiled(request.param, target_slice=True)
    return sliced, compiled(request.param), BY_NAME[request.param].example(3, 9)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_equal_to_the_unsliced_program(both: Any, target: Target | None) -> None:
    sliced, whole, inputs = both
    found, expected = sliced(**inputs, target=target), whole(**inputs, target=target)
    for name, relevance in expected.relevance.items():
        torch.testing.assert_close(found.relevance[name], relevance, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.target_value, expected.target_value, rtol=1e-9, atol=1e-12)
    assert found.outputs.logits.shape[1] == 1
    assert sliced.compilations == 1


def test_less_is_computed(both: Any) -> None:
    sliced, whole, inputs = both
    assert sliced.cost(**inputs).flops < whole.cost(**inputs).flops


def test_padded_rows_have_positions_of_their_own() -> None:
    """Each row's last token that is no padding."""
    inputs = BY_NAME["llama"].example(3, 9)
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, 5:] = 0
    inputs["attention_mask"] = mask
    model = BY_NAME["llama"].model().double()
    options = {"backend": "eager"}
    found = attnlrp_fx.compile(model, inputs, target_slice=True, **options)(**inputs)
    expected = attnlrp_fx.compile(model, inputs, **options)(**inputs)
    torch.testing.assert_close(
        found.relevance["input_ids"], expected.relevance["input_ids"], rtol=1e-9, atol=1e-11
    )
    last = expected.outputs.logits[torch.arange(3), mask.sum(1) - 1]
    torch.testing.assert_close(found.outputs.logits[:, 0], last)


@pytest.mark.parametrize(
    "target",
    [
        lambda output: output.logits[:, 2].sum(-1),
        [Logit(1, position=0), Logit(1, position=1)],
        Logit(torch.tensor([[1, 2]] * 3), torch.tensor([[0, 1]] * 3)),
    ],
    ids=["function", "several positions", "a matrix of them"],
)
def test_targets_that_read_more_run_unsliced(target: Any) -> None:
    sliced, whole = sliced_llama(), whole_llama()
    inputs = BY_NAME["llama"].example(3, 9)
    found, expected = sliced(**inputs, target=target), whole(**inputs, target=target)
    torch.testing.assert_close(found.relevance["input_ids"], expected.relevance["input_ids"])
    assert sliced(**inputs).outputs.logits.shape[1] == 1
    generated = sliced.explain_generation(**inputs, start=4)
    assert generated.relevance["input_ids"].shape == (3, 5, 9)


def test_several_targets_at_one_position() -> None:
    sliced, whole = sliced_llama(), whole_llama()
    inputs = BY_NAME["llama"].example(3, 9)
    before = sliced.compilations
    targets = [Logit(1), Contrast(2, 3), LogProb(4)]
    found, expected = sliced(**inputs, target=targets), whole(**inputs, target=targets)
    torch.testing.assert_close(found.relevance["input_ids"], expected.relevance["input_ids"])
    assert sliced.compilations == before


@pytest.mark.parametrize(
    "options", [{"audit": True}, {"dynamic_shapes": None}, {"memory": "small"}]
)
def test_other_options(options: dict[str, Any]) -> None:
    sliced = compiled("llama", target_slice=True, **options)
    inputs = BY_NAME["llama"].example(2, 6)
    found, expected = sliced(**inputs, check_finite=True), whole_llama()(**inputs)
    torch.testing.assert_close(found.relevance["input_ids"], expected.relevance["input_ids"])
    if "audit" in options:
        assert abs(found.ledger.residual) < 1e-6  # the rotary tables are float32
    tail = sliced.tail("input_ids")
    chosen = tail.choose(tail.values(inputs), inputs, Logit())
    torch.testing.assert_close(chosen.value.detach(), expected.target_value)
    other = sliced.with_composite("gradient")(**inputs)
    assert other.outputs.logits.shape[1] == 1


def test_positions_are_checked() -> None:
    sliced, inputs = sliced_llama(), BY_NAME["llama"].example(2, 6)
    with pytest.raises(attnlrp_fx.TargetError, match="position 6 is out of range"):
        sliced(**inputs, target=Logit(1, position=6))
    with pytest.raises(InputError, match="there is no input 'target_positions'"):
        sliced(**inputs, target_positions=torch.zeros(2, dtype=torch.int64))


def test_outputs_without_a_sequence_stay() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1)

    x = torch.randn(2, 5, 4)
    explainer = attnlrp_fx.compile(Classifier().eval(), x, backend="eager", target_slice=True)
    assert explainer(x).outputs.shape == (2, 3)
    (output,) = outputs_of(explainer.rewritten.graph)
    assert output.meta["val"].dim() == 2
