"""Explanations in Hugging Face's `Trainer`: a callback logs them, a mixin trains with them.

    class ExplainedTrainer(ExplanationLossMixin, Trainer):
        pass

    trainer = ExplainedTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        explanation_loss=ExplanationLoss(
            lambda explanation, inputs: share_outside(
                explanation.relevance["input_ids"], inputs["evidence"]
            ),
            weight=0.5,
            reads=("evidence",),
        ),
        callbacks=[ExplanationCallback(Monitor(texts, tokenizer=tokenizer))],
    )

`Trainer` itself needs accelerate: `pip install 'attnlrp_fx[train]'`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from attnlrp_fx.compiler import compile
from attnlrp_fx.errors import InputError
from attnlrp_fx.runtime.explainer import ExplainableGraphModule
from attnlrp_fx.targets import Logit, TargetLike
from attnlrp_fx.training.monitor import Monitor, evaluating

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Ways to distribute training in which no process has whole parameters."""


class ExplanationCallback(TrainerCallback):
    """Looks at a model's explanations before training and every so many steps.

    The statistics of each look are an entry of `trainer.state.log_history`, as "relevance/total";
    the monitor's sinks get the explanation itself. Only the first process looks.

    Args:
        monitor: what is explained, how often, and who is told.
    """

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model as it was."""
        self._look(state, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model after an optimiser's step."""
        self._look(state, kwargs["model"])

    def _look(self, state: Any, model: nn.Module) -> None:
        record = (
            self.monitor.look(model, state.global_step) if state.is_world_process_zero else None
        )
        if record is not None:
            found = {f"relevance/{n}": v for n, v in record.statistics.to_dict().items()}
            entry = {"epoch": state.epoch, "step": state.global_step, **found}
            state.log_history.append(entry)


@dataclass(frozen=True)
class ExplanationLoss:
    """What `ExplanationLossMixin` adds to the loss of a task."""

    function: Callable[[Any, Mapping[str, Tensor]], Tensor]
    """(explanation, the batch as it was collated) → a scalar, a mean over the batch's rows."""
    weight: float = 1.0
    target: Callable[[Mapping[str, Tensor]], TargetLike] | None = None
    """The batch → what is explained; None: the labels, where they are a class a row, and otherwise
    the highest logit."""
    reads: tuple[str, ...] = ()
    """Columns of the batch that the model does not take: masks, maps. `Trainer` keeps them with
    `remove_unused_columns=False`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else `compile` takes; the backend is "eager" unless it says otherwise."""


class ExplanationLossMixin(_Base):
    """Adds a loss of explanations to a `Trainer`: ``class Mine(ExplanationLossMixin, Trainer)``.

    The task's loss is the trainer's own, of the model in training mode. The explanation is of the
    model in evaluation mode, without dropout, on the same parameters, in the precision that the
    trainer runs the model in; it is compiled at the first step. Gradient accumulation and data
    parallelism do what they do for the task's loss. Evaluation is left as it is. The logs have the
    mean of the term, before its weight, as "explanation_loss".

    Args:
        *args: as for the trainer.
        explanation_loss: what to add.
        **kwargs: as for the trainer.

    Raises:
        InputError: at the first step, if parameters are sharded over processes.
    """

    def __init__(self, *args: Any, explanation_loss: ExplanationLoss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explanation_loss = explanation_loss
        self._explainer: ExplainableGraphModule | None = None
        self._terms: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss and, while training, the weighted loss of the explanation."""
        batch, wanted = dict(inputs), self.explanation_loss
        own = {name: value for name, value in inputs.items() if name not in wanted.reads}
        found = super().compute_loss(
            model, dict(own), return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        loss, outputs = found
        if model.training and wanted.weight:
            term = wanted.function(self._explained(own), batch)
            self._terms.append(term.detach())
            loss = loss + wanted.weight * term / self._micro_batches(num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the mean of the terms since the last time."""
        if self._terms and "loss" in logs:
            logs["explanation_loss"] = float(torch.stack(self._terms).float().mean())
            self._terms.clear()
        super().log(logs, *args, **kwargs)

    def _explained(self, inputs: Mapping[str, Any]) -> Any:
        given = {n: v for n, v in inputs.items() if n != "labels" and isinstance(v, Tensor)}
        if self._explainer is None:
            how = self.accelerator.distributed_type.value
            if how in SHARDED:
                raise InputError(
                    f"explanations need whole parameters, and training is distributed by {how}",
                    remedy="train by data parallelism (DDP)",
                )
            assert self.model is not None
            options = {"backend": "eager", **self.explanation_loss.options}
            with evaluating(self.model):
                self._explainer = compile(self.model, given, differentiable=True, **options)
        choose = self.explanation_loss.target or _labels
        return self._explainer(given, target=choose(inputs))

    def _micro_batches(self, num_items_in_batch: Any) -> int:
        """What the trainer does not divide by: the task's loss is scaled, the term is not."""
        is_scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if is_scaled is None:
            counts = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            is_scaled = counts or self.compute_loss_func is not None
        return int(self.current_gradient_accumulation_steps) if is_scaled else 1


def _labels(batch: Mapping[str, Any]) -> TargetLike:
    labels = batch.get("labels")
    is_class = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
    return Logit(labels) if is_class else None
