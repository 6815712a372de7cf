"""What kind of function each ATen op is: the table from which rules are chosen.

An op's kind says how its output depends on its *explained* inputs, the only ones that matter:

- linear: jointly linear (affine with the constants) in all explained inputs together;
- product: linear in each factor alone, so with one explained factor it is linear;
- quotient: linear in the numerator;
- partly linear: linear in some arguments; nonlinear, a reduction, where another one is explained;
- activation: elementwise, one explained input;
- softmax, attention, norm, reduction, selection: as named.

The table is keyed by op packet (`aten.add` stands for all of its overloads), and by name for the op
of another library, which need not be installed. What is not here is decomposed by PyTorch where it
knows how, and is an error where it does not.
"""

import operator
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import fx

from attnlrp_fx import ops

aten = torch.ops.aten


class Kind(StrEnum):
    """How an op's output depends on its explained inputs."""

    LINEAR = "linear"
    PRODUCT = "product"
    QUOTIENT = "quotient"
    ACTIVATION = "activation"
    SOFTMAX = "softmax"
    ATTENTION = "attention"
    NORM = "norm"
    STATISTIC = "statistic"
    COEFFICIENT = "coefficient"
    ROUTING = "routing"
    REDUCTION = "reduction"
    SELECTION = "selection"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Product:
    """Positions of a product's arguments."""

    factors: tuple[int, ...]
    """The arguments that are multiplied with each other."""
    terms: tuple[int, ...] = ()
    """The arguments that are added to the product (a bias)."""


VIEWS = """
    alias contiguous expand expand_as flatten lift_fresh_copy movedim narrow permute reshape
    select slice split split_with_sizes chunk squeeze swapaxes t transpose unbind unflatten
    unfold unsqueeze view _unsafe_view _reshape_alias view_as diagonal real imag view_as_real
    view_as_complex unsafe_split
""".split()

CASTS = ["_to_copy", "to", "type_as", "clone"]

LINEAR = """
    add sub rsub neg cat stack hstack vstack concat copy sum mean cumsum flip roll repeat
    repeat_interleave tile pad constant_pad_nd reflection_pad1d reflection_pad2d
    reflection_pad3d replication_pad1d replication_pad2d replication_pad3d index index_select
    gather take take_along_dim where masked_fill masked_scatter masked_select scatter
    scatter_add slice_scatter select_scatter diagonal_scatter index_put _unsafe_index
    _unsafe_index_put index_add index_copy tril triu diag_embed im2col col2im avg_pool1d
    avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d
    upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d
    upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact2d embedding pixel_shuffle pixel_unshuffle channel_shuffle fft_fft
    fft_ifft fft_fftn fft_ifftn fft_rfft fft_irfft fft_fft2 complex conj _conj resolve_conj
    resolve_neg dropout feature_dropout nan_to_num trace rot90
""".split()

PARTLY_LINEAR: dict[str, tuple[int, ...]] = {
    "grid_sampler": (0,),
    "grid_sampler_2d": (0,),
    "grid_sampler_3d": (0,),
    "_native_batch_norm_legit_no_training": (0, 2, 3),
    "linalg_solve": (1,),
    "_linalg_solve_ex": (1,),
}
"""Ops that are jointly linear in the arguments at these positions, and in no other."""

PRODUCTS = {
    "mul": Product((0, 1)),
    "matmul": Product((0, 1)),
    "mm": Product((0, 1)),
    "bmm": Product((0, 1)),
    "mv": Product((0, 1)),
    "dot": Product((0, 1)),
    "linear": Product((0, 1), (2,)),
    "addmm": Product((1, 2), (0,)),
    "addbmm": Product((1, 2), (0,)),
    "baddbmm": Product((1, 2), (0,)),
    "addmv": Product((1, 2), (0,)),
    "addcmul": Product((1, 2), (0,)),
    "einsum": Product((1,)),
    "conv1d": Product((0, 1), (2,)),
    "conv2d": Product((0, 1), (2,)),
    "conv3d": Product((0, 1), (2,)),
    "convolution": Product((0, 1), (2,)),
    "conv_transpose1d": Product((0, 1), (2,)),
    "conv_transpose2d": Product((0, 1), (2,)),
    "conv_transpose3d": Product((0, 1), (2,)),
    "bilinear": Product((0, 1, 2), (3,)),
    "_trilinear": Product((0, 1, 2)),
    "_grouped_mm": Product((0, 1)),
    "transformers::grouped_mm_fallback": Product((0, 1)),
    "attnlrp_fx::grouped_mm": Product((0, 1)),
}

