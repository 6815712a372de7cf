"""`compile`, `explain` and the like: from a model to an explainable graph module."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from attnlrp_fx.capture.autocast import without_autocast
from attnlrp_fx.capture.capture import Captured, Inputs, capture
from attnlrp_fx.codegen.backends import Backend, backend_named, prepare
from attnlrp_fx.codegen.memory import Memory, check_memory
from attnlrp_fx.codegen.programs import ProgramOptions, Stage
from attnlrp_fx.codegen.rewriting import rewrite
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.sites import SAE
from attnlrp_fx.heatmap import Normalisation
from attnlrp_fx.neurons import Neuron
from attnlrp_fx.passes import PIPELINE, Pass, PassContext
from attnlrp_fx.rules.composites import Composite, composite_named
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.explanations import Explanations
from attnlrp_fx.runtime.labels import Labels
from attnlrp_fx.runtime.running import ExplainerOptions
from attnlrp_fx.targets import Target, TargetLike, as_target, outputs_as_seen
from attnlrp_fx.torch_private import TRACING

P = ParamSpec("P")
R = TypeVar("R")


def _one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """A function that only one thread runs at a time."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with TRACING:
            return function(*args, **kwargs)

    return alone


@_one_at_a_time
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
    target_slice: bool = False,
    audit: bool = False,
    latent: Sequence[str | SAE] = (),
    editable: bool = False,
    derived_weights: str = "recompute",
    memory: Memory = "fast",
    regions: bool = True,
    differentiable: bool = False,
    fallback: str = "error",
    tokenizer: Any = None,
    processor: Any = None,
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
        composite: "attnlrp", "best", "cp-lrp", "gradient" (Gradient×Input), or a `Composite`.
        target: the default target of calls: `Logit`, `Contrast`, `LogProb`, an index, or a
            function of the outputs; None: the highest logit, at the last token that is no padding.
        backend: "inductor", "eager", or a callable as for torch.compile.
        dynamic_shapes: "auto": batch and length are dynamic where the model allows; None: none
            is; or what `torch.export.export` takes.
        explain: names of the inputs to explain; None: all that relevance can reach.
        positions: whether the share of learned and rotary positions is explained too, summed into
            the tokens that stand there (PA-LRP, Bakish et al. 2025), or held constant.
        target_slice: whether only what the target's position needs is computed, forward and
            relevance: of a language model's logits that position alone, so that `outputs` hold no
            other. A target that reads more compiles a program more, without slicing.
        audit: whether explanations carry the ledger of where relevance went.
        latent: latent values whose activation and relevance explanations carry, by role
            ("mlp.neurons", "attention.heads", "attention.weights", "residual", "router",
            "experts"), by what modules give ("model.layers.*.mlp.act_fn"; `*` is a part of a path,
            `**` any number) or take ("input:model.layers.*.mlp"), or by node of the captured
            graph; a `SAE` makes the features of a sparse autoencoder latent values.
        editable: whether calls may change these values and mask their relevance; they are then
            computed at all positions, also under `target_slice`.
        derived_weights: what becomes of values made of parameters alone, as |W| under a γ rule:
            "recompute" at every explanation, or "keep", which is faster and takes the memory that
            the report states; see `ExplainableGraphModule.refresh`.
        memory: how much of the forward pass is kept for relevance: "fast"; "small" computes each
            block again when relevance reaches it; "balanced"; or a budget in bytes for inputs of
            the example's sizes, parameters apart. The report has the predicted peak.
        regions: whether repeated blocks are found and each distinct one is compiled once, so that
            compiling takes no longer for a deeper model; otherwise everything is one program.
        differentiable: whether relevance and outputs of calls can be differentiated, exactly, by
            parameters and float inputs; attention is then computed as it is written, not by a
            fused kernel. `attnlrp_fx.training` has losses. Compiled under `torch.autocast`, the
            program has its casts; `memory` is "fast" or "small" (checkpoints of autograd's).
        fallback: what becomes of an op that no rule claims: "error", or "gradient" to use the
            op's own gradient and say so in the report.
        tokenizer: gives explanations their tokens.
        processor: gives explanations their images as they were: an image processor, or anything
            with `image_mean` and `image_std`.
        passes: the pipeline; a longer tuple adds passes of your own.
        on_stage: called with a line of text at each slow step.

    Raises:
        CaptureError: the model cannot be captured.
        InputError: the inputs do not fit the model's forward, or none can be explained; or
            positions are to be, and there are none; or what the processor does cannot be undone;
            or there is no latent value of a name, or relevance never reaches it.
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
    if derived_weights not in ("recompute", "keep"):
        raise InputError(
            f"derived_weights is '{derived_weights}'", remedy="use 'recompute' or 'keep'"
        )
    check_memory(memory)
    if differentiable:
        _check_differentiable(derived_weights, memory)
    normalisation = None if processor is None else Normalisation.of(processor)
    stage("capturing the model")
    start = time.perf_counter()
    prepare(backend, next((p.device for p in model.parameters()), torch.device("cpu")))
    captured = capture(model, inputs, dynamic_shapes)
    seconds = time.perf_counter() - start
    stage("rewriting the graph")
    wanted = as_target(target)
    context = PassContext(
        explain=tuple(explain) if explain is not None else None,
        composite=composite,
        fallback=fallback,
        positions=positions,
        latent=tuple(latent),
        editable=editable,
        sliced=_sliced(captured, wanted) if target_slice else (),
    )
    rewriting = rewrite(captured, context, passes)
    module = captured.graph_module if isinstance(model, ExportedProgram) else model
    options = ExplainerOptions(
        programs=ProgramOptions(
            backend=backend,
            audit=audit,
            derived_weights=derived_weights,
            memory=memory,
            differentiable=differentiable,
            regions=regions,
            on_stage=on_stage,
        ),
        target=wanted,
        labels=Labels(tokenizer, getattr(getattr(model, "config", None), "id2label", None)),
        normalisation=normalisation,
    )
    explainer = ExplainableGraphModule(module, captured, rewriting, options, seconds)
    return explainer.prepare()


def _check_differentiable(derived_weights: str, memory: Memory) -> None:
    """Raise InputError for options that autograd does not go with."""
    if derived_weights == "keep":
        raise InputError(
            "derived_weights='keep' keeps values from call to call, and gradients go through them",
            remedy="use derived_weights='recompute' with differentiable=True",
        )
    if memory not in ("fast", "small"):
        raise InputError(
            f"memory is {memory!r}, and autograd keeps what no program knows of",
            why="peaks are predicted for programs that nobody differentiates",
            remedy="use memory='small', which checkpoints each block, or 'fast'",
        )


def _sliced(captured: Captured, target: Target) -> tuple[int, ...]:
    """The outputs of which a target reads one position of each row; none if it is latent."""
    if isinstance(target, Neuron):
        return ()
    with torch.no_grad(), without_autocast():
        flat = captured.graph_module(*captured.example.values())
    chosen = target.choose(outputs_as_seen(captured, flat, captured.example))
    names = [seed.output for seed in chosen.seeds if seed.position is not None]
    return tuple(captured.output_names.index(name) for name in names)


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
        **options: anything else that `compile` takes; `target_slice` is on, so that `outputs`
            hold a language model's logits at the explained position alone.

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
        **{"target_slice": True, **options},
    )
    explanation: Explanation = explainer(inputs)
    return explanation


