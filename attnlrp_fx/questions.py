"""From the words of a command line to a model's inputs and a target.

A label, a number or the text of a token becomes an index; a question and its context, what a
decoder has written so far, or the files of images become inputs. PyTorch is imported where it is
needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlrp_fx.errors import InputError, TargetError
from attnlrp_fx.loading import IMAGES, TASKS, need_pillow, task_of

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedModel

    from attnlrp_fx.targets import Target

ALL_OTHERS = "*"
SPANS = {"start": "start_logits", "end": "end_logits"}
"""The outputs of a model that answers with a span of its input."""


def check_texts(texts: Sequence[str]) -> None:
    """Empty texts are found before anything slow."""
    for number, text in enumerate(texts, 1):
        if not text.strip():
            which = "the text" if len(texts) == 1 else f"text {number}"
            raise InputError(f"{which} is empty", remedy="pass at least one word")


def check_images(paths: Sequence[str]) -> None:
    """Images that are not there are found before anything slow.

    Raises:
        InputError: a path is that of no file.
    """
    for path in paths:
        if not Path(path).is_file():
            what = f"'{path}' is a directory" if Path(path).is_dir() else f"there is no '{path}'"
            raise InputError(what, remedy="name the file of an image")


def read_images(paths: Sequence[str]) -> list["Image"]:
    """The images in files, the right way up.

    Raises:
        InputError: a path is that of no file, or of one that holds no image.
        MissingExtraError: pillow is not installed.
    """
    need_pillow()
    from PIL import Image, ImageOps

    check_images(paths)
    images = []
    for path in paths:
        try:
            with Image.open(path) as opened:
                images.append(ImageOps.exif_transpose(opened))
        except Exception as error:  # each of Pillow's readers has errors of its own
            raise InputError(
                f"'{path}' cannot be read as an image",
                why=f"{type(error).__name__}: {error}",
                remedy="name a PNG or JPEG file that other programs open",
            ) from error
    return images


def inputs_of(
    model: "PreTrainedModel",
    reader: Any,
    given: Sequence[str],
    context: str | None,
    decoder_text: str | None,
) -> dict[str, "Tensor"]:
    """The model's inputs, a row a text, or a row an image if ``reader`` is an image processor.

    Raises:
        InputError: a context or decoder text that the model has no use for, or lacks; an image
            that cannot be read.
        MissingExtraError: it reads images, and pillow is not installed.
    """
    from attnlrp_fx.compiler import preprocess, tokenize

    task = task_of(model)
    if task is None and not _says_tokens(model):
        raise InputError(
            f"{type(model).__name__} has outputs that are neither labels, spans nor tokens",
            remedy=f"name a --task that its weights were trained for ({', '.join(TASKS)}), "
            "or explain it from Python with attnlrp_fx.compile",
        )
    answers = task == "question-answering"
    decodes = bool(model.config.is_encoder_decoder) and _says_tokens(model)
    if answers and (context is None or not context.strip()):
        raise InputError("a question needs a text to be about", remedy="pass --context TEXT")
    if context is not None and not answers:
        raise InputError(
            "this model answers no questions about a context", remedy="leave --context out"
        )
    if decoder_text is not None and not decodes:
        raise InputError(
            "this model has no decoder to continue a text", remedy="leave --decoder-text out"
        )
    if task == IMAGES:
        return preprocess(reader, read_images(given), model.dtype)
    if answers:
        inputs = dict(
            reader(list(given), [context] * len(given), return_tensors="pt", padding=len(given) > 1)
        )
    else:
        inputs = tokenize(reader, list(given))
    if decodes:
        inputs["decoder_input_ids"] = _decoder_ids(model, reader, decoder_text, len(given))
    _check_lengths(model, reader, inputs)
    return inputs


def _check_lengths(
    model: "PreTrainedModel", tokenizer: Any, inputs: Mapping[str, "Tensor"]
) -> None:
    """A text that is too long is found before anything slow.

    Raises:
        InputError: the model has no position for its last token.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return
    longest = min(positions, getattr(tokenizer, "model_max_length", positions))
    for name, tensor in inputs.items():
        if name.endswith("input_ids") and tensor.shape[1] > longest:
            what = "the decoder text" if name.startswith("decoder") else "the text"
            raise InputError(
                f"{what} is {tensor.shape[1]} tokens long, the model reads {longest}",
                remedy="shorten it",
            )


