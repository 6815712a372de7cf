"""The command `attnlrp-fx compile`: a model to a file, to be explained without the model's code."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from attnlrp_fx.commands import check_writable, no_collection, one_line_errors, stages
from attnlrp_fx.errors import InputError
from attnlrp_fx.loading import IMAGES, load, quiet, task_of
from attnlrp_fx.options import Debug, Dtype, Model, Quiet, Rules, Task
from attnlrp_fx.questions import inputs_of, target_of

EXAMPLES = ["The plot is thin, but the performances are wonderful.", "Dull."]
"""What a model that reads texts is captured with: of unlike lengths, so that one is padded."""


def compile_command(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FILE", help="The file, as model.lrp.pt2.")
    ],
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="TEXT|IMAGE",
            help="An example of what the model reads. [dim]\\[default: two sentences][/dim]",
        ),
    ] = None,
    context: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text that a question is about.")
    ] = None,
    task: Task = None,
    dtype: Dtype = "float32",
    target: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="What is explained unless something else is asked for. "
            "[dim]\\[default: the highest][/dim]",
        ),
    ] = None,
    composite: Rules = None,
    weights: Annotated[
        bool, typer.Option(help="Whether the weights are in the file; if not, it needs the model.")
    ] = True,
    aot: Annotated[
        bool,
        typer.Option(
            "--aot", help="Compile ahead of time instead, for attnlrp_fx.load_aot and for C++."
        ),
    ] = False,
    quietly: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compile a model into a file that explains itself, without the model's code.

    \b
    attnlrp-fx compile ./my-model -o my-model.lrp.pt2
    attnlrp-fx explain --model my-model.lrp.pt2 "a gripping, funny film"
    attnlrp-fx explain my-model.lrp.pt2 --input texts.jsonl --output relevance.parquet
    """
    with one_line_errors(debug), no_collection():
        check_writable(out)
        if out.suffix != ".pt2":
            raise InputError(f"'{out}' has no name for it", remedy="end it with .lrp.pt2")
        with stages(quietly) as stage:
            stage("importing PyTorch")
            from attnlrp_fx.compiler import compile

            stage("loading the model")
            loaded, reader = load(model, task, "cpu", dtype)
            reads_images = task_of(loaded) == IMAGES
            if reads_images and not given:
                raise InputError("this model reads images", remedy="name one: --input digit.png")
            with quiet():
                explainer = compile(
                    loaded,
                    inputs_of(loaded, reader, given or EXAMPLES, context, None),
                    composite=composite or ("attnlrp-vision" if reads_images else "attnlrp"),
                    target=target_of(loaded, reader, target, None, []),
                    backend="eager",
                    tokenizer=None if reads_images else reader,
                    processor=reader if reads_images else None,
                    on_stage=stage,
                )
                stage("compiling ahead of time" if aot else "writing")
                explainer.save(out, weights=weights, aot=aot)
        Console(highlight=False).print(f"{out}: {out.stat().st_size / 1e6:.1f} MB", soft_wrap=True)
