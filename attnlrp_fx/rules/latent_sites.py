"""From what a user asks for to the values of a graph: by role, by module, by node.

"residual"                      a role
"units"                         every neuron, head and expert: those of these roles that there are
"model.layers.*.mlp.act_fn"     what modules give; `*` is a part of a path, `**` any number
"input:model.layers.*.mlp"      what modules take, as they read it
"add_12"                        a node of the captured graph
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import is_concrete_int

from attnlrp_fx.errors import InputError
from attnlrp_fx.graph.calls import calls_of, given, gives, path_of, taken
from attnlrp_fx.graph.provenance import describe, module_path
from attnlrp_fx.graph.sites import Found, Site, glob, named, near
from attnlrp_fx.rules.latent_roles import LatentRole, LatentRoles, Playing, dims_of

INPUT = "input:"
"""How a pattern of what modules take begins."""
UNITS = "units"
"""The name of several roles together."""
UNIT_ROLES = (LatentRole.NEURONS, LatentRole.HEADS, LatentRole.EXPERTS)
EARLIER = "stands_for"
"""The key of a node's meta that holds the name of the captured node whose place it took."""


def find_sites(graph: fx.Graph, patterns: Sequence[str]) -> list[Found]:
    """The sites that patterns ask for, in the graph's order, each once.

    Raises:
        InputError: a pattern means nothing in this graph, or only what is not explained.
    """
    finder = _Finder(graph)
    found = named([site for pattern in patterns for site in finder.find(pattern)])
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda site: order[site.value])


class _Finder:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.roles = LatentRoles(graph)
        self.explained = self.roles.explained
        values = {node for node in self.explained if _has_units(node.meta.get("val"))}
        self.values = values
        self.given = given(graph, values)
        self.taken = taken(graph, values)
        self.calls = list(dict.fromkeys(c for n in graph.nodes for c in calls_of(n)))
        self.names: dict[str, fx.Node] = {}

    def find(self, pattern: str) -> list[Found]:
        if pattern == UNITS or pattern in set(LatentRole):
            wanted_roles = UNIT_ROLES if pattern == UNITS else (LatentRole(pattern),)
            found = [site for role in wanted_roles for site in self._of_role(role)]
            if not found:
                raise InputError(
                    f"nothing in this model plays the role '{pattern}'",
                    why="roles are found by structure: see attnlrp_fx.rules.latent_roles",
                    remedy="name a module or a node instead",
                )
            return found
        side, wanted = (
            (self.taken, pattern[len(INPUT) :])
            if pattern.startswith(INPUT)
            else (self.given, pattern)
        )
        matcher = glob(wanted)
        matched = [
            call for call in self.calls if matcher.fullmatch(path_of(call)) or call == wanted
        ]
        if not matched:
            node = self._node(pattern)
            if node is None:
                raise self._unknown(pattern, wanted)
            return [self._found(node, pattern, "node")]
        sites = [site for call in matched for site in self._of_call(call, side)]
        if not sites:
            raise self._unexplained(pattern, matched)
        return sites

    def _node(self, name: str) -> fx.Node | None:
        """The node of a name, or what took its place; an error if it carries no relevance."""
        own = [node for node in self.graph.nodes if node.name == name]
        own += [node for node in self.graph.nodes if node.meta.get(EARLIER) == name]
        found: fx.Node | None = next((node for node in own if node.op != "placeholder"), None)
        if found is not None and found not in self.values:
            raise InputError(
                f"'{name}' carries no relevance",
                where=describe(found),
                why=self._why_not(found),
                remedy="name a floating value between an explained input and an output",
            )
        return found

    def _why_not(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return "it is several values, or none that is a tensor"
        if not value.is_floating_point():
            return f"it is {value.dtype}, and only floating values carry relevance"
        return "it depends on no explained input, or no output depends on it"

    def _of_role(self, role: LatentRole) -> Iterator[Found]:
        word = role.rpartition(".")[-1]
        for playing in self.roles.playing(role):
            yield self._found(playing.value, self._name(playing.value, word), role, playing)

    def _name(self, value: fx.Node, word: str) -> str:
        """The module that gave a value; if none did, the one that made it, and the role."""
        path, calls = module_path(value), calls_of(value)
        if calls and calls[-1] in gives(value):
            return self._unlike(calls[-1], value)
        return self._unlike(f"{calls[-1] if calls else path}:{word}".removeprefix(":"), value)

    def _unlike(self, name: str, value: fx.Node) -> str:
        """A name that no other value has."""
        for candidate in (name, f"{name}:{value.name}"):
            if self.names.setdefault(candidate, value) is value:
                return candidate
        raise AssertionError(name)

    def _of_call(self, call: str, side: object) -> Iterator[Found]:
        if side is self.given:
            values = self.given.get(call, [])
            for i, value in enumerate(values):
                yield self._found(value, _numbered(call, i, len(values)), "module")
        else:
            reads = self.taken.get(call, {})
            for i, (value, readers) in enumerate(reads.items()):
                found = self._found(value, INPUT + _numbered(call, i, len(reads)), "input")
                yield Found(found.site, value, tuple(readers))

    def _found(self, value: fx.Node, name: str, role: str, playing: Playing | None = None) -> Found:
        known = LatentRole(role) if role in set(LatentRole) else None
        dims = dims_of(value, known, self.explained)
        site = Site(name, str(role), dims, None)
        slots = playing is not None and playing.chosen is not None
        units = playing.experts if slots and playing else value.meta["val"].shape[site.unit]
        site = replace(site, units=int(units) if is_concrete_int(units) else None)
        return Found(site, value, chosen=playing.chosen if playing else None)

    def _unknown(self, pattern: str, wanted: str) -> InputError:
        calls = [path_of(call) for call in self.calls]
        nodes = [n.name for n in self.graph.nodes if n in self.values]
        shown = [INPUT + call for call in calls] if pattern != wanted else [*LatentRole, *calls]
        return InputError(
            f"there is no role, module or node '{pattern}'",
            why="a module that hands on what it takes, as dropout does, leaves no trace in a graph",
            remedy=f"near it are: {near(pattern, [*shown, *nodes])}",
        )

    def _unexplained(self, pattern: str, matched: Sequence[str]) -> InputError:
        inside = [n for n in self.graph.nodes if {*calls_of(n)} & {*matched}]
        node = inside[-1]
        whole = any(n in self.values for n in inside)
        return InputError(
            f"no value at '{pattern}' carries relevance",
            where=describe(node),
            why="what it gives was merged into one op with what is around it (an activation, "
            "attention or a norm), or goes to no output"
            if whole
            else self._why_not(node),
            remedy=f"near it are: {near(pattern, self.given)}",
        )


def _has_units(value: object) -> bool:
    """Whether a value is a tensor with dimensions, and real."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def _numbered(call: str, index: int, count: int) -> str:
    return call if count == 1 else f"{call}[{index}]"
