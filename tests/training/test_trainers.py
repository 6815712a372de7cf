"""Explanations in trainers, each for real on a small run."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import randomised
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import InputError, MissingExtraError
from attnlrp_fx.training import Monitor, RelevanceStatistics, share_outside
from attnlrp_fx.training.trainer import ExplanationCallback, ExplanationLoss, ExplanationLossMixin

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
LENGTH = 6
MARK = 4
"""The token that tells the label."""


class Classifier(nn.Module):
    """Tokens mixed by a layer, their mean classified; dropout, and a loss as of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(61, 8), nn.Linear(8, 16)
        self.dropout, self.last = nn.Dropout(0.1), nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs) -> dict[str, Tensor]:
        hidden = F.silu(self.mix(self.embed(input_ids))) * attention_mask[..., None]
        logits = self.last(self.dropout(hidden.mean(1)))
        if labels is None:
            return {"logits": logits}
        count = kwargs.get("num_items_in_batch", len(labels))
        return {"loss": F.cross_entropy(logits, labels, reduction="sum") / count, "logits": logits}


def classifier() -> nn.Module:
    return randomised(Classifier)


class Texts(torch.utils.data.Dataset):
    """Random tokens, and a first one that is the mark in every text of class 1."""

    def __init__(self, count: int = 32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(6, 60, (count, LENGTH), generator=generator)
        self.labels = torch.arange(count) % 2
        self.ids[:, 1] = torch.where(self.labels == 1, MARK, self.ids[:, 1])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {"input_ids": self.ids[i], "attention_mask": torch.ones(LENGTH, dtype=torch.int64)}
        return {**row, "labels": int(self.labels[i]), "allowed": self.ids[i] != MARK}


def batch(count: int = 4) -> dict[str, Tensor]:
    ids = Texts().ids[:count]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def outside(explanation: Any, inputs: Any) -> Tensor:
    return share_outside(explanation.relevance["input_ids"], inputs["allowed"])


def trained(
    directory: Path, weight: float, monitor: Monitor, dropout: float = 0.1, **arguments: Any
) -> Any:
    transformers = importlib.import_module("transformers")
    pytest.importorskip("accelerate")

    class Trainer(ExplanationLossMixin, transformers.Trainer):
        pass

    given = transformers.TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=8,
        learning_rate=1e-2,
        remove_unused_columns=False,
        seed=0,
        **{"max_steps": 16, "per_device_train_batch_size": 8, **arguments},
    )
    model = classifier()
    model.dropout.p = dropout
    trainer = Trainer(
        model=model,
        args=given,
        train_dataset=Texts(),
        explanation_loss=ExplanationLoss(outside, weight, reads=("allowed",)),
        callbacks=[ExplanationCallback(monitor)],
    )
    trainer.train()
    return trainer


def test_transformers_trainer(tmp_path, capsys):
    """The term goes down where it is trained with, and both are logged."""
    shares = {}
    for weight in (0.0, 10.0):
        seen: list[int] = []
        mask = batch()["input_ids"] != MARK
        monitor = Monitor(
            batch(),
            every=8,
            target=1,
            mask=mask,
            sinks=[lambda record, s=seen: s.append(record.step)],
        )
        trainer = trained(tmp_path, weight, monitor)
        assert trainer.model.training
        assert seen == [0, 8, 16]
        history = trainer.state.log_history
        looks = [entry for entry in history if "relevance/outside" in entry]
        assert [entry["step"] for entry in looks] == [0, 8, 16]
        shares[weight] = looks[-1]["relevance/outside"]
        terms = [entry["explanation_loss"] for entry in history if "explanation_loss" in entry]
        assert len(terms) == (2 if weight else 0)
    assert shares[10.0] < shares[0.0] / 2, shares


def test_transformers_trainer_accumulates(tmp_path, capsys):
    """Two halves of a batch, in the trainer's own precision, weigh what one whole batch does."""
    ends = []
    for size, steps in ((8, 1), (4, 2)):
        trainer = trained(
            tmp_path,
            1.0,
            Monitor(batch(), every=100, target=1),
            dropout=0.0,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            bf16=True,
            optim="sgd",
            train_sampling_strategy="sequential",
        )
        assert "bfloat16" in trainer._explainer.program.code
        ends.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    start = torch.cat([p.detach().flatten() for p in classifier().parameters()])
    moved = [end - start for end in ends]
    assert float((moved[0] - moved[1]).norm()) < 0.05 * float(moved[0].norm())


