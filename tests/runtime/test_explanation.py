"""The result of an explanation: its checks, its data forms, and that nothing of it is half done."""

import builtins
import io
import json
import math
import os

import pytest
import torch
from rich.console import Console

from attnlrp_fx.errors import InputError, MissingExtraError
from attnlrp_fx.heatmap import Display, Normalisation
from attnlrp_fx.runtime.explanation import SCHEMA, Explanation

TOKENS = [["[CLS]", "very", "good", "[SEP]"], ["[PAD]", "[CLS]", "bad", "[SEP]"]]


def explain(**changes):
    """Two rows, the second padded on the left."""
    fields = {
        "relevance": {
            "input_ids": torch.tensor([[0.0, 0.5, 2.0, -0.25], [0.0, 0.0, -1.0, 0.125]]),
        },
        "outputs": object(),
        "target_value": torch.tensor([2.5, -1.0]),
        "target": "logit 'positive' (1)",
        "inputs": {"input_ids": torch.tensor([[101, 7, 8, 102], [0, 101, 9, 102]])},
        "tokens": {"input_ids": TOKENS},
        "mask": {"input_ids": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])},
    }
    return Explanation(**(fields | changes))


def with_floats(batch=2, **changes):
    torch.manual_seed(0)
    relevance = {
        **explain().relevance,
        "pixel_values": torch.randn(batch, 3, 4, 5),
        "patches": torch.randn(7, 2),
    }
    return explain(relevance=relevance, **changes)


def without(monkeypatch, package):
    """Importing ``package`` fails, as where it is not installed."""
    actual = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return actual(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


# Checks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_value": torch.zeros(2, 1)}, r"target_value has shape \(2, 1\)"),
        ({"labels": ["one"]}, "1 labels for a batch of 2"),
        ({"relevance": {"x": torch.zeros(2, 4, dtype=torch.long)}}, "int64, not floating"),
        ({"relevance": {"input_ids": torch.zeros(2, 4, 3)}}, r"must be \(2, sequence\)"),
        ({"mask": {"input_ids": torch.ones(2, 3)}}, r"mask of 'input_ids' has shape \(2, 3\)"),
        ({"inputs": {"input_ids": torch.ones(2, 5).long()}}, "input 'input_ids' has shape"),
        ({"tokens": {"input_ids": [["a"] * 4, ["a"] * 3]}}, r"number \[4, 3\]"),
    ],
)
def test_fields_that_do_not_agree_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        explain(**changes)


def test_it_is_frozen_and_prints_briefly():
    explanation = explain()
    with pytest.raises(AttributeError):
        explanation.target = "other"
    assert len(explanation) == 2
    assert repr(explanation) == (
        "Explanation(target=\"logit 'positive' (1)\", batch=2, relevance: input_ids (2, 4))"
    )


# Rows


def test_a_row_alone_has_no_padding_on_its_right():
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]])
    inputs = {
        "input_ids": torch.tensor([[101, 7, 8, 102], [0, 101, 9, 102]]),
        "attention_mask": mask,
        "boxes": torch.zeros(2, 4, 5),
        "features": torch.zeros(2, 7),
        "decoder_input_ids": torch.ones(2, 4).long(),
    }
    whole = explain(
        mask={"input_ids": mask},
        inputs=inputs,
        labels=["yes", "no"],
        target_index=torch.tensor([1, 0]),
        outputs={"logits": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "loss": torch.tensor(5.0)},
        ledger="of the batch",
    )
    row = whole.row(-1)
    assert len(row) == 1
    assert row.relevance["input_ids"].tolist() == [[0.0, 0.0, -1.0]]
    assert row.inputs["input_ids"].tolist() == [[0, 101, 9]]
    assert row.mask["input_ids"].tolist() == [[0, 1, 1]], "what is left out elsewhere stays"
    assert row.tokens == {"input_ids": [["[PAD]", "[CLS]", "bad"]]}
    shapes = {name: tuple(value.shape) for name, value in row.inputs.items()}
    assert shapes["boxes"] == (1, 3, 5)
    assert shapes["features"] == (1, 7)
    assert shapes["decoder_input_ids"] == (1, 4), "a sequence of another mask"
    assert (row.labels, row.target_index.tolist(), row.ledger) == (["no"], [0], None)
    assert row.target_value.tolist() == [-1.0]
    assert row.outputs["logits"].tolist() == [[3.0, 4.0]]
    assert row.outputs["loss"] == 5.0
    assert row.top(1) == [whole.top(1)[1]]
    assert row.relevance["input_ids"].untyped_storage().nbytes() == 3 * 4, "a copy"


