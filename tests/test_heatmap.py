"""Relevance as colour: what is drawn, what must not be hidden, and what must not get through."""

import io
import math
import re
import unicodedata
import warnings
import zlib
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from attnlrp_fx import heatmap
from attnlrp_fx.heatmap import DARK, LIGHT, STEPS, Grid, Section, TokenStrip

CHANNEL = st.integers(0, 255)
COLOUR = st.tuples(CHANNEL, CHANNEL, CHANNEL)


def strip(tokens, relevance, spelling="word", name="input_ids", **more):
    return TokenStrip(
        name, tuple(tokens), tuple(range(len(tokens))), tuple(relevance), spelling, **more
    )


def section(*strips, grids=(), title="logit 'positive' (1)", value=1.0):
    return Section(title, value, strips, tuple(grids))


def drawn_text(tokens, spelling=None):
    """What a reader sees, spaces between pieces included."""
    spelling = spelling or heatmap.spelling(tokens)
    return "".join(" " * p.gap + p.text for p in heatmap.pieces(tokens, spelling))


class Spans(HTMLParser):
    """Attributes and text of every token span; and the tags and attributes that occur."""

    def __init__(self, page):
        super().__init__()
        self.spans, self.tags, self.attributes, self._open = [], set(), set(), False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attrs = dict(attrs)
        self.attributes |= set(attrs)
        self._open = tag == "span" and attrs.get("class", "").startswith("t ")
        if self._open:
            self.spans.append([attrs, ""])

    def handle_data(self, data):
        if self._open:
            self.spans[-1][1] += data

    def handle_endtag(self, tag):
        self._open = False


def spans(*sections):
    return Spans(heatmap.html_document(sections, "title")).spans


def printed(sections, colours, **options):
    out = io.StringIO()
    console = Console(
        file=out, width=100, force_terminal=colours is not None, color_system=colours, **options
    )
    console.print(*heatmap.terminal(sections, colours), sep="\n")
    return out.getvalue()


# Scale and colour


@given(COLOUR)
def test_text_is_readable_on_any_background(background):
    assert heatmap.contrast(heatmap.ink(background), background) >= 4.5


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_palettes_keep_one_ink_and_its_contrast(palette):
    colours = [palette.colour(step / STEPS) for step in range(-STEPS, STEPS + 1)]
    assert len({heatmap.ink(colour) for colour in colours}) == 1
    assert min(heatmap.contrast(heatmap.ink(colour), colour) for colour in colours) >= 4.5
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize(("palette", "sign"), [(LIGHT, -1), (DARK, 1)])
def test_strength_shows_in_luminance_to_either_side(palette, sign):
    for side in (1, -1):
        ramp = [heatmap.luminance(palette.colour(side * n / STEPS)) for n in range(STEPS + 1)]
        assert ramp == sorted(ramp, reverse=sign < 0)


def test_luminance_and_contrast_are_wcags():
    assert heatmap.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert heatmap.luminance((255, 0, 0)) == pytest.approx(0.2126)


@given(st.floats(), st.floats(0, allow_nan=False))
def test_level_is_bounded_odd_and_none_only_where_not_finite(relevance, limit):
    step = heatmap.level(relevance, limit)
    assert (step is None) == (not math.isfinite(relevance))
    if step is not None:
        assert -STEPS <= step <= STEPS
        assert heatmap.level(-relevance, limit) == -step


def test_level_of_zero_scale_is_neutral():
    assert heatmap.level(0.0, 0.0) == 0
    assert heatmap.limit([float("nan"), -2.0, 1.0, float("inf")]) == 2.0
    assert heatmap.limit([]) == 0.0


def test_token_inputs_of_a_row_share_a_scale():
    both = section(strip(["a"], [1.0]), strip(["b"], [0.5], name="decoder_input_ids"))
    assert [attrs["class"] for attrs, _ in spans(both)] == [f"t p{STEPS}", f"t p{STEPS // 2}"]


# Tokens as text


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
    assert heatmap._byte_alphabet() == table


