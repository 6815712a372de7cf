"""`load`: an explainer from a file that `ExplainableGraphModule.save` has written."""

import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from attnlrp_fx.artefacts.archive import EXPLAINER, MODEL, TOKENIZER, Archive, damage
from attnlrp_fx.artefacts.description import (
    composite_of_json,
    context_of_json,
    passes_of_json,
    target_of_json,
)
from attnlrp_fx.artefacts.graphs import read_graph
from attnlrp_fx.artefacts.outputs import spec_of_json
from attnlrp_fx.artefacts.tensors import CONSTANTS, WEIGHTS, module_of, read_tensors
from attnlrp_fx.artefacts.tokenizer import tokenizer_of_json
from attnlrp_fx.capture.capture import Captured
from attnlrp_fx.codegen.backends import Backend, backend_named, prepare
from attnlrp_fx.codegen.memory import check_memory
from attnlrp_fx.codegen.programs import ProgramOptions, Stage
from attnlrp_fx.codegen.rewriting import rewrite
from attnlrp_fx.errors import ArtefactError, BackendError, InputError
from attnlrp_fx.heatmap import Normalisation
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.runtime.labels import Labels
from attnlrp_fx.runtime.running import ExplainerOptions
from attnlrp_fx.runtime.saving import EXAMPLE, GIVEN, HELD


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    backend: str | Backend | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    on_stage: Stage | None = None,
) -> ExplainableGraphModule:
    """Load an explainer that `ExplainableGraphModule.save` has written.

    The model's Python code is not needed, nor is transformers. The graph is rewritten and traced
    again, as when it was compiled, and everything is as it was then: with backend="eager",
    explanations have the same bits. `outputs` have the model's names and are no object of its own
    class (`attnlrp_fx.artefacts.outputs.NamedOutputs`).

    Nothing of the file is run. Its graph is read as data: ops are looked up among PyTorch's own
    functional ATen ops, sizes are parsed, tensors are raw bytes, and a pickle, a custom op, a
    subgraph or any other member is an error. What this relies on: Python's zipfile and json, the
    schema 8 of torch.export, and that ATen ops check their arguments. The file's seal finds damage;
    it does not say who wrote the file, and an explanation is as good as the file's weights.

    Args:
        path: the file.
        model: of a file that was saved with weights=False, the model to explain; its tensors, by
            the names in the file, are used and shared. Of another file, these instead of its own.
        backend: "inductor", "eager" or a callable; None: the one it was compiled with.
        device: where the model goes; None: where the given model is, or where it was saved, if
            there is such a device here, or else the CPU.
        dtype: in what it computes; None: as it was saved. See `attnlrp_fx.capture.retype`.
        on_stage: called with a line of text at each slow step.

    Raises:
        ArtefactError: the file is damaged, foreign, of another version, holds compiled code (see
            `load_aot`), or needs a model; or the model has other names, shapes or dtypes.
        BackendError: the backend is unknown or failed.
        InputError: there is no such device.
        MissingExtraError: the file has a tokenizer, and the library `tokenizers` is missing.

    Example:
        >>> import torch, attnlrp_fx
        >>> from tempfile import TemporaryDirectory
        >>> mlp = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> explainer = attnlrp_fx.compile(mlp.eval(), torch.ones(2, 3), backend="eager")
        >>> with TemporaryDirectory() as directory:
        ...     explainer.save(f"{directory}/mlp.lrp.pt2")
        ...     loaded = attnlrp_fx.load(f"{directory}/mlp.lrp.pt2")
        >>> x = torch.randn(7, 3)
        >>> torch.equal(loaded(x).relevance["input"], explainer(x).relevance["input"])
        True
    """
    stage = on_stage or (lambda text: None)
    if backend is not None:
        backend_named(backend)
    stage("reading the file")
    start = time.perf_counter()
    with Archive(path) as archive, damage(path):
        about = archive.json(EXPLAINER)
        if about.get("aot"):
            raise ArtefactError(
                f"'{path}' holds compiled code, which loading it would run",
                remedy="use attnlrp_fx.load_aot(path) if you trust where it comes from",
            )
        if backend is None and about["options"]["backend"] is None:
            raise BackendError(
                f"'{path}' was compiled with a backend of its user's own",
                remedy='name one: attnlrp_fx.load(path, backend="eager")',
            )
        tokenizer = tokenizer_of_json(archive.text(TOKENIZER)) if _has(archive, TOKENIZER) else None
        place = _place(device, model, about)
        prepare(backend or about["options"]["backend"], place)
        constants = {n: v.to(place) for n, v in read_tensors(archive, CONSTANTS).items()}
        owner, weights = _owner(archive, model, about, place)
        root = module_of({**weights, **{n: v for n, v in constants.items() if ":" not in n}})
        program = archive.json(MODEL)
        captured_on = torch.device(about["device"])
        moved = {captured_on: place, torch.device(captured_on.type): place}
        graph_module = read_graph(program, about["assumptions"], root, moved, list(about["inputs"]))
        captured = _captured(graph_module, about, constants)
        seconds = time.perf_counter() - start
        options = _options(about, backend, tokenizer, on_stage)
        stage("rewriting the graph")
        context = context_of_json(about["context"], composite_of_json(about["composite"]))
        rewriting = rewrite(captured, context, passes_of_json(about["passes"]))
        explainer = ExplainableGraphModule(owner, captured, rewriting, options, seconds)
        if dtype is not None:
            explainer.to(dtype)
        return explainer.prepare()


