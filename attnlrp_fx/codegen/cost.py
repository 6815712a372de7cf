"""What an explanation takes, in operations and memory, without computing it.

Every program runs on fake tensors, which have sizes and no values, at the sizes asked
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
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from attnlrp_fx.codegen.flops import FORMULAS
from attnlrp_fx.codegen.schedule import Schedule, Step, Values
from attnlrp_fx.graph.operators import packet, placeholders_of
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


def schedule_cost(schedule: Schedule, inputs: Mapping[str, Tensor]) -> Cost:
    """What a schedule takes for inputs of these sizes.

    Args:
        schedule: traced programs.
        inputs: tensors by the model's input names; only their sizes and dtypes are read.
    """
    mode = new_fake_mode()
    with mode, torch.no_grad():
        given = {
            name: torch.empty(value.shape, dtype=value.dtype, device=schedule.device)
            for name, value in inputs.items()
        }
        parameters = _parameters(schedule)
        values = schedule.start(parameters, given)
        derived = _fill_derived(schedule, parameters, values)
        own = _sizes([*given.values(), *parameters.values(), *derived])
        forward = _Meter(own)
        flat = schedule.run_forward(values, forward)
        kept = _sizes(value for value in values if isinstance(value, Tensor))
        seeds = [seed_like(flat[i], node) for i, node in schedule.seeded.items()]
        relevance = _Meter(own, held=_sizes(flat))
        schedule.run_relevance(values, seeds, relevance)
    return Cost(
        forward_flops=forward.flops,
        relevance_flops=relevance.flops,
        parameters=sum(_sizes(parameters.values()).values()),
        derived=sum(_sizes(derived).values()),
        saved=_beside(kept, own | _sizes(flat)),
        forward_peak=forward.peak,
        relevance_peak=relevance.peak,
    )


def seed_like(output: Tensor, node: fx.Node) -> Tensor:
    """A tensor of the size of a seed that enters at an output, or at what its head projects."""
    wanted = node.meta["val"]
    last = wanted.shape[-1:] if wanted.dim() > 1 else output.shape[-1:]
    sizes = (
        *output.shape[:-1],
        *(int(n) if is_concrete_int(n) else output.shape[-1] for n in last),
    )
    return output.new_empty(sizes, dtype=wanted.dtype)


def _parameters(schedule: Schedule) -> dict[str, Tensor]:
    """A tensor of the size of each of the model's."""
    slots = {slot: name for name, slot in schedule.attributes.items()}
    found: dict[str, Tensor] = {}
    for step in (*schedule.forward, *schedule.relevance):
        for slot, node in zip(step.arguments, placeholders_of(step.graph_module), strict=True):
            if slot in slots and slots[slot] not in found:
                found[slots[slot]] = _like(node.meta["val"], schedule.device)
    for keeping in schedule.derived:
        assert keeping.program.derived is not None
        for node in placeholders_of(keeping.program.derived):
            name = keeping.names[node.meta["name"]]
            found.setdefault(name, _like(node.meta["val"], schedule.device))
    return found


def _fill_derived(
    schedule: Schedule, parameters: Mapping[str, Tensor], values: Values
) -> list[Tensor]:
    """Put the values made of parameters alone into their slots."""
    made: list[Tensor] = []
    for keeping in schedule.derived:
        assert keeping.program.derived is not None
        names = [node.meta["name"] for node in placeholders_of(keeping.program.derived)]
        found = keeping.program.derived(*[parameters[keeping.names[name]] for name in names])
        made += found
        for slot, value in zip(keeping.slots.values(), found, strict=True):
            values[slot] = value
    return made


class _Meter:
    """Runs steps, adding up operations, and the most that values take at a time.

    Args:
        given: the storages of what the program is given, which do not count.
        held: those of what is held beside the slots.
    """

    def __init__(self, given: Mapping[int, int], held: Mapping[int, int] | None = None) -> None:
        self.given, self.held = given, held or {}
        self.flops = self.peak = 0

    def __call__(self, step: Step, arguments: Sequence[Any], values: Values) -> list[Any]:
        recorder = _Recorder(step.graph_module)
        targets = (node.target for node in step.graph_module.graph.nodes)
        formulas = {t.overloadpacket: FORMULAS[packet(t)] for t in targets if packet(t) in FORMULAS}
        with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
            results = list(recorder.run(*arguments))
        self.flops += counter.get_total_flops()
        live = {**_sizes(values), **self.held}
        own = _peak(recorder.values, {**self.given, **live})
        self.peak = max(self.peak, own + _beside(live, self.given))
        return results


class _Recorder(fx.Interpreter):
    """Runs a graph and notes the values of its nodes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = value = super().run_node(n)
        return value


def _peak(values: Mapping[fx.Node, Any], given: Mapping[int, int]) -> int:
    """The most that the values of a graph's nodes, in order, take at a time beside others."""
    order = {node: i for i, node in enumerate(values)}
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
    for storage in size.keys() - given.keys():
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
