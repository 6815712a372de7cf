"""How rows of a captured model stand side by side, and what of them may be padded."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_symbols, is_concrete_int

from attnlrp_fx.capture.capture import Captured
from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.targets import Contrast, Logit, LogProb, Target


@dataclass(frozen=True)
class Input:
    """What the model demands of one of its inputs."""

    rank: int
    """Dimensions, the batch's among them."""
    dtype: torch.dtype
    mask: str = ""
    """The mask that padding of it is written in; empty: it is never padded."""
    length: int | None = None
    """The length that it has to be padded to, if the model has one length only."""


@dataclass(frozen=True)
class Layout:
    """How rows of a captured model stand side by side; plain data, for other processes too."""

    inputs: Mapping[str, Input]
    constants: frozenset[str]
    """Inputs that the model was compiled with."""
    rows: int | None
    """How many rows the model takes, if it takes one number only."""
    counted: tuple[str, ...]
    """The inputs whose positions are tokens."""
    outputs: Mapping[str, tuple[str, ...]]
    """By floating output, in each dimension: the mask whose length it grows with, or nothing."""

    @classmethod
    def of(cls, captured: Captured, pad: bool = True) -> "Layout":
        """Read off a captured graph.

        Args:
            captured: the model.
            pad: whether anything may be padded.

        Raises:
            InputError: the inputs have no row for each row of the batch.
        """
        placeholders = captured.graph_module.graph.find_nodes(op="placeholder")
        values: dict[str, Tensor] = {str(node.target): node.meta["val"] for node in placeholders}
        fixed = {
            int(v.shape[0]) for v in values.values() if v.dim() and is_concrete_int(v.shape[0])
        }
        if len(fixed) > 1 or not all(value.dim() for value in values.values()):
            raise InputError(
                "these inputs cannot be told apart into rows",
                why="their first dimensions are not one batch: "
                + ", ".join(f"{name} {tuple(value.shape)}" for name, value in values.items()),
                remedy="call the explainer on each sample",
            )
        read = {str(node.target) for node in placeholders if node.users} if pad else set()
        inputs = {name: _input(name, values, read) for name in values}
        symbols = {
            str(values[wanted.mask].shape[1]): wanted.mask
            for wanted in inputs.values()
            if wanted.mask and wanted.length is None
        }
        produced = zip(captured.output_names, outputs_of(captured.graph_module.graph), strict=True)
        return cls(
            inputs=inputs,
            constants=frozenset(captured.constants),
            rows=fixed.pop() if fixed else None,
            counted=_counted(values),
            outputs={
                name: tuple(_grows_with(size, symbols) for size in node.meta["val"].shape)
                for name, node in produced
                if isinstance(node.meta.get("val"), Tensor)
                and node.meta["val"].is_floating_point()
                and node.meta["val"].dim()
            },
        )

    def same_if_padded(self, target: Target) -> bool:
        """Whether a target's value is the same when rows are padded."""
        if not any(any(dims[1:]) for dims in self.outputs.values()):
            return True
        if not isinstance(target, Logit | Contrast | LogProb):
            return False
        spans = [name for name in ("start_logits", "end_logits") if name in self.outputs]
        whole = isinstance(target, Logit) and target.output is None and target.index is None
        if whole and len(spans) == 2 and "logits" not in self.outputs:
            found = {self.outputs[name][1:] for name in spans}
            return target.position is None and found <= {(self._mask_of_outputs,), ("",)}
        first = "logits" if "logits" in self.outputs else next(iter(self.outputs))
        _, *dims = self.outputs.get(target.output or first, ("",))
        if not any(dims):
            return True
        if target.position is None:
            return dims == [self._mask_of_outputs, ""]
        named = torch.as_tensor(target.position)
        return len(dims) == 2 and not dims[1] and not bool((named < 0).any())

    @property
    def _mask_of_outputs(self) -> str:
        """The mask that a target without a position looks at: the decoder's, if there is one."""
        names = (*self.outputs, *(name for name in self.inputs if name.endswith("attention_mask")))
        decoding = any(name.startswith(("encoder", "decoder")) for name in names)
        return "decoder_attention_mask" if decoding else "attention_mask"


def _input(name: str, values: Mapping[str, Tensor], read: set[str]) -> Input:
    value = values[name]
    wanted = Input(value.dim(), value.dtype)
    mask = ("decoder_" if name.startswith("decoder_") else "") + "attention_mask"
    if mask not in read or values[mask].dim() != 2 or value.dim() < 2:
        return wanted
    length = values[mask].shape[1]
    if name != mask and (value.is_floating_point() or str(value.shape[1]) != str(length)):
        return wanted
    return replace(wanted, mask=mask, length=int(length) if is_concrete_int(length) else None)


def _counted(values: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The inputs of token indices: one, and one of the decoder."""
    integers = [
        name
        for name, value in values.items()
        if not value.is_floating_point() and value.dim() == 2 and not name.endswith("mask")
    ]
    named = [name for name in integers if name.endswith("input_ids")]
    return tuple(named or integers[:1])


def _grows_with(size: int | torch.SymInt, symbols: Mapping[str, str]) -> str:
    found = {symbols[name] for s in free_symbols(size) if (name := str(s)) in symbols}
    return found.pop() if found else ""
