"""The container: a PT2 archive of `torch.export.save`, with a seal.

    archive/models/model.json                the captured graph, in torch.export's own schema
    archive/data/weights/, data/constants/   tensors as raw bytes, and where each one is
    archive/data/aotinductor/                instead of both: an AOTInductor package
    archive/extra/explainer.json             what makes an explainer of it, see `description`
    archive/extra/tokenizer.json             the tokenizer, where there is one
    archive/extra/seal.json                  every other member's size and SHA-256

`torch.export.load` reads the first, but it unpickles what asks for it and evaluates expressions as
Python. So nothing here calls it: members are read as bytes and numbers, and what is not expected is
an error. The seal finds damage. It is no signature: who can write the file can seal it.
"""

import hashlib
import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.export import ExportedProgram

from attnlrp_fx.errors import ArtefactError, AttnLRPError
from attnlrp_fx.files import writing_atomically

VERSION = 1
SCHEMA = "attnlrp_fx.explainer/"
EXTRA = "extra/"
MODEL, EXPLAINER, TOKENIZER, SEAL = (
    "models/model.json",
    "extra/explainer.json",
    "extra/tokenizer.json",
    "extra/seal.json",
)
_CHUNK = 1 << 24
_LARGEST_TEXT = 1 << 30
"""What a member of JSON can have at most."""


def write_archive(path: Path, program: ExportedProgram, extra: Mapping[str, str]) -> None:
    """Write a program, and texts beside it, whole or not at all.

    Args:
        path: the file.
        program: what `torch.export.save` writes; without example inputs, which it would pickle.
        extra: further members of text, by name.
    """
    with writing_atomically(path) as file:
        with warnings.catch_warnings():  # about weights without values, which fill no memory
            warnings.simplefilter("ignore")
            torch.export.save(program, file, extra_files=_below_extra(extra))
        seal(file)


def seal(file: BinaryIO) -> None:
    """Add the seal to an archive that is open for reading and writing."""
    with zipfile.ZipFile(file, "a") as archive:
        members = {}
        for info in archive.infolist():
            with archive.open(info) as member:
                members[_inside(info.filename)] = [info.file_size, _digest(member)]
        root = archive.namelist()[0].partition("/")[0]
        text = json.dumps({"schema": f"{SCHEMA}{VERSION}", "members": members}, indent=1)
        archive.writestr(f"{root}/{SEAL}", text)


