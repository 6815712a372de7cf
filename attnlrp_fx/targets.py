"""Targets: the scalar of each row that is explained.

A target maps the model's outputs to one value a row. The program is seeded with the value's
gradient with respect to the outputs; for a logit that is 1 at the logit. Nothing about a target is
compiled: another index, position or kind of target runs the same program.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnlrp_fx.errors import TargetError
from attnlrp_fx.graph.sites import Site

Index = int | Sequence[int] | Tensor | None
"""One number for all rows, one per row, or, in a tensor (batch, M), one per row and target."""


@dataclass(frozen=True)
class Outputs:
    """What a target may look at."""

    named: Mapping[str, Tensor]
    """The model's floating outputs by name, batch first."""
    tree: Any
    """The model's own output object."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """The inputs whose names end in "attention_mask"."""
    latent: Mapping[str, tuple[Tensor, Site]] = field(default_factory=dict)
    """The latent values that can be explained, by name."""


class Convention(Protocol):
    """What is known of a captured model's outputs."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Name of each flat output."""
        ...

    @property
    def output_spec(self) -> pytree.TreeSpec:
        """Puts flat outputs back into the model's own output object."""
        ...


LatentPlaces = Mapping[str, tuple[int, Site]]
"""By name of a latent value its place among the flat outputs of a rewritten graph."""


def outputs_as_seen(
    convention: Convention,
    flat: Sequence[Any],
    given: Mapping[str, Tensor],
    latent: LatentPlaces | None = None,
) -> Outputs:
    """Flat outputs, and the masks among the inputs, as a target sees them."""
    names = convention.output_names
    named = {n: value for n, value in zip(names, flat, strict=False) if _is_floating(value)}
    masks = {n: v for n, v in given.items() if n.endswith("attention_mask") and v.dim() == 2}
    spec = convention.output_spec
    tree = pytree.tree_unflatten(list(flat[: spec.num_leaves]), spec)
    inside = {n: (flat[i], site) for n, (i, site) in (latent or {}).items() if i < len(flat)}
    return Outputs(named, tree, masks, inside)


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


@dataclass(frozen=True)
class Seed:
    """A target's gradient with respect to one output: a few numbers at one place of each row."""

    output: str
    index: Tensor | None
    """(batch, K) int64: classes, counted over all dimensions but the batch and, if there is a
    position, the sequence; None: all, in order."""
    weight: Tensor
    """(batch, K): the gradient there, float32 or better."""
    position: Tensor | None = None
    """(batch,) int64: where in an output (batch, sequence, classes); None: it has no sequence."""

    def dense(self, output: Tensor) -> Tensor:
        """The gradient in the shape and dtype of its output."""
        found = torch.zeros(output.shape[0], output[0].numel(), device=output.device)
        found = found.to(self.weight.dtype).scatter_add_(1, self._places(output), self.weight)
        return found.reshape(output.shape).to(output.dtype)

    def of(self, output: Tensor) -> Tensor:
        """(batch, K): the elements of its output that it weighs."""
        return output.reshape(output.shape[0], -1).gather(1, self._places(output))

    def _places(self, output: Tensor) -> Tensor:
        """(batch, K): where they are, counted over all dimensions but the batch."""
        index = self.index
        if index is None:
            index = torch.arange(self.weight.shape[1], device=self.weight.device)
            index = index.expand(self.weight.shape)
        if self.position is not None:
            index = index + (self.position * output.shape[-1])[:, None]
        return index


def dense(seeds: Sequence[Seed] | Tensor, output: Tensor) -> Tensor:
    """A gradient in the shape of its output, of seeds or as it is."""
    if isinstance(seeds, Tensor):
        return seeds
    return sum((seed.dense(output) for seed in seeds), start=torch.zeros_like(output))


@dataclass(frozen=True)
class Chosen:
    """A target evaluated on outputs."""

    value: Tensor
    """(batch,): the explained values; without seeds, differentiable by the outputs."""
    index: Tensor | None = None
    """(batch,) int64: the class or token explained, where there is one."""
    seeds: tuple[Seed, ...] = ()
    """The value's gradient, where the target knows it."""


@runtime_checkable
class Target(Protocol):
    """What can be explained."""

    def choose(self, outputs: Outputs) -> Chosen:
        """Evaluate the target; raises TargetError if the outputs do not have it."""
        ...


