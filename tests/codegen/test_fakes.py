"""Fake results: what shapes alone tell is what PyTorch finds, of single ops and in programs."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
from models import BY_NAME, Case
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import attnlrp_fx
from attnlrp_fx.codegen import trace
from attnlrp_fx.codegen.fakes import fake_result
from attnlrp_fx.torch_private import SymbolicSizes, expression_of

aten = torch.ops.aten


def layout(value: Tensor) -> tuple[Any, ...]:
    """All that a fake tensor says; strides of single elements are nobody's."""
    sizes = list(map(expression_of, value.shape))
    strides = list(map(expression_of, value.stride()))
    kept = [stride for size, stride in zip(sizes, strides, strict=True) if size != 1]
    return sizes, kept, value.dtype, value.device


@contextmanager
def compared(hits: Counter[Any], misses: Counter[Any]) -> Iterator[None]:
    """Within it, what programs are traced with is compared with what PyTorch finds."""

    def both(op: Any, args: Any, kwargs: Any) -> Any:
        found = fake_result(op, args, kwargs)
        if found is NotImplemented:
            misses[op] += 1
            return found
        hits[op] += 1
        expected = op(*args, **kwargs)
        pairs = zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True)
        for one, other in pairs:
            assert layout(one) == layout(other), op
        return found

    with mock.patch.object(trace, "fake_result", both):
        yield


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama", torch.float32), ("bert", torch.float32), ("t5", torch.bfloat16)],
    ids=str,
)
def test_programs(name: str, dtype: torch.dtype) -> None:
    case: Case = BY_NAME[name]
    hits: Counter[Any] = Counter()
    misses: Counter[Any] = Counter()
    with compared(hits, misses):
        attnlrp_fx.compile(
            case.model(dtype),
            case.example(3, 5, dtype),
            target=case.target,
            backend="eager",
            audit=dtype is torch.float32,
        )
    assert sum(hits.values()) > sum(misses[op] for op in hits), misses


class _Quick(TorchDispatchMode):
    """Compares what the shapes of ops' arguments tell with what PyTorch finds; keeps the last."""

    found: Any = NotImplemented

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "prim":  # somebody asks for a tensor's device
            return func(*args, **kwargs or {})
        self.found = fake_result(func, args, kwargs or {})
        result = func(*args, **kwargs or {})
        if self.found is not NotImplemented:
            pairs = zip(pytree.tree_leaves(self.found), pytree.tree_leaves(result), strict=True)
            for one, other in pairs:
                assert layout(one) == layout(other)
        return result


def result(op: Callable[..., Any], *shapes: tuple[str | int, ...], dtype: Any = None) -> Any:
    """What shapes tell of an op, after a comparison with what PyTorch finds.

    Args:
        op: of fake tensors, calls one op at its end.
        shapes: theirs; names are symbols.
        dtype: theirs.
    """
    names = sorted({name for shape in shapes for name in shape if isinstance(name, str)})
    symbols = {name: sympy.Symbol(name, integer=True, positive=True) for name in names}
    examples = {symbol: (3 + 2 * i, 2, None) for i, symbol in enumerate(symbols.values())}
    sizes = SymbolicSizes(examples, [])
    with sizes.mode, torch.no_grad():
        values = [
            torch.empty(
                [sizes.size(symbols[d]) if isinstance(d, str) else d for d in shape], dtype=dtype
            )
            for shape in shapes
        ]
        with _Quick() as quick:
            op(*values)
    return quick.found


X = ("b", "s", 8)

TOLD: list[tuple[Callable[..., Any], tuple[tuple[str | int, ...], ...]]] = [
    (lambda x: x.exp(), (X,)),
    (lambda x: x > 0, (X,)),
    (lambda x: x * 2, (X,)),
    (lambda x, y: x + y, (X, X)),
    (lambda x, y: x + y, (X, (8,))),
    (lambda x, y: x + y, ((8,), X)),
    (lambda x, y: x + y, ((1, "s", 8), X)),
    (lambda x, y: x + y, (X, ())),
    (lambda x, y: x.transpose(1, 2) * y, (X, ("b", 8, "s"))),
    (lambda x, y: torch.where(x > 0, x, y), (X, (1, "s", 1))),
    (lambda x: x.clamp(-1, 1), (X,)),
    (lambda x: x.view(x.shape[0], -1, 2, 4), (X,)),
    (lambda x: x.view(-1), (X,)),
    (lambda x: x.view(x.shape[0] * x.shape[1], 8), (X,)),
    (lambda x: aten._unsafe_view.default(x, [x.shape[0], 8 * x.shape[1]]), (X,)),
    (lambda x: x.sum((0, -1)), (X,)),
    (lambda x: x.mean(-1, keepdim=True), (X,)),
    (lambda x: x.sum(1, dtype=torch.float64), (X,)),
    (lambda x, w, b: torch.addmm(b, x, w), (("s", 8), (8, 4), (4,))),
    (lambda x: torch.softmax(x, -1), (X,)),
    (lambda x: x.to(torch.float16), (X,)),
    (lambda x: x.clone(), (X,)),
    (lambda x, w, b: torch.nn.functional.layer_norm(x, (8,), w, b), (X, (8,), (8,))),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(TOLD)))
def test_what_shapes_tell(number: int, dtype: torch.dtype) -> None:
    op, shapes = TOLD[number]
    assert result(op, *shapes, dtype=dtype) is not NotImplemented


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (lambda x, y: y * x.transpose(1, 2), (X, ("b", 8, "s"))[::-1]),
        (lambda x, y: y[:1] * x.transpose(1, 2), (X, (3, 8, 1))),  # the first decides in part
        (lambda x: x[:, :, ::2].exp(), (X,)),
        (lambda x: x.transpose(0, 1).sum(0), (X,)),
        (lambda x: x.expand(4, -1).exp(), ((1, 8),)),
        (lambda x: x.split(2), ((8,),)),
        (lambda x: x.clone(memory_format=torch.contiguous_format), (X,)),
        (lambda x: torch.sort(x), (X,)),
    ],
)
def test_what_they_do_not(
    op: Callable[..., Any], shapes: tuple[tuple[str | int, ...], ...]
) -> None:
    """Either it is left to PyTorch, or it was told right, as `result` checks."""
    result(op, *shapes)


def test_what_is_left_to_pytorch() -> None:
    assert result(lambda x, y: x + y, ("b", 1), ("s",)) is NotImplemented
    assert result(lambda x: x[:, ::2].exp(), ("b", 8)) is NotImplemented
    assert result(lambda x: x.exp_(), X) is NotImplemented
    assert result(lambda x: x.to("meta"), X) is NotImplemented


def test_known_values_are_left_to_pytorch() -> None:
    """Of a tensor made of numbers PyTorch knows what an op makes of it, which sizes may need."""
    with SymbolicSizes({}, []).mode as mode:
        known = mode.from_tensor(torch.tensor([2]))
        known.constant = torch.tensor([2])
        assert fake_result(aten.neg.default, (known,), {}) is NotImplemented


def test_integers_become_the_default_dtype() -> None:
    def half(x: Tensor) -> Tensor:
        return x / 2

    for dtype in (torch.float32, torch.float64):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert result(half, X, dtype=torch.int64).dtype is dtype
        finally:
            torch.set_default_dtype(before)


def test_views_that_do_not_fit_fail_as_they_do() -> None:
    with pytest.raises(Exception, match=r"size|shape|view"):
        result(lambda x: x.view(x.shape[0], 3), ("b", 8))
