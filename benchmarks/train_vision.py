"""Trains the two image classifiers that the package ships: a ViT and a ResNet that read digits.

Both learn from the pictures of `digits.py`, where it is known which pixels are the evidence. Every
batch is composed anew from the training scans, so no picture is seen twice; clutter comes in little
by little, since a transformer that starts amid clutter learns nothing for long. The ViT's layers
are matrices, which Muon trains in far fewer steps than AdamW; all else is AdamW's. The ViT also
learns, by a linear map that is thrown away, which digit covers each of its patches.

The held-out scans touch no weights; the very files that were written read them, at the end. The
recipe was chosen with accuracy on held-out pictures, of another seed but the same scans, in view.

    python benchmarks/train_vision.py               into attnlrp_fx/embedded/digits_transformer, ...
    python benchmarks/train_vision.py --only transformer    one of them
    python benchmarks/train_vision.py --out DIR     into DIR/digits_transformer, ...
"""

import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import sklearn  # type: ignore[import-untyped]
import torch
import torch.nn.functional as F
import transformers
import typer
from digits import CLASSES, SIZE, Pictures, held_out, split, training
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)
from transformers.utils import logging as transformers_logging

EMBEDDED = Path(__file__).parents[1] / "attnlrp_fx" / "embedded"
RESULTS = Path(__file__).parent / "results" / "vision-training.json"
LABELS = {number: str(number) for number in range(CLASSES)}

PATCH = 5
"""Height and width of the ViT's patches in pixels."""

WIDTH = 96
"""Features of the ViT."""

HELD_OUT_PICTURES = 4000
HELD_OUT_SEED = 0
"""Of the pictures that accuracy is measured on."""

EXAMPLES = (2, 5, 7)
"""The digits of the example pictures."""
EXAMPLES_SEED = 10
"""Their seed, chosen so that they are legible and both models read them."""


class Kind(StrEnum):
    """The architectures."""

    TRANSFORMER = "transformer"
    CONVOLUTIONAL = "convolutional"


@dataclass(frozen=True)
class Recipe:
    """Every choice of a training."""

    pictures: int
    """How many training pictures are composed, each seen once."""

    patches: bool
    """Whether every patch learns which digit covers it, too."""

    seed: int = 0
    batch: int = 64
    rate: float = 1e-3
    """Of AdamW."""

    matrix_rate: float = 2e-3
    """Of Muon, in the same unit."""

    decay: float = 0.05
    warm: float = 0.05
    """Share of the steps in which the rate rises; then it falls along a cosine."""

    clean: float = 0.4
    """Share of the steps in which the clutter grows from none to all."""

    @property
    def steps(self) -> int:
        """How many batches there are."""
        return self.pictures // self.batch


RECIPES = {
    Kind.TRANSFORMER: Recipe(pictures=80_000, patches=True),
    Kind.CONVOLUTIONAL: Recipe(pictures=60_000, patches=False),
}


def new_vit() -> ViTForImageClassification:
    """A small ViT whose positions start as sines of rows and columns, not as noise."""
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=PATCH,
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=4 * WIDTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            id2label=LABELS,
        )
    )
    side, count = SIZE // PATCH, WIDTH // 4
    frequencies = side ** -(torch.arange(count) / count)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (column, row)]
    waves = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], 1)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings[0, 1:] = 0.3 * waves
    return model


def new_resnet() -> ResNetForImageClassification:
    """A small ResNet of basic blocks with batch norm."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 96],
            depths=[2, 2, 2],
            layer_type="basic",
            id2label=LABELS,
        )
    )


MODELS: dict[Kind, Callable[[], PreTrainedModel]] = {
    Kind.TRANSFORMER: new_vit,
    Kind.CONVOLUTIONAL: new_resnet,
}


@dataclass(frozen=True)
class Scale:
    """Mean and deviation of each colour in the training pictures."""

    mean: list[float]
    deviation: list[float]

    @classmethod
    def measured(cls) -> "Scale":
        """That of some pictures that no training uses."""
        images = training(2000, seed=0).images / 255
        return cls(
            [round(float(m), 3) for m in images.mean((0, 1, 2))],
            [round(float(s), 3) for s in images.std((0, 1, 2))],
        )

    def __call__(self, images: np.ndarray) -> Tensor:
        """Pixels as the models take them, which is what the saved processor makes of them."""
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        mean, deviation = torch.tensor(self.mean), torch.tensor(self.deviation)
        return (pixels - mean[:, None, None]) / deviation[:, None, None]


class Descent:
    """Muon on the matrices of the layers and AdamW on all else: a warm-up, then a cosine."""

    def __init__(self, recipe: Recipe, model: PreTrainedModel, heads: nn.Module) -> None:
        """Prepares the steps of a recipe; `heads` are trained beside the model."""
        matrices = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.ndim == 2 and "classifier" not in name
        ]
        chosen = set(map(id, matrices))
        self.parameters = [*model.parameters(), *heads.parameters()]
        rest = [parameter for parameter in self.parameters if id(parameter) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=recipe.rate, weight_decay=recipe.decay)
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices,
                    lr=recipe.matrix_rate,
                    weight_decay=recipe.decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        warm = max(round(recipe.warm * recipe.steps), 1)

        def share(step: int) -> float:
            return min((step + 1) / warm, (1 + math.cos(math.pi * step / recipe.steps)) / 2)

        self.schedules = [LambdaLR(optimizer, share) for optimizer in self.optimizers]

    def step(self, loss: Tensor) -> None:
        """One step down `loss`, its gradient clipped to norm 1."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()


