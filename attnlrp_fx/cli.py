"""The command line: `attnlrp-fx explain "some text"`, or images.

Standard output gets the explanation and nothing else; progress and errors go to standard error.
Exit codes: 0 done, 1 an error of ours (one line: what, why, what to do), 2 wrong usage.

PyTorch is imported where it is needed, so that `--help` answers at once.
"""

from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from attnlrp_fx import __version__
from attnlrp_fx.commands import check_writable, no_collection, one_line_errors, stages
from attnlrp_fx.compile_command import compile_command
from attnlrp_fx.doctor_command import doctor
from attnlrp_fx.errors import InputError
from attnlrp_fx.evaluate_command import evaluate
from attnlrp_fx.explain_command import (
    Question,
    TextFile,
    is_file_of_explainer,
    of_file,
    prepare,
)
from attnlrp_fx.files import write_atomically
from attnlrp_fx.inspect_command import inspect
from attnlrp_fx.loading import EMBEDDED, IMAGES, load, quiet, task_of
from attnlrp_fx.neurons_command import neuron, neurons
from attnlrp_fx.options import Debug, Device, Dtype, Html, Json, Quiet, Rules, Task
from attnlrp_fx.questions import check_images, check_texts, inputs_of, target_of

if TYPE_CHECKING:
    from attnlrp_fx.heatmap import Display
    from attnlrp_fx.runtime.explanation import Explanation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Why did a model say that? Attributes what it says to the tokens or pixels that it read.",
)

FIGURES = (".png", ".svg", ".pdf")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"attnlrp-fx {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Why did a model say that? Attributes what it says to the tokens or pixels that it read."""


