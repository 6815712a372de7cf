"""Options that several commands have, each said once; a default is the command's own."""

from pathlib import Path
from typing import Annotated

import typer

from attnlrp_fx.loading import DTYPES, TASKS

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A directory, or a name, as in explain --model.")
]
Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="A file: a text a line, or lines of JSON (.jsonl)."),
]
Column = Annotated[str, typer.Option(metavar="KEY", help="The text's key in lines of JSON.")]
Label = Annotated[
    str | None,
    typer.Option(
        metavar="LABEL",
        help="What is explained, as in explain. [dim]\\[default: the highest][/dim]",
        rich_help_panel="Question",
    ),
]
Task = Annotated[
    str | None,
    typer.Option(
        metavar="TASK",
        help=f"What the model does: {', '.join(TASKS)}. "
        "[dim]\\[default: what its config says][/dim]",
        rich_help_panel="Model",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Where it runs: cpu, cuda, cuda:1, mps.", rich_help_panel="Model"
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        metavar="NAME", help=f"In what it computes: {', '.join(DTYPES)}.", rich_help_panel="Model"
    ),
]
Rules = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="attnlrp, best, cp-lrp, ...; [bold]attnlrp-fx composites[/bold] lists them. "
        "[dim]\\[default: attnlrp, of images attnlrp-vision][/dim]",
        rich_help_panel="Method",
    ),
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", help="Texts in a batch.", rich_help_panel="Method")
]
Length = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Texts are cut to that many tokens. [dim]\\[default: what the model reads][/dim]",
        rich_help_panel="Method",
    ),
]
Html = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write a web page.", rich_help_panel="Output")
]
Json = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the numbers as JSON.", rich_help_panel="Output"),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress.", rich_help_panel="Output")
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Print an error's traceback.", rich_help_panel="Output")
]
