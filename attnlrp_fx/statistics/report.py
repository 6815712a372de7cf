"""What is known of latent units after a run: numbers, tables, and the top samples as heat maps."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult

from attnlrp_fx import heatmap
from attnlrp_fx.errors import InputError, MissingExtraError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.heatmap.spelling import spelling_of
from attnlrp_fx.statistics import store
from attnlrp_fx.statistics.tables import KINDS, SiteStatistics, Statistics, Top

if TYPE_CHECKING:
    import pandas as pd


class LatentStatistics(Mapping[str, SiteStatistics]):
    """The statistics of every unit, by the name of the site that it is at; see `open`."""

    def __init__(self, statistics: Statistics, vocabulary: Mapping[int, str] | None = None) -> None:
        self._statistics = statistics
        self._vocabulary = dict(vocabulary or {})

    @classmethod
    def open(cls, directory: str | Path) -> "LatentStatistics":
        """What a finished run left in a directory.

        Raises:
            InputError: there is no run in it, or it is not finished.
        """
        path = Path(directory) / store.RESULT
        if not path.exists():
            is_run = (Path(directory) / store.RUN).exists()
            raise InputError(
                f"there are no statistics in '{directory}'",
                why="its run is not finished" if is_run else "no run was made there",
                remedy="start the run again with the same arguments: it goes on where it was"
                if is_run
                else "name the directory of a run",
            )
        statistics, about = store.load(path)
        return cls(statistics, {int(i): token for i, token in about["vocabulary"].items()})

    @property
    def samples(self) -> int:
        """How many samples were seen."""
        return self._statistics.samples

    def __getitem__(self, name: str) -> SiteStatistics:
        if name not in self._statistics.sites:
            raise InputError(f"there is no site '{name}'", remedy=f"choose from: {', '.join(self)}")
        return self._statistics.sites[name]

    def __contains__(self, name: object) -> bool:
        return name in self._statistics.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics.sites)

    def __len__(self) -> int:
        return len(self._statistics.sites)

    def __repr__(self) -> str:
        units = sum(len(site) for site in self.values())
        return f"LatentStatistics({len(self)} sites, {units:,} units, {self.samples:,} samples)"

    def unit(self, site: str, index: int) -> "Unit":
        """One unit: its statistics and its top samples.

        Raises:
            InputError: there is no such site or unit.
        """
        found = self[site]
        if not -len(found) <= index < len(found):
            raise InputError(
                f"site '{site}' has no unit {index}", why=f"it has {len(found)} of them"
            )
        index %= len(found)
        return Unit(
            site,
            found.unit,
            index,
            count=int(found.count),
            active=int(found.active[index]),
            mean={kind: float(found.mean(kind)[index]) for kind in KINDS},
            mean_absolute={kind: float(found.mean_absolute(kind)[index]) for kind in KINDS},
            maximum={kind: float(found.maxima[kind][index]) for kind in KINDS},
            top={kind: tuple(found.rankings[kind].of_unit(index)) for kind in KINDS},
            vocabulary=self._vocabulary,
        )

    def largest(self, count: int = 10, unit: str | None = None) -> list["Unit"]:
        """The units with the largest mean magnitude of relevance, the largest first.

        Args:
            count: how many.
            unit: "neuron", "head" or "expert"; None: all together.
        """
        sites = [(n, s) for n, s in self.items() if unit in (None, s.unit)]
        if not sites:
            return []
        means = torch.cat([site.mean_absolute("relevance") for _, site in sites])
        places = [(name, i) for name, site in sites for i in range(len(site))]
        best = means.sort(descending=True, stable=True).indices[:count]
        return [self.unit(*places[i]) for i in best.tolist()]

    def to_pandas(self) -> "pd.DataFrame":
        """A line a unit: site, role, unit, index, count, active, and of activation and relevance
        mean, mean_absolute and maximum.

        Raises:
            MissingExtraError: pandas or pyarrow is not installed.
        """
        store.need_pyarrow()
        try:
            import pandas as pd  # noqa: F401  # asked for, not used here
        except ImportError as error:
            raise MissingExtraError(
                "A table of units needs pandas.",
                why=str(error),
                remedy="pip install 'attnlrp_fx[pandas]'",
            ) from error
        return store.units_table(self._statistics).to_pandas()


@dataclass(frozen=True)
class Unit:
    """One neuron, head or expert, over a data set; prints as the heat maps of its top samples."""

    site: str
    unit: str
    index: int
    count: int
    """How many tokens were seen."""
    active: int
    """At how many of them its activation was not zero."""
    mean: Mapping[str, float]
    """Of "activation" and "relevance", over tokens; and so are the others."""
    mean_absolute: Mapping[str, float]
    maximum: Mapping[str, float]
    top: Mapping[str, tuple[Top, ...]]
    """The top samples by each, the best first."""
    vocabulary: Mapping[int, str]

    @property
    def title(self) -> str:
        """What it is, in words."""
        return f"{self.unit} {self.index} of {self.site}"

    def to_dict(self) -> dict[str, Any]:
        """Its numbers and its top samples, with tokens spelled, as JSON has them."""
        fields = ("site", "unit", "index", "count", "active", "mean", "mean_absolute", "maximum")
        top = {
            kind: [
                {**t._asdict(), "tokens": self._spelled(t), "values": list(t.values)} for t in tops
            ]
            for kind, tops in self.top.items()
        }
        return {**{name: getattr(self, name) for name in fields}, "top": top}

    def sections(self) -> list[heatmap.Section]:
        """What the pictures show: a section a top sample."""
        return [
            self._section(kind, rank, top)
            for kind, tops in self.top.items()
            for rank, top in enumerate(tops, 1)
        ]

    def to_html(self, path: str | Path | None = None) -> str:
        """A self-contained page, as `Explanation.to_html` makes."""
        page = heatmap.html_document(self.sections(), self._summary)
        if path is not None:
            write_atomically(path, page)
        return page

    def _repr_html_(self) -> str:
        return heatmap.html_fragment(self.sections())

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._summary
        colours = None if console.no_color else console.color_system
        yield from heatmap.terminal(
            self.sections(), colours, ascii_only=options.ascii_only, width=options.max_width
        )

    @property
    def _summary(self) -> str:
        numbers = ", ".join(
            f"{kind} {self.mean[kind]:.3g} (magnitude {self.mean_absolute[kind]:.3g}, "
            f"at most {self.maximum[kind]:.3g})"
            for kind in KINDS
        )
        share = 100 * self.active / self.count if self.count else 0.0
        return f"{self.title}: {self.count:,} tokens, active at {share:.3g} %; mean {numbers}"

    def _spelled(self, top: Top) -> list[str]:
        return [self.vocabulary.get(i, str(i)) for i in top.tokens]

    def _section(self, kind: str, rank: int, top: Top) -> heatmap.Section:
        what = "highest activation" if kind == "activation" else "most relevance"
        title = f"{what}, {rank}: sample {top.sample}, {heatmap.number(top.score)}"
        tokens = self._spelled(top) or [f"[{top.start + i}]" for i in range(len(top.values))]
        strip = heatmap.TokenStrip(
            kind,
            tuple(tokens),
            tuple(range(top.start, top.start + len(tokens))),
            top.values,
            spelling_of(iter(tokens)) if top.tokens else "word",
        )
        return heatmap.Section(title, None, (strip,), measure=kind)
