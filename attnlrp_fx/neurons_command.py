"""The commands `attnlrp-fx neurons` and `neuron`: statistics of a data set, and what they say.

Under `torchrun` every process takes its share of the data.
"""

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

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
    Html,
    Label,
    Length,
    Model,
    Quiet,
    Task,
)
from attnlrp_fx.texts import Cut, Texts, longest

if TYPE_CHECKING:
    from attnlrp_fx.statistics.report import LatentStatistics


def neurons(
    model: Model,
    data: Data,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Where results go. A run that was killed goes on if it is started again.",
            rich_help_panel="Output",
        ),
    ],
    column: Column = "text",
    latent: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="What to count: a role, as mlp.neurons, or a module; repeat it for several. "
            "[dim]\\[default: every neuron, head and expert][/dim]",
            rich_help_panel="Question",
        ),
    ] = None,
    target: Label = None,
    task: Task = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    composite: Annotated[
        str, typer.Option(metavar="NAME", help="As in explain.", rich_help_panel="Method")
    ] = "attnlrp",
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="inductor compiles first, and is worth it for many texts; or eager.",
            rich_help_panel="Method",
        ),
    ] = "inductor",
    batch_size: BatchSize = 16,
    length: Length = None,
    top: Annotated[
        int, typer.Option(metavar="N", help="Top samples of a unit.", rich_help_panel="Output")
    ] = 5,
    context: Annotated[
        int,
        typer.Option(
            metavar="N", help="Tokens kept of each, around the peak.", rich_help_panel="Output"
        ),
    ] = 32,
    quietly: Quiet = False,
    debug: Debug = False,
) -> None:
    """Collect statistics of every neuron, head and expert over a data set.

    \b
    attnlrp-fx neurons ./my-model texts.jsonl --out statistics
    attnlrp-fx neuron statistics
    torchrun --nproc-per-node 4 -m attnlrp_fx neurons ./my-model texts.jsonl --out statistics
    """
    with one_line_errors(debug), no_collection():
        texts = Texts(data, column)
        with stages(quietly) as stage:
            stage("importing PyTorch")
            from attnlrp_fx.compiler import compile, tokenize
            from attnlrp_fx.questions import target_of
            from attnlrp_fx.statistics import store

            store.need_pyarrow()
            stage("loading the model")
            place = _join_the_others(device)
            loaded, tokenizer = load(model, task, place, dtype)
            cut = Cut(tokenizer, longest(loaded, tokenizer, length))
            with quiet():
                explainer = compile(
                    loaded,
                    tokenize(cut, texts.some(2)),
                    composite=composite,
                    target=target_of(loaded, tokenizer, target, None, []),
                    backend=backend,
                    latent=latent or ["units"],
                    tokenizer=cut,
                    on_stage=stage,
                )
        from attnlrp_fx.statistics.collect import latent_statistics

        with quiet():
            found = latent_statistics(
                explainer,
                texts,
                out,
                batch_size=batch_size,
                top=top,
                context=context,
                about={"file": texts.digest, "column": column, "length": length},
                progress=not quietly,
            )
        if int(os.environ.get("RANK", 0)) == 0:
            _print_largest(found, 10)


def neuron(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What attnlrp-fx neurons has written.")
    ],
    site: Annotated[
        str | None,
        typer.Argument(
            metavar="SITE",
            help="Where the unit is: a name, or a pattern of one. [dim]\\[default: lists the most "
            "relevant units][/dim]",
        ),
    ] = None,
    index: Annotated[int, typer.Argument(metavar="INDEX", help="Its number there.")] = 0,
    html: Html = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers as JSON.")
    ] = None,
    count: Annotated[
        int, typer.Option(metavar="N", help="How many units are listed without a site.")
    ] = 20,
    debug: Debug = False,
) -> None:
    """Show a neuron, head or expert: its statistics, and its top samples as heat maps.

    \b
    attnlrp-fx neuron statistics
    attnlrp-fx neuron statistics "*layers.5.mlp*" 117 --html neuron.html
    """
    with one_line_errors(debug):
        for path in (html, json_file):
            check_writable(path)
        from attnlrp_fx.statistics.report import LatentStatistics

        found = LatentStatistics.open(directory)
        if site is None:
            if html is not None or json_file is not None:
                raise InputError(
                    "there is no unit to write about", remedy="name its site and index"
                )
            _print_largest(found, count)
            return
        unit = found.unit(_site(found, site), index)
        if html is not None:
            unit.to_html(html)
        if json_file is not None:
            write_atomically(json_file, json.dumps(unit.to_dict()) + "\n")
        Console(highlight=False).print(unit)


def _site(found: "LatentStatistics", wanted: str) -> str:
    """The one site of a name, or that a pattern matches.

    Raises:
        InputError: there is none, or there are several.
    """
    if wanted in found:
        return wanted
    matching = [name for name in found if fnmatchcase(name, wanted)]
    if len(matching) != 1:
        raise InputError(
            f"{len(matching) or 'no'} sites match '{wanted}'",
            remedy=f"choose from: {', '.join(matching or found)}",
        )
    return matching[0]


def _print_largest(found: "LatentStatistics", count: int) -> None:
    """The most relevant units as a table."""
    table = Table(title=str(found), title_justify="left", box=None)
    table.add_column("unit", no_wrap=True)
    for name in ("|relevance|", "relevance", "activation", "active", "top sample"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("site", overflow="fold")
    for unit in found.largest(count):
        top = unit.top["relevance"]
        table.add_row(
            f"{unit.unit} {unit.index}",
            f"{unit.mean_absolute['relevance']:.3g}",
            f"{unit.mean['relevance']:.3g}",
            f"{unit.mean['activation']:.3g}",
            f"{unit.active / unit.count:.0%}",
            str(top[0].sample) if top else "",
            unit.site,
        )
    Console(highlight=False).print(table)


def _join_the_others(device: str) -> str:
    """Under torchrun, meet the other processes; and this one's device."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return device
    from torch import cuda, distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo")
    if device == "cuda":
        return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % cuda.device_count()}"
    return device
