"""Capture: a model as one functional ATen graph.

Everything goes through `torch.export`: a module, a `fx.GraphModule`, an `ExportedProgram`. What
the table of operators knows stays whole (linear, layer_norm, attention, SiLU, ...), everything else
is decomposed by PyTorch's own decompositions; in-place ops and no-grad regions are gone. Parameters
are the model's own objects. What a transformers model needs to be captured (no cache, an attention
implementation in plain ops) is set for the time of the capture and put back.

Batch and length of every input are tried as dynamic; the capture says which ones stayed so. Where a
model branches on values of its inputs, those that may decide (sizes, then masks) are held at the
example's values, and the capture says so.
"""

import inspect
import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, is_concrete_int
from torch.utils import _pytree as pytree

from attnlrp_fx.capture.functionalise import functional
from attnlrp_fx.capture.known import holding
from attnlrp_fx.capture.settings import capturable
from attnlrp_fx.errors import CaptureError, InputError
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.torch_private import (
    lazy_graph_module,
    nothing_remembered,
    own_backwards,
    unlike_symbols,
    written_late,
)

MANY = 200
"""Modules from which on a model repeats itself so often that remembering what ops make of sizes
pays; what a shallow model has is sooner found anew."""

TOKENS = ("input_ids", "inputs")
"""How the names of inputs end that hold tokens: never held at the example's values."""

Inputs = Mapping[str, Any] | Tensor | tuple[Any, ...]


@dataclass(frozen=True)
class Captured:
    """A model's graph and how to call it."""

    graph_module: fx.GraphModule
    """Placeholders are the tensor inputs, in order; the output is the flat list of outputs."""
    output_spec: pytree.TreeSpec
    """Puts flat outputs back into the model's own output object."""
    output_names: tuple[str, ...]
    """Name of each flat output: "logits", "hidden_states.0", ..."""
    example: dict[str, Tensor]
    """The example inputs that were captured, by placeholder: the argument's name, and its path."""
    given: dict[str, Tensor] = field(default_factory=dict)
    """The example inputs as they were given: a single row is captured as two."""
    constants: dict[str, Any] = field(default_factory=dict)
    """Inputs that are part of the graph: no tensors, or held at the example's values."""
    notes: tuple[str, ...] = ()
    """What capture had to change or give up, for the report."""


def capture(
    model: nn.Module | ExportedProgram,
    inputs: Inputs | None,
    dynamic_shapes: str | Mapping[str, Any] | None = "auto",
) -> Captured:
    """Capture a model as a functional ATen graph.

    Args:
        model: a module in evaluation mode, or an exported program.
        inputs: example inputs by argument name; a tensor or a tuple for positional arguments; an
            exported program has its own.
        dynamic_shapes: "auto" tries every dimension of every tensor as dynamic, of images and
            videos the batch alone; None fixes all; a mapping goes to `torch.export.export` as it
            is.

    Raises:
        CaptureError: the model cannot be captured, or is in training mode.
        InputError: the inputs do not fit the model's forward.
    """
    if isinstance(model, ExportedProgram):
        if model.example_inputs is None:
            raise CaptureError(
                "the exported program has no example inputs",
                remedy="export it again, or load it with its example inputs",
            )
        args, kwargs = model.example_inputs
        leaves = [*pytree.tree_leaves(args), *pytree.tree_leaves(kwargs)]
        return _captured(model, leaves, leaves, {}, ())
    containers = (nn.ModuleList, nn.ModuleDict)  # never called, and new in every slice
    parts = [(n, m) for n, m in model.named_modules() if not isinstance(m, containers)]
    training = [name or "the model" for name, part in parts if part.training]
    if training:
        raise CaptureError(
            "the model is in training mode",
            where=training[0],
            why="dropout and batch statistics would make explanations random",
            remedy="call model.eval() first",
        )
    if inputs is None:
        raise InputError("there are no example inputs", remedy="pass them as compile's inputs=")
    named = bind(model, inputs)
    with ExitStack() as stack:
        notes = tuple(stack.enter_context(capturable(model)))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(unlike_symbols())
        stack.enter_context(written_late())
        if sum(1 for _ in model.modules()) < MANY:
            stack.enter_context(nothing_remembered())
        own = stack.enter_context(own_backwards())
        exported, example, held, given_up = _export_known(model, named, dynamic_shapes)
        notes += given_up
        notes += tuple(
            f"'{name}' has a backward of its own: relevance follows the derivative of its forward"
            for name in own
        )
        constants = {k: v for k, v in example.items() if not _has_tensors(v)} | held
        given = {name: None if value is None else named[name] for name, value in example.items()}
        leaves, given_leaves = pytree.tree_leaves(example), pytree.tree_leaves(given)
        return _captured(exported, leaves, given_leaves, constants, notes)


