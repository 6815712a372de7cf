"""What makes an explainer, as JSON: composite, target, options, inputs and outputs.

Rules, matchers and targets are dataclasses, written as their class's name and fields. Names are
looked up in the tables below; what is not in them cannot be saved, and is not made when it is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from attnlrp_fx import passes as all_passes
from attnlrp_fx.errors import ArtefactError
from attnlrp_fx.neurons import Neuron
from attnlrp_fx.passes import OPTIONAL, PIPELINE, Pass, PassContext
from attnlrp_fx.rules import rules
from attnlrp_fx.rules.composites import Composite, Match
from attnlrp_fx.rules.rules import Rule
from attnlrp_fx.targets import Contrast, Logit, LogProb, Target

RULES: Mapping[str, type] = {
    name: value
    for name, value in vars(rules).items()
    if isinstance(value, type) and issubclass(value, Rule) and value is not Rule
}
TARGETS: Mapping[str, type] = {one.__name__: one for one in (Logit, Contrast, LogProb, Neuron)}
PASSES: Mapping[str, Pass] = {
    one.__name__: one for one in (*PIPELINE, *OPTIONAL) if hasattr(all_passes, one.__name__)
}


def composite_as_json(composite: Composite) -> dict[str, Any]:
    """A composite: its name, and its entries in order."""
    entries = []
    for match, rule in composite.entries:
        if RULES.get(type(rule).__name__) is not type(rule):
            raise ArtefactError(
                f"rule {rule} of composite '{composite.name}' cannot be saved",
                why="its class is not one of this package, and a file holds no code",
                remedy="use the package's rules",
            )
        entries.append([_fields(match), {"rule": type(rule).__name__, **_fields(rule)}])
    return {"name": composite.name, "entries": entries}


def composite_of_json(written: Mapping[str, Any]) -> Composite:
    """The composite that was written."""
    entries = []
    for match, rule in written["entries"]:
        name, *_ = (rule["rule"],)
        options = {key: value for key, value in rule.items() if key != "rule"}
        entries.append((_made(Match, match), _made(RULES[name], options)))
    return Composite(str(written["name"]), tuple(entries))


def target_as_json(target: Target) -> dict[str, Any]:
    """A target: its class, and what it asks for."""
    if TARGETS.get(type(target).__name__) is not type(target):
        raise ArtefactError(
            f"target '{target}' cannot be saved",
            why="it is a function, and a file holds no code",
            remedy="compile with a Logit, say, and pass the function when you explain",
        )
    return {"target": type(target).__name__, **_fields(target)}


def target_of_json(written: Mapping[str, Any]) -> Target:
    """The target that was written."""
    options = {key: value for key, value in written.items() if key != "target"}
    found: Target = _made(TARGETS[written["target"]], options)
    return found


def passes_as_json(pipeline: Sequence[Pass]) -> list[str]:
    """The names of passes."""
    for one in pipeline:
        name = getattr(one, "__name__", str(one))
        if PASSES.get(name) is not one:
            raise ArtefactError(
                f"pass '{name}' cannot be saved",
                why="it is not one of this package, and a file holds no code",
                remedy="compile with the package's passes",
            )
    return [one.__name__ for one in pipeline]


def passes_of_json(written: Sequence[str]) -> tuple[Pass, ...]:
    """The passes of some names."""
    return tuple(PASSES[name] for name in written)


def context_as_json(context: PassContext) -> dict[str, Any]:
    """What passes were told, but the composite."""
    for one in context.latent:
        if not isinstance(one, str):
            raise ArtefactError(
                f"{one} cannot be saved",
                why="an autoencoder is a module with code of its own",
                remedy="compile without it",
            )
    kept = {key: value for key, value in _fields(context).items() if key != "composite"}
    return {key: plain(value) for key, value in kept.items()}


def context_of_json(written: Mapping[str, Any], composite: Composite) -> PassContext:
    """What passes were told."""
    found: PassContext = _made(PassContext, {**written, "composite": composite})
    return found


def plain(value: Any, where: str = "an option") -> Any:
    """A value as JSON.

    Raises:
        ArtefactError: it is more than numbers and texts.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(each, where) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, where) for each in value]
    if isinstance(value, Tensor):
        return value.tolist()
    raise ArtefactError(
        f"{where} cannot be saved: it is a {type(value).__name__}",
        why="a file holds numbers, texts and tensors",
    )


def value_as_json(value: Tensor) -> dict[str, Any]:
    """An input or output: dtype, and sizes, of which dynamic ones are names."""
    sizes = [int(s) if is_concrete_int(s) else str(s) for s in value.shape]
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": sizes}


def dtype_named(name: str) -> torch.dtype:
    """A dtype by its name.

    Raises:
        ValueError: there is none.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"there is no dtype '{name}'")
    return found


def _fields(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, tensors as lists."""
    found = {field.name: getattr(value, field.name) for field in fields(value)}
    return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in found.items()}


def _made(kind: Any, options: Mapping[str, Any]) -> Any:
    """A dataclass of its fields; lists as tuples, so that it stays hashable."""
    known = {field.name for field in fields(kind)}
    if not options.keys() <= known:
        raise ValueError(f"{kind.__name__} has no '{min(options.keys() - known)}'")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in options.items()})
