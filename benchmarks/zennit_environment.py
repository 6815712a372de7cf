"""zennit 0.5.1, as a reference in this process: a directory of its own, and an import from it.

zennit runs on any torch, so unlike lxt it needs no environment of its own. It is LGPL: it is
installed on first use, beside this project and not with it, and nothing of it is copied here. The
wheel is checked against the hash pinned below.

    python benchmarks/zennit_environment.py      install it, print where it is
"""

import importlib.util
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from filelock import FileLock
from lxt_environment import cache_directory
from rich.console import Console

VERSION = "0.5.1"
WHEEL = "sha256:a49be81f34ccb851633fea08a07bba2d04e73b00c25ffe54ac0ec822d0a3b096"


class ZennitError(RuntimeError):
    """The reference could not be installed."""


def directory() -> Path:
    """Where zennit lies, installed on the first call.

    It is installed beside its place and renamed into it, so what lies there is complete. Its
    dependencies stay out: torch is here already, and torchvision is not needed (`zennit`).
    """
    cache = cache_directory()
    home = cache / f"zennit-{VERSION}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZennitError(f"cannot make the cache {cache} ({error})") from error
    with FileLock(cache / "zennit.lock"):
        if not home.is_dir():
            partial = cache / "zennit.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _install(partial)
            partial.rename(home)
    return home


def _install(home: Path) -> None:
    requirements = home / "requirements.txt"
    requirements.write_text(f"zennit=={VERSION} --hash={WHEEL}\n")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--only-binary", ":all:"]
    command += ["--target", str(home), "--requirement", str(requirements)]
    with Console(stderr=True).status(f"installing zennit {VERSION} into {home}"):
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-25:])
        raise ZennitError(f"installing zennit failed with exit status {done.returncode}:\n{tail}")


def zennit() -> Any:
    """The module, imported with all its submodules; its directory does not stay on the path."""
    if "zennit" in sys.modules:
        return sys.modules["zennit"]
    home = str(directory())
    sys.path.insert(0, home)
    try:
        with _torchvision():
            return importlib.import_module("zennit")
    finally:
        sys.path.remove(home)


@contextmanager
def _torchvision() -> Iterator[None]:
    """A stand-in for torchvision, for the time of one import.

    zennit imports the classes of torchvision's residual blocks, to recognise them in models of
    torchvision's. There are none here, and torchvision itself, whose default wheel is a CUDA build,
    is a lot to install for two names. The stand-in goes again, since others (transformers) look for
    torchvision in order to use it.
    """
    if importlib.util.find_spec("torchvision"):
        yield
        return
    names = ("torchvision", "torchvision.models", "torchvision.models.resnet")
    modules = {name: types.ModuleType(name) for name in names}
    for block in ("BasicBlock", "Bottleneck"):
        setattr(modules[names[-1]], block, type(block, (), {}))
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def main() -> None:
    """Install zennit, and print where it is."""
    try:
        print(Path(zennit().__file__).parent)
    except ZennitError as failure:
        raise SystemExit(f"error: {failure}") from failure


if __name__ == "__main__":
    typer.run(main)
