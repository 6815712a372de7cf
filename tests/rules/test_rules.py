"""Each rule against its slow oracle: shapes, strides, broadcasting, dtypes, zeros, infinities.

One op is captured once, with dynamic sizes, and the tape run on whatever hypothesis draws; the
oracles of `references` compute the same relevance in the explicit form of the paper's equations.
"""

import functools
import itertools
from collections.abc import Callable, Mapping

import pytest
import references as ref
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from references import Explained, explain, rewrite
from torch import Tensor, fx, nn
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import COMPOSITES, Attention, Epsilon, Match, ops
from attnlrp_fx.calculus.pullbacks import attention_shares
from attnlrp_fx.graph.operators import adds_up
from attnlrp_fx.rules.composites import Composite

SETTINGS = settings(deadline=None, max_examples=15, derandomize=True)
BATCH = st.integers(1, 3)
LENGTH = st.integers(2, 5)
LAYOUT = st.sampled_from(["contiguous", "transposed", "strided", "expanded"])
SEED = st.integers(0, 2**16)
DOUBLE = torch.float64


@st.composite
def tensors(
    draw: st.DrawFn, *shapes: tuple[int | st.SearchStrategy[int], ...], zeros: bool = True
) -> tuple[Tensor, ...]:
    """Random float64 tensors in any layout, some with zeros; equal strategies, equal sizes."""
    sizes: dict[int, int] = {}

    def size(of: int | st.SearchStrategy[int]) -> int:
        if isinstance(of, int):
            return of
        if id(of) not in sizes:
            sizes[id(of)] = draw(of)
        return sizes[id(of)]

    generator = torch.Generator().manual_seed(draw(SEED))
    made = []
    for shape in shapes:
        found = [size(of) for of in shape]
        x = torch.randn(found, generator=generator, dtype=DOUBLE)
        if zeros and draw(st.booleans()):
            x = x * (torch.rand(found, generator=generator) > 0.3)
        made.append(_laid_out(x, draw(LAYOUT)))
    return tuple(made)


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same shape in another memory layout; an expanded tensor repeats its first row."""
    match layout:
        case "transposed":
            return (
                x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
            )
        case "strided":
            return torch.stack([x, x + 1], -1)[..., 0]
        case "expanded":
            return x[:1].expand(x.shape)
    return x


@functools.cache
def graph(
    name: str, composite: str | Composite = "attnlrp", explained: tuple[str, ...] | None = None
) -> fx.GraphModule:
    """The rewritten graph of one of `MODULES`."""
    module, inputs = MODULES[name]()
    return rewrite(module, inputs, composite, explained)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=DOUBLE)


def seeded(module: nn.Module) -> nn.Module:
    """Random parameters, so that no bias is zero and no weight one."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=DOUBLE))
    return module


VECTOR, SHIFT, SQUARE, TALL = randn(5), randn(1, 5)[0], randn(5, 5), randn(5, 4)
"""Constants of the modules below."""

Made = tuple[nn.Module | Callable[..., Tensor], Mapping[str, Tensor]]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7)


def _attention_in_parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.7 + mask
    return torch.matmul(torch.softmax(scores, -1), v)