@given(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1), st.data())
def test_byte_level_text_survives_any_split(text, data):
    spelled = {byte: c for c, byte in heatmap._byte_alphabet().items()}
    written = "".join(spelled[byte] for byte in text.encode())
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(written) - 1)))))
    tokens = [written[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
    tokens = [token for token in tokens if token]
    texts = [t for t in heatmap._texts(tokens, "byte") if t != heatmap.CONTINUED]
    assert "".join(texts).replace(heatmap.CONTINUED, "") == text.replace(heatmap.CONTINUED, "")


@given(st.lists(st.text(st.characters()), max_size=6), st.sampled_from(heatmap.Spelling.__args__))
def test_every_token_is_one_visible_piece(tokens, spelling):
    drawn = heatmap.pieces(tokens, spelling)
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
    assert heatmap.visible(text) == seen


# HTML


def test_golden_html():
    page = heatmap.html_fragment(
        [section(strip(["Good", "Ġ<b>", "ly"], [1.0, -0.5, 0.0], "byte"), value=2.0)]
    )
    assert page.startswith('<div class="attnlrp"><style>')
    assert page.partition("</style>\n")[2] == (
        "<section><h4>logit &#x27;positive&#x27; (1)</h4>"
        "<header><span>value <b>+2</b></span>"
        "<span>sum of relevance <b>+0.5 (25.0% of the value)</b></span>"
        '<span class="key dim">-1<span class="bar" role="img" '
        'aria-label="colour scale, blue against the target, orange for it"></span>+1</span>'
        "</header>"
        '<div class="strip" dir="auto">'
        '<span class="t p24" title="Good\ninput_ids[0]: +1">Good</span>'
        ' <span class="t n12" title="Ġ&lt;b&gt;\ninput_ids[1]: -0.5">&lt;b&gt;</span>'
        '<span class="t p0" title="ly\ninput_ids[2]: +0">ly</span>'
        "</div></section>\n</div>"
    )


HOSTILE = '"><script>alert(1)</script>&<img src=x onerror=y>'


def test_everything_is_escaped():
    row = section(
        strip([HOSTILE, "'", "\ud800"], [1.0, 2.0, 3.0], name=HOSTILE, hidden=1.0),
        grids=[Grid(HOSTILE, torch.tensor([math.nan, 1.0]))],
        title=HOSTILE,
    )
    page = heatmap.html_document([row], HOSTILE)
    parsed = Spans(page)
    assert "script" not in parsed.tags
    assert page.count("<img ") == 1
    assert "onerror" not in parsed.attributes
    assert parsed.spans[0][1] == HOSTILE
    page.encode()


def test_html_is_self_contained_and_knows_dark_mode():
    page = heatmap.html_document([section(strip(["a"], [1.0]), grids=[grid(4, 4)])], "t")
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert set(re.findall(r'src="([^;]*);', page)) == {"data:image/png"}
    assert "light-dark(" in page
    assert 'data-jp-theme-light="false"' in page
    assert "@media print" in page


def test_styles_reach_nothing_outside():
    for rule in re.sub(r"@(media|supports)[^{]*\{", "", heatmap.stylesheet()).split("}"):
        selectors = rule.partition("{")[0].strip()
        for selector in re.split(r",(?![^()]*\))", selectors) if selectors else ():
            assert ".attnlrp" in selector, selector


def test_tooltips_name_token_position_and_value():
    (attrs, text), *_ = spans(section(strip(["Ġgood"], [0.1234567], "byte")))
    assert attrs["title"] == "Ġgood\ninput_ids[0]: +0.1234567"
    assert text == "good"


def test_special_tokens_do_not_set_the_direction():
    (special, _), (word, _) = spans(section(strip(["[CLS]", "שלום"], [0.0, 1.0])))
    assert special["dir"] == "ltr"
    assert "dir" not in word


def test_long_texts_stay_light():
    many = strip(["Ġrelevance"] * 5000, [math.sin(i) for i in range(5000)], "byte")
    assert len(heatmap.html_document([section(many)], "t").encode()) < 1_000_000


# What a reader must be told


def test_not_finite_is_marked_and_named_everywhere():
    row = section(strip(["a", "b", "c"], [1.0, math.nan, -math.inf]))
    assert [attrs["class"] for attrs, _ in spans(row)] == [f"t p{STEPS}", "t x", "t x"]
    (note,) = heatmap.notes(row)
    assert "1 (nan), 2 (-inf)" in note
    assert note in heatmap.html_fragment([row])
    for colours in ("truecolor", "256", "standard", None):
        assert "1 (nan), 2 (-inf)" in printed([row], colours)


def test_zero_relevance_is_neutral_and_says_so():
    row = section(strip(["a", "b"], [0.0, 0.0]))
    assert {attrs["class"] for attrs, _ in spans(row)} == {"t p0"}
    assert heatmap.notes(row) == ["The relevance of every token is zero."]
    assert 'class="bar"' not in heatmap.html_fragment([row])
    assert "every token is zero" in printed([row], None)


def test_relevance_of_padding_and_empty_rows_are_named():
    empty = strip([], [], hidden=0.25)
    said = " ".join(heatmap.notes(section(empty)))
    assert "no tokens but padding" in said
    assert "not shown: +0.25" in said


def test_grids_name_zero_and_not_finite():
    zero, bad = Grid("z", torch.zeros(3)), Grid("b", torch.tensor([1.0, math.nan]))
    assert heatmap.notes(section(grids=[zero, bad])) == [
        "The relevance of z is zero everywhere.",
        "1 of 2 values of b are not finite.",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(2.0, "+1 (50.0% of the value)"), (0.0, "+1"), (None, "+1")]
)
def test_share_of_value_only_where_defined(value, text):
    assert heatmap.share_of_value(section(strip(["a"], [1.0]), value=value)) == text


# Pictures


def grid(*shape):
    torch.manual_seed(0)
    return Grid("pixel_values", torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(), (7,), (5, 9), (3, 40, 50), (2, 3, 11, 13), (1, 1)])
