"""Inputs that decide a model's path are held at the example's values; all else is explained."""

from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import InputError
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.errors import CaptureError

F64 = torch.float64


class Patches(nn.Module):
    """Images of unlike sizes, one after another in a sequence of patches, as `grid` says."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.read = read
        self.enter, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, patches: Tensor, grid: Tensor) -> Tensor:
        return self.head(self.read(torch.tanh(self.enter(patches)), grid))


def by_list(x: Tensor, grid: Tensor) -> Tensor:
    parts = torch.split(x, (grid[:, 0] * grid[:, 1]).tolist())
    return torch.stack([part.mean(0) for part in parts])


def by_loop(x: Tensor, grid: Tensor) -> Tensor:
    at, found = 0, []
    for height, width in grid:
        found.append(x[at : at + height * width].view(height, width, -1)[0].sum(0))
        at += height * width
    return torch.stack(found)


def by_repeats(x: Tensor, grid: Tensor) -> Tensor:
    """Which image a patch belongs to has a length that depends on values."""
    counts = grid.prod(-1)
    image = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return torch.zeros(len(counts), x.shape[1], dtype=x.dtype).index_add(0, image, x)


def by_branch(x: Tensor, grid: Tensor) -> Tensor:
    y = x * 2 if (grid > 2).any() else x
    return y[: int(grid.prod(-1).max())].mean(0, keepdim=True).expand(2, -1)


def by_mask(x: Tensor, grid: Tensor) -> Tensor:
    """An index of booleans made of known numbers."""
    is_first = torch.arange(x.shape[0]) < grid[0].prod()
    return torch.stack([x[is_first].mean(0), x[~is_first].mean(0)])


def by_sizes(x: Tensor, grid: Tensor) -> Tensor:
    """A tensor without dimensions stands for a size."""
    count = torch.div(grid[0].prod(), 2, rounding_mode="trunc")
    kept = x.new_zeros((count, x.shape[1]))
    kept[:] = x[:count]
    return kept.sum(0, keepdim=True).expand(2, -1)


READERS = [by_list, by_loop, by_repeats, by_branch, by_mask, by_sizes]


def example() -> dict[str, Tensor]:
    return {"patches": torch.randn(10, 4, dtype=F64), "grid": torch.tensor([[2, 2], [2, 3]])}


def model_of(read: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return Patches(read).to(F64).eval()


def hold_grid(named: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    return [{"grid": named["grid"]}]


def compiled(read: Callable[[Tensor, Tensor], Tensor], composite: str = "attnlrp") -> Any:
    """With the grid held, whether it need be or not."""
    with mock.patch("attnlrp_fx.capture.capture._deciding", hold_grid):
        return attnlrp_fx.compile(
            model_of(read), example(), composite=composite, backend="eager", audit=True
        )


@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__)
def test_a_model_that_reads_held_sizes(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    explainer = compiled(read, "gradient")
    given = {**example(), "patches": torch.randn(10, 4, dtype=F64)}
    explanation = explainer(**given)
    x = given["patches"].clone().requires_grad_()
    logits = explainer.model(x, given["grid"])
    torch.testing.assert_close(explanation.outputs, logits.detach(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(logits.max(-1).values.sum(), x)
    expected = (x * gradient).detach()
    torch.testing.assert_close(explanation.relevance["patches"], expected, rtol=1e-9, atol=1e-12)
    assert explanation.relevance.keys() == {"patches"}
    assert abs(compiled(read)(**given).ledger.residual) < 1e-12


def test_a_size_that_decides_is_held() -> None:
    explainer = attnlrp_fx.compile(model_of(by_branch), example(), backend="eager")
    (note,) = (n for n in explainer.report().notes if "decides" in n)
    assert note == "input 'grid' decides the model's path: it is held at the example's values"


def test_another_value_is_an_error() -> None:
    explainer, inputs = compiled(by_list), example()
    with pytest.raises(InputError, match="'grid' was compiled as the constant tensor") as raised:
        explainer(patches=inputs["patches"], grid=torch.tensor([[5, 1], [1, 5]]))
    assert "compile again" in raised.value.remedy


def test_what_is_held_may_be_left_out() -> None:
    explainer, inputs = compiled(by_list), example()
    whole, without = explainer(**inputs), explainer(patches=inputs["patches"])
    torch.testing.assert_close(whole.outputs, without.outputs, rtol=0, atol=0)


def test_the_model_and_the_example_are_left_alone() -> None:
    def writes(x: Tensor, grid: Tensor) -> Tensor:
        grid += 1
        return x[: int(grid.sum())].mean(0, keepdim=True)

    model, inputs = model_of(writes), example()
    was = inputs["grid"].clone()
    with mock.patch("attnlrp_fx.capture.capture._deciding", hold_grid):
        capture(model, inputs)
    assert torch.equal(inputs["grid"], was)
    assert not model._forward_pre_hooks


def test_nothing_is_held_where_nothing_need_be() -> None:
    def adds(x: Tensor, grid: Tensor) -> Tensor:
        return x[:2] + grid.sum()

    captured = capture(model_of(adds), example())
    assert not captured.constants
    assert not any("decides" in note for note in captured.notes)


def test_tokens_are_never_held() -> None:
    """A model that branches on its tokens cannot be captured; the error names the branch."""

    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.words(input_ids) * attention_mask[..., None]
            return x.sum(1) if input_ids[0, 0] == 3 else x.mean(1)

    inputs = {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 5).long()}
    with pytest.raises(CaptureError, match="could not be captured") as raised:
        capture(Branching().eval(), inputs)
    assert "input_ids[0, 0] == 3" in raised.value.where


def test_masks_are_held_only_if_they_decide() -> None:
    """With a note: then a program serves one mask alone."""

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(9, 4)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = self.words(input_ids)
            return x.mean(1) if attention_mask.all() else (x * attention_mask[..., None]).mean(1)

    inputs = {"input_ids": torch.ones(2, 5).long(), "attention_mask": torch.ones(2, 5).long()}
    explainer = attnlrp_fx.compile(Padded().eval(), inputs, backend="eager")
    assert any("'attention_mask' decides" in note for note in explainer.report().notes)
    with pytest.raises(InputError, match="'attention_mask' was compiled as the constant"):
        explainer(inputs["input_ids"], attention_mask=torch.tensor([[1] * 5, [1] * 4 + [0]]))