@dataclass(frozen=True)
class Logit:
    """One logit a row.

    Args:
        index: class or token; one for all rows, or one per row; None: the highest.
        position: sequence position for outputs (batch, sequence, classes); negative counts from
            the end; one for all rows, or one per row; None: the last one that the attention mask
            does not exclude.
        output: name of the output; None: "logits", or start plus end logits of a question
            answering model, or the only floating output.

    Example:
        >>> from attnlrp_fx import Logit
        >>> Logit(5)
        Logit(index=5, position=None, output=None)
    """

    index: Index = None
    position: Index = None
    output: str | None = None

    def choose(self, outputs: Outputs) -> Chosen:
        """The logits, float32 or better."""
        spans = _span_outputs(outputs) if self.output is None and self.index is None else []
        if spans:
            ends = [_highest_of_span(outputs, name, self.position) for name in spans]
            return Chosen(torch.stack([v for v, _ in ends]).sum(0), seeds=tuple(s for _, s in ends))
        scores = _scores(outputs, self.output, self.position)
        index = _indices(self.index, scores, "index")
        return Chosen(scores.at(index), index, (scores.seed(index[:, None]),))

    def __str__(self) -> str:
        return "highest logit" if self.index is None else "logit"


@dataclass(frozen=True)
class Contrast:
    """A logit against others: +1 on `index`, −1 on `against`, −1/N each on several.

    Args:
        index: as in `Logit`.
        against: a class or token, several, or None for all others.
        position: as in `Logit`.
        output: as in `Logit`.
    """

    index: Index = None
    against: int | Sequence[int] | None = None
    position: Index = None
    output: str | None = None

    def choose(self, outputs: Outputs) -> Chosen:
        """logit − mean of the others, float32 or better."""
        scores = _scores(outputs, self.output, self.position)
        index = _indices(self.index, scores, "index")
        wanted, values = scores.at(index), scores.values
        classes = values.shape[1]
        if self.against is None:
            if classes < 2:
                raise TargetError("there is nothing to contrast with: the output has one class")
            weight = torch.full_like(values, -1 / (classes - 1))
            weight = weight.scatter(1, index[:, None], 1.0)
            mean = (values.sum(1) - wanted) / (classes - 1)
            return Chosen(wanted - mean, index, (scores.seed(None, weight),))
        others = [self.against] if isinstance(self.against, int) else list(self.against)
        if not others:
            raise TargetError("'against' is empty", remedy="name classes, or None for all others")
        columns = [_indices(other, scores, "against") for other in others]
        rest = torch.stack(columns, 1)
        both = torch.cat([index[:, None], rest], 1)
        weight = torch.full_like(both, -1 / len(columns), dtype=values.dtype)
        weight[:, 0] = 1.0
        value = wanted - values.gather(1, rest).mean(1)
        return Chosen(value, index, (scores.seed(both, weight),))

    def __str__(self) -> str:
        return "logit in contrast"


@dataclass(frozen=True)
class LogProb:
    """The log-probability of a class or token; arguments as in `Logit`."""

    index: Index = None
    position: Index = None
    output: str | None = None

    def choose(self, outputs: Outputs) -> Chosen:
        """log softmax of the scores at the index, float32 or better."""
        scores = _scores(outputs, self.output, self.position)
        index = _indices(self.index, scores, "index")
        logarithms = scores.values.log_softmax(1)
        rest = -logarithms.exp()
        weight = rest.scatter_add(1, index[:, None], torch.ones_like(rest[:, :1]))
        value = logarithms.gather(1, index[:, None])[:, 0]
        return Chosen(value, index, (scores.seed(None, weight),))

    def __str__(self) -> str:
        return "log-probability"


@dataclass(frozen=True)
class Custom:
    """A user's function of the model's outputs.

    Args:
        function: takes the model's output object, returns (batch,); it is differentiated.
    """

    function: Callable[[Any], Tensor]

    def choose(self, outputs: Outputs) -> Chosen:
        """The function's values."""
        value = self.function(outputs.tree)
        batch = next(iter(outputs.named.values())).shape[0]
        if not isinstance(value, Tensor) or value.shape != (batch,):
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise TargetError(
                "the target function must return one value a row",
                where=getattr(self.function, "__name__", "target"),
                why=f"expected a tensor of shape ({batch},), got {got}",
            )
        return Chosen(value)

    def __str__(self) -> str:
        return getattr(self.function, "__name__", "function of the outputs")


TargetLike = Target | Callable[[Any], Tensor] | int | None
TargetsLike = TargetLike | Sequence[TargetLike]
"""One target, or several of which each is explained."""


