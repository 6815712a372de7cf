"""From an exported program to a functional graph of ops that the table knows.

`torch.export` leaves a model's in-place ops, its no-grad regions, and composite ops of every kind.
PyTorch's own decomposition removes them, at the price of tracing the model twice more. Most models
need none of it: no-grad regions are inlined, in-place ops made functional where they stand
(`mutations`), and the table knows all ops on the way that relevance takes.

What leaves a no-grad region is a constant to the model's gradient, and so to relevance: either way
it goes through a `detach`.

Autocast leaves no casts in what is exported, only in what is decomposed.
"""

import warnings
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram, default_decompositions

from attnlrp_fx.capture.autocast import autocasting
from attnlrp_fx.capture.mutations import drop_mutations, is_mutable
from attnlrp_fx.graph.operators import aten, is_known, is_op, packet
from attnlrp_fx.torch_private import lazy_graph_module

KEPT = (aten.linspace, aten.logspace, aten.embedding_bag)
"""Ops that make constants, whose decompositions round otherwise than their kernels do, and bags of
embeddings, which a pass takes apart."""
LOOKUPS = ("embedding", "embedding_bag", "index", "index_select")


def functional(exported: ExportedProgram) -> fx.GraphModule:
    """The program's graph without in-place ops, regions and ops that the table does not know.

    Parameters and buffers are shared with the exported model.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detach_regions(exported)
        casts = bool(autocasting()) or _has_autocast(exported.graph_module)
        graph_module = exported.module(check_guards=False)
        assert isinstance(graph_module, fx.GraphModule)
        inline_regions(graph_module)
        if not drop_mutations(graph_module) or casts or needs_decomposition(graph_module):
            table = default_decompositions()
            for op in list(table):
                if is_known(op) or packet(op) in KEPT:
                    del table[op]
            graph_module = exported.run_decompositions(table).module(check_guards=False)
            assert isinstance(graph_module, fx.GraphModule)
    graph_module = lazy_graph_module(graph_module, graph_module.graph)
    fill_empty(graph_module)
    relax_views(graph_module)
    relax_counts(graph_module)
    return graph_module


_FILLED = {
    aten.empty.memory_format: aten.zeros.default,
    aten.new_empty.default: aten.new_zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
}


def fill_empty(graph_module: fx.GraphModule) -> None:
    """Make memory that is to be written begin as zeros.

    A model writes all that it reads of it. A ledger multiplies what lay there before by zero, and
    nothing says that it was finite.
    """
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in _FILLED:
            if node.target is aten.empty.memory_format:
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
            node.target = _FILLED[node.target]


def relax_views(graph_module: fx.GraphModule) -> None:
    """Make every view a reshape, which does not mind its input's strides.

    A captured view holds for the strides that the kernels of the capture gave; another device or
    another attention kernel gives others. A reshape is still the view where it can be.
    """
    for view in (aten.view.default, aten._unsafe_view.default):
        for node in graph_module.graph.find_nodes(op="call_function", target=view):
            node.target = aten.reshape.default
    graph_module.recompile()


def detach_regions(exported: ExportedProgram) -> None:
    """Detach what a no-grad region makes of the program's inputs, where it leaves the region.

    Within the region, so that nothing about the program changes: there are no gradients to stop.
    """
    placeholders = exported.graph_module.graph.find_nodes(op="placeholder")
    names = {str(node.name) for node in placeholders}
    _detach_regions(exported.graph_module, names - set(exported.graph_signature.user_inputs))


def _detach_regions(graph_module: fx.GraphModule, constants: Set[str]) -> None:
    for node in graph_module.graph.nodes:
        if not _is_region(node):
            continue
        body_node = next(arg for arg in node.args if _is_submodule(graph_module, arg))
        body = getattr(graph_module, body_node.target)
        _detach_regions(body, frozenset())
        if node.args[0] is False:
            given = node.args[node.args.index(body_node) + 1 :]
            _detach_outputs(body.graph, [arg.name not in constants for arg in given])
            body.recompile()


def _detach_outputs(body: fx.Graph, is_input: Sequence[bool]) -> None:
    """Put a detach before each floating output of a region that is not a constant anyway.

    A cast to the dtype that a value has returns the value itself, gradients and all.
    """
    placeholders = zip(body.find_nodes(op="placeholder"), is_input, strict=True)
    varies = {node for node, varying in placeholders if varying and _is_floating(node)}
    for node in body.nodes:
        looks_up = node.op == "call_function" and is_op(node, *LOOKUPS)
        if looks_up or any(leaf in varies for leaf in node.all_input_nodes):
            varies.add(node)
    output = body.output_node()
    for leaf in output.all_input_nodes:
        if leaf in varies and _is_floating(leaf) and not (is_op(leaf, "detach") or _is_given(leaf)):
            with body.inserting_before(output):
                held = body.call_function(aten.detach.default, (leaf,))
            held.meta = dict(leaf.meta)
            output.replace_input_with(leaf, held)


def _is_given(node: fx.Node) -> bool:
    """Whether a node is an input of its graph, or an op that returns it as it is."""
    while is_op(node, "to", "type_as", "contiguous"):
        before = node.all_input_nodes[0]
        value, source = node.meta["val"], before.meta["val"]
        if value.dtype != source.dtype or value.stride() != source.stride():
            return False
        node = before
    return node.op == "placeholder"


def relax_counts(graph_module: fx.GraphModule) -> None:
    """Make every histogram of integers one of floats, which every device has.

    The CPU counts no integers, so a model that asks its device would be captured on another as a
    graph that the CPU cannot run. Integers below 2²⁴, such as indices of experts, count the same.
    """
    graph = graph_module.graph
    for node in graph.find_nodes(op="call_function", target=aten.histc.default):
        (counted,), dtype = node.all_input_nodes, node.meta["val"].dtype
        if dtype.is_floating_point:
            continue
        with graph.inserting_before(node):
            floats = _cast(graph, counted, torch.float32, node)
        node.replace_input_with(counted, floats)
        node.meta["val"] = node.meta["val"].float()
        with graph.inserting_after(node):
            counts = _cast(graph, node, dtype, node)
        node.replace_all_uses_with(
            counts, delete_user_cb=lambda user, kept=counts: user is not kept
        )
    graph_module.recompile()


def _cast(graph: fx.Graph, value: fx.Node, dtype: torch.dtype, source: fx.Node) -> fx.Node:
    cast = graph.call_function(aten._to_copy.default, (value,), {"dtype": dtype})
    cast.meta = {**source.meta, "val": value.meta["val"].to(dtype)}
    return cast


def inline_regions(graph_module: fx.GraphModule) -> None:
    """Replace each region that was captured under no_grad or autocast by its body.

    The values are the same with or without gradients; a region under autocast is decomposed before.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if not _is_region(node):
            continue
        body_node = next(arg for arg in node.args if _is_submodule(graph_module, arg))
        body = getattr(graph_module, body_node.target)
        inline_regions(body)
        inputs = node.args[node.args.index(body_node) + 1 :]
        values = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
        with graph.inserting_before(node):
            outputs: Any = graph.graph_copy(body.graph, values)
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body_node.users:
            graph.erase_node(body_node)


