"""A captured graph as an `ExportedProgram`, which `torch.export.save` can write.

A captured graph reads the model's tensors where they are, and returns a flat list. An exported
program takes them as inputs that its signature names; its own inputs are those of the model, by
name. Example inputs, which torch.export would pickle, are constants of it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from attnlrp_fx.artefacts.graphs import check_operator
from attnlrp_fx.errors import ArtefactError
from attnlrp_fx.graph.operators import outputs_of
from attnlrp_fx.graph.provenance import describe
from attnlrp_fx.torch_private import fake_mode_of, storage_of

KEPT_META = ("val", "nn_module_stack", "stack_trace")


def exported_program(
    graph_module: fx.GraphModule,
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    beside: Mapping[str, Tensor],
    weights: bool = True,
) -> ExportedProgram:
    """A captured graph as an exported program.

    Args:
        graph_module: the graph.
        model: its parameters and buffers are weights, by its own names; other tensors are
            constants.
        tensors: every tensor that the graph reads, by name.
        beside: further tensors, kept as constants.
        weights: whether weights have their values, or their sizes and dtypes alone.

    Raises:
        ArtefactError: an op is not PyTorch's own, or a size is read off a value.
    """
    _check(graph_module)
    own = {
        **dict.fromkeys((n for n, _ in model.named_parameters(remove_duplicate=False)), "p"),
        **dict.fromkeys((n for n, _ in model.named_buffers(remove_duplicate=False)), "b"),
    }
    graph, specs = _lifted(graph_module, tensors, own)
    outputs = [_output_spec(value) for value in outputs_of(graph)]
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    state, constants = {}, dict(beside)
    known: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        if name in own:
            state[name] = _compact(tensor, known) if weights else _without_values(tensor)
        else:
            constants[name] = _compact(tensor, known)
    environment = fake_mode_of(graph_module).shape_env
    ranges = {} if environment is None else dict(environment.var_to_range)
    try:
        return ExportedProgram(
            nn.Module(),
            graph,
            ExportGraphSignature(specs, outputs),
            state,
            ranges,
            [_calling(((), dict.fromkeys(names, 0)), specs, outputs)],
            constants={name: _compact(tensor, known) for name, tensor in constants.items()},
        )
    except Exception as error:
        raise ArtefactError(
            "the captured graph is none that torch.export saves", why=str(error).splitlines()[0]
        ) from error


def traced_program(
    program: fx.GraphModule, tensors: Mapping[str, Tensor], example: Mapping[str, Tensor]
) -> ExportedProgram:
    """A traced program as an exported program that AOTInductor compiles.

    Args:
        program: takes tensors, by `meta["name"]`, then inputs; returns a list of tensors.
        tensors: what it takes first.
        example: example inputs, by name.
    """
    graph, specs = fx.Graph(), []
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        copy.meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        if node.op == "placeholder" and node.meta["part"] == "attribute":
            argument = TensorArgument(copy.name)
            specs.append(InputSpec(InputKind.BUFFER, argument, node.meta["name"], True))
        elif node.op == "placeholder":
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copy.name), None))
        elif node.op == "output":
            copy.args = (tuple(outputs_of(graph)),)
    outputs = [_output_spec(value) for value in outputs_of(graph)]
    environment = fake_mode_of(program).shape_env
    return ExportedProgram(
        nn.Module(),
        graph,
        ExportGraphSignature(specs, outputs),
        {name: tensor.detach() for name, tensor in tensors.items()},
        {} if environment is None else dict(environment.var_to_range),
        [_calling(((0,) * len(example), {}), specs, outputs)],
        example_inputs=(tuple(example.values()), {}),
    )


def _check(graph_module: fx.GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            try:
                check_operator(node.target)
            except ValueError as error:
                raise ArtefactError(
                    "the graph has an op that cannot be saved",
                    where=describe(node),
                    why=str(error),
                    remedy="write it with PyTorch's own ops",
                ) from error
        value = node.meta.get("val")
        if isinstance(value, Tensor) and free_unbacked_symbols(value):
            raise ArtefactError(
                "a size in the graph is read off a tensor's values, and cannot be saved",
                where=describe(node),
                remedy="compile with inputs whose sizes follow from other sizes",
            )


def _lifted(
    graph_module: fx.GraphModule, tensors: Mapping[str, Tensor], own: Mapping[str, str]
) -> tuple[fx.Graph, list[InputSpec]]:
    """The graph with its tensors as first inputs, and what each input is."""
    mode = fake_mode_of(graph_module)
    graph, specs = fx.Graph(), []
    lifted: dict[str, fx.Node] = {}
    reads = graph_module.graph.find_nodes(op="get_attr")
    called = {str(node.target): node.name for node in reversed(list(reads))}
    for name, tensor in tensors.items():
        node = lifted[name] = graph.placeholder(called[name])
        node.meta["val"] = mode.from_tensor(tensor.detach(), static_shapes=True)
        kind = {"p": InputKind.PARAMETER, "b": InputKind.BUFFER}.get(own.get(name, ""))
        persistent = True if kind is InputKind.BUFFER else None
        kind = kind or InputKind.CONSTANT_TENSOR
        specs.append(InputSpec(kind, TensorArgument(node.name), name, persistent))
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            copies[node] = lifted[str(node.target)]
            continue
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        copy.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        if "nn_module_stack" in copy.meta:
            copy.meta["nn_module_stack"] = _named_classes(copy.meta["nn_module_stack"])
        if node.op == "placeholder":
            specs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(copy.name), None))
        if node.op == "output":
            copy.args = (tuple(outputs_of(graph)),)
    return graph, specs


def _named_classes(stack: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """A module stack with its classes by name."""
    return {
        key: (path, owner if isinstance(owner, str) else f"{owner.__module__}.{owner.__qualname__}")
        for key, (path, owner) in stack.items()
    }


def _output_spec(value: Any) -> OutputSpec:
    if not isinstance(value, fx.Node):
        return OutputSpec(OutputKind.USER_OUTPUT, ConstantArgument("", value), None)
    kind: Any = TensorArgument if isinstance(value.meta.get("val"), Tensor) else SymIntArgument
    return OutputSpec(OutputKind.USER_OUTPUT, kind(value.name), None)


def _calling(
    called: Any, specs: list[InputSpec], outputs: list[OutputSpec]
) -> torch.export.ModuleCallEntry:
    """How the program is called: like the example (args, kwargs); it returns a tuple."""
    given = [spec.arg for spec in specs if spec.kind is InputKind.USER_INPUT]
    signature = torch.export.ModuleCallSignature(
        given,
        [spec.arg for spec in outputs],
        pytree.tree_structure(called),
        pytree.tree_structure(tuple(0 for _ in outputs)),
    )
    return torch.export.ModuleCallEntry("", signature)


def _compact(tensor: Tensor, known: dict[Any, Tensor]) -> Tensor:
    """The tensor, in memory that it fills; of two that are one, the same.

    torch.export writes the whole memory that a tensor lies in.
    """
    key = storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride()
    if key not in known:
        plain = tensor.detach()
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        if not (whole and plain.is_contiguous()) or type(plain) is not Tensor:
            plain = torch.empty(plain.shape, dtype=plain.dtype).copy_(plain)
        known[key] = (
            nn.Parameter(plain, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain
        )
    return known[key]


def _without_values(tensor: Tensor) -> Tensor:
    """Sizes and dtype alone: one number, again and again."""
    plain = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return nn.Parameter(plain, False) if isinstance(tensor, nn.Parameter) else plain
