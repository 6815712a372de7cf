"""Inputs that are known while a model is captured: what decides its path through the code.

Some integer inputs are no data but sizes: the grid of an image's patches, the lengths of its parts.
A model reads them as numbers (`grid.tolist()`, `if mask.any()`), and a traced value has none. Held
at the example's values they have: beside each traced value that depends on known values alone goes
a shadow, the value itself, from which numbers are read. Where even a size depends on values
(nonzero, an index of booleans), the shadow enters the graph as a constant.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from attnlrp_fx.torch_private import outside_of_tracing

NUMBERS = (
    *(torch.arange, torch.tensor, torch.linspace, torch.zeros, torch.ones, torch.full),
    *(torch.div, torch.floor_divide),
)
"""Functions that make tensors of plain numbers."""
LIKE = (
    *(torch.zeros_like, torch.ones_like, torch.full_like),
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full),
)
"""Functions that take nothing but shape and dtype from a tensor."""
READS = (
    *(Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
    *(Tensor.__index__, Tensor.__contains__, Tensor.equal, torch.equal, torch.is_nonzero),
)
"""Functions that return numbers."""
RESHAPES = (Tensor.view, Tensor.reshape, Tensor.expand, torch.reshape, Tensor.as_strided)
"""Functions that take sizes."""
SIZED_BY_VALUES = (
    torch.tensor,
    *(torch.nonzero, Tensor.nonzero, torch.argwhere, torch.masked_select, Tensor.masked_select),
    *(torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive),
    *(torch.repeat_interleave, Tensor.repeat_interleave, torch.bincount, Tensor.bincount),
)
"""Functions whose output has a size that depends on values."""
LARGEST = 1 << 22
"""How many elements a shadow may have."""


@contextmanager
def holding(model: nn.Module, known: Mapping[str, Tensor]) -> Iterator[None]:
    """Give a model's forward some inputs by itself, known while it is traced.

    Args:
        model: the model; it is left as it was.
        known: inputs by argument name, tensors with values.
    """
    if not known:
        yield
        return
    held = {name: value.clone() for name, value in known.items()}

    def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, **{name: value.clone() for name, value in held.items()}}

    handle = model.register_forward_pre_hook(give, with_kwargs=True)
    try:
        with _Shadows(held.values()):
            yield
    finally:
        handle.remove()


class _Shadows(TorchFunctionMode):
    """Computes what depends on known values alone for real, too."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.shadows = {id(value): (value, value) for value in known}
        """By identity: a tensor, kept alive, and its values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._is_known(func, args, kwargs):
            if args and _writes(func):
                self.shadows.pop(id(args[0]), None)
            return func(*self._with_numbers(func, args), **kwargs)
        with outside_of_tracing():
            real = func(*self._real(args), **self._real(kwargs))
        if func in READS:
            return real
        by_value = func in SIZED_BY_VALUES and any(map(_is_tensor, pytree.tree_leaves(args)))
        if by_value or (func is Tensor.__getitem__ and _has_booleans(args[1])):
            traced = real
        else:
            traced = func(*self._with_numbers(func, args), **kwargs)
        pairs = zip(pytree.tree_leaves(traced), pytree.tree_leaves(real), strict=False)
        for leaf, shadow in pairs:
            if isinstance(leaf, Tensor) and shadow.numel() <= LARGEST:
                self.shadows[id(leaf)] = leaf, shadow
        return traced

    def _is_known(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether all that a function takes is known."""
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves):
            return False
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if func in LIKE:
            if not all(isinstance(size, int) for size in args[0].shape):
                return False
            tensors = [value for value in tensors if value is not args[0]]
            return all(id(value) in self.shadows for value in tensors)
        known = all(id(value) in self.shadows for value in tensors)
        return known and (bool(tensors) or func in NUMBERS)

    def _real(self, values: Any) -> Any:
        """Arguments with their values; of one that lends its shape alone, empty ones."""

        def real(value: Tensor) -> Tensor:
            if id(value) in self.shadows:
                return self.shadows[id(value)][1]
            return torch.empty(tuple(value.shape), dtype=value.dtype)

        return pytree.tree_map_only(Tensor, real, values)

    def _with_numbers(self, func: Any, args: Any) -> Any:
        """Arguments with numbers where a known tensor stands for numbers: sizes, true positions."""
        if func in (*LIKE, *NUMBERS, *RESHAPES):
            return (args[0], *pytree.tree_map_only(Tensor, self._number, args[1:]))
        if func not in (Tensor.__getitem__, Tensor.__setitem__):
            return args
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        numbered: list[Any] = []
        for part in index:
            if _is_boolean(part) and id(part) in self.shadows:
                with outside_of_tracing():
                    numbered += self.shadows[id(part)][1].nonzero(as_tuple=True)
            else:
                numbered.append(part)
        return (args[0], tuple(numbered), *args[2:])

    def _number(self, value: Tensor) -> Any:
        """The number that a known tensor is, any other tensor as it is."""
        if value.dim() or id(value) not in self.shadows:
            return value
        with outside_of_tracing():
            return self.shadows[id(value)][1].item()


def _writes(func: Any) -> bool:
    """Whether a function writes into its first argument."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in (
        *("__setitem__", "__iadd__", "__isub__", "__imul__", "__iand__", "__ior__"),
    )


def _has_booleans(index: Any) -> bool:
    return any(map(_is_boolean, index if isinstance(index, tuple) else (index,)))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_boolean(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool
