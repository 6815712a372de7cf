"""Sites: the latent values whose activation and relevance are asked for, by name.

A site is one value of the graph, as everything reads it or as one module does. Its dimensions have
names: "batch", "position", "head", "query", "key", "expert", "slot" (a chosen expert's place),
"neuron", "channel", "feature"; "token" is batch and position in one, "row" a leading dimension that
is neither. One of them holds its *units*, which are ranked, masked and changed.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx, nn

UNITS = ("head", "expert", "slot", "neuron", "channel", "feature")
"""The dimensions that can hold units; the first that a value has does."""

PLAIN = ("module", "input", "node")
"""The roles of sites that were asked for by no role."""


@dataclass(frozen=True)
class Site:
    """What is known of a latent value before it is computed."""

    name: str
    role: str
    """One of the roles that `latent=[...]` takes, or "module", "input" or "node"."""
    dims: tuple[str, ...]
    """The meaning of each dimension."""
    units: int | None
    """How many units it has (of chosen experts, all that there are); None: it depends on sizes."""

    @property
    def unit(self) -> int:
        """The dimension of the units."""
        return next(self.dims.index(name) for name in UNITS if name in self.dims)


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder, whose features are to be latent values.

    Its module has methods `encode(values) → features` and `decode(features) → values`; the last
    dimension is the model's features, and the autoencoder's. The site of its features is named
    `at`, ":" and `name`, that of its error `at` and ":error".
    """

    module: nn.Module
    at: str
    """The value that it reads: a module, node or role as in `latent=[...]`."""
    name: str = "sae"


@dataclass(frozen=True)
class Found:
    """A site, and where it is in a graph."""

    site: Site
    value: fx.Node
    readers: tuple[fx.Node, ...] | None = None
    """The nodes that read the value there; None: all."""
    chosen: fx.Node | None = None
    """int64, (token, slot): which expert each slot holds, where there are slots."""

    @property
    def breadth(self) -> float:
        """How many nodes read it there."""
        return float("inf") if self.readers is None else len(self.readers)


def glob(pattern: str) -> re.Pattern[str]:
    """A pattern of a module path: `*` is any part between dots, `**` any number of parts.

    >>> bool(glob("model.layers.*").fullmatch("model.layers.3"))
    True
    >>> bool(glob("model.layers.*").fullmatch("model.layers.3.mlp"))
    False
    >>> bool(glob("**.mlp").fullmatch("model.layers.3.mlp"))
    True
    """
    text = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^.]*")
    return re.compile(text.replace(r"\?", "[^.]"))


def near(name: str, known: Iterable[str], count: int = 4) -> str:
    """The names that are most like one, as a text for an error."""
    names = list(dict.fromkeys(known))
    found = difflib.get_close_matches(name, names, count, 0.4)
    return ", ".join(f"'{one}'" for one in found or names[:count])


def named(sites: Sequence[Found]) -> list[Found]:
    """Sites in order, each name once; one that plays a role before one that does not."""
    found: dict[str, Found] = {}
    for one in sites:
        known = found.setdefault(one.site.name, one)
        if known.site.role in PLAIN:
            found[one.site.name] = one
    return list(found.values())
