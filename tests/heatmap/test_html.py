"""A page that stands alone: everything escaped, nothing fetched, nothing outside restyled."""

import base64
import io
import math
import re

import pytest
import torch
from drawn import Spans, gallery, grid, on_image, section, spans, strip

from attnlrp_fx.heatmap import Display, Grid, html_document, html_fragment
from attnlrp_fx.heatmap.scale import STEPS


def test_golden_html():
    page = html_fragment(
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
    page = html_document([row], HOSTILE)
    parsed = Spans(page)
    assert "script" not in parsed.tags
    assert page.count("<img ") == 1
    assert "onerror" not in parsed.attributes
    assert parsed.spans[0][1] == HOSTILE
    page.encode()


def test_token_inputs_of_a_row_share_a_scale():
    both = section(strip(["a"], [1.0]), strip(["b"], [0.5], name="decoder_input_ids"))
    assert [attrs["class"] for attrs, _ in spans(both)] == [f"t p{STEPS}", f"t p{STEPS // 2}"]


def test_html_is_self_contained_and_knows_dark_mode():
    page = html_document([section(strip(["a"], [1.0]), grids=[grid(4, 4)])], "t")
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    assert set(re.findall(r'src="([^;]*);', page)) == {"data:image/png"}
    assert "light-dark(" in page
    assert 'data-jp-theme-light="false"' in page
    assert "@media print" in page


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
    assert len(html_document([section(many)], "t").encode()) < 1_000_000


def embedded(page):
    """The images of a page, decoded: (height, width, channels) bytes."""
    image = pytest.importorskip("PIL.Image")
    decoded = []
    for data in re.findall(r'src="data:image/png;base64,([^"]*)"', page):
        with image.open(io.BytesIO(base64.b64decode(data))) as opened:
            mode = "RGB" if opened.mode == "RGB" else "RGBA"
            pixels = torch.tensor([*opened.convert(mode).tobytes()])
            decoded.append(pixels.view(opened.height, opened.width, -1))
    return decoded


def test_a_page_has_the_image_itself_and_its_relevance():
    drawn = on_image(grid(3, 5, 7).relevance)
    image, relevance = embedded(html_fragment([section(grids=[drawn])]))
    assert torch.equal(image, (drawn.backdrop.pixels * 255).round().long())
    assert relevance.shape == (5, 7, 3)
    page = html_fragment([section(grids=[drawn])], Display(overlay=False, smooth=2))
    assert embedded(page)[1].shape == (5, 7, 4), "transparent where nothing is"
    assert "σ=2 pixels" in page


@pytest.mark.parametrize(("size", "width"), [(8, 336), (70, 350), (400, 400)])
def test_small_images_are_scaled_up_by_whole_numbers(size, width):
    page = html_fragment([section(grids=[on_image(torch.ones(1, size, size))])])
    assert page.count(f"width:{width}px;aspect-ratio:{size}/{size}") == 2
    assert "image-rendering:pixelated" in page


def test_a_gallery_has_a_panel_a_name():
    names = ["attnlrp", "gradient", HOSTILE]
    page = html_document([gallery(*names)], "t")
    assert len(embedded(page)) == 1 + len(names)
    assert page.count('class="tile"') == 1 + len(names)
    assert "script" not in Spans(page).tags
    assert not re.search(r"https?:|<link|@import|url\(", page)


def test_what_is_not_finite_in_a_gallery_is_named():
    relevance = torch.ones(1, 3, 3)
    relevance[0, 0, 0] = math.nan
    bad = gallery("good", "bad")
    bad.sections["bad"] = section(grids=[on_image(relevance)])
    assert "bad: 1 of 9 values of pixel_values are not finite." in html_fragment([bad])
