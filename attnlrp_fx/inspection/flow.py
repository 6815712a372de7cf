"""The ledger as a picture: relevance flows from the target to the inputs, and leaves on the way.

Modules are stations from left to right, in the order in which relevance meets them. The band
between two of them is as wide as the relevance that goes on; at a station, what each cause absorbs
leaves downwards, and what it adds enters from above. The picture is laid out once, as shapes, and
drawn as SVG or by matplotlib.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnlrp_fx.errors import MissingExtraError
from attnlrp_fx.inspection.ledger import CAUSES, Ledger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "softmax": "#b07aa1",
    "bias": "#4e79a7",
    "shift": "#59a14f",
    "constant": "#9aa3ad",
    "intercept": "#edc948",
    "epsilon": "#e15759",
    "zero": "#76b7b2",
    "gradient": "#d62728",
    "target": "#9c755f",
}
MAIN = "#e8963f"
"""The colour of relevance that is on its way."""
STEP, TALL, MARGIN, HALF = 92.0, 150.0, 70.0, 11.0
"""Pixels between stations, of the widest band, around the picture, and half of a station."""


@dataclass(frozen=True)
class Ribbon:
    """A band between two vertical edges, or a leaf that bends away."""

    points: tuple[tuple[float, float], ...]
    """Start, two control points and end of its upper edge, and the same of its lower edge."""
    colour: str
    tip: str


@dataclass(frozen=True)
class Word:
    """A text."""

    x: float
    y: float
    text: str
    anchor: str = "middle"
    is_tilted: bool = False


@dataclass(frozen=True)
class Flow:
    """Shapes of the picture, in pixels from its upper left corner."""

    width: float
    height: float
    ribbons: tuple[Ribbon, ...]
    words: tuple[Word, ...]
    causes: tuple[str, ...]
    """What the colours mean, in the order of the key."""
    title: str

    def to_svg(self) -> str:
        """The picture as SVG, with a tip at each band."""
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:.0f} '
            f'{self.height:.0f}" width="{self.width:.0f}" height="{self.height:.0f}" role="img" '
            f'aria-label="{html.escape(self.title)}" font-family="system-ui,sans-serif" '
            'font-size="12" fill="currentColor">'
        ]
        for ribbon in self.ribbons:
            p = [f"{x:.1f},{y:.1f}" for x, y in ribbon.points]
            parts.append(
                f'<path d="M{p[0]} C{p[1]} {p[2]} {p[3]} L{p[7]} C{p[6]} {p[5]} {p[4]} Z" '
                f'fill="{ribbon.colour}" fill-opacity=".82"><title>{html.escape(ribbon.tip)}'
                "</title></path>"
            )
        for word in self.words:
            turn = f' transform="rotate(-38 {word.x:.1f} {word.y:.1f})"' if word.is_tilted else ""
            parts.append(
                f'<text x="{word.x:.1f}" y="{word.y:.1f}" text-anchor="{word.anchor}"{turn}>'
                f"{html.escape(word.text)}</text>"
            )
        for k, cause in enumerate(self.causes):
            x, y = 14 + 150 * (k % 6), self.height - 14 - 20 * (k // 6)
            parts.append(f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{_colour(cause)}"/>')
            parts.append(f'<text x="{x + 16}" y="{y}">{html.escape(cause)}</text>')
        return "\n".join([*parts, "</svg>"])

    def figure(self) -> "Figure":
        """The picture as a matplotlib figure that belongs to no pyplot state.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.patches import PathPatch, Rectangle
            from matplotlib.path import Path
        except ImportError as error:
            raise MissingExtraError(
                "Drawing a figure needs matplotlib.",
                why=str(error),
                remedy="pip install 'attnlrp_fx[plot]'",
            ) from error
        drawing = Figure(figsize=(self.width / 96, self.height / 96), facecolor="white")
        axes = drawing.add_axes((0, 0, 1, 1), xlim=(0, self.width), ylim=(self.height, 0))
        axes.set_axis_off()
        curve = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
        for ribbon in self.ribbons:
            upper, lower = ribbon.points[:4], ribbon.points[4:]
            path = Path([*upper, *reversed(lower), upper[0]], curve)
            axes.add_patch(PathPatch(path, facecolor=ribbon.colour, alpha=0.82, linewidth=0))
        for word in self.words:
            axes.text(
                word.x,
                word.y,
                word.text,
                fontsize=9,
                ha={"middle": "center", "start": "left", "end": "right"}[word.anchor],
                va="baseline",
                rotation=38 if word.is_tilted else 0,
                rotation_mode="anchor",
                parse_math=False,
            )
        for k, cause in enumerate(self.causes):
            x, y = 14 + 150 * (k % 6), self.height - 14 - 20 * (k // 6)
            axes.add_patch(Rectangle((x, y - 10), 11, 11, facecolor=_colour(cause)))
            axes.text(x + 16, y, cause, fontsize=9, parse_math=False)
        return drawing


def _colour(cause: str) -> str:
    return COLOURS.get(cause, "#808890") if cause != "relevance" else MAIN


def station_of(module: str) -> str:
    """The module at which a picture counts what lies in it: up to the first number, or two deep."""
    numbered = re.match(r"^(.*?\.\d+)(\.|$)", module)
    return numbered[1] if numbered else ".".join(module.split(".")[:2])


def flow_of(ledger: Ledger, *, stations: int = 40) -> Flow:
    """The picture of a ledger.

    Args:
        ledger: what is drawn.
        stations: the most stations; of more, those that absorb least are drawn as one.
    """
    kept: dict[str, dict[str, float]] = {}
    for entry in reversed(ledger.entries):
        station = entry.node if entry.kind == "target" else station_of(entry.module) or "model"
        causes = kept.setdefault(station, {})
        for cause, value in entry.causes.items():
            causes[cause] = causes.get(cause, 0.0) + value
    kept = _fewer({name: c for name, c in kept.items() if any(c.values())}, stations)
    scale = max([abs(ledger.target), *_levels(ledger.target, kept)]) or 1.0
    unit = TALL / scale
    # Bands keep their lower edges where they are when something leaves, so that it leaves there.
    top = MARGIN + 70 + max([0.0, *(_added(causes) for causes in kept.values())]) * unit
    middle = top + TALL / 2
    level, x = ledger.target, MARGIN
    percent = 100 / ledger.target if ledger.target else 0.0
    ribbons: list[Ribbon] = []
    words = [Word(x - 10, middle + 4, f"target {ledger.target:.4g}", "end")]
    for name, causes in kept.items():
        after = level - sum(causes.values())
        at = x + STEP
        tip = f"{100 * level / ledger.target if ledger.target else 0:.1f} % goes on"
        ribbons.append(_band(x, at - HALF, middle, abs(level) * unit, abs(level) * unit, tip))
        ribbons += _leaves(causes, name, at, middle, abs(level) * unit, unit, percent)
        ribbons.append(_band(at - HALF, at + HALF, middle, abs(level) * unit, abs(after) * unit, tip))
        words.append(Word(at - 4, MARGIN + 62, _short(name), "start", True))
        level, x = after, at + HALF
    tip = f"{100 * level / ledger.target if ledger.target else 0:.1f} % reaches the inputs"
    ribbons.append(_band(x, x + STEP, middle, abs(level) * unit, abs(level) * unit, tip))
    for k, (name, value) in enumerate(ledger.inputs.items()):
        share = f", {percent * value:.1f} %" if ledger.target else ""
        words.append(Word(x + STEP + 8, middle + 4 + 15 * k, f"{name}{share}", "start"))
    causes_seen = dict.fromkeys(cause for c in kept.values() for cause, v in c.items() if v)
    deepest = max([y for r in ribbons for _, y in r.points], default=middle)
    rows = 1 + len(causes_seen) // 6
    title = f"Where {ledger.target:.4g} went: {percent * sum(ledger.inputs.values()):.1f} % to inputs"
    width = x + STEP + MARGIN + 8 * max((len(w.text) for w in words[-len(ledger.inputs) :]), default=9)
    words = [Word(w.x + 50, w.y, w.text, w.anchor, w.is_tilted) for w in words]
    ribbons = [
        Ribbon(tuple((px + 50, py) for px, py in r.points), r.colour, r.tip) for r in ribbons
    ]
    words.append(Word(14, 22, title, "start"))
    height = deepest + 50 + 20 * rows
    return Flow(width + 50, height, tuple(ribbons), tuple(words), ("relevance", *causes_seen), title)


def _levels(target: float, kept: dict[str, dict[str, float]]) -> list[float]:
    level, found = target, []
    for causes in kept.values():
        level -= sum(causes.values())
        found.append(abs(level))
    return found


def _added(causes: dict[str, float]) -> float:
    return sum(-value for value in causes.values() if value < 0)


def _fewer(kept: dict[str, dict[str, float]], most: int) -> dict[str, dict[str, float]]:
    """The stations, runs of those that absorb least put together."""
    if len(kept) <= most:
        return kept
    sizes = sorted(kept, key=lambda name: -sum(map(abs, kept[name].values())))
    wanted = set(sizes[: most // 2])
    found: dict[str, dict[str, float]] = {}
    run: list[str] = []

    def close() -> None:
        if run:
            name = run[0] if len(run) == 1 else f"{run[0]} … {run[-1]}"
            causes = found.setdefault(name, {})
            for part in run:
                for cause, value in kept[part].items():
                    causes[cause] = causes.get(cause, 0.0) + value
            run.clear()

    for name in kept:
        if name in wanted:
            close()
            found[name] = kept[name]
        else:
            run.append(name)
    close()
    return found


def _band(x0: float, x1: float, middle: float, high0: float, high1: float, tip: str) -> Ribbon:
    """A band, as high as what goes along it."""
    bend = (x1 - x0) / 2
    ends = ((x0, high0), (x0 + bend, high0), (x1 - bend, high1), (x1, high1))
    upper = tuple((x, middle - high / 2) for x, high in ends)
    lower = tuple((x, middle + high / 2) for x, high in ends)
    return Ribbon((*upper, *lower), MAIN, tip)


def _leaves(
    causes: dict[str, float],
    station: str,
    x: float,
    middle: float,
    high: float,
    unit: float,
    percent: float,
) -> Sequence[Ribbon]:
    """What leaves downwards, and what enters from above."""
    found = []
    for sign in (1, -1):
        edge = middle + sign * high / 2
        left = x - HALF
        for cause, value in sorted(causes.items(), key=lambda item: -abs(item[1])):
            wide = abs(value) * unit
            if value * sign <= 0 or wide < 0.4:
                continue
            far = edge + sign * (34 + wide)
            start = edge - sign * wide
            right = left + 46
            verb = "absorbs" if sign > 0 else "adds"
            tip = f"{CAUSES.get(cause, cause)} at {station} {verb} {abs(percent * value):.1f} %"
            outer = ((left, start), (left + 30, start), (right, edge), (right, far))
            inner = ((left, edge), (left + 14, edge), (right - min(wide, 30), edge + sign * 12),
                     (right - min(wide, 30), far))
            found.append(Ribbon((*outer, *inner), _colour(cause), tip))
            edge = start
    return found


def _short(name: str) -> str:
    """The end of a module's path."""
    return name if len(name) <= 22 else f"…{name[-21:]}"
