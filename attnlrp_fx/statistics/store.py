"""The directory of a run: what it is about, how far it has come, and what came out of it.

    run.json                      whose run it is: model, rules, data, options
    part-0-of-1.safetensors       checkpoint of a process: its statistics and its place in the data
    statistics.safetensors        all of them together, when all is done
    units.parquet, top.parquet    the same as tables

A checkpoint is one file, statistics and place together, written whole or not at all. So whenever a
run is killed, what it finds when it goes on is how things stood after some window of the data set.
"""

import hashlib
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor, nn

from attnlrp_fx.errors import InputError, MissingExtraError
from attnlrp_fx.files import write_atomically
from attnlrp_fx.statistics.tables import KINDS, NOBODY, Statistics

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = "attnlrp_fx.latent_statistics/1"
RUN, RESULT, UNITS, TOP = "run.json", "statistics.safetensors", "units.parquet", "top.parquet"


def checkpoint_name(rank: int, world: int) -> str:
    """The checkpoint of one of several processes."""
    return f"part-{rank}-of-{world}.safetensors"


def save(path: Path, statistics: Statistics, **more: Any) -> None:
    """Write statistics, and what else there is to know, whole or not at all."""
    write_atomically(path, as_bytes(statistics, **more))


def as_bytes(statistics: Statistics, **more: Any) -> bytes:
    """Statistics, and what else there is to know, in the form of safetensors."""
    about = json.dumps({"schema": SCHEMA, **statistics.about(), **more})
    tensors = {name: value.contiguous() for name, value in statistics.tensors().items()}
    return tensors_as_bytes(tensors, {"about": about})  # of two keys the order would vary


def load(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """What `save` wrote.

    Raises:
        InputError: the file is none of these.
    """
    try:
        return _read(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"'{path}' cannot be read", why=str(error)) from error


def from_bytes(data: bytes) -> Statistics:
    """What `as_bytes` gave."""
    length = int.from_bytes(data[:8], "little")
    about = json.loads(data[8 : 8 + length])["__metadata__"]
    return Statistics.of(tensors_of_bytes(data), json.loads(about["about"]))


def _read(path: Path) -> tuple[Statistics, dict[str, Any]]:
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        if about.get("schema") != SCHEMA:
            raise InputError(
                f"'{path}' holds no statistics of latent units",
                why=f"its schema is {about.get('schema', 'missing')}, not {SCHEMA}",
            )
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return Statistics.of(tensors, about), about


def claim(directory: Path, run: Mapping[str, Any]) -> None:
    """Make a directory that of a run, or find that it is.

    Raises:
        InputError: it belongs to another run, or holds other files.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RUN
    text = json.dumps({"schema": SCHEMA, **run}, indent=2, sort_keys=True)
    if not path.exists():
        others = sorted(each.name for each in directory.iterdir() if not each.name.startswith("."))
        if others:
            raise InputError(
                f"directory '{directory}' is not empty",
                why=f"it holds {', '.join(others[:3])}, and no {RUN}",
                remedy="name a new directory",
            )
        write_atomically(path, text)
    was = json.loads(path.read_text())
    wanted = json.loads(text)
    differing = [key for key in wanted if was.get(key) != wanted[key]]
    if differing:
        named = differing[0]
        raise InputError(
            f"directory '{directory}' belongs to another run",
            why=f"{named}: {was.get(named, 'unknown')}, not {wanted[named]}",
            remedy="name another directory, or go on as that run began",
        )


def fingerprint(model: nn.Module) -> str:
    """What tells a model from another: its tensors' names and sizes, and some of their values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // 997)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def write_tables(directory: Path, statistics: Statistics, vocabulary: Mapping[int, str]) -> None:
    """Write the tables as Parquet, each whole or not at all.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    parquet = need_pyarrow()
    for name, table in (
        (UNITS, units_table(statistics)),
        (TOP, top_table(statistics, vocabulary)),
    ):
        written = BytesIO()
        parquet.write_table(table, written)
        write_atomically(directory / name, written.getvalue())


def need_pyarrow() -> Any:
    """The module that reads and writes Parquet.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError(
            "Tables in Parquet need pyarrow.",
            why=str(error),
            remedy="pip install 'attnlrp_fx[statistics]'",
        ) from error
    return parquet


def units_table(statistics: Statistics) -> "pa.Table":
    """A line a unit: site, role, unit, index, count, active, and by kind mean, mean_absolute,
    maximum."""
    import pyarrow as pa

    tables = []
    for name, site in statistics.sites.items():
        many = len(site)
        columns: dict[str, Any] = {
            "site": pa.array([name] * many).dictionary_encode(),
            "role": pa.array([site.role] * many).dictionary_encode(),
            "unit": pa.array([site.unit] * many).dictionary_encode(),
            "index": torch.arange(many).numpy(),
            "count": site.count.expand(many).numpy(),
            "active": site.active.numpy(),
        }
        for kind in KINDS:
            columns[f"{kind}_mean"] = site.mean(kind).numpy()
            columns[f"{kind}_mean_absolute"] = site.mean_absolute(kind).numpy()
            columns[f"{kind}_maximum"] = site.maxima[kind].numpy()
        tables.append(pa.table(columns))
    return pa.concat_tables(tables).unify_dictionaries()


def top_table(statistics: Statistics, vocabulary: Mapping[int, str]) -> "pa.Table":
    """A line a top sample: site, index, kind, rank, sample, score, start, tokens and values."""
    import pyarrow as pa

    tables = []
    spelled = pa.array([vocabulary.get(i, str(i)) for i in range(max(vocabulary, default=-1) + 1)])
    for name, site in statistics.sites.items():
        for kind, ranking in site.rankings.items():
            units, ranks = (ranking.numbers != NOBODY).nonzero(as_tuple=True)
            values, tokens = ranking.values[units, ranks], ranking.tokens[units, ranks]
            shown = ~values.isnan()
            known = shown & (tokens >= 0)
            many = len(units)
            columns = {
                "site": pa.array([name] * many).dictionary_encode(),
                "index": units.numpy(),
                "kind": pa.array([kind] * many).dictionary_encode(),
                "rank": ranks.numpy(),
                "sample": ranking.numbers[units, ranks].numpy(),
                "score": ranking.scores[units, ranks].numpy(),
                "start": ranking.starts[units, ranks].numpy(),
                "token_ids": _lists(known, pa.array(tokens[known].numpy())),
                "values": _lists(shown, pa.array(values[shown].numpy())),
            }
            if vocabulary:
                ids = pa.array(tokens[known].numpy())
                columns["tokens"] = _lists(known, spelled.take(ids))
            tables.append(pa.table(columns))
    return pa.concat_tables(tables).unify_dictionaries()


def _lists(chosen: Tensor, flat: Any) -> Any:
    """Lists of unlike lengths of a flat array."""
    import pyarrow as pa

    ends = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)])
    return pa.ListArray.from_arrays(ends.to(torch.int32).numpy(), flat)