def _attention_with_weights(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The weights are an output too, so the parts stay as they are."""
    scores = torch.matmul(q, k.transpose(-1, -2)) * 0.7 + mask
    weights = torch.softmax(scores, -1)
    return torch.matmul(weights, v), weights


def _qkv() -> Mapping[str, Tensor]:
    """As many heads as there are in every batch; queries fewer than keys."""
    mask = torch.zeros(4, 5, dtype=DOUBLE)
    return {"q": randn(2, 3, 4, 7), "k": randn(2, 3, 5, 7), "v": randn(2, 3, 5, 6), "mask": mask}


MODULES: dict[str, Callable[[], Made]] = {
    "linear": lambda: (seeded(nn.Linear(5, 4)), {"input": randn(2, 3, 5)}),
    "linear without bias": lambda: (seeded(nn.Linear(5, 4, bias=False)), {"input": randn(2, 3, 5)}),
    "conv1d": lambda: (
        seeded(nn.Conv1d(2, 3, 3, stride=2, padding=1)),
        {"input": randn(2, 2, 8)},
    ),
    "conv2d": lambda: (
        seeded(nn.Conv2d(2, 4, (3, 2), stride=(1, 2), padding=1, dilation=(1, 2), groups=2)),
        {"input": randn(2, 2, 6, 7)},
    ),
    "conv_transpose1d": lambda: (
        seeded(nn.ConvTranspose1d(2, 3, 3, stride=2)),
        {"input": randn(2, 2, 5)},
    ),
    "addmm": lambda: (
        lambda x: torch.addmm(torch.ones(4, dtype=DOUBLE), x, TALL, alpha=2.0, beta=0.5),
        {"x": randn(3, 5)},
    ),
    "embedded in constants": lambda: (
        lambda x: torch.cat([x[:, 1:] * 3 + 2, torch.full_like(x, 0.5)], 1).flip(1) / 7 - 1,
        {"x": randn(3, 5)},
    ),
    "softmax": lambda: (lambda x: torch.softmax(x, -1), {"x": randn(2, 3, 5)}),
    "softmax over the middle": lambda: (lambda x: torch.softmax(x, 1), {"x": randn(2, 3, 5)}),
    "mul": lambda: (lambda a, b: a * b, {"a": randn(2, 3, 5), "b": randn(2, 3, 5)}),
    "mul broadcast": lambda: (lambda a, b: a * b, {"a": randn(2, 3, 5), "b": randn(3, 1)}),
    "square": lambda: (lambda x: x * x, {"x": randn(2, 3, 5)}),
    "matmul": lambda: (
        lambda a, b: torch.matmul(a, b),
        {"a": randn(2, 3, 5), "b": randn(2, 5, 4)},
    ),
    "matmul broadcast": lambda: (
        lambda a, b: torch.matmul(a, b),
        {"a": randn(2, 3, 5), "b": randn(5, 4)},
    ),
    "baddbmm": lambda: (
        lambda t, a, b: torch.baddbmm(t, a, b, alpha=0.5),
        {"t": randn(2, 3, 4), "a": randn(2, 3, 5), "b": randn(2, 5, 4)},
    ),
    "einsum of three": lambda: (
        lambda a, b, d: torch.einsum("bi,bij,bj->bj", a, b, d),
        {"a": randn(2, 3), "b": randn(2, 3, 5), "d": randn(2, 5)},
    ),
    "attention": lambda: (_attention, _qkv()),
    "attention in parts": lambda: (_attention_in_parts, _qkv()),
    "attention and weights": lambda: (_attention_with_weights, _qkv()),
    "causal attention": lambda: (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7),
        {"q": randn(2, 3, 5, 7), "k": randn(2, 3, 5, 7), "v": randn(2, 3, 5, 6)},
    ),
    "rms_norm": lambda: (
        seeded(nn.RMSNorm(5, eps=1e-3)),
        {"x": randn(2, 3, 5)},
    ),
    "rms_norm written out": lambda: (
        lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3) * VECTOR,
        {"x": randn(2, 3, 5)},
    ),
    "l2_norm": lambda: (lambda x: F.normalize(x, dim=-1), {"x": randn(2, 3, 5)}),
    "layer_norm": lambda: (seeded(nn.LayerNorm(5, eps=1e-3)), {"input": randn(2, 3, 5)}),
    "layer_norm bare": lambda: (
        lambda x: F.layer_norm(x, (5,), eps=1e-3),
        {"x": randn(2, 3, 5)},
    ),
    "layer_norm written out": lambda: (
        lambda x: (
            (x - x.mean(-1, keepdim=True))
            / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-3)
            * VECTOR
            + SHIFT
        ),
        {"x": randn(2, 3, 5)},
    ),
    "instance_norm": lambda: (
        seeded(nn.InstanceNorm1d(4, eps=1e-3, affine=True)),
        {"input": randn(2, 4, 5)},
    ),
    "group_norm": lambda: (seeded(nn.GroupNorm(2, 4, eps=1e-3)), {"input": randn(2, 4, 5)}),
    "residual": lambda: (
        lambda x, f: x + torch.matmul(f, SQUARE),
        {"x": randn(2, 3, 5), "f": randn(2, 3, 5)},
    ),
    "max": lambda: (lambda x: torch.max(x, -1).values, {"x": randn(2, 3, 5)}),
    "amax": lambda: (lambda x: torch.amax(x, -1), {"x": randn(2, 3, 5)}),
    "topk": lambda: (lambda x: x.topk(1, -1).values[..., 0], {"x": randn(2, 3, 5)}),
    "sort": lambda: (lambda x: x.sort(-1, descending=True).values[..., 0], {"x": randn(2, 3, 5)}),
    "kthvalue": lambda: (lambda x: -(-x).kthvalue(1, -1).values, {"x": randn(2, 3, 5)}),
    "maximum": lambda: (
        lambda a, b: torch.maximum(a, b),
        {"a": randn(2, 3, 5), "b": randn(2, 3, 5)},
    ),
    "max_pool2d": lambda: (
        lambda x: F.max_pool2d(x[:, None], (x.shape[1], x.shape[2]))[:, 0, 0, 0],
        {"x": randn(2, 4, 6)},
    ),
    "quotient": lambda: (lambda a, b: a / b, {"a": randn(2, 3, 5), "b": randn(2, 3, 5).exp()}),
    "gated": lambda: (
        lambda g, u: F.silu(g) * u,
        {"g": randn(2, 3, 5), "u": randn(2, 3, 5)},
    ),
    "split": lambda: (
        lambda x: (
            x.split([2, 3], -1)[1] + 2 * x.unbind(1)[0][:, None, 2:] + x.chunk(2, -1)[1].sum()
        ),
        {"x": randn(2, 4, 5)},
    ),
}


def of(explained: Explained, *names: str) -> list[Tensor]:
    """Relevance by input, once law 1 is checked."""
    scale = float(explained.seeded.abs().sum()) + 1.0
    assert abs(explained.residual) <= 1e-12 * scale
    return [explained.relevance[name] for name in names]


@SETTINGS
@given(tensors((BATCH, LENGTH, 5)), st.sampled_from([0.0, 0.1, 3.0]), st.booleans())
def test_linear(x: tuple[Tensor], epsilon: float, has_bias: bool) -> None:
    """Eq. 8, with a bias and with ε, whose sign follows the output's."""
    name = "linear" if has_bias else "linear without bias"
    composite = _with_epsilon(epsilon) if epsilon else "attnlrp"
    rewritten = graph(name, composite)
    weight = rewritten.get_parameter("weight").detach()
    bias = rewritten.get_parameter("bias").detach() if has_bias else None
    result = explain(rewritten, {"input": x[0]})
    kept = []

    def rule(row: Tensor, relevance: Tensor) -> Tensor:
        received, absorbed = ref.linear(row, weight, bias, relevance, epsilon)
        kept.append(absorbed)
        return received

    assert_close(of(result, "input")[0], ref.rows(rule, x[0], result.seeded))
    assert_close(result.absorbed["linear"], sum(kept))


@functools.cache
def _with_epsilon(epsilon: float) -> Composite:
    match = Match(op="aten.linear.*")
    return COMPOSITES["attnlrp"].with_rules((match, Epsilon(epsilon=epsilon)))


def test_epsilon_at_every_linear_op() -> None:
    """It acts where contributions are added up, not at views or a split, and in every dtype."""
    composite = COMPOSITES["attnlrp"].with_rules((Match(kind="linear"), Epsilon(epsilon=0.25)))
    rewritten = graph("split", composite)
    stabilised = {n.args[0] for n in rewritten.graph.nodes if "epsilon" in n.kwargs}
    assert all(adds_up(op) for op in stabilised)
    assert not any(adds_up(n.args[0]) for n in rewritten.graph.nodes if _is_unstabilised(n))
    x = randn(2, 4, 5)
    result = explain(rewritten, {"x": x})
    of(result, "x")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        low = explain(rewritten, {"x": x.to(dtype)}, result.coefficient.to(dtype))
        assert_close(
            low.relevance["x"],
            result.relevance["x"].float(),
            rtol=16 * torch.finfo(dtype).eps,
            atol=16 * torch.finfo(dtype).eps,
        )


def _is_unstabilised(node: fx.Node) -> bool:
    return node.target is ops.linear and "epsilon" not in node.kwargs


def test_epsilon_is_not_negative() -> None:
    with pytest.raises(ValueError, match="epsilon"):
        Epsilon(epsilon=-1.0)
    with pytest.raises(ValueError, match="epsilon"):
        Epsilon(epsilon=float("nan"))


@SETTINGS
@given(tensors((BATCH, 2, st.integers(3, 9))))
def test_conv1d(x: tuple[Tensor]) -> None:
    _check_affine("conv1d", x[0])


@settings(SETTINGS, max_examples=6)
@given(tensors((st.integers(1, 2), 2, st.integers(2, 3), st.integers(2, 3))))
def test_conv2d(x: tuple[Tensor]) -> None:
    """With groups, strides, padding and dilation, as an explicit matrix (eq. 8)."""
    _check_affine("conv2d", x[0])


@settings(SETTINGS, max_examples=6)
@given(tensors((st.integers(1, 2), 2, st.integers(2, 4))))
def test_conv_transpose1d(x: tuple[Tensor]) -> None:
    _check_affine("conv_transpose1d", x[0])


def _check_affine(name: str, x: Tensor) -> None:
    rewritten = graph(name)
    module, _ = MODULES[name]()
    result = explain(rewritten, {"input": x})
    with torch.no_grad():
        expected = ref.affine(module, x, result.seeded)  # type: ignore[arg-type]
    assert_close(of(result, "input")[0], expected)


@SETTINGS
@given(tensors((BATCH, 5)))
def test_addmm(x: tuple[Tensor]) -> None:
    """alpha and beta scale the product and the constant that is added."""
    result = explain(graph("addmm"), {"x": x[0]})
    bias = torch.full((4,), 0.5, dtype=DOUBLE)
    weight = 2 * TALL.T
    expected = ref.rows(lambda a, r: ref.linear(a, weight, bias, r)[0], x[0], result.seeded)
    assert_close(of(result, "x")[0], expected)


@SETTINGS
@given(tensors((BATCH, st.integers(2, 6))))
def test_constants_keep_their_share(x: tuple[Tensor]) -> None:
    """Added constants, concatenated ones and shifts absorb; scales and moves do not."""
    function, _ = MODULES["embedded in constants"]()
    result = explain(graph("embedded in constants"), {"x": x[0]})
    expected = ref.affine(function, x[0], result.seeded)  # type: ignore[arg-type]
    assert_close(of(result, "x")[0], expected)


@SETTINGS
@given(tensors((BATCH, LENGTH, st.integers(1, 6))), st.booleans(), SEED)
def test_softmax(x: tuple[Tensor], masked: bool, seed: int) -> None:
    """Eq. 13; −∞ at masked positions counts as 0 and never makes a NaN."""
    values = x[0]
    if masked:
        hidden = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
        hidden[..., 0] = False
        values = values.masked_fill(hidden, -torch.inf)
    result = explain(graph("softmax"), {"x": values})
    received = torch.where(torch.isinf(values), 0.0, result.relevance["x"])
    assert not received.isnan().any()
    assert_close(received, ref.rows(ref.softmax, values, result.seeded))


@SETTINGS
@given(tensors((BATCH, LENGTH, st.integers(1, 6))))
def test_softmax_over_another_dimension(x: tuple[Tensor]) -> None:
    result = explain(graph("softmax over the middle"), {"x": x[0]})
    expected = ref.rows(ref.softmax, x[0].mT, result.seeded.mT).mT
    assert_close(of(result, "x")[0], expected)


@SETTINGS
@given(tensors((BATCH, LENGTH, 5), (BATCH, LENGTH, 5)))
def test_product(ab: tuple[Tensor, Tensor]) -> None:
    """Eq. 14: each factor of two gets half, broadcast or not."""
    a, b = ab
    result = explain(graph("mul"), {"a": a, "b": b})
    for received in of(result, "a", "b"):
        assert_close(received, ref.product(2, result.seeded))


@SETTINGS
@given(tensors((BATCH, LENGTH, 5), (LENGTH, 1)))
def test_product_broadcast(ab: tuple[Tensor, Tensor]) -> None:
    """A broadcast factor adds up what each of its copies gets."""
    a, b = ab
    result = explain(graph("mul broadcast"), {"a": a, "b": b})
    of_a, of_b = of(result, "a", "b")
    assert_close(of_a, ref.product(2, result.seeded))
    assert_close(of_b, ref.product(2, result.seeded).sum((0, 2))[:, None])


@SETTINGS
@given(tensors((BATCH, LENGTH, 5)))
def test_square(x: tuple[Tensor]) -> None:
    """x·x is a product of two factors that are one value: it gets both halves."""
    result = explain(graph("square"), {"x": x[0]})
    assert_close(of(result, "x")[0], result.seeded)


@SETTINGS
@given(tensors((BATCH, LENGTH, 5), (BATCH, 5, st.integers(1, 4)), zeros=False))
def test_matmul(ab: tuple[Tensor, Tensor]) -> None:
    """Eq. 15."""
    a, b = ab
    result = explain(graph("matmul"), {"a": a, "b": b})
    expected = [ref.matmul(m, n, r) for m, n, r in zip(a, b, result.seeded, strict=True)]
    for i, received in enumerate(of(result, "a", "b")):
        assert_close(received, torch.stack([pair[i] for pair in expected]))


@SETTINGS
@given(tensors((BATCH, LENGTH, 5), (5, 4), zeros=False))
def test_matmul_broadcast(ab: tuple[Tensor, Tensor]) -> None:
    a, b = ab
    result = explain(graph("matmul broadcast"), {"a": a, "b": b})
    expected = [ref.matmul(m, b, r) for m, r in zip(a, result.seeded, strict=True)]
    of_a, of_b = of(result, "a", "b")
    assert_close(of_a, torch.stack([pair[0] for pair in expected]))
    assert_close(of_b, torch.stack([pair[1] for pair in expected]).sum(0))


@SETTINGS
@given(tensors((BATCH, 3, 4), (BATCH, 3, 5), (BATCH, 5, 4), zeros=False))
def test_product_with_an_added_term(tab: tuple[Tensor, Tensor, Tensor]) -> None:
    """baddbmm: eq. 8 between term and product, then eq. 15 between the factors."""
    t, a, b = tab
    result = explain(graph("baddbmm"), {"t": t, "a": a, "b": b})
    of_term, of_product = ref.add(t, 0.5 * (a @ b), result.seeded)
    expected = [ref.matmul(m, n, r) for m, n, r in zip(a, b, of_product, strict=True)]
    received = of(result, "t", "a", "b")
    assert_close(received[0], of_term)
    for i in (0, 1):
        assert_close(received[1 + i], torch.stack([pair[i] for pair in expected]))


@SETTINGS
@given(tensors((BATCH, 3), (BATCH, 3, 5), (BATCH, 5), zeros=False))
def test_product_of_three(abd: tuple[Tensor, Tensor, Tensor]) -> None:
    """einsum of three explained factors: each contribution a_i b_ij d_j goes to each by a third."""
    a, b, d = abd
    result = explain(graph("einsum of three"), {"a": a, "b": b, "d": d})
    parts = a[:, :, None] * b * d[:, None, :]
    third = ref.product(3, ref.ratio(parts * result.seeded[:, None], result.outputs[0][:, None]))
    of_a, of_b, of_d = of(result, "a", "b", "d")
    assert_close(of_a, third.sum(2))
    assert_close(of_b, third)
    assert_close(of_d, third.sum(1))


ATTENTIONS = ["attention", "attention in parts", "attention and weights"]
COMPOSITE = st.sampled_from(["attnlrp", "cp-lrp"])


@settings(SETTINGS, max_examples=10)
@given(
    tensors((BATCH, 3, LENGTH, 7), (BATCH, 3, 5, 7), (BATCH, 3, 5, 6)),
    st.sampled_from(ATTENTIONS),
    COMPOSITE,
    SEED,
)
def test_attention(qkv: tuple[Tensor, ...], name: str, composite: str, seed: int) -> None:
    """Eqs. 15, 13, 15 in a chain: fused, in parts that are raised, in parts that stay.

    With −∞ and with finite numbers in the mask; batch of one, and queries fewer than keys.
    """
    q, k, v = qkv
    rewritten = graph(name, composite, ("q", "k", "v"))
    fused = any(node.target is ops.attention for node in rewritten.graph.nodes)
    assert fused == (name != "attention and weights")
    generator = torch.Generator().manual_seed(seed)
    mask = torch.randn(q.shape[2], 5, generator=generator, dtype=DOUBLE)
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = -torch.inf
    mask[:, 0] = 0.5
    _check_attention(rewritten, {"q": q, "k": k, "v": v, "mask": mask}, mask, composite)


@settings(SETTINGS, max_examples=6)
@given(tensors((BATCH, 3, LENGTH, 7), (BATCH, 3, LENGTH, 7), (BATCH, 3, LENGTH, 6)), COMPOSITE)
def test_causal_attention(qkv: tuple[Tensor, ...], composite: str) -> None:
    q, k, v = qkv
    mask = torch.full((q.shape[2], q.shape[2]), -torch.inf, dtype=DOUBLE).triu(1)
    rewritten = graph("causal attention", composite)
    _check_attention(rewritten, {"q": q, "k": k, "v": v}, mask, composite)


def _check_attention(
    rewritten: fx.GraphModule, inputs: Mapping[str, Tensor], mask: Tensor, composite: str
) -> None:
    result = explain(rewritten, inputs)
    of(result)
    operands = [inputs[name] for name in ("q", "k", "v")]
    expected = [torch.zeros_like(x) for x in operands]
    for at in itertools.product(*map(range, operands[0].shape[:2])):
        parts = ref.attention(
            *(x[at] for x in operands),
            result.seeded[at],
            0.7,
            mask,
            constant_weights=composite == "cp-lrp",
        )
        for into, part in zip(expected, parts, strict=True):
            into[at] = part
    for name, wanted in zip(("q", "k", "v"), expected, strict=True):
        received = result.relevance.get(name, torch.zeros_like(wanted))
        assert_close(received, wanted, rtol=1e-9, atol=1e-9)


EXPLAINED = [
    ("q", "attnlrp"),
    ("v", "attnlrp"),
    ("q k", "attnlrp"),
    ("k v", "attnlrp"),
    ("v mask", "attnlrp"),
    ("q k v mask", "attnlrp"),
    ("v", "cp-lrp"),
    ("q k v mask", "cp-lrp"),
]
"""In parts, CP-LRP knows attention weights by the explained value that they multiply."""


@pytest.mark.parametrize(("names", "composite"), EXPLAINED)
def test_fused_attention_is_the_chain(names: str, composite: str) -> None:
    """Whichever operands are explained: a constant one leaves its share to the others."""
    explained = tuple(names.split())
    inputs = {**_qkv(), "mask": randn(4, 5)}
    coefficient = randn(2, 3, 4, 6)
    fused = explain(graph("attention", composite, explained), inputs, coefficient)
    parts = explain(graph("attention and weights", composite, explained), inputs, coefficient)
    of(fused)
    for name in explained:
        zero = torch.zeros_like(inputs[name])
        assert_close(fused.relevance.get(name, zero), parts.relevance.get(name, zero))


def test_attention_weights_share() -> None:
    """`Attention(weights=w)` gives w to query and key, 1 − w to the value."""
    inputs = {**_qkv(), "mask": torch.zeros(4, 5, dtype=DOUBLE)}
    coefficient = randn(2, 3, 4, 6)
    names = ("q", "k", "v")
    half = explain(graph("attention", "attnlrp", names), inputs, coefficient)
    match = Match(kind="attention")
    composite = COMPOSITES["attnlrp"].with_rules((match, Attention(weights=0.2)))
    fifth = explain(graph("attention", composite, names), inputs, coefficient)
    of(fifth)
    for name, share in (("q", 0.1 / 0.25), ("k", 0.1 / 0.25), ("v", 0.8 / 0.5)):
        assert_close(fifth.relevance[name], half.relevance[name] * share)
    with pytest.raises(ValueError, match="weights"):
        Attention(weights=1.5)
    with pytest.raises(ValueError, match="points"):
        Attention(points=-1)


def _integrated(points: int = 24) -> Composite:
    rule = (Match(kind="attention"), Attention(points=points))
    return COMPOSITES["attnlrp"].with_rules(rule)


def test_integrated_attention() -> None:
    """Against the integral of softmax's derivative by hand, with −∞ and numbers in the mask."""
    inputs = {**_qkv(), "mask": randn(4, 5)}
    inputs["mask"][torch.tensor([0, 1, 3]), torch.tensor([1, 4, 2])] = -torch.inf
    names = ("q", "k", "v")
    result = explain(graph("attention", _integrated(), names), inputs)
    of(result)
    for at in itertools.product(range(2), range(3)):
        operands = [inputs[name][at] for name in names]
        expected = ref.integrated_attention(*operands, result.seeded[at], 0.7, inputs["mask"])
        for name, wanted in zip(names, expected, strict=True):
            assert_close(result.relevance[name][at], wanted, rtol=1e-8, atol=1e-8)


def test_integrated_attention_adds_up() -> None:
    """Query and key each: a quarter of what attention gives more than with scores of zero."""
    inputs = {**_qkv(), "mask": torch.zeros(4, 5, dtype=DOUBLE)}
    coefficient = randn(2, 3, 4, 6)
    result = explain(graph("attention", _integrated(), ("q", "k", "v")), inputs, coefficient)
    more = result.outputs[0] - inputs["v"].mean(-2, keepdim=True)
    for name in ("q", "k"):
        found = result.relevance[name].sum((-2, -1))
        assert_close(found, (more * coefficient).sum((-2, -1)) / 4, rtol=1e-8, atol=1e-8)


def test_integrated_attention_where_softmax_is_saturated() -> None:
    """The key that is read gets relevance where softmax's derivative is zero."""
    inputs = {name: value[:1, :1] for name, value in _qkv().items()}
    inputs = {**inputs, "q": inputs["q"][..., :1, :] * 30, "mask": torch.zeros(1, 5, dtype=DOUBLE)}
    inputs["v"] = torch.zeros_like(inputs["v"])
    read = int((inputs["q"] @ inputs["k"].mT)[0, 0, 0].argmax())
    inputs["v"][..., read, :] = 1.0
    coefficient = torch.full((1, 1, 1, 6), 1 / 6, dtype=DOUBLE)
    found = {
        points: explain(
            graph("attention", _integrated(points), ("q", "k", "v")), inputs, coefficient
        )
        .relevance["k"][0, 0, read]
        .sum()
        for points in (0, 24)
    }
    assert abs(found[0]) < 1e-3
    assert found[24] > 0.1


@pytest.mark.parametrize(
    ("positions", "weights", "shares"),
    [
        ((0, 1, 2), 0.5, [0.25, 0.25, 0.5]),
        ((0, 1, 2), 0.0, [0.0, 0.0, 1.0]),
        ((0, 2), 0.5, [0.5, 0.5]),
        ((0, 1), 0.5, [0.5, 0.5]),
        ((1,), 0.5, [1.0]),
        ((2,), 0.5, [1.0]),
        ((2,), 0.0, [1.0]),
        ((0, 1), 0.0, [0.0, 0.0]),
        ((0, 1, 2, 3), 0.5, [0.25, 0.25, 0.5, 0.5]),
        ((0, 1, 2, "attn_mask"), 0.5, [0.25, 0.25, 0.5, 0.5]),
        ((2, "attn_mask"), 0.0, [1.0, 0.0]),
    ],
)
def test_attention_shares(
    positions: tuple[int | str, ...], weights: float, shares: list[float]
) -> None:
    assert attention_shares(positions, weights) == shares


@SETTINGS
@given(
    tensors((BATCH, LENGTH, 5)),
    st.sampled_from(["rms_norm", "rms_norm written out", "l2_norm"]),
)
def test_scale_normalisations(x: tuple[Tensor], name: str) -> None:
    """Eq. 19: what only rescales passes all relevance on, also rows that are all zero."""
    result = explain(graph(name), {"x": x[0]})
    assert_close(of(result, "x")[0], ref.normalisation(result.seeded))


LAYER_NORMS = ["layer_norm", "layer_norm bare", "layer_norm written out"]


@SETTINGS
@given(tensors((BATCH, LENGTH, 5)), st.sampled_from(LAYER_NORMS))
def test_layer_norm(x: tuple[Tensor], name: str) -> None:
    """Standard deviation constant, the rest by eq. 8; fused, without affine part, written out."""
    rewritten = graph(name)
    weight = bias = None
    if name == "layer_norm":
        weight, bias = (rewritten.get_parameter(n).detach() for n in ("weight", "bias"))
    if name == "layer_norm written out":
        weight, bias = VECTOR, SHIFT
    argument = "input" if name == "layer_norm" else "x"
    result = explain(rewritten, {argument: x[0]})
    expected = ref.rows(
        lambda row, r: ref.layer_norm(row, weight, bias, 1e-3, r), x[0], result.seeded
    )
    assert_close(of(result, argument)[0], expected)


@SETTINGS
@given(tensors((BATCH, 4, LENGTH)))
def test_group_norm(x: tuple[Tensor]) -> None:
    rewritten = graph("group_norm")
    weight, bias = (rewritten.get_parameter(name).detach() for name in ("weight", "bias"))
    result = explain(rewritten, {"input": x[0]})
    expected = [
        ref.group_norm(row, 2, weight, bias, 1e-3, r)
        for row, r in zip(x[0], result.seeded, strict=True)
    ]
    assert_close(of(result, "input")[0], torch.stack(expected))


@SETTINGS
@given(tensors((BATCH, 4, st.integers(2, 5))))
def test_instance_norm(x: tuple[Tensor]) -> None:
    """A group norm with a group a channel."""
    rewritten = graph("instance_norm")
    weight, bias = (rewritten.get_parameter(name).detach() for name in ("weight", "bias"))
    result = explain(rewritten, {"input": x[0]})
    expected = [
        ref.group_norm(row, 4, weight, bias, 1e-3, r)
        for row, r in zip(x[0], result.seeded, strict=True)
    ]
    assert_close(of(result, "input")[0], torch.stack(expected))


@SETTINGS
@given(tensors((BATCH, LENGTH, 5), (BATCH, LENGTH, 5), zeros=False))
def test_residual(xf: tuple[Tensor, Tensor]) -> None:
    """R_x = x R / (x + f), and f's share through its matrix (eq. 8)."""
    x, f = xf
    result = explain(graph("residual"), {"x": x, "f": f})
    of_x, of_branch = ref.add(x, f @ SQUARE, result.seeded)
    of_f = ref.rows(lambda a, r: ref.linear(a, SQUARE.T, None, r)[0], f, of_branch)
    received = of(result, "x", "f")
    assert_close(received[0], of_x)
    assert_close(received[1], of_f)


@SETTINGS
@given(
    tensors((BATCH, LENGTH, 5), zeros=False),
    st.sampled_from(["max", "amax", "topk", "sort", "kthvalue"]),
)
def test_winner(x: tuple[Tensor], name: str) -> None:
    """The largest takes it all, by whichever op it is found."""
    result = explain(graph(name), {"x": x[0]})
    expected = ref.rows(ref.winner, x[0], result.seeded[..., None])
    assert_close(of(result, "x")[0], expected)


@SETTINGS
@given(tensors((BATCH, 4, 6), zeros=False))
def test_max_pool(x: tuple[Tensor]) -> None:
    result = explain(graph("max_pool2d"), {"x": x[0]})
    expected = ref.rows(ref.winner, x[0].flatten(1), result.seeded[:, None]).view(x[0].shape)
    assert_close(of(result, "x")[0], expected)


@SETTINGS
@given(tensors((BATCH, LENGTH, 5), (BATCH, LENGTH, 5), zeros=False))
def test_maximum(ab: tuple[Tensor, Tensor]) -> None:
    a, b = ab
    result = explain(graph("maximum"), {"a": a, "b": b})
    of_a, of_b = of(result, "a", "b")
    assert_close(of_a, torch.where(a > b, result.seeded, 0.0) + (a == b) * result.seeded / 2)
    assert_close(of_b, torch.where(b > a, result.seeded, 0.0) + (a == b) * result.seeded / 2)


@pytest.mark.parametrize("name", ["maximum of a constant", "max of a constant", "constant over x"])
def test_activations_of_several_arguments(name: str) -> None:
    """Of one explained value and constants, also broadcast ones, they are activations (eq. 9)."""
    constant = randn(4)
    function = {
        "maximum of a constant": lambda x: torch.maximum(x, constant),
        "max of a constant": lambda x: torch.max(constant, x),
        "constant over x": lambda x: constant / x,
    }[name]
    x = randn(2, 3, 1)
    result = explain(rewrite(function, {"x": x}), {"x": x})
    at_zero = 0.0 if name == "constant over x" else torch.clamp(constant, min=0.0)
    expected = ref.ratio((result.outputs[0] - at_zero) * result.seeded, result.outputs[0])
    assert_close(of(result, "x")[0], expected.sum(-1, keepdim=True))


def test_quotient_of_explained_values() -> None:
    """a / b, both explained: first-order Taylor, so b's relevance cancels a's."""
    a, b = randn(2, 3, 5), randn(2, 3, 5).exp()
    result = explain(graph("quotient"), {"a": a, "b": b})
    of_a, of_b = of(result, "a", "b")
    assert_close(of_a, result.seeded)
    assert_close(of_b, -result.seeded)
    assert_close(result.absorbed["div"], float(result.seeded.sum()))


@pytest.mark.parametrize("function", [lambda x: x.var(-1), lambda x: x.norm(dim=-1)])
def test_lone_reductions_are_expanded(function: Callable[[Tensor], Tensor]) -> None:
    """A variance or norm that normalises nothing: first-order Taylor, absorbing by degree."""
    x = randn(2, 3, 5)
    result = explain(rewrite(function, {"x": x}), {"x": x})
    leaf = x.clone().requires_grad_()
    function(leaf).backward(result.coefficient)
    assert leaf.grad is not None
    assert_close(of(result, "x")[0], x * leaf.grad)


@SETTINGS
@given(tensors((BATCH, LENGTH, 5), (BATCH, LENGTH, 5)), COMPOSITE)
def test_gate(gu: tuple[Tensor, Tensor], composite: str) -> None:
    """silu(g)·u: eqs. 9 and 14; in CP-LRP the gate is a constant and u gets everything."""
    g, u = gu
    result = explain(graph("gated", composite), {"g": g, "u": u})
    of(result)
    if composite == "cp-lrp":
        assert_close(result.relevance["u"], result.seeded)
        assert "g" not in result.relevance
        return
    of_g = ref.activation(F.silu, g, ref.product(2, result.seeded))
    assert_close(result.relevance["u"], ref.product(2, result.seeded))
    assert_close(result.relevance["g"], of_g)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": torch.relu,
    "leaky_relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "exp": torch.exp,
    "mish": F.mish,
    "elu": F.elu,
    "hardswish": F.hardswish,
    "clamp": lambda x: x.clamp(0.2, 0.7),
    "x^3": lambda x: x**3,
}


