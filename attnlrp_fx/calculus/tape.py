"""The tape: runs a rewritten graph forward and its pullbacks in reverse.

Forward, each node that carries relevance yields its value and its pullback. In reverse, the
coefficients of a value's users are added up and taken through its pullback, down to the sources.
The tape runs on real tensors (the eager oracle of the tests) and under a tracer alike.

Some rules give relevance to a value whatever it is, even to zero. Such relevance r travels beside
the coefficient c: R = x·c + r. Rearrangements, selections, elementwise ops of one explained value
and rules that read R itself hand it on as it is; before any other op it becomes a coefficient,
c + r/x, and is lost at x = 0.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.calculus.calls import Call, Explicit, Pullback, Shares, parts_of
from attnlrp_fx.calculus.postings import TOKENS_MOVED, Account, Postings, postings_of, total
from attnlrp_fx.calculus.pullbacks import PULLBACKS
from attnlrp_fx.calculus.relevance import factored, relevance_of
from attnlrp_fx.calculus.weights import Weighing, Weight, weigh
from attnlrp_fx.graph.operators import is_elementwise_op, is_op, leaves, product_of, rearranges
from attnlrp_fx.graph.tokens import FILLS, MOVES, carry

Watch = Callable[[fx.Node, str, Any], None]
Annotate = Callable[[fx.Node, str], AbstractContextManager[Any]]


class Audited(Enum):
    """What is added up for the ledger."""

    NOTHING = auto()
    FEW = auto()
    """As few edges as all others follow from by law: what programs do."""
    EVERY = auto()
    """Every edge."""


class Channel(Enum):
    """What a value receives in reverse."""

    COEFFICIENT = auto()
    """c of R = x·c + r."""
    RELEVANCE = auto()
    """r of R = x·c + r, relevance without a factor."""
    MOVED = auto()
    """Relevance of indices, on its way to the model input that they were read from."""


def _no_annotation(node: fx.Node, phase: str) -> AbstractContextManager[None]:
    return nullcontext()


def _no_watch(node: fx.Node, phase: str, value: Any) -> None:
    pass


@dataclass
class Reading:
    """What a reverse pass reads off the tape."""

    relevance: dict[str, Tensor]
    """Per explained placeholder: relevance in the input's shape, float32 or better."""
    postings: Postings = field(default_factory=dict)
    """What nodes passed on and absorbed; only when audited."""
    coefficients: dict[str, Tensor] = field(default_factory=dict)
    """Per placeholder at a boundary: the coefficient that it received."""
    factorless: dict[str, Tensor] = field(default_factory=dict)
    """Per placeholder at a boundary: the relevance without a factor that it received."""
    weights: dict[str, Weight] = field(default_factory=dict)
    """Per parameter that is asked for and stands in a layer that relevance passed through."""
    rows_told_apart: bool = True
    """Whether parameters' relevance is known of each row of the batch."""
    latent: dict[str, Tensor] = field(default_factory=dict)
    """Per name of a marker: the relevance of the latent value, float32 or better."""

    def hand_out(self, boundary: fx.Node, c: Tensor | None, r: Tensor | None) -> None:
        """Read off what a boundary received."""
        (placeholder,) = boundary.all_input_nodes
        for found, value in ((self.coefficients, c), (self.factorless, r)):
            if value is not None:
                found[str(placeholder.target)] = value

    def by_channel(self) -> dict[Channel, dict[str, Tensor]]:
        """All that placeholders have received."""
        return {
            Channel.COEFFICIENT: self.coefficients,
            Channel.RELEVANCE: self.factorless,
            Channel.MOVED: self.relevance,
        }


