"""What methods explain: a compiled model, one of its inputs, and questions about it.

A `Subject` is a model with the input that is explained, a `Question` a batch and what is explained
of each of its rows. Methods of any kind, ours and others, read the same values: the embeddings of
tokens, or a floating input. Their relevance is one number a *place*: a token (batch, length), a
pixel (batch, height, width), or else an element of the input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from attnlrp_fx.codegen.backends import Backend
from attnlrp_fx.compiler import compile
from attnlrp_fx.errors import InputError
from attnlrp_fx.passes import PIPELINE
from attnlrp_fx.passes.push_selections import push_selections
from attnlrp_fx.rules.composites import Composite, composite_named
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.targets import Logit, LogProb, Target, TargetLike, as_target, changed

Inputs = Mapping[str, Tensor]
SPECIAL_TOKENS = 4
"""How many tokens of an image may stand for no patch (class, distillation, registers)."""


class Subject:
    """A compiled model and the input of it that is explained and perturbed.

    Args:
        explainer: the compiled model; its composite is what `relevance` uses by default.
        input: the name of the input; None: the only one that is explained.
        backend: what runs perturbed inputs: "eager", or "inductor" for many of them.

    Raises:
        InputError: several inputs are explained and none is named, or the named one is not.
    """

    def __init__(
        self,
        explainer: ExplainableGraphModule,
        input: str | None = None,
        backend: str | Backend = "eager",
    ) -> None:
        names = explainer.explained
        if input is None and len(names) != 1:
            raise InputError(
                f"{len(names)} inputs have relevance", remedy=f"name one: {', '.join(names)}"
            )
        self.explainer = explainer
        self.name = names[0] if input is None else input
        self.tail = explainer.tail(self.name, backend)
        self._siblings: dict[Any, ExplainableGraphModule] = {}

    @classmethod
    def compile(
        cls, model: nn.Module, inputs: Any, *, input: str | None = None, **options: Any
    ) -> Subject:
        """Compile a model to be asked about; see `attnlrp_fx.compile` for everything else.

        Args:
            model: a module in evaluation mode.
            inputs: example inputs.
            input: the name of the input to explain; the others are constants.
            **options: as in `attnlrp_fx.compile`; the default backend is "eager".
        """
        options = {"backend": "eager", **options}
        explain = None if input is None else [input]
        explainer = compile(model, inputs, explain=explain, **options)
        return cls(explainer, input)

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.explainer.model

    def ask(self, inputs: Inputs, target: TargetLike = None) -> Question:
        """A batch, with the class or token that is explained fixed for each row.

        Targets that name neither (a function of the outputs, the highest start and end of a span)
        stay as they are, and are evaluated anew on perturbed inputs.
        """
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        wanted = as_target(target)
        values = self.tail.values(given)
        if getattr(wanted, "index", 0) is None:
            with torch.no_grad():
                index = self.tail.choose(values, given, wanted).index
            if index is not None:
                wanted = changed(wanted, index=index)
        return Question(self, given, wanted, values)

    def sibling(
        self, composite: str | Composite | None = None, latent: Sequence[str] | None = None
    ) -> ExplainableGraphModule:
        """The same model compiled with other rules, once; with latent values at all positions."""
        rules = self.explainer.composite if composite is None else composite_named(composite)
        if rules == self.explainer.composite and latent is None:
            return self.explainer
        key = (rules, None if latent is None else tuple(latent))
        if key not in self._siblings:
            passes = None
            if latent is not None:
                passes = tuple(one for one in PIPELINE if one is not push_selections)
            self._siblings[key] = self.explainer.with_composite(rules, latent=latent, passes=passes)
        return self._siblings[key]

    def places(self, relevance: Tensor) -> Tensor:
        """Something in the input's shape as one number a place: an image's channels summed."""
        is_image = not self.tail.features and relevance.dim() == 4
        return relevance.sum(1) if is_image else relevance


@dataclass(frozen=True, eq=False)
class Question:
    """A batch, and what is explained of each row."""

    subject: Subject
    inputs: dict[str, Tensor]
    target: Target
    """With the class or token of each row, if it has one."""
    values: Tensor
    """The explained value: of tokens their embeddings, or the floating input."""

    def __len__(self) -> int:
        return self.values.shape[0]

    @property
    def is_image(self) -> bool:
        """Whether the input is an image: (batch, channels, height, width), floating."""
        return not self.subject.tail.features and self.values.dim() == 4

    @property
    def rows(self) -> Tensor:
        """(batch,): the numbers of the rows."""
        return torch.arange(len(self), device=self.values.device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of relevance: batch and places."""
        return tuple(self.places_of(self.values).shape)

    @cached_property
    def present(self) -> Tensor:
        """(batch, places) bool: what is no padding."""
        mask = self.inputs.get(self.subject.name.replace("input_ids", "attention_mask"))
        here = torch.ones(self.shape, dtype=torch.bool, device=self.values.device)
        is_mask = self.subject.tail.features and mask is not None and mask.shape == here.shape
        return mask.bool() if is_mask and mask is not None else here

    def score(
        self, values: Tensor, rows: Tensor | None = None, target: Target | None = None
    ) -> Tensor:
        """The target's value where the explained value is another one.

        Args:
            values: like `values`, of any rows of the batch.
            rows: (n,) int64: which row of the batch each of them is; None: the batch as it is.
            target: another target of the same rows.
        """
        wanted, inputs = target or self.target, self.inputs
        if rows is not None:
            wanted = of_rows(wanted, rows)
            inputs = {name: value[rows] for name, value in inputs.items()}
        return self.subject.tail.choose(values, inputs, wanted).value

    def places_of(self, values: Tensor) -> Tensor:
        """Something in the shape of the values, as one number a place."""
        return self.subject.places(self.subject.tail.summed(values))

    def spread(self, places: Tensor) -> Tensor:
        """Something a place, (n, places), as it broadcasts to the values."""
        return places[:, None] if self.is_image else self.subject.tail.spread(places)

    def probability(self) -> Target:
        """The log-probability of what is explained.

        Raises:
            InputError: what is explained is no class or token.
        """
        target = self.target
        if isinstance(target, LogProb):
            return target
        if not isinstance(target, Logit) or target.index is None:
            raise InputError(
                f"'{target}' has no probability", remedy='explain a Logit, or score by "logit"'
            )
        return LogProb(target.index, target.position, target.output)


