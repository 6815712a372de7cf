"""Pictures of digits whose evidence is known, and the two classifiers trained on them."""

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import attnlrp_fx

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "attnlrp_fx" / "embedded"
MODELS = ("digits_transformer", "digits_convolutional")
EXAMPLES = sorted((EMBEDDED / "images").glob("digit-*.png"))
LIMIT = 2_000_000
"""Bytes that a model's weights may take in the wheel."""


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn", reason="scikit-learn has the scans")
    sys.path.append(str(ROOT / "benchmarks"))
    return import_module("digits")


@pytest.fixture(scope="module", params=MODELS)
def loaded(request):
    """A model and its processor, loaded as a user loads them."""
    directory = EMBEDDED / request.param
    model = AutoModelForImageClassification.from_pretrained(directory)
    return model, AutoImageProcessor.from_pretrained(directory)


def guesses(loaded, images) -> np.ndarray:
    model, processor = loaded
    with torch.inference_mode():
        return model(**processor(images, return_tensors="pt")).logits.argmax(-1).numpy()


def test_pictures_follow_from_the_seed(digits):
    first, again, other = digits.held_out(8, 1), digits.held_out(8, 1), digits.held_out(8, 2)
    for part, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(part, same)
    assert (first.images != other.images).any()


def test_pictures_have_the_promised_form(digits):
    images, labels, masks = digits.held_out(8, 1)
    assert (images.shape, images.dtype) == ((8, digits.SIZE, digits.SIZE, 3), np.uint8)
    assert (masks.shape, masks.dtype) == ((8, digits.SIZE, digits.SIZE), bool)
    assert set(labels.tolist()) <= set(range(10))


def test_held_out_scans_are_not_among_those_for_training(digits):
    training, held_out = (
        {scan.numpy().tobytes() for scan in scans.images} for scans in digits.split()
    )
    assert len(training) + len(held_out) == 1797
    assert training.isdisjoint(held_out)


def test_mask_is_where_the_digit_is(digits):
    """Pictures of the scans and pictures of empty ones differ in the digits' pixels alone."""
    scans = digits.split()[1]
    empty = digits.Scans(torch.zeros_like(scans.images), scans.labels)
    images, _, masks = digits.compose(scans, 50, seed=3, clutter=0.0)
    without = digits.compose(empty, 50, seed=3, clutter=0.0).images
    change = np.abs(images.astype(int) - without).max(-1)
    assert change[~masks].max() < 0.3 * 255  # below the share of ink that makes a pixel the digit's
    assert change[masks].mean() > 0.3 * 255
    assert change[~masks].mean() < 0.02 * 255
    assert (masks.mean((1, 2)) > 0.02).all()


def test_clutter_keeps_clear_of_the_digit(digits):
    """With and without clutter, the pixels of the digit are the same."""
    scans = digits.split()[1]
    cluttered, bare = (digits.compose(scans, 50, seed=3, clutter=share) for share in (1.0, 0.0))
    np.testing.assert_array_equal(cluttered.masks, bare.masks)
    np.testing.assert_array_equal(cluttered.images[bare.masks], bare.images[bare.masks])
    assert (cluttered.images != bare.images).any((1, 2, 3)).mean() > 0.9


def test_boxes_bound_their_masks(digits):
    masks = digits.held_out(8, 1).masks
    for mask, box in zip(masks, digits.boxes(masks), strict=True):
        rows, columns = np.nonzero(mask)
        expected = np.zeros_like(mask)
        expected[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = True
        np.testing.assert_array_equal(box, expected)


def test_models_read_held_out_pictures(digits, loaded):
    pictures = digits.held_out(100, 5)
    assert (guesses(loaded, list(pictures.images)) == pictures.labels).mean() >= 0.85


def test_models_read_the_example_pictures(loaded):
    labels = [int(file.stem.removeprefix("digit-")) for file in EXAMPLES]
    assert len(labels) == 3
    images = [Image.open(file) for file in EXAMPLES]
    assert guesses(loaded, images).tolist() == labels
    assert loaded[0].config.id2label == {digit: str(digit) for digit in range(10)}


def test_models_can_be_explained(loaded):
    model, processor = loaded
    inputs = dict(processor(Image.open(EXAMPLES[0]), return_tensors="pt"))
    explainer = attnlrp_fx.compile(model.eval(), inputs, backend="eager")
    relevance = explainer(**inputs).relevance["pixel_values"]
    assert relevance.shape == inputs["pixel_values"].shape
    assert relevance.isfinite().all()
    assert relevance.abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_models_are_small_and_say_where_they_come_from(name):
    directory = EMBEDDED / name
    assert (directory / "model.safetensors").stat().st_size <= LIMIT
    card = (directory / "README.md").read_text()
    trained = json.loads((ROOT / "benchmarks" / "results" / "vision-training.json").read_text())
    result = trained["models"][name.removeprefix("digits_")]
    assert f"**Accuracy: {result['accuracy']:.1%}**" in card
    assert result["accuracy"] >= 0.9
    assert "BSD-3-Clause" in card
