"""The tape: runs a rewritten graph forward and its pullbacks in reverse.

Forward, each node that carries relevance yields its value and its pullback. In reverse, the
coefficients of a value's users are added up and taken through its pullback, down to the sources.
The tape runs on real tensors (the eager oracle of the tests) and under a tracer alike.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from attnlrp_fx import ops
from attnlrp_fx.ledger import node_sums
from attnlrp_fx.operators import is_op, leaves, product_of
from attnlrp_fx.pullbacks import PULLBACKS, Call, Pullback
from attnlrp_fx.tokens import FILLS, MOVES, carry

Watch = Callable[[fx.Node, str, Any], None]
Annotate = Callable[[fx.Node, str], AbstractContextManager[Any]]


def _no_annotation(node: fx.Node, phase: str) -> AbstractContextManager[None]:
    return nullcontext()


def _no_watch(node: fx.Node, phase: str, value: Any) -> None:
    pass


@dataclass
class Reading:
    """What a reverse pass reads off the tape."""

    relevance: dict[str, Tensor]
    """Per explained placeholder: relevance in the input's shape, float32 or better."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Per node name: what came in, went out and was absorbed; only when audited."""


class Tape(fx.Interpreter):
    """Interpreter of a rewritten graph that records a pullback for each explained node.

    Args:
        rewritten: the rewritten graph.
        attributes: values for the graph's get_attr nodes, by target; None reads the module's own.
        device: where constants that the graph creates are put; None leaves the captured device.
        annotate: context in which a node's ops run, told the node and "forward" or "relevance".
        watch: told each explained node's value and then its coefficient.
    """

    def __init__(
        self,
        rewritten: fx.GraphModule,
        attributes: Mapping[str, Any] | None = None,
        device: torch.device | None = None,
        annotate: Annotate = _no_annotation,
        watch: Watch = _no_watch,
    ) -> None:
        super().__init__(rewritten, garbage_collect_values=False)
        self.attributes = attributes or {}
        self.device = device
        self.annotate = annotate
        self.watch = watch
        self.pullbacks: dict[fx.Node, Pullback] = {}
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

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.attributes:
            return self.attributes[target]
        return super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._moved((args, kwargs))
        return super().call_function(target, args, kwargs)

    def _moved(self, arguments: Any) -> Any:
        """Arguments with every device that they name replaced by the tape's."""
        if self.device is None:
            return arguments
        return fx.node.map_aggregate(
            arguments, lambda leaf: self.device if isinstance(leaf, torch.device) else leaf
        )

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

    def reverse(self, seeds: Mapping[fx.Node, Tensor], audit: bool = False) -> Reading:
        """Take seeds back to the sources.

        Args:
            seeds: coefficient of each seeded node, in the node's shape.
            audit: whether to add up what each node receives, passes on and absorbs.

        Returns:
            The relevance of every explained input and, if audited, every node's sums.
        """
        coefficients: dict[fx.Node, Any] = {}
        relevance: dict[fx.Node, Tensor] = {}
        reading = Reading(relevance={})
        for node, seed in seeds.items():
            _add(coefficients, node, seed)
        for node in reversed(list(self._nodes())):
            with self.annotate(node, "relevance"):
                if node in relevance:
                    self._carry(node, relevance, reading, audit)
                elif node not in coefficients:
                    continue
                elif node.target is ops.source:
                    origin = node.kwargs.get("ids", node.args[0])
                    _add(relevance, origin, self._relevance_of_source(node, coefficients.pop(node)))
                else:
                    self._pull(node, coefficients, reading if audit else None)
        return reading

    def _nodes(self) -> Iterable[fx.Node]:
        assert isinstance(self.module, fx.GraphModule)
        return self.module.graph.nodes

    def _pull(
        self, node: fx.Node, coefficients: dict[fx.Node, Any], audited: Reading | None
    ) -> None:
        """Take one node's coefficient to its explained inputs, each in its input's dtype.

        Ops that promote (bfloat16 times float32) give outputs, and so coefficients, of another.
        """
        c = coefficients.pop(node)
        if node.target is operator.getitem:
            owner, part = node.args
            assert isinstance(owner, fx.Node)
            _add(coefficients.setdefault(owner, {}), part, c)
            return
        call = self.calls[node]
        inputs = [leaf for leaf in leaves((node.args[1:], node.kwargs)) if ops.is_explained(leaf)]
        output = self.env[node]
        if isinstance(c, dict):
            c = [c[i] if i in c else torch.zeros_like(part) for i, part in enumerate(output)]
        self.watch(node, "relevance", c)
        pulled = self.pullbacks[node](c)
        for leaf, value, coefficient in zip(inputs, call.primals, pulled, strict=True):
            if coefficient is not None:
                _add(coefficients, leaf, coefficient.to(value.dtype))
        if audited is not None:
            assert callable(node.target)
            audited.sums[node.name] = node_sums(node.target, call, output, c, pulled)

    def _relevance_of_source(self, node: fx.Node, c: Tensor) -> Tensor:
        """R = x·c of a source in float32 or better, summed over the features of tokens."""
        value: Tensor = self.env[node]
        dtype = torch.promote_types(value.dtype, torch.float32)
        relevance = value.to(dtype) * c.to(dtype)
        ids = node.kwargs.get("ids")
        if not isinstance(ids, fx.Node):
            return relevance
        kept = node.kwargs.get("keep") or range(self.env[ids].dim())
        return relevance.sum([d for d in range(value.dim()) if d not in kept])  # type: ignore[operator]

    def _carry(
        self, node: fx.Node, relevance: dict[fx.Node, Tensor], reading: Reading, audit: bool
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
        if audit and is_op(node, *MOVES, *FILLS):
            total = received.sum(dtype=torch.float64)
            passed = sum((part.sum(dtype=torch.float64) for _, part in moved), start=0 * total)
            reading.sums[node.name] = torch.stack([total, passed, total - passed])


def _parameters(node: fx.Node) -> Sequence[str]:
    """The keyword arguments of a relevance op that are its rule's, not the wrapped op's."""
    assert callable(node.target)
    return ops.RULE_PARAMETERS.get(node.target, ())


def _add(sums: dict[Any, Any], key: Any, value: Tensor) -> None:
    sums[key] = sums[key] + value if key in sums else value