def of_rows(target: Target, rows: Tensor) -> Target:
    """A target of some rows of a batch: what it names row by row is taken from these."""
    named = {
        key: torch.as_tensor(value, device=rows.device)[rows]
        for key in ("index", "position")
        if isinstance(value := getattr(target, key, None), list | tuple | Tensor)
        and torch.as_tensor(value).dim() == 1
    }
    return changed(target, **named) if named else target


@dataclass(frozen=True)
class Grid:
    """Tokens that stand for the patches of an image, row by row, behind some that stand for none.

    What a class token has is dropped.
    """

    tokens: int
    rows: int
    columns: int
    height: int
    width: int

    @classmethod
    def find(cls, tokens: int, height: int, width: int) -> Grid | None:
        """The grid of that many tokens; None if they cannot be square patches of the image."""
        for edge in range(1, min(height, width) + 1):
            rows, columns = height // edge, width // edge
            is_whole = not (height % edge or width % edge)
            if is_whole and rows > 1 and 0 <= tokens - rows * columns <= SPECIAL_TOKENS:
                return cls(tokens, rows, columns, height, width)
        return None

    @classmethod
    def of(cls, question: Question, tokens: int) -> Grid:
        """The same.

        Raises:
            InputError: they cannot be square patches of the image.
        """
        height, width = question.shape[1:]
        found = cls.find(tokens, height, width)
        if found is None:
            raise InputError(
                f"{tokens} tokens are no square patches of {height} × {width} pixels",
                remedy="use a method that does not look at attention",
            )
        return found

    def maps(self, values: Tensor) -> Tensor:
        """(..., tokens) → (..., rows, columns)."""
        kept = values[..., self.tokens - self.rows * self.columns :]
        return kept.reshape(*values.shape[:-1], self.rows, self.columns)

    def to_pixels(self, relevance: Tensor) -> Tensor:
        """(batch, tokens) → (batch, height, width): each pixel gets what its patch has."""
        edge = self.height // self.rows
        return self.maps(relevance).repeat_interleave(edge, -2).repeat_interleave(edge, -1)
