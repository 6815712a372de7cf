"""`attnlrp-fx doctor`: does everything work here? Versions, devices, and a self-test.

The self-test explains a sentence with the embedded classifier: its outputs must be the model's own,
its ledger must close, and Inductor's program must agree with the one that runs op by op.
"""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from attnlrp_fx.commands import no_collection, one_line_errors, stages
from attnlrp_fx.errors import AttnLRPError
from attnlrp_fx.loading import load, quiet
from attnlrp_fx.options import Debug, Quiet

if TYPE_CHECKING:
    from attnlrp_fx.runtime.explanation import Explanation

SENTENCE = "The performances are wonderful, but the story is a mess."
FOR_DEVELOPERS = ("test", "benchmark")
"""The extras that no user needs."""
TOLERANCE = 1e-4
"""Of float32 results, relative to the largest."""


class Finding(NamedTuple):
    """What was looked at, and what was found."""

    what: str
    found: str
    is_well: bool | None = True
    """None: neither well nor ill, only good to know."""
    remedy: str = ""


def doctor(
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out Inductor, which takes a minute or so.")
    ] = False,
    quietly: Quiet = False,
    debug: Debug = False,
) -> None:
    """Check that everything works here: versions, devices, the compiler, a self-test.

    The exit code is 1 if anything that is needed does not work.
    """
    with one_line_errors(debug), no_collection():
        with stages(quietly) as stage:
            findings = [*versions(), *machine()]
            stage("importing PyTorch")
            findings += devices()
            for name, check in self_tests(quick):
                stage(name)
                findings.append(_tried(name, check, debug))
        _show(findings)
        if any(finding.is_well is False for finding in findings):
            raise typer.Exit(1)


def versions() -> Iterator[Finding]:
    """What is installed, against what this package asks for; extras are good to know."""
    from packaging.requirements import Requirement

    yield Finding("attnlrp-fx", version("attnlrp-fx"))
    yield Finding("Python", platform.python_version(), sys.version_info >= (3, 11))
    missing: dict[str, list[str]] = {}
    for line in requires("attnlrp-fx") or []:
        wanted = Requirement(line)
        extra = next((e for e in _extras() if _is_for(wanted, e)), None)
        if extra in FOR_DEVELOPERS:
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = ""
        if extra is not None:
            lacking = missing.setdefault(extra, [])
            if not found:
                lacking.append(wanted.name)
            continue
        is_well = bool(found) and wanted.specifier.contains(found, prereleases=True)
        remedy = f'pip install "{wanted.name}{wanted.specifier}"'
        yield Finding(wanted.name, found or "not installed", is_well, "" if is_well else remedy)
    for extra, lacks in missing.items():
        found = f"lacks {', '.join(lacks)}" if lacks else "installed"
        remedy = f'pip install "attnlrp-fx[{extra}]"' if lacks else ""
        yield Finding(f"extra '{extra}'", found, None if lacks else True, remedy)


def _extras() -> list[str]:
    return metadata("attnlrp-fx").get_all("Provides-Extra") or []


def _is_for(wanted: Any, extra: str) -> bool:
    """Whether a requirement is an extra's, and not everybody's."""
    marker = wanted.marker
    return marker is not None and "extra" in str(marker) and marker.evaluate({"extra": extra})


def machine() -> Iterator[Finding]:
    """The operating system, processor and compiler."""
    yield Finding("machine", f"{platform.platform()}, {os.cpu_count()} cores")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    remedy = "" if compiler else 'install g++, or use backend="eager"'
    yield Finding("C++ compiler", compiler or "none found", bool(compiler) or None, remedy)


def devices() -> Iterator[Finding]:
    """Where models can run."""
    import torch

    yield Finding("CPU threads", str(torch.get_num_threads()))
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        memory = about.total_memory / 2**30
        yield Finding(f"cuda:{number}", f"{about.name}, {memory:.0f} GiB")
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        remedy = "check the driver: PyTorch is built for one" if built else ""
        yield Finding("GPU", "none that PyTorch can use", None, remedy)


def self_tests(quick: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """The parts of the self-test by name, each of which returns what it found, or raises."""
    import torch

    explained: dict[str, Explanation] = {}

    def eagerly() -> str:
        explained["eager"] = _explained("cpu", "eager")
        ledger = explained["eager"].ledger
        assert ledger is not None
        _check(abs(ledger.residual) <= TOLERANCE * max(1.0, abs(ledger.target)), "does not close")
        return f"outputs are the model's, the ledger closes to {abs(ledger.residual):.0e}"

    def agrees(device: str, backend: str) -> Callable[[], str]:
        def check() -> str:
            start = time.perf_counter()
            found = _explained(device, backend)
            seconds = time.perf_counter() - start
            difference = _difference(found.relevance, (explained.get("eager") or found).relevance)
            _check(difference <= TOLERANCE, f"relevance differs by {difference:.0e}")
            return f"ready after {seconds:.0f} s, relevance differs by {difference:.0e}"

        return check

    yield "self-test, eager", eagerly
    if not quick:
        yield "self-test, inductor", agrees("cpu", "inductor")
    if torch.cuda.is_available():
        yield "self-test, eager on cuda", agrees("cuda", "eager")
        if not quick:
            yield "self-test, inductor on cuda", agrees("cuda", "inductor")


def _explained(device: str, backend: str) -> "Explanation":
    """The sentence explained; its outputs are the model's own."""
    import torch

    from attnlrp_fx.compiler import compile
    from attnlrp_fx.questions import inputs_of

    model, tokenizer = load("sentiment", device=device)
    with quiet():
        inputs = inputs_of(model, tokenizer, [SENTENCE], None, None)
        explainer = compile(model, inputs, backend=backend, audit=True, dynamic_shapes=None)
        explanation: Explanation = explainer(inputs)
        with torch.no_grad():
            expected = model(**{name: value.to(device) for name, value in inputs.items()})
    difference = _difference({"logits": explanation.outputs.logits}, {"logits": expected.logits})
    _check(difference <= TOLERANCE, f"outputs differ from the model's by {difference:.0e}")
    refused = [why for made in explainer.report().compilations for why in made.refused]
    _check(not refused, f"programs run op by op: {', '.join(refused)}")
    return explanation


def _difference(found: Any, expected: Any) -> float:
    """The largest difference of tensors by name, relative to the largest of each."""
    pairs = ((found[name].cpu(), tensor.cpu()) for name, tensor in expected.items())
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def _check(is_well: bool, why: str) -> None:
    if not is_well:
        raise AttnLRPError(why)


def _tried(name: str, check: Callable[[], str], debug: bool) -> Finding:
    """What a check says, or why it failed."""
    try:
        return Finding(name, check())
    except Exception as error:
        if debug:
            raise
        reason = " ".join(str(error).split())[:200]
        return Finding(name, f"{type(error).__name__}: {reason}", False, "see it with --debug")


def _show(findings: list[Finding]) -> None:
    signs = {True: "[green]✓[/green]", False: "[bold red]✗[/bold red]", None: "[dim]·[/dim]"}
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        text = f"{finding.found}; {finding.remedy}" if finding.remedy else finding.found
        table.add_row(signs[finding.is_well], finding.what, text)
    Console(highlight=False).print(table)