def _is_region(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in (
        "wrap_with_set_grad_enabled",
        "wrap_with_autocast",
    )


def _has_autocast(graph_module: fx.GraphModule) -> bool:
    """Whether a model turns autocast on or off for a part of itself."""
    parts = (part for part in graph_module.modules() if isinstance(part, fx.GraphModule))
    nodes = (node for part in parts for node in part.graph.nodes if _is_region(node))
    return any(node.target.__name__ == "wrap_with_autocast" for node in nodes)


def _is_submodule(graph_module: fx.GraphModule, arg: Any) -> bool:
    if not isinstance(arg, fx.Node) or arg.op != "get_attr":
        return False
    return isinstance(getattr(graph_module, str(arg.target), None), fx.GraphModule)


def needs_decomposition(graph_module: fx.GraphModule) -> bool:
    """Whether a graph changes a value in place, or has an op the table lacks on relevance's way."""
    varies: set[fx.Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" and _is_floating(node):
            varies.add(node)
        if node.op != "call_function":
            continue
        takes = any(leaf in varies for leaf in node.all_input_nodes)
        if _is_mutable(node) or (takes and _is_unknown(node)):
            return True
        if _is_floating(node) and (takes or is_op(node, *LOOKUPS)):
            varies.add(node)
    return False


def _is_mutable(node: fx.Node) -> bool:
    return is_mutable(node) or isinstance(node.target, torch._ops.HigherOrderOperator)


def _is_unknown(node: fx.Node) -> bool:
    """An op outside the table that returns floats; what makes constants may be any op."""
    if not isinstance(node.target, torch._ops.OpOverload) or is_known(node.target):
        return False
    return _is_floating(node) and not is_op(node, *LOOKUPS)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, list | tuple) else [value]
    return any(
        isinstance(part, Tensor) and (part.is_floating_point() or part.is_complex())
        for part in parts
    )
