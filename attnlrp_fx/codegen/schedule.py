"""Schedule: the programs of a graph's regions, in the order in which they run.

Regions of one signature that receive the same share one program. Values that they exchange lie in
numbered slots: the model's tensors, its inputs, what regions hand on, what their forward sides save
for their relevance sides, what values have received in reverse. Everything about slots is settled
here, once; at run time a step takes its arguments from slots, calls, and puts its results there.
A slot is emptied after the step that reads it last.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx.calculus.postings import Account
from attnlrp_fx.calculus.tape import Channel
from attnlrp_fx.calculus.weights import Weight
from attnlrp_fx.codegen.emit import EmitOptions, Port, Program, emit
from attnlrp_fx.codegen.partition import SEED, Keeping
from attnlrp_fx.codegen.regions import Region
from attnlrp_fx.graph.operators import outputs_of, placeholders_of

Values = list[Any]
"""What the slots hold."""


@dataclass(frozen=True)
class Step:
    """One call of one side of a region's program."""

    graph_module: fx.GraphModule
    arguments: tuple[int, ...]
    """The slots that it reads, in its placeholders' order."""
    results: tuple[int, ...]
    """The slots for its results."""
    audited: tuple[tuple[str, Account], ...] = ()
    """The postings of nodes of the rewritten graph that are one result more."""
    latent: tuple[str, ...] = ()
    """The markers in it whose latent value's relevance are further results, before the postings."""
    emptied: tuple[int, ...] = ()
    """The slots that no later step reads."""


Call = Callable[[Step, Sequence[Any], Values], Sequence[Any]]
"""Runs a step on its arguments, told what all slots hold."""


@dataclass(frozen=True)
class Read:
    """What the reverse pass reads."""

    relevance: dict[str, Tensor]
    """By explained input."""
    audited: Sequence[tuple[str, Account]] = ()
    """The postings of nodes of the rewritten graph; none unless audited."""
    sums: Sequence[Tensor] = ()
    """What they amount to, in order, on the device where they were added up."""
    weights: dict[str, Weight] = field(default_factory=dict)
    """By parameter, empty unless asked for."""
    latent: dict[str, Tensor] = field(default_factory=dict)
    """By marker in the rewritten graph: relevance of the latent values that it reaches."""

    @property
    def postings(self) -> dict[tuple[str, Account], float]:
        """By node of the rewritten graph what it posted."""
        sums = torch.cat(list(self.sums)).tolist() if self.sums else []
        return dict(zip(self.audited, sums, strict=True))


@dataclass(frozen=True)
class Derivation:
    """What one region keeps of values made of parameters alone."""

    program: Program
    names: Mapping[str, str]
    """The region's tensors, by what the program calls them."""
    slots: Mapping[str, int]
    """Where the values go."""


