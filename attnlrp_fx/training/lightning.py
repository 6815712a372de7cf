"""Explanations in PyTorch Lightning: a callback that logs them.

Needs `pip install 'attnlrp_fx[train]'`.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from attnlrp_fx.errors import MissingExtraError
from attnlrp_fx.training.monitor import Monitor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingExtraError(
        "The callback for Lightning needs lightning.",
        why=str(error),
        remedy="pip install 'attnlrp_fx[train]'",
    ) from error


class ExplanationCallback(Callback):
    """Looks at a model's explanations before training and every so many optimiser's steps.

    The statistics of each look are logged by `LightningModule.log_dict`, as "relevance/total", and
    those before training by the trainer's logger; the monitor's sinks get the explanation itself.
    Only the first process looks.

    Args:
        monitor: what is explained, how often, and who is told.
        model: the model in a Lightning module; None: the module itself, whose forward it is.
    """

    def __init__(
        self, monitor: Monitor, model: Callable[[LightningModule], nn.Module] | None = None
    ) -> None:
        self.monitor = monitor
        self._model = model or (lambda module: module)
        self._looked_at = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model as it was."""
        found = self._look(trainer, pl_module)
        if found and trainer.logger is not None:
            trainer.logger.log_metrics(found, step=trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The model after an optimiser's step; once a step, however many batches it took."""
        found = self._look(trainer, pl_module)
        if found:
            pl_module.log_dict(found, rank_zero_only=True)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        step = trainer.global_step
        if not trainer.is_global_zero or step == self._looked_at:
            return {}
        self._looked_at = step
        record = self.monitor.look(self._model(pl_module), step)
        if record is None:
            return {}
        return {f"relevance/{n}": value for n, value in record.statistics.to_dict().items()}
