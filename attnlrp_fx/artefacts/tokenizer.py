"""A tokenizer in a file, and out of it without transformers.

The fast tokenizers of transformers are of the library `tokenizers`, whose own format is JSON. Of
another tokenizer the spelling of its tokens is kept: explanations are labelled, texts are not cut.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from attnlrp_fx.errors import ArtefactError, InputError, MissingExtraError

_SETTINGS = ("pad_token", "pad_token_id", "eos_token", "eos_token_id", "model_max_length")
_CLEANED = (" .", " ?", " !", " ,", " n't", " 'm", " 's", " 've", " 're")


def tokenizer_as_json(tokenizer: Any) -> str:
    """A tokenizer as text.

    Raises:
        ArtefactError: it neither is a fast tokenizer nor has a number of tokens.
    """
    settings = {name: _number_or_text(getattr(tokenizer, name, None)) for name in _SETTINGS}
    names = list(getattr(tokenizer, "model_input_names", ["input_ids", "attention_mask"]))
    about = {**settings, "names": names}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        cleans = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
        return json.dumps({**about, "cleans": cleans, "tokenizer": json.loads(fast.to_str())})
    if not hasattr(tokenizer, "__len__"):
        raise ArtefactError(
            f"a tokenizer of class {type(tokenizer).__name__} cannot be saved",
            why="it is no fast tokenizer of transformers, and does not say how many tokens it has",
            remedy="compile without it",
        )
    ids = list(range(len(tokenizer)))
    decode = getattr(tokenizer, "decode", None)
    tokens = list(map(str, tokenizer.convert_ids_to_tokens(ids)))
    texts = tokens if decode is None else [str(decode([i])) for i in ids]
    return json.dumps({**about, "tokens": tokens, "texts": texts})


def _number_or_text(value: Any) -> int | str | None:
    return value if isinstance(value, int | str) else None


def tokenizer_of_json(text: str) -> "Vocabulary":
    """The tokenizer that was written.

    Raises:
        ValueError, KeyError, TypeError: it is none.
        MissingExtraError: the library `tokenizers` is not installed.
    """
    about = json.loads(text)
    if "tokenizer" not in about:
        return Vocabulary(about, about["tokens"], about["texts"])
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise MissingExtraError(
            "The file has a tokenizer, which needs the library tokenizers.",
            why=str(error),
            remedy="pip install tokenizers",
        ) from error
    made = Tokenizer.from_str(json.dumps(about["tokenizer"]))
    made.no_truncation()
    made.no_padding()
    return SavedTokenizer(about, made)


class Vocabulary:
    """How tokens are spelled."""

    def __init__(
        self, about: Mapping[str, Any], tokens: Sequence[str], texts: Sequence[str]
    ) -> None:
        self.pad_token, self.pad_token_id = about["pad_token"], about["pad_token_id"]
        self.eos_token, self.eos_token_id = about["eos_token"], about["eos_token_id"]
        self.model_max_length: int = about["model_max_length"] or 1 << 30
        self.model_input_names: list[str] = list(about["names"])
        self._tokens, self._texts = tokens, texts

    def __len__(self) -> int:
        return len(self._tokens)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens of some ids, as the vocabulary spells them."""
        return [str(self._tokens[i]) if 0 <= i < len(self._tokens) else "None" for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """What ids say."""
        return "".join(str(self._texts[i]) for i in ids)


class SavedTokenizer(Vocabulary):
    """A fast tokenizer: texts to ids, as transformers would cut them."""

    def __init__(self, about: Mapping[str, Any], tokenizer: Any) -> None:
        super().__init__(about, (), ())
        self._about, self._tokenizer, self._cleans = dict(about), tokenizer, bool(about["cleans"])

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """The tokens of some ids, as the vocabulary spells them."""
        return [str(self._tokenizer.id_to_token(i)) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """What ids say."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=False))
        if self._cleans:
            for spaced in _CLEANED:
                text = text.replace(spaced, spaced[1:])
        return text

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        return_tensors: str | None = None,
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        padding_side: str = "right",
    ) -> dict[str, Any]:
        """The model's inputs for a text, or for several.

        Args:
            text: one text, or several.
            return_tensors: "pt" for int64 tensors (texts, length); None: lists.
            padding: whether texts are padded to the longest.
            truncation: whether they are cut to max_length, or to what the model reads.
            max_length: the most tokens of a text.
            padding_side: "right" or "left".

        Raises:
            InputError: tensors of texts of unlike lengths, or a padding token that is not there.
        """
        texts = [text] if isinstance(text, str) else list(text)
        cut = (max_length or self.model_max_length) if truncation else None
        self._tokenizer.no_truncation() if cut is None else self._tokenizer.enable_truncation(cut)
        encodings = self._tokenizer.encode_batch(texts)
        longest = max(map(len, encodings), default=0)
        if padding and any(len(one) < longest for one in encodings):
            token = self._tokenizer.token_to_id(self.pad_token) if self.pad_token else None
            if token is None:
                raise InputError("the tokenizer has no token to pad with", remedy="set pad_token")
            for one in encodings:
                one.pad(
                    longest,
                    direction=padding_side,
                    pad_id=token,
                    pad_token=self.pad_token,
                )
        fields = {
            "input_ids": [one.ids for one in encodings],
            "token_type_ids": [one.type_ids for one in encodings],
            "attention_mask": [one.attention_mask for one in encodings],
        }
        found: dict[str, Any] = {n: v for n, v in fields.items() if n in self.model_input_names}
        if return_tensors is None:
            return {n: v[0] for n, v in found.items()} if isinstance(text, str) else found
        if len({len(one) for one in encodings}) > 1:
            raise InputError("the texts have unlike lengths", remedy="pass padding=True")
        return {name: torch.tensor(rows, dtype=torch.int64) for name, rows in found.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"about": self._about, "tokenizer": self._tokenizer.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        made = type(self)(state["about"], Tokenizer.from_str(state["tokenizer"]))
        self.__dict__ = made.__dict__
