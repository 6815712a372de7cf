"""Several seeds in one run of the relevance side: equal to one after another, or not done."""

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import ExplainableGraphModule, Explanations
from attnlrp_fx.codegen import repeats
from attnlrp_fx.codegen.programs import Compiled
from attnlrp_fx.codegen.repeats import _repeated

TARGETS = [0, 2, 1, 0, 1]
X = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """What happens to rows is the argument's business."""

    def __init__(self, middle: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.middle = middle
        self.first, self.gate, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.first(x) * torch.sigmoid(self.gate(x)))
        logits: Tensor = self.last(hidden.tanh().mean(1))
        return logits


def flattened(x: Tensor) -> Tensor:
    return (x.reshape(-1, 8) * x.reshape(-1, 8).softmax(-1)).reshape(x.shape)


def sequence_first(x: Tensor) -> Tensor:
    return (x.transpose(0, 1).softmax(0) * x.transpose(0, 1)).transpose(0, 1)


def flattened_sequence_first(x: Tensor) -> Tensor:
    rows = x.transpose(0, 1).reshape(-1, 8)
    return (rows * rows.softmax(-1)).reshape(x.shape[1], x.shape[0], 8).transpose(0, 1)


def across_rows(x: Tensor) -> Tensor:
    return x * x.mean(0, keepdim=True)


def compiled(middle: Callable[[Tensor], Tensor], **options: object) -> ExplainableGraphModule:
    model = Layer(middle).double().eval()
    return attnlrp_fx.compile(model, X, **{"backend": "eager", **options})  # type: ignore[arg-type]


def program(explainer: ExplainableGraphModule) -> Compiled:
    (found,) = explainer._running.programs.compiled.values()
    return found


def explained(explainer: ExplainableGraphModule, x: Tensor) -> tuple[Explanations, list[int]]:
    """Explanations of all targets, and how many seeds each run of the relevance side had."""
    made, rows = program(explainer).schedule, []
    run = type(made).run_relevance

    def watched(self: object, values: object, seeds: list[Tensor], call: object) -> object:
        rows.append(len(seeds[0]) // len(x))
        return run(self, values, seeds, call)  # type: ignore[arg-type]

    with mock.patch.object(type(made), "run_relevance", watched):
        found = explainer(x, target=TARGETS)
    assert isinstance(found, Explanations)
    return found, rows


def assert_same(found: Explanations, explainer: ExplainableGraphModule, x: Tensor) -> None:
    for one, target in zip(found, TARGETS, strict=True):
        alone = explainer(x, target=target)
        torch.testing.assert_close(one.relevance, alone.relevance, rtol=0, atol=1e-12)
        torch.testing.assert_close(one.target_value, alone.target_value, rtol=0, atol=0)


@pytest.mark.parametrize("middle", [torch.relu, flattened, sequence_first])
@pytest.mark.parametrize("rows", [1, 3])
def test_seeds_share_a_run(middle: Callable[[Tensor], Tensor], rows: int) -> None:
    explainer, x = compiled(middle), X[:1].repeat(rows, 1, 1) + torch.arange(rows)[:, None, None]
    found, runs = explained(explainer, x)
    assert runs == [5, 1]  # all of them, and one to see that rows stay apart
    assert_same(found, explainer, x)
    assert explained(explainer, x)[1] == [5]


@pytest.mark.parametrize("middle", [flattened_sequence_first, across_rows])
def test_rows_that_do_not_stay_apart(middle: Callable[[Tensor], Tensor]) -> None:
    explainer = compiled(middle)
    found, _ = explained(explainer, X)
    assert_same(found, explainer, X)
    assert explained(explainer, X)[1] == [1] * 5


@pytest.mark.parametrize("option", [{"dynamic_shapes": None}, {"audit": True}])
def test_programs_whose_seeds_run_alone(option: dict[str, object]) -> None:
    explainer = compiled(torch.relu, **option)
    found, runs = explained(explainer, X)
    assert runs == [1] * 5
    assert_same(found, explainer, X)


def test_as_many_as_fit_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    explainer = compiled(torch.relu)
    values = program(explainer).start(explainer._running.attributes.values(), {"x": X})
    program(explainer).schedule.run_forward(values, program(explainer).run)
    found = repeats.repeats_of(program(explainer).schedule)
    assert found is not None
    taken = sum(values[slot].nbytes for slot in found.dims)
    monkeypatch.setitem(repeats.BUDGET, "cpu", 2 * taken)
    assert explained(explainer, X)[1] == [2, 1, 2, 1]
    monkeypatch.setitem(repeats.BUDGET, "cpu", taken // 2)
    assert explained(explainer, X)[1] == [1] * 5


def test_layout_is_kept() -> None:
    value = torch.randn(2, 3, 4).permute(2, 0, 1)[:, :, :1].expand(4, 2, 6)
    found = _repeated(value, 1, 3)
    torch.testing.assert_close(found, value.repeat(1, 3, 1))
    assert found.stride(2) == 0
    assert sorted(range(2), key=found.stride) == sorted(range(2), key=value.stride)


def test_inductor_takes_what_is_repeated() -> None:
    explainer = compiled(sequence_first, backend="inductor")
    found, runs = explained(explainer, X)
    assert runs == [5, 1]
    assert_same(found, explainer, X)