def explain_generation(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Mapping[str, Tensor],
    *,
    max_new_tokens: int = 20,
    generate: Mapping[str, Any] | None = None,
    chunk: int = 16,
    composite: str | Composite = "attnlrp",
    backend: str | Backend = "eager",
    **options: Any,
) -> Explanations:
    """Let a language model continue a text, and explain every token that it wrote, in one line.

    Token t is explained by its logit at position t − 1, whose relevance lies on the tokens before
    it (of an encoder-decoder, on the source as well). Compiles the model for this one call; to
    explain more, keep what `compile` returns, and call its `explain_generation`.

    Args:
        model: a transformers language model in evaluation mode, decoder-only or encoder-decoder.
        tokenizer: its tokenizer.
        prompt: a text, or what the tokenizer made of one (of a chat, by `apply_chat_template`).
        max_new_tokens: how many tokens are written at most; fewer if the model ends its text.
        generate: what else `model.generate` takes, as ``{"do_sample": True}``; it is greedy
            otherwise.
        chunk: how many tokens share a run of the model.
        composite: as in `compile`.
        backend: as in `compile`; "eager" is ready at once.
        **options: anything else that `compile` takes.

    Returns:
        One explanation a token written, the end of the text included: `target_index` is the token,
        `labels` its text, and `relevance` (1, tokens written, length) of the whole text, zero at
        and behind the token.

    Raises:
        InputError: the prompt is empty or not one row, or the model cannot write, or wrote nothing.
        CaptureError: the model cannot be captured.
        RuleError: no rule claims an op.

    Example:
        >>> import torch, attnlrp_fx
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(
        ...     vocab_size=9, n_embd=8, n_head=2, bos_token_id=None, eos_token_id=None
        ... )
        >>> prompt = {"input_ids": torch.tensor([[5, 2, 7]])}
        >>> written = attnlrp_fx.explain_generation(
        ...     GPT2LMHeadModel(config).eval(), None, prompt, max_new_tokens=4
        ... )
        >>> written.relevance["input_ids"].shape
        torch.Size([1, 4, 7])
    """
    inputs = tokenize(tokenizer, prompt) if isinstance(prompt, str) else dict(prompt)
    inputs, start = _written(model, inputs, {"max_new_tokens": max_new_tokens, **(generate or {})})
    sequence = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    one_length = inputs[sequence].shape[1] - start <= chunk
    if options.get("positions"):  # found by sizes, of which some may be equal by chance
        one_length = False
    options = {"dynamic_shapes": None if one_length else "auto", **options}
    explainer = compile(
        model, inputs, composite=composite, backend=backend, tokenizer=tokenizer, **options
    )
    return explainer.explain_generation(inputs, start=start, sequence=sequence, chunk=chunk)


