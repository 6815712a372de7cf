"""Layout of a graph that is folded by module: what is in what, and which row each thing lies in.

The tree is that of module paths. In one module, neighbours of one structure are put into a group of
their own (a stack of layers), whatever they are called, and so are the constants. Rows are the
ranks of a layered layout: a thing lies below all that it reads. Where modules read each other in a
circle, the order of the graph decides. In a row, things lie near what they read, by barycentres.
How large things are is known when they are drawn, so places in pixels are left to the page.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

CONSTANTS = "constants"
"""The name of a group of values that no relevance passes through."""
SWEEPS = 4
"""How often rows are put in order by their neighbours."""


@dataclass
class Group:
    """A module, a stack of alike modules, or a module's constants."""

    name: str
    path: str
    kind: str
    """"module", "stack" or "constants"."""
    children: "list[Group | str]" = field(default_factory=list)
    """Groups, and names of nodes, in the graph's order."""
    rows: "list[list[Group | str]]" = field(default_factory=list)
    """The children in rows from top to bottom."""

    def nodes(self) -> Iterator[str]:
        """The names of all nodes in it."""
        for child in self.children:
            if isinstance(child, Group):
                yield from child.nodes()
            else:
                yield child

    def groups(self) -> "Iterator[Group]":
        """It and all groups in it."""
        yield self
        for child in self.children:
            if isinstance(child, Group):
                yield from child.groups()


def folded(graph: "nx.DiGraph[str]") -> Group:
    """The layout of a graph as from `attnlrp_fx.inspection.graph.to_networkx`: its root group."""
    order = {name: i for i, name in enumerate(graph)}
    root = _tree(graph)
    looks = _looks(graph)
    for group in list(root.groups()):
        group.children = _stacked(group, graph, looks, order)
    for group in list(root.groups()):
        group.children = [_alone(child) for child in group.children]
    for group in root.groups():
        group.rows = _rows(group, graph, order)
    return root


def _tree(graph: "nx.DiGraph[str]") -> Group:
    """The modules, with nodes and constants in them."""
    root = Group("", "", "module")
    known = {"": root}

    def module(path: str) -> Group:
        if path not in known:
            parent, _, name = path.rpartition(".")
            known[path] = Group(name, path, "module")
            module(parent).children.append(known[path])
        return known[path]

    constants: dict[str, Group] = {}
    for name, data in graph.nodes.data():
        home = module(data["module"])
        if not data["rule"] and data["op"] != "output" and "source" not in data["op"]:
            path = data["module"]
            if path not in constants:
                constants[path] = Group(CONSTANTS, f"{path}.({CONSTANTS})".lstrip("."), "constants")
                home.children.append(constants[path])
            home = constants[path]
        home.children.append(name)
    for path, group in constants.items():
        if len(group.children) < 3:
            home = known[path]
            at = home.children.index(group)
            home.children[at : at + 1] = group.children
    return root


def _looks(graph: "nx.DiGraph[str]") -> Mapping[str, Hashable]:
    """What each node is, apart from where."""
    return {n: (d["op"], d["rule"], d["shape"]) for n, d in graph.nodes.data()}


def _structure(
    group: Group, graph: "nx.DiGraph[str]", looks: Mapping[str, Hashable], order: Mapping[str, int]
) -> Hashable:
    """Equal for groups whose nodes are alike one by one, and are connected alike inside."""
    nodes = sorted(group.nodes(), key=order.__getitem__)
    local = {name: i for i, name in enumerate(nodes)}
    return tuple(
        (looks[name], tuple(local.get(before, -1) for before in graph.predecessors(name)))
        for name in nodes
    )


def _stacked(
    group: Group, graph: "nx.DiGraph[str]", looks: Mapping[str, Hashable], order: Mapping[str, int]
) -> "list[Group | str]":
    """The children in the graph's order, runs of alike groups in a stack of their own."""
    children = sorted(group.children, key=lambda child: _first(child, order))
    groups = [c for c in children if isinstance(c, Group) and c.kind == "module"]
    runs: list[list[Group]] = []
    last: Hashable = None
    for module in groups:
        structure = _structure(module, graph, looks, order)
        if runs and structure == last:
            runs[-1].append(module)
        else:
            runs.append([module])
        last = structure
    stacked = {id(run[0]): run for run in runs if len(run) > 1}
    if len(stacked) == 1 and len(runs) == 1 and len(groups) == len(group.children):
        return children  # the group itself is the stack
    inside = {id(child) for run in stacked.values() for child in run[1:]}
    found: list[Group | str] = []
    for child in children:
        if id(child) in stacked:
            run = stacked[id(child)]
            name = f"{run[0].name} … {run[-1].name}"
            path = f"{run[0].path} … {run[-1].name}"
            found.append(Group(name, path, "stack", [*run]))
        elif id(child) not in inside:
            found.append(child)
    return found


def _alone(child: "Group | str") -> "Group | str":
    """What lies in a module that holds one node alone: the node; anything else as it is."""
    if isinstance(child, Group) and child.kind == "module" and len(child.children) == 1:
        (only,) = child.children
        return only if isinstance(only, str) else child
    return child


def _first(child: "Group | str", order: Mapping[str, int]) -> int:
    if isinstance(child, Group):
        return min((order[name] for name in child.nodes()), default=0)
    return order[child]


def _rows(
    group: Group, graph: "nx.DiGraph[str]", order: Mapping[str, int]
) -> "list[list[Group | str]]":
    """A group's children in ranks."""
    children = group.children
    first = [_first(child, order) for child in children]
    home: dict[str, int] = {}
    for i, child in enumerate(children):
        for name in child.nodes() if isinstance(child, Group) else (child,):
            home[name] = i
    before: dict[int, set[int]] = defaultdict(set)
    after: dict[int, set[int]] = defaultdict(set)
    for name, i in home.items():
        for leaf in graph.predecessors(name):
            j = home.get(leaf)
            if j is not None and j != i and (first[j], j) < (first[i], i):
                before[i].add(j)
                after[j].add(i)
    rank: dict[int, int] = {}
    for i in sorted(range(len(children)), key=lambda i: (first[i], i)):
        rank[i] = max((rank[j] + 1 for j in before[i]), default=0)
    for i in sorted(rank, key=lambda i: -rank[i]):  # a value that is read late lies near its reader
        if after[i] and not before[i]:
            rank[i] = min(rank[j] for j in after[i]) - 1
    rows: dict[int, list[int]] = defaultdict(list)
    for i in sorted(rank):
        rows[rank[i]].append(i)
    ordered = [rows[r] for r in sorted(rows)]
    for sweep in range(SWEEPS):
        _sort(ordered if sweep % 2 == 0 else ordered[::-1], before if sweep % 2 == 0 else after)
    return [[children[i] for i in row] for row in ordered]


def _sort(rows: Sequence[list[int]], neighbours: Mapping[int, Iterable[int]]) -> None:
    """Put each row in the order of its neighbours in the rows before, in place."""
    place: dict[int, float] = {}
    for row in rows:
        centre = {}
        for k, i in enumerate(row):
            near = [place[j] for j in neighbours[i] if j in place]
            centre[i] = sum(near) / len(near) if near else (k + 0.5) / len(row)
        row.sort(key=centre.__getitem__)
        place |= {i: (k + 0.5) / len(row) for k, i in enumerate(row)}
