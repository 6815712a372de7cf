"""Relevance drawn as colour: pure functions from numbers to HTML, terminal text and figures.

What is drawn is a `Section` a row, or a `Gallery` or a `Matrix` of several; nothing here knows a
model or an `Explanation`. Below the three ways to draw lie, each on its own: the scale and its
colours (`scale`), tokens as the text they were (`spelling`), images as they were before
pre-processing (`images`), what is said in words (`sections`), float inputs as cells (`pictures`),
several of them side by side (`tiles`), and what there is to choose (`display`).
"""

from attnlrp_fx.heatmap.display import PLAIN, Display
from attnlrp_fx.heatmap.figure import figure
from attnlrp_fx.heatmap.html import html_document, html_fragment
from attnlrp_fx.heatmap.images import Backdrop, Normalisation, backdrop, is_image
from attnlrp_fx.heatmap.sections import Gallery, Grid, Matrix, Section, TokenStrip, number
from attnlrp_fx.heatmap.terminal import terminal

__all__ = [
    "PLAIN",
    "Backdrop",
    "Display",
    "Gallery",
    "Grid",
    "Matrix",
    "Normalisation",
    "Section",
    "TokenStrip",
    "backdrop",
    "figure",
    "html_document",
    "html_fragment",
    "is_image",
    "number",
    "terminal",
]
