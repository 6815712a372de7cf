"""Ahead of time: the same explanations to 1e-6 from a library that needs no Python, also in C++."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch.testing import assert_close

import attnlrp_fx
from attnlrp_fx import ArtefactError, Contrast, InputError

SOURCE = Path(__file__).parents[2] / "examples" / "cpp" / "explain.cpp"
TORCH = Path(torch.__file__).parent


class Net(nn.Module):
    """Rows of tokens to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.relu(self.table(ids)).sum(1))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, (2, 5))
    explainer = attnlrp_fx.compile(
        Net().eval(), {"ids": ids}, backend="eager", target=Contrast(against=None)
    )
    path = tmp_path_factory.mktemp("ahead") / "net.lrp.pt2"
    with config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):
        explainer.save(path, aot=True)
    return explainer, path


def test_in_python(compiled: Any) -> None:
    explainer, path = compiled
    loaded = attnlrp_fx.load_aot(path)
    assert str(loaded) == "AheadOfTimeExplainer(Net, attnlrp)"
    for shape in ((2, 5), (3, 7), (1, 4), (1, 1)):
        ids = torch.randint(0, 11, shape)
        for index in (None, 2):
            expected = explainer(ids, target=Contrast(index))
            found = loaded(ids, index=index)
            assert_close(found.relevance["ids"], expected.relevance["ids"], atol=1e-6, rtol=1e-6)
            assert_close(found.target_value, expected.target_value, atol=1e-6, rtol=1e-6)
            assert_close(found.outputs, expected.outputs, atol=1e-6, rtol=1e-6)
            assert torch.equal(found.target_index, expected.target_index)
            assert found.labels == expected.labels
    assert torch.equal(loaded(ids=ids, index=[2]).relevance["ids"], found.relevance["ids"])


def test_errors(compiled: Any, tmp_path: Path) -> None:
    _, path = compiled
    loaded = attnlrp_fx.load_aot(path)
    with pytest.raises(InputError, match="missing is input 'ids'"):
        loaded()
    with pytest.raises(InputError, match="there is no input 'mask'"):
        loaded(ids=torch.ones(1, 2, dtype=torch.int64), mask=None)
    with pytest.raises(InputError, match=r"'ids' is \(3,\)"):
        loaded(torch.ones(3, dtype=torch.int64))
    with pytest.raises(InputError, match=r"torch\.float32, not torch\.int64"):
        loaded(torch.ones(1, 2))
    with pytest.raises(InputError, match=r"index has shape \(2,\)"):
        loaded(torch.ones(1, 2, dtype=torch.int64), index=[0, 1])
    with pytest.raises(ArtefactError, match=r"holds compiled code[\s\S]*load_aot"):
        attnlrp_fx.load(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.pt2").write_bytes(data)
    with pytest.raises(ArtefactError, match="or it is damaged"):
        attnlrp_fx.load_aot(tmp_path / "x.pt2")
    x = torch.ones(2, 3)
    edited = attnlrp_fx.compile(
        nn.Sequential(nn.Linear(3, 2), nn.ReLU()).eval(),
        x,
        backend="eager",
        latent=["0"],
        editable=True,
    )
    with pytest.raises(ArtefactError, match="is not edited"):
        edited.save(tmp_path / "y.pt2", aot=True)


@pytest.mark.skipif(not (shutil.which("g++") and SOURCE.exists()), reason="nothing to build")
def test_in_cpp(compiled: Any, tmp_path: Path) -> None:
    """The example program, built by one line, prints what Python finds."""
    explainer, path = compiled
    program, libraries = tmp_path / "explain", TORCH / "lib"
    build = ["g++", "-std=c++20", "-O0", str(SOURCE), "-o", str(program)]
    build += [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
    build += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-Wl,--no-as-needed"]
    build += ["-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def lines(*arguments: str) -> list[list[float]]:
        ran = subprocess.run([program, path, *arguments], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return [[float(number) for number in line.split()] for line in ran.stdout.splitlines()]

    ids = torch.tensor([[5, 2, 7]])
    for index, options in ((None, ()), (1, ("--index", "1"))):
        expected = explainer(ids, target=Contrast(index))
        outputs, value, chosen, relevance = map(torch.tensor, lines(*options, "i:5,2,7"))
        assert_close(outputs, expected.outputs[0], atol=1e-6, rtol=1e-6)
        assert_close(value, expected.target_value, atol=1e-6, rtol=1e-6)
        assert chosen.tolist() == expected.target_index.tolist()
        assert_close(relevance, expected.relevance["ids"][0], atol=1e-6, rtol=1e-6)
    wrong = subprocess.run([program, path, "5,2"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (1, "")
    assert "begins with neither i: nor f:" in wrong.stderr
