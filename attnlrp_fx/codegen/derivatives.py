"""Programs that autograd goes through: every op of them must have its exact derivative.

A program is plain ATen, so its relevance has a gradient; but not every op of PyTorch's has one of
its own that is exact. Fused attention has no second derivative. The statistics that normalisations
return beside their result count as constants, without a word. So these are written out before they
are traced, and what is left is checked op by op: an op that would stop a gradient, or has none, is
an error when the program is made, not a wrong number when it is trained with.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from attnlrp_fx.errors import RuleError
from attnlrp_fx.graph.operators import aten, is_op
from attnlrp_fx.graph.provenance import describe
from attnlrp_fx.torch_private import decompositions, fake_mode_of

WRITTEN_OUT = (
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.native_group_norm,
    aten.native_group_norm_backward,
    aten._fused_rms_norm,
    aten._fused_rms_norm_backward,
    aten.native_batch_norm,
    aten.native_batch_norm_backward,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_no_training,
    aten.silu_backward,
    aten.mish_backward,
)
"""Ops whose further outputs are functions of the input, and constants to autograd; and derivatives
that have none themselves."""
SHAPE_ALONE = (
    *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full"),
    *("new_empty", "new_empty_strided", "rand_like", "randn_like", "detach", "sgn", "sign"),
)
"""Ops that read sizes alone, are constant between jumps, or stop gradients on purpose."""


@contextmanager
def exact_derivatives() -> Iterator[dict[Any, Callable[..., Any]]]:
    """A context in which attention is traced as it is written; yields how to write out ops."""
    with sdpa_kernel(SDPBackend.MATH):
        yield decompositions(WRITTEN_OUT)


def check_differentiable(program: fx.GraphModule, sources: Mapping[str, fx.Node]) -> None:
    """Run a program on fake tensors under autograd.

    Args:
        program: as traced.
        sources: the nodes of the rewritten graph that it was traced from, by name.

    Raises:
        RuleError: an op that is used has no derivative, or returns a constant.
    """
    inputs = program.graph.find_nodes(op="placeholder")
    with fake_mode_of(program), torch.enable_grad():
        _Differentiated(program, sources).run(*(_leaf(node.meta["val"]) for node in inputs))


def _leaf(value: Any) -> Any:
    is_floating = isinstance(value, Tensor) and _is_floating(value)
    return value.detach().requires_grad_() if is_floating else value


class _Differentiated(fx.Interpreter):
    """Runs a program, and looks at each op's derivative."""

    def __init__(self, program: fx.GraphModule, sources: Mapping[str, fx.Node]) -> None:
        super().__init__(program)
        self._sources = sources

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function" or is_op(n, *SHAPE_ALONE):
            return result
        given = pytree.tree_leaves([self.env[leaf] for leaf in n.all_input_nodes])
        if not any(isinstance(v, Tensor) and v.requires_grad for v in given):
            return result
        for part in _read_parts(n, result):
            if not part.requires_grad:
                self._refuse(n, "PyTorch takes what it returns for a constant")
            if part.grad_fn is not None and part.grad_fn.name().endswith("NotImplemented"):
                self._refuse(n, "PyTorch has no derivative of it")
        return result

    def _refuse(self, node: fx.Node, why: str) -> None:
        traced = node.meta.get("custom") or {}
        source = self._sources.get(traced.get("from", ""))
        raise RuleError(
            f"the {traced.get('phase', 'traced')} program of this op cannot be differentiated: "
            f"{node.target}",
            where=describe(source) if source is not None else f"node '{node.name}'",
            why=why,
            remedy="compile without differentiable=True, or let the model use another op here",
        )


def _is_floating(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _read_parts(node: fx.Node, result: Any) -> list[Tensor]:
    """The floating tensors of an op's result that something reads."""
    if isinstance(result, list | tuple):
        read = [user.args[1] for user in node.users if user.target is operator.getitem]
        parts = [part for i, part in enumerate(result) if i in read]
    else:
        parts = [result]
    return [part for part in parts if isinstance(part, Tensor) and _is_floating(part)]
