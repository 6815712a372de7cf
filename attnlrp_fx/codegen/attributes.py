"""A program's parameters, buffers and constants, read from the model at every call.

Names are the model's own, so what the model holds now is what the program runs with. Constants that
only the captured graph has are moved to the program's device once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnlrp_fx.errors import InputError


class Attributes:
    """The tensors that a graph reads, by name.

    Args:
        model: the model that was captured; its tensors win.
        graph_module: the captured graph, which holds everything else.
    """

    def __init__(self, model: nn.Module, graph_module: fx.GraphModule) -> None:
        targets = (str(n.target) for n in graph_module.graph.find_nodes(op="get_attr"))
        self._owners: dict[str, tuple[Any, str]] = {}
        self._constants: dict[str, Tensor] = {}
        for target in dict.fromkeys(targets):
            if isinstance(_read(model, target), Tensor):
                path, _, leaf = target.rpartition(".")
                self._owners[target] = (model.get_submodule(path), leaf)
            elif isinstance(value := _read(graph_module, target), Tensor):
                self._constants[target] = value
        self._dtypes = {name: value.dtype for name, value in self.values().items()}

    def device(self) -> torch.device:
        """Where the model is: the device of its first tensor."""
        for owner in self._owners.values():
            device: torch.device = getattr(*owner).device
            return device
        return next((c.device for c in self._constants.values()), torch.device("cpu"))

    def values(self, device: torch.device | None = None) -> dict[str, Tensor]:
        """Every tensor by name, constants on the given device."""
        found: dict[str, Tensor] = {n: getattr(*owner) for n, owner in self._owners.items()}
        for name, constant in self._constants.items():
            if device is not None and constant.device != device:
                self._constants[name] = constant = constant.to(device)
            found[name] = constant
        return found

    def parameters(self) -> frozenset[str]:
        """The names of those that are parameters."""
        found = (
            n for n, owner in self._owners.items() if isinstance(getattr(*owner), nn.Parameter)
        )
        return frozenset(found)

    def check_dtypes(self, values: Mapping[str, Tensor]) -> None:
        """Raise InputError if a parameter's dtype has changed since the model was captured."""
        for name, dtype in self._dtypes.items():
            value = values[name]
            if value.dtype != dtype:
                raise InputError(
                    f"parameter '{name}' is {value.dtype} now",
                    why=f"the model was compiled when it was {dtype}",
                    remedy="change it by explainer.to(dtype), or compile the model again",
                )


def _read(root: nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part, None)
    return value


class Derived:
    """Values that a program computes from parameters alone, kept until a parameter changes.

    Args:
        inputs: names of the parameters.
        names: names of the values.
        run: parameters → values.

    A change is what PyTorch counts: an in-place op, an optimiser's step, `load_state_dict`, another
    tensor in the parameter's place. What is written through `.data` it does not count.
    """

    def __init__(
        self, inputs: Sequence[str], names: Sequence[str], run: Callable[..., Any]
    ) -> None:
        self._inputs, self._names, self._run = inputs, names, run
        self._made_of: list[Any] | None = None
        self._values: list[Tensor] = []

    def values(self, attributes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values by name."""
        inputs = [attributes[name] for name in self._inputs]
        versions = [_version(tensor) for tensor in inputs]
        if self._made_of is None or None in versions or versions != self._made_of:
            self._values = list(self._run(*inputs))
            self._made_of = versions
        return dict(zip(self._names, self._values, strict=True))

    def forget(self) -> None:
        """Compute the values anew at the next call."""
        self._made_of = None


def _version(tensor: Tensor) -> tuple[int, int, int] | None:
    """What changes with a tensor's values; None where PyTorch does not count changes."""
    if tensor.is_inference():
        return None
    return id(tensor), tensor.data_ptr(), tensor._version