def test_a_row_by_given_lengths():
    row = explain().row(0, {"input_ids": 2})
    assert row.relevance["input_ids"].tolist() == [[0.0, 0.5]]
    assert row.tokens == {"input_ids": [["[CLS]", "very"]]}


def test_a_row_has_what_belongs_to_no_row_only_alone():
    assert "patches" not in with_floats().row(0).relevance
    alone = Explanation(
        relevance={"patches": torch.ones(7, 2)},
        outputs=None,
        target_value=torch.zeros(1),
        target="logit",
        inputs={},
        ledger="all of it",
    )
    assert alone.row(0).relevance["patches"].shape == (7, 2)
    assert alone.row(0).ledger == "all of it"


@pytest.mark.parametrize("index", [2, -3])
def test_a_row_that_does_not_exist(index):
    with pytest.raises(InputError, match=f"no row {index}"):
        explain().row(index)


# top


def test_top_ranks_by_magnitude_and_leaves_padding_out():
    first, second = explain().top(2)
    assert [tuple(entry) for entry in first] == [
        ("input_ids", 2, "good", 2.0),
        ("input_ids", 1, "very", 0.5),
    ]
    assert [(entry.position, entry.relevance) for entry in second] == [(2, -1.0), (3, 0.125)]
    assert [len(row) for row in explain().top(99)] == [4, 3]


def test_top_leaves_out_what_has_no_rank():
    relevance = torch.tensor([[math.nan, math.inf, 1.0, 0.0]] * 2)
    assert explain(relevance={"input_ids": relevance}).top(1)[0][0].token == "good"


def test_top_of_several_inputs_and_of_one():
    both = explain(
        relevance={**explain().relevance, "decoder_input_ids": torch.full((2, 1), 9.0)},
        tokens={"input_ids": TOKENS, "decoder_input_ids": [["x"], ["y"]]},
    )
    assert both.top(1)[0][0].input == "decoder_input_ids"
    assert both.top(1, input="input_ids")[0][0].token == "good"


def test_top_refuses_what_it_cannot_rank():
    with pytest.raises(InputError, match="at least 1"):
        explain().top(0)
    with pytest.raises(InputError, match=r"'pixel_values' is not a token input(.|\n)*'input_ids'"):
        with_floats().top(1, input="pixel_values")


# Data


def test_to_dict_follows_its_schema():
    data = explain(labels=["positive", "positive"]).to_dict()
    assert data == {
        "schema": SCHEMA,
        "target": "logit 'positive' (1)",
        "rows": [
            {
                "label": "positive",
                "target_value": 2.5,
                "relevance_sum": 2.25,
                "inputs": {
                    "input_ids": {
                        "kind": "tokens",
                        "positions": [0, 1, 2, 3],
                        "ids": [101, 7, 8, 102],
                        "tokens": ["[CLS]", "very", "good", "[SEP]"],
                        "relevance": [0.0, 0.5, 2.0, -0.25],
                    }
                },
            },
            {
                "label": "positive",
                "target_value": -1.0,
                "relevance_sum": -0.875,
                "inputs": {
                    "input_ids": {
                        "kind": "tokens",
                        "positions": [1, 2, 3],
                        "ids": [101, 9, 102],
                        "tokens": ["[CLS]", "bad", "[SEP]"],
                        "relevance": [0.0, -1.0, 0.125],
                    }
                },
            },
        ],
        "batch_inputs": {},
    }


def test_to_dict_holds_floats_by_row_and_the_batchs_own_once():
    explanation = with_floats()
    data = explanation.to_dict()
    values = data["rows"][1]["inputs"]["pixel_values"]
    assert values["shape"] == [3, 4, 5]
    expected = explanation.relevance["pixel_values"][1]
    torch.testing.assert_close(torch.tensor(values["relevance"]), expected)
    assert list(data["batch_inputs"]) == ["patches"]
    assert "patches" not in data["rows"][0]["inputs"]


