"""Streaming statistics of latent units: neurons, heads, experts.

Of every unit, over all tokens (or patches) of a data set: how often it was active, and of its
activation and of its relevance the mean, the mean magnitude and the maximum; and its top samples,
by activation (the highest at any token) and by relevance (the sum over tokens), each with what the
unit did around the token where it did most.

Nothing grows with the data. Sums are of float64, and ties in a ranking go to the sample that comes
first, so that the same batches in the same order give the same bits, and parts merge to the whole.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from attnlrp_fx.errors import InputError

KINDS = ("activation", "relevance")
NOBODY = 2**62
"""The number of no sample: of a place in a ranking that is still empty."""


class Units(Protocol):
    """What is read of a latent value."""

    @property
    def role(self) -> str: ...
    @property
    def unit(self) -> str: ...
    @property
    def unit_activation(self) -> Tensor: ...
    @property
    def unit_relevance(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor | None: ...


class Rows(NamedTuple):
    """The samples of a batch."""

    numbers: Tensor
    """(rows,) int64: their numbers in the data set."""
    tokens: Tensor | None
    """(rows, positions) int64, if there are any."""
    real: Tensor | None
    """(rows, positions) bool: which are no padding; None: all are."""
    places: Tensor | None = None
    """(rows, positions) int64: where in the sequence they are; None: from its beginning on."""


class Top(NamedTuple):
    """One of a unit's top samples."""

    sample: int
    """Its number in the data set."""
    score: float
    """The highest activation at any token, or the sum of relevance over tokens."""
    start: int
    """The position of the first token shown."""
    tokens: tuple[int, ...]
    """Some of its tokens, around the one where the unit did most; empty if it has none."""
    values: tuple[float, ...]
    """What the unit did at each of them: its activation, or its relevance."""


