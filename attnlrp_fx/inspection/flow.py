"""The ledger as a picture: relevance flows from the target to the inputs, and leaves on the way.

Modules are stations from left to right, in the order in which relevance meets them. The band
between two of them is as wide as the relevance that goes on; at a station, what each cause absorbs
leaves downwards, and what it adds enters from above. The picture is laid out once, as shapes, and
drawn as SVG or by matplotlib.
"""

import html
import re
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
AGAINST = "#3a80d2"
"""The same where more has left than there was, so that what goes on is against the target."""
STEP, TALL, MARGIN, LEAF, BEND = 64.0, 150.0, 30.0, 46.0, 16.0
"""Pixels between stations, of the target's band, around the picture, and how long and how wide the
way of a leaf is."""


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
            parts.append(
                f'<rect x="{x}" y="{y - 10}" width="11" height="11" fill="{_colour(cause)}"/>'
            )
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
    sign = -1.0 if ledger.target < 0 else 1.0
    heights = [abs(level) for level in _levels(ledger.target, kept)]
    unit = TALL / (max(heights) or 1.0)
    percent = 100 / ledger.target if ledger.target else 0.0
    ribbons: list[Ribbon] = []
    words: list[Word] = []
    left, top = 150.0, 0.0
    bottom = top + abs(ledger.target) * unit
    words.append(Word(left - 8, (top + bottom) / 2 + 4, f"target {ledger.target:.4g}", "end"))
    for name, causes in kept.items():
        parts = [
            (c, v * sign * unit, v) for c, v in sorted(causes.items(), key=lambda i: abs(i[1]))
        ]
        leaving = [part for part in parts if part[1] > 0]
        entering = [part for part in parts if part[1] < 0]
        at = left + STEP + sum(-wide for _, wide, _ in entering)
        tip = f"{percent * sign * (bottom - top) / unit:.1f} % goes on" if percent else ""
        ribbons.append(_band(left, at, top, bottom, tip))
        reach = BEND
        for cause, wide, value in leaving:
            told = f"{CAUSES.get(cause, cause)} at {name} absorbs {abs(percent * value):.1f} %"
            ribbons.append(_leaf(at, bottom - wide, bottom, reach, 1, cause, told))
            bottom, reach = bottom - wide, reach + wide + 3
        reach = BEND
        for cause, wide, value in entering:
            told = f"{CAUSES.get(cause, cause)} at {name} adds {abs(percent * value):.1f} %"
            ribbons.append(_leaf(at, top, top + wide, reach, -1, cause, told))
            top, reach = top + wide, reach - wide + 3
        words.append(Word(at + 2, 0.0, _short(name), "start", True))
        left = at + max(0.0, sum(wide for _, wide, _ in leaving) - STEP / 2)
        ribbons.append(_band(at, left, top, bottom, ""))
    tip = f"{percent * sign * (bottom - top) / unit:.1f} % reaches the inputs" if percent else ""
    ribbons.append(_band(left, left + STEP, top, bottom, tip))
    for k, (name, value) in enumerate(ledger.inputs.items()):
        share = f", {percent * value:.1f} %" if ledger.target else ""
        words.append(
            Word(left + STEP + 8, (top + bottom) / 2 + 4 + 15 * k, f"{name}{share}", "start")
        )
    seen = dict.fromkeys(cause for c in kept.values() for cause, value in c.items() if value)
    return _framed(ribbons, words, ledger, ("relevance", *seen))


def _framed(
    ribbons: list[Ribbon], words: list[Word], ledger: Ledger, causes: tuple[str, ...]
) -> Flow:
    """All shapes moved to where they are seen, with a title; stations' names above the bands."""
    highest = min(y for ribbon in ribbons for _, y in ribbon.points)
    deepest = max(y for ribbon in ribbons for _, y in ribbon.points)
    names = 8 + max((4.6 * len(word.text) for word in words if word.is_tilted), default=0)
    down = MARGIN + names - highest
    moved = [Ribbon(tuple((x, y + down) for x, y in r.points), r.colour, r.tip) for r in ribbons]
    placed = [
        Word(w.x, MARGIN + names - 6 if w.is_tilted else w.y + down, w.text, w.anchor, w.is_tilted)
        for w in words
    ]
    share = sum(ledger.inputs.values()) / ledger.target if ledger.target else 0.0
    title = f"Where {ledger.target:.4g} went: {share:.1%} to the inputs"
    right = max(w.x + 7 * len(w.text) for w in words if not w.is_tilted)
    height = deepest + down + 34 + 20 * (1 + (len(causes) - 1) // 6)
    placed.append(Word(14, 20, title, "start"))
    return Flow(max(right + 16, 480.0), height, tuple(moved), tuple(placed), causes, title)


def _levels(target: float, kept: dict[str, dict[str, float]]) -> list[float]:
    """What goes on after each station, from the target on."""
    found = [target]
    for causes in kept.values():
        found.append(found[-1] - sum(causes.values()))
    return found


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


def _band(x0: float, x1: float, top: float, bottom: float, tip: str) -> Ribbon:
    """A straight band."""
    xs = (x0, x0 + (x1 - x0) / 3, x1 - (x1 - x0) / 3, x1)
    colour = MAIN if bottom >= top else AGAINST
    return Ribbon((*((x, top) for x in xs), *((x, bottom) for x in xs)), colour, tip)


def _leaf(
    x: float, upper: float, lower: float, reach: float, sign: int, cause: str, tip: str
) -> Ribbon:
    """What leaves a station to the right and downwards, or enters it from above on the left.

    Args:
        x: where the station is.
        upper: its slice of the station.
        lower: where that ends.
        reach: how far to the side its way is.
        sign: 1 leaves, −1 enters.
        cause: what absorbs or adds it.
        tip: the same in words.
    """
    wide = lower - upper
    near, far = (lower, upper) if sign > 0 else (upper, lower)
    end = near + sign * LEAF
    inner = _turn(x, near, x + sign * reach, end, sign)
    outer = _turn(x, far, x + sign * (reach + wide), end, sign)
    return Ribbon((*outer, *inner), _colour(cause), tip)


def _turn(x: float, y: float, x1: float, y1: float, sign: int) -> tuple[tuple[float, float], ...]:
    """A quarter turn from along the bands to across them."""
    return (x, y), (x + 0.75 * (x1 - x), y), (x1, y + 0.3 * (y1 - y)), (x1, y1)


def _short(name: str) -> str:
    """The end of a module's path."""
    return name if len(name) <= 22 else f"…{name[-21:]}"
