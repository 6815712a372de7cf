"""The tensors of an archive: raw bytes, and a table of which tensor is where in them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnlrp_fx.artefacts.archive import Archive
from attnlrp_fx.artefacts.graphs import DTYPES

WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def read_tensors(archive: Archive, table: str) -> dict[str, Tensor]:
    """Every tensor of a table by name; those that were one are one again.

    Raises:
        ArtefactError, ValueError, KeyError, TypeError: the table is not as torch.export writes it,
            or asks for a pickle.
    """
    folder = table.rpartition("/")[0]
    found: dict[str, Tensor] = {}
    files: dict[str, Tensor] = {}
    known: dict[Any, Tensor] = {}
    for name, entry in archive.json(table)["config"].items():
        if entry["use_pickle"] is not False:
            raise archive.wrong(f"tensor '{name}' is a pickle, which would run code")
        path, meta = str(entry["path_name"]), entry["tensor_meta"]
        if path not in files:
            files[path] = archive.tensor(f"{folder}/{path}")
        sizes, strides = _numbers(meta["sizes"]), _numbers(meta["strides"])
        offset = _numbers([meta["storage_offset"]])[0]
        dtype, is_parameter = DTYPES[meta["dtype"]], bool(entry["is_param"])
        key = path, sizes, strides, offset, dtype, is_parameter
        if key not in known:
            flat = files[path].view(dtype) if files[path].numel() else torch.empty(0, dtype=dtype)
            value = flat.as_strided(sizes, strides, offset)
            known[key] = nn.Parameter(value, bool(meta["requires_grad"])) if is_parameter else value
        found[name] = known[key]
    return found


def _numbers(sizes: Iterable[Mapping[str, Any]]) -> tuple[int, ...]:
    found = tuple(size["as_int"] for size in sizes)
    if any(type(number) is not int or number < 0 for number in found):
        raise ValueError(f"{found} are no sizes")
    return found


def module_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that has tensors under dotted names: parameters as such, others as buffers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
    return root.eval()
