"""Backends: what Inductor makes of programs, at every size that they are for."""

import contextlib
import warnings
from unittest import mock

import pytest
import torch
from test_regions import relative
from test_trace import traced
from torch import Tensor, fx, nn
from torch._inductor import mkldnn_ir

import attnlrp_fx
from attnlrp_fx import torch_private
from attnlrp_fx.codegen.backends import Runnable, inductor
from attnlrp_fx.errors import BackendError
from attnlrp_fx.targets import Logit


class Convolutions(nn.Module):
    """Down and up again, as in speech models."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(1, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(4, 2, 2, stride=2)

    def forward(self, signal: Tensor) -> Tensor:
        hidden = torch.nn.functional.silu(self.down(signal[:, None]))
        return self.up(hidden).mean(-1)


def test_convolutions_at_other_lengths(tmp_path, monkeypatch) -> None:
    """Inductor's own lowering of a convolution's derivative would fit the example's length alone.

    What it remembers of an earlier run would, too.
    """
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = Convolutions().eval()
    eager, compiled = (
        attnlrp_fx.compile(model, torch.randn(2, 12), backend=backend, target=Logit(1))
        for backend in ("eager", "inductor")
    )
    for shape in ((2, 12), (3, 18), (1, 9)):
        signal = torch.randn(shape)
        found, expected = (one(signal).relevance["signal"] for one in (compiled, eager))
        assert relative(found, expected) <= 1e-5
    assert compiled.compilations == 1


class Gated(nn.Module):
    """One map that a convolution makes weighs the others."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(3, 2)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.maps(pixels)
        return self.head((maps[:, :1] * maps[:, 1:]).mean((2, 3)))


def test_views_of_what_a_convolution_makes() -> None:
    """One program hands them to another, that is compiled for their layout."""
    torch.manual_seed(0)
    model, pixels = Gated().eval(), torch.randn(2, 3, 8, 8)
    found, expected = (
        attnlrp_fx.compile(model, pixels, backend=backend)(pixels).relevance["pixels"]
        for backend in ("inductor", "eager")
    )
    assert relative(found, expected) <= 1e-5


class Pooled(nn.Module):
    """A map of one pixel made larger again, and elements added up at one place."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Conv2d(3, 32, 3, padding=1)
        self.pooled = nn.Conv2d(32, 32, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.maps(pixels)
        one = torch.nn.functional.silu(self.pooled(maps.mean((2, 3), keepdim=True)))
        larger = nn.functional.interpolate(one, maps.shape[2:], mode="bilinear")
        place = torch.zeros(1, 1, dtype=torch.int64, device=pixels.device)
        rows = larger.flatten(1).mT
        added = rows.new_zeros(1, rows.shape[1]).scatter_add(0, place.expand_as(rows), rows)
        return (maps * larger).mean((2, 3)) + added.mean()


@pytest.mark.parametrize("threads", [1, 2])
def test_what_adds_up_elements_at_one_place(threads: int, tmp_path, monkeypatch) -> None:
    """On several threads Inductor could not write kernels of its own; on one it can here."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model, pixels = Pooled().eval(), torch.randn(2, 3, 16, 16)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compiled = attnlrp_fx.compile(model, pixels)
        found = compiled(pixels).relevance["pixels"]
    finally:
        torch.set_num_threads(before)
    assert compiled.report().compilations[0].refused == ()
    expected = attnlrp_fx.compile(model, pixels, backend="eager")(pixels).relevance["pixels"]
    assert relative(found, expected) <= 1e-5


