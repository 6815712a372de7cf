"""Programs: what an explainer runs, traced and compiled when it is first asked for.

There is one for each device and each set of outputs that targets read: a schedule of the rewritten
graph's regions, whose programs a backend has compiled.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils.checkpoint import checkpoint

from attnlrp_fx.calculus.tape import Channel
from attnlrp_fx.capture.autocast import without_autocast
from attnlrp_fx.capture.capture import Captured
from attnlrp_fx.codegen.attributes import Attributes, Derived
from attnlrp_fx.codegen.backends import Backend, Runnable, compile_differentiable, compile_graphs
from attnlrp_fx.codegen.emit import EmitOptions, Port, emit
from attnlrp_fx.codegen.heads import head_of
from attnlrp_fx.codegen.memory import Memory, MemoryPlan, planned
from attnlrp_fx.codegen.partition import Keeping
from attnlrp_fx.codegen.regions import regions_of
from attnlrp_fx.codegen.repeats import Reverse
from attnlrp_fx.codegen.report import Compilation
from attnlrp_fx.codegen.schedule import Derivation, Schedule, Step, Values, schedule
from attnlrp_fx.codegen.sizes import UnreadableSize
from attnlrp_fx.codegen.unpadded import Unpadded, unpadded
from attnlrp_fx.graph.operators import outputs_of, placeholders_of
from attnlrp_fx.passes.mark_latents import markers_of
from attnlrp_fx.passes.return_latents import RETURNED
from attnlrp_fx.torch_private import TRACING, typical_size, written

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
    differentiable: bool = False
    """Whether autograd goes through the programs, to parameters and inputs."""
    regions: bool = True
    """Whether repeated blocks are compiled once; otherwise everything is one program."""
    on_stage: Stage | None = None
    """Told what is being done, for progress displays."""
    weights: bool = False
    """Whether programs return the relevance of parameters."""


@dataclass(frozen=True)
class Compiled:
    """A schedule whose programs can be run."""

    schedule: Schedule
    runnables: Mapping[fx.GraphModule, Runnable]
    derived: tuple[tuple[Derived, Mapping[str, int]], ...]
    """What regions keep of values made of parameters alone, and the slots where they go."""
    reverse: Reverse
    """Runs the relevance side."""
    checkpointed: bool = False
    """Whether autograd keeps a step's arguments alone, and runs it again."""

    def start(self, attributes: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Values:
        """Slots that hold all that is given."""
        values = self.schedule.start(attributes, inputs)
        for derived, slots in self.derived:
            for name, value in derived.values(attributes).items():
                values[slots[name]] = value
        return values

    def run(self, step: Step, arguments: Sequence[Any], values: Values) -> Sequence[Any]:
        """One step."""
        runnable = self.runnables[step.graph_module]
        if self.checkpointed and torch.is_grad_enabled():
            runnable = partial(
                checkpoint,
                runnable,
                use_reentrant=False,
                preserve_rng_state=False,
                early_stop=False,  # By an exception, which Dynamo traces as it leaves its code.
            )
        results: Sequence[Any] = runnable(*arguments)
        return results


class Served(NamedTuple):
    """What a program serves."""

    seeded: tuple[int, ...]
    """The flat outputs that are explained."""
    device: torch.device
    unpadded: bool = False
    """Whether only inputs without padding, see `attnlrp_fx.codegen.unpadded`."""


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
        self.compiled: dict[Served, Compiled] = {}
        self._flat: dict[torch.device, fx.GraphModule] = {}

    def serving(
        self,
        seeded: tuple[int, ...],
        device: torch.device,
        given: Mapping[str, Tensor],
        attributes: Mapping[str, Tensor],
    ) -> Compiled:
        """The program for some explained outputs and inputs, compiled if it is not there yet.

        As long as no input had padding there is none that could serve one with; and where there
        is one that serves all, none is compiled for those without.
        """
        for_all, for_some = Served(seeded, device), Served(seeded, device, unpadded=True)
        if for_some in self.compiled or for_all not in self.compiled:
            without = self._unpadded
            if without is not None and without.serves(given, attributes):
                return self._made(for_some)
        return self._made(for_all)

    def example(self, seeded: tuple[int, ...], device: torch.device) -> Compiled:
        """The program that serves the example, compiled if it is not there yet."""
        for_all, for_some = Served(seeded, device), Served(seeded, device, unpadded=True)
        if for_some in self.compiled or (for_all not in self.compiled and self._unpadded):
            return self._made(for_some)
        return self._made(for_all)

    def _made(self, served: Served) -> Compiled:
        if served not in self.compiled:
            with TRACING, without_autocast():
                if served not in self.compiled:  # by another thread, meanwhile
                    self.compiled[served] = self._compile(served)
        return self.compiled[served]

    def flat(self, seeded: tuple[int, ...], device: torch.device) -> fx.GraphModule:
        """The program as one graph, traced if it is not there yet."""
        if device not in self._flat:
            outputs = outputs_of(self._rewritten.graph)
            seeds = [_seed_port(i, outputs[i]) for i in seeded]
            values, options = self._attributes.values(), self._emit_options(device)
            with TRACING, without_autocast():
                program = emit(self._rewritten, seeds, values, options)
                self._flat[device] = written(program.graph_module)
        return self._flat[device]

    def planned(self, served: Served) -> tuple[Schedule, MemoryPlan | None]:
        """A schedule, traced and not compiled, that keeps as much as the options ask for."""
        made, memory = self._schedule(served), self._options.memory
        return planned(made, memory, self._example(), self.keeping())

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

    @cached_property
    def _unpadded(self) -> Unpadded | None:
        """The graph for inputs without padding; None if the example has some."""
        device = self._attributes.device()
        example = {name: value.to(device) for name, value in self._example().items()}
        return unpadded(self._rewritten, example, self._attributes.values(device))

    def _graph(self, served: Served) -> fx.GraphModule:
        if not served.unpadded:
            return self._rewritten
        assert self._unpadded is not None
        return self._unpadded.rewritten

    def _rows(self) -> Any:
        """How many rows a batch has: the first dimension of the first input."""
        first = next(iter(self._placeholders().values())).meta["val"]
        return first.shape[0] if first.dim() else None

    def _compile(self, served: Served) -> Compiled:
        stage = self._options.on_stage or (lambda text: None)
        stage("tracing the program")
        start = time.perf_counter()
        made, plan = self.planned(served)
        backend = "eager" if served.device.type == "meta" else self._options.backend
        traced = time.perf_counter()
        stage("compiling the program")
        steps = (*made.forward, *made.relevance)
        derived_too = [kept.program.derived for kept in made.derived if kept.program.derived]
        halves = dict.fromkeys([*(step.graph_module for step in steps), *derived_too])
        refused: tuple[str, ...] = ()
        if self._options.differentiable:
            runnables: Mapping[fx.GraphModule, Runnable] = {
                half: compile_differentiable(half, backend) for half in halves
            }
        else:
            runnables, refused = compile_graphs(halves, backend, served.device)
        derived = tuple(
            (Derived(*_inputs_and_values(kept), runnables[kept.program.derived]), kept.slots)
            for kept in made.derived
            if kept.program.derived
        )
        sizes = [kept.program.derived_values.values() for kept in made.derived]
        self._compilations.append(
            Compilation(
                device=str(served.device),
                seeded=tuple(map(self._name, served.seeded)),
                unpadded=served.unpadded,
                nodes=sum(len(program.graph_module.graph.nodes) for program in made.distinct),
                regions=len(made.programs),
                distinct=len(made.distinct),
                emit_seconds=traced - start,
                backend_seconds=time.perf_counter() - traced,
                refused=refused,
                derived_bytes=sum(int(v.nbytes) for values in sizes for v in values),
                memory=plan,
            )
        )
        is_small = self._options.differentiable and self._options.memory == "small"
        return Compiled(made, runnables, derived, Reverse(made), checkpointed=is_small)

    def _name(self, output: int) -> str:
        """The name of a flat output, or of the latent value that it is."""
        names = dict(enumerate(self._convention.output_names))
        for name, marker in markers_of(self._rewritten.graph).items():
            names[marker.meta[RETURNED][0]] = name
        return names[output]

    def _schedule(self, served: Served) -> Schedule:
        """Trace the programs for what is served."""
        attributes, graph = self._attributes.values(), self._graph(served)
        outputs = outputs_of(graph.graph)
        entries = {i: self._entry(outputs[i]) for i in served.seeded}
        cut, inside = self._options.regions, list(entries.values())
        options = self._emit_options(served.device)
        try:
            regions = regions_of(graph, attributes, inside, cut)
            return schedule(graph, regions, entries, attributes, options)
        except UnreadableSize:  # One region has the model's inputs, of which all sizes are made.
            regions = regions_of(graph, attributes, inside, cut=False)
            return schedule(graph, regions, entries, attributes, options)

    def _example(self) -> dict[str, Tensor]:
        """The example as it was given, with what else the program takes."""
        given, sizes = dict(self._convention.given), self.keeping().sizes
        for name, node in self._placeholders().items():
            like = node.meta["val"]
            shape = [int(typical_size(size, 1, sizes)) for size in like.shape]
            given.setdefault(name, torch.zeros(shape, dtype=like.dtype))
        return given

    def _entry(self, output: fx.Node) -> fx.Node:
        """Where a seed enters: the weights want the head's part, too."""
        head = None if self._options.weights else head_of(output)
        return output if head is None else head.projected

    def _emit_options(self, device: torch.device) -> EmitOptions:
        return EmitOptions(
            device=device,
            captured_device=self.captured_device,
            audit=self._options.audit,
            keeping=self.keeping(),
            weighed=self._attributes.parameters() if self._options.weights else frozenset(),
            rows=self._rows() if self._options.weights else None,
            keep_derived=self._options.derived_weights == "keep",
            differentiable=self._options.differentiable,
        )


def _seed_port(output: int, node: fx.Node) -> Port:
    return Port(output, Channel.COEFFICIENT, node.meta["val"].dtype)


def _inputs_and_values(kept: Derivation) -> tuple[list[str], list[str]]:
    """The parameters that derived values are made of, by the model's names, and the values."""
    assert kept.program.derived is not None
    inputs = placeholders_of(kept.program.derived)
    return [kept.names[node.meta["name"]] for node in inputs], list(kept.program.derived_values)
