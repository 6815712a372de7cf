"""A call: the forward programs once, and then the relevance of each target.

Inputs come checked and named; what a target reads of the outputs says which programs serve it, and
what is found is spelled out as an explanation.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from attnlrp_fx.calculus.tape import Runner
from attnlrp_fx.calculus.weights import Weight
from attnlrp_fx.capture.capture import Captured, flat_inputs
from attnlrp_fx.codegen.attributes import Attributes
from attnlrp_fx.codegen.programs import Compiled, ProgramOptions, Programs
from attnlrp_fx.codegen.report import Report
from attnlrp_fx.codegen.rewriting import Rewriting
from attnlrp_fx.codegen.schedule import Read, Values
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.heatmap import Normalisation
from attnlrp_fx.inspection.ledger import Book, Ledger
from attnlrp_fx.inspection.seeded import of_heads, of_outputs
from attnlrp_fx.neurons import Neuron
from attnlrp_fx.passes.slice_targets import POSITIONS
from attnlrp_fx.runtime.checks import InputChecks, find_non_finite
from attnlrp_fx.runtime.editing import Conditions, Editing, Interventions
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.labels import Labels
from attnlrp_fx.runtime.latent import latent_outputs, read_latents
from attnlrp_fx.runtime.modes import computing
from attnlrp_fx.runtime.seeding import Seeds, entering, kinds_of, seeds_of
from attnlrp_fx.targets import (
    Chosen,
    Contrast,
    Logit,
    LogProb,
    Outputs,
    Target,
    as_target,
    at_one_position,
    dense,
    outputs_as_seen,
    positions_of,
)
from attnlrp_fx.torch_private import typical_size

Sums = dict[str, Weight]
"""By the name of a tensor in the graph."""


class Weighed(NamedTuple):
    """The sums with a batch added, and whether its rows were told apart."""

    sums: Sums
    rows_told_apart: bool


@dataclass(frozen=True)
class ExplainerOptions:
    """How programs are compiled and what they return."""

    programs: ProgramOptions = field(default_factory=ProgramOptions)
    target: Target | None = None
    """The default target of calls; None: the highest logit of the last token."""
    labels: Labels = field(default_factory=Labels)
    normalisation: Normalisation | None = None
    """What explanations undo to show an image."""


@dataclass(frozen=True)
class Forward:
    """A forward pass that has been run, from which any number of targets can be explained."""

    compiled: Compiled
    attributes: Mapping[str, Tensor]
    given: dict[str, Tensor]
    flat: list[Any]
    """The flat outputs."""
    seen: Outputs
    """The outputs as targets see them."""
    values: Values
    """The slots, with what relevance needs."""


@dataclass(frozen=True)
class _Shown:
    """The inputs that explanations of several targets show, spelled once."""

    inputs: dict[str, Tensor]
    spelling: Callable[[str], list[list[str]] | None]

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor], labels: Labels) -> "_Shown":
        """Inputs, each spelled when it is first asked for."""

        @cache
        def spelling(name: str) -> list[list[str]] | None:
            return (labels.tokens(inputs, [name]) or {}).get(name)

        return cls(dict(inputs), spelling)

    def tokens(self, names: Iterable[str]) -> dict[str, list[list[str]]] | None:
        """The tokens of those of some inputs that have any."""
        found = {name: tokens for name in names if (tokens := self.spelling(name)) is not None}
        return found or None


class _OtherOutputs(Exception):
    """A target reads outputs that the program has no seeds for."""


class Running:
    """What runs an explainer's programs on batches.

    Args:
        model: the model, whose tensors are read at every call.
        convention: its captured graph, with what the model takes and returns.
        rewriting: the rewritten graph.
        options: how programs are compiled and what they return.
        report: what compiling did; each compilation is written down there.
    """

    def __init__(
        self,
        model: nn.Module,
        convention: Captured,
        rewriting: Rewriting,
        options: ExplainerOptions,
        report: Report,
    ) -> None:
        rewritten = rewriting.graph_module
        self.model = model
        self.convention = convention
        self.rewriting = rewriting
        self.rewritten = rewritten
        self.sliced = rewriting.context.sliced
        """The outputs of which the target's position alone is computed."""
        self.options = options
        self.attributes = Attributes(model, rewritten)
        self.report = report
        self.programs = Programs(
            rewritten, convention, self.attributes, options.programs, report.compilations
        )
        self.target = options.target or as_target(None)
        """The target of calls that name none."""
        self.editing = Editing(rewritten)
        self.checks = InputChecks(rewritten, convention.constants, (POSITIONS, *self.editing.names))
        self.latent = latent_outputs(rewritten, bool(self.sliced))
        self.places = {one.site.name: (one.index, one.site) for one in self.latent}
        """By name of a latent value, which output it is, and its site."""
        self._seeded: dict[Any, tuple[int, ...]] = {}

    def explain(
        self, targets: Sequence[Target], given: dict[str, Tensor], whole: Mapping[str, Tensor]
    ) -> tuple[list[Explanation], Forward]:
        """The explanation for each target, and the one forward pass.

        `whole` are the inputs to show, of which those given may be a prefix.
        """
        kinds = kinds_of(targets)
        asked, filled = targets, given
        if self.sliced:
            filled = {**given, POSITIONS: self._positions(targets[0], given)}
            asked = _at_the_only_position(targets)
        forward = self._forward_for(asked, kinds, filled)
        whole = {name: whole[name] for name in self.checks.examples}
        shown = _Shown.of(whole, self.options.labels)
        try:
            found = list(self._explanations(forward, asked, shown))
        except _OtherOutputs:  # a function of the outputs may read others each time
            self._seeded.pop(kinds, None)
            del forward
            return self.explain(targets, given, whole)
        return found, forward

    def _forward_for(
        self, targets: Sequence[Target], kinds: tuple[Any, ...], given: dict[str, Tensor]
    ) -> Forward:
        """A forward pass of the program that has seeds for what targets of some kinds read."""
        known = self._seeded.get(kinds)
        seeded = known or self.default_seeds()
        forward = self._run_forward(seeded, given)
        if known is None:
            read = {i for target in targets for i in self._seed(target, forward)[1]}
            found = seeded if read <= set(seeded) else tuple(sorted(read))
            self._seeded[kinds] = found
            if found != seeded:
                forward = self._run_forward(found, given)
        return forward

    def weigh(self, target: Target, given: dict[str, Tensor], rows: int, sums: Sums) -> Weighed:
        """Add the relevance of parameters in a batch's first rows to sums; see `Weighs`."""
        forward = self._forward_for([target], kinds_of([target]), given)
        made, values = forward.compiled.schedule, forward.values
        _, seeds = self._seed(target, forward)
        arriving = entering(made, seeds, forward.flat, forward.attributes)
        for seed in arriving:
            seed[rows:] = 0
        for name, slots in made.weighed.items():
            for slot, held in zip(slots, sums.get(name, ()), strict=False):
                values[slot] = held
        read = made.run_relevance(values, arriving, forward.compiled.run)
        told = all(program.rows_told_apart for program in made.programs)
        return Weighed({**sums, **read.weights}, told)

    def check_finite(self, targets: Sequence[Target], forward: Forward) -> None:
        """Look for NaN and infinity in all that leads to the targets.

        Raises:
            NonFiniteError: there is one; it names the first node where it arises.
        """
        asked = _at_the_only_position(targets) if self.sliced else targets
        attributes = self.attributes.values(self.attributes.device())
        for target in asked:
            seeds = self._seed(target, forward)[1]
            whole = {i: dense(seed, forward.flat[i]) for i, seed in seeds.items()}
            find_non_finite(self.rewritten, attributes, forward.given, whole)

    def savings(self, given: Mapping[str, Tensor], targets: Sequence[Target]) -> list[str]:
        """What would need less memory than a call does."""
        found = []
        if len(next(iter(given.values()))) > 1:
            found.append("pass fewer rows at a time")
        if len(targets) > 1:
            found.append("pass fewer targets at a time")
        if self.options.programs.memory != "small":
            found.append('compile with memory="small"')
        if not self.sliced:
            found.append("compile with target_slice=True if outputs are wanted at one position")
        return [*found, "shorten the inputs"]

    def edits(
        self,
        given: Mapping[str, Tensor],
        conditions: Conditions | None = None,
        interventions: Interventions | None = None,
    ) -> dict[str, Tensor]:
        """The inputs that edit latent values, for inputs of some sizes."""
        if not (self.editing.names or conditions or interventions):
            return {}
        sizes, device = self._sizes(given), self.attributes.device()
        batch = len(next(iter(given.values())))
        return self.editing.given(sizes, device, batch, conditions, interventions)

    def _sizes(self, given: Mapping[str, Tensor]) -> dict[str, int]:
        """The size of each symbol."""
        return {
            str(expected): size
            for name, example in self.checks.examples.items()
            for expected, size in zip(example.shape, given[name].shape, strict=True)
        }

    def slices(self, targets: Sequence[Target]) -> bool:
        """Whether the program that slices outputs, if it does, can serve these targets."""
        if not self.sliced:
            return True
        name = getattr(targets[0], "output", None)
        names = [self.convention.output_names[i] for i in self.sliced]
        return at_one_position(targets) and (name is None or name in names)

    def _positions(self, target: Target, given: Mapping[str, Tensor]) -> Tensor:
        """Each row's position, found before anything is computed."""
        sizes = self._sizes(given)
        wanted = outputs_of(self.convention.graph_module.graph)[self.sliced[0]].meta["val"].shape
        shape = [int(typical_size(size, 1, sizes)) for size in wanted]
        names = self.convention.output_names
        named = dict.fromkeys(names, torch.zeros(()))
        masks = outputs_as_seen(self.convention, [None] * len(names), given).masks
        return positions_of(target, shape, Outputs(named, None, masks)).to(self.attributes.device())

    def _run_forward(self, seeded: tuple[int, ...], given: dict[str, Tensor]) -> Forward:
        device = self.attributes.device()
        attributes = self.attributes.values(device)
        compiled = self.programs.serving(seeded, device, given, attributes)
        self.attributes.check_dtypes(attributes)
        values = compiled.start(attributes, given)
        flat = compiled.schedule.run_forward(values, compiled.run)
        return Forward(compiled, attributes, given, flat, self.outputs(flat, given), values)

    def _explanations(
        self, forward: Forward, targets: Sequence[Target], shown: "_Shown"
    ) -> Iterator[Explanation]:
        """Each target's explanation; the last leaves nothing for another."""
        made, reverse = forward.compiled.schedule, forward.compiled.reverse
        step = reverse.at_a_time(forward.values, len(targets))
        for first in range(0, len(targets), step):
            some = targets[first : first + step]
            chosen = [self._seed(target, forward) for target in some]
            if any(not seeds.keys() <= made.seeded.keys() for _, seeds in chosen):
                raise _OtherOutputs
            arriving = [entering(made, s, forward.flat, forward.attributes) for _, s in chosen]
            is_last = first + step >= len(targets)
            values = forward.values if is_last else forward.values.copy()
            reads = reverse.run(values, arriving, forward.compiled.run)
            for target, (value, seeds), read in zip(some, chosen, reads, strict=True):
                yield self._explanation(forward, target, value, seeds, read, shown)

    def _explanation(
        self,
        forward: Forward,
        target: Target,
        chosen: Chosen,
        seeds: Seeds,
        read: Read,
        shown: "_Shown",
    ) -> Explanation:
        """What was read for one target, with all that an explanation shows."""
        options, flat = self.options, forward.flat
        names = [name for name in shown.inputs if name in read.relevance]
        classes, is_token = self._classes(flat, seeds)
        audit = options.programs.audit
        return Explanation(
            relevance={n: _padded(read.relevance[n], shown.inputs[n]) for n in names},
            outputs=forward.seen.tree,
            target_value=chosen.value if torch.is_grad_enabled() else chosen.value.detach(),
            target=str(target),
            inputs=shown.inputs,
            tokens=shown.tokens(names),
            mask=options.labels.masks(shown.inputs, names),
            ledger=self._ledger(read, chosen, forward, seeds) if audit else None,
            labels=options.labels.of_index(chosen.index, classes, is_token),
            target_index=chosen.index,
            normalisation=options.normalisation,
            latent=read_latents(
                self.latent, flat, read.latent, len(chosen.value), forward.given.get(POSITIONS)
            ),
        )

    def given(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs by placeholder name, checked, where the model is."""
        values = self.checks.ordered(self.named(args, inputs), self.attributes.device())
        return dict(zip(self.checks.examples, values, strict=True))

    def named(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by placeholder name: keywords, one mapping, or positional tensors."""
        if len(args) == 1 and isinstance(args[0], Mapping):
            inputs = {**args[0], **inputs}
        elif args:
            names = list(self.checks.examples)
            if len(args) > len(names):
                raise InputError(f"{len(args)} inputs given, the model takes {len(names)}")
            inputs = {**dict(zip(names, args, strict=False)), **inputs}
        return flat_inputs(inputs)

    def _seed(self, target: Target, forward: Forward) -> tuple[Chosen, Seeds]:
        """The target, and its gradient with respect to each output that it reads."""
        flat, given, seen = forward.flat, forward.given, forward.seen
        convention, places = self.convention, self.places
        return seeds_of(target, self.rewritten, convention, flat, given, places, seen)

    def outputs(self, flat: Sequence[Any], given: Mapping[str, Tensor]) -> Outputs:
        """The flat outputs as a target sees them."""
        return outputs_as_seen(self.convention, flat, given, self.places)

    def default_seeds(self) -> tuple[int, ...]:
        """The outputs that the default target reads, found on the example's outputs."""
        kind = kinds_of([self.target])
        if kind not in self._seeded:
            device = self.attributes.device()
            example = {n: v.to(device) for n, v in self.convention.example.items()}
            with computing():
                flat = self._example_outputs(example)
            found = seeds_of(
                self.target, self.rewritten, self.convention, flat, example, self.places
            )
            self._seeded[kind] = tuple(sorted(found[1]))
        return self._seeded[kind]

    def _example_outputs(self, example: Mapping[str, Tensor]) -> list[Any]:
        """The flat outputs for the example; with latent values, where the target is one.

        Which outputs a logit is read from, their sizes tell.
        """
        graph, inputs = self.convention.graph_module, [*example.values()]
        if isinstance(self.target, Logit | Contrast | LogProb):
            outputs = outputs_of(graph.graph)
            values = [o.meta["val"] if isinstance(o, fx.Node) else o for o in outputs]
            if not any(isinstance(v, Tensor) and free_unbacked_symbols(v) for v in values):
                return [self._zeros(value, self._sizes(example)) for value in values]
        if isinstance(self.target, Neuron):
            graph, inputs = self.rewritten, [*inputs, *self.edits(example).values()]
        device = self.attributes.device()
        moved = device if device != self.programs.captured_device else None
        tensors = Attributes(self.model, graph).values(device)  # the model's as they are now
        run = Runner(graph, tensors, moved).run
        return list(run(*inputs))

    def _zeros(self, like: Any, sizes: Mapping[str, int]) -> Any:
        """A tensor of zeros in the place of a fake one; anything else as it is."""
        if not isinstance(like, Tensor):
            return like
        shape = [int(typical_size(size, 1, sizes)) for size in like.shape]
        return torch.zeros(shape, dtype=like.dtype, device=self.attributes.device())

    def _classes(self, flat: Sequence[Any], seeded: Iterable[int]) -> tuple[int, bool]:
        """How many classes the explained output has, and whether they are tokens."""
        output = flat[next(iter(seeded))]
        return output.shape[-1], output.dim() == 3 or output.shape[-1] > 1000

    @torch.no_grad()
    def _ledger(self, read: Read, chosen: Chosen, forward: Forward, seeds: Seeds) -> Ledger:
        made, flat = forward.compiled.schedule, forward.flat
        heads = of_heads(seeds, flat, made.seeded, made.rewritten, forward.attributes)
        return self._book.read(
            {**read.postings, **heads},
            target=float(chosen.value.double().sum()),
            seeded=of_outputs(seeds, flat, self.rewritten),
            inputs={name: float(r.double().sum()) for name, r in read.relevance.items()},
        )

    @cached_property
    def _book(self) -> Book:
        return Book(self.rewritten.graph)


def _at_the_only_position(targets: Sequence[Any]) -> list[Target]:
    """Targets of outputs of which one position is left."""
    return [replace(target, position=0) for target in targets]


def _padded(relevance: Tensor, whole: Tensor) -> Tensor:
    """Relevance of a prefix as that of the whole, which is zero behind."""
    rest = whole.shape[1] - relevance.shape[1] if relevance.dim() > 1 else 0
    if not rest:
        return relevance
    return torch.nn.functional.pad(relevance, [0, 0] * (relevance.dim() - 2) + [0, rest])