ACTIVATIONS = """
    abs acos asin asinh atan atan2 celu clamp clamp_max clamp_min cos cosh elu erf erfc erfinv
    exp exp2 expm1 gelu hardshrink hardsigmoid hardswish hardtanh hypot leaky_relu log log10
    log1p log2 log_sigmoid logit mish pow prelu reciprocal relu relu6 rrelu rsqrt selu sigmoid
    silu sin sinh softplus softshrink sqrt square tan tanh threshold
""".split()

SOFTMAX = ["softmax", "_softmax", "log_softmax", "_log_softmax"]

NORMS = ["layer_norm", "group_norm", "instance_norm", "rms_norm"]

REDUCTIONS = """
    var std var_mean std_mean linalg_vector_norm norm logsumexp prod cumprod logcumsumexp
    cdist _cdist_forward linalg_inv linalg_inv_ex linalg_matrix_exp
""".split()

SELECTIONS = """
    max min amax amin topk sort max_pool1d max_pool2d max_pool3d max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d kthvalue median cummax
    cummin
""".split()

ELEMENTWISE_SELECTIONS = ["maximum", "minimum", "fmax", "fmin"]
"""Selections between two values; of one value and constants, they are activations."""

SHAPE_ONLY = """
    zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full
    new_empty detach detach_ sign floor ceil round trunc sgn heaviside bernoulli
""".split()
"""Ops whose derivative is zero everywhere: what they return is a constant."""

SUMS = """
    add sub rsub sum mean cumsum trace avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d
    adaptive_avg_pool2d adaptive_avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d
    scatter_add index_add col2im
""".split()
"""Linear ops, beside products, that add several contributions up to each output."""

REARRANGEMENTS = """
    cat stack hstack vstack concat flip roll repeat repeat_interleave tile pad constant_pad_nd
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d index index_select gather take take_along_dim where masked_fill
    masked_scatter masked_select scatter slice_scatter select_scatter diagonal_scatter index_put
    _unsafe_index index_copy tril triu diag_embed im2col upsample_nearest1d upsample_nearest2d
    upsample_nearest3d _upsample_nearest_exact2d embedding pixel_shuffle pixel_unshuffle
    channel_shuffle rot90
""".split()
"""Linear ops, beside views and casts, each element of whose output is one of an input or fixed."""

HOMOGENEOUS = """
    neg sum mean cumsum div flip roll repeat repeat_interleave tile index index_select gather take
    take_along_dim masked_select tril triu diag_embed im2col col2im avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d pixel_shuffle pixel_unshuffle
    channel_shuffle _unsafe_index trace rot90
""".split()
"""Linear ops, beside views, casts and products, that put no constant into their output."""

CONVOLUTIONS = """
    conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d
""".split()

ELEMENTWISE_LINEAR = """
    add sub rsub neg mul div masked_fill where _to_copy to type_as clone
""".split()
"""Linear ops that an elementwise region may contain."""


LOGICAL = """eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not
    isfinite isnan arange full zeros ones zeros_like ones_like full_like scalar_tensor cos sin
    """.split()
"""Elementwise ops and constants outside the table, that a program may compute twice."""


def _packets(names: Sequence[str]) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names if hasattr(aten, name))