def batches(recipe: Recipe) -> Iterator[Pictures]:
    """New pictures for every step; composed eight batches at a time, which is quicker."""
    at_once = 8
    for start in range(0, recipe.steps, at_once):
        clutter = min(start / (recipe.clean * recipe.steps), 1.0)
        seed = (recipe.seed + 1) * 1_000_000 + start  # none that is used elsewhere
        pictures = training(at_once * recipe.batch, seed, clutter)
        for i in range(min(at_once, recipe.steps - start)):
            rows = slice(i * recipe.batch, (i + 1) * recipe.batch)
            yield Pictures(pictures.images[rows], pictures.labels[rows], pictures.masks[rows])


def train(recipe: Recipe, model: PreTrainedModel, scale: Scale, progress: Progress) -> None:
    """Fits a model to the digits of new pictures, and its patches to what covers them."""
    model.train()
    patch_head = nn.Linear(WIDTH, CLASSES + 1)
    descent = Descent(recipe, model, patch_head)
    name = model.config.model_type
    task = progress.add_task(name, total=recipe.steps)
    right = 0.1
    for pictures in batches(recipe):
        labels = torch.from_numpy(pictures.labels)
        outputs = model(scale(pictures.images), output_hidden_states=recipe.patches)
        loss = F.cross_entropy(outputs.logits, labels)
        if recipe.patches:
            patches = patch_head(outputs.hidden_states[-1][:, 1:])
            covered = patch_labels(pictures)
            loss = loss + F.cross_entropy(patches.transpose(1, 2), covered)
        descent.step(loss)
        right += 0.01 * (float((outputs.logits.argmax(-1) == labels).float().mean()) - right)
        progress.update(task, advance=1, description=f"{name}: {right:.0%} right in training")
    model.eval()  # type: ignore[no-untyped-call]  # untyped in transformers


def patch_labels(pictures: Pictures) -> Tensor:
    """The digit on each patch, row by row, or `CLASSES` where it covers less than a sixth."""
    masks = torch.from_numpy(pictures.masks)[:, None].float()
    covered = F.avg_pool2d(masks, PATCH).flatten(1) > 1 / 6
    return torch.where(covered, torch.from_numpy(pictures.labels)[:, None], CLASSES)


def save(model: PreTrainedModel, scale: Scale, directory: Path) -> None:
    """Writes the weights, and how a picture becomes their input."""
    model.save_pretrained(directory)
    processor = ViTImageProcessor(
        size={"height": SIZE, "width": SIZE}, image_mean=scale.mean, image_std=scale.deviation
    )
    processor.save_pretrained(directory)


def accuracy(directory: Path, pictures: Pictures) -> float:
    """Share of the pictures that the saved model gets right, loaded as a user loads it."""
    model = AutoModelForImageClassification.from_pretrained(directory)
    processor = AutoImageProcessor.from_pretrained(directory)  # type: ignore[no-untyped-call]
    right = 0
    with torch.inference_mode():
        for start in range(0, len(pictures.labels), 100):
            rows = slice(start, start + 100)
            inputs = processor(list(pictures.images[rows]), return_tensors="pt")
            guesses = model(**inputs).logits.argmax(-1).numpy()
            right += int((guesses == pictures.labels[rows]).sum())
    return right / len(pictures.labels)


@dataclass(frozen=True)
class Result:
    """What came of a training."""

    accuracy: float
    parameters: int
    bytes: int
    seconds: float
    recipe: dict[str, Any]


DESCRIPTIONS = {
    Kind.TRANSFORMER: (
        f"`ViTForImageClassification`: 4 layers of {WIDTH} features and 4 heads, "
        f"patches of {PATCH} x {PATCH} pixels"
    ),
    Kind.CONVOLUTIONAL: "`ResNetForImageClassification`: 3 stages of 2 basic blocks, batch norm",
}


LESSONS = {
    Kind.TRANSFORMER: (
        "While it was trained, a linear map that is not kept\nread off its last states which digit "
        "covers each patch: it was told where digits are."
    ),
    Kind.CONVOLUTIONAL: "It was trained on labels alone:\nit was never told where digits are.",
}
"""What the training gave away about the evidence."""


