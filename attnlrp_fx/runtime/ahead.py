"""Ahead of time: outputs, target and relevance as one compiled library, for Python and for C++.

    (the model's inputs, index) → (the model's outputs, value, index, the inputs' relevance)

The forward pass, the choice of the target, its seed and the way back are traced into one graph,
which AOTInductor compiles. `index` (batch,) int64 is the class or token to explain, −1 for the one
that the target chooses; what else the target says (position, contrast) is compiled in.
"""

import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.utils import _pytree as pytree

from attnlrp_fx.artefacts.archive import EXPLAINER, TOKENIZER, Archive, damage, seal
from attnlrp_fx.artefacts.description import dtype_named
from attnlrp_fx.artefacts.exporting import traced_program
from attnlrp_fx.artefacts.outputs import spec_of_json
from attnlrp_fx.artefacts.tokenizer import tokenizer_as_json, tokenizer_of_json
from attnlrp_fx.codegen.emit import clean
from attnlrp_fx.codegen.programs import Served
from attnlrp_fx.codegen.schedule import Schedule, Step, Values
from attnlrp_fx.codegen.trace import Input, Trace
from attnlrp_fx.errors import ArtefactError, BackendError, InputError
from attnlrp_fx.files import writing_atomically
from attnlrp_fx.graph.operators import placeholders_of
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.runtime.labels import Labels
from attnlrp_fx.runtime.running import Running
from attnlrp_fx.runtime.saving import as_json_text, checked_path, description
from attnlrp_fx.runtime.seeding import entering, seeds_of
from attnlrp_fx.targets import changed, outputs_as_seen, unread
from attnlrp_fx.torch_private import TRACING, fake_mode_of, fresh, mended_lowerings

INDEX = "index"
"""The name of the input that says what to explain."""


def save_ahead(running: Running, path: str | Path) -> None:
    """Compile an explainer ahead of time; see `ExplainableGraphModule.save`."""
    goal = checked_path(path)
    tokenizer = running.options.labels.tokenizer
    about = description(running)
    traced, returned = _traced(running)
    example = dict(running.convention.example)
    batch = len(next(iter(example.values())))
    example[INDEX] = torch.full((batch,), -1, device=running.programs.captured_device)
    program = traced_program(traced, running.attributes.values(), example)
    about = {**about, "aot": True, "weights": True, "returned": returned}
    with tempfile.TemporaryDirectory() as directory:
        package = Path(directory) / "model.pt2"
        try:
            with TRACING, mended_lowerings(list(example.values())):
                aoti_compile_and_package(program, package_path=str(package))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            raise BackendError(
                "AOTInductor could not compile the program",
                why=f"{type(error).__name__}: {lines[0][:300]}",
                remedy="save it without aot=True; attnlrp_fx.load compiles it where it runs",
            ) from error
        with writing_atomically(goal) as file:
            file.write(package.read_bytes())
            with zipfile.ZipFile(file, "a") as archive:
                root = archive.namelist()[0].partition("/")[0]
                archive.writestr(f"{root}/{EXPLAINER}", as_json_text(about))
                if tokenizer is not None:
                    archive.writestr(f"{root}/{TOKENIZER}", tokenizer_as_json(tokenizer))
            seal(file)


