"""Small things to draw, and what is seen of them."""

import io
from dataclasses import replace
from html.parser import HTMLParser

import torch
from rich.console import Console

from attnlrp_fx.heatmap import Backdrop, Gallery, Grid, Section, TokenStrip, html_document, terminal


def strip(tokens, relevance, spelling="word", name="input_ids", **more):
    return TokenStrip(
        name, tuple(tokens), tuple(range(len(tokens))), tuple(relevance), spelling, **more
    )


def section(*strips, grids=(), title="logit 'positive' (1)", value=1.0):
    return Section(title, value, strips, tuple(grids))


def grid(*shape):
    torch.manual_seed(0)
    return Grid("pixel_values", torch.randn(shape, dtype=torch.float64))


def on_image(relevance, name="pixel_values", seed=0):
    """Relevance (channels, height, width) of a random image."""
    torch.manual_seed(seed)
    pixels = torch.rand(*relevance.shape[-2:], 3, dtype=torch.float64)
    return Grid(name, relevance, Backdrop((pixels * 255).round() / 255))


def gallery(*names, size=6, title="logit 3"):
    """Explanations of one image, each twice as strong as the one before."""
    relevance = on_image(grid(3, size, size).relevance)
    grids = [replace(relevance, relevance=relevance.relevance * 2**i) for i in range(len(names))]
    return Gallery(
        {
            name: section(grids=[drawn], title=title)
            for name, drawn in zip(names, grids, strict=True)
        }
    )


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
    return Spans(html_document(sections, "title")).spans


def printed(sections, colours, **options):
    out = io.StringIO()
    console = Console(
        file=out, width=100, force_terminal=colours is not None, color_system=colours, **options
    )
    console.print(*terminal(sections, colours), sep="\n")
    return out.getvalue()
