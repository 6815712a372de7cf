"""A monitor: the same few samples explained again and again while a model trains.

It is what the callbacks of the trainers share. The explainer is compiled once, at the first look,
and reads the model's parameters at every other. What is explained is the model in evaluation mode;
a model in training mode is put back into it for the time of capture alone, module by module.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnlrp_fx.compiler import compile, tokenize
from attnlrp_fx.errors import InputError
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.runtime.explanation import Explanation
from attnlrp_fx.targets import TargetLike
from attnlrp_fx.training.losses import share_outside, sparsity


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put every module of a model into evaluation mode, and back into the mode that each was in.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import evaluating
        >>> model = torch.nn.Sequential(torch.nn.Dropout()).train()
        >>> with evaluating(model):
        ...     model[0].training
        False
        >>> model[0].training
        True
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass(frozen=True)
class RelevanceStatistics:
    """What relevance of a batch looks like, as means over rows."""

    target_value: float
    """The explained value."""
    total: float
    """Σ|R|."""
    positive: float
    """The share of |R| that speaks for the target."""
    spread: float
    """0 if all is on one element, 1 if it is spread evenly; see `losses.sparsity`."""
    outside: float | None = None
    """The share of |R| outside of a mask, where one was given."""

    @classmethod
    def of(
        cls, explanation: Explanation, name: str | None = None, mask: Tensor | None = None
    ) -> "RelevanceStatistics":
        """Of one input's relevance, padding left out.

        Args:
            explanation: of a batch.
            name: the input; None: the first that is explained.
            mask: true where relevance should lie; broadcasts to relevance.

        Raises:
            InputError: the input is not explained, or the mask does not fit.
        """
        name = next(iter(explanation.relevance)) if name is None else name
        if name not in explanation.relevance:
            raise InputError(
                f"'{name}' is not explained",
                remedy=f"choose from: {', '.join(explanation.relevance)}",
            )
        relevance = explanation.relevance[name].detach()
        real = (explanation.mask or {}).get(name)
        relevance = relevance if real is None else relevance * (real != 0)
        magnitude = relevance.abs().flatten(1).sum(1)
        positive = relevance.clamp(min=0).flatten(1).sum(1)
        tiny = torch.finfo(relevance.dtype).tiny
        return cls(
            target_value=float(explanation.target_value.detach().mean()),
            total=float(magnitude.mean()),
            positive=float((positive / magnitude.clamp(min=tiny)).mean()),
            spread=float(sparsity(relevance, real)),
            outside=None if mask is None else float(share_outside(relevance, mask)),
        )

    def to_dict(self) -> dict[str, float]:
        """By name, without what was not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Record:
    """One look at a model."""

    step: int
    explanation: Explanation
    """Without gradients."""
    statistics: RelevanceStatistics


Sink = Callable[[Record], Any]
"""Takes each record as it is made: writes it somewhere."""


@dataclass
class Monitor:
    """Explains the same samples whenever it is asked to.

    Raises:
        InputError: an option does not fit.

    Example:
        >>> import torch
        >>> from attnlrp_fx.training import Monitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout()).train()
        >>> monitor = Monitor(torch.ones(4, 3), every=10)
        >>> [monitor.look(model, step) is not None for step in (0, 5, 10)]
        [True, False, True]
        >>> monitor.statistics[-1].to_dict().keys()
        dict_keys(['target_value', 'total', 'positive', 'spread'])
    """

    samples: str | Sequence[str] | Mapping[str, Tensor] | Tensor
    """Texts, for which a tokenizer is needed, or one batch of inputs."""
    every: int = 100
    """Steps between looks; 1 or more."""
    target: TargetLike = None
    """As in `compile`."""
    mask: Tensor | None = None
    """True where relevance of the first explained input should lie; broadcasts to it."""
    tokenizer: Any = None
    sinks: Sequence[Sink] = ()
    """Told each record, as `tensorboard.TensorBoard`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else `compile` takes; the backend is "eager" unless it says otherwise."""
    statistics: list[RelevanceStatistics] = field(default_factory=list, init=False)
    """Of each look so far."""
    _explainer: ExplainableGraphModule | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"every is {self.every}", remedy="use 1 or more steps")
        is_text = not isinstance(self.samples, Mapping | Tensor)
        if is_text and self.tokenizer is None:
            raise InputError("there is no tokenizer for the texts", remedy="pass tokenizer=...")

    def look(self, model: nn.Module, step: int) -> Record | None:
        """Explain the samples if it is time, and tell the sinks.

        Args:
            model: always the same one, in whatever mode, which it keeps.
            step: how many steps were made.

        Returns:
            What was seen; None if the step is none of those to look at.

        Raises:
            CaptureError: at the first look, the model cannot be captured.
            RuleError: at the first look, no rule claims an op.
            InputError: the samples do not fit the model, or it is another one.
        """
        if step % self.every:
            return None
        explainer = self._explainer
        if explainer is not None and explainer.model is not model:
            raise InputError("this is another model than before", remedy="make a monitor for each")
        inputs = self.samples
        if not isinstance(inputs, Mapping | Tensor):
            inputs = tokenize(self.tokenizer, inputs)
        if explainer is None:
            options = {"backend": "eager", **self.options}
            with evaluating(model):
                explainer = self._explainer = compile(
                    model, inputs, target=self.target, tokenizer=self.tokenizer, **options
                )
        with torch.no_grad():
            explanation: Explanation = explainer(inputs)
        found = RelevanceStatistics.of(explanation, mask=self.mask)
        record = Record(step, explanation, found)
        self.statistics.append(found)
        for sink in self.sinks:
            sink(record)
        return record
