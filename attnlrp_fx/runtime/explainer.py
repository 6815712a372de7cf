"""The explainable graph module: one compiled program, many explanations."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from attnlrp_fx import ops
from attnlrp_fx.calculus.tails import features_of, source_of, split_at
from attnlrp_fx.calculus.tape import Runner
from attnlrp_fx.capture.capture import Captured, flat_inputs
from attnlrp_fx.capture.retype import main_dtype, retyped
from attnlrp_fx.codegen.attributes import Attributes
from attnlrp_fx.codegen.backends import Backend
from attnlrp_fx.codegen.cost import Cost, schedule_cost
from attnlrp_fx.codegen.programs import Compiled, ProgramOptions, Programs, Served
from attnlrp_fx.codegen.report import Report
from attnlrp_fx.codegen.rewriting import Rewriting, rewrite
from attnlrp_fx.codegen.schedule import Read, Values
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.graph.sites import SAE
from attnlrp_fx.heatmap import Normalisation
from attnlrp_fx.inspection.audit import Audit, audit
from attnlrp_fx.inspection.graphs import Graphs
from attnlrp_fx.inspection.inspectable import Inspectable
from attnlrp_fx.inspection.ledger import Book, Ledger
from attnlrp_fx.inspection.seeded import of_heads, of_outputs
from attnlrp_fx.neurons import Neuron
from attnlrp_fx.passes import Pass, PassContext
from attnlrp_fx.passes.slice_targets import POSITIONS
from attnlrp_fx.rules.composites import Composite, composite_named
from attnlrp_fx.runtime.ahead import save_ahead
from attnlrp_fx.runtime.batching import Targets
from attnlrp_fx.runtime.checks import InputChecks, find_non_finite
from attnlrp_fx.runtime.editing import Conditions, Editing, Interventions
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.explanations import Explanations
from attnlrp_fx.runtime.generation import explain_generation
from attnlrp_fx.runtime.labels import Labels
from attnlrp_fx.runtime.latent import latent_outputs, read_latents
from attnlrp_fx.runtime.mapping import Mapped, map_dataset
from attnlrp_fx.runtime.modes import computing, not_traced, short_of_memory
from attnlrp_fx.runtime.saving import save_explainer
from attnlrp_fx.runtime.seeding import Seeds, entering, kinds_of, seeds_of
from attnlrp_fx.runtime.tail import Tail, compiled_tail
from attnlrp_fx.runtime.weight_relevance import Sums, Weighed, WeightRelevance, weight_relevance
from attnlrp_fx.targets import (
    Chosen,
    Outputs,
    Target,
    TargetLike,
    TargetsLike,
    as_target,
    at_one_position,
    default_scores,
    dense,
    outputs_as_seen,
    positions_of,
    targets_of,
)
from attnlrp_fx.torch_private import TRACING, typical_size


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
class _Forward:
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


class ExplainableGraphModule(Inspectable, nn.Module):
    """A model compiled to explain itself: call it with the model's inputs.

    Made by `attnlrp_fx.compile`. Parameters and buffers are the model's own, read at every call:
    an optimiser's step, `load_state_dict` or `.to(device)` shows at once. A first call on another
    device or in another dtype (`explainer.to(torch.bfloat16)`), or with a target that reads other
    outputs, compiles a program more; another batch size, length, index or position does not.

    Attributes:
        model: the model itself, untouched.
    """

    def __init__(
        self,
        model: nn.Module,
        captured: Captured,
        rewriting: Rewriting,
        options: ExplainerOptions,
        capture_seconds: float,
    ) -> None:
        super().__init__()
        self.model = model
        rewritten = rewriting.graph_module
        self._graphs = {"captured": captured.graph_module, "rewritten": rewritten}
        self._convention = captured
        self._rewriting = rewriting
        backend = options.programs.backend
        self._report = Report(
            composite=rewriting.context.composite.name,
            backend=backend if isinstance(backend, str) else getattr(backend, "__name__", "custom"),
            capture_seconds=capture_seconds,
            nodes=len(captured.graph_module.graph.nodes),
            notes=captured.notes,
            passes=rewriting.results,
            rules=rewriting.rule_counts(),
            fallbacks=rewriting.fallbacks(),
        )
        self._options = options
        self._target = options.target or as_target(None)
        self._attributes = Attributes(model, rewritten)
        self._editing = Editing(rewritten)
        own = (POSITIONS, *self._editing.names)
        self._checks = InputChecks(rewritten, captured.constants, own)
        self._programs = Programs(
            rewritten, captured, self._attributes, options.programs, self._report.compilations
        )
        self._latent = latent_outputs(rewritten, bool(rewriting.context.sliced))
        self._places = {one.site.name: (one.index, one.site) for one in self._latent}
        self._siblings: list[ExplainableGraphModule] = []
        self._seeded: dict[Any, tuple[int, ...]] = {}
        self.training = (
            False  # the explained model is the one in evaluation mode, however it is set
        )

    def __copy__(self) -> "ExplainableGraphModule":
        """A shallow copy shares the model and the programs."""
        made = type(self).__new__(type(self))
        made.__dict__ = dict(self.__dict__)
        return made

    def __reduce__(self) -> Any:
        """Neither pickled nor copied deeply: programs belong to a process, and to one model.

        Raises:
            InputError: always.
        """
        raise InputError(
            "an explainer can be neither pickled nor copied deeply",
            why="its programs are compiled for this process and read this model's parameters",
            remedy="save it and load the file there, or compile in the other process",
        )

    @property
    def captured(self) -> fx.GraphModule:
        """What the model does, as it was captured; takes and returns flat lists."""
        return self._graphs["captured"]

    @property
    def rewritten(self) -> fx.GraphModule:
        """Which rule stands where; takes and returns flat lists, and computes the outputs."""
        return self._graphs["rewritten"]

    @property
    def program(self) -> fx.GraphModule:
        """What runs, as one graph: (parameters, inputs, seeds) → (outputs, relevance), in ATen.

        Where blocks repeat, what runs is a program for each distinct one, see `report()`; this is
        all of them, traced together when first asked for.
        """
        return self._programs.flat(self._default_seeds(), self._attributes.device())

    def _inspected(self) -> Graphs:
        context, results = self._rewriting.context, self._rewriting.results
        name = context.composite.name
        return Graphs(self.captured, self.rewritten, results, name, lambda: self.program)

    def _audited(
        self,
        args: Any,
        inputs: Any,
        target: TargetLike,
        reference: torch.dtype | None,
        **edits: Any,
    ) -> Audit:
        if self._sliced:
            return self._whole()._audited(args, inputs, target, reference, **edits)
        device = self._attributes.device()
        if device.type == "meta":
            raise _no_values()
        given = self._given(args, inputs)
        wanted = self._target if target is None else as_target(target)
        return audit(
            self.rewritten,
            self._attributes.values(device),
            given | self._edits(given, **edits),
            lambda flat, read: seeds_of(
                wanted, self.rewritten, self._convention, flat, read, self._places
            ),
            target=str(wanted),
            masks=self._options.labels.masks(given, given),
            device=device if device != self._programs.captured_device else None,
            reference=reference,
        )

    @property
    def composite(self) -> Composite:
        """The rules that it was compiled with."""
        return self._rewriting.context.composite

    @property
    def explained(self) -> list[str]:
        """The names of the inputs that have relevance."""
        graph = self.rewritten.graph
        names = (str(n.kwargs["name"]) for n in graph.nodes if n.target is ops.source)
        return list(dict.fromkeys(names))

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return len(self._programs.compiled)

    def report(self) -> Report:
        """What each pass did, each rule's count, ops that fell through, what was compiled."""
        return self._report

    @not_traced  # checks read values, and the programs are compiled already
    def forward(
        self,
        *args: Any,
        target: TargetsLike = None,
        check_finite: bool = False,
        conditions: Conditions | None = None,
        interventions: Interventions | None = None,
        **inputs: Any,
    ) -> Explanation | Explanations:
        """Explain a batch.

        Args:
            *args: a mapping of inputs, or tensors in the order of the model's arguments, instead
                of keywords.
            target: what to explain, a `Logit`, `Contrast`, `LogProb`, an index, or a function of
                the model's outputs that returns (batch,); None: the compiled default. Several in a
                list, or by an index or position (batch, M), share one forward pass.
            check_finite: look for NaN and infinity in inputs, outputs and relevance, and name the
                first node where one arises.
            conditions: by name of an editable latent value, the units whose relevance alone it
                hands on, or a `Keep`.
            interventions: by name of an editable latent value, `Ablate`, `Scale` or `Clamp`.
            **inputs: the model's inputs by name, with the dtypes it was compiled with; batch and
                sequence of any size.

        Returns:
            Relevance of every explained input, the model's outputs and the explained values; of
            several targets, a sequence of explanations.

        Raises:
            InputError: the inputs do not fit.
            TargetError: the outputs do not have the target.
            NonFiniteError: only with check_finite.
            OutOfMemoryError: the batch does not fit into memory.
        """
        device = self._attributes.device()
        if device.type == "meta" and (check_finite or self._options.programs.audit):
            raise _no_values()
        targets, are_several = targets_of(target, self._target)
        given = self._given(args, inputs)
        if not self._slices(targets):
            edits = {"conditions": conditions, "interventions": interventions}
            return self._whole()(given, target=target, check_finite=check_finite, **edits)  # type: ignore[no-any-return]
        given |= self._edits(given, conditions, interventions)
        memory = short_of_memory(partial(self._savings, given, targets))
        with memory, computing(self._options.programs.differentiable):
            found, forward = self._explain(targets, given, given)
        asked = _at_the_only_position(targets) if self._sliced else targets
        for one in asked if check_finite else ():
            seeds = self._seed(one, forward)[1]
            whole = {i: dense(seed, forward.flat[i]) for i, seed in seeds.items()}
            find_non_finite(self.rewritten, self._attributes.values(device), forward.given, whole)
        return Explanations(tuple(found)) if are_several else found[0]

    def explain_many(
        self,
        targets: Sequence[Target],
        inputs: Mapping[str, Tensor],
        whole: Mapping[str, Tensor] | None = None,
    ) -> tuple[Explanations, Any]:
        """Explain a batch, or a prefix of it, for several targets; see `Explains`."""
        given = self._given((inputs,), {})
        shown = given if whole is None else dict(self._given((whole,), {}))
        given = given | self._edits(given)
        with computing():
            found, forward = self._explain(targets, given, shown)
        scores = default_scores(forward.seen)
        return Explanations(tuple(found)), scores

    def explain_generation(
        self,
        *args: Any,
        start: int,
        sequence: str | None = None,
        chunk: int = 16,
        **inputs: Any,
    ) -> Explanations:
        """Explain every token of a text from a position on, as predicted by those before it.

        Targets are taken in chunks, each on the text up to its last target, which is as good as
        the whole text for a causal model, and cheaper; a model that looks ahead is noticed.

        Args:
            *args: as in a call: a whole text, the prompt and what was generated.
            start: the first token to explain: the length of the prompt; 1 or more.
            sequence: the input whose tokens are predicted, (batch, length); None:
                "decoder_input_ids" if there is one, or else "input_ids".
            chunk: how many targets share a run of the model.
            **inputs: as in a call.

        Returns:
            One explanation a token; `relevance` (batch, length − start, length), zero for what
            lies at or behind the token. `outputs` are None.

        Raises:
            InputError: the inputs do not fit, there is nothing to explain, or the model does not
                return logits for every position.
        """
        given = self._given(args, inputs)
        return explain_generation(self._whole(), given, start, sequence, chunk)

    def lengths_like(self, name: str) -> tuple[str, ...]:
        """The inputs whose second dimension is that of an input, if it is dynamic."""
        length = self._checks.examples[name].shape[1]
        if is_concrete_int(length):
            return ()
        examples = self._checks.examples.items()
        return tuple(n for n, v in examples if v.dim() > 1 and str(v.shape[1]) == str(length))

    def map(
        self,
        dataset: Any,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        target: TargetLike = None,
        targets: Targets | None = None,
        window: int = 16,
        workers: int = 0,
        pad: bool = True,
        outputs: bool = False,
        progress: bool = True,
    ) -> Mapped:
        """Explain every sample of a data set, in batches of nearly equal lengths.

        What each option means, and every error, is with `attnlrp_fx.runtime.mapping.map_dataset`.

        Args:
            dataset: texts, mappings of inputs by name (one row each) or tensors, in anything that
                can be iterated, or a `torch.utils.data.Dataset`.
            batch_size: the most rows of a batch; None: 32, or what the model was fixed to.
            max_tokens: the most tokens of a batch, padding counted.
            target: as in a call; an index or a position may be one per sample.
            targets: instead, a target for each sample: a sequence, or a function of the sample.
            window: how many full batches are loaded, and sorted by length, together.
            workers: processes that load ahead.
            pad: whether unlike lengths may share a batch.
            outputs: whether explanations keep the model's outputs.
            progress: whether a progress bar is shown, on a terminal's standard error.

        Returns:
            An iterator with one explanation a sample, in the order of the data set, each as of the
            sample alone; its `throughput` says how fast it went.

        Raises:
            InputError: an option does not fit, or, while iterating, a sample.
            TargetError: while iterating, a sample's outputs do not have the target.

        Example:
            >>> import torch, attnlrp_fx
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
            >>> explainer = attnlrp_fx.compile(mlp, torch.ones(2, 3), backend="eager")
            >>> mapped = explainer.map(list(torch.randn(100, 3)), batch_size=64)
            >>> sum(len(explanation) for explanation in mapped), mapped.throughput.batches
            (100, 2)
        """
        return map_dataset(
            self,
            dataset,
            batch_size=batch_size,
            max_tokens=max_tokens,
            target=target,
            targets=targets,
            window=window,
            workers=workers,
            pad=pad,
            outputs=outputs,
            progress=progress,
        )

    def weight_relevance(
        self,
        dataset: Any,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        target: TargetLike = None,
        targets: Targets | None = None,
        window: int = 16,
        workers: int = 0,
        pad: bool = True,
        progress: bool = True,
    ) -> WeightRelevance:
        """Relevance R_W = W ⊙ ∂ of every layer's parameters, summed over a data set.

        ∂ is Σ a x over all places where a weight is used, of a layer's input x and what arrives at
        its output: the coefficient, with the ε-rule. Σ R_W of a layer is the relevance of its input
        (Hatefi et al. 2025, arXiv 2506.13727). The first call compiles a program of its own; other
        explanations run as before.

        Args:
            dataset: as in `map`.
            batch_size: the most rows of a batch; None: 32, or fewer where a layer is so large that
                its weights, once for each row, take more than 256 MiB.
            max_tokens, target, targets, window, workers, pad, progress: as in `map`.

        Returns:
            A mapping from the model's names to Σ R_W over samples, in the parameter's shape; with
            `absolute`, Σ |R_W|, and `save`, which writes safetensors.

        Raises:
            InputError: an option or a sample does not fit, or there is nothing to sum.
            TargetError: a sample's outputs do not have the target.

        Example:
            >>> import torch, attnlrp_fx
            >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
            >>> explainer = attnlrp_fx.compile(mlp, torch.ones(2, 3), backend="eager")
            >>> relevance = explainer.weight_relevance(list(torch.randn(100, 3)))
            >>> relevance["0.weight"].shape, relevance.samples
            (torch.Size([4, 3]), 100)
        """
        return weight_relevance(
            self,
            dataset,
            batch_size=batch_size,
            progress=progress,
            max_tokens=max_tokens,
            target=target,
            targets=targets,
            window=window,
            workers=workers,
            pad=pad,
        )

    def weigh(
        self, inputs: Mapping[str, Any], target: Target | None, rows: int, sums: Sums
    ) -> Weighed:
        """Add the relevance of parameters in a batch's first rows to sums; see `Weighs`."""
        if not self._options.programs.weights:
            return self._weighing.weigh(inputs, target, rows, sums)
        given = self._given((inputs,), {})
        given |= self._edits(given)
        wanted = self._target if target is None else target
        with torch.inference_mode(False), torch.no_grad():
            forward = self._forward_for([wanted], kinds_of([wanted]), given)
            made, values = forward.compiled.schedule, forward.values
            _, seeds = self._seed(wanted, forward)
            arriving = entering(made, seeds, forward.flat, forward.attributes)
            for seed in arriving:
                seed[rows:] = 0
            for name, slots in made.weighed.items():
                for slot, held in zip(slots, sums.get(name, ()), strict=False):
                    values[slot] = held
            read = made.run_relevance(values, arriving, forward.compiled.run)
        told = all(program.rows_told_apart for program in made.programs)
        return Weighed({**sums, **read.weights}, told)

    @cached_property
    def _weighing(self) -> "ExplainableGraphModule":
        """The same with programs that return the relevance of parameters."""
        whole = self._whole()
        programs = replace(self._options.programs, weights=True, audit=False)
        options = replace(self._options, programs=programs)
        seconds = self._report.capture_seconds
        made = ExplainableGraphModule(
            self.model, self._convention, whole._rewriting, options, seconds
        )
        made._programs.captured_device = self._programs.captured_device
        return made

    def tail(self, name: str, backend: str | Backend = "eager") -> Tail:
        """The model from one of its explained values on, to be perturbed and differentiated.

        Args:
            name: an explained input, by name.
            backend: what runs it: "eager", "inductor", or as for `torch.compile`.

        Raises:
            InputError: it is not explained, or looked up more than once, or its tokens are moved
                before they are.
        """
        if self._sliced:
            return self._whole().tail(name, backend)
        source = source_of(self.rewritten, name)
        attributes = self._attributes.values(self._attributes.device())
        head, rest = split_at(self.rewritten, source, attributes)

        def check(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given = self._given((inputs,), {})
            return given | self._edits(given)

        return Tail(
            name=name,
            features=features_of(source),
            head=head,
            rest=rest,
            compiled=compiled_tail(rest, backend),
            check=check,
            outputs=self._outputs,
        )

    def prepare(self) -> "ExplainableGraphModule":
        """Compile the program of the default target now rather than at the first call."""
        self._programs.example(self._default_seeds(), self._attributes.device())
        return self

    def with_composite(
        self,
        composite: str | Composite,
        *,
        latent: Sequence[str | SAE] | None = None,
        passes: tuple[Pass, ...] | None = None,
    ) -> "ExplainableGraphModule":
        """The same model compiled with other rules, without capturing it again.

        Args:
            composite: as in `compile`.
            latent: as in `compile`; None: as before.
            passes: as in `compile`; None: as before.

        Raises:
            InputError: there is no latent value of a name.
            RuleError: there is no composite of that name, no rule of it claims an op, or a rule
                stands at an op that it does not fit.

        Example:
            >>> import torch, attnlrp_fx
            >>> x, mlp = torch.ones(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 4)).eval()
            >>> plain = attnlrp_fx.compile(mlp, x, backend="eager")
            >>> plain.with_composite("attnlrp-vision").report().composite
            'attnlrp-vision'
        """
        context = replace(self._rewriting.context, composite=composite_named(composite))
        if latent is not None:
            context = replace(context, latent=tuple(latent))
        return self._sibling(context, passes).prepare()

    def _sibling(
        self, context: PassContext, passes: tuple[Pass, ...] | None = None
    ) -> "ExplainableGraphModule":
        """The same model rewritten otherwise."""
        with TRACING:
            rewriting = rewrite(self._convention, context, passes or self._rewriting.passes)
        seconds = self._report.capture_seconds
        made = ExplainableGraphModule(
            self.model, self._convention, rewriting, self._options, seconds
        )
        made._programs.captured_device = (
            self._programs.captured_device
        )  # the model may have moved since
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.half`, `.double` and the like do: move or convert the model.

        On another device, programs are compiled at the next call. In another dtype, the captured
        graph is converted as well, see `attnlrp_fx.capture.retype`, rewritten and compiled.
        """
        tensors = Attributes(self.model, self.captured).values
        old = main_dtype(tensors())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        new = main_dtype(tensors())
        if old is not None and new is not None and old != new:
            with TRACING:
                captured = retyped(self._convention, tensors(), old, new)
                rewriting = rewrite(captured, self._rewriting.context, self._rewriting.passes)
            seconds, place = self._report.capture_seconds, self._programs.captured_device
            made = type(self)(self.model, captured, rewriting, self._options, seconds)
            made._programs.captured_device = place
            # Nothing made of the old graph stays, neither programs nor what was cached of it.
            self.__dict__ = made.__dict__
        return self

    def save(self, path: str | Path, *, weights: bool = True, aot: bool = False) -> None:
        """Write the explainer to a file that `attnlrp_fx.load` reads in another process.

        A torch.export archive: the captured graph, the weights under the model's own names, and, as
        JSON, inputs and outputs, composite, target, options, report and versions; the tokenizer, if
        it is a fast one, and how images were normalised. No pickle. It is written whole or not at
        all.

        Args:
            path: the file, as "model.lrp.pt2".
            weights: whether the weights are in it; if not, `load` wants the model.
            aot: instead, compile the program of the default target ahead of time, weights and all,
                into an AOTInductor package, for `attnlrp_fx.load_aot` and for C++ (`examples/cpp`).
                It takes the model's inputs and `index`, (batch,) int64, the class or token to
                explain, −1 for what the target chooses; it returns the model's outputs, the
                explained value (batch,), the index, and each explained input's relevance.

        Raises:
            ArtefactError: something cannot be saved without code: a target that is a function, a
                rule or a pass of one's own, an autoencoder, an op that is not PyTorch's; or the
                graph has sizes that are read off values; or the path is no place for a file.
            BackendError: only with aot, it could not be compiled.
            OSError: the file cannot be written.
        """
        if aot:
            save_ahead(self, path)
        else:
            save_explainer(self, path, weights)

    @property
    def tokenizer(self) -> Any:
        """What cuts texts, and gives explanations their tokens; None if there is none."""
        return self._options.labels.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        labels = replace(self._options.labels, tokenizer=tokenizer)
        self._options = replace(self._options, labels=labels)

    def refresh(self) -> None:
        """Compute kept derived weights anew at the next call.

        Needed only with `derived_weights="keep"`, after writing to parameters in a way that
        PyTorch does not count: through `.data`, or from outside of PyTorch.
        """
        self._programs.forget_derived()

    def cost(self, *args: Any, device: torch.device | str | None = None, **inputs: Any) -> Cost:
        """What explaining a batch takes, in operations and memory; nothing is computed.

        Args:
            *args: as in a call; only sizes and dtypes are read.
            device: where it would run; None: where the model is. A model on "meta" takes no
                memory, and its programs for other devices can be asked about.
            **inputs: as in a call.

        Raises:
            InputError: the inputs do not fit.

        Example:
            >>> import torch, attnlrp_fx
            >>> linear = torch.nn.Linear(3, 4, device="meta").eval()
            >>> x = torch.ones(2, 3, device="meta")
            >>> attnlrp_fx.compile(linear, x).cost(x, device="cpu").forward_flops  # 2 · 2 · 3 · 4
            48
        """
        values = self._checks.ordered(self._named(args, inputs), torch.device("meta"))
        given = dict(zip(self._checks.examples, values, strict=True))
        if self._sliced:
            given[POSITIONS] = values[0].new_empty(len(values[0]), dtype=torch.int64)
        given |= {name: edit.to("meta") for name, edit in self._edits(given).items()}
        seeded, own = self._default_seeds(), self._attributes.device()
        wanted = own if device is None else torch.device(device)
        same = wanted == own
        found = (
            self._programs.example(seeded, own).schedule
            if same
            else self._programs.planned(Served(seeded, wanted))[0]
        )
        return schedule_cost(found, given)

    def _explain(
        self, targets: Sequence[Target], given: dict[str, Tensor], whole: Mapping[str, Tensor]
    ) -> tuple[list[Explanation], _Forward]:
        """The explanation for each target, and the one forward pass.

        `whole` are the inputs to show, of which those given may be a prefix.
        """
        kinds = kinds_of(targets)
        asked, filled = targets, given
        if self._sliced:
            filled = {**given, POSITIONS: self._positions(targets[0], given)}
            asked = _at_the_only_position(targets)
        forward = self._forward_for(asked, kinds, filled)
        whole = {name: whole[name] for name in self._checks.examples}
        shown = _Shown.of(whole, self._options.labels)
        try:
            found = list(self._explanations(forward, asked, shown))
        except _OtherOutputs:  # a function of the outputs may read others each time
            self._seeded.pop(kinds, None)
            del forward
            return self._explain(targets, given, whole)
        return found, forward

    def _forward_for(
        self, targets: Sequence[Target], kinds: tuple[Any, ...], given: dict[str, Tensor]
    ) -> _Forward:
        """A forward pass of the program that has seeds for what targets of some kinds read."""
        known = self._seeded.get(kinds)
        seeded = known or self._default_seeds()
        forward = self._run_forward(seeded, given)
        if known is None:
            read = {i for target in targets for i in self._seed(target, forward)[1]}
            found = seeded if read <= set(seeded) else tuple(sorted(read))
            self._seeded[kinds] = found
            if found != seeded:
                forward = self._run_forward(found, given)
        return forward

    def _savings(self, given: Mapping[str, Tensor], targets: Sequence[Target]) -> list[str]:
        """What would need less memory than a call does."""
        found = []
        if len(next(iter(given.values()))) > 1:
            found.append("pass fewer rows at a time")
        if len(targets) > 1:
            found.append("pass fewer targets at a time")
        if self._options.programs.memory != "small":
            found.append('compile with memory="small"')
        if not self._sliced:
            found.append("compile with target_slice=True if outputs are wanted at one position")
        return [*found, "shorten the inputs"]

    def _edits(
        self,
        given: Mapping[str, Tensor],
        conditions: Conditions | None = None,
        interventions: Interventions | None = None,
    ) -> dict[str, Tensor]:
        """The inputs that edit latent values, for inputs of some sizes."""
        if not (self._editing.names or conditions or interventions):
            return {}
        sizes, device = self._sizes(given), self._attributes.device()
        batch = len(next(iter(given.values())))
        return self._editing.given(sizes, device, batch, conditions, interventions)

    def _sizes(self, given: Mapping[str, Tensor]) -> dict[str, int]:
        """The size of each symbol."""
        return {
            str(expected): size
            for name, example in self._checks.examples.items()
            for expected, size in zip(example.shape, given[name].shape, strict=True)
        }

    @property
    def _sliced(self) -> tuple[int, ...]:
        """The outputs of which the target's position alone is computed."""
        return self._rewriting.context.sliced

    def _slices(self, targets: Sequence[Target]) -> bool:
        """Whether the program that slices outputs, if it does, can serve these targets."""
        if not self._sliced:
            return True
        name = getattr(targets[0], "output", None)
        names = [self._convention.output_names[i] for i in self._sliced]
        return at_one_position(targets) and (name is None or name in names)

    def _whole(self) -> "ExplainableGraphModule":
        """The same without slicing, for targets that read more than one position."""
        if not self._sliced:
            return self
        if not self._siblings:
            context = replace(self._rewriting.context, sliced=())
            self._siblings.append(self._sibling(context))
        return self._siblings[0]

    def _positions(self, target: Target, given: Mapping[str, Tensor]) -> Tensor:
        """Each row's position, found before anything is computed."""
        sizes = self._sizes(given)
        wanted = outputs_of(self.captured.graph)[self._sliced[0]].meta["val"].shape
        shape = [int(typical_size(size, 1, sizes)) for size in wanted]
        names = self._convention.output_names
        named = dict.fromkeys(names, torch.zeros(()))
        masks = outputs_as_seen(self._convention, [None] * len(names), given).masks
        return positions_of(target, shape, Outputs(named, None, masks)).to(
            self._attributes.device()
        )

    def _run_forward(self, seeded: tuple[int, ...], given: dict[str, Tensor]) -> _Forward:
        device = self._attributes.device()
        attributes = self._attributes.values(device)
        compiled = self._programs.serving(seeded, device, given, attributes)
        self._attributes.check_dtypes(attributes)
        values = compiled.start(attributes, given)
        flat = compiled.schedule.run_forward(values, compiled.run)
        return _Forward(compiled, attributes, given, flat, self._outputs(flat, given), values)

    def _explanations(
        self, forward: _Forward, targets: Sequence[Target], shown: "_Shown"
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
        forward: _Forward,
        target: Target,
        chosen: Chosen,
        seeds: Seeds,
        read: Read,
        shown: "_Shown",
    ) -> Explanation:
        """What was read for one target, with all that an explanation shows."""
        options, flat = self._options, forward.flat
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
                self._latent, flat, read.latent, len(chosen.value), forward.given.get(POSITIONS)
            ),
        )

    def _given(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Inputs by placeholder name, checked, where the model is."""
        values = self._checks.ordered(self._named(args, inputs), self._attributes.device())
        return dict(zip(self._checks.examples, values, strict=True))

    def _named(self, args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by placeholder name: keywords, one mapping, or positional tensors."""
        if len(args) == 1 and isinstance(args[0], Mapping):
            inputs = {**args[0], **inputs}
        elif args:
            names = list(self._checks.examples)
            if len(args) > len(names):
                raise InputError(f"{len(args)} inputs given, the model takes {len(names)}")
            inputs = {**dict(zip(names, args, strict=False)), **inputs}
        return flat_inputs(inputs)

    def _seed(self, target: Target, forward: _Forward) -> tuple[Chosen, Seeds]:
        """The target, and its gradient with respect to each output that it reads."""
        flat, given, seen = forward.flat, forward.given, forward.seen
        convention, places = self._convention, self._places
        return seeds_of(target, self.rewritten, convention, flat, given, places, seen)

    def _outputs(self, flat: Sequence[Any], given: Mapping[str, Tensor]) -> Outputs:
        """The flat outputs as a target sees them."""
        return outputs_as_seen(self._convention, flat, given, self._places)

    def _default_seeds(self) -> tuple[int, ...]:
        """The outputs that the default target reads, found on the example's outputs."""
        kind = kinds_of([self._target])
        if kind not in self._seeded:
            device = self._attributes.device()
            example = {n: v.to(device) for n, v in self._convention.example.items()}
            with computing():
                flat = self._example_outputs(example)
            found = seeds_of(
                self._target, self.rewritten, self._convention, flat, example, self._places
            )
            self._seeded[kind] = tuple(sorted(found[1]))
        return self._seeded[kind]

    def _example_outputs(self, example: Mapping[str, Tensor]) -> list[Any]:
        """The flat outputs for the example; with latent values, where the target is one."""
        graph, inputs = self.captured, [*example.values()]
        if isinstance(self._target, Neuron):
            graph, inputs = self.rewritten, [*inputs, *self._edits(example).values()]
        device = self._attributes.device()
        moved = device if device != self._programs.captured_device else None
        tensors = Attributes(self.model, graph).values(device)  # the model's as they are now
        run = Runner(graph, tensors, moved).run
        return list(run(*inputs))

    def _classes(self, flat: Sequence[Any], seeded: Iterable[int]) -> tuple[int, bool]:
        """How many classes the explained output has, and whether they are tokens."""
        output = flat[next(iter(seeded))]
        return output.shape[-1], output.dim() == 3 or output.shape[-1] > 1000

    @torch.no_grad()
    def _ledger(self, read: Read, chosen: Chosen, forward: _Forward, seeds: Seeds) -> Ledger:
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


def _no_values() -> InputError:
    return InputError(
        "the model is on the meta device: there are no values to add up or to check",
        remedy='give it values: model.to_empty(device="cpu"), then load_state_dict',
    )


def _at_the_only_position(targets: Sequence[Any]) -> list[Target]:
    """Targets of outputs of which one position is left."""
    return [replace(target, position=0) for target in targets]


def _padded(relevance: Tensor, whole: Tensor) -> Tensor:
    """Relevance of a prefix as that of the whole, which is zero behind."""
    rest = whole.shape[1] - relevance.shape[1] if relevance.dim() > 1 else 0
    if not rest:
        return relevance
    return torch.nn.functional.pad(relevance, [0, 0] * (relevance.dim() - 2) + [0, rest])
