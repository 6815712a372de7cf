"""Codegen: the tape under a tracer, and the program that comes out.

`emit` runs the tape on fake tensors that have the captured graph's symbolic sizes, and traces it.
What comes out is one flat graph of ATen ops, without autograd and detach: parameters, inputs and
seeds in; outputs, relevance and ledger out. Parameters are inputs under the model's own names, so
that an optimiser's step shows at once. A whole graph and one region of it are traced alike.

Every size is computed once, from the inputs' sizes, so that no value is kept for its shape alone.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode,
    statically_known_true,
)

from attnlrp_fx.calculus.postings import Account
from attnlrp_fx.calculus.tape import Audited, Channel, Received, Tape
from attnlrp_fx.calculus.weights import Weighing
from attnlrp_fx.capture.functionalise import relax_views
from attnlrp_fx.codegen.derivatives import check_differentiable, exact_derivatives
from attnlrp_fx.codegen.partition import SEED, Keeping, hoist, split
from attnlrp_fx.codegen.regions import computed
from attnlrp_fx.codegen.trace import Input, Trace
from attnlrp_fx.errors import AttnLRPError, RuleError
from attnlrp_fx.graph.operators import aten, is_op, outputs_of, placeholders_of
from attnlrp_fx.graph.provenance import describe
from attnlrp_fx.torch_private import fake_mode_of, fresh, nothing_remembered


class Port(NamedTuple):
    """Where a value goes into a traced graph's reverse pass, or comes out of it."""

    place: int
    """Which output of the graph it belongs to, or which input."""
    channel: Channel
    dtype: torch.dtype


class Posting(NamedTuple):
    """What a number says that a traced graph returns for the ledger."""

    place: int
    """The node that it is of, by its place in the graph."""
    account: Account


@dataclass(frozen=True)
class Program:
    """A traced graph, whole and split.

    The whole takes (attributes, inputs, seeds) and returns (outputs, what inputs receive, relevance
    of parameters, of latent values, postings).
    """

    graph_module: fx.GraphModule
    attributes: tuple[str, ...]
    """Parameters, buffers and constants, by the model's own names."""
    inputs: tuple[str, ...]
    seeds: tuple[Port, ...]
    """What outputs have received when the reverse pass begins; at the model's end, the seeds."""
    outputs: int
    """How many outputs the graph has."""
    received: tuple[Port, ...]
    """What inputs have received when it ends; of the model's inputs, their relevance."""
    weighed: tuple[str, ...]
    """The parameters whose relevance it returns, two results each; empty unless asked for."""
    rows_told_apart: bool
    """Whether their magnitudes are summed over rows."""
    audited: tuple[Posting, ...]
    """The postings that it returns in one tensor; empty unless audited."""
    latent: tuple[int, ...]
    """The markers of latent values whose relevance it returns, by their places in the graph."""
    rest: fx.GraphModule
    """The whole, without what is derived from attributes alone."""
    forward: fx.GraphModule
    relevance: fx.GraphModule
    derived: fx.GraphModule | None
    """Attributes → what depends on them alone, if that is kept from call to call."""

    @property
    def derived_values(self) -> dict[str, Tensor]:
        """The derived values' sizes and dtypes, by what both sides call them."""
        values = outputs_of(self.derived.graph) if self.derived is not None else []
        return {f"derived:{node.name}": node.meta["val"] for node in values}

    def keeping(self, keeping: Keeping) -> "Program":
        """The same, cut in two so that the forward side keeps as much as asked for."""
        forward, relevance = split(self.rest, self.outputs, keeping)
        return replace(self, forward=forward, relevance=relevance)


@dataclass(frozen=True)
class EmitOptions:
    """How graphs are traced."""

    device: torch.device
    """Where the program will run."""
    captured_device: torch.device
    """Where the model was captured; constants created there move along."""
    audit: bool = False
    """Whether the program also returns the ledger's postings."""
    keeping: Keeping = field(default_factory=Keeping)
    """What the forward side keeps for the relevance side."""
    weighed: frozenset[str] = frozenset()
    """The parameters whose relevance the program also returns."""
    rows: int | torch.SymInt | None = None
    """How many rows a batch has."""
    keep_derived: bool = False
    """Whether what depends on parameters alone is taken out of both sides."""
    differentiable: bool = False
    """Whether only ops are traced of which autograd has the exact derivative."""


