"""`attnlrp-fx inspect`: what the compiler makes of a model, checked, printed, or as a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from attnlrp_fx.commands import check_writable, no_collection, one_line_errors, stages
from attnlrp_fx.errors import InputError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.loading import IMAGES, load, quiet, task_of
from attnlrp_fx.options import Debug, Quiet, Rules, Task

if TYPE_CHECKING:
    from attnlrp_fx.runtime.explainer import ExplainableGraphModule

TEXT = "The plot is thin, but the performances are wonderful."
"""What is explained to lay relevance over a graph, unless something else is given."""


def inspect(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR_OR_NAME",
            help="A directory written by save_pretrained, a name on the model hub, or one in this "
            "package. [dim]\\[default: the embedded text classifier][/dim]",
        ),
    ] = None,
    given: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="TEXT|IMAGE",
            help="What the model reads; its relevance is laid over the graph. [dim]\\[default: a "
            "sentence][/dim]",
        ),
    ] = None,
    task: Task = None,
    composite: Rules = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Does every op on the path have a rule? Exit code 1 if any has none.",
        ),
    ] = False,
    show: Annotated[
        str | None,
        typer.Option(metavar="GRAPH", help="Print a graph: captured, rewritten or program."),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Print captured and rewritten side by side.")
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(metavar="NODE|MODULE", help="Print what became of a node or a module."),
    ] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Print where relevance went, and what to distrust.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page of the graph.")
    ] = None,
    dot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the graph for Graphviz.")
    ] = None,
    model_explorer: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the graph, and beside it rules and relevance as node data, for Google's "
            "model-explorer.",
        ),
    ] = None,
    flow: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the flow of relevance: .html, .png, .svg, .pdf."),
    ] = None,
    quietly: Quiet = False,
    debug: Debug = False,
) -> None:
    """Look at what the compiler makes of a model. Without options: --check.

    \b
    attnlrp-fx inspect ./my-model --check
    attnlrp-fx inspect ./my-model --html graph.html --flow flow.png
    """
    written = {"html": html, "dot": dot, "model_explorer": model_explorer, "flow": flow}
    with one_line_errors(debug), no_collection():
        for path in written.values():
            check_writable(path)
        if flow is not None and flow.suffix.lower() not in (".html", ".png", ".svg", ".pdf"):
            raise InputError(
                f"'{flow}' is no format for a picture",
                remedy="end its name with one of: .html, .png, .svg, .pdf",
            )
        with stages(quietly) as stage:
            stage("importing PyTorch")
            from attnlrp_fx.compiler import compile
            from attnlrp_fx.questions import inputs_of

            stage("loading the model")
            loaded, reader = load(model, task)
            reads_images = task_of(loaded) == IMAGES
            with quiet():
                inputs = inputs_of(loaded, reader, given or _example(reads_images), None, None)
                explainer = compile(
                    loaded,
                    inputs,
                    composite=composite or ("attnlrp-vision" if reads_images else "attnlrp"),
                    backend="eager",
                    fallback="gradient",
                    dynamic_shapes=None,
                    tokenizer=None if reads_images else reader,
                    on_stage=stage,
                )
                needs_audit = audit or any(written.values())
                stage("auditing") if needs_audit else None
                found = explainer.audit(inputs) if needs_audit else None
            stage("writing") if any(written.values()) else None
            ledger = None if found is None else found.ledger
            if html is not None:
                explainer.graph_page(html, ledger)
            if dot is not None:
                write_atomically(dot, explainer.to_dot(ledger))
            if model_explorer is not None:
                explainer.to_model_explorer(ledger).write(model_explorer)
            if flow is not None and found is not None:
                found.save(flow)
        console = Console(highlight=False)
        if show is not None:
            console.print(explainer.show(show), soft_wrap=not console.is_terminal)
        if diff:
            console.print(explainer.diff())
        if trace is not None:
            console.print(explainer.trace(trace))
        if audit:
            console.print(found)
        if check or not (show or diff or trace or audit or any(written.values())):
            _report(explainer, console)


def _example(reads_images: bool) -> list[str]:
    if reads_images:
        raise InputError("this model reads images", remedy="name one: --input digit.png")
    return [TEXT]


def _report(explainer: "ExplainableGraphModule", console: Console) -> None:
    """Print the check; an op without a rule is exit code 1."""
    found = explainer.check()
    console.print(found)
    if found.missing:
        raise typer.Exit(1)
