"""Unpadded: attention of inputs without padding, told what it may see by a flag, not by a mask.

    attention(q, k, v, mask)  →  attention(q, k, v, is_causal=True)   where mask says j ≤ i
    attention(q, k, v, mask)  →  attention(q, k, v)                   where it says nothing

A mask of sizes and of inputs that are all ones is one of these two in most models. Kernels have the
first built in, and skip what it hides; a mask is as large as length² and is read in every layer,
forward and in reverse. Whether masks are what they were taken for is looked up, not assumed: the
part of the graph that makes them runs once for every new set of sizes, and where it makes others,
or an input is not all ones, the graph as it was serves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.calculus.tape import Runner
from attnlrp_fx.graph.operators import aten, is_op, placeholders_of
from attnlrp_fx.torch_private import lazy_graph_module

ATTENTION = aten.scaled_dot_product_attention.default
MASK, CAUSAL = 3, 5
"""The places of attention's arguments: query, key, value, mask, dropout, causal."""
SIZES = """
    sym_size sym_numel new_ones new_zeros new_full new_empty
    ones_like zeros_like full_like empty_like
""".split()
"""What reads an input's size and dtype, and none of its values."""


@dataclass(frozen=True)
class Unpadded:
    """A rewritten graph that serves inputs without padding."""

    rewritten: fx.GraphModule
    """The graph without those masks; nodes have the names that they had."""
    masks: fx.GraphModule
    """The graph's inputs → the masks that it lacks."""
    causal: tuple[bool, ...]
    """For each of them, whether it hides what lies behind each position, or nothing."""
    inputs: tuple[str, ...]
    """The inputs that must be all ones."""
    _known: dict[tuple[Any, ...], bool] = field(default_factory=dict)
    """By sizes, whether masks are what they were taken for."""

    def serves(self, given: Mapping[str, Tensor], attributes: Mapping[str, Tensor]) -> bool:
        """Whether the graph computes what the whole one would, for some inputs.

        Args:
            given: all of the graph's inputs by name.
            attributes: the graph's tensors by name.
        """
        if any(value.is_meta for value in given.values()):
            return False
        if not all(_is_ones(given[name]) for name in self.inputs):
            return False
        sizes = tuple(value.shape for value in given.values())
        if sizes not in self._known:
            found = _run(self.masks, given, attributes)
            self._known[sizes] = all(map(_says, found, self.causal))
        return self._known[sizes]


def unpadded(
    rewritten: fx.GraphModule, example: Mapping[str, Tensor], attributes: Mapping[str, Tensor]
) -> Unpadded | None:
    """A rewritten graph for inputs without padding.

    Args:
        rewritten: the graph.
        example: values for its inputs, by name; the kinds of masks are read off what they give.
        attributes: the graph's tensors by name.

    Returns:
        The graph; None if it has no such masks, or if the example has padding, or one token, or
        no values.
    """
    if any(value.is_meta for value in example.values()):
        return None
    masked = [node for node in rewritten.graph.nodes if _mask_of(node) is not None]
    masks = list(dict.fromkeys(mask for n in masked if (mask := _mask_of(n)) is not None))
    reads = {mask: _read_by_value(mask) for mask in masks}
    ready = [
        mask
        for mask in masks
        if all(n.target in example and _is_ones(example[str(n.target)]) for n in reads[mask])
    ]
    if not ready:
        return None
    values = _run(_alone(rewritten, ready), example, attributes)
    causal = {
        mask: kind
        for mask, value in zip(ready, values, strict=True)
        for kind in (True, False)
        if value.dim() > 1 and value.shape[-1] > 1 and _says(value, kind)
    }
    if not causal:
        return None
    return Unpadded(
        rewritten=_without(rewritten, causal),
        masks=_alone(rewritten, list(causal)),
        causal=tuple(causal.values()),
        inputs=tuple(dict.fromkeys(str(n.target) for mask in causal for n in reads[mask])),
    )


def _mask_of(node: fx.Node) -> fx.Node | None:
    """The mask of an attention that sees only part of its keys; None if it has none of its own."""
    arguments = _arguments(node)
    mask = arguments.get(MASK)
    if not isinstance(mask, fx.Node) or ops.is_explained(mask) or arguments.get(CAUSAL):
        return None
    return mask


def _arguments(node: fx.Node) -> dict[int, Any]:
    """The arguments of an attention by place; none for another op."""
    wraps = node.target in ops.RELEVANCE_OPS
    target, args = (node.args[0], node.args[1:]) if wraps else (node.target, node.args)
    if target is not ATTENTION:
        return {}
    named = {MASK: node.kwargs.get("attn_mask"), CAUSAL: node.kwargs.get("is_causal")}
    return named | dict(enumerate(args))


def _read_by_value(mask: fx.Node) -> list[fx.Node]:
    """The placeholders whose values, and not their sizes alone, a mask is made of."""
    found: dict[fx.Node, None] = {}
    stack, seen = [mask], {mask}
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            found[node] = None
        for leaf in () if is_op(node, *SIZES) else node.all_input_nodes:
            if leaf not in seen:
                seen.add(leaf)
                stack.append(leaf)
    return list(found)


def _is_ones(value: Tensor) -> bool:
    return not value.is_floating_point() and bool((value == 1).all())


def _says(mask: Tensor, causal: bool) -> bool:
    """Whether a mask lets each position see those up to it, or, if not causal, everything."""
    seen = mask if mask.dtype == torch.bool else _seen(mask)
    if seen is None:
        return False
    if not causal:
        return bool(seen.all())
    queries, keys = mask.shape[-2:]
    if queries != keys:
        return False
    wanted = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).tril()
    return torch.equal(seen, wanted.expand_as(seen))


def _seen(mask: Tensor) -> Tensor | None:
    """What a mask that is added to the scores lets through; None if it does more than that."""
    shut = mask <= torch.finfo(mask.dtype).min
    return ~shut if bool((shut | (mask == 0)).all()) else None


def _run(
    graph_module: fx.GraphModule, given: Mapping[str, Tensor], attributes: Mapping[str, Tensor]
) -> list[Tensor]:
    arguments = [given[str(node.target)] for node in placeholders_of(graph_module)]
    device = next(iter(given.values())).device
    with torch.no_grad():
        found: list[Tensor] = Runner(graph_module, attributes, device).run(*arguments)
    return found


def _alone(rewritten: fx.GraphModule, masks: Sequence[fx.Node]) -> fx.GraphModule:
    """The part of a graph that makes its masks, on all of its inputs."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(rewritten.graph, values)
    graph.output([values[mask] for mask in masks])
    return _living(rewritten, graph)


def _without(rewritten: fx.GraphModule, causal: Mapping[fx.Node, bool]) -> fx.GraphModule:
    """A graph whose attention has a flag instead of those masks."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(rewritten.graph, values))
    for node, copy in values.items():
        mask = _mask_of(node)
        if mask is not None and mask in causal:
            first = 1 if node.target in ops.RELEVANCE_OPS else 0
            copy.args = copy.args[: first + MASK]
            copy.kwargs = {k: v for k, v in copy.kwargs.items() if k != "attn_mask"}
            if causal[mask]:
                copy.kwargs = {**copy.kwargs, "is_causal": True}
    return _living(rewritten, graph)


def _living(rewritten: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """A graph without what nothing reads, on the same parameters."""
    made = lazy_graph_module(rewritten, graph)
    made.graph.eliminate_dead_code()
    made.recompile()
    return made