def _export_known(
    model: nn.Module, named: dict[str, Any], dynamic_shapes: str | Mapping[str, Any] | None
) -> tuple[ExportedProgram, dict[str, Any], dict[str, Tensor], tuple[str, ...]]:
    """Export; where that fails or sizes are read off values, with inputs known that may decide.

    Returns:
        The program, the inputs that it takes, those that it holds, and notes on what that cost.

    Raises:
        CaptureError: it fails with all of them known, too. The failure with none known is reported.
    """
    failures: list[CaptureError] = []
    found: list[tuple[ExportedProgram, dict[str, Any], dict[str, Tensor], tuple[str, ...]]] = []
    for held in _deciding(named):
        given = {name: None if name in held else value for name, value in named.items()}
        enlarge = dynamic_shapes == "auto" and not held
        example = _enlarged(given) if enlarge else _distinct(given)
        notes = tuple(
            f"input '{name}' decides the model's path: it is held at the example's values"
            for name in held
        )
        try:
            if dynamic_shapes == "auto":
                exported, fixed = _export_dynamic(model, example, held)
                notes += fixed
            else:
                shapes: Any = dynamic_shapes
                if isinstance(shapes, Mapping):
                    shapes = {n: None if n in held else shape for n, shape in shapes.items()}
                exported = _export(model, example, shapes, held)
            found.append((exported, example, held, notes))
        except CaptureError as error:
            failures.append(error)
            continue
        if not _has_sizes_from_values(exported):
            return found[-1]
    if not found:
        raise failures[0]
    return found[0]


def _has_sizes_from_values(exported: ExportedProgram) -> bool:
    """Whether a floating value has a size that was read off a tensor: relevance can get stuck."""
    return any(
        value.is_floating_point() and free_unbacked_symbols(value)
        for node in exported.graph.nodes
        if isinstance(value := node.meta.get("val"), Tensor)
    )