def test_pictures_conserve_relevance_and_fit(shape):
    shown = heatmap.picture(grid(*shape), 16, 16)
    frames = shape[0] if len(shape) == 4 else 1
    assert shown.cells.shape[0] <= max(16, frames)
    assert shown.cells.shape[1] <= 16
    torch.testing.assert_close(shown.cells.sum(), grid(*shape).relevance.sum())


def test_images_keep_their_proportions():
    assert heatmap.picture(grid(3, 40, 20), 20, 20).cells.shape == (20, 10)


def test_one_hot_pixel_does_not_blank_out_the_rest():
    relevance = torch.ones(1, 64, 64)
    relevance[0, 3, 3] = 1000
    shown = heatmap.picture(Grid("x", relevance), 64, 64)
    assert shown.limit == pytest.approx(1)
    assert "largest |cell| 1000" in shown.caption


def test_one_hot_pixel_on_zeros_keeps_a_scale():
    relevance = torch.zeros(1, 64, 64)
    relevance[0, 3, 3] = 5
    assert heatmap.picture(Grid("x", relevance), 64, 64).limit == 5


def test_png_is_what_a_decoder_reads():
    image = pytest.importorskip("PIL.Image")
    cells = torch.tensor([[1.0, -1.0, 0.0], [0.5, math.nan, math.inf]])
    data = heatmap.png(heatmap.Picture(cells, 1.0, ""))
    with image.open(io.BytesIO(data)) as opened:
        assert opened.size == (3, 2)
        pixels = opened.convert("RGBA")
    against, favour = heatmap._OVERLAY
    assert pixels.getpixel((0, 0)) == (*favour, 255)
    assert pixels.getpixel((1, 0)) == (*against, 255)
    assert pixels.getpixel((2, 0))[3] == 0
    assert pixels.getpixel((0, 1))[3] == pytest.approx(128, abs=2)
    assert pixels.getpixel((1, 1)) == pixels.getpixel((2, 1)) == (*heatmap._NOT_FINITE, 255)


