"""Explanations of the same images side by side."""

import io
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

import attnlrp_fx
from attnlrp_fx import Comparison, Display, Explanation, InputError

NAMES = ("attnlrp", "cp-lrp", "gradient")


def explanation(seed=0, shape=(2, 3, 6, 6), name="pixel_values", **changes):
    """Relevance by ``seed`` of the images that all have in common."""
    given = torch.rand(shape, generator=torch.Generator().manual_seed(7))
    relevance = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    fields = {
        "relevance": {name: relevance},
        "outputs": None,
        "target_value": relevance.sum((1, 2, 3)),
        "target": "logit 3",
        "inputs": {name: given},
    }
    return Explanation(**(fields | changes))


def comparison():
    return Comparison({name: explanation(i) for i, name in enumerate(NAMES)})


def test_a_page_has_each_image_and_a_panel_an_explanation(tmp_path):
    page = comparison().to_html(tmp_path / "page.html", Display(smooth=1))
    assert (tmp_path / "page.html").read_text() == page
    assert page.count("<section>") == 2
    assert page.count("data:image/png") == 2 * (1 + len(NAMES))
    assert "Row 1 · logit 3" in page
    assert page.count("σ=1 pixels") == 2
    for name in NAMES:
        assert page.count(f">{name}<") == 2
    assert comparison()._repr_html_().startswith('<div class="attnlrp">')


def test_a_figure_has_them_too():
    pytest.importorskip("matplotlib")
    drawing = comparison().figure(Display(overlay=False))
    shapes = [image.get_array().shape for axes in drawing.axes for image in axes.images]
    assert shapes == [(6, 6, 3), *[(6, 6)] * len(NAMES)] * 2
    data = io.BytesIO()
    drawing.savefig(data, format="png", dpi=40)
    assert data.getvalue().startswith(b"\x89PNG")


def test_a_terminal_lists_all():
    out = io.StringIO()
    Console(file=out, width=100).print(comparison())
    for name in NAMES:
        assert f"Row 0 · {name} · logit 3" in out.getvalue()


def test_composites_of_one_model_compare():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    images = torch.rand(1, 3, 6, 6)
    processor = SimpleNamespace(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    found = {
        name: attnlrp_fx.compile(
            model, images, composite=name, backend="eager", processor=processor
        )(images)
        for name in NAMES
    }
    page = Comparison(found).to_html()
    assert page.count("data:image/png") == 1 + len(NAMES)
    assert "stretched" not in page


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"b": explanation(name="x")}, r"'a' and 'b' are not of the same images(.|\n)*x \(2, 3"),
        ({"b": explanation(shape=(1, 3, 6, 6))}, "not of the same images"),
        ({"b": explanation(inputs={"pixel_values": torch.zeros(2, 3, 6, 6)})}, "not of the same"),
        ({"b": explanation(inputs={})}, r"not of the same images(.|\n)*is not none"),
    ],
)
def test_other_images_are_refused(others, message):
    with pytest.raises(InputError, match=message):
        Comparison({"a": explanation(), **others})


def test_images_of_other_precision_are_the_same():
    coarse = explanation().inputs["pixel_values"].bfloat16()
    Comparison({"a": explanation(), "b": explanation(inputs={"pixel_values": coarse})})


def test_nothing_and_no_image_are_refused():
    with pytest.raises(InputError, match="nothing to compare"):
        Comparison({})
    with pytest.raises(InputError, match=r"no images to compare(.|\n)*explanation 'text'"):
        Comparison({"text": explanation(inputs={})})
