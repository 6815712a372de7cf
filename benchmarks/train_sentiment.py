"""Trains the sentiment model that the package ships, from nothing but what packages contain.

Three steps. A *teacher*, MiniLM, is fine-tuned on the training half of the movie-review sentences;
its target is how sure people were, sigmoid(scale * mean rating), rather than a bare label. It then
rates a larger *transfer set*: the training sentences, pieces and pairs of them, rated words, and
sentences on other subjects. The *student*, a small BERT, learns the teacher's logit and, through a
linear map that is thrown away, the teacher's sentence vector. Its word embeddings start as the
principal components of MiniLM's, so that it knows something about words it never sees.

The held-out sentences touch neither the weights nor the vocabulary. They are read once, at the end,
by the very files that were written.

    python benchmarks/train_sentiment.py                      into attnlrp_fx/embedded/sentiment
    python benchmarks/train_sentiment.py --destination DIR    somewhere else
"""

import collections
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from models import Review, minilm, movie_reviews, rated_reviews, rated_words, unrated_sentences
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

DESTINATION = Path(__file__).parents[1] / "attnlrp_fx" / "embedded" / "sentiment"
LABELS = ("negative", "positive")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Recipe:
    """Every choice of the training, chosen on a part of the training sentences."""

    seed: int = 0

    rating_scale: float = 2.0
    """The teacher's target is sigmoid(rating_scale * mean rating)."""

    teacher_epochs: int = 2
    teacher_rate: float = 1e-4
    teacher_batch: int = 32

    piece_count: int = 2
    """A word piece is kept if the training sentences contain it this often."""

    size: int = 128
    layers: int = 3
    heads: int = 4
    inner_size: int = 512
    positions: int = 256
    """Longer than any training text: the positions' embeddings come from MiniLM, too."""

    dropout: float = 0.1
    student_epochs: int = 4
    student_rate: float = 1e-3
    student_batch: int = 64
    vector_weight: float = 1.0
    """Weight of the loss on the sentence vector beside the loss on the logit."""

    spans: int = 2
    pairs: int = 1
    """Pieces cut from, and sentences appended to, each training sentence in the transfer set."""


class Teacher(nn.Module):
    """MiniLM with the mean of its last states as sentence vector and one logit on top."""

    def __init__(self, directory: Path) -> None:
        """Loads MiniLM; its word embeddings stay as they are, for the student starts from them."""
        super().__init__()
        self.encoder = AutoModel.from_pretrained(directory, add_pooling_layer=False)
        self.encoder.embeddings.requires_grad_(False)
        self.head = nn.Linear(self.encoder.config.hidden_size, 1)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (batch,) and sentence vectors (batch, size)."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(states.dtype)
        vectors = (states * weights).sum(1) / weights.sum(1)
        return self.head(vectors)[:, 0], vectors


@dataclass(frozen=True)
class Batch:
    """Padded token ids, their mask, and which texts of the list they are."""

    ids: Tensor
    mask: Tensor
    rows: Tensor


def encode(tokenizer: Tokenizer, texts: Sequence[str], limit: int = 128) -> list[list[int]]:
    """Token ids with [CLS] and [SEP], at most `limit` of them."""
    encoded = tokenizer.encode_batch(list(texts))
    return [e.ids if len(e.ids) <= limit else [*e.ids[: limit - 1], e.ids[-1]] for e in encoded]


def batches(encoded: list[list[int]], size: int, shuffle: random.Random | None) -> list[Batch]:
    """Batches of texts of like length, so that little is padding; shuffled, or longest last."""
    order = list(range(len(encoded)))
    if shuffle is not None:
        shuffle.shuffle(order)
    pool = size * 16 if shuffle is not None else max(len(order), 1)
    chunks = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda row: len(encoded[row]))
        chunks += [near[i : i + size] for i in range(0, len(near), size)]
    if shuffle is not None:
        shuffle.shuffle(chunks)
    return [_batch(encoded, rows) for rows in chunks]


def _batch(encoded: list[list[int]], rows: list[int]) -> Batch:
    longest = max(len(encoded[row]) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(encoded[row])] = torch.tensor(encoded[row])
        mask[i, : len(encoded[row])] = 1
    return Batch(ids, mask, torch.tensor(rows))


