"""Codegen: the tape under a tracer, and the program that comes out.

`emit` runs the tape on fake tensors that have the captured graph's symbolic sizes, under `make_fx`.
What comes out is one flat graph of ATen ops, without autograd and detach: parameters, inputs and
seeds in; outputs, relevance and ledger out. Parameters are inputs under the model's own names, so
that an optimiser's step shows at once.

`split` cuts the program where the seeds enter: *forward* (outputs and saved values) and
*relevance* (saved values and seeds in, relevance out). What the outputs do not need is computed on
the relevance side; views and sizes are never saved but made again.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from attnlrp_fx.operators import is_op, is_structural
from attnlrp_fx.tape import Tape
from attnlrp_fx.torch_private import fake_mode_of

SEED = "seed_"


@dataclass(frozen=True)
class Program:
    """A traced program, whole and split.

    The whole takes (attributes, inputs, seeds) and returns (outputs, relevance, sums), flat.
    """

    graph_module: fx.GraphModule
    attributes: tuple[str, ...]
    """Parameters, buffers and constants, by the model's own names."""
    inputs: tuple[str, ...]
    seeded: tuple[int, ...]
    """Which flat outputs have a seed."""
    outputs: int
    """How many outputs the model has."""
    explained: tuple[str, ...]
    """The explained inputs, in the order of their relevance."""
    audited: tuple[str, ...]
    """The nodes whose sums the program returns, empty unless audited."""
    forward: fx.GraphModule
    relevance: fx.GraphModule
    device: torch.device


def emit(
    rewritten: fx.GraphModule,
    seeded: Sequence[int],
    *,
    attributes: Mapping[str, Tensor],
    device: torch.device,
    captured_device: torch.device,
    audit: bool = False,
) -> Program:
    """Trace the tape of a rewritten graph into a program.

    Args:
        rewritten: the rewritten graph.
        seeded: positions of the flat outputs that get a seed.
        attributes: the graph's tensors by name, on the device.
        device: where the program will run.
        captured_device: where the model was captured; constants created there move along.
        audit: whether the program also returns the ledger's sums.
    """
    graph = rewritten.graph
    placeholders = graph.find_nodes(op="placeholder")
    outputs = list(graph.output_node().args[0])  # type: ignore[arg-type]
    mode = fake_mode_of(rewritten)
    fakes = {
        name: mode.from_tensor(value, static_shapes=True) for name, value in attributes.items()
    }
    explained: list[str] = []
    audited: list[str] = []

    def program(
        attributes: dict[str, Tensor], inputs: list[Tensor], seeds: list[Tensor]
    ) -> list[Any]:
        moved = device if device != captured_device else None
        tape = Tape(rewritten, attributes, moved, _annotate)
        results = tape.run(*inputs)
        read = tape.reverse(
            {outputs[i]: seed for i, seed in zip(seeded, seeds, strict=True)}, audit=audit
        )
        explained[:] = read.relevance
        audited[:] = read.sums
        sums = [torch.stack(list(read.sums.values()))] if read.sums else []
        return [*results, *read.relevance.values(), *sums]

    with mode, torch.no_grad():
        fake_inputs = [_on(node.meta["val"], device) for node in placeholders]
        seeds = [_on(outputs[i].meta["val"], device) for i in seeded]
        with torch.fx.traceback.preserve_node_meta():
            traced = make_fx(program, tracing_mode="symbolic")(fakes, fake_inputs, seeds)
    names = [str(node.target) for node in placeholders]
    _name_inputs(traced, [*attributes, *names, *(f"{SEED}{i}" for i in seeded)])
    _clean(traced)
    forward, relevance = split(traced, len(outputs))
    return Program(
        graph_module=traced,
        attributes=tuple(attributes),
        inputs=tuple(names),
        seeded=tuple(seeded),
        outputs=len(outputs),
        explained=tuple(explained),
        audited=tuple(audited),
        forward=forward,
        relevance=relevance,
        device=device,
    )


def _on(value: Tensor, device: torch.device) -> Tensor:
    """A fake tensor of the same sizes, contiguous, on a device."""
    return torch.empty(value.shape, dtype=value.dtype, device=device)


@contextmanager
def _annotate(node: fx.Node, phase: str) -> Iterator[None]:
    """Tell the tracer which node of the rewritten graph, and which side, its ops come from."""
    with torch.fx.traceback.annotate({"from": node.name, "phase": phase}):
        yield


def _name_inputs(program: fx.GraphModule, names: Sequence[str]) -> None:
    placeholders = program.graph.find_nodes(op="placeholder")
    for node, name in zip(placeholders, names, strict=True):
        readable = name.replace(".", "_")
        node.target = readable
        node._rename(readable)
        node.meta["name"] = name


def _clean(program: fx.GraphModule) -> None:
    """Drop detaches and what is dead; nobody differentiates the program by its detaches."""
    for node in list(program.graph.nodes):
        if is_op(node, "detach", "alias", "lift_fresh_copy"):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph.eliminate_dead_code()
    program.recompile()


def split(program: fx.GraphModule, outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Cut a program where the seeds enter.

    Args:
        program: placeholders named `seed_*` are the seeds; the first `outputs` results do not
            depend on them.
        outputs: how many results belong to the forward side.

    Returns:
        forward: attributes and inputs → outputs and saved values;
        relevance: attributes, inputs, saved values and seeds → relevance and sums. Placeholders
        that a side does not use are left out; `node.meta["name"]` says what each one is.
    """
    graph = program.graph
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    needed = _closure(result for result in results[:outputs] if isinstance(result, fx.Node))
    needed |= {n for n in graph.nodes if n.target is operator.getitem and n.args[0] in needed}
    wanted = _closure(result for result in results[outputs:] if isinstance(result, fx.Node))
    placeholders = set(graph.find_nodes(op="placeholder"))
    saved: list[fx.Node] = []
    inside: set[fx.Node] = set()
    stack = [result for result in results[outputs:] if isinstance(result, fx.Node)]
    while stack:
        node = stack.pop()
        if node in inside or node in placeholders or node in saved:
            continue
        if node in needed and not _is_free(node):
            saved.append(node)
            continue
        inside.add(node)
        stack.extend(node.all_input_nodes)
    order = {node: i for i, node in enumerate(graph.nodes)}
    saved.sort(key=order.__getitem__)
    forward = _extract(program, needed, [], [*results[:outputs], *saved])
    relevance = _extract(program, inside | (wanted & placeholders), saved, results[outputs:])
    return forward, relevance


def _closure(nodes: Iterator[fx.Node]) -> set[fx.Node]:
    """The nodes and everything they are computed from."""
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _is_free(node: fx.Node) -> bool:
    """Whether making a value again costs nothing: sizes, views."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return not isinstance(value, list | tuple)
    if is_op(node, "_to_copy", "clone"):
        return False
    return is_structural(node) and node.target is not operator.getitem


def _extract(
    program: fx.GraphModule, inside: set[fx.Node], saved: Sequence[fx.Node], results: Sequence[Any]
) -> fx.GraphModule:
    """A graph of some of a program's nodes, with saved values as further inputs."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node in inside:
            values[node] = graph.node_copy(node)
    for node in saved:
        values[node] = graph.placeholder(f"saved_{node.name}")
        values[node].meta = {"val": node.meta["val"], "name": f"saved:{node.name}"}
    for node in program.graph.nodes:
        if node in inside and node.op not in ("placeholder", "output"):
            values[node] = graph.node_copy(node, values.__getitem__)
    graph.output(fx.node.map_arg(list(results), values.__getitem__))
    return fx.GraphModule(program, graph)
