"""Terminals of every kind show relevance, and no token can act on them."""

import re

import pytest
from drawn import grid, printed, section, strip

from attnlrp_fx.heatmap.terminal import INDEXED, bar, colour_name


@pytest.mark.parametrize("colours", ["truecolor", "256", "standard", "windows"])
def test_terminal_paints_tokens_and_shows_the_scale(colours):
    out = printed([section(strip(["Ġgood", "Ġbad"], [1.0, -0.5], "byte"), value=2.0)], colours)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    assert "good bad" in plain
    assert "value +2" in plain
    assert "sum of relevance +0.5" in plain
    assert "-1 " in plain.splitlines()[2]
    assert out.count("\x1b[") > 10


@pytest.mark.parametrize("colours", list(INDEXED))
def test_indexed_ramps_are_symmetric_and_readable(colours):
    ramp = INDEXED[colours]
    assert len(ramp) % 2 == 1
    assert len(set(ramp)) == len(ramp)
    assert colour_name(0, colours) == f"color({ramp[len(ramp) // 2]})"
    assert colour_name(-1, colours) == f"color({ramp[0]})"
    assert colour_name(1, colours) == f"color({ramp[-1]})"


def test_terminal_without_colour_ranks_tokens_with_signed_bars():
    out = printed([section(strip(["good", "so", "bad"], [1.0, 0.0, -0.5]))], None)
    assert "\x1b[" not in out
    lines = [line.split() for line in out.splitlines()]
    assert ["0", "good", "+1", "|██████████"] in lines
    assert ["2", "bad", "-0.5", "█████|"] in lines
    assert "so" not in [word for line in lines for word in line[:2]]
    header, first = out.splitlines()[1:3]
    assert header.index("|") == first.index("|")


def test_terminal_says_how_many_tokens_are_not_listed():
    out = printed([section(strip(["x"] * 14, [1.0] * 14))], None)
    assert "4 weaker tokens are not listed" in out


def test_ascii_bars():
    assert bar(-0.5, ascii_only=True).strip() == "#####|"


def test_terminal_lets_no_escape_sequence_or_markup_through():
    row = section(strip(["\x1b[2J", "[red]x[/red]"], [1.0, 2.0]), title="\x1b]0;t\x07 [bold]")
    for colours in ("truecolor", None):
        out = printed([row], colours)
        assert "\x1b[2J" not in out
        assert "\x1b]0" not in out
        assert "[red]x[/red]" in out


@pytest.mark.parametrize("colours", ["truecolor", "256", None])
def test_terminal_draws_float_inputs(colours):
    out = printed([section(grids=[grid(3, 5, 6), grid(4)])], colours)
    assert "pixel_values 3" in out
    assert ("▀" in out) == (colours is not None)
