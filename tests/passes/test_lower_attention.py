"""lower_attention: fused attention written out gives the same values."""

import pytest
import torch
import torch.nn.functional as F
from rewriting import captured, copy_of, run
from torch import nn

from attnlrp_fx.passes import PassContext, lower_attention, mark_sources, run_passes

BOOL = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
FLOAT = torch.where(BOOL, torch.tensor([0.0, 1.0, -2.0, 0.5]), -torch.inf)


class Fused(nn.Module):
    """The fused op, with a mask or none."""

    def __init__(self, attn_mask=None, **options):
        super().__init__()
        self.register_buffer("mask", attn_mask)
        self.options = options

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, **self.options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"attn_mask": BOOL},
        {"attn_mask": FLOAT},
        {"is_causal": True},
        {"enable_gqa": True},
    ],
    ids=["plain", "scale", "bool", "float", "causal", "grouped"],
)
def test_the_values_are_those_of_the_fused_op(options):
    torch.manual_seed(0)
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 4, 8), torch.randn(2, heads, 4, 8)
    model = Fused(**options).eval()
    given = {"q": q, "k": k, "v": v}
    graph = captured(model, given)
    now = copy_of(graph)
    context = PassContext(latent=("attention.weights",))
    results = run_passes(now, context, (mark_sources, lower_attention))
    assert results[-1].changes == 1
    assert not any("scaled_dot" in str(node.target) for node in now.graph.nodes)
    torch.testing.assert_close(run(now, given), run(graph, given), equal_nan=True)


def test_attention_stays_whole_where_its_weights_are_not_asked_for():
    given = {name: torch.randn(2, 4, 3, 8) for name in "qkv"}
    graph = captured(Fused().eval(), given)
    results = run_passes(graph, PassContext(latent=("residual",)), (mark_sources, lower_attention))
    assert results[-1].changes == 0
