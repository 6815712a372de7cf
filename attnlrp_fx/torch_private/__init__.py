"""The one place where PyTorch's private API is used.

Each module says why what it holds is needed. `tests/test_torch_private.py` uses each function, so
that an upgrade fails loudly.
"""

from attnlrp_fx.torch_private.compiling import (
    inductor,
    inductor_decompositions,
    inductor_differentiable,
    inductor_lowered,
    kernels_meanwhile,
)
from attnlrp_fx.torch_private.fake_tensors import (
    fake_mode_of,
    fresh,
    is_plain_fake,
    new_fake_mode,
    new_symbols,
    storage_of,
)
from attnlrp_fx.torch_private.instructions import instructions_meanwhile, wait_for_instructions
from attnlrp_fx.torch_private.lowerings import mended_lowerings
from attnlrp_fx.torch_private.sizes import (
    SIZE_FUNCTIONS,
    SymbolicSizes,
    example_and_range,
    example_of,
    expression_of,
    fails,
    grows_with,
    size_assumptions,
    typical_size,
    with_values,
)
from attnlrp_fx.torch_private.tracing import (
    TRACING,
    composite,
    decompositions,
    lazy_graph_module,
    nothing_remembered,
    outside_of_tracing,
    own_backwards,
    symbolic_dispatch,
    unlike_symbols,
    written,
    written_late,
)

__all__ = [
    "SIZE_FUNCTIONS",
    "TRACING",
    "SymbolicSizes",
    "composite",
    "decompositions",
    "example_and_range",
    "example_of",
    "expression_of",
    "fails",
    "fake_mode_of",
    "fresh",
    "grows_with",
    "inductor",
    "inductor_decompositions",
    "inductor_differentiable",
    "inductor_lowered",
    "instructions_meanwhile",
    "is_plain_fake",
    "kernels_meanwhile",
    "lazy_graph_module",
    "mended_lowerings",
    "new_fake_mode",
    "new_symbols",
    "nothing_remembered",
    "outside_of_tracing",
    "own_backwards",
    "size_assumptions",
    "storage_of",
    "symbolic_dispatch",
    "typical_size",
    "unlike_symbols",
    "wait_for_instructions",
    "with_values",
    "written",
    "written_late",
]
