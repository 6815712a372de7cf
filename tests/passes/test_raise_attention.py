"""Attention written out in every common way becomes one op; what is not attention stays."""

import math

import pytest
import torch
from models import LAYERS, randomised, transformers_model
from rewriting import captured, copy_of, prepared, relevance, run, text
from torch import nn

from attnlrp_fx.graph.provenance import module_path
from attnlrp_fx.passes import (
    NORMALISE,
    PassContext,
    mark_sources,
    promote_casts,
    raise_attention,
    run_passes,
)
from attnlrp_fx.rules.composites import COMPOSITES

BATCH, LENGTH, HEADS, FEATURES = 2, 5, 3, 4
WIDTH = HEADS * FEATURES
LEAST = torch.finfo(torch.float32).min


class Attention(nn.Module):
    """Projections around an attention written out in one of the ways below."""

    def __init__(self, function, key_heads=HEADS):
        super().__init__()
        self.function = function
        self.key_heads = key_heads
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, key_heads * FEATURES) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
        self.temperature = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)

    def forward(self, x, mask):
        q, k, v = (part(x).unflatten(-1, (-1, FEATURES)) for part in (self.q, self.k, self.v))
        return self.function(self, q, k, v, mask)


def heads_first(*tensors):
    return [tensor.transpose(1, 2) for tensor in tensors]


def plain(m, q, k, v, mask):
    """Scores, scale, additive mask, softmax, value."""
    q, k, v = heads_first(q, k, v)
    scores = torch.matmul(q, k.transpose(2, 3)) * FEATURES**-0.5 + causal(mask)
    return torch.matmul(scores.softmax(-1), v).transpose(1, 2)


