"""Explanations in TensorBoard: a sink of a monitor's; `pip install 'attnlrp_fx[train]'`."""

from pathlib import Path
from typing import Any

from attnlrp_fx.errors import MissingExtraError
from attnlrp_fx.training.monitor import Record

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise MissingExtraError(
        "Writing for TensorBoard needs tensorboard.",
        why=str(error),
        remedy="pip install 'attnlrp_fx[train]'",
    ) from error


class TensorBoard:
    """Writes each look at a model: a picture, its statistics as curves, the top tokens, a page.

    The page is HTML in the directory of the log, one a look, written whole or not at all, since
    TensorBoard itself shows text without colours.

    Args:
        writer: where to, or a directory for a new one; Lightning's is `logger.experiment`.
        tag: what the entries are called.
        top: of how many tokens a row the text has.

    Example:
        >>> import tempfile, torch
        >>> from attnlrp_fx.training import Monitor
        >>> from attnlrp_fx.training.tensorboard import TensorBoard
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     board = TensorBoard(directory)
        ...     looked = Monitor(torch.ones(1, 3), sinks=[board]).look(model, 0)
        ...     board.writer.close()
        ...     board.page(0).name
        'explanation-00000000.html'
    """

    def __init__(
        self, writer: SummaryWriter | str | Path, tag: str = "explanation", top: int = 10
    ) -> None:
        is_path = isinstance(writer, str | Path)
        self.writer: Any = SummaryWriter(str(writer)) if is_path else writer
        self.tag = tag
        self.top = top

    def page(self, step: int) -> Path:
        """Where the page of a step is."""
        name = self.tag.replace("/", "-")
        return Path(self.writer.log_dir) / f"{name}-{step:08d}.html"

    def __call__(self, record: Record) -> None:
        """Write one look.

        Raises:
            MissingExtraError: matplotlib is not installed.
            OSError: the directory cannot be written.
        """
        explanation, step = record.explanation, record.step
        for name, value in record.statistics.to_dict().items():
            self.writer.add_scalar(f"{self.tag}/{name}", value, step)
        figure: Any = explanation.figure()
        self.writer.add_figure(self.tag, figure, step, close=False)
        table = _table(record, self.top)
        if table:
            self.writer.add_text(f"{self.tag}/top", table, step)
        explanation.to_html(self.page(step))
        self.writer.flush()


def _table(record: Record, top: int) -> str:
    """The most relevant tokens of each row, in Markdown; nothing where there are no tokens."""
    lines = []
    for row, tokens in enumerate(record.explanation.top(top)):
        cells = [f"`{token.token}` {token.relevance:+.3g}" for token in tokens]
        lines += [f"| {row} | {', '.join(cells)} |"] if cells else []
    return "\n".join(["| row | tokens |", "|---|---|", *lines]) if lines else ""
