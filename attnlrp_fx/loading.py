"""Load a model and what prepares its inputs, from a directory, the hub or this package.

A model's class is the one that its configuration names, or that of a task. What does not load
raises one error with one cause; transformers' own warnings and progress bars stay silent.

transformers is imported where it is needed: it takes a second, and `--help` does not need it.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from attnlrp_fx.errors import InputError, MissingExtraError, ModelNotFoundError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

IMAGES = "image-classification"
"""The task whose inputs are images; those of the others are texts."""


class Task(NamedTuple):
    """What transformers has for a task."""

    model: str
    """The class that loads a model for it."""
    listed: str
    """The table of the models that do it."""
    embedded: str = "sentiment"
    """The model of this package that is loaded if none is named."""


TASKS: Mapping[str, Task] = {
    "text-classification": Task(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "token-classification": Task(
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    ),
    "question-answering": Task(
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    ),
    "text-generation": Task("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "text2text-generation": Task(
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    ),
    IMAGES: Task(
        "AutoModelForImageClassification",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "digits_transformer",
    ),
}

EMBEDDED = ("sentiment", "digits_transformer", "digits_convolutional")
"""The models in this package, by name: of film reviews, and two of images of digits."""

DTYPES = ("float32", "float64", "bfloat16", "float16")

_LOGGERS = ("transformers", "huggingface_hub", "httpx", "torch")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load(
    model: str | Path | None = None,
    task: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> tuple["PreTrainedModel", Any]:
    """A model in evaluation mode, and its tokenizer, or its image processor if it reads images.

    Args:
        model: a directory, one of `EMBEDDED`, or a name on the model hub; None: the model in this
            package for the task. What looks like a path is never looked for on the hub.
        task: one of `TASKS`; None: the class that the model's configuration names.
        device: where the model goes, as torch writes it.
        dtype: one of `DTYPES`, whatever the weights are stored in.

    Raises:
        ModelNotFoundError: there is no such model, its files do not load, or it lacks the weights
            that the task needs.
        MissingExtraError: the model reads images, and pillow is not installed.
        InputError: an unknown task, device or dtype.
    """
    if task is not None and task not in TASKS:
        raise InputError(f"there is no task '{task}'", remedy=f"use one of: {', '.join(TASKS)}")
    place, number = _device(device), _dtype(dtype)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        if model is None:
            model = TASKS[task].embedded if task else "sentiment"
        source = stack.enter_context(_source(model))
        local = isinstance(source, Path)
        try:
            return _load(source, task, place, number, local)
        except (ModelNotFoundError, MissingExtraError):
            raise
        except Exception as error:
            raise _not_loaded(model, error, local) from error


def task_of(model: "PreTrainedModel") -> str | None:
    """The task that transformers lists a model's class under, None if it is none of `TASKS`."""
    from transformers.models.auto import modeling_auto

    name = type(model).__name__
    for task, known in TASKS.items():
        for listed in getattr(modeling_auto, known.listed).values():
            if name in ((listed,) if isinstance(listed, str) else listed):
                return task
    return None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and progress bars of what lies below us."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        transformers_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _device(name: str) -> "torch.device":
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        raise InputError(
            f"there is no device '{name}' here",
            remedy=f"use one of: {', '.join(['cpu', *cuda, *mps])}",
        ) from error
    if device.type == "meta":
        raise InputError("device 'meta' holds no values", remedy="use cpu")
    return device


def _dtype(name: str) -> "torch.dtype":
    import torch

    if name not in DTYPES:
        raise InputError(f"there is no dtype '{name}'", remedy=f"use one of: {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@contextmanager
def _source(model: str | Path) -> Iterator[Path | str]:
    """The directory to load from, or a name for the hub."""
    if model in EMBEDDED:
        embedded = files("attnlrp_fx") / "embedded" / str(model)
        if not (embedded / "config.json").is_file():
            raise ModelNotFoundError(
                f"this installation lacks the embedded model '{model}'",
                remedy="install attnlrp_fx again, or name a model",
            )
        with as_file(embedded) as directory:
            yield directory
        return
    directory = Path(model).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise ModelNotFoundError(
                f"directory '{model}' holds no config.json",
                remedy="name a directory written by save_pretrained",
            )
        yield directory
    elif directory.exists():
        raise ModelNotFoundError(
            f"'{model}' is a file", remedy="name the directory that holds config.json"
        )
    elif isinstance(model, Path) or _looks_like_path(model):
        raise ModelNotFoundError(
            f"there is no directory '{model}'", remedy="check the path of the model"
        )
    else:
        yield model


def _looks_like_path(name: str) -> bool:
    """Whether a name can only be a path: no name of the hub, or inside a directory that is here."""
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        return True
    parent, slash, _ = name.partition("/")
    return bool(slash) and Path(parent).is_dir()


def _load(
    source: Path | str,
    task: str | None,
    device: "torch.device",
    dtype: "torch.dtype",
    local: bool,
) -> tuple["PreTrainedModel", Any]:
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, local_files_only=local)
    if task is not None:
        chosen = getattr(transformers, TASKS[task].model)
    else:
        architecture = next(iter(getattr(config, "architectures", None) or []), None)
        chosen = getattr(transformers, architecture or "", None)
        if chosen is None:
            raise ModelNotFoundError(
                f"the class of model '{source}' is not known",
                why=f"its configuration names {architecture or 'none'}",
                remedy=f"name a task: {', '.join(TASKS)}",
            )
    loaded, information = chosen.from_pretrained(
        source, dtype=dtype, output_loading_info=True, local_files_only=local
    )
    missing = sorted(information["missing_keys"])
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelNotFoundError(
            f"model '{source}' has no weights for {', '.join(missing[:3])}{rest}",
            why=f"{type(loaded).__name__} would get random ones",
            remedy="choose the task that the model was trained for",
        )
    return loaded.to(device).eval(), _reader(loaded, source, local)


def _reader(model: "PreTrainedModel", source: Path | str, local: bool) -> Any:
    """What makes a model's inputs: the image processor of one that reads images, or a tokenizer."""
    from transformers import AutoImageProcessor, AutoTokenizer

    if task_of(model) != IMAGES:
        return AutoTokenizer.from_pretrained(source, local_files_only=local)
    need_pillow()
    # The other backend needs torchvision, and resizes a little differently.
    return AutoImageProcessor.from_pretrained(source, local_files_only=local, backend="pil")


def need_pillow() -> None:
    """Find out whether images can be read.

    Raises:
        MissingExtraError: pillow is not installed.
    """
    try:
        import PIL.Image  # noqa: F401  # asked for, not used here
    except ImportError as error:
        raise MissingExtraError(
            "Reading images needs pillow.",
            why=str(error),
            remedy="pip install 'attnlrp_fx[image]'",
        ) from error


def _not_loaded(model: str | Path, error: Exception, local: bool) -> ModelNotFoundError:
    """What stopped transformers, in one sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    what = f"model '{model}'"
    if local:
        return ModelNotFoundError(
            f"{what} could not be loaded",
            why=f"{type(error).__name__}: {lines[0]}",
            remedy="check that its files are whole and that transformers knows its type",
        )
    return ModelNotFoundError(
        f"{what} is no directory here, and could not be had from the model hub",
        why=lines[0],
        remedy="check the name and the network, or name a directory",
    )