@functools.cache
def _activation(name: str) -> fx.GraphModule:
    return rewrite(lambda x: ACTIVATIONS[name](x), {"x": randn(2, 3, 5)})


@SETTINGS
@given(tensors((BATCH, LENGTH, 5)), st.sampled_from(list(ACTIVATIONS)))
def test_activation(x: tuple[Tensor], name: str) -> None:
    """Eq. 9, the share of f(0) apart; at zeros too."""
    result = explain(_activation(name), {"x": x[0]})
    received = of(result, "x")[0]
    expected = ref.activation(ACTIVATIONS[name], x[0], result.seeded)
    assert_close(received, expected, rtol=1e-9, atol=1e-12)


def test_parts_of_a_value() -> None:
    """split, unbind and chunk: each part's relevance goes back into its place."""
    function, _ = MODULES["split"]()
    x = randn(3, 6, 5)
    result = explain(graph("split"), {"x": x})
    expected = ref.affine(function, x, result.seeded)  # type: ignore[arg-type]
    assert_close(of(result, "x")[0], expected)


LOW_PRECISION = ["linear", "conv1d", "softmax", "mul", "matmul", "rms_norm", "layer_norm", "gated"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOW_PRECISION)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """The same relevance in lower precision, added up in float32."""
    module, inputs = MODULES[name]()
    expected = explain(graph(name), inputs)
    if isinstance(module, nn.Module):
        module = module.to(dtype)
    low = {key: value.to(dtype) for key, value in inputs.items()}
    result = explain(rewrite(module, low), low, expected.coefficient.to(dtype))
    tolerance = 20 * torch.finfo(dtype).eps
    for key, relevance in result.relevance.items():
        assert relevance.dtype == torch.float32
        assert_close(relevance.double(), expected.relevance[key], rtol=tolerance, atol=tolerance)