_PRODUCTS = {n if "::" in n else getattr(aten, n): product for n, product in PRODUCTS.items()}
_KINDS: dict[Any, Kind] = {
    **dict.fromkeys(_packets(VIEWS), Kind.LINEAR),
    **dict.fromkeys(_packets(CASTS), Kind.LINEAR),
    **dict.fromkeys(_packets(LINEAR), Kind.LINEAR),
    **dict.fromkeys(_packets(list(PARTLY_LINEAR)), Kind.LINEAR),
    **dict.fromkeys(_PRODUCTS, Kind.PRODUCT),
    **dict.fromkeys(_packets(["div"]), Kind.QUOTIENT),
    **dict.fromkeys(_packets(ACTIVATIONS), Kind.ACTIVATION),
    **dict.fromkeys(_packets(SOFTMAX), Kind.SOFTMAX),
    **dict.fromkeys(_packets(["scaled_dot_product_attention"]), Kind.ATTENTION),
    **dict.fromkeys(_packets(NORMS), Kind.NORM),
    **dict.fromkeys(_packets(REDUCTIONS), Kind.REDUCTION),
    **dict.fromkeys(_packets(SELECTIONS), Kind.SELECTION),
    **dict.fromkeys(_packets(ELEMENTWISE_SELECTIONS), Kind.SELECTION),
    **dict.fromkeys(ops.LATENT, Kind.LINEAR),
}
_PARTLY_LINEAR = {getattr(aten, name): linear for name, linear in PARTLY_LINEAR.items()}
_SUMS = _packets(SUMS)
_SHAPE_ONLY = _packets(SHAPE_ONLY) | {ops.reconstruction_error}
SHAPE_LENT = {"expand_as": 1, "view_as": 1, "reshape_as": 1, "type_as": 1, "copy": 0}
"""Ops that read shape or dtype alone off one argument, and which."""
_ELEMENTWISE = _packets(ACTIVATIONS + ELEMENTWISE_LINEAR + ELEMENTWISE_SELECTIONS)
_ELEMENTWISE_SELECTIONS = _packets(ELEMENTWISE_SELECTIONS)
_STRUCTURAL = _packets(VIEWS + CASTS) | {*ops.LATENT}
_REARRANGEMENTS = _packets(VIEWS + CASTS + REARRANGEMENTS) | {*ops.LATENT}
_HOMOGENEOUS = _packets(HOMOGENEOUS)
_JOINS = _packets("add sub cat stack".split())
_MATRIX_PRODUCTS = frozenset(_PRODUCTS) - _packets(["mul", "addcmul"])
_CASTS = _packets(CASTS)


def packet(target: Any) -> Any:
    """An op as tables key it: ATen's by its packet, another library's by its qualified name.

    Anything else is returned as it is.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return target
    return target.overloadpacket if target.namespace == "aten" else target._schema.name


def is_op(node: fx.Node, *names: str) -> bool:
    """Whether a node calls one of the named ATen ops, whichever overload."""
    return node.op == "call_function" and packet(node.target) in _packets_of(*names)


@cache
def _packets_of(*names: str) -> frozenset[Any]:
    return _packets(names)


def is_known(op: Any) -> bool:
    """Whether the table has an entry for an op, so that capture must keep it whole."""
    return packet(op) in _KINDS or packet(op) in _SHAPE_ONLY


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose values a node's value depends on: not those that lend their shape alone."""
    lent = next((i for name, i in SHAPE_LENT.items() if is_op(node, name)), None)
    if lent is None:
        return node.all_input_nodes
    return [leaf for i, arg in enumerate(node.args) if i != lent for leaf in leaves(arg)]


def is_shape_only(node: fx.Node) -> bool:
    """Whether a node's value has derivative zero with respect to every input."""
    return packet(node.target) in _SHAPE_ONLY or bool(node.kwargs.get("rounding_mode"))


def is_elementwise(node: fx.Node) -> bool:
    """Whether a node computes each element of its output from the same element of its inputs."""
    return node.op == "call_function" and is_elementwise_op(node.target)


def is_elementwise_op(op: Any) -> bool:
    """Whether an op computes each element of its output from the same element of its inputs."""
    return packet(op) in _ELEMENTWISE


def adds_up(op: Any) -> bool:
    """Whether an op adds several contributions up to each element of its output."""
    name = packet(op)
    return name in _SUMS or name in _MATRIX_PRODUCTS


def is_matrix_product(op: Any) -> bool:
    """Whether an op multiplies and adds up: a matrix product, a convolution, a linear layer."""
    return packet(op) in _MATRIX_PRODUCTS


def is_convolution(op: Any) -> bool:
    """Whether an op is a convolution or a transposed one, of whatever dimensions."""
    return packet(op) in _packets_of(*CONVOLUTIONS)


def rearranges(op: Any) -> bool:
    """Whether each element of a linear op's output is an element of an input, or fixed."""
    return packet(op) in _REARRANGEMENTS or op is operator.getitem


def is_homogeneous(op: Any, tensors: int, explained: int) -> bool:
    """Whether a linear op is zero where what is explained is.

    Args:
        op: neither view, cast nor product.
        tensors: how many of its arguments are tensors, those of its lists counted one by one.
        explained: how many of them are explained.
    """
    return packet(op) in _HOMOGENEOUS or (
        packet(op) in _JOINS and tensors == explained and explained > 1
    )


