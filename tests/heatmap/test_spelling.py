"""Tokens read as the text they were, and nothing in them acts or hides."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnlrp_fx.heatmap.spelling import (
    CONTINUED,
    Spelling,
    byte_alphabet,
    decoded,
    pieces,
    spelling_of,
    visible,
)


def drawn_text(tokens, spelling=None):
    """What a reader sees, spaces between pieces included."""
    spelling = spelling or spelling_of(tokens)
    return "".join(" " * p.gap + p.text for p in pieces(tokens, spelling))


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["The", "Ġfilm", "Ġsur", "pris", "ingly"], "The film surprisingly"),
        (["Ġcaf", "Ã©", "Ċ", "Ċ", "ĉx"], "café⏎\n⏎\n⇥x"),
        (["a", "Ġ", "Ġ", "ĠĠb"], "a·· ·b"),
        (["ä½ł", "å¥½"], "你好"),
        (["ĠðŁ", "Ĵ", "©", "!"], "💩◂◂!"),
        (["Ġx", "ÿ"], "x\ufffd"),
        (["▁Der", "▁Film", "▁über", "rasch", "end"], "Der Film überraschend"),
        (["▁", "▁a", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "<0x0A>"], "· a😀◂◂◂⏎\n"),
        (["[CLS]", "un", "##bel", "##iev", "##able", "[SEP]"], "[CLS] unbelievable [SEP]"),
        (["it", "'", "s", "(", "good", ")", ",", "ok"], "it's (good), ok"),
        (["great", "movie"], "great movie"),
        (["caf\u00e9", "ol\u00e9"], "café olé"),
        (["<s>", "▁a", "</s>", "▁b"], "<s> a </s> b"),
        (["<｜begin▁of▁sentence｜>", "Ġhi"], "<｜begin▁of▁sentence｜> hi"),
        (["", "a"], "∅ a"),
        ([], ""),
    ],
)
def test_text_reads_as_it_was_written(tokens, text):
    shown = drawn_text(tokens)
    assert shown.lstrip(" ") == text


def test_byte_alphabet_is_gpt2s():
    convert = pytest.importorskip("transformers.convert_slow_tokenizer")
    table = {character: byte for byte, character in convert.bytes_to_unicode().items()}
    assert byte_alphabet() == table


@given(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1), st.data())
def test_byte_level_text_survives_any_split(text, data):
    spelled = {byte: c for c, byte in byte_alphabet().items()}
    written = "".join(spelled[byte] for byte in text.encode())
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(written) - 1)))))
    tokens = [written[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    tokens = [token for token in tokens if token]
    texts = [t for t in decoded(tokens, "byte") if t != CONTINUED]
    assert "".join(texts).replace(CONTINUED, "") == text.replace(CONTINUED, "")


@given(st.lists(st.text(st.characters()), max_size=6), st.sampled_from(Spelling.__args__))
def test_every_token_is_one_visible_piece(tokens, spelling):
    drawn = pieces(tokens, spelling)
    assert len(drawn) == len(tokens)
    for piece in drawn:
        assert piece.text.strip(), piece
        piece.text.encode()
        acting = {c for c in piece.text if unicodedata.category(c) in ("Cc", "Cf", "Cs")}
        assert acting <= {"\n", "\u200c", "\u200d"}


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("\x1b[31m", "␛[31m"),
        ("\x7f", "␡"),
        ("\u202eevil", "⟨U+202E⟩evil"),
        ("\ud800", "⟨U+D800⟩"),
        ("\u200d", "⟨U+200D⟩"),
        ("👩\u200d🔬", "👩\u200d🔬"),
        ("  x ", "··x·"),
        ("\u00a0", "·"),
        ("a b", "a b"),
    ],
)
def test_invisible_characters_are_made_visible(text, seen):
    assert visible(text) == seen