class Block(nn.Module):
    """A pre-norm transformer block without biases, for `references.transformer_block`."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q", "k", "v", "o"):
            self.add_module(name, nn.Linear(width, width, bias=False))
        for name in ("gate", "up"):
            self.add_module(name, nn.Linear(width, hidden, bias=False))
        self.down = nn.Linear(hidden, width, bias=False)
        self.norm1, self.norm2 = nn.RMSNorm(width, 1e-6), nn.RMSNorm(width, 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) → the same."""
        batch, length, width = x.shape
        normed = self.norm1(x)
        q, k, v = (
            layer(normed).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, length, width))
        normed = self.norm2(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp"])
def test_transformer_block(composite: str) -> None:
    """Everything together, through the public API, against the block taken apart by hand."""
    block = seeded(Block(6, 2, 9)).eval()
    explainer = attnlrp_fx.compile(
        block, randn(2, 3, 6), composite=composite, backend="eager", target=_weighted, audit=True
    )
    x = randn(2, 4, 6)
    explanation = explainer(x)
    names = ("q", "k", "v", "o", "gate", "up", "down", "norm1", "norm2")
    parameters = {name: getattr(block, name).weight.detach() for name in names}
    for row in range(2):
        output = explanation.outputs[row]
        relevance = output * _weights(output)
        expected = ref.transformer_block(x[row], parameters, 2, relevance, cp=composite == "cp-lrp")
        assert_close(explanation.relevance["x"][row], expected, rtol=1e-9, atol=1e-9)
    assert explanation.ledger is not None
    assert abs(explanation.ledger.residual) <= 1e-9 * abs(explanation.ledger.target)


def _weights(output: Tensor) -> Tensor:
    """Any fixed coefficients in the output's shape."""
    return torch.linspace(-1, 2, output[..., :, :].numel(), dtype=output.dtype).view(output.shape)


def _weighted(output: Tensor) -> Tensor:
    return torch.stack([(row * _weights(row)).sum() for row in output])