@dataclass
class Ranking:
    """The top samples of every unit of a site, the best first."""

    scores: Tensor
    """(units, top) float64."""
    numbers: Tensor
    """(units, top) int64."""
    starts: Tensor
    """(units, top) int64: where what is shown of a sample begins."""
    values: Tensor
    """(units, top, context) float32: what the unit did there; NaN behind the sample's end."""
    tokens: Tensor
    """(units, top, context) int64: −1 where there is none."""

    @classmethod
    def empty(cls, units: int, top: int, context: int) -> "Ranking":
        """No samples yet."""
        return cls(
            scores=torch.full((units, top), -torch.inf, dtype=torch.float64),
            numbers=torch.full((units, top), NOBODY),
            starts=torch.zeros(units, top, dtype=torch.int64),
            values=torch.full((units, top, context), torch.nan),
            tokens=torch.full((units, top, context), -1),
        )

    def update(self, scores: Tensor, table: Tensor, rows: Rows) -> None:
        """Take in a batch.

        Args:
            scores: (rows, units).
            table: (rows, positions, units): what units did; NaN where there is no token.
            rows: the batch.
        """
        units = (scores >= self.scores[:, -1]).any(0).nonzero()[:, 0]
        if not len(units):
            return
        found = scores[:, units].t()
        numbers = rows.numbers.expand(len(units), -1)
        everyone = torch.cat([self.scores[units], found], 1)
        everybody = torch.cat([self.numbers[units], numbers], 1)
        chosen = _best(everyone, everybody, self.scores.shape[1])
        held = self.scores.shape[1]
        is_new = chosen >= held
        kept = chosen.clamp(max=held - 1)
        for name in ("starts", "values", "tokens"):
            old = getattr(self, name)
            index = kept if old.dim() == 2 else kept[..., None].expand(-1, -1, old.shape[-1])
            old[units] = old[units].gather(1, index)
        self.scores[units] = everyone.gather(1, chosen)
        self.numbers[units] = everybody.gather(1, chosen)
        place, rank = is_new.nonzero(as_tuple=True)
        row, unit = chosen[place, rank] - held, units[place]
        starts, values, tokens = self._around(table[row, :, unit], row, rows)
        self.starts[unit, rank] = starts
        self.values[unit, rank] = values
        self.tokens[unit, rank] = tokens

    def _around(self, did: Tensor, row: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """What units did around the token where they did most, and these tokens."""
        context, length = self.values.shape[2], did.shape[1]
        ends = (~did.isnan() * torch.arange(1, length + 1)).amax(1)
        peak = did.abs().nan_to_num(nan=-1.0).argmax(1)
        starts = (peak - context // 2).clamp(min=0).minimum((ends - context).clamp(min=0))
        places = starts[:, None] + torch.arange(context)
        inside = places.clamp(max=length - 1)
        values = did.gather(1, inside).masked_fill(places >= length, torch.nan).float()
        if rows.places is not None:
            starts = rows.places[row].gather(1, starts[:, None])[:, 0]
        if rows.tokens is None or rows.tokens.shape[1] != length:
            return starts, values, torch.full_like(places, -1)
        tokens = rows.tokens[row].gather(1, inside)
        return starts, values, tokens.masked_fill(values.isnan(), -1)

    def merge(self, other: "Ranking") -> None:
        """Take in the ranking of other samples."""
        scores = torch.cat([self.scores, other.scores], 1)
        numbers = torch.cat([self.numbers, other.numbers], 1)
        chosen = _best(scores, numbers, self.scores.shape[1])
        self.scores, self.numbers = scores.gather(1, chosen), numbers.gather(1, chosen)
        for name in ("starts", "values", "tokens"):
            both = torch.cat([getattr(self, name), getattr(other, name)], 1)
            index = chosen if both.dim() == 2 else chosen[..., None].expand(-1, -1, both.shape[-1])
            setattr(self, name, both.gather(1, index))

    def of_unit(self, unit: int) -> list[Top]:
        """The top samples of a unit, the best first."""
        found = []
        for rank, number in enumerate(self.numbers[unit].tolist()):
            if number == NOBODY:
                break
            real = ~self.values[unit, rank].isnan()
            tokens = [t for t in self.tokens[unit, rank][real].tolist() if t >= 0]
            values = self.values[unit, rank][real].tolist()
            score, start = float(self.scores[unit, rank]), int(self.starts[unit, rank])
            found.append(Top(number, score, start, tuple(tokens), tuple(values)))
        return found


def _best(scores: Tensor, numbers: Tensor, top: int) -> Tensor:
    """Which columns of each row are best, (rows, top); of equals, the lower number."""
    by_number = numbers.sort(dim=1, stable=True).indices
    by_score = scores.gather(1, by_number).sort(dim=1, descending=True, stable=True).indices
    return by_number.gather(1, by_score[:, :top])


@dataclass
class SiteStatistics:
    """The statistics of all units of one site."""

    role: str
    unit: str
    """What its units are: "neuron", "head", "expert", ..."""
    count: Tensor
    """() int64: how many tokens were seen."""
    active: Tensor
    """(units,) int64: at how many of them the activation was not zero."""
    sums: dict[str, Tensor]
    """By kind, (units,) float64."""
    absolutes: dict[str, Tensor]
    """By kind, of magnitudes."""
    maxima: dict[str, Tensor]
    """By kind, (units,) float64."""
    rankings: dict[str, Ranking]
    """By kind."""

    @classmethod
    def empty(cls, latent: Units, units: int, top: int, context: int) -> "SiteStatistics":
        """Nothing seen yet."""

        def each(value: float) -> dict[str, Tensor]:
            return {kind: torch.full((units,), value, dtype=torch.float64) for kind in KINDS}

        return cls(
            role=latent.role,
            unit=latent.unit,
            count=torch.zeros((), dtype=torch.int64),
            active=torch.zeros(units, dtype=torch.int64),
            sums=each(0.0),
            absolutes=each(0.0),
            maxima=each(-torch.inf),
            rankings={kind: Ranking.empty(units, top, context) for kind in KINDS},
        )

    def __len__(self) -> int:
        """How many units there are."""
        return len(self.active)

    def mean(self, kind: str) -> Tensor:
        """(units,) float64."""
        return self.sums[kind] / self.count

    def mean_absolute(self, kind: str) -> Tensor:
        """(units,) float64."""
        return self.absolutes[kind] / self.count

    def update(self, tables: Mapping[str, Tensor], rows: Rows) -> None:
        """Take in a batch: what units did, (rows, positions, units) by kind."""
        size, device = tables["activation"].shape[:2], tables["activation"].device
        self.count += size.numel() if rows.real is None else rows.real.sum()
        real = None if rows.real is None or bool(rows.real.all()) else rows.real.to(device)
        for kind, table in tables.items():
            # Of padding the activation is whatever it is.
            seen = table if real is None else table.masked_fill(~real[..., None], 0)
            highest = table if real is None else table.masked_fill(~real[..., None], -torch.inf)
            by_row = seen.sum(1).double().cpu()
            most = highest.amax(1).double().cpu()
            self.sums[kind] += by_row.sum(0)
            self.absolutes[kind] += torch.linalg.vector_norm(seen, 1, 1).double().cpu().sum(0)
            self.maxima[kind] = torch.maximum(self.maxima[kind], most.amax(0))
            if kind == "activation":
                self.active += seen.count_nonzero((0, 1)).cpu()
            self._rank(kind, most if kind == "activation" else by_row, table, rows)

    def _rank(self, kind: str, scores: Tensor, table: Tensor, rows: Rows) -> None:
        ranking = self.rankings[kind]
        if not bool((scores >= ranking.scores[:, -1]).any()):
            return
        table = table.cpu()
        if rows.real is not None:
            table = table.masked_fill(~rows.real[..., None], torch.nan)
        ranking.update(scores, table, rows)

    def merge(self, other: "SiteStatistics") -> None:
        """Take in the statistics of other samples."""
        self.count += other.count
        self.active += other.active
        for kind in KINDS:
            self.sums[kind] += other.sums[kind]
            self.absolutes[kind] += other.absolutes[kind]
            self.maxima[kind] = torch.maximum(self.maxima[kind], other.maxima[kind])
            self.rankings[kind].merge(other.rankings[kind])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything by name."""
        yield "count", self.count
        yield "active", self.active
        for kind in KINDS:
            yield f"{kind}.sum", self.sums[kind]
            yield f"{kind}.absolute", self.absolutes[kind]
            yield f"{kind}.maximum", self.maxima[kind]
            for name, value in vars(self.rankings[kind]).items():
                yield f"{kind}.top.{name}", value

    @classmethod
    def of(cls, role: str, unit: str, tensors: Mapping[str, Tensor]) -> "SiteStatistics":
        """What `tensors` gave."""
        places = ("scores", "numbers", "starts", "values", "tokens")
        return cls(
            role,
            unit,
            tensors["count"],
            tensors["active"],
            {kind: tensors[f"{kind}.sum"] for kind in KINDS},
            {kind: tensors[f"{kind}.absolute"] for kind in KINDS},
            {kind: tensors[f"{kind}.maximum"] for kind in KINDS},
            {k: Ranking(*(tensors[f"{k}.top.{name}"] for name in places)) for k in KINDS},
        )


class Statistics:
    """The statistics of all sites.

    Args:
        top: how many samples a ranking has.
        context: how many tokens are kept of each.
    """

    def __init__(self, top: int = 5, context: int = 32) -> None:
        for name, value in (("top", top), ("context", context)):
            if value < 1:
                raise InputError(f"{name} is {value}", remedy=f"pass a {name} of 1 or more")
        self.top, self.context = top, context
        self.sites: dict[str, SiteStatistics] = {}
        self.samples = 0

    def update(self, latents: Mapping[str, Any], rows: Rows) -> None:
        """Take in a batch.

        Args:
            latents: by name, as explanations have them; those rows beyond the batch's samples only
                fill it, and do not count.
            rows: the samples.

        Raises:
            InputError: a latent value has no rows of the batch.
        """
        many = len(rows.numbers)
        for name, latent in latents.items():
            tables = {k: getattr(latent, f"unit_{k}") for k in KINDS}
            if len(tables["activation"]) < many:
                raise InputError(
                    f"latent value '{name}' has no dimension of samples",
                    why="what it holds cannot be told apart by sample",
                    remedy="pass batch_size=1, or leave it out",
                )
            tables = {kind: table[:many] for kind, table in tables.items()}
            if name not in self.sites:
                units = tables["activation"].shape[2]
                self.sites[name] = SiteStatistics.empty(latent, units, self.top, self.context)
            self.sites[name].update(*_placed(tables, latent, rows))
        self.samples += many

    def merge(self, other: "Statistics") -> None:
        """Take in the statistics of other samples."""
        for name, site in other.sites.items():
            if name in self.sites:
                self.sites[name].merge(site)
            else:
                self.sites[name] = site
        self.samples += other.samples

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name."""
        return {
            f"{name}|{part}": value
            for name, site in self.sites.items()
            for part, value in site.tensors()
        }

    def about(self) -> dict[str, Any]:
        """What is no tensor."""
        sites = {name: [site.role, site.unit] for name, site in self.sites.items()}
        return {"top": self.top, "context": self.context, "samples": self.samples, "sites": sites}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> "Statistics":
        """What `tensors` and `about` gave."""
        made = cls(about["top"], about["context"])
        made.samples = about["samples"]
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in about["sites"]}
        for key, value in tensors.items():
            name, _, part = key.rpartition("|")
            parts[name][part] = value
        for name, (role, unit) in about["sites"].items():
            made.sites[name] = SiteStatistics.of(role, unit, parts[name])
        return made


def merged(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of several parts of a data set together, in their order."""
    first, *rest = parts
    for part in rest:
        first.merge(part)
    return first


def _placed(
    tables: Mapping[str, Tensor], latent: Units, rows: Rows
) -> tuple[Mapping[str, Tensor], Rows]:
    """Tables and samples of the same positions: of those that a latent value has."""
    length, many = tables["activation"].shape[1], len(rows.numbers)
    if latent.positions is not None:
        places = latent.positions[:many].cpu()

        def at(value: Tensor | None) -> Tensor | None:
            inside = value is not None and value.shape[1] > int(places.max())
            return value.gather(1, places) if value is not None and inside else None

        return tables, Rows(rows.numbers, at(rows.tokens), at(rows.real), places)
    if rows.real is not None and rows.real.shape[1] != length:
        rows = rows._replace(real=None)
    return tables, rows
