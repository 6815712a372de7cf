"""The table of operators, held to what it says: numerically, for every op that can be sampled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers.integrations.moe  # noqa: F401 registers the grouped product
from references import Function, rewrite
from torch import Tensor, fx
from torch.testing import assert_close

from attnlrp_fx.calculus import pullbacks
from attnlrp_fx.capture.capture import capture
from attnlrp_fx.graph import operators
from attnlrp_fx.graph.analysis import explained_values
from attnlrp_fx.graph.operators import Kind, aten, is_op, is_shape_only, kind_of, packet
from attnlrp_fx.passes import PassContext, mark_sources

KINDS = {
    Kind.LINEAR: [
        *(operators.VIEWS + operators.CASTS + operators.LINEAR),
        *operators.PARTLY_LINEAR,
    ],
    Kind.PRODUCT: list(operators.PRODUCTS),
    Kind.ACTIVATION: operators.ACTIVATIONS,
    Kind.SOFTMAX: operators.SOFTMAX,
    Kind.NORM: operators.NORMS,
    Kind.REDUCTION: operators.REDUCTIONS,
    Kind.SELECTION: operators.SELECTIONS + operators.ELEMENTWISE_SELECTIONS,
}
NAMES = [name for names in KINDS.values() for name in names]
DOUBLE = torch.float64


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=DOUBLE)


@pytest.mark.parametrize(
    "name", sorted({*NAMES, *operators.SHAPE_ONLY, *operators.ELEMENTWISE_LINEAR})
)
def test_name_exists(name: str) -> None:
    """A name that is no op of the installed libraries would claim nothing, silently."""
    namespace, _, op = name.rpartition("::")
    found = getattr(getattr(torch.ops, namespace or "aten"), op, None)
    assert isinstance(found, torch._ops.OpOverloadPacket)


def test_every_op_has_one_kind() -> None:
    known = [*NAMES, *operators.SHAPE_ONLY]
    assert sorted(known) == sorted(set(known))


def test_every_norm_has_a_pullback() -> None:
    assert set(pullbacks._NORMS) == {getattr(aten, name) for name in operators.NORMS}


INDEX = torch.tensor([2, 0, 1])
ROWS = torch.tensor([[0, 1, 1], [2, 0, 2]])
MASK = torch.tensor([[True, False, True, False]] * 3)
TABLE = torch.rand(3, 3, dtype=DOUBLE) + 1
SIXTEEN = torch.arange(8.0, dtype=DOUBLE).view(2, 4)

Sample = Callable[[Tensor], Any]

LINEAR: dict[str, tuple[tuple[int, ...], Sample]] = {
    # views
    "alias": ((3, 4), aten.alias),
    "contiguous": ((3, 4), lambda x: aten.contiguous(x.T)),
    "expand": ((3, 1), lambda x: aten.expand(x, [2, 3, 4])),
    "expand_as": ((3, 1), lambda x: aten.expand_as(x, randn(2, 3, 4))),
    "flatten": ((2, 3, 4), aten.flatten),
    "lift_fresh_copy": ((3, 4), aten.lift_fresh_copy),
    "movedim": ((2, 3, 4), lambda x: aten.movedim(x, 0, 2)),
    "narrow": ((3, 4), lambda x: aten.narrow(x, 1, 1, 2)),
    "permute": ((2, 3, 4), lambda x: aten.permute(x, [2, 0, 1])),
    "reshape": ((3, 4), lambda x: aten.reshape(x, [2, 6])),
    "select": ((3, 4), lambda x: aten.select(x, 1, 2)),
    "slice": ((3, 4), lambda x: aten.slice(x, 1, 0, 4, 2)),
    "split": ((3, 5), lambda x: aten.split(x, 2, 1)),
    "split_with_sizes": ((3, 5), lambda x: aten.split_with_sizes(x, [1, 4], 1)),
    "chunk": ((3, 5), lambda x: aten.chunk(x, 2, 1)),
    "squeeze": ((3, 1), lambda x: aten.squeeze(x, 1)),
    "swapaxes": ((3, 4), lambda x: aten.swapaxes(x, 0, 1)),
    "t": ((3, 4), aten.t),
    "transpose": ((3, 4), lambda x: aten.transpose(x, 0, 1)),
    "unbind": ((3, 4), lambda x: aten.unbind(x, 1)),
    "unflatten": ((3, 4), lambda x: aten.unflatten(x, 1, [2, 2])),
    "unfold": ((3, 5), lambda x: aten.unfold(x, 1, 3, 2)),
    "unsqueeze": ((3, 4), lambda x: aten.unsqueeze(x, 1)),
    "view": ((3, 4), lambda x: aten.view(x, [2, 6])),
    "_unsafe_view": ((3, 4), lambda x: aten._unsafe_view(x, [2, 6])),
    "_reshape_alias": ((3, 4), lambda x: aten._reshape_alias(x, [2, 6], [6, 1])),
    "view_as": ((3, 4), lambda x: aten.view_as(x, randn(2, 6))),
    "diagonal": ((3, 4), aten.diagonal),
    "real": ((3, 2), lambda x: aten.real(torch.view_as_complex(x))),
    "imag": ((3, 2), lambda x: aten.imag(torch.view_as_complex(x))),
    "view_as_real": ((3, 2), lambda x: aten.view_as_real(torch.view_as_complex(x))),
    "view_as_complex": ((3, 2), aten.view_as_complex),
    "unsafe_split": ((3, 5), lambda x: aten.unsafe_split(x, 2, 1)),
    # casts
    "_to_copy": ((3, 4), lambda x: aten._to_copy(x, dtype=DOUBLE)),
    "to": ((3, 4), lambda x: aten.to(x, DOUBLE)),
    "type_as": ((3, 4), lambda x: aten.type_as(x, randn(1))),
    "clone": ((3, 4), aten.clone),
    # arithmetic, with constants
    "add": ((3, 4), lambda x: aten.add(x, randn(4), alpha=2)),
    "sub": ((3, 4), lambda x: aten.sub(randn(4), x, alpha=2)),
    "rsub": ((3, 4), lambda x: aten.rsub(x, 2.0)),
    "neg": ((3, 4), aten.neg),
    "cat": ((3, 4), lambda x: aten.cat([x, randn(1, 4), x], 0)),
    "stack": ((3, 4), lambda x: aten.stack([x, randn(3, 4)], 1)),
    "hstack": ((3, 4), lambda x: aten.hstack([x, randn(3, 1)])),
    "vstack": ((3, 4), lambda x: aten.vstack([x, randn(1, 4)])),
    "concat": ((3, 4), lambda x: aten.concat([x, randn(1, 4)], 0)),
    "copy": ((3, 4), lambda x: aten.copy(randn(3, 4), x)),
    "sum": ((3, 4), lambda x: aten.sum(x, [1])),
    "mean": ((3, 4), lambda x: aten.mean(x, [1], True)),
    "cumsum": ((3, 4), lambda x: aten.cumsum(x, 1)),
    "flip": ((3, 4), lambda x: aten.flip(x, [1])),
    "roll": ((3, 4), lambda x: aten.roll(x, [1], [1])),
    "repeat": ((3, 4), lambda x: aten.repeat(x, [2, 1, 3])),
    "repeat_interleave": ((3, 4), lambda x: aten.repeat_interleave(x, 2, 1)),
    "tile": ((3, 4), lambda x: aten.tile(x, [2])),
    "pad": ((3, 4), lambda x: aten.pad(x, [1, 2], "constant", 0.5)),
    "constant_pad_nd": ((3, 4), lambda x: aten.constant_pad_nd(x, [1, 2], 0.5)),
    "reflection_pad1d": ((3, 4), lambda x: aten.reflection_pad1d(x, [1, 2])),
    "reflection_pad2d": ((2, 3, 4), lambda x: aten.reflection_pad2d(x, [1, 2, 1, 0])),
    "reflection_pad3d": ((2, 3, 3, 4), lambda x: aten.reflection_pad3d(x, [1] * 6)),
    "replication_pad1d": ((3, 4), lambda x: aten.replication_pad1d(x, [1, 2])),
    "replication_pad2d": ((2, 3, 4), lambda x: aten.replication_pad2d(x, [1, 2, 1, 0])),
    "replication_pad3d": ((2, 3, 3, 4), lambda x: aten.replication_pad3d(x, [1] * 6)),
    # moves
    "index": ((3, 4), lambda x: aten.index(x, [INDEX, torch.tensor([1])])),
    "index_select": ((3, 4), lambda x: aten.index_select(x, 0, INDEX)),
    "gather": ((3, 4), lambda x: aten.gather(x, 0, ROWS)),
    "take": ((3, 4), lambda x: aten.take(x, ROWS)),
    "take_along_dim": ((3, 4), lambda x: aten.take_along_dim(x, ROWS[:, :1], 0)),
    "where": ((3, 4), lambda x: aten.where(MASK, x, randn(3, 4))),
    "masked_fill": ((3, 4), lambda x: aten.masked_fill(x, MASK, -2.0)),
    "masked_scatter": ((3, 4), lambda x: aten.masked_scatter(x, MASK, x.flip(0))),
    "masked_select": ((3, 4), lambda x: aten.masked_select(x, MASK)),
    "scatter": ((3, 4), lambda x: aten.scatter(x, 0, ROWS[:, :1], x[1:] * 2)),
    "scatter_add": ((3, 4), lambda x: aten.scatter_add(x, 0, ROWS, x)),
    "slice_scatter": ((3, 4), lambda x: aten.slice_scatter(x, x[:, 2:], 1, 0, 2)),
    "select_scatter": ((3, 4), lambda x: aten.select_scatter(x, x[:, 2], 1, 0)),
    "diagonal_scatter": ((3, 3), lambda x: aten.diagonal_scatter(x, x[0])),
    "index_put": ((3, 4), lambda x: aten.index_put(x, [INDEX], x * 2, True)),
    "_unsafe_index": ((3, 4), lambda x: aten._unsafe_index(x, [INDEX])),
    "_unsafe_index_put": ((3, 4), lambda x: aten._unsafe_index_put(x, [INDEX], x * 2, True)),
    "index_add": ((3, 4), lambda x: aten.index_add(x, 0, INDEX, x, alpha=2)),
    "index_copy": ((3, 4), lambda x: aten.index_copy(x, 0, INDEX, x * 2)),
    "tril": ((3, 4), aten.tril),
    "triu": ((3, 4), aten.triu),
    "diag_embed": ((3, 4), aten.diag_embed),
    "trace": ((3, 4), aten.trace),
    "rot90": ((3, 4), aten.rot90),
    # windows
    "im2col": ((1, 2, 4, 4), lambda x: aten.im2col(x, [2, 2], [1, 1], [1, 1], [2, 2])),
    "col2im": ((1, 8, 9), lambda x: aten.col2im(x, [4, 4], [2, 2], [1, 1], [0, 0], [1, 1])),
    "avg_pool1d": ((2, 6), lambda x: aten.avg_pool1d(x, [3], [2], [1])),
    "avg_pool2d": ((2, 4, 6), lambda x: aten.avg_pool2d(x, [2, 3], [1, 2], [1, 1])),
    "avg_pool3d": ((2, 4, 4, 4), lambda x: aten.avg_pool3d(x, [2, 2, 2])),
    "adaptive_avg_pool1d": ((2, 5), lambda x: aten.adaptive_avg_pool1d(x, [2])),
    "adaptive_avg_pool2d": ((2, 5, 4), lambda x: aten.adaptive_avg_pool2d(x, [2, 3])),
    "adaptive_avg_pool3d": ((2, 5, 4, 3), lambda x: aten.adaptive_avg_pool3d(x, [2, 3, 1])),
    "_adaptive_avg_pool2d": ((2, 5, 4), lambda x: aten._adaptive_avg_pool2d(x, [2, 3])),
    "_adaptive_avg_pool3d": ((2, 5, 4, 3), lambda x: aten._adaptive_avg_pool3d(x, [2, 3, 1])),
    "upsample_nearest1d": ((1, 2, 3), lambda x: aten.upsample_nearest1d(x, [7])),
    "upsample_nearest2d": ((1, 2, 3, 3), lambda x: aten.upsample_nearest2d(x, [7, 5])),
    "upsample_nearest3d": ((1, 1, 2, 3, 3), lambda x: aten.upsample_nearest3d(x, [3, 7, 5])),
    "upsample_linear1d": ((1, 2, 3), lambda x: aten.upsample_linear1d(x, [7], False)),
    "upsample_bilinear2d": ((1, 2, 3, 3), lambda x: aten.upsample_bilinear2d(x, [7, 5], True)),
    "upsample_bicubic2d": ((1, 2, 3, 3), lambda x: aten.upsample_bicubic2d(x, [7, 5], False)),
    "upsample_trilinear3d": (
        (1, 1, 2, 3, 3),
        lambda x: aten.upsample_trilinear3d(x, [3, 7, 5], False),
    ),
    "_upsample_bicubic2d_aa": (
        (1, 2, 5, 5),
        lambda x: aten._upsample_bicubic2d_aa(x, [3, 2], False),
    ),
    "_upsample_bilinear2d_aa": (
        (1, 2, 5, 5),
        lambda x: aten._upsample_bilinear2d_aa(x, [3, 2], False),
    ),
    "_upsample_nearest_exact2d": (
        (1, 2, 3, 3),
        lambda x: aten._upsample_nearest_exact2d(x, [7, 5]),
    ),
    "grid_sampler": ((1, 2, 3, 3), lambda x: aten.grid_sampler(x, _grid(), 0, 0, False)),
    "grid_sampler_2d": ((1, 2, 3, 3), lambda x: aten.grid_sampler_2d(x, _grid(), 0, 1, False)),
    "grid_sampler_3d": (
        (1, 2, 3, 3, 3),
        lambda x: aten.grid_sampler_3d(x, randn(1, 2, 2, 2, 3) / 2, 0, 0, False),
    ),
    "linalg_solve": ((3, 2), lambda x: aten.linalg_solve(TABLE.tril(), x)),
    "_linalg_solve_ex": ((3, 2), lambda x: aten._linalg_solve_ex(TABLE.tril(), x)[0]),
    "embedding": ((3, 2), lambda x: aten.embedding(x, ROWS)),
    "_native_batch_norm_legit_no_training": (
        (2, 3),
        lambda x: aten._native_batch_norm_legit_no_training(
            x, randn(3), randn(3), randn(3), randn(3).exp(), 0.1, 1e-5
        )[0],
    ),
    "pixel_shuffle": ((1, 4, 2, 2), lambda x: aten.pixel_shuffle(x, 2)),
    "pixel_unshuffle": ((1, 1, 4, 4), lambda x: aten.pixel_unshuffle(x, 2)),
    "channel_shuffle": ((1, 4, 2, 2), lambda x: aten.channel_shuffle(x, 2)),
    # complex
    "fft_fft": ((3, 4), lambda x: aten.fft_fft(x, None, -1)),
    "fft_ifft": ((3, 4), lambda x: aten.fft_ifft(x, None, -1)),
    "fft_fftn": ((3, 4), aten.fft_fftn),
    "fft_ifftn": ((3, 4), aten.fft_ifftn),
    "fft_rfft": ((3, 4), lambda x: aten.fft_rfft(x, None, -1)),
    "fft_irfft": ((3, 4, 2), lambda x: aten.fft_irfft(torch.view_as_complex(x), None, -1)),
    "fft_fft2": ((3, 4), aten.fft_fft2),
    "complex": ((3, 4), lambda x: aten.complex(x, randn(3, 4))),
    "conj": ((3, 2), lambda x: aten.conj(torch.view_as_complex(x))),
    "_conj": ((3, 2), lambda x: aten._conj(torch.view_as_complex(x))),
    "resolve_conj": ((3, 2), lambda x: aten.resolve_conj(torch.view_as_complex(x).conj())),
    "resolve_neg": ((3, 2), lambda x: aten.resolve_neg(torch.view_as_complex(x).conj().imag)),
    # identities of finite values in evaluation mode
    "dropout": ((3, 4), lambda x: aten.dropout(x, 0.5, False)),
    "feature_dropout": ((3, 4), lambda x: aten.feature_dropout(x, 0.5, False)),
    "nan_to_num": ((3, 4), aten.nan_to_num),
}


def _grid() -> Tensor:
    return randn(1, 2, 2, 2) / 2


def test_every_linear_op_is_sampled() -> None:
    assert sorted(LINEAR) == sorted(KINDS[Kind.LINEAR])


@pytest.mark.parametrize("name", LINEAR)
def test_linear(name: str) -> None:
    """f(a + b) − f(0) = f(a) + f(b) − 2 f(0), and so for multiples."""
    shape, function = LINEAR[name]
    a, b = randn(*shape), randn(*shape).flip(-1) + 1
    _check_linear(function, a, b)


def _check_linear(function: Sample, a: Tensor, b: Tensor) -> None:
    def difference(x: Tensor) -> list[Tensor]:
        pairs = zip(_parts(function(x)), _parts(function(torch.zeros_like(x))), strict=True)
        return [y - zero for y, zero in pairs]

    combined = difference(2 * a - 3 * b)
    for got, of_a, of_b in zip(combined, difference(a), difference(b), strict=True):
        assert_close(got, 2 * of_a - 3 * of_b)


def _parts(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, list | tuple) else [value]


GROUPS = torch.tensor([2, 2, 5], dtype=torch.int32)
"""Where the rows of each of three groups end; the second has none."""

PRODUCTS: dict[str, tuple[list[Tensor], Callable[..., Tensor]]] = {
    "mul": ([randn(2, 3), randn(3)], aten.mul),
    "matmul": ([randn(4, 2, 3), randn(3, 5)], aten.matmul),
    "mm": ([randn(2, 3), randn(3, 5)], aten.mm),
    "bmm": ([randn(4, 2, 3), randn(4, 3, 5)], aten.bmm),
    "mv": ([randn(2, 3), randn(3)], aten.mv),
    "dot": ([randn(3), randn(3)], aten.dot),
    "linear": ([randn(2, 3), randn(5, 3), randn(5)], aten.linear),
    "addmm": ([randn(5), randn(2, 3), randn(3, 5)], aten.addmm),
    "addbmm": ([randn(2, 5), randn(4, 2, 3), randn(4, 3, 5)], aten.addbmm),
    "baddbmm": ([randn(4, 2, 5), randn(4, 2, 3), randn(4, 3, 5)], aten.baddbmm),
    "addmv": ([randn(2), randn(2, 3), randn(3)], aten.addmv),
    "addcmul": ([randn(2, 3), randn(2, 3), randn(3)], aten.addcmul),
    "einsum": ([randn(2, 3), randn(3, 5)], lambda a, b: aten.einsum("ij,jk->ik", [a, b])),
    "conv1d": ([randn(1, 2, 5), randn(3, 2, 2), randn(3)], aten.conv1d),
    "conv2d": ([randn(1, 2, 4, 4), randn(3, 2, 2, 2), randn(3)], aten.conv2d),
    "conv3d": ([randn(1, 2, 3, 3, 3), randn(3, 2, 2, 2, 2), randn(3)], aten.conv3d),
    "convolution": (
        [randn(1, 2, 5), randn(3, 2, 2), randn(3)],
        lambda x, w, b: aten.convolution(x, w, b, [1], [0], [1], False, [0], 1),
    ),
    "conv_transpose1d": ([randn(1, 2, 5), randn(2, 3, 2), randn(3)], aten.conv_transpose1d),
    "conv_transpose2d": (
        [randn(1, 2, 3, 3), randn(2, 3, 2, 2), randn(3)],
        lambda x, w, b: aten.conv_transpose2d(x, w, b, [1, 1]),
    ),
    "conv_transpose3d": (
        [randn(1, 2, 3, 3, 3), randn(2, 3, 2, 2, 2), randn(3)],
        lambda x, w, b: aten.conv_transpose3d(x, w, b, [1, 1, 1]),
    ),
    "bilinear": ([randn(4, 2), randn(4, 3), randn(5, 2, 3), randn(5)], aten.bilinear),
    "_trilinear": (
        [randn(4, 2), randn(4, 2), randn(4, 2)],
        lambda a, b, c: aten._trilinear(a, b, c, [], [], [], [1]),
    ),
    "_grouped_mm": (
        [randn(5, 4).round(), randn(3, 4, 8).round()],
        lambda x, w: aten._grouped_mm(x.float(), w.float(), GROUPS).double(),
    ),
    "transformers::grouped_mm_fallback": (
        [randn(5, 4), randn(3, 4, 8)],
        lambda x, w: torch.ops.transformers.grouped_mm_fallback(x, w, GROUPS),
    ),
    "attnlrp_fx::grouped_mm": (
        [randn(5, 4), randn(3, 4, 8)],
        lambda x, w: torch.ops.attnlrp_fx.grouped_mm(x, w, GROUPS),
    ),
}


def test_every_product_is_sampled() -> None:
    assert sorted(PRODUCTS) == sorted(operators.PRODUCTS)


@pytest.mark.parametrize("name", PRODUCTS)
def test_product(name: str) -> None:
    """Linear in each factor, of a degree that is their number, and affine in each added term."""
    values, function = PRODUCTS[name]
    product = operators.PRODUCTS[name]
    factors = (0, 1) if name == "einsum" else product.factors
    assert sorted((*factors, *product.terms)) == list(range(len(values)))
    for position in range(len(values)):

        def alone(x: Tensor, position: int = position) -> Tensor:
            return function(*values[:position], x, *values[position + 1 :])

        value = values[position]
        _check_linear(alone, value, value.flip(-1) + 1)
    without = [torch.zeros_like(v) if i in product.terms else v for i, v in enumerate(values)]
    doubled = [2 * v if i in factors else v for i, v in enumerate(without)]
    assert_close(function(*doubled), 2 ** len(factors) * function(*without))
    for position in factors:
        zeroed = [torch.zeros_like(v) if i == position else v for i, v in enumerate(without)]
        assert not function(*zeroed).any()


ELEMENTWISE: dict[str, Sample] = {
    "add": lambda x: aten.add(x, 1.5),
    "sub": lambda x: aten.sub(1.5, x) if isinstance(x, float) else aten.sub(x, 1.5),
    "rsub": lambda x: aten.rsub(x, 1.5),
    "mul": lambda x: aten.mul(x, x),
    "div": lambda x: aten.div(x, x + 3),
    "masked_fill": lambda x: aten.masked_fill(x, MASK[:, :3], 0.5),
    "where": lambda x: aten.where(MASK[:, :3], x, 0.5),
    "_to_copy": lambda x: aten._to_copy(x, dtype=DOUBLE),
    "to": lambda x: aten.to(x, DOUBLE),
    "type_as": lambda x: aten.type_as(x, x),
    "clamp": lambda x: aten.clamp(x, 0.1, 0.7),
    "clamp_max": lambda x: aten.clamp_max(x, 0.4),
    "clamp_min": lambda x: aten.clamp_min(x, 0.4),
    "maximum": lambda x: aten.maximum(x, 0.4 * torch.ones_like(x)),
    "minimum": lambda x: aten.minimum(x, 0.4 * torch.ones_like(x)),
    "fmax": lambda x: aten.fmax(x, 0.4 * torch.ones_like(x)),
    "fmin": lambda x: aten.fmin(x, 0.4 * torch.ones_like(x)),
    "pow": lambda x: aten.pow(x, 1.7),
    "atan2": lambda x: aten.atan2(x, TABLE),
    "hypot": lambda x: aten.hypot(x, TABLE),
    "prelu": lambda x: aten.prelu(x, torch.tensor([0.3, 0.2, 0.1], dtype=DOUBLE)),
    "threshold": lambda x: aten.threshold(x, 0.4, 2.0),
}


@pytest.mark.parametrize(
    "name",
    [
        *operators.ACTIVATIONS,
        *operators.ELEMENTWISE_LINEAR,
        *operators.ELEMENTWISE_SELECTIONS,
    ],
)
def test_elementwise(name: str) -> None:
    """The Jacobian is diagonal, and each element depends on its own place alone."""
    function = ELEMENTWISE.get(name, getattr(aten, name))
    x = torch.linspace(0.05, 0.95, 9, dtype=DOUBLE).view(3, 3)
    jacobian = torch.autograd.functional.jacobian(function, x).view(9, 9)
    assert_close(jacobian, torch.diag(torch.diag(jacobian)))
    assert jacobian.any()


SELECTIONS: dict[str, Sample] = {
    "max": lambda x: aten.max(x, 1),
    "min": lambda x: aten.min(x, 1),
    "amax": lambda x: aten.amax(x, [1]),
    "amin": lambda x: aten.amin(x, [1]),
    "topk": lambda x: aten.topk(x, 2),
    "max_pool1d": lambda x: aten.max_pool1d(x, [2]),
    "max_pool2d": lambda x: aten.max_pool2d(x[None], [2, 2]),
    "max_pool3d": lambda x: aten.max_pool3d(x[None, None], [1, 2, 2]),
    "max_pool2d_with_indices": lambda x: aten.max_pool2d_with_indices(x[None], [2, 2]),
    "max_pool3d_with_indices": lambda x: aten.max_pool3d_with_indices(x[None, None], [1, 2, 2]),
    "adaptive_max_pool1d": lambda x: aten.adaptive_max_pool1d(x, [2]),
    "adaptive_max_pool2d": lambda x: aten.adaptive_max_pool2d(x[None], [2, 2]),
    "kthvalue": lambda x: aten.kthvalue(x, 2),
    "median": lambda x: aten.median(x, 1),
    "cummax": lambda x: aten.cummax(x, 1),
    "cummin": lambda x: aten.cummin(x, 1),
    "maximum": lambda x: aten.maximum(x, x.flip(0)),
    "minimum": lambda x: aten.minimum(x, x.flip(0)),
    "fmax": lambda x: aten.fmax(x, x.flip(0)),
    "fmin": lambda x: aten.fmin(x, x.flip(0)),
}


@pytest.mark.parametrize("name", KINDS[Kind.SELECTION])
def test_selection(name: str) -> None:
    """Every output value is one of the inputs, and its derivative says which."""
    function = SELECTIONS.get(name, getattr(aten, name))
    x = randn(4, 5)

    def values(x: Tensor) -> Tensor:
        return _parts(function(x))[0]

    chosen = values(x).flatten()
    jacobian = torch.autograd.functional.jacobian(values, x).reshape(len(chosen), -1)
    assert torch.isin(chosen, x).all()
    assert_close(jacobian @ x.flatten(), chosen)
    assert_close(jacobian.sum(1), torch.ones(len(chosen), dtype=DOUBLE))


STEPS: dict[str, Sample] = {
    **{name: getattr(aten, name) for name in ("sign", "floor", "ceil", "round", "trunc", "sgn")},
    "heaviside": lambda x: aten.heaviside(x, torch.ones((), dtype=DOUBLE)),
}
STEADY: dict[str, Sample] = {
    **{name: getattr(aten, name) for name in ("zeros_like", "ones_like", "empty_like")},
    **{name: getattr(aten, name) for name in ("rand_like", "randn_like", "detach", "bernoulli")},
    "detach_": lambda x: aten.detach_(x * 2),
    "full_like": lambda x: aten.full_like(x, 2.0),
    "new_zeros": lambda x: aten.new_zeros(x, [2]),
    "new_ones": lambda x: aten.new_ones(x, [2]),
    "new_full": lambda x: aten.new_full(x, [2], 3.0),
    "new_empty": lambda x: aten.new_empty(x, [2]),
}


@pytest.mark.parametrize("name", operators.SHAPE_ONLY)
def test_shape_only(name: str) -> None:
    """No derivative: the value is a step function, or not one of the input's values at all."""
    x = torch.tensor([-1.3, 0.4, 2.6], dtype=DOUBLE)
    if name in STEPS:
        assert_close(STEPS[name](x + 1e-9), STEPS[name](x), rtol=0, atol=0)
        return
    leaf = torch.rand(3, dtype=DOUBLE).requires_grad_()
    value = STEADY[name](leaf)
    assert not value.requires_grad or not torch.autograd.grad(value.sum(), leaf)[0].any()