def test_one_row_owns_every_input():
    relevance = {"input_ids": torch.ones(1, 2), "patches": torch.ones(7, 2)}
    single = Explanation(relevance, None, torch.tensor([1.0]), "t", {}, {"input_ids": [["a", "b"]]})
    data = single.to_dict()
    assert data["batch_inputs"] == {}
    assert data["rows"][0]["inputs"]["patches"]["shape"] == [7, 2]
    assert data["rows"][0]["inputs"]["input_ids"]["ids"] is None


def test_not_finite_becomes_null():
    relevance = torch.tensor([[math.nan, math.inf, 1.0, 0.0]] * 2)
    data = explain(relevance={"input_ids": relevance, "x": relevance}).to_dict()
    assert data["rows"][0]["inputs"]["input_ids"]["relevance"] == [None, None, 1.0, 0.0]
    assert data["rows"][0]["inputs"]["x"]["relevance"] == [None, None, 1.0, 0.0]
    assert data["rows"][0]["relevance_sum"] is None
    json.dumps(data, allow_nan=False)


def test_json_round_trip(tmp_path):
    explanation = with_floats()
    path = tmp_path / "explanation.json"
    explanation.to_json(path)
    assert json.loads(path.read_text("utf-8")) == explanation.to_dict()


@pytest.mark.parametrize("write", ["to_json", "to_html"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write):
    path = tmp_path / "kept"
    path.write_text("old")

    def fail(*paths):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        getattr(explain(), write)(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions and links as on POSIX")
def test_a_write_follows_links_and_gets_ordinary_permissions(tmp_path):
    plain, goal, link = tmp_path / "plain", tmp_path / "goal", tmp_path / "link"
    plain.touch()
    goal.touch()
    link.symlink_to(goal)
    explain().to_json(link)
    assert link.is_symlink()
    assert json.loads(goal.read_text())["schema"] == SCHEMA
    assert goal.stat().st_mode == plain.stat().st_mode


def test_writing_into_no_directory_says_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        explain().to_json(tmp_path / "missing" / "x.json")


def test_to_pandas_has_a_line_a_token():
    pytest.importorskip("pandas")
    table = explain().to_pandas()
    assert list(table.columns) == ["row", "input", "position", "token", "relevance"]
    assert len(table) == 7
    second = table[table.row == 1]
    assert second.position.tolist() == [1, 2, 3]
    assert second.token.tolist() == ["[CLS]", "bad", "[SEP]"]
    assert second.relevance.tolist() == [0.0, -1.0, 0.125]


def test_to_pandas_has_a_line_a_float_with_its_index():
    pytest.importorskip("pandas")
    explanation = with_floats()
    table = explanation.to_pandas()
    pixels = table[(table.input == "pixel_values") & (table.row == 1)]
    assert len(pixels) == 60
    line = pixels[(pixels.index_0 == 2) & (pixels.index_1 == 3) & (pixels.index_2 == 4)]
    assert line.relevance.item() == pytest.approx(
        explanation.relevance["pixel_values"][1, 2, 3, 4].item()
    )
    assert pixels.position.isna().all()
    patches = table[table.input == "patches"]
    assert patches.row.isna().all()
    assert len(patches) == 14


# Pictures


def shown(explanation, **options):
    out = io.StringIO()
    Console(file=out, width=100, **options).print(explanation)
    return out.getvalue()


def test_html_hides_padding_and_shows_every_row(tmp_path):
    path = tmp_path / "page.html"
    page = explain().to_html(path)
    assert path.read_text("utf-8") == page
    assert page.startswith("<!doctype html>")
    assert "[PAD]" not in page
    assert page.count("<section>") == 2
    assert "Row 0 · logit" in page
    assert "Row 1 · logit" in page


def test_relevance_in_padding_is_not_passed_over():
    explanation = explain(mask={"input_ids": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])})
    assert "Padding of input_ids holds relevance that is not shown: -1" in explanation.to_html()


def test_notebook_shows_a_fragment_with_every_input():
    fragment = with_floats()._repr_html_()
    assert fragment.startswith('<div class="attnlrp">')
    assert fragment.count("data:image/png") == 3
    assert "All rows" in fragment