def half_precision() -> torch.autocast:
    """MiniLM's matrix products in bfloat16: twice as fast on recent processors, and good enough
    for targets that the student only approximates."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


class Descent:
    """AdamW with a linear warm-up over a tenth of the steps and a linear decay to zero."""

    def __init__(self, groups: list[dict[str, Any]], rate: float, steps: int) -> None:
        """Prepares `steps` steps over parameter groups, each with its own rate or `rate`."""
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=0.01)
        warm = max(steps // 10, 1)
        self.schedule = LambdaLR(
            self.optimizer, lambda i: min((i + 1) / warm, (steps - i) / max(steps - warm, 1))
        )

    def step(self, loss: Tensor) -> None:
        """One step down `loss`, its gradient clipped to norm 1."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


def train_teacher(
    recipe: Recipe, reviews: Sequence[Review], tokenizer: Tokenizer, progress: Progress
) -> Teacher:
    """MiniLM fine-tuned on rated sentences, the undecided ones included."""
    teacher = Teacher(minilm()).train()
    encoded = encode(tokenizer, [review.text for review in reviews])
    targets = torch.tensor([review.rating for review in reviews]).mul(recipe.rating_scale).sigmoid()
    steps = recipe.teacher_epochs * -(-len(encoded) // recipe.teacher_batch)
    layers = [p for p in teacher.encoder.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": layers},
        {"params": [*teacher.head.parameters()], "lr": 1e-3},
    ]
    descent = Descent(groups, recipe.teacher_rate, steps)
    shuffle = random.Random(recipe.seed)
    task = progress.add_task("teacher: fine-tuning MiniLM", total=steps)
    for _ in range(recipe.teacher_epochs):
        for batch in batches(encoded, recipe.teacher_batch, shuffle):
            with half_precision():
                logits, _ = teacher(batch.ids, batch.mask)
            logits = logits.float()
            descent.step(F.binary_cross_entropy_with_logits(logits, targets[batch.rows]))
            progress.advance(task)
    return teacher.eval()


def transfer_texts(recipe: Recipe, reviews: Sequence[Review]) -> list[str]:
    """What the student learns from: texts like the ones it will be shown, whoever wrote them.

    Spans teach it what a part of a sentence says, pairs what two parts say together, and both keep
    it from learning sentences by heart.
    """
    draw = random.Random(recipe.seed)
    whole = [review.text for review in reviews]
    texts = [*whole, *unrated_sentences(), *(word for word, _ in rated_words())]
    for text in whole:
        words = text.split()
        for _ in range(recipe.spans):
            length = draw.randint(1, max(len(words) - 1, 1))
            start = draw.randint(0, len(words) - length)
            texts.append(" ".join(words[start : start + length]))
        texts += [f"{text} {draw.choice(whole)}" for _ in range(recipe.pairs)]
    return texts


def rate(
    teacher: Teacher, texts: Sequence[str], tokenizer: Tokenizer, progress: Progress
) -> tuple[Tensor, Tensor]:
    """The teacher's logit and sentence vector for every text."""
    encoded = encode(tokenizer, texts)
    logits = torch.empty(len(texts))
    vectors = torch.empty(len(texts), teacher.head.in_features)
    task = progress.add_task("teacher: rating the transfer set", total=len(texts))
    with torch.inference_mode(), half_precision():
        for batch in batches(encoded, 64, None):
            rated, states = teacher(batch.ids, batch.mask)
            logits[batch.rows], vectors[batch.rows] = rated.float(), states.float()
            progress.advance(task, len(batch.rows))
    return logits.clone(), vectors.clone()


def cut_vocabulary(recipe: Recipe, reviews: Sequence[Review], tokenizer: Tokenizer) -> list[str]:
    """The pieces to keep, in MiniLM's order.

    Every single character stays, at the start of a word and inside it, so that whatever MiniLM can
    segment still can be. The words of the lexicon stay because a user will try them.
    """
    texts = [review.text for review in reviews]
    counts = collections.Counter(t for e in tokenizer.encode_batch(texts) for t in e.tokens)
    words = {word for word, _ in rated_words()}
    pieces = tokenizer.get_vocab()

    def keep(piece: str) -> bool:
        single = len(piece.removeprefix("##")) == 1
        return single or piece in SPECIAL or piece in words or counts[piece] >= recipe.piece_count

    return sorted(filter(keep, pieces), key=pieces.__getitem__)


def cut_tokenizer(tokenizer: Tokenizer, pieces: Sequence[str]) -> Tokenizer:
    """The same tokenizer over the kept pieces, numbered from 0."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    settings = json.loads(tokenizer.to_str())
    settings["model"]["vocab"] = ids
    settings["truncation"] = settings["padding"] = None
    for added in settings["added_tokens"]:
        added["id"] = ids[added["content"]]
    for name, special in settings["post_processor"]["special_tokens"].items():
        special["ids"] = [ids[name]]
    return Tokenizer.from_str(json.dumps(settings))


def new_student(
    recipe: Recipe, teacher: Teacher, tokenizer: Tokenizer, pieces: Sequence[str]
) -> BertForSequenceClassification:
    """An untrained student whose embeddings are the principal components of MiniLM's."""
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=recipe.size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.inner_size,
        max_position_embeddings=recipe.positions,
        hidden_dropout_prob=recipe.dropout,
        attention_probs_dropout_prob=recipe.dropout,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
    )
    student = BertForSequenceClassification(config)
    known = teacher.encoder.embeddings
    words = known.word_embeddings.weight.detach()
    words = words[torch.tensor([tokenizer.token_to_id(piece) for piece in pieces])]
    centre = words.mean(0)
    _, _, directions = torch.linalg.svd(words - centre, full_matrices=False)
    basis = directions[: recipe.size].T
    scale = 1 / ((words - centre) @ basis).std()
    with torch.no_grad():
        new = student.bert.embeddings
        new.word_embeddings.weight.copy_((words - centre) @ basis * scale)
        positions = known.position_embeddings.weight[: recipe.positions]
        new.position_embeddings.weight.copy_(positions @ basis * scale)
        new.token_type_embeddings.weight.copy_(known.token_type_embeddings.weight @ basis * scale)
    return student