@dataclass(frozen=True)
class Schedule:
    """The programs of a graph's regions, and who hands what to whom."""

    rewritten: fx.GraphModule
    regions: tuple[Region, ...]
    """The rewritten graph, cut in pieces, in order."""
    programs: tuple[Program, ...]
    """For each region its program; regions that are alike share one."""
    seeded: Mapping[int, fx.Node]
    """Which flat outputs are explained, and for each the node at which its seed enters."""
    device: torch.device
    forward: tuple[Step, ...]
    relevance: tuple[Step, ...]
    attributes: Mapping[str, int]
    """The slots of the model's tensors."""
    inputs: Mapping[str, int]
    """The slots of the model's inputs."""
    derived: tuple[Derivation, ...]
    outputs: tuple[tuple[int | None, Any], ...]
    """For each flat output its slot, or None and the constant that it is."""
    seeds: tuple[int, ...]
    """For each of them the slot where its seed enters."""
    explained: Mapping[str, int]
    """The slots of the explained inputs' relevance."""
    weighed: Mapping[str, tuple[int, int]]
    """The slots of parameters' relevance, and of its magnitudes."""
    slots: int
    """How many there are."""

    @property
    def distinct(self) -> tuple[Program, ...]:
        """Each program once."""
        return tuple({id(program): program for program in self.programs}.values())

    def keeping(self, keeping: Keeping) -> "Schedule":
        """The same, with as much kept of the forward side as asked for."""
        cut = {id(program): program.keeping(keeping) for program in self.distinct}
        programs = [cut[id(program)] for program in self.programs]
        return _arranged(self.rewritten, self.regions, programs, self.seeded, self.device)

    def start(self, attributes: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Values:
        """Slots that hold the model's tensors and its inputs."""
        values: Values = [None] * self.slots
        for name, slot in self.attributes.items():
            values[slot] = attributes[name]
        for name, slot in self.inputs.items():
            values[slot] = inputs[name]
        return values

    def run_forward(self, values: Values, call: Call) -> list[Any]:
        """Compute the flat outputs, and leave in the slots what the relevance side reads."""
        wanted = {slot for slot, _ in self.outputs if slot is not None}
        found = {slot: values[slot] for slot in wanted}
        for step in self.forward:
            results = call(step, [values[slot] for slot in step.arguments], values)
            for slot, result in zip(step.results, results, strict=True):
                values[slot] = result
                if slot in wanted:
                    found[slot] = result
            for slot in step.emptied:
                values[slot] = None
        return [constant if slot is None else found[slot] for slot, constant in self.outputs]

    def run_relevance(self, values: Values, seeds: Sequence[Tensor], call: Call) -> Read:
        """Take seeds, one for each explained output, back to the inputs.

        Values that several regions read receive from each: results add up.
        """
        for slot, seed in zip(self.seeds, seeds, strict=True):
            _add(values, slot, seed)
        audited: list[tuple[str, Account]] = []
        postings: list[Tensor] = []
        latent: dict[str, Tensor] = {}
        for step in self.relevance:
            results = call(step, [values[slot] for slot in step.arguments], values)
            if step.audited:
                audited += step.audited
                postings.append(results[-1])
            latent.update(zip(step.latent, results[len(step.results) :], strict=False))
            for slot, result in zip(step.results, results, strict=False):
                _add(values, slot, result)
            for slot in step.emptied:
                values[slot] = None
        relevance = {name: values[slot] for name, slot in self.explained.items()}
        weights = {n: Weight(values[a], values[b]) for n, (a, b) in self.weighed.items()}
        return Read(relevance, audited, postings, weights, latent)


def _add(values: Values, slot: int, value: Tensor) -> None:
    held = values[slot]
    values[slot] = value if held is None else held + value


def schedule(
    rewritten: fx.GraphModule,
    regions: Sequence[Region],
    seeded: Mapping[int, fx.Node],
    attributes: Mapping[str, Tensor],
    options: EmitOptions,
) -> Schedule:
    """Trace the programs of a rewritten graph's regions and settle what they exchange.

    Args:
        rewritten: the rewritten graph.
        regions: it, cut in pieces, in order.
        seeded: positions of the flat outputs that are explained, and for each the node at which
            its seed enters: the output itself, or what its head projects.
        attributes: the graph's tensors by name; only their sizes, strides and dtypes are read.
        options: how programs are traced.

    Raises:
        RuleError: an op cannot be traced, or writes in place.
    """
    programs = _emit_all(regions, list(seeded.values()), attributes, options)
    return _arranged(rewritten, regions, programs, seeded, options.device)


def _arranged(
    rewritten: fx.GraphModule,
    regions: Sequence[Region],
    programs: Sequence[Program],
    seeded: Mapping[int, fx.Node],
    device: torch.device,
) -> Schedule:
    """The order of the programs, and the slots of what they exchange."""
    outputs = outputs_of(rewritten.graph)
    slots = _Slots()
    pairs = zip(regions, programs, strict=True)
    places = [_Place(i, region, program, slots) for i, (region, program) in enumerate(pairs)]
    forward = [place.forward() for place in places]
    used = [p for p in reversed(places) if p.returns]
    relevance = [place.relevance() for place in used]
    placeholders = placeholders_of(rewritten)
    explained = slots.known(Channel.MOVED, placeholders)
    weighed = {
        key[1]: (slot, slots.of("magnitude", key[1]))
        for key, slot in slots.numbers.items()
        if key[0] == "weight"
    }
    kept = [*explained.values(), *(slot for pair in weighed.values() for slot in pair)]
    steps = _emptying([*forward, *relevance], slots, kept)
    return Schedule(
        rewritten=rewritten,
        regions=tuple(regions),
        programs=tuple(programs),
        seeded=dict(seeded),
        device=device,
        forward=tuple(steps[: len(forward)]),
        relevance=tuple(steps[len(forward) :]),
        derived=tuple(p.derivation() for p in places if p.program.derived is not None),
        outputs=tuple(_output(output, slots) for output in outputs),
        seeds=tuple(slots.of(Channel.COEFFICIENT, node) for node in seeded.values()),
        explained=explained,
        weighed=weighed,
        inputs=slots.known("value", placeholders),
        attributes={key[1]: slot for key, slot in slots.numbers.items() if key[0] == "attribute"},
        slots=len(slots.numbers),
    )


def _emit_all(
    regions: Sequence[Region],
    seeded: Sequence[fx.Node],
    attributes: Mapping[str, Tensor],
    options: EmitOptions,
) -> list[Program]:
    """A program for each region, from the last to the first: what one hands back, one receives."""
    arriving = {(node, Channel.COEFFICIENT): node.meta["val"].dtype for node in seeded}
    known: dict[Any, Program] = {}
    programs: list[Program] = []
    for region in reversed(regions):
        seeds = tuple(
            Port(i, channel, arriving[node, channel])
            for i, node in enumerate(region.outputs)
            for channel in Channel
            if (node, channel) in arriving
        )
        asked = tuple(name in options.weighed for name in region.attributes)
        key = region.signature, seeds, asked
        if key not in known:
            given = {name: attributes[name] for name in region.attributes}
            known[key] = emit(region.graph_module(), seeds, given, options)
        programs.append(known[key])
        for i, channel, dtype in known[key].received:
            place = region.inputs[i], channel
            arriving[place] = torch.promote_types(dtype, arriving.get(place, dtype))
    return programs[::-1]


class _Slots:
    """Numbers slots by what they are for."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[Any, ...], int] = {}

    def of(self, *key: Any) -> int:
        """The slot for something; a new one if it has none."""
        return self.numbers.setdefault(key, len(self.numbers))

    def known(self, kind: Any, placeholders: Iterable[fx.Node]) -> dict[str, int]:
        """The slots that the model's inputs have for something, by their names."""
        return {
            str(node.target): self.numbers[kind, node]
            for node in placeholders
            if (kind, node) in self.numbers
        }


@dataclass(frozen=True)
class _Place:
    """A program in its place: at one of the regions that share it."""

    number: int
    region: Region
    program: Program
    slots: _Slots

    @property
    def returns(self) -> bool:
        """Whether its relevance side returns anything."""
        program = self.program
        return bool(program.received or program.weighed or program.audited or program.latent)

    def forward(self) -> Step:
        handed = [self.slots.of("value", node) for node in self.region.outputs]
        inputs = placeholders_of(self.program.relevance)
        saved = [self._of(node) for node in inputs if node.meta["part"] == "saved"]
        return Step(self.program.forward, self._all(self.program.forward), (*handed, *saved))

    def relevance(self) -> Step:
        graph_module, region = self.program.relevance, self.region
        received = [self.slots.of(p.channel, region.inputs[p.place]) for p in self.program.received]
        own = dict(zip(self.program.attributes, region.attributes, strict=True))
        for name in self.program.weighed:
            received += [self.slots.of(kind, own[name]) for kind in ("weight", "magnitude")]
        audited = tuple((region.nodes[p.place].name, p.account) for p in self.program.audited)
        latent = tuple(region.nodes[i].name for i in self.program.latent)
        arguments = self._all(graph_module)
        return Step(graph_module, arguments, tuple(received), audited, latent)

    def derivation(self) -> Derivation:
        names = dict(zip(self.program.attributes, self.region.attributes, strict=True))
        values = {n: self.slots.of("own", self.number, n) for n in self.program.derived_values}
        return Derivation(self.program, names, values)

    def _all(self, graph_module: fx.GraphModule) -> tuple[int, ...]:
        return tuple(self._of(node) for node in placeholders_of(graph_module))

    def _of(self, placeholder: fx.Node) -> int:
        """The slot of what a side of the program reads."""
        name, part = placeholder.meta["name"], placeholder.meta["part"]
        program, region = self.program, self.region
        if part == "attribute":
            return self.slots.of("attribute", region.attributes[program.attributes.index(name)])
        if part == "input":
            return self.slots.of("value", region.inputs[program.inputs.index(name)])
        if part == "seed":
            port = program.seeds[int(name.removeprefix(SEED))]
            return self.slots.of(port.channel, region.outputs[port.place])
        return self.slots.of("own", self.number, name)


def _output(output: Any, slots: _Slots) -> tuple[int | None, Any]:
    if not isinstance(output, fx.Node):
        return None, output
    key = ("attribute", str(output.target)) if output.op == "get_attr" else ("value", output)
    return slots.of(*key), None


def _emptying(steps: Sequence[Step], slots: _Slots, kept: Iterable[int]) -> list[Step]:
    """The steps, each with the slots that it is the last to use; the model's own stay."""
    last = {slot: i for i, s in enumerate(steps) for slot in (*s.arguments, *s.results)}
    for key, slot in slots.numbers.items():
        if key[0] == "attribute":
            last.pop(slot, None)
    for slot in kept:
        last.pop(slot, None)
    emptied: list[list[int]] = [[] for _ in steps]
    for slot, i in last.items():
        emptied[i].append(slot)
    return [replace(s, emptied=tuple(e)) for s, e in zip(steps, emptied, strict=True)]
