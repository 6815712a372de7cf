"""Files that are not what was written: each loads and works, or is one error of ours."""

import json
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnlrp_fx
from attnlrp_fx import ArtefactError, AttnLRPError
from attnlrp_fx.artefacts.archive import EXPLAINER, MODEL, SEAL, VERSION, Archive, seal
from attnlrp_fx.artefacts.expressions import as_text, expression_of

X = torch.randn(3, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of a network as small as can be."""
    model = nn.Linear(2, 2).eval()
    path = tmp_path_factory.mktemp("saved") / "x.lrp.pt2"
    attnlrp_fx.compile(model, X, backend="eager").save(path)
    return path.read_bytes()


def loads(path: Path) -> bool:
    """Whether a file loads, and then works; anything but our own error fails the test."""
    try:
        attnlrp_fx.load(path)(X)
    except AttnLRPError as error:
        return not error.remedy
    return True


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(found: dict[str, bytes], sealed: bool = False) -> bytes:
    """An archive of members; sealed anew, as if it had been written so."""
    written = BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, content in found.items():
            if not (sealed and name.endswith(SEAL)):
                archive.writestr(name, content)
    if sealed:
        seal(written)
    return written.getvalue()


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 50])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    start = draw.choice([0, 0, draw.randrange(len(data))])
    return data[start : draw.randrange(start, len(data))]


def rearranged(data: bytes, draw: random.Random) -> bytes:
    """Members removed, swapped, doubled or put in."""
    found = members(data)
    one, other = draw.sample(sorted(found), 2)
    kind = draw.randrange(3)
    if kind == 0:
        del found[one]
    elif kind == 1:
        found[one], found[other] = found[other], found[one]
    else:
        found[f"{one}x"] = found[other]
    return packed(found, sealed=draw.random() < 0.5)


def edited(data: bytes, draw: random.Random) -> bytes:
    """A value of the JSON is another, and all is sealed again."""
    found = members(data)
    name = draw.choice([n for n in found if n.endswith(".json") and not n.endswith(SEAL)])
    tree = json.loads(found[name])
    places = list(_places(tree))
    where, key = draw.choice(places)
    values = (None, True, -1, 0, 3, 1 << 40, 1.5, "", "x", "torch.ops.aten.sin.default", [], {})
    if draw.random() < 0.2:
        del where[key]
    elif draw.random() < 0.3:
        source, other = draw.choice(places)
        where[key] = source[other]
    else:
        where[key] = draw.choice(values)
    try:
        found[name] = json.dumps(tree).encode()
    except ValueError:  # it holds itself
        return data
    return packed(found, sealed=True)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = tree.keys() if isinstance(tree, dict) else range(len(tree))
    for key in list(keys):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


@pytest.mark.parametrize(
    ("mutate", "count", "at_most"),
    [(flipped, 500, 0.2), (cut, 300, 0.0), (rearranged, 100, 0.3), (edited, 100, 0.7)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_thousand_mutations(
    saved: bytes,
    tmp_path: Path,
    mutate: Callable[[bytes, random.Random], bytes],
    count: int,
    at_most: float,
) -> None:
    """None crashes, hangs, or raises what is not ours; most are noticed."""
    path, loaded = tmp_path / "x.lrp.pt2", 0
    for number in range(count):
        changed = mutate(saved, random.Random(number))
        path.write_bytes(changed)
        try:
            loaded += loads(path)
        except Exception as error:
            raise AssertionError(f"{mutate.__name__} {number}: {error!r}") from error
    assert loaded <= at_most * count


def with_json(data: bytes, member: str, change: Callable[[Any], None]) -> bytes:
    found = members(data)
    name = next(n for n in found if n.endswith(member))
    tree = json.loads(found[name])
    change(tree)
    found[name] = json.dumps(tree).encode()
    return packed(found, sealed=True)


def _graph(tree: Any) -> Any:
    return tree["graph_module"]["graph"]


def _target(name: str) -> Callable[[Any], None]:
    return lambda tree: _graph(tree)["nodes"][0].update(target=name)


def _size(text: str) -> Callable[[Any], None]:
    def change(tree: Any) -> None:
        given = _graph(tree)["tensor_values"]["input_1"]
        given["sizes"][0]["as_expr"]["expr_str"] = text

    return change


def _pickled(tree: Any) -> None:
    next(iter(tree["config"].values()))["use_pickle"] = True


BAIT = "__import__('pathlib').Path('BAIT').touch()"


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        (MODEL, _size(BAIT), "a size"),
        (MODEL, _size("Symbol('s0').func.__init__"), "a size"),
        (MODEL, _size("Pow(Integer(9), Integer(999999999))"), "power of 999999999"),
        (MODEL, _size("Add(" * 900 + "Integer(1)" + ")" * 900), "a size|nest|recursion"),
        (MODEL, _target("torch.hub.load"), "no op of PyTorch's"),
        (MODEL, _target("torch.ops.aten.from_file.default"), "more than compute"),
        (MODEL, _target("torch.ops.aten.relu_.default"), "writes in place"),
        (MODEL, _target("torch.ops.aten.nothing.default"), "has no op"),
        (MODEL, _target("torch.ops.attnlrp_fx.other.default"), "has no op"),
        (MODEL, _target("math.factorial"), "no op of PyTorch's"),
        (MODEL, lambda tree: tree["schema_version"].update(major=9), "version 9"),
        ("model_weights_config.json", _pickled, "is a pickle"),
        ("model_constants_config.json", _pickled, "is a pickle"),
        (EXPLAINER, lambda about: about.update(passes=["os.system"]), "os.system"),
        (EXPLAINER, lambda about: about["composite"]["entries"][0][1].update(rule="Path"), "Path"),
        (EXPLAINER, lambda about: about.update(target={"target": "Custom"}), "Custom"),
        (EXPLAINER, lambda about: about.update(aot=True), "holds compiled code"),
    ],
)
def test_nothing_of_a_file_is_run(
    saved: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    member: str,
    change: Callable[[Any], None],
    message: str,
) -> None:
    """Files that are sealed as they should be, and ask for what no explainer asks for."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.lrp.pt2"
    path.write_bytes(with_json(saved, member, change))
    with pytest.raises(ArtefactError, match=message):
        attnlrp_fx.load(path)
    assert not (tmp_path / "BAIT").exists()


def test_other_files(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.pt2"
    with pytest.raises(ArtefactError, match="there is no file"):
        attnlrp_fx.load(path)
    with pytest.raises(ArtefactError, match="is a directory"):
        attnlrp_fx.load(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(ArtefactError, match="or it is damaged"):
        attnlrp_fx.load(path)
    torch.export.save(torch.export.export(nn.Linear(2, 2), (X,)), path)
    with pytest.raises(ArtefactError, match=r"no saved explainer[\s\S]*another archive"):
        attnlrp_fx.load(path)
    found = members(saved)
    name = next(n for n in found if n.endswith(SEAL))
    newer = found[name].replace(b"explainer/%d" % VERSION, b"explainer/%d" % (VERSION + 1))
    path.write_bytes(packed({**found, name: newer}))
    with pytest.raises(ArtefactError, match=r"another version of attnlrp_fx[\s\S]*explainer/2"):
        attnlrp_fx.load(path)
    path.write_bytes(saved)
    with pytest.raises(ArtefactError, match="no compiled code"):
        attnlrp_fx.load_aot(path)


def test_a_failed_save_leaves_what_was_there(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lrp.pt2"
    path.write_bytes(saved)
    explainer = attnlrp_fx.load(path)

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(shutil, "rmtree", fails)  # not what writes: it must not be needed
    monkeypatch.setattr("attnlrp_fx.artefacts.archive.seal", fails)
    with pytest.raises(OSError, match="no space"):
        explainer.save(path)
    assert path.read_bytes() == saved
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_members_are_read_whole(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.lrp.pt2"
    path.write_bytes(saved)
    with Archive(path) as archive:
        assert MODEL in archive.names()
        archive.check(MODEL)
        with pytest.raises(ArtefactError, match="no member 'nothing'"):
            archive.text("nothing")


@pytest.mark.parametrize(
    "text",
    [
        "Add(Integer(1), Mul(Integer(2), Symbol('s0', integer=True, positive=True)))",
        "FloorDiv(Symbol('s1', integer=True, positive=True), Integer(2))",
        "LessThan(Symbol('s1', integer=True, positive=True), Integer(40))",
    ],
)
def test_expressions_and_back(text: str) -> None:
    found = expression_of(text)
    assert expression_of(as_text(found)) == found


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "s0",
        "Integer(1.5)",
        "Integer(True)",
        "Symbol('s0', eval=True)",
        "Symbol('os')",
        "lambda: 0",
    ],
)
def test_no_expressions(text: str) -> None:
    with pytest.raises((ValueError, SyntaxError)):
        expression_of(text)
