"""Drop ops that return their input: dropout in evaluation, alias, whole slices, casts to the same.

    y = alias(x)                 →  x
    y = dropout(x, p, False)     →  x
    y = slice(x, d, 0, max)      →  x
    y = _to_copy(x, same dtype)  →  x
    y = view(x, same shape)      →  x

A `detach` stays: it is the model's own word that no gradient, and so no relevance, goes further.
"""

import sys
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.graph.operators import is_op
from attnlrp_fx.passes.base import PassContext, PassResult, finish


def drop_identities(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Replace each identity by its input."""
    result = PassResult("drop_identities")
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph_module.graph.erase_node(node)
            result.changes += 1
    if result.changes:
        finish(graph_module)
    return result


def is_identity(node: fx.Node) -> bool:
    """Whether a node returns its first argument, value for value."""
    if is_op(node, "dropout", "feature_dropout"):
        return node.args[2] is False
    if is_op(node, "alias", "lift_fresh_copy"):
        return True
    if is_op(node, "clone", "contiguous"):
        return _same(node.args[0], node) and _same_layout(node.args[0], node)
    if is_op(node, "slice"):
        defaults = (None, 0, 0, sys.maxsize, 1)
        start, end, step = (*node.args, *defaults[len(node.args) :])[2:]
        return bool(start in (0, None) and end == sys.maxsize and step == 1)
    if is_op(node, "_to_copy", "to", "type_as"):
        return _same(node.args[0], node) and not node.kwargs.get("memory_format")
    if is_op(node, "view", "reshape", "expand", "_unsafe_view"):
        return _same(node.args[0], node)
    return False


def _same_layout(source: Any, node: fx.Node) -> bool:
    """Whether a copy has its input's strides: other strides may be what a later view needs."""
    return list(map(str, source.meta["val"].stride())) == list(map(str, node.meta["val"].stride()))


def _same(source: Any, node: fx.Node) -> bool:
    a, b = source.meta.get("val"), node.meta.get("val")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False
    if a.dtype != b.dtype or a.device != b.device or a.dim() != b.dim():
        return False
    return all(_statically_equal(m, n) for m, n in zip(a.shape, b.shape, strict=True))


def _statically_equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every input, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)