def changed(target: Target, **fields: Any) -> Target:
    """A target that is a dataclass, with other values in some of its fields."""
    made: Any = target
    found: Target = replace(made, **fields)
    return found


def targets_of(target: TargetsLike, default: Target) -> tuple[list[Target], bool]:
    """The targets, and whether several were asked for: in a list, or by a (batch, M) tensor.

    Raises:
        TargetError: the list is empty or holds what is no target, or index and position do not
            have the same M.
    """
    if isinstance(target, list | tuple):
        return _some([as_target(one) for one in target]), True
    one: Any = default if target is None else as_target(cast(TargetLike, target))
    columns = {
        name: value
        for name in ("index", "position")
        if isinstance(value := getattr(one, name, None), Tensor) and value.dim() == 2
    }
    counts = {value.shape[1] for value in columns.values()}
    if not is_dataclass(one) or not columns:
        return [one], False
    if len(counts) != 1:
        shapes = ", ".join(f"{name} {tuple(v.shape)}" for name, v in columns.items())
        raise TargetError(
            f"index and position are of unlike numbers of targets: {shapes}",
            remedy="give both as (batch, M), or one of them for all",
        )
    each = [{n: v[:, m] for n, v in columns.items()} for m in range(counts.pop())]
    made: Any = type(one)
    fixed = {f.name: getattr(one, f.name) for f in fields(one)}
    return _some([made(**fixed | column) for column in each]), True


def _some(targets: list[Target]) -> list[Target]:
    if not targets:
        raise TargetError("there is no target to explain", remedy="pass at least one")
    return targets


def as_target(target: TargetLike) -> Target:
    """A target from what users pass: a target, a function, an index, or None for the highest.

    Raises:
        TargetError: it is none of these.
    """
    if target is None or isinstance(target, int):
        return Logit(target)
    if isinstance(target, Target):
        return target
    if callable(target):
        return Custom(target)
    raise TargetError(
        f"a target cannot be made from a {type(target).__name__}",
        remedy="pass Logit, Contrast, LogProb, an index, or a function of the model's outputs",
    )


def _span_outputs(outputs: Outputs) -> list[str]:
    """Start and end logits, if that is what the model returns."""
    names = [name for name in ("start_logits", "end_logits") if name in outputs.named]
    return names if "logits" not in outputs.named and len(names) == 2 else []


def _highest_of_span(outputs: Outputs, name: str, position: Index) -> tuple[Tensor, Seed]:
    """The highest start or end logit of a token that is no padding, and its gradient."""
    scores = _scores(outputs, name, position)
    values = scores.values
    mask = _mask_of((values.shape[0], values.shape[1]), outputs, values.device)
    allowed = scores.values
    if mask is not None:
        allowed = allowed.masked_fill(mask == 0, -torch.inf)
    index = allowed.argmax(1)
    return scores.at(index), scores.seed(index[:, None])


@dataclass(frozen=True)
class _Scores:
    """What a target reads of one output."""

    values: Tensor
    """(batch, classes), float32 or better."""
    output: str
    position: Tensor | None

    def at(self, index: Tensor) -> Tensor:
        """The score of one class a row."""
        return self.values.gather(1, index[:, None])[:, 0]

    def seed(self, index: Tensor | None, weight: Tensor | None = None) -> Seed:
        """The gradient of a weighted sum of scores; None: of one score."""
        if weight is None:
            weight = torch.ones_like(self.values[:, :1])
        return Seed(self.output, index, weight, self.position)


def _scores(outputs: Outputs, name: str | None, position: Index) -> _Scores:
    """The scores of one output.

    Sequences are read at a position; outputs with more dimensions (maps) are flattened.
    """
    named = outputs.named
    if name is None:
        name = _default_output(outputs)
    if name is None or name not in named:
        raise TargetError(
            f"the model has no floating output '{name}'",
            remedy=f"choose output= from: {', '.join(named) or 'nothing'}",
        )
    scores = named[name]
    if scores.dim() == 0:
        raise TargetError(f"output '{name}' is a single number, it has no rows")
    if position is not None and scores.dim() != 3:
        raise TargetError(
            f"output '{name}' has no sequence to take position {position} of",
            why=f"its shape is {tuple(scores.shape)}, not (batch, sequence, classes)",
            remedy="leave position out",
        )
    where: Tensor | None = None
    if scores.dim() == 1:
        scores = scores[:, None]
    elif scores.dim() == 3:
        rows = torch.arange(scores.shape[0], device=scores.device)
        where = _positions(position, scores, outputs)
        scores = scores[rows, where]
    elif scores.dim() > 3:
        scores = scores.flatten(1)
    values = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return _Scores(values, name, where)


