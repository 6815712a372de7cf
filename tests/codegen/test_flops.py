"""Operations of one node, against what PyTorch counts when it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Explain
from models import BY_NAME
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from attnlrp_fx.codegen.flops import FORMULAS, operations
from attnlrp_fx.graph.operators import aten, packet
from attnlrp_fx.torch_private import typical_size

KERNELS = {op: formula for op, formula in FORMULAS.items() if not isinstance(op, str)}


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value)[0]


def attention_backward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    result, sums = aten._scaled_dot_product_flash_attention_for_cpu.default(query, key, value)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return backward(result, query, key, value, result, sums, 0.0, False)[0]


def convolution_backward(x: Tensor, weight: Tensor) -> Tensor:
    y = F.conv2d(x, weight)
    sizes = [[1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]]
    return aten.convolution_backward.default(y, x, weight, None, *sizes)[0]


PRODUCTS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...], int]] = {
    "mm": (torch.mm, ((3, 5), (5, 7)), 2 * 3 * 5 * 7),
    "bmm": (torch.bmm, ((2, 3, 5), (2, 5, 7)), 2 * 2 * 3 * 5 * 7),
    "addmm": (torch.addmm, ((7,), (3, 5), (5, 7)), 2 * 3 * 5 * 7),
    "baddbmm": (torch.baddbmm, ((2, 3, 7), (2, 3, 5), (2, 5, 7)), 2 * 2 * 3 * 5 * 7),
    "convolution": (F.conv2d, ((3, 4, 9, 8), (6, 4, 3, 2)), 2 * 3 * 7 * 7 * 6 * 4 * 3 * 2),
    "transposed convolution": (
        F.conv_transpose1d,
        ((3, 4, 9), (4, 6, 5)),
        2 * 3 * 9 * 4 * 6 * 5,
    ),
    "convolution backward": (convolution_backward, ((3, 4, 9, 8), (6, 4, 3, 2)), 0),
    "attention": (attention, ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), 2 * 2 * 2 * 3 * 5 * 7 * 8),
    "attention backward": (attention_backward, ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)), 0),
}
"""What calls an op, on which sizes, and its operations by hand, or 0 where they are many."""


def drawn(sizes: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    return [torch.randn(size) for size in sizes]


def traced(function: Callable[..., Any], given: list[Tensor], mode: str) -> list[fx.Node]:
    graph = make_fx(function, tracing_mode=mode)(*given).graph
    return [node for node in graph.nodes if node.op == "call_function"]


def counted(function: Callable[..., Any], given: list[Tensor]) -> int:
    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter, torch.no_grad():
        function(*given)
    return int(counter.get_total_flops())


def is_product(node: fx.Node) -> bool:
    return packet(node.target) in FORMULAS or packet(node.target) in flop_registry


@pytest.mark.parametrize("name", PRODUCTS)
def test_operations_of_a_product(name: str) -> None:
    function, sizes, by_hand = PRODUCTS[name]
    given = drawn(sizes)
    found = sum(operations(node) for node in traced(function, given, "fake") if is_product(node))
    assert found == counted(function, given) > 0
    assert by_hand in (0, found)


@pytest.mark.parametrize("name", PRODUCTS)
def test_operations_of_symbolic_sizes(name: str) -> None:
    """An expression, equal to what is counted at any sizes; no size becomes fixed by asking."""
    function, sizes, _ = PRODUCTS[name]
    nodes = [n for n in traced(function, drawn(sizes), "symbolic") if is_product(n)]
    known = symbols(nodes[0].graph, sizes)
    assert known
    found = sum(typical_size(operations(node), 64, known) for node in nodes)
    assert found == counted(function, drawn(sizes))
    assert symbols(nodes[0].graph, sizes) == known


def symbols(graph: fx.Graph, sizes: tuple[tuple[int, ...], ...]) -> dict[str, int]:
    """What each symbol of a graph's inputs stands for."""
    placeholders = graph.find_nodes(op="placeholder")
    return {
        str(symbol): size
        for node, known in zip(placeholders, sizes, strict=True)
        for symbol, size in zip(node.meta["val"].shape, known, strict=True)
        if isinstance(symbol, torch.SymInt)
    }


def test_operations_of_a_grouped_product() -> None:
    """Each row meets one matrix."""
    x, weight = (torch.randn(size, dtype=torch.bfloat16) for size in ((6, 16), (3, 16, 8)))
    ends = torch.tensor([2, 2, 6], dtype=torch.int32)
    nodes = traced(lambda *given: aten._grouped_mm.default(*given), [x, weight, ends], "fake")
    (node,) = [node for node in nodes if is_product(node)]
    assert operations(node) == 2 * 6 * 16 * 8


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x * 2, 2 * 15),
        (lambda x: x + x, 2 * 15),
        (lambda x: x.sum(1), 15 + 3),
        (lambda x: torch.softmax(x, -1), 2 * 15),
    ],
)
def test_operations_of_anything_else(function: Callable[[Tensor], Tensor], expected: int) -> None:
    """One for each element that is read or made."""
    (node,) = traced(function, [torch.randn(3, 5)], "fake")
    assert operations(node) == expected


def test_operations_of_a_program(explain: Explain) -> None:
    """All of its products, as expressions, are what its cost says."""
    for name in ("llama", "t5"):
        explainer = explain(BY_NAME[name])
        device = torch.device("cpu")
        compiled = explainer._running.programs.example(explainer._running.default_seeds(), device)
        steps = (*compiled.schedule.forward, *compiled.schedule.relevance)
        nodes = [node for step in steps for node in step.graph_module.graph.nodes]
        sizes = explainer._running.programs.keeping().sizes
        found = sum(typical_size(operations(n), 64, sizes) for n in nodes if is_product(n))
        assert found == explainer.cost(**explainer._running.convention.given).flops