def emit(
    graph_module: fx.GraphModule,
    seeds: Sequence[Port],
    attributes: Mapping[str, Tensor],
    options: EmitOptions,
) -> Program:
    """Trace the tape of a rewritten graph, or of a region of one, into a program.

    Args:
        graph_module: the graph.
        seeds: what flat outputs have received when the reverse pass begins.
        attributes: the graph's tensors by name; only their sizes, strides and dtypes are read.
        options: how it is traced.

    Raises:
        RuleError: an op cannot be traced, or writes in place, or has no derivative where one is
            asked for.
    """
    graph = graph_module.graph
    placeholders = placeholders_of(graph_module)
    names = [str(node.target) for node in placeholders]
    outputs = outputs_of(graph)
    mode = fake_mode_of(graph_module)
    places = {node.name: i for i, node in enumerate(computed(graph))}
    with ExitStack() as stack:
        stack.enter_context(nothing_remembered(mode))
        stack.enter_context(mode)
        stack.enter_context(torch.no_grad())
        table = stack.enter_context(exact_derivatives()) if options.differentiable else {}
        fakes = {
            # One tensor under two names is two inputs: another region has two tensors there.
            name: fresh(mode.from_tensor(value, static_shapes=True)).to(options.device)
            for name, value in attributes.items()
        }
        inputs = [_on(node.meta["val"], options.device) for node in placeholders]
        # Values may share memory that stand for it alone; what a program takes may not.
        given = [fresh(_on(outputs[p.place].meta["val"], options.device, p.dtype)) for p in seeds]
        trace = Trace(
            [
                *(Input("attribute", name, value) for name, value in fakes.items()),
                *(Input("input", name, value) for name, value in zip(names, inputs, strict=True)),
                *(Input("seed", f"{SEED}{i}", value) for i, value in enumerate(given)),
            ],
            table,
        )
        arriving = Received()
        for seed, value in zip(seeds, given, strict=True):
            arriving.add(seed.channel, outputs[seed.place], value)
        with trace.recording(), _untraceable(trace):
            tape = _tape(graph_module, trace, fakes, inputs, options)
            results = tape.run(*inputs)
            read = tape.reverse(arriving, Audited.FEW if options.audit else Audited.NOTHING)
            received = {
                Port(names.index(name), channel, value.dtype): value
                for channel, values in read.by_channel().items()
                for name, value in values.items()
            }
            weights = [part for weight in read.weights.values() for part in weight]
            postings = [torch.stack(list(read.postings.values()))] if read.postings else []
            handed = [*results, *received.values(), *weights, *read.latent.values()]
            handed = [*map(_contiguous, handed), *postings]
        traced = trace.graph_module(handed)
    own = {node.name for node in graph.nodes if is_op(node, "detach")}
    clean(traced, own if options.differentiable else ())
    if options.differentiable:
        check_differentiable(traced, {node.name: node for node in graph.nodes})
    rest, derived = hoist(traced) if options.keep_derived else (traced, None)
    forward, relevance = split(rest, len(outputs), options.keeping)
    return Program(
        graph_module=traced,
        attributes=tuple(attributes),
        inputs=tuple(names),
        seeds=tuple(seeds),
        outputs=len(outputs),
        received=tuple(received),
        rest=rest,
        weighed=tuple(read.weights),
        rows_told_apart=read.rows_told_apart or not read.weights,
        audited=tuple(Posting(places[name], account) for name, account in read.postings),
        latent=tuple(places[name] for name in read.latent),
        forward=forward,
        relevance=relevance,
        derived=derived,
    )


def clean(program: fx.GraphModule, detaching: Collection[str] = ()) -> None:
    """Make a traced program functional, with nothing dead in it.

    Args:
        program: as it was traced.
        detaching: nodes that it was traced from whose detaches stay, by name: the model's own, as
            far as gradients matter.

    Raises:
        RuleError: an op writes in place.
    """
    for node in list(program.graph.nodes):
        source = (node.meta.get("custom") or {}).get("from")
        if is_op(node, "detach") and source in detaching:
            continue
        if is_op(node, "detach", "alias", "lift_fresh"):
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    _functionalise(program.graph)
    relax_views(program)
    program.graph.eliminate_dead_code()
    program.recompile()
    _check_pure(program)