def _has(archive: Archive, name: str) -> bool:
    return name in archive.names()


def _place(
    device: str | torch.device | None, model: nn.Module | None, about: Mapping[str, Any]
) -> torch.device:
    """Where the loaded model goes."""
    if device is not None:
        try:
            wanted = torch.device(device)
            return torch.empty(0, device=wanted).device
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise InputError(f"there is no device '{device}' here") from error
    if model is not None:
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        return torch.empty(0, device=torch.device(about["device"])).device
    except (RuntimeError, AssertionError, NotImplementedError):
        return torch.device("cpu")


def _owner(
    archive: Archive, model: nn.Module | None, about: Mapping[str, Any], place: torch.device
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model, and its tensors by the names that the graph reads.

    Raises:
        ArtefactError: there are no weights, or the model has others.
    """
    if model is None and not about["weights"]:
        raise ArtefactError(
            f"'{archive.path}' was saved without weights",
            remedy=f"pass the model, a {about['model']}: attnlrp_fx.load(path, model=model)",
        )
    if model is not None:
        table = archive.json(WEIGHTS)["config"]
        return model.to(place), _bound(archive, model, table)
    weights = read_tensors(archive, WEIGHTS)
    owner = module_of(weights).to(place)
    # What reads a model's config reads these of it.
    config: Any = SimpleNamespace(
        pad_token_id=about["padding"], max_position_embeddings=about["length"], id2label=None
    )
    owner.config = config
    return owner, {name: _tensor_named(owner, name) for name in weights}


def _bound(
    archive: Archive, model: nn.Module, table: Mapping[str, Mapping[str, Any]]
) -> dict[str, Tensor]:
    """A model's tensors, by the names in the file.

    Raises:
        ArtefactError: a name, a shape or a dtype is another.
    """
    from attnlrp_fx.artefacts.graphs import DTYPES

    found, wrong = {}, []
    for name, entry in table.items():
        shape = tuple(size["as_int"] for size in entry["tensor_meta"]["sizes"])
        dtype = DTYPES[entry["tensor_meta"]["dtype"]]
        value = _tensor_named(model, name)
        if value is None:
            wrong.append(f"it has no '{name}'")
        elif tuple(value.shape) != shape or value.dtype != dtype:
            wrong.append(
                f"'{name}' is {tuple(value.shape)} {value.dtype}, in the file {shape} {dtype}"
            )
        else:
            found[name] = value
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ArtefactError(
            f"the model, a {type(model).__name__}, is not the one of '{archive.path}'",
            why="; ".join(wrong[:3]) + more,
            remedy="pass the model that was explained, in the same dtype, or compile this one",
        )
    return found


def _tensor_named(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def _captured(
    graph_module: Any, about: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Captured:
    def beginning(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}

    return Captured(
        graph_module=graph_module,
        output_spec=spec_of_json(about["output_spec"]),
        output_names=tuple(map(str, about["output_names"])),
        example=beginning(EXAMPLE),
        given=beginning(GIVEN),
        constants={**about["constants"], **beginning(HELD)},
        notes=tuple(map(str, about["notes"])),
    )


def _options(
    about: Mapping[str, Any],
    backend: str | Backend | None,
    tokenizer: Any,
    on_stage: Stage | None,
) -> ExplainerOptions:
    written, normalisation = about["options"], about["normalisation"]
    check_memory(written["memory"])
    labels = about["labels"]
    return ExplainerOptions(
        programs=ProgramOptions(
            backend=backend_name(written["backend"]) if backend is None else backend,
            audit=bool(written["audit"]),
            derived_weights=str(written["derived_weights"]),
            memory=written["memory"],
            differentiable=bool(written["differentiable"]),
            regions=bool(written["regions"]),
            on_stage=on_stage,
        ),
        target=target_of_json(about["target"]),
        labels=Labels(
            tokenizer, None if labels is None else {int(i): str(v) for i, v in labels.items()}
        ),
        normalisation=None
        if normalisation is None
        else Normalisation(
            tuple(map(float, normalisation["mean"])),
            tuple(map(float, normalisation["std"])),
            float(normalisation["white"]),
        ),
    )


def backend_name(name: str) -> str:
    """A backend's name; raises BackendError if there is none of it."""
    backend_named(name)
    return name