class Chunks(nn.Module):
    """A strided convolution, blocks that take what it leaves in chunks, and rows by their values.

    No block has an input of the length itself, and none of its sizes is a whole quotient.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 6, 3, stride=2)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.chosen = nn.Linear(6, 6)

    def forward(self, signal: Tensor) -> Tensor:
        hidden = self.down(signal).mT
        for block in self.blocks:
            length = hidden.shape[1]
            padded = nn.functional.pad(hidden, (0, 0, 0, -length % 4))
            chunks = padded.reshape(hidden.shape[0], -1, 4, 6)
            mixed = torch.nn.functional.silu(block(chunks - chunks.mean(2, keepdim=True)))
            hidden = hidden + mixed.reshape(padded.shape)[:, :length]
        rows = hidden.mean(1)
        loud = rows[:, 0] > 0
        return rows.index_put((loud,), self.chosen(rows[loud]))


def test_sizes_that_inductor_cannot_solve_for(tmp_path, monkeypatch) -> None:
    """What convolutions leave of a length, numbers of chunks, sizes that depend on values."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model = Chunks().eval()
    compiled, eager = (
        attnlrp_fx.compile(model, torch.randn(4, 2, 30), target=Logit(0), backend=backend)
        for backend in ("inductor", "eager")
    )
    assert compiled.report().compilations[0].refused == ()
    for shape in ((4, 2, 30), (5, 2, 41), (1, 2, 19)):
        signal = torch.randn(shape)
        found, expected = (one(signal).relevance["signal"] for one in (compiled, eager))
        assert relative(found, expected) <= 1e-5
    assert compiled.compilations == 1


def test_what_runs_graphs_is_traced_by_pytorch(monkeypatch) -> None:
    """Branches, which our own tracing does not follow; nothing else is."""
    taken: list[str] = []
    for name in ("inductor", "inductor_lowered"):
        monkeypatch.setattr(torch_private, name, lambda *given, name=name: taken.append(name))
    branches = [fx.symbolic_trace(branch) for branch in (lambda y: (y * 2,), lambda y: (y + 1,))]

    def function(x: Tensor) -> list[Tensor]:
        return list(torch.ops.higher_order.cond(x.sum() > 0, *branches, (x,)))

    for program in (function, lambda x: [x[x > 0]], lambda x: [x * 2]):
        inductor(traced(program, torch.randn(4, 6)), ())
    assert taken == ["inductor", "inductor_lowered", "inductor_lowered"]


def test_what_inductor_cannot_take_runs_op_by_op(monkeypatch) -> None:
    """With a warning, and the report says why; if it can take nothing, that is an error."""
    lowered, taken = torch_private.inductor_lowered, []

    def refuses(program: fx.GraphModule, in_cpp: bool) -> Runnable:
        taken.append(program)
        if len(taken) == 1:
            return lowered(program, in_cpp)
        raise RuntimeError("no bounds of s0//2\nand more")

    monkeypatch.setattr(torch_private, "inductor_lowered", refuses)
    model, x = nn.Linear(3, 2).eval(), torch.randn(2, 3)
    with warnings.catch_warnings(record=True) as seen:  # Inductor, imported, has some of its own.
        warnings.simplefilter("always")
        explainer = attnlrp_fx.compile(model, x)
    (warned,) = (str(one.message) for one in seen if one.category is UserWarning)
    assert "op by op" in warned
    assert "(RuntimeError: no bounds of s0//2)" in warned
    refused = explainer.report().compilations[0].refused
    assert set(refused) == {"RuntimeError: no bounds of s0//2"}
    assert 2 * len(refused) == len(taken) - 1  # in C++ and in Python
    assert f"a program runs op by op: {refused[0]}" in str(explainer.report())
    expected = attnlrp_fx.compile(model, x, backend="eager")(x).relevance
    for name, relevance in explainer(x).relevance.items():
        torch.testing.assert_close(relevance, expected[name])
    with pytest.raises(BackendError, match="could not compile the program"):
        attnlrp_fx.compile(model, x)


