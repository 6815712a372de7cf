"""What all commands of the command line share: progress, errors in one line, places to write to."""

import atexit
import gc
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from attnlrp_fx.errors import AttnLRPError, CaptureError, InputError, PassError, RuleError

_ABOUT_THE_MODEL = (CaptureError, RuleError, PassError)
"""Errors whose place in the model is half of the message."""


def check_writable(path: Path | None) -> None:
    """A place that cannot be written is found before anything slow.

    Raises:
        InputError: it is a directory, or in none.
    """
    if path is None:
        return
    directory = path.resolve().parent
    if path.is_dir():
        raise InputError(f"cannot write '{path}': it is a directory", remedy="name a file in it")
    if not directory.is_dir():
        raise InputError(f"cannot write '{path}': there is no directory '{directory}'")
    if not os.access(directory, os.W_OK):
        raise InputError(f"cannot write '{path}': directory '{directory}' is not writable")


@contextmanager
def stages(quietly: bool) -> Iterator[Callable[[str], None]]:
    """Show each slow step with its time while it lasts, on standard error.

    A terminal gets a list that is gone when all is done; a file or a pipe gets a line a step.
    """
    console = Console(stderr=True, highlight=False)
    if quietly:
        yield lambda text: None
    elif not console.is_terminal:
        yield lambda text: console.print(f"{text} ...", markup=False)
    else:
        columns = (
            SpinnerColumn(style="cyan", finished_text="[green]✓[/green]"),
            TextColumn("{task.description}", style="dim"),
            TextColumn("{task.elapsed:.1f} s", style="cyan"),
        )
        with Progress(*columns, console=console, transient=True) as progress:

            def stage(text: str) -> None:
                for task in progress.tasks:
                    progress.update(task.id, total=1, completed=1)
                    progress.stop_task(task.id)
                progress.add_task(text, total=None)

            yield stage


@contextmanager
def no_collection() -> Iterator[None]:
    """Look for no garbage until the command is done, nor at the exit.

    Importing PyTorch and tracing make millions of objects, and most of them stay: going through
    them again and again takes a third of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()  # all objects are old now: the next young collection need not look at them
        if enabled:
            gc.enable()


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Say what went wrong in one line on standard error, and exit with 1."""
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
            yield
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print("error:", style="bold red", end=" ")
        console.print(_sentence(error), markup=False)
        raise typer.Exit(1) from error


def _sentence(error: Exception) -> str:
    """What, where, why and what to do, in one line."""
    if isinstance(error, AttnLRPError):
        where = error.where if isinstance(error, _ABOUT_THE_MODEL) else ""
        parts = [error.what, where, error.why, error.remedy]
    elif isinstance(error, OSError) and error.filename:
        parts = [f"cannot write '{error.filename}': {error.strerror}"]
    else:
        parts = [
            f"{type(error).__name__}: {error}",
            "this is a defect of attnlrp-fx; run again with --debug and report what it prints",
        ]
    return "; ".join(" ".join(part.split()).rstrip(".") for part in parts if part)