def unmasked(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return ((q @ k.mT / math.sqrt(FEATURES)).softmax(-1) @ v).transpose(1, 2)


def grouped_queries(m, q, k, v, mask):
    """Keys and values of one head repeated for several queries."""
    q, k, v = heads_first(q, k, v)
    k, v = (x[:, :, None].expand(-1, -1, HEADS, -1, -1).flatten(1, 2) for x in (k, v))
    return ((q @ k.transpose(2, 3) * 0.5 + causal(mask)).softmax(-1) @ v).transpose(1, 2)


def float32_softmax(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(2, 3) * 0.5 + causal(mask)
    return (scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v).transpose(1, 2)


def softmax_in_the_type_of_scores(m, q, k, v, mask):
    """Casts that name another explained value for its dtype, and no more."""
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(2, 3)
    weights = scores.float().softmax(-1).type_as(scores).type_as(v)
    return (weights @ v).transpose(1, 2)


def masked_fill(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.transpose(2, 3) / 2).masked_fill(mask[:, None, None] == 0, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def where_with_tensors(m, q, k, v, mask):
    """A scale and a fill that are tensors of one element, and two masks one after the other."""
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(-1, -2) / torch.full([], FEATURES**0.5, dtype=q.dtype)
    keep = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    scores = torch.where(keep, scores, torch.full([], -1e9, dtype=q.dtype))
    scores = scores.masked_fill(mask[:, None, None] == 0, -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def where_kept_last(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = torch.where(mask[:, None, None] == 0, LEAST, q @ k.transpose(-1, -2))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def folded_batch(m, q, k, v, mask):
    """Batch and heads in one dimension for bmm, apart for the mask, with a floor below."""
    q, k, v = (x.transpose(1, 2).reshape(BATCH * HEADS, LENGTH, FEATURES) for x in (q, k, v))
    scores = torch.bmm(q * 0.5, k.transpose(1, 2)).view(BATCH, HEADS, LENGTH, LENGTH)
    scores = torch.max(scores + causal(mask), torch.tensor(LEAST, dtype=q.dtype))
    weights = scores.view(BATCH * HEADS, LENGTH, LENGTH).softmax(-1)
    return torch.bmm(weights, v).view(BATCH, HEADS, LENGTH, FEATURES).transpose(1, 2)


def batched_heads(m, q, k, v, mask):
    """Three dimensions throughout."""
    q, k, v = (x.transpose(1, 2).reshape(BATCH * HEADS, LENGTH, FEATURES) for x in (q, k, v))
    weights = (torch.bmm(q, k.transpose(1, 2)) + causal(mask)[0]).softmax(2)
    return torch.bmm(weights, v).view(BATCH, HEADS, LENGTH, FEATURES).transpose(1, 2)


def baddbmm(m, q, k, v, mask):
    """A bias of the folded batch, weighted, then a mask of the batch apart."""
    q, k, v = (x.transpose(1, 2).reshape(BATCH * HEADS, LENGTH, FEATURES) for x in (q, k, v))
    slopes = torch.arange(BATCH * HEADS).view(-1, 1, 1) * torch.arange(LENGTH).view(1, 1, -1)
    scores = torch.baddbmm(slopes.to(q.dtype), q, k.transpose(1, 2), beta=0.1, alpha=0.5)
    scores = scores.view(BATCH, HEADS, LENGTH, LENGTH) + causal(mask)
    weights = scores.softmax(-1).view(BATCH * HEADS, LENGTH, LENGTH)
    return torch.bmm(weights, v).view(BATCH, HEADS, LENGTH, FEATURES).transpose(1, 2)


def einsum(m, q, k, v, mask):
    scores = torch.einsum("bqhd, bkhd -> bhqk", q, k) * 0.5 + causal(mask)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def einsum_the_other_way_round(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = torch.einsum("bhkd,bhqd->bhqk", k, q) * 0.5
    return torch.einsum("bhkd,bhqk->bqhd", v, scores.softmax(-1))


def key_permuted(m, q, k, v, mask):
    """The key goes to (batch, heads, features, keys) in one step."""
    q, v = heads_first(q, v)
    return ((q @ k.permute(0, 2, 3, 1) * 0.5 + causal(mask)).softmax(-1) @ v).transpose(1, 2)


def query_scaled(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return (((q * 0.5) @ k.transpose(2, 3) + causal(mask)).softmax(-1) @ v).transpose(1, 2)


def scaled_after_mask(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return (((q @ k.transpose(2, 3) + m.bias) * 0.5).softmax(-1) @ v).transpose(1, 2)


def temperature(m, q, k, v, mask):
    """A learned scale for each head."""
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(2, 3) * m.temperature + m.bias
    return (scores.softmax(-1) @ v).transpose(1, 2)


def integer_mask(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(2, 3) + (mask[:, None, None] - 1) * 1000
    return (scores.softmax(-1) @ v).transpose(1, 2)


def mask_of_two_dimensions(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return ((q @ k.transpose(2, 3) + m.bias[0]).softmax(-1) @ v).transpose(1, 2)


def mask_of_one_dimension(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return ((q @ k.transpose(2, 3) + m.bias[0, 0]).softmax(-1) @ v).transpose(1, 2)


def relative_bias(m, q, k, v, mask):
    """No scale, a bias learned for each distance and head, a mask of the keys."""
    q, k, v = heads_first(q, k, v)
    places = torch.arange(LENGTH)
    bias = m.bias.flatten(1).T[(places[:, None] - places).abs()].permute(2, 0, 1)[None]
    scores = q @ k.transpose(2, 3) + bias
    scores = scores + (1.0 - mask[:, None, None].to(q.dtype)) * LEAST
    return (scores.softmax(-1) @ v).transpose(1, 2)


def windows(m, q, k, v, mask):
    """A bias of the heads, then a mask of the windows, that lie in one dimension with the batch."""
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(2, 3) * m.temperature + m.bias[None]
    scores = scores.view(1, BATCH, HEADS, LENGTH, LENGTH) + shifted(q.dtype)[None, :, None]
    scores = scores.view(-1, HEADS, LENGTH, LENGTH)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def many_windows(m, q, k, v, mask):
    """The same for several images: the windows' mask is repeated."""
    q, k, v = (x.repeat(2, 1, 1, 1) for x in heads_first(q, k, v))
    scores = (q @ k.transpose(2, 3)).unflatten(0, (2, BATCH)) + shifted(q.dtype)[:, None]
    return (scores.flatten(0, 1).softmax(-1) @ v)[BATCH:].transpose(1, 2)


def windows_apart(m, q, k, v, mask):
    """Five dimensions, as no fused kernel takes them."""
    q, k, v = (x.transpose(1, 2)[None] for x in (q, k, v))
    scores = q @ k.mT + shifted(q.dtype)[:, None] + m.bias
    return (scores.softmax(-1) @ v)[0].transpose(1, 2)


def heads_apart(m, q, k, v, mask):
    """Five dimensions with a mask over the first alone, whether it is repeated or not."""
    q, k, v = (x.transpose(1, 2)[:, :, None].expand(-1, -1, 2, -1, -1) for x in (q, k, v))
    scores = (q @ k.mT).masked_fill(mask[:, None, None, None] == 0, LEAST)
    return (scores.softmax(-1) @ v)[:, :, 0].transpose(1, 2)


def mask_of_a_folded_batch(m, q, k, v, mask):
    """Scores of three dimensions, of four for one mask, and of three for another."""
    q, k, v = (x.transpose(1, 2).reshape(BATCH * HEADS, LENGTH, FEATURES) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(BATCH, HEADS, LENGTH, LENGTH) + causal(mask)
    scores = scores.view(BATCH * HEADS, LENGTH, LENGTH) + m.bias.repeat(BATCH, 1, 1)
    weights = scores.masked_fill((mask == 0).repeat_interleave(HEADS, 0)[:, None], LEAST)
    y = torch.bmm(weights.softmax(-1), v)
    return y.view(BATCH, HEADS, LENGTH, FEATURES).transpose(1, 2)


def mask_subtracted(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(2, 3) - 65504 * (1 - mask[:, None, None])
    return (scores.softmax(-1) @ v).transpose(1, 2)


def maximum_subtracted(m, q, k, v, mask):
    """A softmax that is kept from overflowing once more than it keeps itself."""
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.transpose(2, 3) + m.bias + causal(mask)) / 32
    scores = (scores - scores.amax(-1).unsqueeze(-1)) * 32
    return (scores.softmax(-1) @ v).transpose(1, 2)


def maximum_of_two_outputs(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = q @ k.transpose(2, 3)
    scores = scores - scores.max(-1, keepdim=True).values
    return (scores.softmax(-1) @ v).transpose(1, 2)


def shifted(dtype):
    """(windows, length, length): of each window, other elements see each other."""
    sees = torch.stack([torch.arange(LENGTH) < split for split in range(1, BATCH + 1)])
    return (sees[:, :, None] != sees[:, None]).to(dtype) * -100


def causal(mask):
    """(1, 1, length, length), large and negative above the diagonal."""
    above = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=mask.device).triu(1)
    return (above * -1e9)[None, None].to(torch.get_default_dtype())


WRITINGS = [
    plain,
    unmasked,
    float32_softmax,
    softmax_in_the_type_of_scores,
    masked_fill,
    where_with_tensors,
    where_kept_last,
    folded_batch,
    batched_heads,
    baddbmm,
    einsum,
    einsum_the_other_way_round,
    key_permuted,
    query_scaled,
    scaled_after_mask,
    temperature,
    integer_mask,
    mask_of_two_dimensions,
    mask_of_one_dimension,
    relative_bias,
    windows,
    many_windows,
    windows_apart,
    heads_apart,
    mask_of_a_folded_batch,
    mask_subtracted,
    maximum_subtracted,
    maximum_of_two_outputs,
]


def attention(function, key_heads=HEADS, dtype=torch.float64):
    torch.manual_seed(0)
    return Attention(function, key_heads).to(dtype)


def example(dtype=torch.float64):
    """The last position of the second row is masked, by those who look."""
    torch.manual_seed(1)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, -1] = 0
    return {"x": torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype), "mask": mask}


def raised(function, key_heads=HEADS, dtype=torch.float64):
    """Before, after, and what the pass says."""
    before = prepared(attention(function, key_heads, dtype), example(dtype))
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (raise_attention,))
    return before, after, result


@pytest.mark.parametrize(
    ("function", "key_heads"),
    [*((function, HEADS) for function in WRITINGS), (grouped_queries, 1)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_is_raised_and_means_the_same(function, key_heads):
    before, after, result = raised(function, key_heads)
    assert result.changes == 1
    assert result.near_misses == []
    assert "softmax" not in text(after)
    assert text(after).count("scaled_dot_product_attention(") == 1
    given = example()
    was, now = run(before, given)[0], run(after, given)[0]
    seed = torch.randn_like(was)
    once, again = (relevance(graph, given, seed)["x"] for graph in (before, after))
    rounded = 1e-6 if function in (float32_softmax, softmax_in_the_type_of_scores) else 1e-9
    torch.testing.assert_close(now, was, rtol=0, atol=min(1e-7, rounded))
    torch.testing.assert_close(again, once, rtol=rounded, atol=rounded)


@pytest.mark.parametrize("composite", ["cp-lrp", "gradient"])
@pytest.mark.parametrize(
    "function", [relative_bias, windows, maximum_subtracted], ids=lambda function: function.__name__
)
def test_means_the_same_to_other_rules(function, composite):
    before, after, _ = raised(function)
    given, context = example(), PassContext(composite=COMPOSITES[composite])
    seed = torch.randn_like(run(before, given)[0])
    was, now = (relevance(graph, given, seed, context)["x"] for graph in (before, after))
    torch.testing.assert_close(now, was, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("function", WRITINGS, ids=lambda function: function.__name__)
def test_is_exact_in_float32(function):
    before, after, _ = raised(function, dtype=torch.float32)
    given = example(torch.float32)
    torch.testing.assert_close(run(after, given), run(before, given), rtol=1e-6, atol=1e-6)


class Bare(nn.Module):
    """Attention of queries, keys and values that are inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, q, k, v, mask):
        return self.function(self, q, k, v, mask)


def bare(function):
    """The graph before and after, of (batch, length, heads, features)."""
    torch.manual_seed(0)
    given = {name: torch.randn(BATCH, LENGTH, HEADS, FEATURES) for name in "qkv"}
    given["mask"] = example()["mask"]
    before = prepared(Bare(function), given, explain=("q", "k", "v"))
    after = copy_of(before)
    run_passes(after, PassContext(), (raise_attention,))
    return before, after


def scores_and_mask(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.transpose(2, 3) * 0.5).masked_fill(mask[:, None, None] == 0, -1e9)
    return scores.softmax(-1) @ v


def test_golden():
    before, after = bare(scores_and_mask)
    assert (
        text(before)
        == """\
source = ops.source(q, name='q')
source_1 = ops.source(k, name='k')
source_2 = ops.source(v, name='v')
transpose = aten.transpose(source, 1, 2)
transpose_1 = aten.transpose(source_1, 1, 2)
transpose_2 = aten.transpose(source_2, 1, 2)
transpose_3 = aten.transpose(transpose_1, 2, 3)
matmul = aten.matmul(transpose, transpose_3)
mul = aten.mul(matmul, 0.5)
unsqueeze = aten.unsqueeze(mask, 1)
unsqueeze_1 = aten.unsqueeze(unsqueeze, 2)
eq = aten.eq(unsqueeze_1, 0)
masked_fill = aten.masked_fill(mul, eq, -1e+09)
softmax = aten.softmax(masked_fill, -1)
matmul_1 = aten.matmul(softmax, transpose_2)
return [matmul_1]"""
    )
    assert (
        text(after)
        == """\
source = ops.source(q, name='q')
source_1 = ops.source(k, name='k')
source_2 = ops.source(v, name='v')
transpose = aten.transpose(source, 1, 2)
transpose_1 = aten.transpose(source_1, 1, 2)
transpose_2 = aten.transpose(source_2, 1, 2)
unsqueeze = aten.unsqueeze(mask, 1)
unsqueeze_1 = aten.unsqueeze(unsqueeze, 2)
eq = aten.eq(unsqueeze_1, 0)
zeros_like = aten.zeros_like(eq, dtype=torch.float32)
masked_fill = aten.masked_fill(zeros_like, eq, -3.40282e+38)
scaled_dot_product_attention = aten.scaled_dot_product_attention(
    transpose, transpose_1, transpose_2, scale=0.5, attn_mask=masked_fill
)
return [scaled_dot_product_attention]"""
    )


def test_golden_replayed_masks():
    """Masks one after the other act on the bias as they acted on the scores."""
    _, after = bare(where_with_tensors)
    assert (
        text(after)
        == """\
source = ops.source(q, name='q')
source_1 = ops.source(k, name='k')
source_2 = ops.source(v, name='v')
transpose = aten.transpose(source, 1, 2)
transpose_1 = aten.transpose(source_1, 1, 2)
transpose_2 = aten.transpose(source_2, 1, 2)
ones = aten.ones([5, 5], dtype=torch.bool)
tril = aten.tril(ones)
unsqueeze = aten.unsqueeze(mask, 1)
unsqueeze_1 = aten.unsqueeze(unsqueeze, 2)
eq = aten.eq(unsqueeze_1, 0)
zeros_like = aten.zeros_like(tril, dtype=torch.float32)
where = aten.where(tril, zeros_like, -3.40282e+38)
masked_fill = aten.masked_fill(where, eq, -3.40282e+38)
scaled_dot_product_attention = aten.scaled_dot_product_attention(
    transpose, transpose_1, transpose_2, scale=0.5, attn_mask=masked_fill
)
transpose_3 = aten.transpose(scaled_dot_product_attention, 1, 2)
return [transpose_3]"""
    )


def test_golden_folded_batch():
    """Query, key and value get the mask's batch, and the result goes back to its own."""
    _, after = bare(baddbmm)
    assert (
        text(after)
        == """\
source = ops.source(q, name='q')
source_1 = ops.source(k, name='k')
source_2 = ops.source(v, name='v')
transpose = aten.transpose(source, 1, 2)
reshape = aten.reshape(transpose, [6, 5, 4])
transpose_1 = aten.transpose(source_1, 1, 2)
reshape_1 = aten.reshape(transpose_1, [6, 5, 4])
transpose_2 = aten.transpose(source_2, 1, 2)
reshape_2 = aten.reshape(transpose_2, [6, 5, 4])
arange = aten.arange(6)
reshape_3 = aten.reshape(arange, [-1, 1, 1])
arange_1 = aten.arange(5)
reshape_4 = aten.reshape(arange_1, [1, 1, -1])
mul = aten.mul(reshape_3, reshape_4)
to = aten.to(mul, torch.float32)
ones = aten.ones([5, 5], dtype=torch.bool)
triu = aten.triu(ones, 1)
mul_1 = aten.mul(triu, -1e+09)
unsqueeze = aten.unsqueeze(mul_1, 0)
unsqueeze_1 = aten.unsqueeze(unsqueeze, 1)
reshape_5 = aten.reshape(reshape, [2, 3, 5, 4])
reshape_6 = aten.reshape(reshape_1, [2, 3, 5, 4])
mul_2 = aten.mul(to, 0.1)
reshape_7 = aten.reshape(mul_2, [2, 3, 1, 5])
add = aten.add(reshape_7, unsqueeze_1)
reshape_8 = aten.reshape(reshape_2, [2, 3, 5, 4])
scaled_dot_product_attention = aten.scaled_dot_product_attention(
    reshape_5, reshape_6, reshape_8, scale=0.5, attn_mask=add
)
reshape_9 = aten.reshape(scaled_dot_product_attention, [6, 5, 4])
reshape_10 = aten.reshape(reshape_9, [2, 3, 5, 4])
transpose_3 = aten.transpose(reshape_10, 1, 2)
return [transpose_3]"""
    )


def test_golden_einsum():
    """Two products of named indices are brought to one order, and the result to its own."""
    before, after = bare(einsum)
    assert (
        text(before)
        == """\
source = ops.source(q, name='q')
source_1 = ops.source(k, name='k')
source_2 = ops.source(v, name='v')
einsum = aten.einsum('bqhd, bkhd -> bhqk', [source, source_1])
mul = aten.mul(einsum, 0.5)
ones = aten.ones([5, 5], dtype=torch.bool)
triu = aten.triu(ones, 1)
mul_1 = aten.mul(triu, -1e+09)
unsqueeze = aten.unsqueeze(mul_1, 0)
unsqueeze_1 = aten.unsqueeze(unsqueeze, 1)
add = aten.add(mul, unsqueeze_1)
softmax = aten.softmax(add, -1)
einsum_1 = aten.einsum('bhqk,bkhd->bqhd', [softmax, source_2])
return [einsum_1]"""
    )
    assert (
        text(after)
        == """\
source = ops.source(q, name='q')
source_1 = ops.source(k, name='k')
source_2 = ops.source(v, name='v')
ones = aten.ones([5, 5], dtype=torch.bool)
triu = aten.triu(ones, 1)
mul = aten.mul(triu, -1e+09)
unsqueeze = aten.unsqueeze(mul, 0)
unsqueeze_1 = aten.unsqueeze(unsqueeze, 1)
permute = aten.permute(source, [0, 2, 1, 3])
permute_1 = aten.permute(source_1, [0, 2, 1, 3])
permute_2 = aten.permute(source_2, [0, 2, 1, 3])
scaled_dot_product_attention = aten.scaled_dot_product_attention(
    permute, permute_1, permute_2, scale=0.5, attn_mask=unsqueeze_1
)
permute_3 = aten.permute(scaled_dot_product_attention, [0, 2, 1, 3])
return [permute_3]"""
    )


def capped(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return (torch.tanh(q @ k.transpose(2, 3) / 5).mul(5).softmax(-1) @ v).transpose(1, 2)


def explained_bias(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return ((q @ k.transpose(2, 3) + k[..., :1].mT).softmax(-1) @ v).transpose(1, 2)


def sink(m, q, k, v, mask):
    """A column that only the softmax sees."""
    q, k, v = heads_first(q, k, v)
    column = m.bias[:, :, :1].expand(BATCH, -1, -1, -1)
    scores = torch.cat([q @ k.transpose(2, 3), column], -1)
    return (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)


def returned_weights(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    weights = (q @ k.transpose(2, 3)).softmax(-1)
    return (weights @ v).transpose(1, 2), weights


def explained_positions(m, q, k, v, mask):
    """What is added depends on the query: a product with embeddings of relative positions."""
    q, k, v = heads_first(q, k, v)
    return ((q @ k.mT + q @ m.bias[:, :FEATURES]).softmax(-1) @ v).transpose(1, 2)


def column_maximum(m, q, k, v, mask):
    """The maximum over the queries changes the weights."""
    q, k, v = heads_first(q, k, v)
    scores = q @ k.mT
    return ((scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v).transpose(1, 2)


def subtracted_from(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return ((m.bias - q @ k.mT).softmax(-1) @ v).transpose(1, 2)


def other_softmax(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return ((q @ k.transpose(2, 3)).softmax(-2) @ v).transpose(1, 2)


def weak_mask(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    scores = (q @ k.transpose(2, 3)).masked_fill(mask[:, None, None] == 0, -2.0)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def wide_mask(m, q, k, v, mask):
    """A mask of a wider dtype would have to be rounded."""
    q, k, v = (x.float() for x in heads_first(q, k, v))
    scores = q @ k.transpose(2, 3) + m.bias.double()
    return (scores.softmax(-1).float() @ v).transpose(1, 2)


def scaled_one_by_one(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return ((q @ k.transpose(2, 3) * m.bias).softmax(-1) @ v).transpose(1, 2)


def no_query(m, q, k, v, mask):
    """Weights from a linear layer: there is no product of query and key."""
    q, k, v = heads_first(q, k, v)
    weights = (q @ m.bias[0, :FEATURES]).softmax(-1)
    return (weights @ v).transpose(1, 2)


def broadcast_batch(m, q, k, v, mask):
    q, k, v = heads_first(q, k, v)
    return ((q @ k[:, :1].transpose(2, 3)).softmax(-1) @ v).transpose(1, 2)


def summed_twice(m, q, k, v, mask):
    scores = torch.einsum("bqhd,bkhd->bqk", q, k)
    return torch.einsum("bqk,bkhd->bqhd", scores.softmax(-1), v)


NEAR_MISSES = {
    capped: "the scores come from 'tanh', not from a product of query and key",
    explained_bias: "combines explained values: what it adds is not a constant mask",
    sink: "the weights are not the whole softmax, but its 'slice_",
    returned_weights: "'softmax' is used elsewhere too",
    explained_positions: "combines explained values: what it adds is not a constant mask",
    column_maximum: "combines explained values: what it adds is not a constant mask",
    subtracted_from: "does not simply add a mask",
    other_softmax: "the softmax is not over the last dimension",
    weak_mask: "'masked_fill' fills scores with what is no large negative number",
    wide_mask: "which does not fit into torch.float32",
    scaled_one_by_one: "scales the scores of a query one by one",
    no_query: "query, key and value have unlike batches",
    broadcast_batch: "query, key and value have unlike batches",
    summed_twice: "does not sum over one index: 'bqhd,bkhd->bqk'",
}


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda function: function.__name__)
def test_near_miss(function):
    before, after, result = raised(function)
    assert result.changes == 0
    assert text(after) == text(before)
    assert len(result.near_misses) == 1
    assert NEAR_MISSES[function] in result.near_misses[0]


@pytest.mark.parametrize("fill", [-1e9, LEAST, -torch.inf])
def test_row_masked_throughout(fill):
    """A finite fill leaves uniform weights, as the parts do; with -inf the parts give NaN."""

    def function(m, q, k, v, mask):
        q, k, v = heads_first(q, k, v)
        scores = (q @ k.transpose(2, 3)).masked_fill(mask[:, None, None] == 0, fill)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    before, after, result = raised(function, dtype=torch.float32)
    given = example(torch.float32)
    given["mask"][1] = 0
    was, now = run(before, given)[0], run(after, given)[0]
    assert result.changes == 1
    torch.testing.assert_close(now[0], was[0], rtol=1e-6, atol=1e-6)
    if math.isfinite(fill):
        torch.testing.assert_close(now[1], was[1], rtol=1e-6, atol=1e-6)
    else:
        assert was[1].isnan().all()
        assert now[1].eq(0).all()


class AnySize(nn.Module):
    """Folded and unfolded batches of any size."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, mask):
        batch, length, _ = x.shape
        q, k, v = (
            part(x)
            .view(batch, length, HEADS, FEATURES)
            .transpose(1, 2)
            .reshape(-1, length, FEATURES)
            for part in (self.q, self.k, self.v)
        )
        scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length)
        scores = scores.masked_fill(mask[:, None, None] == 0, LEAST)
        y = torch.bmm(scores.softmax(-1).view(-1, length, length), v)
        return y.view(batch, HEADS, length, FEATURES).transpose(1, 2).reshape(batch, length, WIDTH)


def test_any_batch_and_length():
    torch.manual_seed(0)
    before = prepared(AnySize().double(), example(), dynamic=True)
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (raise_attention,))
    assert result.changes == 1
    for batch, length in ((1, 1), (4, 9)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        given = {"x": torch.randn(batch, length, WIDTH, dtype=torch.float64), "mask": mask}
        torch.testing.assert_close(run(after, given), run(before, given), rtol=1e-12, atol=1e-12)


class AnyWindows(nn.Module):
    """Windows of any number of images, with a bias of the heads and a mask of the windows."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))

    def forward(self, x, mask):
        images, windows, length, _ = x.shape
        x = x.reshape(images * windows, length, WIDTH)
        q, k, v = (
            part(x).view(x.shape[0], length, HEADS, FEATURES).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        scores = q @ k.transpose(2, 3) * 0.5 + self.bias[:, :length, :length]
        scores = scores.view(x.shape[0] // windows, windows, HEADS, length, length)
        scores = (scores + mask[:, None]).view(-1, HEADS, length, length)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(images, windows, length, WIDTH)


def test_any_number_of_windows():
    torch.manual_seed(0)
    mask = torch.zeros(4, LENGTH, LENGTH, dtype=torch.float64)
    mask[1, :, 2:], mask[2, 0, 1:] = -torch.inf, LEAST
    given = {"x": torch.randn(2, 4, LENGTH, WIDTH, dtype=torch.float64), "mask": mask}
    before = prepared(AnyWindows().double(), given, dynamic=True)
    (x,) = (node for node in before.graph.nodes if node.name == "x")
    assert isinstance(x.meta["val"].shape[0], torch.SymInt)
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (raise_attention,))
    assert (result.changes, result.near_misses) == (1, [])
    for images in (1, 3):
        given["x"] = torch.randn(images, 4, LENGTH, WIDTH, dtype=torch.float64)
        was, now = run(before, given)[0], run(after, given)[0]
        seed = torch.randn_like(was)
        once, again = (relevance(graph, given, seed)["x"] for graph in (before, after))
        torch.testing.assert_close(now, was, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-9)


class AnyDistance(nn.Module):
    """A bias learned for each distance, computed from the length."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.distances = nn.Embedding(8, HEADS)

    def forward(self, x, mask):
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, HEADS, FEATURES).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        places = torch.arange(length)
        distance = (places[:, None] - places).abs().clamp(max=7)
        scores = q @ k.transpose(2, 3) + self.distances(distance).permute(2, 0, 1)[None]
        scores = scores + (1.0 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, WIDTH)


@pytest.mark.parametrize("composite", ["attnlrp", "cp-lrp", "gradient"])
def test_any_distance(composite):
    """Other batches and lengths, rows masked in part, and throughout where nothing is explained."""
    torch.manual_seed(0)
    before = prepared(AnyDistance().double(), example(), dynamic=True)
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (raise_attention,))
    assert (result.changes, result.near_misses) == (1, [])
    context = PassContext(composite=COMPOSITES[composite])
    for batch, length in ((1, 2), (4, 9)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[-1, 1:], mask[0] = 0, int(batch == 1)
        given = {"x": torch.randn(batch, length, WIDTH, dtype=torch.float64), "mask": mask}
        was, now = run(before, given)[0], run(after, given)[0]
        seed = torch.randn_like(was) * mask.any(-1)[:, None, None]
        once, again = (relevance(graph, given, seed, context)["x"] for graph in (before, after))
        torch.testing.assert_close(now, was, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-9)


LIBRARY = {
    "llama": ("LlamaForCausalLM", {"num_key_value_heads": 2}),
    "gpt2": ("GPT2LMHeadModel", {"n_inner": 48}),
    "bert": ("BertForSequenceClassification", {}),
    "t5": ("T5EncoderModel", {"d_model": 32, "d_kv": 8, "num_layers": LAYERS, "num_heads": 4}),
    "bloom": ("BloomForCausalLM", {}),
}

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "attn_implementation": "eager",
    "use_cache": False,
}


@pytest.mark.parametrize("name", LIBRARY)
def test_eager_attention_of_the_library(name):
    """Every layer of a model captured with its written-out attention is raised."""
    cls, config = LIBRARY[name]
    model = randomised(lambda: transformers_model(name, cls, **{**SIZES, **config})).double()
    ids = torch.arange(10).view(2, 5) + 4
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    before = captured(model, given)
    run_passes(before, PassContext(), (*NORMALISE, promote_casts, mark_sources))
    after = copy_of(before)
    (result,) = run_passes(after, PassContext(), (raise_attention,))
    assert (result.changes, result.near_misses) == (
        2 if name != "t5" else len(model.encoder.block),
        [],
    )
    was, now = run(before, given)[0], run(after, given)[0]
    seed = torch.randn_like(was)
    once, again = (relevance(graph, given, seed)["input_ids"] for graph in (before, after))
    torch.testing.assert_close(now, was, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again, once, rtol=1e-9, atol=1e-9)


def test_new_nodes_say_where_they_come_from():
    before, after, _ = raised(baddbmm)
    known = {node.name for node in before.graph.nodes}
    new = [node for node in after.graph.nodes if node.name not in known]
    assert len(new) > 5
    for node in new:
        assert node.meta["constructed_by"] == "raise_attention"
        assert node.meta["stack_trace"]
        assert module_path(node) == ""
