"""`compile` and `explain`: from a model to an explainable graph module."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from attnlrp_fx.backends import Backend, backend_named
from attnlrp_fx.capture import Inputs, capture
from attnlrp_fx.composites import Composite, composite_named
from attnlrp_fx.errors import InputError
from attnlrp_fx.explainer import ExplainableGraphModule, ExplainerOptions, Stage
from attnlrp_fx.explanation import Explanation
from attnlrp_fx.labels import Labels
from attnlrp_fx.passes import PIPELINE, Pass, PassContext, PassResult, run_passes
from attnlrp_fx.provenance import module_path, short_source, target_name
from attnlrp_fx.report import Report, RuleCount
from attnlrp_fx.targets import TargetLike, as_target


def compile(
    model: nn.Module | ExportedProgram,
    inputs: Inputs | None = None,
    *,
    composite: str | Composite = "attnlrp",
    target: TargetLike = None,
    backend: str | Backend = "inductor",
    dynamic_shapes: str | Mapping[str, Any] | None = "auto",
    explain: Sequence[str] | None = None,
    positions: bool = False,
    audit: bool = False,
    fallback: str = "error",
    tokenizer: Any = None,
    passes: tuple[Pass, ...] = PIPELINE,
    on_stage: Stage | None = None,
) -> ExplainableGraphModule:
    """Compile a model into a program that computes its outputs and their relevance.

    The model is captured, its graph rewritten with relevance rules (Achtibat et al. 2024, arXiv
    2402.05602), and the program traced and compiled. The model itself is left as it is.

    Args:
        model: a module in evaluation mode, a `fx.GraphModule`, or an `ExportedProgram`.
        inputs: example inputs by name (a tokenizer's output works), or a tensor or tuple for
            positional arguments. Sizes do not matter. An exported program brings its own.
        composite: "attnlrp", "cp-lrp", "gradient" (Gradient×Input), or a `Composite`.
        target: the default target of calls: `Logit`, `Contrast`, `LogProb`, an index, or a
            function of the outputs; None: the highest logit, at the last token that is no padding.
        backend: "inductor", "eager", or a callable as for torch.compile.
        dynamic_shapes: "auto": batch and length are dynamic where the model allows; None: none
            is; or what `torch.export.export` takes.
        explain: names of the inputs to explain; None: all that relevance can reach.
        positions: whether the share of learned and rotary positions is explained too, summed into
            the tokens that stand there (PA-LRP, Bakish et al. 2025), or held constant.
        audit: whether explanations carry the ledger of where relevance went.
        fallback: what becomes of an op that no rule claims: "error", or "gradient" to use the
            op's own gradient and say so in the report.
        tokenizer: gives explanations their tokens.
        passes: the pipeline; a longer tuple adds passes of your own.
        on_stage: called with a line of text at each slow step.

    Raises:
        CaptureError: the model cannot be captured.
        InputError: the inputs do not fit the model's forward, or none can be explained; or
            positions are to be, and there are none.
        RuleError: no rule claims an op.
        TargetError: the default target does not exist.
        BackendError: the backend is unknown or failed.

    Example:
        >>> import torch, attnlrp_fx
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> explainer = attnlrp_fx.compile(mlp.eval(), torch.ones(2, 3), backend="eager")
        >>> explainer(torch.randn(7, 3)).relevance["input"].shape
        torch.Size([7, 3])
    """
    stage = on_stage or (lambda text: None)
    composite = composite_named(composite)
    backend_named(backend)
    if fallback not in ("error", "gradient"):
        raise InputError(f"fallback is '{fallback}'", remedy="use 'error' or 'gradient'")
    stage("capturing the model")
    start = time.perf_counter()
    captured = capture(model, inputs, dynamic_shapes)
    seconds = time.perf_counter() - start
    stage("rewriting the graph")
    rewritten = _copy(captured.graph_module)
    context = PassContext(
        tuple(explain) if explain is not None else None, composite, fallback, positions
    )
    results = run_passes(rewritten, context, passes)
    report = Report(
        composite=composite.name,
        backend=backend if isinstance(backend, str) else getattr(backend, "__name__", "custom"),
        capture_seconds=seconds,
        nodes=len(captured.graph_module.graph.nodes),
        notes=captured.notes,
        passes=tuple(results),
        rules=_rule_counts(rewritten),
        fallbacks=_fallbacks(results),
    )
    module = captured.graph_module if isinstance(model, ExportedProgram) else model
    options = ExplainerOptions(
        backend=backend,
        target=as_target(target),
        audit=audit,
        labels=Labels(tokenizer, getattr(getattr(model, "config", None), "id2label", None)),
        on_stage=on_stage,
    )
    return ExplainableGraphModule(module, captured, rewritten, report, options).prepare()


def explain(
    model: nn.Module,
    tokenizer: Any,
    text: str | Sequence[str],
    *,
    target: TargetLike = None,
    composite: str | Composite = "attnlrp",
    backend: str | Backend = "eager",
    dynamic_shapes: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Explanation:
    """Explain a model's output on a text, or on several, in one line.

    Compiles the model for this one call; to explain more, keep what `compile` returns.

    Args:
        model: a transformers model in evaluation mode.
        tokenizer: its tokenizer.
        text: one text, or a batch of them (padded on the right).
        target: as in `compile`.
        composite: as in `compile`.
        backend: as in `compile`; "eager" is ready at once.
        dynamic_shapes: as in `compile`; None is ready soonest, and serves these texts only.
        **options: anything else that `compile` takes.

    Raises:
        InputError: a text is empty.
    """
    inputs = tokenize(tokenizer, text)
    explainer = compile(
        model,
        inputs,
        target=target,
        composite=composite,
        backend=backend,
        dynamic_shapes=dynamic_shapes,
        tokenizer=tokenizer,
        **options,
    )
    explanation: Explanation = explainer(inputs)
    return explanation


def tokenize(tokenizer: Any, text: str | Sequence[str]) -> dict[str, Any]:
    """Tokenize texts into one batch, padded on the right.

    Raises:
        InputError: there is no text, or one is empty.
    """
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise InputError("there is no text to explain")
    for i, item in enumerate(texts):
        if not item.strip():
            raise InputError(f"text {i} is empty", remedy="pass at least one word")
    if len(texts) > 1 and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, padding_side="right")
    return dict(batch)


def _copy(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph once more, on the same parameters."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, values)
    graph.output(output)
    return fx.GraphModule(graph_module, graph)


def _rule_counts(rewritten: fx.GraphModule) -> tuple[RuleCount, ...]:
    """Each rule and op with its count, most frequent first."""
    counts: Counter[tuple[str, str]] = Counter()
    first: dict[tuple[str, str], str] = {}
    for node in rewritten.graph.nodes:
        if "rule" in node.meta:
            op = node.meta.get("op", node.target)
            key = node.meta["rule"], op if isinstance(op, str) else target_name(op)
            counts[key] += 1
            first.setdefault(key, f"{module_path(node)} {short_source(node)}".strip())
    return tuple(RuleCount(*key, n, first[key]) for key, n in counts.most_common())


def _fallbacks(results: Sequence[PassResult]) -> tuple[str, ...]:
    notes = [note for result in results for note in result.notes]
    return tuple(n.removeprefix("gradient fallback: ") for n in notes if "gradient fallback" in n)