def test_without_tokenizer_ids_stand_for_tokens():
    assert "101" in explain(tokens=None).to_html()
    bare = explain(tokens=None, inputs={})
    assert bare.top(1)[0][0].token == "[2]"


@pytest.mark.parametrize(
    ("target", "label", "title"),
    [
        ("highest logit", "great", "highest logit: great"),
        ("logit 'great' (1)", "great", "logit 'great' (1)"),
        ("logit 10", "1", "logit 10: 1"),
    ],
)
def test_title_names_the_label_once(target, label, title):
    explanation = explain(target=target, labels=[label, label])
    assert explanation.sections()[0].heading == f"Row 0 · {title}"


def test_terminal_with_and_without_colour(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = shown(explain(), force_terminal=True, color_system="truecolor")
    assert "\x1b[" in coloured
    assert "against | for" not in coloured
    for plain in (
        shown(explain()),
        shown(explain(), force_terminal=True, color_system="truecolor", no_color=True),
    ):
        assert "against | for" in plain
        assert "good" in plain
        assert "[PAD]" not in plain


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = shown(explain(), force_terminal=True, color_system="truecolor")
    assert "against | for" in out


def test_figure_is_matplotlibs():
    figure = pytest.importorskip("matplotlib.figure")
    assert isinstance(with_floats().figure(), figure.Figure)


# Images


def with_images(shape=(2, 3, 4, 5), **changes):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(shape, generator=generator)
    return explain(
        relevance={"pixel_values": torch.randn(shape, generator=generator)},
        inputs={"pixel_values": (pixels - 0.5) / 0.25},
        tokens=None,
        mask=None,
        **changes,
    ), pixels


def test_an_image_is_shown_as_it_was_before_its_normalisation():
    explanation, pixels = with_images(normalisation=Normalisation((0.5,), (0.25,)))
    for row, section in enumerate(explanation.sections()):
        (grid,) = section.grids
        wanted = pixels[row].permute(1, 2, 0).double()
        torch.testing.assert_close(grid.backdrop.pixels, wanted)
    assert explanation.to_html().count("data:image/png") == 4
    stretched, _ = with_images()
    assert "the image is stretched" in stretched.to_html()


def test_the_display_reaches_every_picture(tmp_path):
    explanation, _ = with_images()
    display = Display(smooth=2, overlay=False)
    page = explanation.to_html(tmp_path / "page.html", display)
    assert page.count("σ=2 pixels") == 2
    assert (tmp_path / "page.html").read_text() == page
    assert "σ=" not in explanation.to_html()
    pytest.importorskip("matplotlib")
    drawing = explanation.figure(display)
    shapes = [image.get_array().shape for axes in drawing.axes for image in axes.images]
    assert shapes == [(4, 5, 3), (4, 5)] * 2


@pytest.mark.parametrize("shape", [(2, 5, 4, 5), (2, 2, 3, 4, 5), (2, 4, 5), (1, 3, 4, 5)])
def test_what_is_no_image_of_a_row_is_drawn_alone(shape):
    explanation, _ = with_images(shape)
    grids = [grid for section in explanation.sections() for grid in section.grids]
    assert [grid.backdrop for grid in grids] == [None] * len(grids)
    assert explanation.to_html().count("data:image/png") == len(grids) > 0


def test_relevance_without_its_input_is_drawn_alone():
    explanation = with_floats()
    assert not explanation.has_images("pixel_values")
    assert "image is stretched" not in explanation.to_html()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_that_require_grad_are_read(dtype):
    relevance = torch.ones(2, 4, dtype=dtype, requires_grad=True)
    explanation = explain(
        relevance={"input_ids": relevance, "x": relevance},
        target_value=relevance[:, 0],
    )
    explanation.to_dict()
    explanation.to_html()


@pytest.mark.parametrize(
    ("package", "method", "extra"),
    [("pandas", "to_pandas", "pandas"), ("matplotlib", "figure", "plot")],
)
def test_missing_extras_say_what_to_install(monkeypatch, package, method, extra):
    without(monkeypatch, package)
    with pytest.raises(MissingExtraError, match=rf"pip install 'attnlrp_fx\[{extra}\]'"):
        getattr(explain(), method)()