@pytest.mark.parametrize("when", ["at once", "at the end"])
def test_what_cannot_be_in_cpp_is_in_python(when: str, monkeypatch) -> None:
    """Inductor may not know how to write it, or the compiler of C++ what to do with it."""
    lowered, wrappers = torch_private.inductor_lowered, []

    def no_cpp(program: fx.GraphModule, in_cpp: bool) -> Runnable:
        wrappers.append(in_cpp)
        if in_cpp and when == "at once":
            raise NotImplementedError
        return lowered(program, in_cpp)

    @contextlib.contextmanager
    def meanwhile():
        yield
        if wrappers[-1] and when == "at the end":
            raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch_private, "inductor_lowered", no_cpp)
    monkeypatch.setattr(torch_private, "kernels_meanwhile", meanwhile)
    model, x = nn.Linear(3, 2).eval(), torch.randn(2, 3)
    explainer = attnlrp_fx.compile(model, x)
    assert explainer.report().compilations[0].refused == ()
    half = len(wrappers) // 2
    order = [True, False] * half if when == "at once" else [True] * half + [False] * half
    assert wrappers == order
    expected = attnlrp_fx.compile(model, x, backend="eager")(x).relevance["input"]
    torch.testing.assert_close(explainer(x).relevance["input"], expected)


class Wide(nn.Module):
    """Products with weights of every kind, and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(512, 640)
        self.second = nn.Linear(640, 512, bias=False)
        self.narrow = nn.Linear(640, 8)
        self.register_buffer("rows", torch.randn(1024, 512).div(20)[::2])
        self.register_buffer("biases", torch.randn(1024)[::2])

    def forward(self, hidden: Tensor) -> Tensor:
        inner = torch.nn.functional.gelu(self.first(hidden))
        added = torch.addmm(hidden, hidden, self.rows.mT)
        other = torch.addmm(self.biases, hidden, self.rows)
        return self.narrow(inner) + (self.second(inner) + added + other).mean(-1, keepdim=True)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo asks for it.
@pytest.mark.parametrize("is_differentiable", [False, True])
def test_products_by_onednn(is_differentiable: bool, tmp_path, monkeypatch) -> None:
    """With weights as they lie and transposed, biases that are no vector in one piece, no rows."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model, hidden = Wide().eval(), torch.randn(4, 512)
    options = {"differentiable": is_differentiable, "target": Logit(3)}
    kernels = mock.Mock(wraps=mkldnn_ir.LinearUnary)
    monkeypatch.setattr(mkldnn_ir, "LinearUnary", kernels)
    compiled, eager = (
        attnlrp_fx.compile(model, hidden, backend=backend, **options)
        for backend in ("inductor", "eager")
    )
    for rows in (4, 9, 1):
        hidden = torch.randn(rows, 512)
        found, expected = (one(hidden) for one in (compiled, eager))
        torch.testing.assert_close(found.outputs, expected.outputs, rtol=1e-5, atol=1e-5)
        relevances = (one.relevance["hidden"].detach() for one in (found, expected))
        assert relative(*relevances) <= 1e-5
    if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
        assert kernels.call_count >= 8  # four ahead and four back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_complementary_error_function(dtype: torch.dtype) -> None:
    """Right in its tails to as many digits as exp(−z²) has, and where it is 0 and 2."""
    limits = torch.tensor([0.0, -30, 30, -torch.inf, torch.inf, torch.nan])
    numbers = torch.cat([torch.linspace(-9, 9, 4001), limits]).to(dtype)
    compiled = torch.compile(
        lambda x: torch.erfc(x), backend=torch_private.inductor_differentiable, dynamic=True
    )
    found = compiled(numbers)
    expected = torch.erfc(numbers.double())
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float64: 1e-13}[dtype]
    tiny = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tiny, equal_nan=True)
    assert found[-6:-1].tolist() == [1, 2, 0, 2, 0]


def test_a_backend_that_fails() -> None:
    """The error names its reason."""

    def fails(graph_module, inputs):
        raise RuntimeError("no compiler here\nand more")

    with pytest.raises(BackendError, match="could not compile the program") as caught:
        attnlrp_fx.compile(nn.Linear(3, 2).eval(), torch.randn(2, 3), backend=fails)
    assert caught.value.why == "RuntimeError: no compiler here"
