"""The command line: every option, every error, and what goes to which stream."""

import gc
import json
import os
import subprocess
import sys
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import attnlrp_fx
from attnlrp_fx import Display, Logit, cli
from attnlrp_fx.cli import app
from attnlrp_fx.codegen import backends
from attnlrp_fx.errors import InputError, ModelNotFoundError
from attnlrp_fx.heatmap import PLAIN
from attnlrp_fx.loading import DTYPES, EMBEDDED, IMAGES, TASKS, load, task_of
from attnlrp_fx.runtime.explanation import SCHEMA, Explanation

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS += ["the", "movie", "was", "a", "great", "terrible", "film", "it", "good", "bad"]
POSITIONS = 24
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": POSITIONS,
}


def word_tokenizer(ends):
    """A word a token; texts of an encoder have a first and a last token."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if ends:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )


def bart_config():
    return BartConfig(
        vocab_size=len(WORDS),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        decoder_start_token_id=2,
        forced_eos_token_id=3,
    )


MODELS = {
    "sentiment": lambda: BertForSequenceClassification(
        BertConfig(**SIZES, id2label={0: "negative", 1: "positive"})
    ),
    "names": lambda: BertForTokenClassification(
        BertConfig(**SIZES, id2label={0: "O", 1: "NAME", 2: "PLACE"})
    ),
    "answers": lambda: BertForQuestionAnswering(BertConfig(**SIZES)),
    "base": lambda: BertModel(BertConfig(**SIZES)),
    "writer": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
    "translator": lambda: BartForConditionalGeneration(bart_config()),
}


DIGITS = {i: f"digit {i}" for i in range(4)}
SEERS = {
    "seer": lambda: ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            id2label=DIGITS,
        )
    ),
    "grey": lambda: ResNetForImageClassification(
        ResNetConfig(
            num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], id2label=DIGITS
        )
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of tiny random models, by name, as save_pretrained writes them."""
    root = tmp_path_factory.mktemp("models")
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(root / name)
        word_tokenizer(ends=name != "writer").save_pretrained(root / name)
    for name, build in SEERS.items():
        torch.manual_seed(0)
        build().save_pretrained(root / name)
        channels = 1 if name == "grey" else 3
        ViTImageProcessorPil(
            size={"height": 8, "width": 8}, image_mean=[0.5] * channels, image_std=[0.25] * channels
        ).save_pretrained(root / name)
    if bars:
        transformers_logging.enable_progress_bar()
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two image files of other sizes, and one that is cut off."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("images")
    for name, size, seed in (("a.png", (8, 8), 1), ("b.png", (20, 12), 2)):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randint(256, (size[0] * size[1] * 3,), generator=generator)
        image.frombytes("RGB", size, bytes(noise.tolist())).save(root / name)
    (root / "cut.png").write_bytes((root / "a.png").read_bytes()[:90])
    (root / "words.png").write_text("no image")
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """No test may wait for a network that is not there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def run(*arguments, **environment):
    return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)


def explain(*arguments, **environment):
    return run("explain", *arguments, **environment)


def explained(path, *arguments):
    """What a successful call writes as JSON, and the call itself."""
    result = explain(*arguments, "--json", path)
    assert result.exit_code == 0, result.stderr
    return json.loads(path.read_text()), result


def error_of(result):
    """The one line of an error, after its 'error: '; nothing went to standard output."""
    assert result.exit_code == 1
    assert result.stdout == ""
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    return line.removeprefix("error: ")


def logits(model, **inputs):
    loaded, _ = load(model)
    with torch.no_grad():
        return loaded(**{name: torch.tensor(ids) for name, ids in inputs.items()}).logits


# What it explains


def test_it_writes_what_the_python_interface_computes(models, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "picture.svg"
    text = "the movie was great"
    arguments = (text, "--model", models / "sentiment", "--html", page, "--figure", picture)
    got, result = explained(tmp_path / "numbers.json", *arguments, "--audit", "--report")

    model, tokenizer = load(models / "sentiment")
    wanted = attnlrp_fx.explain(model, tokenizer, text)
    assert got == wanted.to_dict()
    assert got["schema"] == SCHEMA
    assert got["rows"][0]["inputs"]["input_ids"]["tokens"] == ["[CLS]", *text.split(), "[SEP]"]
    assert page.read_text() == wanted.to_html()
    assert picture.read_text().startswith("<?xml")
    for expected in ("highest logit", "ledger: target", "composite attnlrp", "great"):
        assert expected in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "numbers.json",
        "page.html",
        "picture.svg",
    ]


def test_progress_goes_to_standard_error_and_nothing_else_does(models):
    result = explain("a film", "--model", models / "sentiment")
    assert result.exit_code == 0
    stages = [line.removesuffix(" ...") for line in result.stderr.splitlines()]
    assert stages == [
        "importing PyTorch",
        "loading the model",
        "capturing the model",
        "rewriting the graph",
        "tracing the program",
        "compiling the program",
        "explaining",
    ]
    assert "..." not in result.stdout
    assert "film" in result.stdout


def test_a_terminal_sees_each_step_end(models):
    result = explain("a film", "--model", models / "sentiment", FORCE_COLOR="1", TERM="xterm")
    assert result.exit_code == 0
    assert "✓" in result.stderr
    assert "capturing the model" in result.stderr
    assert "✓" not in result.stdout
    assert "\x1b[" in result.stdout, "a terminal gets colours"


def test_the_garbage_collector_is_on_again_afterwards(models):
    assert gc.isenabled()
    assert explain("a film", "--model", models / "nowhere").exit_code == 1
    assert gc.isenabled()


def test_quiet_says_nothing_meanwhile(models):
    result = explain("a film", "--model", models / "sentiment", "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")


def test_several_texts_are_a_batch_with_one_target(models, tmp_path):
    texts = ("the movie was bad", "a great film")
    common = ("--model", models / "sentiment", "--target", "Negative", "--composite", "cp-lrp")
    batch, result = explained(tmp_path / "batch.json", *texts, *common)
    assert [row["label"] for row in batch["rows"]] == ["negative", "negative"]
    assert "Row 1" in result.stdout
    alone, _ = explained(tmp_path / "alone.json", texts[1], *common)
    values = [row["inputs"]["input_ids"]["relevance"] for row in (batch["rows"][1], *alone["rows"])]
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-7)


def test_options_of_the_method_reach_the_compiler(models, tmp_path, monkeypatch):
    compiled = []

    def backend(graph_module, inputs):
        compiled.append(graph_module)
        return graph_module.forward

    monkeypatch.setitem(backends.BACKENDS, "recording", backend)
    arguments = ("--composite", "gradient", "--backend", "recording", "--fallback", "gradient")
    places = ("--device", "cpu", "--dtype", "float64", "--task", "text-classification")
    got, _ = explained(
        tmp_path / "x.json", "a film", "--model", models / "sentiment", *arguments, *places
    )
    assert len(compiled) == 2

    model, _ = load(models / "sentiment", dtype="float64")
    inputs = got["rows"][0]["inputs"]["input_ids"]
    embedded = model.get_input_embeddings()(torch.tensor([inputs["ids"]])).detach()
    embedded.requires_grad_()
    value = model(inputs_embeds=embedded).logits.max()
    (gradient,) = torch.autograd.grad(value, embedded)
    wanted = (embedded * gradient).sum(-1)[0]
    assert got["rows"][0]["target_value"] == pytest.approx(value.item(), rel=1e-9)
    assert inputs["relevance"] == pytest.approx(wanted.tolist(), rel=1e-9)


def test_a_contrast_at_a_position(models, tmp_path):
    model = models / "names"
    common = ("the movie was great", "--model", model, "--target", "NAME", "--position", 1)
    got, _ = explained(tmp_path / "x.json", *common, "--contrast", "O", "--contrast", "2")
    row = got["rows"][0]
    scores = logits(model, input_ids=[row["inputs"]["input_ids"]["ids"]])[0, 1]
    assert row["label"] == "NAME"
    assert row["target_value"] == pytest.approx(float(scores[1] - (scores[0] + scores[2]) / 2))


def test_a_question_and_its_context(models, tmp_path):
    model = models / "answers"
    question = ("was it good", "--model", model, "--context", "the movie was great")
    both, _ = explained(tmp_path / "both.json", *question)
    end, _ = explained(tmp_path / "end.json", *question, "--target", "end")
    ids = both["rows"][0]["inputs"]["input_ids"]["ids"]
    words = " ".join(WORDS[i] for i in ids)
    assert words == "[CLS] was it good [SEP] the movie was great [SEP]"
    loaded, _ = load(model)
    with torch.no_grad():
        outputs = loaded(torch.tensor([ids]))
    starts, ends = outputs.start_logits.max(), outputs.end_logits.max()
    assert both["rows"][0]["target_value"] == pytest.approx(float(starts + ends))
    assert end["rows"][0]["target_value"] == pytest.approx(float(ends))


def test_the_next_token_of_a_causal_model(models, tmp_path):
    model = models / "writer"
    got, _ = explained(tmp_path / "x.json", "the movie was", "--model", model, "--target", "great")
    row = got["rows"][0]
    scores = logits(model, input_ids=[row["inputs"]["input_ids"]["ids"]])[0, -1]
    assert row["label"] == "great"
    assert row["target_value"] == pytest.approx(float(scores[WORDS.index("great")]))


@pytest.mark.parametrize(
    ("extra", "written"), [((), ["[CLS]"]), (("--decoder-text", "a film"), ["[CLS]", "a", "film"])]
)
def test_the_next_token_of_a_decoder(models, tmp_path, extra, written):
    model = models / "translator"
    got, _ = explained(tmp_path / "x.json", "the movie", "bad", "--model", model, *extra)
    for row in got["rows"]:
        inputs = row["inputs"]
        assert inputs["decoder_input_ids"]["tokens"][: len(written)] == written
        ids = {name: [given["ids"]] for name, given in inputs.items()}
        scores = logits(model, **ids)[0, -1]
        assert row["label"] == WORDS[int(scores.argmax())]
        assert row["target_value"] == pytest.approx(float(scores.max()), rel=1e-5)


# Images


def test_an_image_is_explained_as_from_python(models, images, tmp_path):
    image = pytest.importorskip("PIL.Image")
    page, picture = tmp_path / "page.html", tmp_path / "why.png"
    options = ("--composite", "gradient", "--target", "Digit 2", "--smooth", 1.5)
    got, result = explained(
        tmp_path / "numbers.json",
        images / "a.png",
        *("--task", IMAGES, "--model", models / "seer", "--html", page, "--figure", picture),
        *options,
    )
    model, processor = load(models / "seer")
    with image.open(images / "a.png") as opened:
        opened.load()
    wanted = attnlrp_fx.explain_image(
        model, processor, opened, composite="gradient", target=Logit(2)
    )
    assert got == wanted.to_dict()
    assert got["rows"][0]["label"] == "digit 2"
    assert got["rows"][0]["inputs"]["pixel_values"]["shape"] == [3, 8, 8]
    assert page.read_text() == wanted.to_html(display=Display(smooth=1.5))
    assert page.read_text().count("data:image/png") == 2
    assert "digit 2" in result.stdout
    file = BytesIO()
    wanted.figure(Display(smooth=1.5)).savefig(file, format="png")
    with image.open(picture) as drawn, image.open(file) as expected:
        assert drawn.format == "PNG"
        assert drawn.tobytes() == expected.tobytes()
    (grid,) = wanted.sections()[0].grids
    assert grid.backdrop.caption == "", "the processor is known: nothing is stretched"
    bytes_shown = (grid.backdrop.pixels * 255).round().long().flatten()
    assert bytes_shown.tolist() == [*opened.tobytes()]


@pytest.mark.parametrize("name", SEERS)
def test_several_images_are_a_batch(models, images, tmp_path, name):
    common = ("--model", models / name, "--dtype", "float64")
    paths = [images / "a.png", images / "b.png"]
    batch, _ = explained(tmp_path / "batch.json", *paths, *common)
    alone, _ = explained(tmp_path / "alone.json", paths[1], *common)
    assert len(batch["rows"]) == 2
    values = [
        torch.tensor(row["inputs"]["pixel_values"]["relevance"])
        for row in (batch["rows"][1], *alone["rows"])
    ]
    torch.testing.assert_close(*values)
    assert values[0].shape == (3 if name == "seer" else 1, 8, 8)


def test_images_are_turned_the_way_their_camera_was(models, images, tmp_path):
    image = pytest.importorskip("PIL.Image")
    with image.open(images / "b.png") as opened:
        turned = opened.transpose(image.Transpose.ROTATE_90)
        exif = image.Exif()
        exif[0x0112] = 6  # "rotate by 270 to see it"
        turned.save(tmp_path / "turned.png", exif=exif)
    common = ("--model", models / "seer")
    straight, _ = explained(tmp_path / "x.json", images / "b.png", *common)
    again, _ = explained(tmp_path / "y.json", tmp_path / "turned.png", *common)
    assert straight == again


def test_bfloat16_reads_images(models, images):
    result = explain(images / "a.png", "--model", models / "seer", "--dtype", "bfloat16")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{images}/none.png", "--task", IMAGES], "there is no '{images}/none.png'; name the file"),
        (["{images}", "--task", IMAGES], "'{images}' is a directory; name the file"),
        (["{images}/none.png", "--model", "{models}/seer"], "there is no '{images}/none.png'"),
        (["{images}/words.png", "--model", "{models}/seer"], "words.png' cannot be read as an im"),
        (["{images}/cut.png", "--model", "{models}/seer"], "cut.png' cannot be read as an image; "),
        (
            ["{images}/a.png", "--model", "{models}/seer", "--context", "b"],
            "leave --context out",
        ),
        (
            ["{images}/a.png", "--model", "{models}/seer", "--target", "cat"],
            "no label 'cat'; use one of: digit 0, digit 1",
        ),
        (
            ["{images}/a.png", "--model", "{models}/seer", "--smooth", "1"],
            "--smooth has no picture to smooth; add --html or --figure",
        ),
        (
            ["{images}/a.png", "--model", "{models}/seer", "--smooth", "-1", "--html", "x.html"],
            "cannot be smoothed by -1.0 pixels",
        ),
        (
            ["a", "--model", "{models}/sentiment", "--smooth", "1", "--html", "x.html"],
            "this model reads no images; leave --smooth out",
        ),
    ],
)
def test_bad_images_are_one_line_on_standard_error(models, images, arguments, message):
    def filled(text):
        return text.replace("{models}", str(models)).replace("{images}", str(images))

    assert filled(message) in error_of(explain(*map(filled, arguments)))


def test_without_pillow_it_says_what_to_install(models, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    message = error_of(explain(images / "a.png", "--model", models / "seer"))
    assert message.startswith("Reading images needs pillow; ")
    assert message.endswith("pip install 'attnlrp_fx[image]'")


def test_what_is_no_image_is_refused_in_python(models):
    model, processor = load(models / "seer")
    with pytest.raises(InputError, match="no image to explain"):
        attnlrp_fx.explain_image(model, processor, [])
    with pytest.raises(InputError, match="cannot read what it was given"):
        attnlrp_fx.explain_image(model, processor, 3)


# What it refuses

LONG = "the " * POSITIONS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["  "], "the text is empty; pass at least one word"),
        (["a", ""], "text 2 is empty; pass at least one word"),
        (["a", "--model", "./nowhere"], "there is no directory './nowhere'"),
        (["a", "--model", "/no/where/at/all"], "there is no directory '/no/where/at/all'"),
        (["a", "--model", "{models}/nowhere"], "nowhere'; check the path of the model"),
        (["a", "--model", "{models}"], "holds no config.json"),
        (["a", "--model", "{models}/base/config.json"], "config.json' is a file"),
        (["a", "--model", "nobody/nothing"], "could not be had from the model hub; "),
        (["a", "--task", "poetry"], "no task 'poetry'; use one of: text-classification"),
        (["a", "--model", "{models}/base"], "neither labels, spans nor tokens; name a --task"),
        (
            ["a", "--model", "{models}/names", "--task", "text-classification"],
            "no weights for bert.pooler.dense.bias, bert.pooler.dense.weight; ",
        ),
        (["a", "--device", "toaster"], "there is no device 'toaster' here; use one of: cpu"),
        (["a", "--device", "meta"], "device 'meta' holds no values; use cpu"),
        (["a", "--dtype", "int3"], f"no dtype 'int3'; use one of: {', '.join(DTYPES)}"),
        (["a", "--composite", "magic"], "no composite 'magic'; use one of: attnlrp, cp-lrp"),
        (["a", "--backend", "magic"], "no backend 'magic'; use one of: eager, inductor"),
        (["a", "--model", "{models}/names", "--fallback", "hope"], "fallback is 'hope'; use "),
        (
            ["a", "--model", "{models}/names", "--target", "VERB"],
            "no label 'VERB'; use one of: O, NAME, PLACE",
        ),
        (
            ["a", "--model", "{models}/names", "--contrast", "VERB"],
            "no label 'VERB'; use one of: O, NAME, PLACE",
        ),
        (
            ["a", "--model", "{models}/names", "--target", "O", "--contrast", "o"],
            "'O' is contrasted with itself",
        ),
        (
            ["a", "--model", "{models}/names", "--contrast", "O", "--contrast", "*"],
            "'*' already stands for all others",
        ),
        (
            ["a", "--model", "{models}/writer", "--target", "the movie"],
            "'the movie' is 2 tokens: 'the' · 'movie'; name one token",
        ),
        (
            ["a", "--model", "{models}/writer", "--target", "zebra"],
            "vocabulary does not know 'zebra'; name one token",
        ),
        (["a", "--model", "{models}/answers"], "a question needs a text to be about; pass --con"),
        (["a", "--model", "{models}/names", "--context", "b"], "leave --context out"),
        (["a", "--model", "{models}/names", "--decoder-text", "b"], "leave --decoder-text out"),
        (
            ["a", "--model", "{models}/answers", "--context", "b", "--target", "middle"],
            "a span has no 'middle'; use one of: start, end",
        ),
        (
            ["a", "--model", "{models}/answers", "--context", "b", "--position", "1"],
            "--position has no meaning for a span",
        ),
        (
            [LONG, "--model", "{models}/names"],
            f"the text is {POSITIONS + 2} tokens long, the model reads {POSITIONS}; shorten it",
        ),
        (
            ["a", "--model", "{models}/translator", "--decoder-text", LONG],
            f"the decoder text is {POSITIONS + 1} tokens long",
        ),
        (["a", "--html", "{models}/none/x.html"], "x.html': there is no directory '"),
        (["a", "--json", "{models}"], "it is a directory; name a file in it"),
        (["a", "--figure", "x.gif"], "'x.gif' is no format for a picture; end its name with"),
    ],
)
def test_bad_input_is_one_line_on_standard_error(models, arguments, message):
    result = explain(*(argument.replace("{models}", str(models)) for argument in arguments))
    assert message in error_of(result)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--target", "7"), "index 7 is out of range; the output has 2"),
        (("--target", "-3"), "index -3 is out of range"),
    ],
)
def test_a_class_out_of_range(models, option, message):
    assert message in error_of(explain("a", "--model", models / "sentiment", *option))


def test_a_position_out_of_range(models):
    result = explain("a", "--model", models / "names", "--position", "3")
    assert "position 3 is out of range; the output has 3" in error_of(result)


@pytest.mark.parametrize(
    "arguments",
    [("explain",), ("explain", "a", "--nope"), ("explain", "a", "--position", "x"), ("nope",)],
)
def test_wrong_usage_exits_with_two(arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Usage: " in result.stderr


def test_debug_adds_the_traceback(models):
    result = explain("a", "--model", models / "nowhere", "--debug")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert "\nerror: there is no directory" in result.stderr


def test_an_unforeseen_error_is_called_a_defect(models, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda *arguments: 1 / 0)
    message = error_of(explain("a"))
    assert message.startswith("ZeroDivisionError: division by zero; this is a defect")


def test_an_error_about_the_model_says_where(models, monkeypatch):
    def refuse(*arguments, **options):
        raise attnlrp_fx.RuleError("no rule", where="node 'x' at y.py:3", remedy="give it one")

    monkeypatch.setattr("attnlrp_fx.compiler.capture", refuse)
    message = error_of(explain("a", "--model", models / "sentiment"))
    assert message == "no rule; node 'x' at y.py:3; give it one"


# Files are whole or not there


def explanation():
    return Explanation(
        relevance={"input_ids": torch.tensor([[0.5, -1.0]])},
        outputs=None,
        target_value=torch.tensor([1.0]),
        target="logit",
        inputs={"input_ids": torch.tensor([[4, 5]])},
    )


@pytest.mark.parametrize("option", ["html", "json", "figure"])
def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch, option):
    goal = tmp_path / f"x.{'svg' if option == 'figure' else option}"
    goal.write_text("old")

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    paths = dict.fromkeys(("html", "json", "figure")) | {option: goal}
    with pytest.raises(OSError, match="No space left"):
        cli._write(explanation(), PLAIN, **paths)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(goal.name, "old")]


def test_a_full_disk_is_one_line(models, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    goal = tmp_path / "x.json"
    result = explain("a", "--model", models / "sentiment", "--json", goal)
    assert error_of(result) == f"cannot write '{goal}': No space left on device"
    assert list(tmp_path.iterdir()) == []


# Loading


def test_loading_gives_the_class_the_config_names(models):
    for name, task in {
        "sentiment": "text-classification",
        "names": "token-classification",
        "answers": "question-answering",
        "writer": "text-generation",
        "translator": "text2text-generation",
        "base": None,
    }.items():
        model, tokenizer = load(models / name, dtype="bfloat16")
        assert task_of(model) == task
        assert not model.training
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert tokenizer.pad_token == "[PAD]"
        if task is not None:
            named, _ = load(models / name, task)
            assert type(named) is type(model)


def test_loading_an_image_model_gives_its_processor(models):
    for name in SEERS:
        model, processor = load(models / name)
        assert task_of(model) == IMAGES
        assert processor.image_std[0] == 0.25
        assert type(load(models / name, IMAGES)[0]) is type(model)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *((name, (name,)) for name in EMBEDDED),
        ("digits_transformer", (None, IMAGES)),
        ("sentiment", ()),
    ],
)
def test_embedded_models_are_loaded_by_name(models, monkeypatch, tmp_path, name, given):
    monkeypatch.setattr("attnlrp_fx.loading.files", lambda package: tmp_path)
    with pytest.raises(ModelNotFoundError, match=f"lacks the embedded model '{name}'"):
        load(*given)
    (tmp_path / "embedded").mkdir()
    stands_in = models / ("sentiment" if name == "sentiment" else "seer")
    (tmp_path / "embedded" / name).symlink_to(stands_in)
    model, reader = load(*given)
    assert type(model) is type(load(stands_in)[0])
    assert hasattr(reader, "image_mean") is (name != "sentiment")


def test_loading_is_silent_and_leaves_settings_alone(models, capfd):
    transformers_logging.enable_progress_bar()
    level = transformers_logging.get_verbosity()
    load(models / "sentiment")
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()
    assert transformers_logging.get_verbosity() == level


def test_a_class_that_transformers_does_not_have(models, tmp_path):
    config = json.loads((models / "base" / "config.json").read_text())
    for architectures, named in (([], "none"), (["Wonder"], "Wonder")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        with pytest.raises(ModelNotFoundError, match=f"configuration names {named}"):
            load(tmp_path)


def test_broken_files_are_one_error(models, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelNotFoundError, match="could not be loaded"):
        load(tmp_path)
    config = (models / "base" / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)


def test_a_path_is_never_looked_for_on_the_hub(models, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("transformers was asked")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", refuse)
    monkeypatch.chdir(models)
    for path in ("./x", "../x", "~/x", "/x", "a/b/c", "x/", "base/x", "a b", Path("x")):
        with pytest.raises(ModelNotFoundError, match="there is no directory"):
            load(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "x"}, "no task"),
        ({"dtype": "x"}, "no dtype"),
        ({"device": "x"}, "no device"),
        ({"device": "cuda:99"}, "no device"),
    ],
)
def test_loading_refuses_what_there_is_not(options, message):
    with pytest.raises(InputError, match=message):
        load(**options)


# The rest


def test_composites_are_printed_as_the_lists_they_are():
    result = run("composites")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = [line.split() for line in result.stdout.splitlines()]
    for name, composite in attnlrp_fx.COMPOSITES.items():
        start = lines.index([name]) + 2
        for number, (match, rule) in enumerate(composite.entries, 1):
            assert lines[start + number - 1] == [str(number), *f"{match} {rule}".split()]


def test_the_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"attnlrp-fx {attnlrp_fx.__version__}\n")


def test_positions_are_explained_with_their_tokens(tmp_path):
    text = "The plot is thin, but the performances are wonderful."
    (without,), (placed,) = (
        explained(tmp_path / "numbers.json", text, *option)[0]["rows"]
        for option in ((), ("--positions",))
    )
    assert placed["target_value"] == pytest.approx(without["target_value"], rel=1e-5)
    tokens, moved = (row["inputs"]["input_ids"] for row in (without, placed))
    assert moved["tokens"] == tokens["tokens"]
    assert moved["relevance"] != pytest.approx(tokens["relevance"], rel=1e-2)


def test_help_names_every_task_and_dtype():
    text = " ".join(explain("--help", COLUMNS="300", TERMINAL_WIDTH="300").stdout.split())
    for word in (*TASKS, *DTYPES, "--contrast", "--decoder-text", "--fallback"):
        assert word in text


def test_every_public_name_is_there():
    for name in attnlrp_fx.__all__:
        assert getattr(getattr(attnlrp_fx, name), "__name__", "COMPOSITES") == name
        assert name in dir(attnlrp_fx)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = attnlrp_fx.nothing


def test_help_does_not_import_pytorch():
    code = (
        "import sys; from typer.testing import CliRunner; from attnlrp_fx.cli import app\n"
        "assert CliRunner().invoke(app, ['explain', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_installed_command_explains_with_the_embedded_model(tmp_path):
    assert (files("attnlrp_fx") / "embedded" / "sentiment" / "config.json").is_file()
    command = Path(sys.executable).with_name("attnlrp-fx")
    goal = tmp_path / "x.json"
    done = subprocess.run(
        [command, "explain", "a gripping, funny film", "--json", goal],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert "highest logit: positive" in done.stdout
    assert "gripping" in done.stdout
    assert "Warning" not in done.stderr
    assert done.stderr.startswith("importing PyTorch ...\nloading the model ...\n")
    row = json.loads(goal.read_text())["rows"][0]
    assert row["label"] == "positive"
    assert "funny" in row["inputs"]["input_ids"]["tokens"]