def model_card(kind: Kind, result: Result) -> str:
    """The README beside the weights, with the numbers of this very run."""
    error = (result.accuracy * (1 - result.accuracy) / HELD_OUT_PICTURES) ** 0.5
    for_training, away = split()
    pictures = result.recipe["pictures"]
    return f"""---
license: bsd-3-clause
pipeline_tag: image-classification
---
# A small classifier of handwritten digits amid clutter

Small enough to ship inside the package, trained on real scans.
{DESCRIPTIONS[kind]}.
{result.parameters:,} parameters in float32. Load it with
`AutoModelForImageClassification.from_pretrained(directory)`, and
`AutoImageProcessor.from_pretrained(directory)` for pictures of {SIZE} x {SIZE} pixels in colour.
Labels: the digits 0 to 9.

**Accuracy: {result.accuracy:.1%}** on {HELD_OUT_PICTURES:,} held-out pictures, measured on these
files (standard error {error:.1%}). The {len(away.labels)} held-out scans are in no training
picture, neither as digits nor as fragments; optimiser and size of pictures were chosen with
accuracy on them in view.

**How it was made:** `python benchmarks/train_vision.py --only {kind}`, on {pictures:,} pictures
that `benchmarks/digits.py` composes, one whole digit each amid texture, strokes, blobs and
fragments of digits, all of which are drawn without regard to the label. So the evidence is
known: the digit's pixels. {LESSONS[kind]}

**Data and licence:** {len(for_training.labels):,} of the 1,797 handwritten digits in scikit-learn
(BSD-3-Clause), the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0).

**Limits:** it knows these pictures alone. It is there to be explained, not to be relied on.
"""


def publish(built: Path, destination: Path) -> None:
    """Renames the finished directory into place, the old one out of the way first."""
    for file in built.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone, and a wheel keeps that
    built.chmod(0o755)
    if destination.exists():
        destination.rename(built.with_name(f"{built.name}-old"))
    built.rename(destination)


def example_pictures(directory: Path) -> None:
    """Writes a held-out picture of each of the example digits."""
    pictures = held_out(200, EXAMPLES_SEED)
    directory.mkdir()
    for digit in EXAMPLES:
        row = int(np.flatnonzero(pictures.labels == digit)[0])
        Image.fromarray(pictures.images[row]).save(directory / f"digit-{digit}.png", optimize=True)
    names = ", ".join(f"`digit-{digit}.png`" for digit in EXAMPLES)
    (directory / "README.md").write_text(
        f"""# Example pictures

{names}: composed by
`python benchmarks/train_vision.py` from scans that the embedded models never saw, and chosen so
that both models read them. The scans are from the handwritten digits in scikit-learn
(BSD-3-Clause), the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and
C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0).
"""
    )


def record(results: dict[Kind, Result], file: Path) -> None:
    """Writes the figures; those of a model that was not trained this time stay."""
    known = json.loads(file.read_text())["models"] if file.exists() else {}
    known |= {str(kind): asdict(result) for kind, result in results.items()}
    written = {
        "models": dict(sorted(known.items())),
        "held_out_pictures": HELD_OUT_PICTURES,
        "scans": {"training": len(split()[0].labels), "held_out": len(split()[1].labels)},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(written, indent=2) + "\n")
    partial.rename(file)


def main(
    only: Annotated[Kind | None, typer.Option(help="Train this one alone.")] = None,
    out: Annotated[
        Path, typer.Option(help="Where digits_transformer, ... are written.")
    ] = EMBEDDED,
) -> None:
    """Train the embedded image models and print how well the written files do."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)  # the order of additions, and so the result, depends on the number
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    pictures = held_out(HELD_OUT_PICTURES, HELD_OUT_SEED)
    scale = Scale.measured()
    results = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed, left"),
        TimeRemainingColumn(),
    )
    with (
        tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as workspace,
        Progress(*columns, console=console) as progress,
    ):
        for kind in [only] if only else list(Kind):
            recipe = RECIPES[kind]
            torch.manual_seed(recipe.seed)
            start = time.monotonic()
            model = MODELS[kind]()
            train(recipe, model, scale, progress)
            built = Path(workspace) / kind
            save(model, scale, built)
            result = results[kind] = Result(
                accuracy=accuracy(built, pictures),
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                bytes=(built / "model.safetensors").stat().st_size,
                seconds=round(time.monotonic() - start, 1),
                recipe=asdict(recipe),
            )
            (built / "README.md").write_text(model_card(kind, result))
            publish(built, out / f"digits_{kind}")
            console.print(
                f"{out / f'digits_{kind}'}: {result.parameters:,} parameters, "
                f"{result.bytes / 1e6:.2f} MB; held-out accuracy {result.accuracy:.1%} on "
                f"{HELD_OUT_PICTURES:,} pictures; {result.seconds / 60:.1f} minutes",
                highlight=False,
            )
        images = Path(workspace) / "images"
        example_pictures(images)
        publish(images, out / "images")
    if out == EMBEDDED:
        record(results, RESULTS)


if __name__ == "__main__":
    typer.run(main)
