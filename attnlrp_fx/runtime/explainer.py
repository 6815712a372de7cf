"""The explainable graph module: one compiled program, many explanations."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from attnlrp_fx import ops
from attnlrp_fx.calculus.tails import features_of, source_of, split_at
from attnlrp_fx.capture.capture import Captured
from attnlrp_fx.capture.retype import main_dtype, retyped
from attnlrp_fx.codegen.attributes import Attributes
from attnlrp_fx.codegen.backends import Backend
from attnlrp_fx.codegen.cost import Cost, schedule_cost
from attnlrp_fx.codegen.programs import Served
from attnlrp_fx.codegen.report import Report
from attnlrp_fx.codegen.rewriting import Rewriting, rewrite
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.sites import SAE
from attnlrp_fx.inspection.audit import Audit, audit
from attnlrp_fx.inspection.graphs import Graphs
from attnlrp_fx.inspection.inspectable import Inspectable
from attnlrp_fx.passes import Pass, PassContext
from attnlrp_fx.passes.slice_targets import POSITIONS
from attnlrp_fx.rules.composites import Composite, composite_named
from attnlrp_fx.runtime.ahead import save_ahead
from attnlrp_fx.runtime.batching import Targets
from attnlrp_fx.runtime.editing import Conditions, Interventions
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.explanations import Explanations
from attnlrp_fx.runtime.generation import explain_generation
from attnlrp_fx.runtime.mapping import Mapped, map_dataset
from attnlrp_fx.runtime.modes import computing, not_traced, short_of_memory
from attnlrp_fx.runtime.running import ExplainerOptions, Running, Sums, Weighed
from attnlrp_fx.runtime.saving import save_explainer
from attnlrp_fx.runtime.seeding import seeds_of
from attnlrp_fx.runtime.tail import Tail, compiled_tail
from attnlrp_fx.runtime.weight_relevance import WeightRelevance, weight_relevance
from attnlrp_fx.targets import (
    Target,
    TargetLike,
    TargetsLike,
    as_target,
    default_scores,
    targets_of,
)
from attnlrp_fx.torch_private import TRACING, written


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
        backend = options.programs.backend
        report = Report(
            composite=rewriting.context.composite.name,
            backend=backend if isinstance(backend, str) else getattr(backend, "__name__", "custom"),
            capture_seconds=capture_seconds,
            nodes=len(captured.graph_module.graph.nodes),
            notes=captured.notes,
            passes=rewriting.results,
            rules=rewriting.rule_counts(),
            fallbacks=rewriting.fallbacks(),
        )
        self._running = Running(model, captured, rewriting, options, report)
        self._siblings: list[ExplainableGraphModule] = []
        # The explained model is the one in evaluation mode, however it is set.
        self.training = False

    def __copy__(self) -> "ExplainableGraphModule":
        """A shallow copy shares the model and the programs."""
        made = type(self).__new__(type(self))
        made.__dict__ = {**self.__dict__, "_running": copy(self._running)}
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
        return written(self._running.convention.graph_module)

    @property
    def rewritten(self) -> fx.GraphModule:
        """Which rule stands where; takes and returns flat lists, and computes the outputs."""
        return written(self._running.rewritten)

    @property
    def program(self) -> fx.GraphModule:
        """What runs, as one graph: (parameters, inputs, seeds) → (outputs, relevance), in ATen.

        Where blocks repeat, what runs is a program for each distinct one, see `report()`; this is
        all of them, traced together when first asked for.
        """
        return self._running.programs.flat(
            self._running.default_seeds(), self._running.attributes.device()
        )

    def _inspected(self) -> Graphs:
        context, results = self._running.rewriting.context, self._running.rewriting.results
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
        if self._running.sliced:
            return self._whole()._audited(args, inputs, target, reference, **edits)
        device = self._running.attributes.device()
        if device.type == "meta":
            raise _no_values()
        given = self._running.given(args, inputs)
        wanted = self._running.target if target is None else as_target(target)
        return audit(
            self.rewritten,
            self._running.attributes.values(device),
            given | self._running.edits(given, **edits),
            lambda flat, read: seeds_of(
                wanted, self.rewritten, self._running.convention, flat, read, self._running.places
            ),
            target=str(wanted),
            masks=self._running.options.labels.masks(given, given),
            device=device if device != self._running.programs.captured_device else None,
            reference=reference,
        )

    @property
    def composite(self) -> Composite:
        """The rules that it was compiled with."""
        return self._running.rewriting.context.composite

    @property
    def explained(self) -> list[str]:
        """The names of the inputs that have relevance."""
        graph = self.rewritten.graph
        names = (str(n.kwargs["name"]) for n in graph.nodes if n.target is ops.source)
        return list(dict.fromkeys(names))

    @property
    def compilations(self) -> int:
        """How many programs have been compiled so far."""
        return len(self._running.programs.compiled)

    def report(self) -> Report:
        """What each pass did, each rule's count, ops that fell through, what was compiled."""
        return self._running.report

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
        device = self._running.attributes.device()
        if device.type == "meta" and (check_finite or self._running.options.programs.audit):
            raise _no_values()
        targets, are_several = targets_of(target, self._running.target)
        given = self._running.given(args, inputs)
        if not self._running.slices(targets):
            edits = {"conditions": conditions, "interventions": interventions}
            whole: Explanation | Explanations = self._whole()(
                given, target=target, check_finite=check_finite, **edits
            )
            return whole
        given |= self._running.edits(given, conditions, interventions)
        memory = short_of_memory(partial(self._running.savings, given, targets))
        with memory, computing(self._running.options.programs.differentiable):
            found, forward = self._running.explain(targets, given, given)
        if check_finite:
            self._running.check_finite(targets, forward)
        return Explanations(tuple(found)) if are_several else found[0]

    def explain_many(
        self,
        targets: Sequence[Target],
        inputs: Mapping[str, Tensor],
        whole: Mapping[str, Tensor] | None = None,
    ) -> tuple[Explanations, Any]:
        """Explain a batch, or a prefix of it, for several targets; see `Explains`."""
        given = self._running.given((inputs,), {})
        shown = given if whole is None else dict(self._running.given((whole,), {}))
        given = given | self._running.edits(given)
        with computing():
            found, forward = self._running.explain(targets, given, shown)
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
        given = self._running.given(args, inputs)
        return explain_generation(self._whole(), given, start, sequence, chunk)

    def lengths_like(self, name: str) -> tuple[str, ...]:
        """The inputs whose second dimension is that of an input, if it is dynamic."""
        length = self._running.checks.examples[name].shape[1]
        if is_concrete_int(length):
            return ()
        examples = self._running.checks.examples.items()
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
        if not self._running.options.programs.weights:
            return self._weighing.weigh(inputs, target, rows, sums)
        given = self._running.given((inputs,), {})
        given |= self._running.edits(given)
        wanted = self._running.target if target is None else target
        with torch.inference_mode(False), torch.no_grad():
            return self._running.weigh(wanted, given, rows, sums)

    @cached_property
    def _weighing(self) -> "ExplainableGraphModule":
        """The same with programs that return the relevance of parameters."""
        programs = replace(self._running.options.programs, weights=True, audit=False)
        options = replace(self._running.options, programs=programs)
        return self._remade(self._whole()._running.rewriting, options)

    def tail(self, name: str, backend: str | Backend = "eager") -> Tail:
        """The model from one of its explained values on, to be perturbed and differentiated.

        Args:
            name: an explained input, by name.
            backend: what runs it: "eager", "inductor", or as for `torch.compile`.

        Raises:
            InputError: it is not explained, or looked up more than once, or its tokens are moved
                before they are.
        """
        if self._running.sliced:
            return self._whole().tail(name, backend)
        source = source_of(self.rewritten, name)
        attributes = self._running.attributes.values(self._running.attributes.device())
        head, rest = split_at(self.rewritten, source, attributes)

        def check(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            given = self._running.given((inputs,), {})
            return given | self._running.edits(given)

        return Tail(
            name=name,
            features=features_of(source),
            head=head,
            rest=rest,
            compiled=compiled_tail(rest, backend),
            check=check,
            outputs=self._running.outputs,
        )

    def prepare(self) -> "ExplainableGraphModule":
        """Compile the program of the default target now rather than at the first call."""
        self._running.programs.example(
            self._running.default_seeds(), self._running.attributes.device()
        )
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
        context = replace(self._running.rewriting.context, composite=composite_named(composite))
        if latent is not None:
            context = replace(context, latent=tuple(latent))
        return self._sibling(context, passes).prepare()

    def _sibling(
        self, context: PassContext, passes: tuple[Pass, ...] | None = None
    ) -> "ExplainableGraphModule":
        """The same model rewritten otherwise."""
        before = self._running.rewriting.passes
        with TRACING:
            rewriting = rewrite(self._running.convention, context, passes or before)
        return self._remade(rewriting, self._running.options)

    def _remade(
        self, rewriting: Rewriting, options: ExplainerOptions, captured: Captured | None = None
    ) -> "ExplainableGraphModule":
        """An explainer of the same model, by another rewriting."""
        convention = captured or self._running.convention
        seconds = self._running.report.capture_seconds
        made = ExplainableGraphModule(self.model, convention, rewriting, options, seconds)
        # The model may have moved since it was captured.
        made._running.programs.captured_device = self._running.programs.captured_device
        return made

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `.to`, `.half`, `.double` and the like do: move or convert the model.

        On another device, programs are compiled at the next call. In another dtype, the captured
        graph is converted as well, see `attnlrp_fx.capture.retype`, rewritten and compiled.
        """
        running, tensors = self._running, Attributes(self.model, self.captured).values
        old = main_dtype(tensors())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no types here
        new = main_dtype(tensors())
        if old is not None and new is not None and old != new:
            with TRACING:
                captured = retyped(running.convention, tensors(), old, new)
                before = running.rewriting
                rewriting = rewrite(captured, before.context, before.passes)
            # Nothing made of the old graph stays, neither programs nor what was cached of it.
            self.__dict__ = self._remade(rewriting, running.options, captured).__dict__
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
            save_ahead(self._running, path)
        else:
            save_explainer(self._running, path, weights)

    @property
    def tokenizer(self) -> Any:
        """What cuts texts, and gives explanations their tokens; None if there is none."""
        return self._running.options.labels.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        labels = replace(self._running.options.labels, tokenizer=tokenizer)
        self._running.options = replace(self._running.options, labels=labels)

    def refresh(self) -> None:
        """Compute kept derived weights anew at the next call.

        Needed only with `derived_weights="keep"`, after writing to parameters in a way that
        PyTorch does not count: through `.data`, or from outside of PyTorch.
        """
        self._running.programs.forget_derived()

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
        values = self._running.checks.ordered(
            self._running.named(args, inputs), torch.device("meta")
        )
        given = dict(zip(self._running.checks.examples, values, strict=True))
        if self._running.sliced:
            given[POSITIONS] = values[0].new_empty(len(values[0]), dtype=torch.int64)
        given |= {name: edit.to("meta") for name, edit in self._running.edits(given).items()}
        seeded, own = self._running.default_seeds(), self._running.attributes.device()
        wanted = own if device is None else torch.device(device)
        same = wanted == own
        found = (
            self._running.programs.example(seeded, own).schedule
            if same
            else self._running.programs.planned(Served(seeded, wanted))[0]
        )
        return schedule_cost(found, given)

    def _whole(self) -> "ExplainableGraphModule":
        """The same without slicing, for targets that read more than one position."""
        if not self._running.sliced:
            return self
        if not self._siblings:
            context = replace(self._running.rewriting.context, sliced=())
            self._siblings.append(self._sibling(context))
        return self._siblings[0]


def _no_values() -> InputError:
    return InputError(
        "the model is on the meta device: there are no values to add up or to check",
        remedy='give it values: model.to_empty(device="cpu"), then load_state_dict',
    )