def train_student(
    recipe: Recipe,
    student: BertForSequenceClassification,
    encoded: list[list[int]],
    logits: Tensor,
    vectors: Tensor,
    progress: Progress,
) -> None:
    """Fits the difference of the student's two logits to the teacher's one, and its vector."""
    student.train()
    to_vector = nn.Linear(recipe.size, vectors.shape[1])
    vectors = (vectors - vectors.mean(0)) / vectors.std(0)
    steps = recipe.student_epochs * -(-len(encoded) // recipe.student_batch)
    descent = Descent(
        [{"params": [*student.parameters(), *to_vector.parameters()]}], recipe.student_rate, steps
    )
    shuffle = random.Random(recipe.seed)
    task = progress.add_task("student", total=steps)
    for _ in range(recipe.student_epochs):
        for batch in batches(encoded, recipe.student_batch, shuffle):
            pooled = student.bert(input_ids=batch.ids, attention_mask=batch.mask).pooler_output
            negative, positive = student.classifier(student.dropout(pooled)).unbind(-1)
            loss = F.mse_loss(positive - negative, logits[batch.rows])
            loss = loss + recipe.vector_weight * F.mse_loss(to_vector(pooled), vectors[batch.rows])
            descent.step(loss)
            progress.advance(task)
            progress.update(task, description=f"student: loss {loss.item():.2f}")
    student.eval()


def save(
    student: BertForSequenceClassification, tokenizer: Tokenizer, directory: Path, limit: int
) -> None:
    """Writes weights in float16 and the tokenizer without whitespace: this goes into the wheel."""
    student.half().save_pretrained(directory)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=limit,
    )
    wrapped.save_pretrained(directory)
    file = directory / "tokenizer.json"
    compact = json.dumps(json.loads(file.read_text()), ensure_ascii=False, separators=(",", ":"))
    file.write_text(compact)
    for file in directory.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone, and a wheel keeps that


def accuracy(directory: Path, reviews: Sequence[tuple[str, int]]) -> float:
    """Share of the reviews that the saved model gets right, loaded as a user loads it."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts, labels = zip(*sorted(reviews, key=lambda review: len(review[0])), strict=True)
    right = 0
    with torch.inference_mode():
        for start in range(0, len(texts), 64):
            batch = slice(start, start + 64)
            inputs = tokenizer(
                list(texts[batch]), padding=True, truncation=True, return_tensors="pt"
            )
            guesses = model(**inputs).logits.argmax(-1)
            right += int((guesses == torch.tensor(labels[batch])).sum())
    return right / len(reviews)


def teacher_accuracy(
    teacher: Teacher, reviews: Sequence[tuple[str, int]], tokenizer: Tokenizer, progress: Progress
) -> float:
    """Share of the reviews that the teacher gets right: what the student could reach at best."""
    logits, _ = rate(teacher, [text for text, _ in reviews], tokenizer, progress)
    labels = torch.tensor([label for _, label in reviews])
    return float(((logits > 0) == (labels == 1)).float().mean())


def model_card(
    recipe: Recipe,
    parameters: int,
    pieces: int,
    trained: int,
    held_out: int,
    reached: float,
    best: float,
) -> str:
    """The README beside the weights, with the numbers of this very run."""
    return f"""---