def _only(function: Callable[..., Tensor], **inputs: Tensor) -> tuple[fx.Node, set[fx.Node]]:
    """The last op of a function and what is explained, before rules are assigned."""
    graph_module = capture(Function(function).eval(), inputs).graph_module
    mark_sources(graph_module, PassContext())
    (last,) = graph_module.graph.output_node().all_input_nodes
    return last, explained_values(graph_module.graph)


GRID = randn(1, 2, 2, 2) / 2
A, B = randn(3, 3), randn(3, 3).exp()


@pytest.mark.parametrize(
    ("function", "inputs", "kind"),
    [
        (lambda a, b: a * b, {"a": A, "b": B}, Kind.PRODUCT),
        (lambda a: a * TABLE, {"a": A}, Kind.LINEAR),
        (lambda a: a * a, {"a": A}, Kind.PRODUCT),
        (lambda a, b: a / b, {"a": A, "b": B}, Kind.QUOTIENT),
        (lambda a: a / TABLE, {"a": A}, Kind.LINEAR),
        (lambda b: TABLE / b, {"b": B}, Kind.ACTIVATION),
        (lambda b: 2 / b, {"b": B}, Kind.LINEAR),
        (lambda a, b: torch.maximum(a, b), {"a": A, "b": B}, Kind.SELECTION),
        (lambda a: torch.maximum(a, TABLE), {"a": A}, Kind.ACTIVATION),
        (lambda a: torch.max(a, TABLE), {"a": A}, Kind.ACTIVATION),
        (lambda a: torch.max(a), {"a": A}, Kind.SELECTION),
        (lambda a, b: torch.pow(b, a), {"a": A, "b": B}, Kind.REDUCTION),
        (lambda a, b: torch.hypot(a, b), {"a": A, "b": B}, Kind.REDUCTION),
        (lambda a, b: torch.atan2(a, TABLE), {"a": A, "b": B}, Kind.ACTIVATION),
        (lambda a, b: torch.cdist(a, b), {"a": A, "b": B}, Kind.REDUCTION),
        (lambda a, b: F.bilinear(a, b, TABLE.expand(3, 3, 3)), {"a": A, "b": B}, Kind.PRODUCT),
        (lambda a: F.bilinear(a, TABLE, TABLE.expand(3, 3, 3)), {"a": A}, Kind.LINEAR),
        (lambda a: torch.linalg.solve(TABLE, a), {"a": A}, Kind.LINEAR),
        (lambda b: torch.linalg.solve(b, TABLE), {"b": B}, Kind.REDUCTION),
        (lambda a: F.grid_sample(a[None, None], GRID, align_corners=False), {"a": A}, Kind.LINEAR),
        (
            lambda a: F.grid_sample(GRID, GRID + a[0, 0], align_corners=False),
            {"a": A},
            Kind.REDUCTION,
        ),
        (
            lambda a, b: F.grid_sample(a[None, None], GRID + b[0, 0], align_corners=False),
            {"a": A, "b": B},
            Kind.REDUCTION,
        ),
        (lambda a: F.embedding(ROWS, a), {"a": A}, Kind.LINEAR),
        (lambda a: a.max(1).values, {"a": A}, Kind.LINEAR),
        (lambda a: torch.special.erfinv(a), {"a": A}, Kind.ACTIVATION),
        (lambda a: torch.special.i0(a), {"a": A}, Kind.UNKNOWN),
    ],
)
def test_kind_of(function: Callable[..., Tensor], inputs: dict[str, Tensor], kind: Kind) -> None:
    """The kind depends on which of the inputs are explained. (2 / b is 1/b times a constant.)"""
    node, explained = _only(function, **inputs)
    assert kind_of(node, explained) is kind