def at_one_position(targets: Sequence[Target]) -> bool:
    """Whether targets read outputs at one position of each row, the same for all targets."""
    first: Any = targets[0]
    return all(
        isinstance(one, Logit | Contrast | LogProb)
        and one.output == first.output
        and _same(one.position, first.position)
        for one in targets
    )


def _same(a: Index, b: Index) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return a == b


def positions_of(target: Target, shape: Sequence[int], outputs: Outputs) -> Tensor:
    """(batch,) int64: where a target reads an output of a shape (batch, sequence, classes).

    Raises:
        TargetError: the position does not exist.
    """
    device = next(iter(outputs.masks.values()), torch.zeros(())).device
    stand_in = torch.zeros((), device=device).expand(tuple(shape))
    return _positions(getattr(target, "position", None), stand_in, outputs)


_unread: ContextVar[bool] = ContextVar("_unread", default=False)


@contextmanager
def unread() -> Iterator[None]:
    """Within it, targets look at no tensor's values, so that choosing can be traced."""
    token = _unread.set(True)
    try:
        yield
    finally:
        _unread.reset(token)


def _has_values(device: torch.device) -> bool:
    return device.type != "meta" and not _unread.get()


def _default_output(outputs: Outputs) -> str | None:
    return "logits" if "logits" in outputs.named else next(iter(outputs.named), None)


def default_scores(outputs: Outputs) -> Tensor | None:
    """The output that a target reads which names none."""
    name = _default_output(outputs)
    return None if name is None else outputs.named[name]


def _positions(position: Index, scores: Tensor, outputs: Outputs) -> Tensor:
    """(batch,) positions in a (batch, sequence, classes) output."""
    if position is not None:
        return checked_index(position, scores.shape[0], scores.shape[1], "position", scores.device)
    return last_real(scores.shape[0], scores.shape[1], outputs, scores.device)


def last_real(batch: int, length: int, outputs: Outputs, device: torch.device) -> Tensor:
    """(batch,) int64: the last position of each row that is no padding.

    Raises:
        TargetError: a row is all padding.
    """
    mask = _mask_of((batch, length), outputs, device)
    if mask is None:
        return torch.full((batch,), length - 1, device=device)
    if _has_values(device) and not bool(mask.any(1).all()):
        raise TargetError(
            "a row of the attention mask is all zero",
            why="its last token, which would be explained, does not exist",
            remedy="drop the row, or name a position",
        )
    steps = torch.arange(1, length + 1, device=device)
    return (steps * (mask != 0)).argmax(1)


def _mask_of(sizes: tuple[int, int], outputs: Outputs, device: torch.device) -> Tensor | None:
    """The mask of the sequence that the scores belong to: the decoder's, if there is an encoder."""
    names = (*outputs.named, *outputs.masks)
    decoding = any(name.startswith(("encoder", "decoder")) for name in names)
    for name, mask in outputs.masks.items():
        if name.startswith("decoder") is decoding and tuple(mask.shape) == sizes:
            return mask.to(device)
    return None


def _indices(index: Index, scores: _Scores, name: str) -> Tensor:
    """(batch,) class indices; None means the highest score."""
    values = scores.values
    if index is None:
        return values.argmax(1)
    return checked_index(index, values.shape[0], values.shape[1], name, values.device)


def checked_index(value: Index, batch: int, size: int, name: str, device: torch.device) -> Tensor:
    """One index a row, in range."""
    given = torch.as_tensor(value, device=device)
    if given.is_floating_point() or given.dtype == torch.bool:
        raise TargetError(f"{name} must be an integer, got {given.dtype}")
    if given.dim() == 0:
        given = given.expand(batch)
    if given.shape != (batch,):
        raise TargetError(
            f"{name} has shape {tuple(given.shape)}",
            why=f"the batch has {batch} rows",
            remedy="pass one number for all rows, or one per row",
        )
    outside = (given < -size) | (given >= size)
    if _has_values(device) and bool(outside.any()):
        raise TargetError(
            f"{name} {int(given[outside][0])} is out of range",
            why=f"the output has {size} there, so it must lie in [{-size}, {size - 1}]",
        )
    return torch.where(given < 0, given + size, given).to(torch.int64)
