"""Sections and galleries as a matplotlib figure: blocks stacked from top to bottom.

matplotlib is an extra, so everything that needs it is imported when a figure is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attnlrp_fx.errors import MissingExtraError
from attnlrp_fx.heatmap.display import PLAIN, Display
from attnlrp_fx.heatmap.sections import Gallery, Matrix, Section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARGIN = 0.2
"""Inches."""


def figure(drawn: Sequence[Section | Gallery | Matrix], display: Display = PLAIN) -> Figure:
    """Tokens as a heat strip wrapped over lines, float inputs as heat maps; light colours.

    Characters that no installed font has are drawn as an empty square, so that saving the figure
    warns of nothing.

    Args:
        drawn: what to draw, from top to bottom.
        display: how to draw images.

    Returns:
        A matplotlib Figure, 8 inches wide and as high as it needs to be, that belongs to no pyplot
        state.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Drawing a figure needs matplotlib.",
            why=str(error),
            remedy="pip install 'attnlrp_fx[plot]'",
        ) from error

    from attnlrp_fx.heatmap.figure_blocks import WIDTH, blocks_of
    from attnlrp_fx.heatmap.figure_matrix import matrix_blocks

    blocks = [
        block
        for each in drawn
        for block in (matrix_blocks(each) if isinstance(each, Matrix) else blocks_of(each, display))
    ]
    width = WIDTH + 2 * MARGIN
    height = 2 * MARGIN + sum(block.height for block in blocks)
    drawing = Figure(figsize=(width, height), facecolor="white")
    top = height - MARGIN
    for block in blocks:
        top -= block.height
        axes = drawing.add_axes(
            (MARGIN / width, top / height, WIDTH / width, block.height / height),
            xlim=(0, WIDTH),
            ylim=(block.height, 0),
        )
        axes.set_axis_off()
        block.draw(axes)
    return drawing