def _deciding(named: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Inputs to hold if need be, ever more: none, sizes, masks too, all integers but token ids.

    Sizes are integers in another shape than tokens: the grid of an image, the lengths of its parts.
    """
    flags = (torch.int64, torch.int32, torch.bool)
    integers = {n: v for n, v in named.items() if isinstance(v, Tensor) and v.dtype in flags}
    tokens = {n: v for n, v in integers.items() if n.endswith(TOKENS)}
    others = {n: v for n, v in integers.items() if n not in tokens}
    masks = {n: v for n, v in others.items() if n.endswith("mask") or v.dtype == torch.bool}
    shapes = {v.shape for v in tokens.values()}
    sizes = {n: v for n, v in others.items() if n not in masks and v.shape not in shapes}
    levels: list[dict[str, Tensor]] = [{}]
    for level in (sizes, sizes | masks, others):
        if level.keys() != levels[-1].keys():
            levels.append(level)
    return levels


def _export_dynamic(
    model: nn.Module, example: dict[str, Any], held: Mapping[str, Tensor]
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export with every dimension dynamic; where that fails, with the batch alone, then with none.

    Returns:
        The program, and a note on what had to be given up.

    Raises:
        CaptureError: it fails without dynamic dimensions, too: that is the failure to report.
    """
    try:
        return _export(model, example, _auto_shapes(example), held), ()
    except CaptureError as error:
        why = error.why
    try:
        shapes, left = _auto_shapes(example, (0,)), "all but the batch"
        exported = _export(model, example, shapes, held)
    except CaptureError:
        exported, left = _export(model, example, None, held), "every size"
    return exported, (f"{left} is fixed: it could not be captured as dynamic ({why})",)


def _export(
    model: nn.Module, example: dict[str, Any], shapes: Any, held: Mapping[str, Tensor]
) -> ExportedProgram:
    if isinstance(shapes, Mapping):
        shapes = _by_parameter(model, shapes)
    try:
        # Within no_grad, a region of the model's own without gradients has no mark. Of a failure,
        # torch.export prints the graph so far, thousands of lines.
        with torch.enable_grad(), redirect_stderr(io.StringIO()), holding(model, held):
            return torch.export.export(model, (), example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _capture_error(model, error) from error


def _by_parameter(model: nn.Module, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes by forward's parameters: those of further keywords stand under its `**kwargs`."""
    parameters = inspect.signature(model.forward).parameters
    further = {name: shape for name, shape in shapes.items() if name not in parameters}
    named = {name: shape for name, shape in shapes.items() if name in parameters}
    rest = [name for name, p in parameters.items() if p.kind is p.VAR_KEYWORD]
    return {**named, rest[0]: further} if further and rest else dict(shapes)


def bind(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Example inputs by the names of the model's forward arguments.

    Raises:
        InputError: a name that forward does not have, or more values than it takes.
    """
    signature = inspect.signature(model.forward)
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    if isinstance(inputs, tuple):
        try:
            return dict(signature.bind(*inputs).arguments)
        except TypeError as error:
            raise InputError(
                "the inputs do not fit the model's forward",
                where=f"{type(model).__name__}.forward{signature}",
                why=str(error),
            ) from error
    named = dict(inputs)
    if not named:
        raise InputError("there are no inputs", remedy="pass example inputs by name")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = [name for name in named if name not in signature.parameters]
    if unknown and not takes_any:
        raise InputError(
            f"the model's forward has no argument '{unknown[0]}'",
            where=f"{type(model).__name__}.forward",
            remedy=f"pass some of: {', '.join(signature.parameters)}",
        )
    return named


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _enlarged(inputs: dict[str, Any]) -> dict[str, Any]:
    """Example inputs whose dynamic dimensions are two or more.

    Sizes 0 and 1 are burnt into a graph, so a batch of one is doubled, and so is a length of one.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    batches = {t.shape[0] for t in tensors if t.dim()}
    doubled = {0} if batches == {1} else set()
    tokens = [t for t in tensors if t.dim() == 2 and not t.is_floating_point()]
    doubled |= {1} if tokens and {t.shape[1] for t in tokens} == {1} else set()

    def enlarge(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        dims = {d for d in doubled if d < leaf.dim() and (d == 0 or not leaf.is_floating_point())}
        return leaf.repeat([2 if d in dims else 1 for d in range(leaf.dim())])

    enlarged: dict[str, Any] = pytree.tree_map(enlarge, inputs)
    return enlarged


def _distinct(inputs: dict[str, Any]) -> dict[str, Any]:
    """Example inputs of which no two are one tensor: export would take one for the other."""
    copied = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, inputs)
    assert isinstance(copied, dict)
    return copied


def _auto_shapes(inputs: dict[str, Any], dynamic: Sequence[int] | None = None) -> dict[str, Any]:
    """Dimensions of every tensor as `Dim.AUTO`: dynamic unless the model fixes them.

    None: all of a sequence's; of images and videos the batch. Their height and width are a model's
    own, and where windows and patches are cut from them, symbolic arithmetic takes minutes.
    """

    def dims(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        allowed = range(1 if leaf.dim() > 3 else 3) if dynamic is None else dynamic
        return {d: Dim.AUTO for d in range(leaf.dim()) if d in allowed}

    return {name: pytree.tree_map(dims, value) for name, value in inputs.items()}


def _captured(
    exported: ExportedProgram,
    example: Sequence[Any],
    given: Sequence[Any],
    constants: dict[str, Any],
    notes: tuple[str, ...],
) -> Captured:
    """Normalise an exported program to functional ATen and read its calling convention."""
    graph_module = functional(exported)
    out_spec = exported.call_spec.out_spec
    assert out_spec is not None
    graph_module = _flat(graph_module)
    names = tuple(str(n.target) for n in graph_module.graph.find_nodes(op="placeholder"))
    outputs = outputs_of(graph_module.graph)
    output_names = _paths(pytree.tree_unflatten(list(range(len(outputs))), out_spec))
    notes += _static_notes(graph_module)
    captured, asked = (
        dict(zip(names, (leaf for leaf in leaves if isinstance(leaf, Tensor)), strict=True))
        for leaves in (example, given)
    )
    return Captured(graph_module, out_spec, output_names, captured, asked, constants, notes)


def flat_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs by placeholder name: a nested argument's tensors are named by their path."""
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Mapping | list | tuple) and _has_tensors(value):
            for path, leaf in pytree.tree_flatten_with_path(value)[0]:
                keys = (str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
                flat["_".join((name, *keys))] = leaf
        elif value is not None:
            flat[name] = value
    return flat


def _flat(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The same graph taking and returning flat lists, without export's calling convention."""
    graph = graph_module.graph
    for node in graph.find_nodes(op="placeholder"):
        if not isinstance(node.meta.get("val"), Tensor):
            node.replace_all_uses_with(node.meta.get("val"))
            graph.erase_node(node)
    graph.set_codegen(fx.graph.CodeGen())
    return lazy_graph_module(graph_module, graph)


def _paths(tree: Any) -> tuple[str, ...]:
    """The name of each leaf of a tree of positions, in order."""
    found = pytree.tree_flatten_with_path(tree)[0]
    names = {}
    for path, position in found:
        keys = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
        names[position] = ".".join(str(key) for key in keys) or "output"
    return tuple(names[position] for position in range(len(found)))


def _static_notes(graph_module: fx.GraphModule) -> tuple[str, ...]:
    """Which leading dimensions of the inputs capture could not keep dynamic."""
    notes = []
    for node in graph_module.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        leading = 1 if value.dim() > 3 else min(value.dim(), 2)
        fixed = [d for d in range(leading) if is_concrete_int(value.shape[d])]
        is_sequence = not value.is_floating_point() or value.dim() == 3
        if fixed and (0 in fixed or is_sequence):
            sizes = ", ".join(f"dimension {d} = {value.shape[d]}" for d in fixed)
            notes.append(f"input '{node.target}' is fixed to {sizes}")
    return tuple(notes)


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """What stopped torch.export, with the user's own line."""
    message = str(error).strip().splitlines() or [type(error).__name__]
    return CaptureError(
        f"{type(model).__name__} could not be captured by torch.export",
        where=_user_line(error),
        why=f"{type(error).__name__}: {message[0]}",
        remedy=_remedy(error),
    )


def _user_line(error: BaseException) -> str:
    """The innermost frame of an error that lies outside PyTorch."""
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    own = [f for f in frames if "/torch/" not in f.filename and "/attnlrp_fx/" not in f.filename]
    if not own:
        return ""
    frame = own[-1]
    code = frame.code_context[0].strip() if frame.code_context else ""
    return f"{frame.filename}:{frame.lineno}: {code}"


def _remedy(error: Exception) -> str:
    text = f"{type(error).__name__} {error}"
    if "DataDependent" in text or "data-dependent" in text or "GuardOnData" in text:
        return (
            "the model branches or loops on values of its inputs at this line; replace it by "
            "torch.where or torch.cond, or choose an implementation of the model without it"
        )
    if isinstance(error, TypeError | ValueError | KeyError):
        return "check that the example inputs run: model(**inputs)"
    return "check that model(**inputs) runs, and see the cause above"
