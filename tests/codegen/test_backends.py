"""Backends: what Inductor makes of programs, at every size that they are for."""

import pytest
import torch
from test_regions import relative
from torch import Tensor, nn

import attnlrp_fx
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


def test_a_backend_that_fails(monkeypatch) -> None:
    """Whose kernels fail after all programs were made, as well."""

    def fails(graph_module, inputs):
        raise RuntimeError("no compiler here\nand more")

    with pytest.raises(BackendError, match="could not compile the program") as caught:
        attnlrp_fx.compile(nn.Linear(3, 2).eval(), torch.randn(2, 3), backend=fails)
    assert caught.value.why == "RuntimeError: no compiler here"
