"""Each written-out transpose is what torch.func.vjp finds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 registers the grouped product
from torch import Tensor

from attnlrp_fx.graph.operators import packet
from attnlrp_fx.graph.transposes import TRANSPOSES, transpose_of

aten = torch.ops.aten
WEIGHT = torch.randn(5, 4, dtype=torch.float64)
OTHER = torch.randn(2, 3, 4, dtype=torch.float64)

CALLS: dict[str, tuple[Any, Callable[[Tensor], tuple[Any, ...]], dict[str, Any]]] = {
    "linear": (aten.linear.default, lambda x: (x, WEIGHT), {}),
    "linear with bias": (aten.linear.default, lambda x: (x, WEIGHT, WEIGHT[:, 0]), {}),
    "view": (aten.view.default, lambda x: (x, [6, 4]), {}),
    "reshape": (aten.reshape.default, lambda x: (x, [2, 12]), {}),
    "_unsafe_view": (aten._unsafe_view.default, lambda x: (x, [24]), {}),
    "flatten": (aten.flatten.using_ints, lambda x: (x, 1), {}),
    "unsqueeze": (aten.unsqueeze.default, lambda x: (x, 1), {}),
    "squeeze": (aten.squeeze.default, lambda x: (x,), {}),
    "transpose": (aten.transpose.int, lambda x: (x, 1, 2), {}),
    "add constant": (aten.add.Tensor, lambda x: (x, OTHER), {}),
    "add number": (aten.add.Tensor, lambda x: (x, 3), {}),
    "add first": (aten.add.Tensor, lambda x: (OTHER, x), {}),
    "mul": (aten.mul.Tensor, lambda x: (x, OTHER), {}),
    "mul first": (aten.mul.Tensor, lambda x: (OTHER, x), {}),
    "mul number": (aten.mul.Tensor, lambda x: (x, -2.5), {}),
    "mul row": (aten.mul.Tensor, lambda x: (x, OTHER[0, 0]), {}),
    "_to_copy": (aten._to_copy.default, lambda x: (x,), {"dtype": torch.float32}),
    "to": (aten.to.dtype, lambda x: (x, torch.float32), {}),
    "clone": (aten.clone.default, lambda x: (x,), {}),
    "contiguous": (aten.contiguous.default, lambda x: (x,), {}),
    "neg": (aten.neg.default, lambda x: (x,), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_transpose_is_the_vjp(name: str) -> None:
    op, arguments, kwargs = CALLS[name]
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y, pull = torch.func.vjp(lambda value: op(*arguments(value), **kwargs), x)
    c = torch.randn_like(y)
    transpose = transpose_of(op, arguments(x), kwargs, [x], y)
    assert transpose is not None
    (found,) = transpose(c)
    torch.testing.assert_close(found, pull(c)[0], rtol=1e-12, atol=1e-12)


def test_every_entry_is_tested() -> None:
    grouped = {packet(op()) for op, _ in GROUPED.values()}
    assert grouped | {packet(op) for op, _, _ in CALLS.values()} == TRANSPOSES.keys()


GROUPED: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "aten": (lambda: aten._grouped_mm.default, torch.bfloat16),
    "transformers": (
        lambda: torch.ops.transformers.grouped_mm_fallback.default,
        torch.float64,
    ),
    "attnlrp_fx": (lambda: torch.ops.attnlrp_fx.grouped_mm.default, torch.float64),
}


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("transposed", [False, True], ids=["as they are", "transposed"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_grouped_product(name: str, transposed: bool, strided: bool) -> None:
    """Against autograd: functorch cannot differentiate a custom op."""
    op, dtype = GROUPED[name][0](), GROUPED[name][1]
    x = torch.randn(5, 16, dtype=dtype).requires_grad_()
    weight = torch.randn(3, 16, 24, dtype=dtype)
    if transposed:
        weight = weight.mT.contiguous().mT
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    y = op(x, weight, offs=offsets)
    c = torch.randn(1, 24, dtype=dtype).expand(5, 24) if strided else torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, c.contiguous())
    transpose = transpose_of(op, (x, weight), {"offs": offsets}, [x], y)
    assert transpose is not None
    (found,) = transpose(c)
    assert torch.equal(found, expected)
    assert transpose_of(op, (x, weight, offsets), {}, [weight], y) is None


def test_sum_of_two_explained_values() -> None:
    x = torch.randn(2, 3)
    transpose = transpose_of(aten.add.Tensor, (x, x), {}, [x, x], x + x)
    assert transpose is not None
    assert len(transpose(x)) == 2


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "explained"),
    [
        (aten.add.Tensor, (torch.ones(3), torch.ones(2, 3)), {}, (0,)),
        (aten.mul.Tensor, (torch.ones(3), torch.ones(2, 3)), {}, (0,)),
        (aten.mul.Tensor, (torch.ones(3), torch.ones(3)), {}, (0, 1)),
        (aten.add.Tensor, (torch.ones(3), torch.ones(3)), {"alpha": 2}, (0, 1)),
        (aten.linear.default, (torch.ones(2, 3), torch.ones(4, 3)), {}, (1,)),
    ],
    ids=["add broadcast", "mul broadcast", "two factors", "alpha", "explained weight"],
)
def test_lines_that_do_not_hold_are_left_to_vjp(
    op: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any], explained: tuple[int, ...]
) -> None:
    primals = [args[i] for i in explained]
    assert transpose_of(op, args, kwargs, primals, op(*args, **kwargs)) is None