def _traced(running: Running) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The whole program of the default target, and what it returns, in order."""
    rewritten = running.rewritten
    if running.rewriting.context.sliced or running.rewriting.context.editable:
        raise ArtefactError(
            "a program that is compiled ahead of time computes the whole output, and is not edited",
            remedy="compile without target_slice=True and editable=True",
        )
    device = running.programs.captured_device
    seeded = running.default_seeds()
    schedule, _ = running.programs.planned(Served(seeded, device))
    mode, returned = fake_mode_of(rewritten), _Returned()
    attributes = running.attributes.values()
    placeholders = placeholders_of(rewritten)
    names = [str(node.target) for node in placeholders]

    with ExitStack() as stack:
        for context in (mode, torch.no_grad(), unread()):
            stack.enter_context(context)
        fakes = {
            name: fresh(mode.from_tensor(value.detach(), static_shapes=True))
            for name, value in attributes.items()
        }
        inputs = [
            torch.empty(n.meta["val"].shape, dtype=n.meta["val"].dtype, device=device)
            for n in placeholders
        ]
        index = torch.empty(inputs[0].shape[0], dtype=torch.int64, device=device)
        named = dict(zip(names, inputs, strict=True))
        trace = Trace(
            [
                *(Input("attribute", name, value) for name, value in fakes.items()),
                *(Input("input", name, value) for name, value in {**named, INDEX: index}.items()),
            ]
        )
        with trace.recording():
            results = _explained(running, schedule, fakes, named, index, returned)
        traced = trace.graph_module(results)
    clean(traced)
    return traced, {"outputs": returned.outputs, "relevance": returned.relevance}


class _Returned:
    """What a traced program returns, written down while it is traced."""

    outputs: list[Any]
    relevance: list[str]


def _explained(
    running: Running,
    schedule: Schedule,
    attributes: dict[str, Tensor],
    inputs: dict[str, Tensor],
    index: Tensor,
    returned: _Returned,
) -> list[Any]:
    """An explanation, as calls of an explainer compute it."""
    convention, places = running.convention, running.places
    rewritten = running.rewritten

    def call(step: Step, arguments: Any, values: Values) -> Any:
        return step.graph_module(*arguments)

    values = schedule.start(attributes, inputs)
    flat = schedule.run_forward(values, call)
    seen = outputs_as_seen(convention, flat, inputs, places)
    target = running.target
    default = target.choose(seen).index
    if default is not None and hasattr(target, "index"):
        target = changed(target, index=torch.where(index < 0, default, index))
    chosen, seeds = seeds_of(target, rewritten, convention, flat, inputs, places, seen)
    read = schedule.run_relevance(values, entering(schedule, seeds, flat, attributes), call)
    count = len(convention.output_names)
    returned.outputs = [None if isinstance(v, Tensor) else v for v in flat[:count]]
    returned.relevance = list(read.relevance)
    tensors = [value for value in flat[:count] if isinstance(value, Tensor)]
    what = index if chosen.index is None else chosen.index
    return [v.clone() for v in (*tensors, chosen.value, what, *read.relevance.values())]


class AheadOfTimeExplainer:
    """An explainer that was compiled ahead of time; made by `attnlrp_fx.load_aot`.

    Call it with the model's inputs. It explains the kind of target that it was compiled with.
    """

    def __init__(self, run: Callable[..., Any], about: Mapping[str, Any], tokenizer: Any) -> None:
        labels = about["labels"]
        names = None if labels is None else {int(i): str(v) for i, v in labels.items()}
        self.about = dict(about)
        """What the file says: inputs, outputs, composite, target, versions, report."""
        self.labels = Labels(tokenizer, names)
        self._run = run
        self._device = torch.device(about["device"])
        self._inputs: dict[str, Any] = about["inputs"]
        self._outputs = spec_of_json(about["output_spec"])

    def __call__(
        self, given: Mapping[str, Any] | Tensor | None = None, *, index: Any = None, **inputs: Any
    ) -> Explanation:
        """Explain a batch.

        Args:
            given: the model's inputs by name, instead of keywords; or a tensor, of one input.
            index: the class or token to explain, one for all rows or one per row, 0 or more; None:
                what the target chooses.
            **inputs: the model's inputs by name.

        Raises:
            InputError: the inputs do not fit.
        """
        named = (
            {next(iter(self._inputs)): given} if isinstance(given, Tensor) else dict(given or {})
        )
        tensors = self._checked({**named, **inputs})
        batch = len(next(iter(tensors.values())))
        wanted = torch.as_tensor(
            -1 if index is None else index, dtype=torch.int64, device=self._device
        )
        if wanted.dim() > 1 or (wanted.dim() == 1 and len(wanted) != batch):
            raise InputError(
                f"index has shape {tuple(wanted.shape)}", why=f"the batch has {batch} rows"
            )
        results = list(self._run(*tensors.values(), wanted.expand(batch).contiguous()))
        constants = self.about["returned"]["outputs"]
        flat = [results.pop(0) if constant is None else constant for constant in constants]
        value, chosen, *relevance = results
        found = dict(zip(self.about["returned"]["relevance"], relevance, strict=True))
        has_index = bool((chosen >= 0).all())
        scores = flat[0]
        return Explanation(
            relevance=found,
            outputs=pytree.tree_unflatten(flat, self._outputs),
            target_value=value,
            target=str(self.about["target"]["target"]),
            inputs=tensors,
            tokens=self.labels.tokens(tensors, list(found)),
            mask=self.labels.masks(tensors, list(found)),
            labels=self.labels.of_index(
                chosen if has_index else None,
                scores.shape[-1],
                scores.dim() == 3 or scores.shape[-1] > 1000,
            ),
            target_index=chosen if has_index else None,
        )

    def _checked(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs in order, of the dtypes and sizes that were compiled."""
        for name in inputs.keys() ^ self._inputs.keys():
            if name not in self.about["constants"]:
                what = "there is no" if name in inputs else "missing is"
                raise InputError(
                    f"{what} input '{name}'", remedy=f"pass: {', '.join(self._inputs)}"
                )
        sizes: dict[str, int] = {}
        found = {}
        for name, expected in self._inputs.items():
            value, shape = inputs[name], expected["shape"]
            fits = isinstance(value, Tensor) and value.dim() == len(shape) and value.numel() > 0
            for size, known in zip(value.shape, shape, strict=True) if fits else ():
                wanted = sizes.setdefault(known, size) if isinstance(known, str) else known
                fits = fits and size == wanted
            if not fits:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InputError(f"input '{name}' is {got}, not {tuple(shape)}")
            dtype = dtype_named(expected["dtype"])
            if value.dtype != dtype and value.is_floating_point() != dtype.is_floating_point:
                raise InputError(f"input '{name}' is {value.dtype}, not {dtype}")
            found[name] = value.to(self._device, dtype).contiguous()
        return found

    def __repr__(self) -> str:
        about = self.about
        return f"AheadOfTimeExplainer({about['model']}, {about['composite']['name']})"


def load_aot(path: str | Path) -> AheadOfTimeExplainer:
    """Load an explainer that was saved with aot=True; runs the compiled code in the file.

    Neither the model's Python code nor transformers is needed. The file holds a shared library:
    load what you trust alone.

    Args:
        path: the file; its name ends with ".pt2".

    Raises:
        ArtefactError: the file is damaged, foreign, of another version, or holds no compiled code.
        MissingExtraError: the file has a tokenizer, and the library `tokenizers` is missing.
    """
    with Archive(path) as archive, damage(path):
        about = archive.json(EXPLAINER)
        if not about.get("aot"):
            raise ArtefactError(
                f"'{path}' holds no compiled code", remedy="use attnlrp_fx.load(path)"
            )
        for name in archive.names():
            archive.check(name)
        text = archive.text(TOKENIZER) if TOKENIZER in archive.names() else None
        tokenizer = None if text is None else tokenizer_of_json(text)
        return AheadOfTimeExplainer(aoti_load_package(str(path)), about, tokenizer)
