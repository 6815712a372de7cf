"""Slice targets: of an output that a target reads at one position of each row, return that alone.

    return [y]  →  return [unsqueeze(index(y, [arange(batch), target_positions]), 1)]

`target_positions`, (batch,) int64, is an input more. What follows of it for everything that the
output is computed from is the business of `push_selections`.
"""

import torch
from torch import Tensor, fx

from attnlrp_fx.graph.operators import aten, outputs_of
from attnlrp_fx.passes.base import PassContext, PassResult, call, finish
from attnlrp_fx.torch_private import fake_mode_of

POSITIONS = "target_positions"
"""The name of the input that holds each row's position."""


def slice_targets(graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    """Return the target's position alone of the outputs that the context names."""
    result = PassResult("slice_targets")
    graph = graph_module.graph
    outputs = outputs_of(graph)
    wanted = [i for i in context.sliced if isinstance(outputs[i], fx.Node)]
    if not wanted or any(n.target == POSITIONS for n in graph.find_nodes(op="placeholder")):
        return result
    positions = _placeholder(graph_module, outputs[wanted[0]].meta["val"])
    for i in wanted:
        output = outputs[i]
        with graph.inserting_before(graph.output_node()):
            size = call(output, result.name, aten.sym_size.int, positions, 0)
            device = output.meta["val"].device
            rows = call(output, result.name, aten.arange.default, size, device=device)
            read = call(output, result.name, aten.index.Tensor, output, [rows, positions])
            outputs[i] = call(output, result.name, aten.unsqueeze.default, read, 1)
        result.changes += 1
    graph.output_node().args = (tuple(outputs),)
    finish(graph_module)
    return result


def _placeholder(graph_module: fx.GraphModule, output: Tensor) -> fx.Node:
    """The further input, behind all others."""
    graph = graph_module.graph
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        node = graph.placeholder(POSITIONS)
    with fake_mode_of(graph_module):
        value = torch.empty(output.shape[:1], dtype=torch.int64, device=output.device)
    node.meta = {"val": value, "constructed_by": "slice_targets"}
    return node
