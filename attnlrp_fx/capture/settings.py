"""The settings in which a model can be captured, made for that time and put back.

Found by mechanism, never by a model's name: whatever has a config that says `use_cache` keeps no
cache; implementations of attention and of experts that cannot be traced give way to ones that can.
Parameters that asked for gradients ask again, whatever the export did.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

TRACEABLE_EXPERTS = ("grouped_mm", "batched_mm")
"""transformers' implementations of a mixture of experts that do not branch on data, best first.

Tokens sorted by expert and multiplied group by group, or a matrix of weights gathered for each.
"""


@contextmanager
def capturable(model: nn.Module) -> Iterator[list[str]]:
    """Put a model into a state in which it can be captured, and back.

    Yields:
        A list of notes on what was set.
    """
    notes: list[str] = []
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs |= {id(c): c for parent in list(configs.values()) for c in _sub_configs(parent)}
    caching = [c for c in configs.values() if getattr(c, "use_cache", False)]
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    replaced = implementation not in (None, "eager", "sdpa")
    switchable: Any = model
    requires_grad = [p for p in model.parameters() if p.requires_grad]
    experts = _experts_implementations(model)
    try:
        for config in caching:
            config.use_cache = False
        if caching:
            notes.append("key-value caches are off while the model is captured")
        if replaced:
            switchable.set_attn_implementation("sdpa")
            notes.append(f"attention '{implementation}' is captured as 'sdpa'")
        for name in dict.fromkeys(map(_set_traceable_experts, experts)):
            notes.append(f"experts are captured as '{name}'")
        yield notes
    finally:
        for config in caching:
            config.use_cache = True
        if replaced:
            switchable.set_attn_implementation(implementation)
        for module, before in experts.items():
            module.set_experts_implementation(before)
        for parameter in requires_grad:
            parameter.requires_grad_(True)


def _experts_implementations(model: nn.Module) -> dict[Any, dict[str, str | None]]:
    """The modules whose experts run in a way that cannot be captured, and what they are set to.

    A loop over the experts that were chosen depends on data; others call kernels of their own.
    """
    found: dict[Any, dict[str, str | None]] = {}
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if not hasattr(module, "set_experts_implementation"):
            continue
        before = module.get_experts_implementation()
        if module._can_set_experts_implementation() and before[""] not in TRACEABLE_EXPERTS:
            found[module] = before
    return found


def _set_traceable_experts(module: Any) -> str:
    """Set a module's experts to the first implementation that it takes, and name it."""
    *preferred, last = TRACEABLE_EXPERTS
    for name in preferred:
        with suppress(ValueError, ImportError):
            module.set_experts_implementation(name)
            return name
    module.set_experts_implementation(last)
    return last


def _sub_configs(config: Any) -> list[Any]:
    names = getattr(config, "sub_configs", None) or {}
    return [sub for name in names if (sub := getattr(config, name, None)) is not None]