class Runner(fx.Interpreter):
    """Interpreter of a graph on tensors given for its get_attr nodes.

    Args:
        graph_module: the graph.
        attributes: values for the graph's get_attr nodes, by target; None reads the module's own.
        device: where constants that the graph creates are put; None leaves the captured device.
        widest: a floating dtype, in place of every narrower one that the graph casts to.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        attributes: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        garbage_collect_values: bool = True,
        widest: torch.dtype | None = None,
    ) -> None:
        super().__init__(graph_module, garbage_collect_values=garbage_collect_values)
        self.attributes = attributes or {}
        self.device = device
        self.widest = widest

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.attributes:
            return self.attributes[target]
        return super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._moved((args, kwargs))
        return super().call_function(target, args, kwargs)

    def _moved(self, arguments: Any) -> Any:
        """Arguments with every device that they name, and narrow dtypes, replaced."""
        if self.device is None and self.widest is None:
            return arguments
        return fx.node.map_aggregate(arguments, self._replaced)

    def _replaced(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return self.device or leaf
        is_narrow = isinstance(leaf, torch.dtype) and leaf.is_floating_point
        return torch.promote_types(leaf, self.widest) if is_narrow and self.widest else leaf


class Tape(Runner):
    """Interpreter of a rewritten graph that records a pullback for each explained node.

    Args:
        rewritten: the rewritten graph.
        attributes: as in `Runner`.
        device: as in `Runner`.
        annotate: context in which a node's ops run, told the node and "forward" or "relevance".
        watch: told each explained node's value and then its coefficient.
        widest: as in `Runner`.
        weighing: which parameters' relevance is read as well.
    """

    def __init__(
        self,
        rewritten: fx.GraphModule,
        attributes: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        annotate: Annotate = _no_annotation,
        watch: Watch = _no_watch,
        widest: torch.dtype | None = None,
        weighing: Weighing | None = None,
    ) -> None:
        super().__init__(rewritten, attributes, device, False, widest)
        self.weighing = weighing
        self.annotate = annotate
        self.watch = watch
        self.pullbacks: dict[fx.Node, Pullback | Explicit] = {}
        self.calls: dict[fx.Node, Call] = {}

    def run_node(self, n: fx.Node) -> Any:
        with self.annotate(n, "forward"):
            if n.target in PULLBACKS:
                call = self._call(n)
                output, self.pullbacks[n] = PULLBACKS[n.target](call)
                self.calls[n] = call
                self.watch(n, "forward", output)
                return output
            return super().run_node(n)

    def _call(self, node: fx.Node) -> Call:
        """The node's call as a function of its explained inputs."""
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        op, args = args[0], args[1:]
        own = _parameters(node)
        parameters = {key: value for key, value in kwargs.items() if key in own}
        kwargs = {key: value for key, value in kwargs.items() if key not in own}
        arguments: list[tuple[int | str, Any]] = [*enumerate(node.args[1:]), *node.kwargs.items()]
        slots = [
            (position, leaf)
            for position, argument in arguments
            for leaf in leaves(argument)
            if ops.is_explained(leaf)
        ]
        product = product_of(op)
        is_factor = tuple(product is not None and p in product.factors for p, _ in slots)

        def function(*primals: Tensor) -> Any:
            given = iter(primals)

            def value(leaf: fx.Node) -> Any:
                return next(given) if ops.is_explained(leaf) else self.env[leaf]

            new_args = fx.node.map_arg(node.args[1:], value)
            new_kwargs = fx.node.map_arg(
                {key: arg for key, arg in node.kwargs.items() if key in kwargs}, value
            )
            new_args, new_kwargs = self._moved((new_args, new_kwargs))
            return op(*new_args, **new_kwargs)

        return Call(
            op=op,
            args=tuple(args),
            kwargs=kwargs,
            primals=tuple(self.env[leaf] for _, leaf in slots),
            positions=tuple(position for position, _ in slots),
            function=function,
            factors=sum(is_factor),
            is_factor=is_factor,
            parameters=parameters,
        )

    def reverse(
        self, seeds: "Mapping[fx.Node, Tensor] | Received", audit: Audited = Audited.NOTHING
    ) -> Reading:
        """Take seeds back to the sources.

        Args:
            seeds: coefficient of each seeded node, in the node's shape; or all that nodes have
                received already.
            audit: what to add up of what each node passes on and absorbs.

        Returns:
            The relevance of every explained input, what every boundary received and, if audited,
            every node's postings.
        """
        received = seeds if isinstance(seeds, Received) else Received(dict(seeds))
        relevance = received.moved
        reading = Reading(relevance={})
        for node in reversed(list(self._nodes())):
            with self.annotate(node, "relevance"):
                if node in relevance:
                    self._carry(node, relevance, reading, audit)
                elif node not in received:
                    continue
                elif node.target is ops.boundary:
                    reading.hand_out(node, *received.pop(node))
                elif node.target is ops.source:
                    origin = node.kwargs.get("ids", node.args[0])
                    _add(relevance, origin, self._relevance_of_source(node, *received.pop(node)))
                elif node.target is ops.latent:
                    self._read(node, received, reading, audit)
                elif node.target is ops.intervened:
                    self._take_back(node, received, reading, audit)
                elif node.target is ops.rejoined:
                    self._leave_error(node, received, reading, audit)
                elif node.target is operator.getitem:
                    received.hand_to_owner(node)
                else:
                    self._pull(node, received, reading, audit)
        return reading

    def _nodes(self) -> Iterable[fx.Node]:
        assert isinstance(self.module, fx.GraphModule)
        return self.module.graph.nodes

    def _pull(self, node: fx.Node, received: "Received", reading: Reading, audit: Audited) -> None:
        """Take what one node received to its explained inputs, each in its input's dtype.

        Ops that promote (bfloat16 times float32) give outputs, and so coefficients, of another.
        """
        call = self.calls[node]
        c, r = (_whole(part, self.env[node]) for part in received.pop(node))
        self.watch(node, "relevance", r if c is None else c)
        shares, post = self._shares(node, c, r)
        inputs = [leaf for leaf in leaves((node.args[1:], node.kwargs)) if ops.is_explained(leaf)]
        none = [None] * len(inputs)
        coefficients, relevance = shares.coefficients or none, shares.relevance or none
        for leaf, value, coefficient in zip(inputs, call.primals, coefficients, strict=True):
            if coefficient is not None:
                _add(received.coefficients, leaf, coefficient.to(value.dtype))
        for leaf, share in zip(inputs, relevance, strict=True):
            if share is not None:
                _add(received.relevance, leaf, share)
        if audit is not Audited.NOTHING:
            posted = post(audit is Audited.FEW)
            reading.postings |= {(node.name, account): value for account, value in posted.items()}
        if self.weighing is not None:
            self._weigh(node, (c, r), shares, reading, self.weighing)

    def _weigh(
        self,
        node: fx.Node,
        received: tuple[Any, Any],
        shares: Shares,
        reading: Reading,
        weighing: Weighing,
    ) -> None:
        """Read off the relevance of a layer's parameters; one that stands twice gets both."""
        output = self.env[node]
        found, told = weigh(node, self.calls[node], output, received, shares, self.env, weighing)
        reading.rows_told_apart &= told
        for name, weight in found.items():
            held = reading.weights.get(name)
            both = weight if held is None else map(operator.add, held, weight)
            reading.weights[name] = Weight(*both)

    def _shares(
        self, node: fx.Node, c: Any, r: Any
    ) -> tuple[Shares, Callable[[bool], dict[Account, Tensor]]]:
        """What a node hands on of its coefficient c and relevance r, and its postings."""
        call, output, pullback = self.calls[node], self.env[node], self.pullbacks[node]
        assert callable(node.target)
        if isinstance(pullback, Explicit):
            shares = pullback.share(parts_of(relevance_of(output, c, r))[0])
            return shares, lambda few: postings_of(node, call, output, None, shares, few=few)
        lost: dict[str, Tensor] = {}
        handed: Sequence[Tensor | None] = ()
        if r is not None and (node.target is ops.winner or rearranges(call.op)):
            handed = pullback(r)
        elif r is not None and (node.target is ops.identity or _is_affine(call, output)):
            handed = [r.sum_to_size(call.primals[0].shape)]
        elif r is not None:
            c, lost["zero"] = factored(output, c, r)
        shares = Shares(pullback(c) if c is not None else (), handed, lost)
        passed_as_it_came = r if handed else None
        return shares, lambda few: postings_of(
            node, call, output, c, shares, passed_as_it_came, few
        )

    def _relevance_of_source(self, node: fx.Node, c: Tensor | None, r: Tensor | None) -> Tensor:
        """R = x·c + r of a source in float32 or better, summed over the features of tokens."""
        value: Tensor = self.env[node]
        relevance = _wide_relevance(value, c, r)
        ids = node.kwargs.get("ids")
        if not isinstance(ids, fx.Node):
            return relevance
        kept: Any = node.kwargs.get("keep") or range(self.env[ids].dim())
        return relevance.sum([d for d in range(value.dim()) if d not in kept])

    def _read(self, node: fx.Node, received: "Received", reading: Reading, audit: Audited) -> None:
        """Read a latent value's relevance off, and hand on what its condition lets through."""
        args, unit = self.fetch_args_kwargs_from_env(node)
        (value, *edits), (c, r) = args, received.pop(node)
        kept = c, r
        if edits:
            share = ops.kept_of(value, *edits, **unit)
            kept = _times(c, share), _times(r, share)
        reading.latent[node.name] = _wide_relevance(value, *kept)
        received.hand_on(node, *kept)
        if audit is not Audited.NOTHING and edits:
            reading.postings |= _line(node, (value, c, r), (value, *kept))

    def _take_back(
        self, node: fx.Node, received: "Received", reading: Reading, audit: Audited
    ) -> None:
        """Take what an intervention received to the value that it changed: y = f·x + s."""
        args, unit = self.fetch_args_kwargs_from_env(node)
        (value, *edits), (c, r), changed = args, received.pop(node), self.env[node]
        whole = c if r is None else factored(changed, c, r)[0]
        coefficient = _times(whole, ops.factor_of(value, *edits, **unit))
        received.hand_on(node, coefficient, None)
        if audit is not Audited.NOTHING:
            reading.postings |= _line(node, (changed, c, r), (value, coefficient, None))

    def _leave_error(
        self, node: fx.Node, received: "Received", reading: Reading, audit: Audited
    ) -> None:
        """Read the relevance of an autoencoder's error off, and hand on the rest."""
        (decoded, error), (c, r) = self.fetch_args_kwargs_from_env(node)[0], received.pop(node)
        whole = c if r is None else factored(self.env[node], c, r)[0]
        reading.latent[node.name] = _wide_relevance(error, whole, None)
        received.hand_on(node, whole, None)
        if audit is not Audited.NOTHING:
            reading.postings |= _line(node, (self.env[node], c, r), (decoded, whole, None))

    def _carry(
        self, node: fx.Node, relevance: dict[fx.Node, Tensor], reading: Reading, audit: Audited
    ) -> None:
        """Take relevance from looked-up indices to the model input that they were read from.

        Indices that the model itself puts among them (a prompt, a placeholder) keep theirs.
        """
        if node.op == "placeholder":
            reading.relevance[str(node.target)] = relevance.pop(node)
            return
        received = relevance.pop(node)
        moved = list(carry(node, received, self.env))
        for leaf, carried in moved:
            _add(relevance, leaf, carried)
        if audit is not Audited.NOTHING and is_op(node, *MOVES, *FILLS):
            passed = sum(total(carried) for _, carried in moved)
            reading.postings[node.name, 0] = passed + 0 * total(received)
            reading.postings[node.name, TOKENS_MOVED] = total(received) - passed


