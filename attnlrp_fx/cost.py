"""What an explanation takes, in operations and memory, without computing it.

Both halves of a program run on fake tensors, which have sizes and no values, at the sizes asked
for. Operations are counted as PyTorch's own counter does: two for each multiplication and addition
of a matrix product, a convolution or an attention, none for anything elementwise. A value takes
memory from the op that makes it to its last use, and a view is one value with what it views; the
peak is where the sum is largest.

That is the program as it stands, run op by op. It leaves out what a kernel allocates for itself and
what an allocator rounds up, and a backend that fuses ops needs less.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from attnlrp_fx.codegen import Program
from attnlrp_fx.operators import aten, packet
from attnlrp_fx.torch_private import new_fake_mode, storage_of


@dataclass(frozen=True)
class Cost:
    """What one explanation takes, by side; sizes in bytes."""

    forward_flops: int
    relevance_flops: int
    parameters: int
    """All parameters, buffers and constants that the program reads."""
    saved: int
    """What the forward side keeps for the relevance side, beside the outputs."""
    forward_peak: int
    """The most that intermediates, outputs and saved values take at a time on the forward side."""
    relevance_peak: int
    """The same on the relevance side, with all that the forward side left and the seeds."""
    derived: int = 0
    """Values made of parameters alone that are kept from call to call, if they are."""

    @property
    def flops(self) -> int:
        """Floating-point operations of both sides."""
        return self.forward_flops + self.relevance_flops

    @property
    def peak(self) -> int:
        """The most that parameters and intermediates take at a time."""
        return self.parameters + self.derived + max(self.forward_peak, self.relevance_peak)


def program_cost(program: Program, inputs: Mapping[str, Tensor]) -> Cost:
    """What a program takes for inputs of these sizes.

    Args:
        program: a traced program.
        inputs: tensors by the program's input names; only their sizes and dtypes are read.
    """
    mode = new_fake_mode()
    with mode, torch.no_grad():
        values = {
            name: torch.empty(value.shape, dtype=value.dtype, device=program.device)
            for name, value in inputs.items()
        }
        parts = [part for part in (program.derived, program.forward, program.relevance) if part]
        values |= {
            str(node.meta["name"]): _like(node.meta["val"], program.device)
            for part in parts
            for node in part.graph.find_nodes(op="placeholder")
            if node.meta["name"] in program.attributes
        }
        parameters = [values[name] for name in program.attributes if name in values]
        derived = [] if program.derived is None else _run(program.derived, values).results
        values |= dict(zip(program.derived_values, derived, strict=True))
        forward = _run(program.forward, values)
        outputs, kept = forward.results[: program.outputs], forward.results[program.outputs :]
        seeds = {f"seed_{i}": torch.empty_like(outputs[i]) for i in program.seeded}
        saved = (n for n in _names(program.relevance) if n.startswith("saved:"))
        relevance = _run(
            program.relevance, {**values, **seeds, **dict(zip(saved, kept, strict=True))}
        )
    given, left = _sizes(values.values()), _sizes([*forward.results, *seeds.values()])
    return Cost(
        forward_flops=forward.flops,
        relevance_flops=relevance.flops,
        parameters=sum(_sizes(parameters).values()),
        derived=sum(_sizes(derived).values()),
        saved=_beside(_sizes(kept), given | _sizes(outputs)),
        forward_peak=forward.peak,
        relevance_peak=relevance.peak + _beside(left, given),
    )


@dataclass(frozen=True)
class _Run:
    """What one half of a program takes, beside its inputs."""

    flops: int
    peak: int
    results: list[Any]


class _Recorder(fx.Interpreter):
    """Runs a graph and notes the values of its nodes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = value = super().run_node(n)
        return value


def _run(graph_module: fx.GraphModule, values: Mapping[str, Any]) -> _Run:
    recorder = _Recorder(graph_module)
    inputs = [values[name] for name in _names(graph_module)]
    targets = (node.target for node in graph_module.graph.nodes)
    formulas = {t.overloadpacket: FORMULAS[packet(t)] for t in targets if packet(t) in FORMULAS}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        results = recorder.run(*inputs)
    return _Run(counter.get_total_flops(), _peak(recorder.values, inputs), list(results))


def _peak(values: Mapping[fx.Node, Any], inputs: Sequence[Any]) -> int:
    """The most that the values of a graph's nodes, in order, take at a time beside the inputs."""
    order = {node: i for i, node in enumerate(values)}
    given = _sizes(inputs).keys()
    size: dict[int, int] = {}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for node, value in values.items():
        until = max((order[user] for user in node.users), default=order[node])
        for storage, count in _sizes([value]).items():
            size[storage] = count
            first.setdefault(storage, order[node])
            last[storage] = max(until, last.get(storage, 0))
    change = [0] * (len(order) + 1)
    for storage in size.keys() - given:
        change[first[storage]] += size[storage]
        change[last[storage] + 1] -= size[storage]
    live = peak = 0
    for step in change:
        live += step
        peak = max(peak, live)
    return peak


def _sizes(values: Iterable[Any]) -> dict[int, int]:
    """The bytes of each storage that tensors lie in; those of one storage share it."""
    tensors = (leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor))
    return {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}


def _beside(sizes: Mapping[int, int], others: Mapping[int, int]) -> int:
    """The bytes of all storages that are none of the others."""
    return sum(count for storage, count in sizes.items() if storage not in others)


def _like(value: Tensor, device: torch.device) -> Tensor:
    sizes, strides = [[int(n) for n in numbers] for numbers in (value.shape, value.stride())]
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=device)


def _names(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.meta["name"]) for node in graph_module.graph.find_nodes(op="placeholder")]


def _grouped_flops(x: Any, weight: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Each row of (S, in) times one of the matrices (E, in, out)."""
    return 2 * int(x[0]) * int(weight[-2]) * int(weight[-1])


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]


def _attention_backward_flops(
    c: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(c, query, key, value))  # type: ignore[no-untyped-call]


FORMULAS: dict[Any, Any] = {
    aten._grouped_mm: _grouped_flops,
    "transformers::grouped_mm_fallback": _grouped_flops,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
"""The operations of ops that PyTorch's counter does not know, from their arguments' shapes."""