def test_batch_norm_of_an_explained_weight() -> None:
    """Linear in what it normalises, in the bias and in the mean, all three together."""
    norm, explained = _only(lambda a: F.batch_norm(A, a[0], TABLE[1], a[1], a[2]), a=A)
    assert kind_of(norm.args[0], explained) is Kind.REDUCTION  # type: ignore[arg-type]
    norm, explained = _only(lambda a: F.batch_norm(a, a[0], TABLE[1], TABLE[1], a[2]), a=A)
    assert kind_of(norm.args[0], explained) is Kind.LINEAR  # type: ignore[arg-type]


def test_rounded_division_is_constant() -> None:
    """Division that rounds has no derivative, whatever its numerator."""

    def function(a: Tensor) -> Tensor:
        return a.sum(1) + a.div(0.3, rounding_mode="floor").sum(1)

    rewritten = rewrite(function, {"a": A})
    (rounded,) = [node for node in rewritten.graph.nodes if is_op(node, "div")]
    assert is_shape_only(rounded)
    assert "rule" not in rounded.meta


def test_packet() -> None:
    assert packet(aten.add.Tensor) is aten.add
    assert packet(len) is len
    foreign = "transformers::grouped_mm_fallback"
    assert packet(torch.ops.transformers.grouped_mm_fallback.default) == foreign