def _tape(
    graph_module: fx.GraphModule,
    trace: Trace,
    attributes: Mapping[str, Tensor],
    inputs: Sequence[Any],
    options: EmitOptions,
) -> Tape:
    """A tape that tells a trace where its ops come from."""
    moved = options.device if options.device != options.captured_device else None
    weighing = Weighing(options.weighed, _rows(inputs, options)) if options.weighed else None
    return Tape(graph_module, attributes, moved, trace.at, weighing=weighing)


@contextmanager
def _untraceable(trace: Trace) -> Iterator[None]:
    """Say of which node an op is that PyTorch cannot trace, as an error of ours."""
    try:
        yield
    except AttnLRPError:
        raise
    except Exception as error:
        by_value = isinstance(error, GuardOnDataDependentSymNode)
        why = next(iter(str(error).strip().splitlines()), "")
        node, phase = trace.place or (None, "traced")
        raise RuleError(
            f"the {phase} program of this op could not be traced",
            where="" if node is None else describe(node),
            why=f"{type(error).__name__}: {why}",
            remedy="let the model compute the size from shapes or numbers, not from what a tensor "
            "holds"
            if by_value
            else "report this with the op; a pass can lower it to other ops",
        ) from error


def _on(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """A fake tensor of the same sizes, contiguous, on a device; a size as it is."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=dtype or value.dtype, device=device)


def _rows(inputs: Sequence[Any], options: EmitOptions) -> int | torch.SymInt | None:
    """How many rows the batch has, read off an input; None if none has it."""
    if isinstance(options.rows, int):
        return options.rows
    sizes = (value.shape[0] for value in inputs if isinstance(value, Tensor) and value.dim())
    return next((size for size in sizes if statically_known_true(size == options.rows)), None)


def _contiguous(value: Any) -> Any:
    """What one program hands to another is contiguous, so that all agree about its strides."""
    return value.contiguous() if isinstance(value, Tensor) else value


def _functionalise(graph: fx.Graph) -> None:
    """Replace in-place ops on values that nothing else sees by their functional forms.

    Derivatives and decompositions of PyTorch's fill their own temporaries in place. One whose
    target is a view, or has views, is left for `_check_pure` to refuse.
    """
    for node in list(graph.nodes):
        if is_op(node, "copy_"):
            _scatter(graph, node)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _is_mutable(node):
            continue
        target, name = node.args[0], node.target.overloadpacket.__name__
        functional = getattr(aten, name.removesuffix("_"), None)
        if functional is None or _is_view(target) or any(map(_is_view, target.users)):
            continue
        with graph.inserting_after(node):
            overload = getattr(functional, node.target._overloadname)
            new = graph.call_function(overload, node.args, node.kwargs)
        new.meta = dict(node.meta)
        for user in list(target.users):
            if user is not new and order[user] > order[node]:
                user.replace_input_with(target, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        order[new] = order[node]


def _scatter(graph: fx.Graph, copy: fx.Node) -> None:
    """Replace a write into a slice of a temporary, the only view of it, by a slice_scatter."""
    part, source = copy.args[:2]
    assert isinstance(part, fx.Node)
    if not is_op(part, "slice") or set(part.users) != {copy} or copy.users:
        return
    whole, *where = part.args
    assert isinstance(whole, fx.Node)
    if _is_view(whole) or any(_is_view(user) for user in whole.users if user is not part):
        return
    with graph.inserting_after(copy):
        new = graph.call_function(aten.slice_scatter.default, (whole, source, *where))
    new.meta = {**copy.meta, "val": whole.meta["val"]}
    order = {node: i for i, node in enumerate(graph.nodes)}
    for user in list(whole.users):
        if order[user] > order[new]:
            user.replace_input_with(whole, new)
    graph.erase_node(copy)
    graph.erase_node(part)


def _is_view(node: fx.Node) -> bool:
    """Whether a node's value shares memory with its input's, as its op's schema says."""
    if not isinstance(node.target, torch._ops.OpOverload) or _is_mutable(node):
        return False
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _check_pure(program: fx.GraphModule) -> None:
    """Raise RuleError if an op of the program writes in place: such a write would be lost."""
    for node in program.graph.nodes:
        if _is_mutable(node):
            source = node.meta.get("custom", {})
            raise RuleError(
                f"the {source.get('phase', 'traced')} program would write in place: {node.target}",
                where=f"node '{source.get('from', node.name)}' of the rewritten graph",
                why="PyTorch's kernel or derivative of this op is not functional",
                remedy="report this with the op; a pass can lower it to other ops",
            )