class Archive:
    """A sealed archive's members, each checked when it is read.

    Args:
        path: the file.

    Raises:
        ArtefactError: there is no such file, or it is damaged, foreign or newer.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            what = (
                f"'{path}' is a directory" if self.path.is_dir() else f"there is no file '{path}'"
            )
            raise ArtefactError(what, remedy="name a file that explainer.save has written")
        with ExitStack() as stack:
            stack.enter_context(damage(self.path))
            file = stack.enter_context(open(self.path, "rb"))
            self._zip = stack.enter_context(zipfile.ZipFile(file))
            self._members = self._found()
            self._sealed = self._seal()
            self._check_members()
            self._open = stack.pop_all()

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *error: Any) -> bool | None:
        return self._open.__exit__(*error)

    def names(self) -> list[str]:
        """The members."""
        return list(self._sealed)

    def json(self, name: str) -> Any:
        """A member of JSON."""
        return json.loads(self.text(name))

    def text(self, name: str) -> str:
        """A member of text."""
        info = self._info(name)
        if info.file_size > _LARGEST_TEXT:
            raise self.wrong(f"member '{name}' is too large")
        return bytes(self.tensor(name).numpy()).decode()

    def tensor(self, name: str) -> Tensor:
        """A member's bytes, uint8."""
        info = self._info(name)
        found = torch.empty(info.file_size, dtype=torch.uint8)
        view, digest, at = found.numpy().data, hashlib.sha256(), 0
        with self._zip.open(info) as opened:
            member: Any = opened  # as in _digest
            while at < len(view):
                count = member.readinto(view[at : at + _CHUNK])
                if not count:
                    raise self.wrong(f"member '{name}' is cut off")
                digest.update(view[at : at + count])
                at += count
        if digest.hexdigest() != self._sealed[name][1]:
            raise self.wrong(f"member '{name}' is not what was written")
        return found

    def check(self, name: str) -> None:
        """Find out whether a member is what was written, without keeping it."""
        with self._zip.open(self._info(name)) as member:
            digest = _digest(member)
        if digest != self._sealed[name][1]:
            raise self.wrong(f"member '{name}' is not what was written")

    def wrong(self, why: str) -> ArtefactError:
        """What is said of a damaged file."""
        return _damaged(self.path, why)

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._sealed:
            raise self.wrong(f"it has no member '{name}'")
        return self._members[name]

    def _found(self) -> dict[str, zipfile.ZipInfo]:
        infos = self._zip.infolist()
        found = {_inside(info.filename): info for info in infos}
        roots = {info.filename.partition("/")[0] for info in infos}
        if len(found) != len(infos) or len(roots) > 1:
            raise self.wrong("a member is there twice")
        for name, info in found.items():
            stored = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
            if not stored or info.file_size != info.compress_size:
                raise self.wrong(f"member '{name}' is not stored as it is")
        return found

    def _seal(self) -> dict[str, tuple[int, str]]:
        """What was sealed.

        Raises:
            ArtefactError: there is no seal, or it is of a newer version.
        """
        if SEAL not in self._members:
            raise ArtefactError(
                f"'{self.path}' is no saved explainer",
                why="it is another archive" if self._members else "it is empty",
                remedy="name a file that explainer.save has written",
            )
        if self._members[SEAL].file_size > _LARGEST_TEXT:
            raise self.wrong("its seal is too large")
        sealed = json.loads(self._zip.read(self._members[SEAL]))
        schema, members = sealed["schema"], sealed["members"]
        if not isinstance(schema, str) or not schema.startswith(SCHEMA):
            raise self.wrong("its seal says that it is something else")
        if int(schema.removeprefix(SCHEMA)) != VERSION:
            raise ArtefactError(
                f"'{self.path}' was saved by another version of attnlrp_fx",
                why=f"its format is {schema}, this version reads {SCHEMA}{VERSION}",
                remedy="install a version that reads it, or save the explainer again",
            )
        return {str(name): (int(size), str(digest)) for name, (size, digest) in members.items()}

    def _check_members(self) -> None:
        differing = (self._members.keys() - {SEAL}) ^ self._sealed.keys()
        if differing:
            raise self.wrong(f"member '{min(differing)}' was added or is missing")
        for name, (size, _) in self._sealed.items():
            if self._members[name].file_size != size:
                raise self.wrong(f"member '{name}' is not what was written")


@contextmanager
def damage(path: str | Path) -> Iterator[None]:
    """Within it, whatever zip, JSON, sympy or PyTorch say about a file is said in one way."""
    try:
        yield
    except AttnLRPError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise _damaged(path, f"{type(error).__name__}: {lines[0][:200]}") from error


def _damaged(path: str | Path, why: str) -> ArtefactError:
    return ArtefactError(
        f"'{path}' is no saved explainer, or it is damaged",
        why=why,
        remedy="save the explainer again, or copy the file again",
    )


def _digest(member: Any) -> str:
    """A member's SHA-256. It reads into buffers, which its declared type, IO, leaves out."""
    return hashlib.file_digest(member, "sha256").hexdigest()


def _inside(name: str) -> str:
    """A member's name without the folder that an archive puts all into."""
    return name.partition("/")[2]


def _below_extra(members: Mapping[str, str]) -> dict[str, str]:
    """By the names that torch.export.save gives its extra files."""
    return {name.removeprefix(EXTRA): text for name, text in members.items()}