@app.command()
def explain(
    given: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT|IMAGE",
            help="What the model reads: texts, or files of images; several make a batch. With "
            "--input, instead, the model.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR_OR_NAME",
            help="A directory written by save_pretrained, a file written by attnlrp-fx compile, a "
            f"name on the model hub, or one in this package: {', '.join(EMBEDDED)}. "
            "[dim]\\[default: the first, of images the second][/dim]",
            rich_help_panel="Model",
        ),
    ] = None,
    task: Task = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    target: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="What to explain: a label, a class index, or the text of one token; of a span "
            "model, start or end. [dim]\\[default: the highest][/dim]",
            rich_help_panel="Question",
        ),
    ] = None,
    position: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Where in the output sequence; negative counts from its end. "
            "[dim]\\[default: the last token][/dim]",
            rich_help_panel="Question",
        ),
    ] = None,
    contrast: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="Why the target and not this? Repeat it for several, '*' for all others.",
            rich_help_panel="Question",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="The text that a question is about.",
            rich_help_panel="Question",
        ),
    ] = None,
    decoder_text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What an encoder-decoder has written so far; its next token is explained. "
            "[dim]\\[default: nothing yet][/dim]",
            rich_help_panel="Question",
        ),
    ] = None,
    composite: Rules = None,
    backend: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="eager is ready at once, inductor compiles first. "
            "[dim]\\[default: eager, with --input inductor][/dim]",
            rich_help_panel="Method",
        ),
    ] = None,
    fallback: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What becomes of an op without a rule: error, or gradient to use its own.",
            rich_help_panel="Method",
        ),
    ] = "error",
    positions: Annotated[
        bool,
        typer.Option(
            "--positions",
            help="Explain positions too, with the tokens that stand there (PA-LRP).",
            rich_help_panel="Method",
        ),
    ] = False,
    html: Html = None,
    json: Json = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"Write a picture: {', '.join(FIGURES)}.", rich_help_panel="Output"
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--input",
            metavar="FILE",
            help="Explain every text of a file: a text a line, or lines of JSON (.jsonl).",
            rich_help_panel="Data set",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The table in Parquet. A run that was killed goes on if it is started again.",
            rich_help_panel="Data set",
        ),
    ] = None,
    column: Annotated[
        str,
        typer.Option(
            metavar="KEY", help="The text's key in lines of JSON.", rich_help_panel="Data set"
        ),
    ] = "text",
    batch_size: Annotated[
        int, typer.Option(metavar="N", help="Texts in a batch.", rich_help_panel="Data set")
    ] = 32,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Texts are cut to that many tokens. [dim]\\[default: what the model reads][/dim]",
            rich_help_panel="Data set",
        ),
    ] = None,
    smooth: Annotated[
        float,
        typer.Option(
            metavar="PIXELS",
            help="Smooth the heat maps of images in --html and --figure; sums stay.",
            rich_help_panel="Output",
        ),
    ] = 0.0,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit",
            help="Print the ledger: where relevance went and what kept some of it.",
            rich_help_panel="Output",
        ),
    ] = False,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Print what each pass did and which rule stands where.",
            rich_help_panel="Output",
        ),
    ] = False,
    quietly: Quiet = False,
    debug: Debug = False,
) -> None:
    """Explain what a model says about a text or an image.

    \b
    attnlrp-fx explain "a gripping, funny film"
    attnlrp-fx explain --model ./my-model --target " Paris" "The capital of France is"
    attnlrp-fx explain --task image-classification digit.png --figure why.png
    attnlrp-fx explain ./my-model --input texts.jsonl --output relevance.parquet
    """
    if not given and data is None and output is None:
        raise typer.BadParameter("name a text, or the file of an image", param_hint="TEXT|IMAGE")
    with one_line_errors(debug), no_collection():
        if data is not None or output is not None:
            if data is None or len(given or []) + (model is not None) > 1:
                raise InputError(
                    "--input and --output belong together, with one model",
                    remedy="attnlrp-fx explain MODEL --input texts.jsonl --output table.parquet",
                )
            question = Question(target, composite, backend or "inductor")
            with stages(quietly) as stage:
                prepared = prepare(
                    given[0] if given else model,
                    TextFile(data, column, length),
                    output,
                    (task, device, dtype),
                    question,
                    stage,
                )
            prepared.write(batch_size, progress=not quietly)
            return
        given = given or []
        check_texts(given)
        if task == IMAGES:
            check_images(given)
        for path in (html, json, figure):
            check_writable(path)
        if figure is not None and figure.suffix.lower() not in FIGURES:
            raise InputError(
                f"'{figure}' is no format for a picture",
                remedy=f"end its name with one of: {', '.join(FIGURES)}",
            )
        if smooth and html is None and figure is None:
            raise InputError(
                "--smooth has no picture to smooth",
                remedy="add --html or --figure, or leave it out",
            )
        with stages(quietly) as stage:
            stage("importing PyTorch")
            from attnlrp_fx.codegen.backends import backend_named
            from attnlrp_fx.compiler import compile
            from attnlrp_fx.heatmap import Display
            from attnlrp_fx.rules.composites import composite_named

            composite_named(composite or "attnlrp")
            backend = backend or "eager"
            backend_named(backend)
            display = Display(smooth)
            if is_file_of_explainer(model):
                asked = (position, context, decoder_text, smooth or None, positions or None)
                if contrast or fallback != "error" or asked != (None,) * len(asked):
                    raise InputError(
                        "a file says how its model is compiled; --target, --composite, --backend "
                        "and --device can be chosen",
                        remedy="leave the other options out, or name the model itself",
                    )
                question = Question(target, composite, backend)
                explainer, inputs, wanted = of_file(str(model), given, question, device, stage)
                stage("explaining")
                explanation = explainer(inputs, target=wanted)
                if audit and explanation.ledger is None:
                    found = explainer.audit(inputs, target=wanted)
                    explanation = replace(explanation, ledger=found.ledger)
            else:
                stage("loading the model")
                loaded, reader = load(model, task, device, dtype)
                reads_images = task_of(loaded) == IMAGES
                if smooth and not reads_images:
                    raise InputError("this model reads no images", remedy="leave --smooth out")
                with quiet():
                    inputs = inputs_of(loaded, reader, given, context, decoder_text)
                    wanted = target_of(loaded, reader, target, position, contrast or [])
                    explainer = compile(
                        loaded,
                        inputs,
                        composite=composite or ("attnlrp-vision" if reads_images else "attnlrp"),
                        target=wanted,
                        backend=backend,
                        fallback=fallback,
                        positions=positions,
                        audit=audit,
                        tokenizer=None if reads_images else reader,
                        processor=reader if reads_images else None,
                        dynamic_shapes="auto" if positions else None,  # else equal by chance
                        on_stage=stage,
                    )
                    stage("explaining")
                    explanation = explainer(inputs)
            if html or json or figure:
                stage("writing")
                _write(explanation, display, html, json, figure)
        console = Console(highlight=False)
        console.print(explanation)
        if audit:
            console.print(explanation.ledger)
        if report:
            console.print(explainer.report())


@app.command()
def composites(
    debug: Debug = False,
) -> None:
    """List the composites: which rule stands at which op. The first entry that fits decides."""
    with one_line_errors(debug):
        from attnlrp_fx.rules.composites import COMPOSITES

        console = Console(highlight=False)
        for name, composite in COMPOSITES.items():
            table = Table(title=name, title_justify="left", title_style="bold", box=None)
            table.add_column("", justify="right", style="dim")
            table.add_column("match")
            table.add_column("rule", style="cyan")
            for number, (match, rule) in enumerate(composite.entries, 1):
                table.add_row(str(number), str(match), str(rule))
            console.print(table)
            console.print()


app.command("compile")(compile_command)
app.command()(inspect)
app.command()(evaluate)
app.command()(neurons)
app.command()(neuron)
app.command()(doctor)


def _write(
    explanation: "Explanation",
    display: "Display",
    html: Path | None,
    json: Path | None,
    figure: Path | None,
) -> None:
    """Write what was asked for, each file whole or not at all."""
    if figure is not None:
        picture = BytesIO()
        explanation.figure(display).savefig(picture, format=figure.suffix[1:].lower())
        write_atomically(figure, picture.getvalue())
    if json is not None:
        explanation.to_json(json)
    if html is not None:
        explanation.to_html(html, display)
