"""Graphs as Python: it parses, and each line says what stands there and where it comes from."""

import ast
import re

import pytest
from inspected import looked, printed

from attnlrp_fx import InputError


@pytest.mark.parametrize("which", ["captured", "rewritten", "program"])
def test_a_listing_is_python(which: str) -> None:
    text = str(looked().explainer.show(which))
    ast.parse(re.sub(r"\.\.\. \d+ more", "more", text))
    assert re.search(r"# inspected.py:\d+: h = self.norm\(x\)", text)
    assert "# blocks.2.norm (LayerNorm)" in text


def test_lines_say_who_made_them() -> None:
    lines = {line.node: line for line in looked().explainer.show("rewritten").lines}
    attention = next(line for line in lines.values() if "Attention" in line.rule)
    assert attention.constructed_by == "raise_attention"
    assert attention.source.endswith("x = x + torch.softmax(scores, -1) @ self.value(h)")
    assert attention.shape == "f64[s27, 1, s90, 8]" or attention.shape.startswith("f64[")
    program = looked().explainer.show("program").lines
    sides = {line.constructed_by.split(" of ")[0] for line in program}
    assert {"forward", "relevance"} <= sides
    assert any(line.constructed_by == f"relevance of {attention.node}" for line in program)


def test_a_terminal_gets_colours() -> None:
    shown = looked().explainer.show()
    assert "\x1b[" in printed(shown, color_system="truecolor", force_terminal=True)
    assert "\x1b[" not in printed(shown)


def test_there_are_three_graphs() -> None:
    with pytest.raises(InputError, match="use one of: captured, rewritten, program"):
        looked().explainer.show("compiled")