def _written(
    model: Any, prompt: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], int]:
    """The inputs with what a model writes, and the position of the first token of that.

    Raises:
        InputError: it cannot, or wrote nothing.
    """
    ids = prompt.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != 1 or not ids.numel():
        shape = tuple(ids.shape) if isinstance(ids, Tensor) else "missing"
        raise InputError(
            f"the prompt's input_ids are {shape}, not (1, length)",
            remedy='pass one text, or what a tokenizer makes of it with return_tensors="pt"',
        )
    if not hasattr(model, "generate"):
        raise InputError(
            f"a {type(model).__name__} does not generate text",
            remedy="load the model as a language model, with AutoModelForCausalLM, say",
        )
    inputs = {n: v.to(model.device) if isinstance(v, Tensor) else v for n, v in prompt.items()}
    try:
        found = model.generate(**inputs, **{"do_sample": False, "num_beams": 1, **options})
    except (IndexError, TypeError, ValueError) as error:
        raise InputError(
            "the model could not generate", why=" ".join(str(error).split())
        ) from error
    written: Tensor = getattr(found, "sequences", found)
    if len(written) != 1:
        raise InputError(f"the model wrote {len(written)} texts", remedy="let it return one")
    decoding = bool(getattr(model.config, "is_encoder_decoder", False))
    given = inputs.get("decoder_input_ids", written[:, :1]) if decoding else inputs["input_ids"]
    start = given.shape[1]
    if not torch.equal(written[:, :start], given):  # the decoder's first token was put before it
        start += 1
    new = written.shape[1] - start
    if new < 1:
        raise InputError(
            "the model wrote nothing", why="its text ended with the prompt", remedy="extend it"
        )
    if decoding:
        return {**inputs, "decoder_input_ids": written}, start
    # The mask, token types and the like go on as they end.
    alike = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.shape == given.shape}
    longer = {n: torch.cat([v, v[:, -1:].expand(-1, new)], 1) for n, v in alike.items()}
    return {**inputs, **longer, "input_ids": written}, start


def explain_image(
    model: nn.Module,
    processor: Any,
    image: Any,
    *,
    composite: str | Composite = "attnlrp-vision",
    backend: str | Backend = "eager",
    dynamic_shapes: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Explanation:
    """Explain a model's output on an image, or on several, in one line.

    Compiles the model for this one call; to explain more, keep what `compile` returns.

    Args:
        model: a transformers model in evaluation mode.
        processor: its image processor.
        image: one image (as of `PIL.Image`), or a list of them.
        composite: as in `compile`; γ in convolutions and linear layers.
        backend: as in `compile`; "eager" is ready at once.
        dynamic_shapes: as in `compile`; None is ready soonest, and serves these images only.
        **options: anything else that `compile` takes.

    Raises:
        InputError: there is no image, or one that the processor cannot read.
    """
    inputs = preprocess(processor, image, getattr(model, "dtype", None))
    explainer = compile(
        model,
        inputs,
        composite=composite,
        backend=backend,
        dynamic_shapes=dynamic_shapes,
        processor=processor,
        **options,
    )
    explanation: Explanation = explainer(inputs)
    return explanation


def preprocess(processor: Any, image: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Images as one batch for a model, in as many channels as the processor has means for.

    Args:
        processor: an image processor of transformers.
        image: one image, or a list of them.
        dtype: of the model; None: as the processor makes them.

    Raises:
        InputError: there is no image, or one that the processor cannot read.
    """
    images = list(image) if isinstance(image, list | tuple) else [image]
    if not images:
        raise InputError("there is no image to explain")
    mean = getattr(processor, "image_mean", None)
    mode = _MODES.get(len(mean)) if isinstance(mean, Sequence) else None
    if mode is not None:
        images = [each.convert(mode) if hasattr(each, "convert") else each for each in images]
    try:
        batch = dict(processor(images=images, return_tensors="pt"))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the processor, a {type(processor).__name__}, cannot read what it was given",
            why=" ".join(str(error).split()),
            remedy="pass images of PIL, one or a list of them",
        ) from error
    return {
        name: value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in batch.items()
    }


_MODES = {1: "L", 3: "RGB"}
"""How PIL names images of so many channels."""


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
