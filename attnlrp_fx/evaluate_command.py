"""The command `attnlrp-fx evaluate`: methods of explanation measured on a user's model and data."""

import json as json_format
from dataclasses import replace as replace_fields
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from attnlrp_fx.commands import check_writable, no_collection, one_line_errors, stages
from attnlrp_fx.errors import InputError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.loading import load, quiet
from attnlrp_fx.options import (
    BatchSize,
    Column,
    Data,
    Debug,
    Device,
    Dtype,
    Json,
    Label,
    Length,
    Model,
    Quiet,
    Task,
)
from attnlrp_fx.texts import Cut, Texts, longest

if TYPE_CHECKING:
    from attnlrp_fx.evaluate import Batch

DEFAULT_METHODS = "attnlrp,cp-lrp,ig,input-x-gradient,gradient-rollout,random"


def evaluate(
    model: Model,
    data: Data,
    methods: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Methods, with commas: attnlrp, cp-lrp, ig, smoothgrad, gradient, "
            "input-x-gradient, rollout, gradient-rollout, atman, kernel-shap, occlusion, random; "
            "or any composite.",
            rich_help_panel="Method",
        ),
    ] = DEFAULT_METHODS,
    column: Column = "text",
    evidence: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="The key of \\[start, end], the characters that the answer depends on; where "
            "lines have it, explanations are checked against it.",
        ),
    ] = "evidence",
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="How many texts. [dim]\\[default: all][/dim]")
    ] = None,
    target: Label = None,
    task: Task = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    steps: Annotated[
        int, typer.Option(metavar="N", help="Points of a curve.", rich_help_panel="Method")
    ] = 9,
    replace: Annotated[
        str,
        typer.Option(
            metavar="WITH",
            help="What comes in a token's place: zero or mean (of embeddings), or mask.",
            rich_help_panel="Method",
        ),
    ] = "zero",
    score: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="What is recorded: target (its logit), or probability.",
            rich_help_panel="Method",
        ),
    ] = "target",
    batch_size: BatchSize = 8,
    length: Length = None,
    json: Json = None,
    quietly: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure how faithful explanations of a model are, by several methods.

    \b
    attnlrp-fx evaluate ./my-model texts.jsonl
    attnlrp-fx evaluate ./my-model texts.jsonl --methods attnlrp,ig,occlusion --replace mask
    """
    with one_line_errors(debug), no_collection():
        check_writable(json)
        texts = Texts(data, column)
        names = [name.strip() for name in methods.split(",") if name.strip()]
        with stages(quietly) as stage:
            stage("importing PyTorch")
            from attnlrp_fx.compiler import tokenize
            from attnlrp_fx.evaluate import METHODS, Perturbation, Subject, measured, method_named
            from attnlrp_fx.evaluate.methods import Method, Relevance
            from attnlrp_fx.questions import target_of
            from attnlrp_fx.rules.composites import COMPOSITES

            chosen: dict[str, Method] = {
                name: Relevance(name)
                if name in COMPOSITES and name not in METHODS
                else method_named(name)
                for name in names
            }
            stage("loading the model")
            loaded, tokenizer = load(model, task, device, dtype)
            perturbation = Perturbation(
                steps=steps, replace=_replacement(replace, tokenizer), score=score
            )
            cut = Cut(tokenizer, longest(loaded, tokenizer, length))
            batches = _batches(cut, texts, evidence, samples, batch_size)
            with quiet():
                wanted = target_of(loaded, tokenizer, target, None, [])
                subject = Subject.compile(
                    loaded,
                    tokenize(cut, texts.some(2)),
                    input="input_ids",
                    target=wanted,
                    on_stage=stage,
                )
        with quiet():
            asked = [_with_target(batch, wanted) for batch in batches]
            scores = measured(subject, asked, chosen, perturbation, progress=not quietly)
        if json is not None:
            write_atomically(json, json_format.dumps(scores.to_dict(), ensure_ascii=False) + "\n")
        Console(highlight=False).print(scores)


def _replacement(name: str, tokenizer: Any) -> str | int:
    """What comes in a token's place, by what the command line calls it.

    Raises:
        InputError: the tokenizer has no mask token.
    """
    if name != "mask":
        return name
    token: int | None = getattr(tokenizer, "mask_token_id", None)
    if token is None:
        raise InputError("the tokenizer has no mask token", remedy="use --replace zero or mean")
    return token


def _batches(
    tokenizer: Any, texts: Texts, column: str, samples: int | None, size: int
) -> list["Batch"]:
    """The texts by length, so that little is padded; their evidence where lines have it.

    Raises:
        InputError: there are no texts, some lines have evidence and others none, or an option is
            no number of texts.
    """
    from attnlrp_fx.compiler import tokenize
    from attnlrp_fx.evaluate import Batch

    for name, number in (("--samples", samples), ("--batch-size", size)):
        if number is not None and number < 1:
            raise InputError(f"{name} is {number}", remedy="pass 1 or more")
    rows = list(zip(texts, texts.spans(column), strict=True))[:samples]
    known = [span is not None for _, span in rows]
    if any(known) and not all(known):
        raise InputError(
            f"line {known.index(False) + 1} has no '{column}', and others have",
            remedy="give it to all lines or to none",
        )
    if not rows:
        raise InputError(f"'{texts.path}' holds no texts", remedy="name another file")
    rows.sort(key=lambda row: len(row[0]))
    found = []
    for start in range(0, len(rows), size):
        some = [text for text, _ in rows[start : start + size]]
        spans = [span for _, span in rows[start : start + size] if span is not None]
        inputs = tokenize(tokenizer, some)
        found.append(
            Batch(inputs, evidence=_evidence(tokenizer, some, spans, inputs) if spans else None)
        )
    return found


def _evidence(
    tokenizer: Any, texts: list[str], spans: list[tuple[int, int]], inputs: dict[str, Any]
) -> Any:
    """(batch, length) bool: the tokens of each span.

    Raises:
        InputError: the tokenizer does not say where tokens are, or cuts the evidence off.
    """
    import torch

    found = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, (text, (start, end)) in enumerate(zip(texts, spans, strict=True)):
        try:
            places = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        except NotImplementedError as error:
            raise InputError(
                "the tokenizer does not say where its tokens are in a text",
                remedy="use a fast tokenizer, or leave evidence out",
            ) from error
        for token, (first, last) in enumerate(places):
            found[row, token] = first < end and last > start
        if not bool(found[row].any()):
            raise InputError(
                f"no token lies in characters {start} to {end} of '{text[:40]}'",
                remedy="check the span; a longer --length keeps more of the text",
            )
    return found


def _with_target(batch: "Batch", target: Any) -> "Batch":
    return replace_fields(batch, target=target)
