"""Relevance drawn as colour: pure functions from numbers to HTML, terminal text and figures.

What is drawn is a `Section` a row; nothing here knows a model or an `Explanation`. Below the three
ways to draw lie, each on its own: the scale and its colours (`scale`), tokens as the text they
were (`spelling`), what is said in words (`sections`), float inputs as cells (`pictures`).
"""

from attnlrp_fx.heatmap.figure import figure
from attnlrp_fx.heatmap.html import html_document, html_fragment
from attnlrp_fx.heatmap.sections import Grid, Section, TokenStrip
from attnlrp_fx.heatmap.terminal import terminal

__all__ = [
    "Grid",
    "Section",
    "TokenStrip",
    "figure",
    "html_document",
    "html_fragment",
    "terminal",
]