def test_png_chunks_carry_their_checksums():
    data = heatmap.png(heatmap.Picture(torch.zeros(2, 2), 0.0, ""))
    at, kinds = 8, []
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        body = data[at + 4 : at + 8 + size]
        assert zlib.crc32(body) == int.from_bytes(data[at + 8 + size : at + 12 + size], "big")
        kinds.append(body[:4])
        at += 12 + size
    assert kinds == [b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"]


# Terminal


@pytest.mark.parametrize("colours", ["truecolor", "256", "standard", "windows"])
def test_terminal_paints_tokens_and_shows_the_scale(colours):
    out = printed([section(strip(["Ġgood", "Ġbad"], [1.0, -0.5], "byte"), value=2.0)], colours)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "good bad" in plain
    assert "value +2" in plain
    assert "sum of relevance +0.5" in plain
    assert "-1 " in plain.splitlines()[2]
    assert out.count("\x1b[") > 10


@pytest.mark.parametrize("colours", list(heatmap._INDEXED))
def test_indexed_ramps_are_symmetric_and_readable(colours):
    ramp = heatmap._INDEXED[colours]
    assert len(ramp) % 2 == 1
    assert len(set(ramp)) == len(ramp)
    assert heatmap._terminal_colour(0, colours) == f"color({ramp[len(ramp) // 2]})"
    assert heatmap._terminal_colour(-1, colours) == f"color({ramp[0]})"
    assert heatmap._terminal_colour(1, colours) == f"color({ramp[-1]})"


def test_terminal_without_colour_ranks_tokens_with_signed_bars():
    out = printed([section(strip(["good", "so", "bad"], [1.0, 0.0, -0.5]))], None)
    assert "\x1b[" not in out
    lines = [line.split() for line in out.splitlines()]
    assert ["0", "good", "+1", "|██████████"] in lines
    assert ["2", "bad", "-0.5", "█████|"] in lines
    assert "so" not in [word for line in lines for word in line[:2]]
    header, first = out.splitlines()[1:3]
    assert header.index("|") == first.index("|")


def test_terminal_says_how_many_tokens_are_not_listed():
    out = printed([section(strip(["x"] * 14, [1.0] * 14))], None)
    assert "4 weaker tokens are not listed" in out


def test_ascii_bars():
    assert heatmap._bar(-0.5, ascii_only=True).strip() == "#####|"


def test_terminal_lets_no_escape_sequence_or_markup_through():
    row = section(strip(["\x1b[2J", "[red]x[/red]"], [1.0, 2.0]), title="\x1b]0;t\x07 [bold]")
    for colours in ("truecolor", None):
        out = printed([row], colours)
        assert "\x1b[2J" not in out
        assert "\x1b]0" not in out
        assert "[red]x[/red]" in out


@pytest.mark.parametrize("colours", ["truecolor", "256", None])
def test_terminal_draws_float_inputs(colours):
    out = printed([section(grids=[grid(3, 5, 6), grid(4)])], colours)
    assert "pixel_values 3" in out
    assert ("▀" in out) == (colours is not None)


# Figure


def drawn_figure(*sections):
    pytest.importorskip("matplotlib")
    figure = heatmap.figure(sections)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=50)
    return figure


def figure_texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_figure_shows_tokens_and_facts():
    texts = figure_texts(drawn_figure(section(strip(["$a", "b$"], [1.0, math.nan]), value=None)))
    assert {"$a", "b$", "-1", "+1", "logit 'positive' (1)"} <= set(texts)
    assert any("not finite at 1 (nan)" in text for text in texts)


def test_figure_grows_with_the_text():
    short, long = (drawn_figure(section(strip(["word"] * n, [1.0] * n))) for n in (5, 400))
    assert long.get_size_inches()[1] > 3 * short.get_size_inches()[1]
    for axes in long.axes:
        for text in axes.texts:
            assert 0 <= text.get_position()[0] <= 8


def test_figure_draws_float_inputs_and_not_finite_cells():
    relevance = torch.tensor([[1.0, math.nan], [math.inf, -1.0]])
    figure = drawn_figure(section(grids=[Grid("x", relevance), grid(3, 4, 5), grid(9)]))
    images = [image for axes in figure.axes for image in axes.images]
    assert [image.get_array().shape for image in images] == [(2, 2), (4, 5), (1, 9)]
    assert images[0].get_array().mask.tolist() == [[False, True], [True, False]]


def test_figure_reads_hebrew_from_the_right():
    figure = drawn_figure(section(strip(["שלום", "עולם"], [1.0, -1.0])))
    places = {
        text.get_text(): text.get_position()[0] for axes in figure.axes for text in axes.texts
    }
    assert places["שלום"] > places["עולם"]


def test_figure_replaces_characters_that_no_font_has():
    unassigned_glyph = "\U0001f9a9\U00013000"
    drawn_figure(section(strip([unassigned_glyph], [1.0])))
