"""What `attnlrp-fx explain` does with a file of an explainer, and with a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from attnlrp_fx.commands import check_writable
from attnlrp_fx.errors import InputError, TargetError
from attnlrp_fx.loading import IMAGES, load, quiet, task_of
from attnlrp_fx.questions import target_of
from attnlrp_fx.texts import Cut, Texts, longest

if TYPE_CHECKING:
    from attnlrp_fx.codegen.programs import Stage
    from attnlrp_fx.runtime.explainer import ExplainableGraphModule
    from attnlrp_fx.targets import Target


def is_file_of_explainer(model: str | None) -> bool:
    """Whether a model is named by a file that `attnlrp-fx compile` writes."""
    return model is not None and model.endswith(".pt2")


class Question(NamedTuple):
    """What is asked."""

    target: str | None
    composite: str | None
    backend: str


class TextFile(NamedTuple):
    """A file of texts."""

    path: Path | None
    column: str
    length: int | None
    """The most tokens of a text."""


def of_file(
    model: str, given: Sequence[str], question: Question, device: str, stage: "Stage"
) -> tuple["ExplainableGraphModule", dict[str, Any], "Target | None"]:
    """The explainer in a file, the inputs of texts, and the target.

    Raises:
        ArtefactError, TargetError: the file is none, or has no such target.
        InputError: it has no tokenizer.
    """
    explainer = _in_file(model, question, device, stage)
    from attnlrp_fx.compiler import tokenize

    inputs = tokenize(explainer.tokenizer, list(given))
    return explainer, inputs, target_in_file(explainer, question.target)


def _in_file(
    model: str, question: Question, device: str, stage: "Stage"
) -> "ExplainableGraphModule":
    """The explainer in a file, with other rules if they are named, and a tokenizer."""
    import attnlrp_fx

    explainer = attnlrp_fx.load(model, backend=question.backend, device=device, on_stage=stage)
    if not callable(explainer.tokenizer):
        raise InputError(
            f"'{model}' has no tokenizer to cut texts with",
            remedy="save an explainer that was compiled with one, or explain it from Python",
        )
    composite = question.composite
    return explainer if composite is None else explainer.with_composite(composite)


def target_in_file(explainer: "ExplainableGraphModule", name: str | None) -> "Target | None":
    """What to explain, by an index, a label, or the one token that a text is.

    Raises:
        TargetError: there is none of that name.
    """
    from attnlrp_fx.targets import Logit

    if name is None:
        return None
    if name.isascii() and name.removeprefix("-").isdigit():
        return Logit(int(name))
    labels = explainer._running.options.labels
    found = [
        i for i, label in (labels.id2label or {}).items() if str(label).lower() == name.lower()
    ]
    if not found and not labels.id2label and labels.tokenizer is not None:
        tokenizer = labels.tokenizer
        found = [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == name]
    if len(found) != 1:
        known = ", ".join(map(str, (labels.id2label or {}).values()))
        raise TargetError(
            f"the model has no label '{name}'", remedy=f"use one of: {known}" if known else ""
        )
    return Logit(found[0])


@dataclass(frozen=True)
class Prepared:
    """A data set that can be explained."""

    explainer: "ExplainableGraphModule"
    target: "Target | None"
    texts: Texts
    output: Path
    about: Mapping[str, Any]
    """What tells it from other data."""

    def write(self, batch_size: int, progress: bool) -> None:
        """Explain every text, write the table, and print what was done."""
        from attnlrp_fx.statistics.relevance import write_relevance

        with quiet():
            done = write_relevance(
                self.explainer,
                self.texts,
                self.output,
                target=self.target,
                batch_size=batch_size,
                about=self.about,
                progress=progress,
            )
        what = str(done) if done.samples else "done before"
        console = Console(highlight=False)
        console.print(f"{self.output}: {len(self.texts):,} texts; {what}", soft_wrap=True)


def prepare(
    model: str | None,
    data: TextFile,
    output: Path | None,
    loading: tuple[str | None, str, str],
    question: Question,
    stage: "Stage",
) -> Prepared:
    """Load or compile what explains the texts of a file.

    Args:
        model: a file of an explainer, or a model; None: the embedded one.
        data: the texts.
        output: the table.
        loading: task, device and dtype of a model.
        question: target, composite and backend.
        stage: told of each slow step.

    Raises:
        InputError: there is no place for the table, no file of texts, or no tokenizer.
    """
    if output is None or data.path is None:
        raise InputError(
            "--input needs a place for the table, and --output a file of texts",
            remedy="attnlrp-fx explain MODEL --input texts.jsonl --output relevance.parquet",
        )
    check_writable(output)
    texts = Texts(data.path, data.column)
    stage("importing PyTorch")
    from attnlrp_fx.statistics import store

    store.need_pyarrow()
    with quiet():
        if is_file_of_explainer(model):
            explainer = _in_file(str(model), question, loading[1], stage)
            most = longest(explainer.model, explainer.tokenizer, data.length)
            explainer.tokenizer = Cut(explainer.tokenizer, most)
            target = target_in_file(explainer, question.target)
        else:
            explainer, target = _compiled(model, texts, data.length, loading, question, stage), None
    about = {"file": texts.digest, "column": data.column, "length": data.length}
    return Prepared(explainer, target, texts, output, about)


def _compiled(
    model: str | None,
    texts: Texts,
    length: int | None,
    loading: tuple[str | None, str, str],
    question: Question,
    stage: "Stage",
) -> "ExplainableGraphModule":
    """A model compiled for texts."""
    from attnlrp_fx.compiler import compile, tokenize

    stage("loading the model")
    loaded, reader = load(model, *loading)
    if task_of(loaded) == IMAGES:
        raise InputError("this model reads images, and --input is a file of texts")
    cut = Cut(reader, longest(loaded, reader, length))
    return compile(
        loaded,
        tokenize(cut, texts.some(2)),
        composite=question.composite or "attnlrp",
        target=target_of(loaded, reader, question.target, None, []),
        backend=question.backend,
        tokenizer=cut,
        on_stage=stage,
    )