def test_sharded_parameters_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("attnlrp_fx.training.trainer.SHARDED", ("NO",))
    with pytest.raises(InputError, match="explanations need whole parameters"):
        trained(tmp_path, 1.0, Monitor(batch(), target=1))


def test_lightning_and_tensorboard(tmp_path, monkeypatch, capsys):
    """A run of Lightning's that logs to TensorBoard: curves, pictures, text, pages."""
    pytest.importorskip("lightning")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from attnlrp_fx.training.lightning import ExplanationCallback
    from attnlrp_fx.training.tensorboard import TensorBoard

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = classifier()

        def training_step(self, rows: dict[str, Tensor], index: int) -> Tensor:
            rows.pop("allowed")
            loss: Tensor = self.model(**rows)["loss"]
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    board = TensorBoard(logger.experiment)
    monitor = Monitor(batch(), every=2, target=1, sinks=[board])
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExplanationCallback(monitor, lambda module: module.model)],
    )
    loader = torch.utils.data.DataLoader(Texts(), batch_size=4)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, of workers and of its own use of torch
        module = Module().train()
        trainer.fit(module, loader)
    assert len(monitor.statistics) == 3
    assert module.model.training
    board.writer.close()
    events = EventAccumulator(str(tmp_path / "run"), {"tensors": 0, "images": 0, "scalars": 0})
    events.Reload()
    assert [e.step for e in events.Scalars("explanation/total")] == [0, 2, 4]
    assert [e.step for e in events.Images("explanation")] == [0, 2, 4]
    assert "relevance/total" in events.Tags()["scalars"]
    (text, *_) = events.Tensors("explanation/top/text_summary")
    assert b"| 0 | `" in text.tensor_proto.string_val[0]
    assert board.page(4).read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("module", "missing"),
    [("lightning", "lightning.pytorch"), ("tensorboard", "torch.utils.tensorboard")],
)
def test_without_the_extra(monkeypatch, module, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, f"attnlrp_fx.training.{module}", raising=False)
    with pytest.raises(MissingExtraError, match=r"attnlrp_fx\[train\]"):
        importlib.import_module(f"attnlrp_fx.training.{module}")
    monkeypatch.delitem(sys.modules, f"attnlrp_fx.training.{module}", raising=False)


def test_monitor():
    model = classifier().train()
    monitor = Monitor(batch(), every=1, target=1)
    first = monitor.look(model, 0)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    second = monitor.look(model, 1)
    assert first.statistics.total != second.statistics.total
    assert monitor._explainer.compilations == 1
    with pytest.raises(InputError, match="another model"):
        monitor.look(classifier(), 2)
    with pytest.raises(InputError, match="every is 0"):
        Monitor(batch(), every=0)
    with pytest.raises(InputError, match="no tokenizer"):
        Monitor(["a text"])


def test_statistics():
    """By hand; padding does not count."""
    explanation = attnlrp_fx.Explanation(
        relevance={"ids": torch.tensor([[3.0, -1.0, 9.0], [2.0, 2.0, 0.0]])},
        outputs=None,
        target_value=torch.tensor([1.0, 3.0]),
        target="logit",
        inputs={"ids": torch.zeros(2, 3, dtype=torch.int64)},
        mask={"ids": torch.tensor([[1, 1, 0], [1, 1, 0]])},
    )
    found = RelevanceStatistics.of(explanation, mask=torch.tensor([True, False, True]))
    assert (found.target_value, found.total) == (2, 4)
    assert found.positive == pytest.approx((3 / 4 + 1) / 2)
    assert found.outside == pytest.approx((1 / 4 + 1 / 2) / 2)
    first = (4 / 10**0.5 - 1) / (2**0.5 - 1)
    assert found.spread == pytest.approx((first + 1) / 2, rel=1e-5)
    with pytest.raises(InputError, match="'other' is not explained"):
        RelevanceStatistics.of(explanation, "other")
