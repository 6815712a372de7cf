"""In-place ops become functional: the same values, the same gradients, or an honest refusal."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

import attnlrp_fx
from attnlrp_fx.capture.mutations import drop_mutations, is_mutable


class Writes(nn.Module):
    """Calls a function that writes in place."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x * 1.5)


def graph_of(model: nn.Module, x: Tensor) -> fx.GraphModule:
    shapes = {"x": {0: Dim.AUTO}}
    graph_module = export(model, (x,), dynamic_shapes=shapes, strict=False).module(
        check_guards=False
    )
    assert isinstance(graph_module, fx.GraphModule)
    return graph_module


def whole(x: Tensor) -> Tensor:
    x.mul_(x.clone().sin())
    return x.add_(1)


def rows(x: Tensor) -> Tensor:
    """Each row from those before it, as in a recurrence that is written out."""
    for i in range(1, 4):
        row, before = x[:, i, :i].clone(), x[:, i - 1, :i].clone()
        x[:, i, :i] = row + (before * row).sum(-1, keepdim=True)
    return x


def through_views(x: Tensor) -> Tensor:
    """A write into a view shows in what owns the memory, and in views taken before."""
    early = x.transpose(1, 2)[:, 0]
    x.view(x.shape[0], 24).unsqueeze(1).permute(2, 1, 0)[::2].mul_(3)
    late = x[:, 1:].clone()
    late[:, 0].zero_()
    return x + early.unsqueeze(-1) + late.sum(1, keepdim=True)


def what_was_read_before(x: Tensor) -> Tensor:
    """A value computed before a write keeps what was there."""
    before = x.clone().sin()
    x[:, 0] = 7.0
    x[:, 1].fill_(2)
    x[:, 2] = x[:, 3]
    return before * x


def by_index(x: Tensor) -> Tensor:
    x[:, torch.tensor([0, 2])] = x[:, torch.tensor([1, 3])] * 2
    x.masked_fill_(x > 1, 0.5)
    x.scatter_(1, torch.zeros_like(x[:, :1], dtype=torch.int64), x[:, :1].clone().cos())
    return x


def in_lower_precision(x: Tensor) -> Tensor:
    low = x.float()
    low.mul_(x).copy_(low.double() + x)
    return low


def one_of_several(x: Tensor) -> Tensor:
    """New results have memory of their own each."""
    values, places = x.topk(2, dim=1)
    values /= values.sum(1, keepdim=True)
    return x * values.cos().sum(1, keepdim=True) + places.sum(1, keepdim=True)


def under_parts(x: Tensor) -> Tensor:
    """Parts lie in the memory of what they are parts of; with gradients, PyTorch refuses this."""
    first, second = x.chunk(2, dim=1)
    x.mul_(2)
    return first * second


SUPPORTED = [
    whole,
    rows,
    through_views,
    what_was_read_before,
    by_index,
    in_lower_precision,
    one_of_several,
]


@pytest.mark.parametrize("function", [*SUPPORTED, under_parts], ids=lambda f: f.__name__)
def test_values_stay(function: Callable[[Tensor], Tensor]) -> None:
    model = Writes(function)
    graph_module = graph_of(model, torch.randn(2, 4, 6).double())
    assert any(map(is_mutable, graph_module.graph.nodes))
    assert drop_mutations(graph_module)
    assert not any(map(is_mutable, graph_module.graph.nodes))
    graph_module.graph.lint()
    x = torch.randn(3, 4, 6).double()
    torch.testing.assert_close(graph_module(x.clone()), model(x.clone()), rtol=0, atol=0)


@pytest.mark.parametrize("function", SUPPORTED, ids=lambda f: f.__name__)
def test_gradient_times_input(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 4, 6).double()
    model = nn.Sequential(Writes(function), nn.Flatten()).eval()
    explainer = attnlrp_fx.compile(model, x, composite="gradient", backend="eager")
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf)[:, 9].sum(), leaf)
    found = explainer(x, target=9).relevance["input"]
    precision = 1e-6 if function is in_lower_precision else 1e-12
    torch.testing.assert_close(found, x * gradient, rtol=precision, atol=1e-15)


def an_input(x: Tensor) -> Tensor:
    return x.mul_(2)


def a_diagonal(x: Tensor) -> Tensor:
    y = x + 0
    y.diagonal(dim1=1, dim2=2).add_(1)
    return y


def strided(x: Tensor) -> Tensor:
    y = x + 0
    y.as_strided((2,), (1,)).add_(1)
    return y


@pytest.mark.parametrize("function", [an_input, a_diagonal, strided], ids=lambda f: f.__name__)
def test_what_it_cannot_do_it_refuses(function: Callable[[Tensor], Tensor]) -> None:
    model = Writes(function)
    model.forward = function  # type: ignore[method-assign]
    assert not drop_mutations(graph_of(model, torch.randn(2, 4, 6)))


def test_a_graph_without_writes_is_left_as_it_is() -> None:
    graph_module = graph_of(Writes(torch.sin), torch.randn(2, 4, 6))
    before = graph_module.code
    assert drop_mutations(graph_module)
    assert graph_module.code == before


def test_golden() -> None:
    def write(x: Tensor) -> Tensor:
        x.select(1, 0).mul_(2)
        return x

    graph_module = graph_of(Writes(write), torch.randn(2, 4, 6))
    assert drop_mutations(graph_module)
    calls = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    assert [node.target.overloadpacket.__name__ for node in calls] == [
        *("mul", "select", "mul", "select_scatter")
    ]
