"""Merge batch normalisation into the layer before it, or behind it.

    y = batch_norm(conv(x, W, b), γ, β, μ, v)  →  y = conv(x, s W, s b + t)
    y = linear(batch_norm(x, γ, β, μ, v), W, b)  →  y = linear(x, W s, b + W t)

with s = γ / √(v + ε) and t = β − μ s. Normalisation with running statistics is affine, so the
outputs are the same up to rounding. The ε rule without a stabiliser does not tell the two apart;
rules that look at weights or stabilise do, and mean the merged layer. So the pass does nothing for
composites that have none of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx

from attnlrp_fx.graph.operators import aten, is_convolution, is_op
from attnlrp_fx.passes.base import PassContext, PassResult, call, finish, replace

TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")


def merge_batch_norms(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Merge every batch normalisation that stands alone before or behind a layer."""
    result = PassResult("merge_batch_norms")
    if not context.composite.looks_at_weights:
        return result
    for node in list(graph_module.graph.nodes):
        if not is_op(node, "_native_batch_norm_legit_no_training"):
            continue
        before, behind = _layer_before(node), _layer_behind(node)
        if before is not None:
            _merge_before(before, node, result)
        elif behind is not None:
            _merge_behind(behind, node, result)
        else:
            result.miss(node, "no layer of its own stands next to it")
    if result.changes:
        finish(graph_module)
    return result


def _layer_before(norm: fx.Node) -> fx.Node | None:
    """The layer whose output this norm alone reads."""
    layer = norm.args[0]
    assert isinstance(layer, fx.Node)
    is_grouped = is_op(layer, *TRANSPOSED) and _option(layer, 6, 1) != 1
    return layer if _is_layer(layer) and len(layer.users) == 1 and not is_grouped else None


def _layer_behind(norm: fx.Node) -> fx.Node | None:
    """The layer that alone reads what this norm returns; one that pads with zeros cannot shift."""
    output = _output(norm)
    if len(output.users) != 1:
        return None
    layer = next(iter(output.users))
    if not _is_layer(layer) or layer.args[0] is not output or is_op(layer, *TRANSPOSED):
        return None
    if is_convolution(layer.target) and (_option(layer, 6, 1) != 1 or _pads(layer)):
        return None
    return layer


def _is_layer(node: fx.Node) -> bool:
    """Whether a node is a linear layer of rows, or a convolution of a batch, with own parameters.

    Then the channels are the second dimension of what it returns, as the norm has it.
    """
    if is_op(node, "convolution") or not (is_op(node, "linear") or is_convolution(node.target)):
        return False
    weight = node.args[1]
    is_own = isinstance(weight, fx.Node) and weight.op == "get_attr"
    return is_own and node.meta["val"].dim() == weight.meta["val"].dim()  # type: ignore[union-attr]


def _pads(convolution: fx.Node) -> bool:
    padding = _option(convolution, 4, 0)
    return padding != "valid" and any(padding if isinstance(padding, list | tuple) else [padding])


def _option(node: fx.Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _output(norm: fx.Node) -> fx.Node:
    """What a norm returns first: the normalised value."""
    return next(user for user in norm.users if user.args[1:] == (0,))


def _scale_and_shift(norm: fx.Node, write: Callable[..., fx.Node]) -> tuple[fx.Node, fx.Node]:
    """s = γ / √(v + ε) and t = β − μ s, each (channels,)."""
    _, weight, bias, mean, variance, _, epsilon = norm.args
    scale = write(aten.rsqrt.default, write(aten.add.Tensor, variance, epsilon))
    if weight is not None:
        scale = write(aten.mul.Tensor, scale, weight)
    shift = write(aten.neg.default, write(aten.mul.Tensor, mean, scale))
    if bias is not None:
        shift = write(aten.add.Tensor, shift, bias)
    return scale, shift


def _merge_before(layer: fx.Node, norm: fx.Node, result: PassResult) -> None:
    """norm(W x + b) → s W x + (s b + t)."""
    output = _output(norm)
    x, weight = layer.args[:2]
    bias = _option(layer, 2, layer.kwargs.get("bias"))
    write = partial(call, norm, result.name)
    with layer.graph.inserting_before(output):
        scale, shift = _scale_and_shift(norm, write)
        outputs = 1 if is_op(layer, *TRANSPOSED) else 0
        along = write(aten.view.default, scale, _along(outputs, weight))
        scaled = write(aten.mul.Tensor, weight, along)
        added = shift
        if bias is not None:
            added = write(aten.add.Tensor, write(aten.mul.Tensor, bias, scale), shift)
        _put(layer, output, (x, scaled, added), result)


def _merge_behind(layer: fx.Node, norm: fx.Node, result: PassResult) -> None:
    """W norm(x) + b → (W s) x + (b + W t), for inputs along the weight's second dimension."""
    weight = layer.args[1]
    bias = _option(layer, 2, layer.kwargs.get("bias"))
    write = partial(call, norm, result.name)
    with layer.graph.inserting_before(layer):
        scale, shift = _scale_and_shift(norm, write)
        shape = _along(1, weight)
        scaled = write(aten.mul.Tensor, weight, write(aten.view.default, scale, shape))
        shifted = write(aten.mul.Tensor, weight, write(aten.view.default, shift, shape))
        others = list(range(1, shifted.meta["val"].dim()))
        added = write(aten.sum.dim_IntList, shifted, others)
        if bias is not None:
            added = write(aten.add.Tensor, added, bias)
        _put(layer, layer, (norm.args[0], scaled, added), result)


def _along(axis: int, weight: Any) -> list[int]:
    """The shape in which a vector is broadcast along one dimension of a weight."""
    shape = [1] * weight.meta["val"].dim()
    shape[axis] = -1
    return shape


def _put(layer: fx.Node, old: fx.Node, args: tuple[Any, ...], result: PassResult) -> None:
    """Put the merged layer in the place of an old value."""
    kwargs = {key: value for key, value in layer.kwargs.items() if key != "bias"}
    new = layer.graph.call_function(layer.target, (*args, *layer.args[3:]), kwargs)  # type: ignore[arg-type]
    provenance = {**layer.meta, "val": old.meta["val"]}
    replace(old, new, result.name)
    new.meta = {**provenance, "constructed_by": result.name}
    result.changes += 1