license: mit
language: en
pipeline_tag: text-classification
---
# A small sentiment classifier for movie reviews

The default model of attnlrp_fx: small enough to ship inside the package, trained on real text.
`BertForSequenceClassification`, {recipe.layers} layers of {recipe.size} features and
{recipe.heads} heads, {pieces:,} word pieces, {parameters:,} parameters in float16. Load it with
`AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)`.
Labels: 0 negative, 1 positive. Texts of up to {recipe.positions} tokens; it was trained on
sentences.

**Accuracy: {reached:.1%}** on {held_out:,} held-out movie-review sentences, measured on these files
(standard error {(reached * (1 - reached) / held_out) ** 0.5:.1%}; its teacher reaches {best:.1%}).
The sentences are the clear ones, rated further than 0.5 from 0 on a scale from -4 to 4. The split
is by sentence, without duplicates; held-out sentences touched neither weights nor vocabulary.

**How it was made:** `python benchmarks/train_sentiment.py`. A fine-tuned MiniLM taught it. Word
embeddings start as principal components of MiniLM's.

**Data and licences:** {trained:,} rated movie-review sentences, the lexicon and unrated sentences
of vaderSentiment 3.3.2 (MIT; Hutto and Gilbert, ICWSM 2014; the sentences were collected by Pang
and Lee); all-MiniLM-L6-v2 (Apache-2.0).

**Limits:** English, movie reviews, one or two sentences. It is there to be explained, not to be
relied on.
"""


def publish(built: Path, destination: Path) -> None:
    """Renames the finished directory into place, the old one out of the way first."""
    old = built.with_name("old")
    if destination.exists():
        destination.rename(old)
    built.rename(destination)


def main(
    destination: Annotated[Path, typer.Option(help="The directory to write.")] = DESTINATION,
) -> None:
    """Train the embedded sentiment model and print how well the written files do."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)  # the order of additions, and so the result, depends on the number
    recipe = Recipe()
    torch.manual_seed(recipe.seed)
    start = time.monotonic()
    console = Console()
    destination.parent.mkdir(parents=True, exist_ok=True)

    reviews = [review for review in rated_reviews() if review.split == "train"]
    held_out = movie_reviews("held_out")
    tokenizer = Tokenizer.from_file(str(minilm() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed, left"),
        TimeRemainingColumn(),
    )
    with (
        tempfile.TemporaryDirectory(dir=destination.parent, prefix=".partial-") as workspace,
        Progress(*columns, console=console) as progress,
    ):
        teacher = train_teacher(recipe, reviews, tokenizer, progress)
        texts = transfer_texts(recipe, reviews)
        logits, vectors = rate(teacher, texts, tokenizer, progress)
        pieces = cut_vocabulary(recipe, reviews, tokenizer)
        student_tokenizer = cut_tokenizer(tokenizer, pieces)
        student = new_student(recipe, teacher, tokenizer, pieces)
        train_student(recipe, student, encode(student_tokenizer, texts), logits, vectors, progress)
        built = Path(workspace) / "built"
        save(student, student_tokenizer, built, recipe.positions)
        reached = accuracy(built, held_out)
        best = teacher_accuracy(teacher, held_out, tokenizer, progress)
        parameters = sum(p.numel() for p in student.parameters())
        (built / "README.md").write_text(
            model_card(recipe, parameters, len(pieces), len(reviews), len(held_out), reached, best)
        )
        publish(built, destination)
    size = sum(file.stat().st_size for file in destination.iterdir())
    console.print(
        f"{destination}: {parameters:,} parameters, {size / 1e6:.2f} MB; "
        f"held-out accuracy {reached:.1%} on {len(held_out):,} sentences (teacher {best:.1%}); "
        f"{(time.monotonic() - start) / 60:.1f} minutes",
        highlight=False,
    )


if __name__ == "__main__":
    typer.run(main)
