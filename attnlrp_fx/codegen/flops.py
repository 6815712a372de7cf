"""Floating-point operations of an op, from the shapes of what it reads and makes.

As PyTorch's own counter has it: two for each multiplication and addition of a matrix product, a
convolution or an attention. `FORMULAS` are those of ops that it does not know.
"""

from typing import Any

from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from attnlrp_fx.graph.operators import aten, packet


def _grouped_flops(x: Any, weight: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Each row of (S, in) times one of the matrices (E, in, out)."""
    operations: int = 2 * x[0] * weight[-2] * weight[-1]
    return operations


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    operations: int = sdpa_flop_count(query, key, value)
    return operations


def _attention_backward_flops(
    c: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    operations: int = sdpa_backward_flop_count(c, query, key, value)
    return operations


FORMULAS: dict[Any, Any] = {
    aten._grouped_mm: _grouped_flops,
    "transformers::grouped_mm_fallback": _grouped_flops,
    "attnlrp_fx::grouped_mm": _grouped_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""The operations of ops that PyTorch's counter does not know, from their arguments' shapes."""


def operations(node: fx.Node) -> Any:
    """What computing a node takes: of products their operations, of others an operation an element.

    A number, or an expression of symbolic sizes.
    """
    formula = FORMULAS.get(packet(node.target)) or flop_registry.get(packet(node.target))
    if formula is None:
        values = [leaf.meta.get("val") for leaf in (node, *node.all_input_nodes)]
        return sum(value.numel() for value in values if isinstance(value, Tensor))
    called: Any = fx.node.map_arg((node.args, node.kwargs), lambda leaf: leaf.meta["val"])
    args, kwargs = called
    if packet(node.target) in FORMULAS:
        args = [value.shape if isinstance(value, Tensor) else value for value in args]
    return formula(*args, **kwargs, out_val=node.meta["val"])
