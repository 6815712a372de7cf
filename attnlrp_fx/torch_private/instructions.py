"""What Inductor finds out and compiles once on a machine, for all programs on CPUs.

It tries which instructions the processor has, by compiling a program for each kind, and compiles
headers: seconds that need not be waited for.
"""

import os
import threading
from contextlib import suppress
from importlib import import_module

_known = threading.Event()
"""Whether no thread is trying instructions."""
_known.set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_known.set)  # A forked process has no such thread.
_next = threading.Lock()


def instructions_meanwhile() -> None:
    """Have Inductor try the processor's instructions while something else is done.

    And compile the headers that programs in C++ share.
    """
    instructions = import_module("torch._inductor.cpu_vec_isa")
    cache = import_module("torch._inductor.codecache").CppWrapperCodeCache
    import_module("torch._inductor.cpp_builder")  # which they would import meanwhile

    def probe() -> None:
        try:
            with suppress(Exception):  # It comes up again where they are asked for.
                instructions.pick_vec_isa()
        finally:
            _known.set()
        with suppress(Exception):
            cache.load_pybinding_async([], "", needs_vec_isa=True)  # It compiles no more than them.

    with _next:
        _known.wait()
        _known.clear()
    threading.Thread(target=probe, daemon=True).start()


def wait_for_instructions() -> None:
    """Wait for them: Inductor changes its flags while it tries them, and two threads that do at a
    time find fewer than there are."""
    _known.wait()
