"""Every error the package raises on purpose.

One message form for all: what went wrong, where (node and the user's own source line), why, and
what to do. A caller that catches `AttnLRPError` catches them all; the second base of each class is
the built-in that the same mistake would raise elsewhere.
"""


class AttnLRPError(Exception):
    """Base of all errors; the message reads: what, where, why, remedy.

    Args:
        what: one sentence that says what went wrong.
        where: the node, module path or source line it concerns.
        why: the cause, where it is known.
        remedy: what the user can do about it.
    """

    def __init__(self, what: str, *, where: str = "", why: str = "", remedy: str = "") -> None:
        parts = [what]
        parts += [f"  where: {where}"] if where else []
        parts += [f"  why: {why}"] if why else []
        parts += [f"  what to do: {remedy}"] if remedy else []
        super().__init__("\n".join(parts))
        self.what, self.where, self.why, self.remedy = what, where, why, remedy


class CaptureError(AttnLRPError, RuntimeError):
    """The model could not be captured as a graph."""


class RuleError(AttnLRPError, RuntimeError):
    """An op has no rule, or a composite gives it one that does not fit."""


class PassError(AttnLRPError, RuntimeError):
    """A pass left an invalid graph behind; always a defect of the pass."""


class InputError(AttnLRPError, ValueError):
    """The inputs of a call do not fit the compiled program."""


class TargetError(AttnLRPError, ValueError):
    """The target does not exist in the model's outputs."""


class BackendError(AttnLRPError, RuntimeError):
    """A backend is unknown or failed to compile the program."""


class NonFiniteError(AttnLRPError, ArithmeticError):
    """NaN or infinity in inputs, outputs or relevance."""


class ModelNotFoundError(AttnLRPError, OSError):
    """A model directory or name that cannot be loaded."""


class ArtefactError(AttnLRPError, ValueError):
    """A file is damaged, foreign or newer than this version, or something cannot be saved."""


class MissingExtraError(AttnLRPError, ImportError):
    """A feature needs an optional dependency that is not installed."""


class OutOfMemoryError(AttnLRPError, MemoryError):
    """A batch does not fit into memory; the message names the options that need less."""
