"""Pictures of relevance flow, and the ranking of units, of explanations made by hand."""

import io
import math

import pytest
import torch
from rich.console import Console

from attnlrp_fx import Explanation, InputError, Latent, Latents


def latent(name, role, dims, relevance, **more):
    relevance = torch.as_tensor(relevance, dtype=torch.float32)
    batch = more.pop("batch", relevance.shape[0])
    units = relevance.shape[-1 if dims[1] != "head" else 1]
    return Latent(name, role, dims, relevance * 2, relevance, units, batch, **more)


@pytest.fixture
def explanation():
    generator = torch.Generator().manual_seed(0)
    stream = ("batch", "position", "feature")
    first, second = torch.randn(2, 2, 3, 4, generator=generator)
    neurons = torch.zeros(2, 3, 5)
    neurons[0, 1, 3], neurons[0, 2, 3], neurons[0, 0, 1], neurons[1, 0, 4] = (
        -5.0,
        1.0,
        2.0,
        math.nan,
    )
    neurons[1, 1, 0] = 0.5
    heads = torch.zeros(2, 2, 3, 4)
    heads[0, 1, 2] = torch.tensor([1.0, 2.0, -0.5, 0.5])
    return Explanation(
        relevance={"input_ids": torch.zeros(2, 3)},
        outputs=None,
        target_value=torch.tensor([1.5, -0.5]),
        target="logit",
        inputs={"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]])},
        tokens={"input_ids": [["a", "film", "!"], ["so", "dull", "[PAD]"]]},
        mask={"input_ids": torch.tensor([[1, 1, 1], [1, 1, 0]])},
        latent=Latents(
            [
                latent("net.0", "residual", stream, first),
                latent("net.1", "residual", stream, second),
                latent("net.1.mlp", "mlp.neurons", ("batch", "position", "neuron"), neurons),
                latent(
                    "net.1.attn", "attention.heads", ("batch", "head", "position", "feature"), heads
                ),
            ]
        ),
    )


def printed(drawn, **options):
    console = Console(file=io.StringIO(), width=70, **options)
    console.print(drawn)
    return console.file.getvalue()


def test_flow_is_relevance_by_layer_and_position(explanation):
    flow = explanation.flow()
    assert list(flow.values) == ["net.0", "net.1"]
    expected = explanation.latent["net.0"].relevance.sum(-1)
    torch.testing.assert_close(flow.values["net.0"], expected)
    page = flow.to_html()
    strongest = max(flow.values["net.1"][0].tolist(), key=abs)
    assert f"{strongest:+.7g}"[:6] in page
    assert page.count("<table>") == 2
    assert "[PAD]" not in page


def test_flow_on_a_terminal_with_and_without_colour(explanation):
    coloured = printed(explanation.flow(), force_terminal=True, color_system="truecolor")
    assert "film" in coloured
    assert "\x1b[48;2;" in coloured
    plain = printed(explanation.flow(), no_color=True, color_system=None)
    assert "film" in plain
    assert "\x1b" not in plain


def test_flow_as_a_figure_has_a_cell_a_layer_and_token(explanation):
    images = [image for axes in explanation.flow().figure().axes for image in axes.images]
    assert [image.get_array().shape for image in images] == [(2, 3), (2, 2)]


def test_flow_without_sequences_is_an_error(explanation):
    with pytest.raises(InputError, match="residual"):
        explanation.flow("router")


def test_the_strongest_neurons_over_all_positions_or_at_each(explanation):
    first, second = explanation.top_neurons(2)
    assert [(unit.unit, unit.position, unit.relevance) for unit in first] == [
        (3, None, -4.0),
        (1, None, 2.0),
    ]
    assert second[0][:4] == ("net.1.mlp", 0, None, 0.5)
    assert all(math.isfinite(unit.relevance) for unit in second)
    (best, *_), _ = explanation.top_neurons(3, each_position=True)
    assert best[1:] == (3, 1, -5.0, -10.0)


def test_heads_are_summed_over_their_features(explanation):
    best = explanation.top_heads(1)[0][0]
    assert (best.site, best.unit, best.relevance) == ("net.1.attn", 1, 3.0)
    with pytest.raises(InputError, match="no such units"):
        explanation.top_experts(1)


def test_a_row_has_its_own_latent_values_without_padding(explanation):
    row = explanation.row(1).latent
    assert row["net.0"].relevance.shape == (1, 2, 4)
    assert row["net.1.attn"].activation.shape == (1, 2, 2, 4)
    assert torch.equal(row["net.0"].relevance[0], explanation.latent["net.0"].relevance[1, :2])
