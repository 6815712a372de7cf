"""Did I miss a matmul? Every op on the path has an answer."""

from collections import Counter

import torch
from inspected import looked, printed
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import Composite, Match
from attnlrp_fx.rules.composites import COMPOSITES


def test_every_op_is_listed_once() -> None:
    """All products of the model as it was captured: 6 linear and 2 matmul a block, and the last."""
    found = looked().explainer.check()
    assert found.missing == ()
    assert found.products == 3 * (6 + 2) + 1
    counts = Counter[str]()
    for row in found.rows:
        counts[row.op] += row.count
        assert row.authority
    assert counts["aten.softmax.int"] == 3
    matmul = [row for row in found.rows if row.op == "aten.matmul.default"]
    assert [(row.rule, row.authority) for row in matmul] == [
        ("Attention(weights=0.5)", "raise_attention, kind=attention")
    ]
    assert "all " in found.verdict
    assert f"✓ all {found.ops} ops on the path have a rule" in printed(found)


class Odd(nn.Module):
    """An op in the middle that a composite may not know."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3) → (batch, 3)."""
        return torch.softmax(x * 2, -1) + x


def test_an_op_without_a_rule_is_named() -> None:
    entries = [(m, r) for m, r in COMPOSITES["attnlrp"].entries if m.kind != "softmax"]
    explainer = attnlrp_fx.compile(
        Odd().eval(),
        torch.ones(2, 3),
        composite=Composite("partial", tuple(entries)),
        backend="eager",
        fallback="gradient",
    )
    found = explainer.check()
    assert len(found.missing) == 1
    assert "softmax" in found.missing[0]
    assert "torch.softmax(x * 2, -1) + x" in found.missing[0]
    assert found.rows[0].authority == ""
    assert found.verdict == "1 of 3 ops on the path have no rule"
    assert "no rule" in printed(found)


def test_the_entry_that_matched_is_named() -> None:
    composite = COMPOSITES["attnlrp"].with_rules(
        (Match(module="blocks.1.*", kind="linear"), attnlrp_fx.Epsilon(0.1))
    )
    found = looked().explainer.with_composite(composite).check()
    by = {row.authority for row in found.rows if row.rule == "Epsilon(epsilon=0.1)"}
    assert by == {"kind=linear, module=blocks.1.*"}