def _decoder_ids(
    model: "PreTrainedModel", tokenizer: Any, text: str | None, batch: int
) -> "Tensor":
    """What the decoder has written when the explained token comes: its start, and the text."""
    import torch

    settings = [getattr(model, "generation_config", None), model.config]

    def setting(name: str) -> int | None:
        return next((v for s in settings if (v := getattr(s, name, None)) is not None), None)

    start = setting("decoder_start_token_id")
    start = setting("bos_token_id") if start is None else start
    if start is None:
        raise InputError(
            "the model's configuration does not say which token its decoder starts with",
            remedy="set decoder_start_token_id in its config.json",
        )
    forced = setting("forced_bos_token_id")
    ids = [start] if forced is None else [start, forced]
    if text is not None:
        ids += tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
    return torch.tensor([ids] * batch)


def target_of(
    model: "PreTrainedModel",
    tokenizer: Any,
    target: str | None,
    position: int | None,
    contrast: Sequence[str],
) -> "Target":
    """What to explain, from the words on the command line.

    Raises:
        TargetError: a label that the model does not have, or one contrasted with itself.
    """
    from attnlrp_fx.targets import Contrast, Logit

    if task_of(model) == "question-answering":
        return _span_target(target, position, contrast)
    index = _index(model, tokenizer, target)
    if not contrast:
        return Logit(index, position)
    if ALL_OTHERS in contrast:
        if len(contrast) > 1:
            raise TargetError(
                f"'{ALL_OTHERS}' already stands for all others", remedy="leave the others out"
            )
        return Contrast(index, None, position)
    against = [found for name in contrast if (found := _index(model, tokenizer, name)) is not None]
    if index in against:
        raise TargetError(f"'{target}' is contrasted with itself", remedy="name another label")
    return Contrast(index, against, position)


def _span_target(target: str | None, position: int | None, contrast: Sequence[str]) -> "Target":
    """The start and the end of a span together, or one of them."""
    from attnlrp_fx.targets import Logit

    if position is not None or contrast:
        option = "--contrast" if contrast else "--position"
        raise TargetError(f"{option} has no meaning for a span", remedy=f"leave {option} out")
    if target is None:
        return Logit()
    if target not in SPANS:
        raise TargetError(f"a span has no '{target}'", remedy=f"use one of: {', '.join(SPANS)}")
    return Logit(output=SPANS[target])


def _index(model: "PreTrainedModel", tokenizer: Any, name: str | None) -> int | None:
    """The index of a label, a class or a token.

    Raises:
        TargetError: there is none of that name.
    """
    if name is None:
        return None
    if name.isascii() and name.removeprefix("-").isdigit():
        return int(name)
    if _says_tokens(model):
        return _token(tokenizer, name)
    labels = {int(index): str(label) for index, label in (model.config.id2label or {}).items()}
    for known in (name.__eq__, lambda label: label.casefold() == name.casefold()):
        found = [index for index, label in labels.items() if known(label)]
        if len(found) == 1:
            return found[0]
    shown = list(labels.values())[:20]
    rest = f" and {len(labels) - 20} more" if len(labels) > 20 else ""
    raise TargetError(
        f"the model has no label '{name}'", remedy=f"use one of: {', '.join(shown)}{rest}"
    )


def _says_tokens(model: "PreTrainedModel") -> bool:
    """Whether the classes of a model's output are its vocabulary."""
    return model.get_output_embeddings() is not None


def _token(tokenizer: Any, text: str) -> int:
    """The one token that a text is; a text that is none may be the vocabulary's own spelling."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    unknown = tokenizer.unk_token_id
    if len(ids) == 1 and ids[0] != unknown:
        return ids[0]
    spelled = tokenizer.get_vocab().get(text)
    if spelled is not None:
        return int(spelled)
    spaced = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
    if len(spaced) == 1 and spaced[0] != unknown:
        remedy = f"with a space before it, ' {text}', it is one"
    else:
        remedy = "name one token, or its index"
    if not ids or unknown in ids:
        raise TargetError(f"the model's vocabulary does not know '{text}'", remedy=remedy)
    pieces = " · ".join(repr(tokenizer.decode([i])) for i in ids)
    raise TargetError(f"'{text}' is {len(ids)} tokens: {pieces}", remedy=remedy)