def is_cheap(node: fx.Node) -> bool:
    """Whether computing a node again costs about as much as reading its inputs."""
    return is_elementwise(node) or is_structural(node) or is_op(node, *LOGICAL)


def is_structural(node: fx.Node) -> bool:
    """Whether a node only rearranges or casts its input."""
    return node.op == "call_function" and is_structural_op(node.target)


def is_structural_op(op: Any) -> bool:
    """Whether an op only rearranges or casts its input."""
    return packet(op) in _STRUCTURAL or op is operator.getitem


def is_cast(node: fx.Node) -> bool:
    """Whether a node only copies or casts its input."""
    return node.op == "call_function" and packet(node.target) in _CASTS


def _selects_elements(target: Any) -> bool:
    """Whether an op selects between two values; `max` and `min` do in one of their overloads."""
    if target in (aten.max.other, aten.min.other):
        return True
    return packet(target) in _ELEMENTWISE_SELECTIONS


def product_of(target: Any) -> Product | None:
    """The argument positions of a product, None for every other op."""
    return _PRODUCTS.get(packet(target))


def leaves(argument: Any) -> Iterator[fx.Node]:
    """The nodes in an argument, lists flattened, repeated ones repeated."""
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, list | tuple):
        for item in argument:
            yield from leaves(item)
    elif isinstance(argument, dict):
        for item in argument.values():
            yield from leaves(item)


def outputs_of(graph: fx.Graph) -> list[Any]:
    """What a captured, rewritten or traced graph returns: nodes and constants, flat."""
    values: Any = graph.output_node().args[0]
    return list(values)


def placeholders_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that stand for a graph's inputs, in order."""
    return list(graph_module.graph.find_nodes(op="placeholder"))


def is_broadcast(factor: fx.Node, product: fx.Node) -> bool:
    """Whether a factor has one number where the product has many."""
    sizes, wanted = factor.meta["val"].shape, product.meta["val"].shape
    return len(sizes) < len(wanted) or any(
        str(a) == "1" != str(b) for a, b in zip(sizes, wanted, strict=True)
    )


def is_free(node: fx.Node) -> bool:
    """Whether a node is a view: it rearranges and copies nothing."""
    return is_structural(node) and not is_op(node, "_to_copy", "clone")


def factors_of(node: fx.Node) -> list[fx.Node]:
    """The factors of a product, one that stands twice counted twice; none of any other op."""
    product = product_of(node.target)
    if product is None:
        return []
    positions = [p for p in product.factors if p < len(node.args)]
    return [leaf for p in positions for leaf in leaves(node.args[p])]


def explained_factors(node: fx.Node, explained: Set[fx.Node]) -> list[fx.Node]:
    """The factors of a product that are explained."""
    return [factor for factor in factors_of(node) if factor in explained]


def _is_linear_in(node: fx.Node, explained: Set[fx.Node]) -> bool:
    """Whether a linear op is linear in what is explained: for some that depends on where."""
    linear = _PARTLY_LINEAR.get(packet(node.target))
    if linear is None:
        return True
    others = [arg for i, arg in enumerate(node.args) if i not in linear]
    return not any(leaf in explained for leaf in leaves((others, node.kwargs)))


def kind_of(node: fx.Node, explained: Set[fx.Node]) -> Kind:
    """The kind of a node, given which of its inputs are explained.

    Args:
        node: a call of an ATen op or of a relevance op.
        explained: the nodes whose relevance is asked for, all of the node's inputs decided.
    """
    base = node.meta.get("kind") or _KINDS.get(packet(node.target), Kind.UNKNOWN)
    count = sum(leaf in explained for leaf in leaves((node.args, node.kwargs)))
    match base:
        case Kind.LINEAR if not _is_linear_in(node, explained):
            return Kind.REDUCTION
        case Kind.PRODUCT if len(explained_factors(node, explained)) <= 1:
            return Kind.LINEAR
        case Kind.QUOTIENT:
            numerator, denominator = (node.args[i] in explained for i in (0, 1))
            if numerator and denominator:
                return Kind.QUOTIENT
            return Kind.LINEAR if numerator else Kind.ACTIVATION
        case Kind.SELECTION if count == 1 and _selects_elements(node.target):
            return Kind.ACTIVATION
        case Kind.ACTIVATION if count > 1:
            return Kind.REDUCTION
    if node.target is operator.getitem:
        return Kind.LINEAR
    return base