@dataclass
class Received:
    """What nodes have received so far, by channel.

    Of an op with several outputs, a dictionary by output.
    """

    coefficients: dict[fx.Node, Any] = field(default_factory=dict)
    relevance: dict[fx.Node, Any] = field(default_factory=dict)
    moved: dict[fx.Node, Tensor] = field(default_factory=dict)

    def add(self, channel: Channel, node: fx.Node, value: Tensor) -> None:
        """Add to what a node has received."""
        _add(self.by_channel()[channel], node, value)

    def by_channel(self) -> dict[Channel, dict[fx.Node, Any]]:
        """All that nodes have received."""
        return {
            Channel.COEFFICIENT: self.coefficients,
            Channel.RELEVANCE: self.relevance,
            Channel.MOVED: self.moved,
        }

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.coefficients or node in self.relevance

    def pop(self, node: fx.Node) -> tuple[Any, Any]:
        """The coefficient and the relevance of a node, None for what it did not receive."""
        return self.coefficients.pop(node, None), self.relevance.pop(node, None)

    def hand_on(self, node: fx.Node, c: Tensor | None, r: Tensor | None) -> None:
        """Give what a marker lets through to the value that it marks."""
        marked: Any = node.args[0]
        for sums, part in ((self.coefficients, c), (self.relevance, r)):
            if part is not None:
                _add(sums, marked, part)

    def hand_to_owner(self, node: fx.Node) -> None:
        """Give what one output of an op has received to the op."""
        owner, part = node.args
        assert isinstance(owner, fx.Node)
        for sums in (self.coefficients, self.relevance):
            if node in sums:
                _add(sums.setdefault(owner, {}), part, sums.pop(node))


