"""Programs: what an explainer runs, traced and compiled when it is first asked for.

There is one for each device and each set of outputs that targets read: a schedule of the rewritten
graph's regions, whose programs a backend has compiled.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from attnlrp_fx.calculus.tape import Channel
from attnlrp_fx.capture.capture import Captured
from attnlrp_fx.codegen.attributes import Attributes, Derived
from attnlrp_fx.codegen.backends import Backend, Runnable, compile_graph
from attnlrp_fx.codegen.emit import EmitOptions, Port, emit
from attnlrp_fx.codegen.heads import head_of
from attnlrp_fx.codegen.memory import Memory, MemoryPlan, planned
from attnlrp_fx.codegen.partition import Keeping
from attnlrp_fx.codegen.regions import regions_of
from attnlrp_fx.codegen.report import Compilation
from attnlrp_fx.codegen.schedule import Derivation, Schedule, Step, Values, schedule
from attnlrp_fx.graph.operators import outputs_of, placeholders_of
from attnlrp_fx.passes.slice_targets import POSITIONS

Stage = Callable[[str], None]


@dataclass(frozen=True)
class ProgramOptions:
    """How programs are traced and compiled."""

    backend: str | Backend = "inductor"
    audit: bool = False
    """Whether programs return the ledger."""
    derived_weights: str = "recompute"
    """What becomes of values made of parameters alone: "recompute" or "keep"."""
    memory: Memory = "fast"
    """How much of the forward side is kept for the relevance side."""
    regions: bool = True
    """Whether repeated blocks are compiled once; otherwise everything is one program."""
    on_stage: Stage | None = None
    """Told what is being done, for progress displays."""


@dataclass(frozen=True)
class Compiled:
    """A schedule whose programs can be run."""

    schedule: Schedule
    runnables: Mapping[fx.GraphModule, Runnable]
    derived: tuple[tuple[Derived, Mapping[str, int]], ...]
    """What regions keep of values made of parameters alone, and the slots where they go."""

    def start(self, attributes: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Values:
        """Slots that hold all that is given."""
        values = self.schedule.start(attributes, inputs)
        for derived, slots in self.derived:
            for name, value in derived.values(attributes).items():
                values[slots[name]] = value
        return values

    def run(self, step: Step, arguments: Sequence[Any], values: Values) -> Sequence[Any]:
        """One step."""
        results: Sequence[Any] = self.runnables[step.graph_module](*arguments)
        return results


class Programs:
    """The programs of a rewritten graph.

    Args:
        rewritten: the rewritten graph.
        convention: the captured graph that it was made of.
        attributes: the model's tensors.
        options: how programs are made.
        compilations: where each one made is reported.
    """

    def __init__(
        self,
        rewritten: fx.GraphModule,
        convention: Captured,
        attributes: Attributes,
        options: ProgramOptions,
        compilations: list[Compilation],
    ) -> None:
        self._rewritten = rewritten
        self._convention = convention
        self._attributes = attributes
        self._options = options
        self._compilations = compilations
        self.captured_device = attributes.device()
        self.compiled: dict[tuple[tuple[int, ...], torch.device], Compiled] = {}
        """By the flat outputs that are explained, and the device."""
        self._flat: dict[torch.device, fx.GraphModule] = {}

    def compile(self, seeded: tuple[int, ...], device: torch.device) -> Compiled:
        """The program for some explained outputs on a device, compiled if it is not there yet."""
        if (seeded, device) not in self.compiled:
            self.compiled[seeded, device] = self._compile(seeded, device)
        return self.compiled[seeded, device]

    def flat(self, seeded: tuple[int, ...], device: torch.device) -> fx.GraphModule:
        """The program as one graph, traced if it is not there yet."""
        if device not in self._flat:
            outputs = outputs_of(self._rewritten.graph)
            seeds = [_seed_port(i, outputs[i]) for i in seeded]
            values, options = self._attributes.values(), self._emit_options(device)
            self._flat[device] = emit(self._rewritten, seeds, values, options).graph_module
        return self._flat[device]

    def planned(
        self, seeded: tuple[int, ...], device: torch.device
    ) -> tuple[Schedule, MemoryPlan | None]:
        """A schedule, traced and not compiled, that keeps as much as the options ask for."""
        made, memory = self._schedule(seeded, device), self._options.memory
        return planned(made, memory, self._example_of_budget(), self.keeping())

    def keeping(self) -> Keeping:
        """Run op by op, an elementwise op done twice costs as much again."""
        sizes = {
            str(expected): size
            for name, node in self._placeholders().items()
            if name in self._convention.given
            for expected, size in zip(
                node.meta["val"].shape, self._convention.given[name].shape, strict=True
            )
            if not is_concrete_int(expected)
        }
        return Keeping(elementwise=self._options.backend != "eager", sizes=sizes)

    def forget_derived(self) -> None:
        """Compute kept derived weights anew at the next call."""
        for compiled in self.compiled.values():
            for derived, _ in compiled.derived:
                derived.forget()

    def _placeholders(self) -> dict[str, fx.Node]:
        return {str(node.target): node for node in placeholders_of(self._rewritten)}

    def _compile(self, seeded: tuple[int, ...], device: torch.device) -> Compiled:
        stage = self._options.on_stage or (lambda text: None)
        stage("tracing the program")
        start = time.perf_counter()
        made, plan = self.planned(seeded, device)
        backend = "eager" if device.type == "meta" else self._options.backend
        traced = time.perf_counter()
        stage("compiling the program")
        halves = [step.graph_module for step in (*made.forward, *made.relevance)]
        halves += [kept.program.derived for kept in made.derived if kept.program.derived]
        runnables = {half: compile_graph(half, backend) for half in dict.fromkeys(halves)}
        derived = tuple(
            (Derived(*_inputs_and_values(kept), runnables[kept.program.derived]), kept.slots)
            for kept in made.derived
            if kept.program.derived
        )
        sizes = [kept.program.derived_values.values() for kept in made.derived]
        self._compilations.append(
            Compilation(
                device=str(device),
                seeded=tuple(self._convention.output_names[i] for i in seeded),
                nodes=sum(len(program.graph_module.graph.nodes) for program in made.distinct),
                regions=len(made.programs),
                distinct=len(made.distinct),
                emit_seconds=traced - start,
                backend_seconds=time.perf_counter() - traced,
                derived_bytes=sum(int(v.nbytes) for values in sizes for v in values),
                memory=plan,
            )
        )
        return Compiled(made, runnables, derived)

    def _schedule(self, seeded: tuple[int, ...], device: torch.device) -> Schedule:
        """Trace the programs for some seeds on a device."""
        attributes = self._attributes.values()
        outputs = outputs_of(self._rewritten.graph)
        entries = {i: self._entry(outputs[i]) for i in seeded}
        cut, inside = self._options.regions, list(entries.values())
        regions = regions_of(self._rewritten, attributes, inside, cut)
        return schedule(self._rewritten, regions, entries, attributes, self._emit_options(device))

    def _example_of_budget(self) -> dict[str, Tensor]:
        """The example as it was given, with positions if the program takes some."""
        given = dict(self._convention.given)
        if POSITIONS in self._placeholders():
            first = next(iter(given.values()))
            given[POSITIONS] = first.new_zeros(len(first), dtype=torch.int64)
        return given

    def _entry(self, output: fx.Node) -> fx.Node:
        """Where a seed enters."""
        head = head_of(output)
        return output if head is None else head.projected

    def _emit_options(self, device: torch.device) -> EmitOptions:
        return EmitOptions(
            device=device,
            captured_device=self.captured_device,
            audit=self._options.audit,
            keeping=self.keeping(),
            keep_derived=self._options.derived_weights == "keep",
        )


def _seed_port(output: int, node: fx.Node) -> Port:
    return Port(output, Channel.COEFFICIENT, node.meta["val"].dtype)


def _inputs_and_values(kept: Derivation) -> tuple[list[str], list[str]]:
    """The parameters that derived values are made of, by the model's names, and the values."""
    assert kept.program.derived is not None
    inputs = placeholders_of(kept.program.derived)
    return [kept.names[node.meta["name"]] for node in inputs], list(kept.program.derived_values)
