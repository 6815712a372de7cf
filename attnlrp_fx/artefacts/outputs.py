"""A model's output object without the model's code.

What a model returns is described by its containers: tuples, lists and dicts are themselves again;
any other container becomes `NamedOutputs`, whose items are attributes, and have keys and numbers.
"""

from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree as pytree

_PLAIN: Mapping[type, str] = {tuple: "tuple", list: "list", dict: "dict"}


class NamedOutputs(dict[str, Any]):
    """Outputs by name, also as attributes and by their place: `outputs.logits`, `outputs[0]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the outputs are {', '.join(self)}, not '{name}'") from None

    def __getitem__(self, key: Any) -> Any:
        return self.to_tuple()[key] if isinstance(key, int | slice) else super().__getitem__(key)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values in order."""
        return tuple(self.values())


pytree.register_pytree_node(
    NamedOutputs,
    lambda outputs: (list(outputs.values()), list(outputs)),
    lambda values, names: NamedOutputs(zip(names, values, strict=True)),
    serialized_type_name="attnlrp_fx.artefacts.outputs.NamedOutputs",
    flatten_with_keys_fn=lambda outputs: (
        [(pytree.MappingKey(name), value) for name, value in outputs.items()],
        list(outputs),
    ),
)


def spec_as_json(spec: pytree.TreeSpec) -> Any:
    """The containers of outputs, and their names, as JSON."""
    return _described(pytree.tree_unflatten(range(spec.num_leaves), spec))


def _described(value: Any) -> Any:
    if isinstance(value, int):
        return None
    parts = pytree.tree_flatten_with_path(value, is_leaf=lambda part: part is not value)[0]
    names = [_name(path[0]) for path, _ in parts]
    kind = _PLAIN.get(type(value), "named")
    return {
        "kind": kind,
        "items": [[n, _described(p)] for n, (_, p) in zip(names, parts, strict=True)],
    }


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def spec_of_json(written: Any) -> pytree.TreeSpec:
    """The containers that `spec_as_json` described.

    Raises:
        ValueError, KeyError, TypeError: it is none of these.
    """
    return pytree.tree_structure(_container(written))


def _container(written: Any) -> Any:
    if written is None:
        return 0
    kind, items = written["kind"], [(str(n), _container(part)) for n, part in written["items"]]
    if kind in ("tuple", "list"):
        parts = [part for _, part in items]
        return tuple(parts) if kind == "tuple" else parts
    if kind in ("dict", "named"):
        return dict(items) if kind == "dict" else NamedOutputs(items)
    raise ValueError(f"outputs are no '{kind}'")