def _times(part: Tensor | None, share: Tensor) -> Tensor | None:
    return None if part is None else (part * share).to(part.dtype)


def _line(node: fx.Node, arrived: tuple[Any, Any, Any], handed: tuple[Any, Any, Any]) -> Postings:
    """The postings of a marker, of the value, coefficient and relevance before and behind it."""
    came, went = (_wide_relevance(*part).sum() for part in (arrived, handed))
    return {(node.name, 0): went, (node.name, str(node.meta["absorbs"])): came - went}


def _wide_relevance(value: Tensor, c: Tensor | None, r: Tensor | None) -> Tensor:
    """R = x·c + r in float32 or better."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    wide = [None if part is None else part.to(dtype) for part in (c, r)]
    relevance: Tensor = relevance_of(value.to(dtype), *wide)
    return relevance


def _is_affine(call: Call, output: Any) -> bool:
    """Whether a call makes each element of its output of one explained element and constants."""
    is_one = len(call.primals) == 1 and isinstance(output, Tensor)
    return is_one and is_elementwise_op(call.op) and output.shape == call.primals[0].shape


def _whole(given: Any, output: Any) -> Any:
    """What an op's outputs received, with zeros for those that received nothing."""
    if not isinstance(given, dict):
        return given
    return [given[i] if i in given else torch.zeros_like(part) for i, part in enumerate(output)]


def _parameters(node: fx.Node) -> Sequence[str]:
    """The keyword arguments of a relevance op that are its rule's, not the wrapped op's."""
    assert callable(node.target)
    return ops.RULE_PARAMETERS.get(node.target, ())


def _add(sums: dict[Any, Any], key: Any, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value
