"""Tokens as text.

Tokens arrive as a tokenizer's vocabulary spells them. `pieces` undoes the three common spellings
(byte-level BPE, SentencePiece, WordPiece) so that the text reads as it was written, and makes
visible what would otherwise not be seen: white space, control and formatting characters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

Spelling = Literal["byte", "sentencepiece", "wordpiece", "word"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A token as drawn: its visible text, whether a space stands before it, and its kind."""

    text: str
    gap: bool
    special: bool


CONTINUED = "◂"
"""Stands for a token that holds nothing but later bytes of a character begun before it."""

_SPECIAL = re.compile(
    r"<[|｜].*[|｜]>"
    r"|\[[A-Z][A-Z0-9_]+\]"
    r"|</?(?:s|pad|unk|mask|bos|eos|sep|cls|image|(?:start|end)_of_\w+|extra_id_\d+)>"
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORDPIECE = re.compile(r"##[^#]")
_CLOSING = frozenset(".,!?;:%)]}…。、，！？；：）」』")
_OPENING = frozenset("([{（「『")
_CLITICS = frozenset({"s", "t", "re", "ve", "m", "ll", "d"})
_JOINERS = frozenset("\u200c\u200d\ufe0e\ufe0f")


@cache
def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE spells each byte as one printable character (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + n): byte for n, byte in enumerate(others)}


def is_special(token: str) -> bool:
    """Whether a token looks like a control token ([CLS], </s>, <|endoftext|>), not like text."""
    return _SPECIAL.fullmatch(token) is not None


def spelling_of(tokens: Iterable[str]) -> Spelling:
    """How a vocabulary spells word boundaries, judged by the marks that occur most.

    Pass all tokens of an input, over all rows: a short row may have no mark. "word" means that no
    mark was found; tokens then stand for words.
    """
    words = [token for token in tokens if token and not is_special(token)]
    marks: dict[Spelling, int] = {
        "byte": sum(word[0] in "ĠĊĉč" for word in words),
        "sentencepiece": sum(bool("▁" in word or _BYTE_TOKEN.fullmatch(word)) for word in words),
        "wordpiece": sum(bool(_WORDPIECE.match(word)) for word in words),
    }
    best = max(marks, key=lambda name: marks[name])
    if marks[best]:
        return best
    return "byte" if _spells_utf8("".join(words)) else "word"


def _spells_utf8(text: str) -> bool:
    """Whether non-ASCII text is UTF-8 spelled byte by byte; real Latin text never is by chance."""
    table = byte_alphabet()
    if text.isascii() or any(character not in table for character in text):
        return False
    try:
        bytes(table[character] for character in text).decode()
    except UnicodeDecodeError:
        return False
    return True


def pieces(tokens: Sequence[str], spelling: Spelling) -> list[Piece]:
    """Tokens as drawn, one piece each: joined they read as the text did."""
    texts = decoded(tokens, spelling)
    drawn: list[Piece] = []
    for i, (token, text) in enumerate(zip(tokens, texts, strict=True)):
        special = is_special(token)
        if spelling in ("wordpiece", "word"):
            continues = spelling == "wordpiece" and _WORDPIECE.match(text) is not None
            gap = not continues and not _glued(texts, i)
            text = text[2:] if continues else text
        else:
            gap = text.startswith(" ") and bool(text.strip(" "))
            text = text[1:] if gap else text
        gap = gap or special or (i > 0 and drawn[-1].special)
        starts_line = not drawn or drawn[-1].text.endswith("\n")
        drawn.append(Piece(visible(text), gap and not starts_line, special))
    return drawn


def decoded(tokens: Sequence[str], spelling: Spelling) -> list[str]:
    """The characters each token stands for, white space as itself."""
    if spelling == "byte":
        table = byte_alphabet()
        return _decode(
            [
                bytes(table[c] for c in token) if all(c in table for c in token) else token
                for token in tokens
            ]
        )
    if spelling == "sentencepiece":
        return _decode(
            [
                bytes.fromhex(byte[1])
                if (byte := _BYTE_TOKEN.fullmatch(token))
                else (token if is_special(token) else token.replace("▁", " "))
                for token in tokens
            ]
        )
    return list(tokens)


def _decode(chunks: Sequence[bytes | str]) -> list[str]:
    """UTF-8 across tokens: a character belongs to the token that begins it."""
    texts = [chunk if isinstance(chunk, str) else "" for chunk in chunks]
    owners = [
        (i, byte)
        for i, chunk in enumerate(chunks)
        for byte in (chunk if isinstance(chunk, bytes) else (None,))
    ]
    at = 0
    while at < len(owners):
        owner, byte = owners[at]
        if byte is None:
            at += 1
            continue
        size = 1 + (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
        run = bytes(b for _, b in owners[at : at + size] if b is not None)
        try:
            character = run.decode()
        except UnicodeDecodeError:
            character, size = "\ufffd", 1
        texts[owner] += character
        at += size
    return [
        CONTINUED if not text and chunk else text for text, chunk in zip(texts, chunks, strict=True)
    ]


def _glued(texts: Sequence[str], i: int) -> bool:
    """Whether word ``i`` joins the one before it: punctuation, apostrophes, CJK."""
    if i == 0:
        return False
    before, word = texts[i - 1], texts[i]
    after = texts[i + 1] if i + 1 < len(texts) else ""
    if word in _CLOSING or before in _OPENING:
        return True
    if word == "'" and after in _CLITICS:
        return True
    if before == "'" and word in _CLITICS:
        return True
    return _is_cjk(before[-1:]) and _is_cjk(word[:1])


def _is_cjk(character: str) -> bool:
    return "\u3040" <= character <= "\u9fff"


def visible(text: str) -> str:
    """``text`` with everything that a reader could not see, or that could act, made visible.

    Spaces at either end become ``·``, a newline ``⏎`` before itself, control characters their
    pictures, and formatting characters (bidirectional overrides, lone surrogates, zero widths)
    their code points. Joiners inside a token stay, for the emoji and scripts that need them.
    """
    if not text:
        return "∅"
    core = text.strip(" ")
    head = len(text) - len(text.lstrip(" ")) if core else len(text)
    tail = len(text) - head - len(core)
    joins = any(character not in _JOINERS for character in core)
    return "·" * head + "".join(_seen(character, joins) for character in core) + "·" * tail


def _seen(character: str, joins: bool) -> str:
    code = ord(character)
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    if character in _JOINERS:
        return character if joins else f"⟨U+{code:04X}⟩"
    category = unicodedata.category(character)
    if category == "Zs" and character != " ":
        return "·"
    if category in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return character
