"""Writing an explainer to a file: its captured graph, its weights, and how it was compiled.

The captured graph is what is saved, not the programs made of it. It is plain ATen, which
torch.export has a schema for; rewriting it takes a small part of the time that capturing takes,
and gives the very same programs. So a loaded explainer can do what the first could: other targets,
other composites, latent values, ledgers, another device.
"""

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn

from attnlrp_fx.artefacts.archive import EXPLAINER, TOKENIZER, write_archive
from attnlrp_fx.artefacts.description import (
    composite_as_json,
    context_as_json,
    passes_as_json,
    plain,
    target_as_json,
    value_as_json,
)
from attnlrp_fx.artefacts.exporting import exported_program
from attnlrp_fx.artefacts.expressions import as_text
from attnlrp_fx.artefacts.outputs import spec_as_json
from attnlrp_fx.artefacts.tokenizer import tokenizer_as_json
from attnlrp_fx.codegen.attributes import Attributes
from attnlrp_fx.codegen.report import Report
from attnlrp_fx.errors import ArtefactError
from attnlrp_fx.graph.grouped import grouped_mm
from attnlrp_fx.graph.operators import outputs_of, packet, placeholders_of
from attnlrp_fx.passes import PassContext, drop_assertions
from attnlrp_fx.runtime.loader import padding_of
from attnlrp_fx.runtime.running import Running
from attnlrp_fx.torch_private import lazy_graph_module

EXAMPLE, GIVEN, HELD = "example:", "given:", "held:"
"""How the names of constants begin that are the example's inputs."""


def save_explainer(running: Running, path: str | Path, weights: bool) -> None:
    """Write an explainer; what each argument means is with `ExplainableGraphModule.save`."""
    goal = checked_path(path)
    captured = running.convention
    graph_module = portable(captured.graph_module)
    tensors = Attributes(running.model, graph_module).values()
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ArtefactError(
            "the model is on the meta device: there are no values to save",
            remedy='give it values: model.to_empty(device="cpu"), then load_state_dict',
        )
    held = {n: v for n, v in captured.constants.items() if isinstance(v, Tensor)}
    beside = {f"{EXAMPLE}{n}": v for n, v in captured.example.items()}
    beside |= {f"{GIVEN}{n}": v for n, v in captured.given.items()}
    beside |= {f"{HELD}{n}": v for n, v in held.items()}
    about = {**description(running), "weights": weights}
    texts = {EXPLAINER: as_json_text(about)}
    tokenizer = running.options.labels.tokenizer
    if tokenizer is not None:
        texts[TOKENIZER] = tokenizer_as_json(tokenizer)
    program = exported_program(graph_module, running.model, tensors, beside, weights)
    write_archive(goal, program, texts)


def checked_path(path: str | Path) -> Path:
    """A path to write to.

    Raises:
        ArtefactError: it is a directory, or in none.
    """
    goal = Path(path)
    if goal.is_dir() or not goal.resolve().parent.is_dir():
        raise ArtefactError(
            f"cannot write '{path}'",
            why="it is a directory" if goal.is_dir() else "there is no such directory",
            remedy="name a file in a directory that is there",
        )
    return goal


def as_json_text(about: Mapping[str, Any]) -> str:
    """A description as text."""
    import json

    return json.dumps(about, indent=1, allow_nan=False)


def description(running: Running) -> dict[str, Any]:
    """All of an explainer but its graph and tensors, as JSON."""
    captured, options = running.convention, running.options
    context, programs = running.rewriting.context, options.programs
    return {
        "versions": _versions(),
        "model": type(running.model).__name__,
        "device": str(running.programs.captured_device),
        "inputs": _signature(captured.graph_module, None),
        "outputs": _signature(captured.graph_module, captured.output_names),
        "output_names": list(captured.output_names),
        "output_spec": spec_as_json(captured.output_spec),
        "constants": {
            name: None if isinstance(value, Tensor) else plain(value, f"input '{name}'")
            for name, value in captured.constants.items()
        },
        "assumptions": [as_text(relation) for relation in running.checks.assumptions],
        "composite": composite_as_json(context.composite),
        "context": context_as_json(context),
        "passes": passes_as_json(running.rewriting.passes),
        "target": target_as_json(running.target),
        "options": {
            "backend": programs.backend if isinstance(programs.backend, str) else None,
            "audit": programs.audit,
            "derived_weights": programs.derived_weights,
            "memory": programs.memory,
            "differentiable": programs.differentiable,
            "regions": programs.regions,
        },
        "labels": None
        if options.labels.id2label is None
        else {str(index): str(label) for index, label in options.labels.id2label.items()},
        "padding": padding_of(options.labels.tokenizer, running.model),
        "length": _longest(running.model),
        "normalisation": None if options.normalisation is None else asdict(options.normalisation),
        "notes": list(captured.notes),
        "report": _report(running.report),
    }


def _signature(graph_module: fx.GraphModule, outputs: tuple[str, ...] | None) -> dict[str, Any]:
    """The tensors that a graph takes, or returns, by name."""
    if outputs is None:
        nodes = placeholders_of(graph_module)
        named: Any = [(str(node.target), node) for node in nodes]
    else:
        named = zip(outputs, outputs_of(graph_module.graph), strict=True)
    values = {n: v.meta.get("val") for n, v in named if isinstance(v, fx.Node)}
    return {n: value_as_json(v) for n, v in values.items() if isinstance(v, Tensor)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("attnlrp-fx", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _longest(model: nn.Module) -> int | None:
    """How many tokens the model says that it reads."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _report(report: Report) -> dict[str, Any]:
    """What compiling did, for a reader of the file; loading makes its own."""
    return {
        "capture_seconds": report.capture_seconds,
        "nodes": report.nodes,
        "passes": {result.name: result.changes for result in report.passes},
        "rules": [asdict(row) for row in report.rules],
        "fallbacks": list(report.fallbacks),
    }


_TWINS: Mapping[str, Any] = {"transformers::grouped_mm_fallback": grouped_mm._opoverload}
"""Ops of other libraries, and those of ours that compute the same."""


def portable(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a captured graph, on the same tensors, without assertions and others' ops."""
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(graph_module.graph, values))
    copy = lazy_graph_module(graph_module, graph)
    drop_assertions(copy, PassContext())
    for node in copy.graph.nodes:
        node.target = (
            _TWINS.get(packet(node.target), node.target)
            if node.op == "call_function"
            else node.target
        )
    return copy
