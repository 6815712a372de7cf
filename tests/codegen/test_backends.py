"""Backends: what Inductor makes of programs, at every size that they are for."""

import warnings

import pytest
import torch
from test_regions import relative
from test_trace import traced
from torch import Tensor, fx, nn

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

    def refuses(program: fx.GraphModule) -> Runnable:
        taken.append(program)
        if len(taken) == 1:
            return lowered(program)
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
    assert len(refused) == len(taken) - 1
    assert f"a program runs op by op: {refused[0]}" in str(explainer.report())
    expected = attnlrp_fx.compile(model, x, backend="eager")(x).relevance
    for name, relevance in explainer(x).relevance.items():
        torch.testing.assert_close(relevance, expected[name])
    with pytest.raises(BackendError, match="could not compile the program"):
        attnlrp_fx.compile(model, x)


def test_a_backend_that_fails() -> None:
    """The error names its reason."""

    def fails(graph_module, inputs):
        raise RuntimeError("no compiler here\nand more")

    with pytest.raises(BackendError, match="could not compile the program") as caught:
        attnlrp_fx.compile(nn.Linear(3, 2).eval(), torch.randn(2, 3), backend=fails)
    assert caught.value.why == "RuntimeError: no compiler here"
