"""Backends: what Inductor makes of programs, at every size that they are for."""

import pytest
import torch
from test_regions import relative
from test_trace import traced
from torch import Tensor, nn

import attnlrp_fx
from attnlrp_fx import torch_private
from attnlrp_fx.codegen.backends import inductor
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


def test_sizes_that_depend_on_values(monkeypatch) -> None:
    """A program with some is PyTorch's to trace; one with none is not traced by it."""
    taken: list[str] = []
    for name in ("inductor", "inductor_lowered"):
        monkeypatch.setattr(torch_private, name, lambda *given, name=name: taken.append(name))
    for program in (lambda x: [x[x > 0]], lambda x: [x * 2]):
        inductor(traced(program, torch.randn(4, 6)), ())
    assert taken == ["inductor", "inductor_lowered"]


def test_a_backend_that_fails() -> None:
    """The error names its reason."""

    def fails(graph_module, inputs):
        raise RuntimeError("no compiler here\nand more")

    with pytest.raises(BackendError, match="could not compile the program") as caught:
        attnlrp_fx.compile(nn.Linear(3, 2).eval(), torch.randn(2, 3), backend=fails)
    assert caught.value.why == "RuntimeError: no compiler here"
