"""Views that split and merge dimensions at once are said by strides; others stay views."""

import pytest
import torch
from test_retrace import run
from test_trace import targets, traced

from attnlrp_fx.codegen.fakes import VIEWS
from attnlrp_fx.codegen.regrouped import regrouped
from attnlrp_fx.codegen.retrace import Retraced, retraced
from attnlrp_fx.torch_private import SymbolicSizes

aten = torch.ops.aten
PARTS = dict.fromkeys(VIEWS, regrouped)


def shifted(x: torch.Tensor) -> list[torch.Tensor]:
    """Relative positions made absolute: each row one further to the left."""
    batch, rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (1, 0))
    return [padded.view(batch, -1, rows)[:, 1:].reshape(batch, rows, columns)]


def made(function: object, *shape: int) -> Retraced:
    return retraced(traced(function, torch.randn(shape)), PARTS)  # type: ignore[arg-type]


def test_a_shift_row_by_row() -> None:
    found = made(shifted, 2, 3, 5)
    assert aten.as_strided.default in targets(found.program)
    for shape in ((4, 6, 7), (1, 2, 2)):
        x = torch.randn(shape)
        assert torch.equal(run(found, x)[0], shifted(x)[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x.view(x.shape[0], x.shape[1], 2, 3)],  # heads
        lambda x: [x.view(x.shape[0] * x.shape[1], 6)],  # rows
        lambda x: [x.view(x.shape[0] * x.shape[1], 2, 3)],
        lambda x: [x[:, :, None].contiguous().view(x.shape[0], 1, -1)],
        lambda x: [x.view(-1)],
    ],
)
def test_views_that_split_or_merge(function: object) -> None:
    found = made(function, 4, 5, 6)
    assert aten.as_strided.default not in targets(found.program)
    assert set(VIEWS) & set(targets(found.program))


def test_what_does_not_lie_in_order_is_no_such_view() -> None:
    """Its strides would be others."""
    found = made(lambda x: [x.t()[None].view(1, x.shape[1], x.shape[0])], 4, 5)
    assert aten.as_strided.default not in targets(found.program)


def test_sizes_that_depend_on_values() -> None:
    """Of them there is no example to tell by."""
    sizes = SymbolicSizes({}, [])
    rows, columns = (sizes.size(sizes.unknown()) for _ in range(2))
    with sizes.mode:
        assert regrouped(torch.empty(rows, columns), [columns, rows]) is NotImplemented
