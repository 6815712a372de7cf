"""How sure a mean is: intervals by bootstrap over samples, and paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from attnlrp_fx.errors import InputError, MissingExtraError

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over samples and where the true one lies with 95 % confidence."""

    mean: float
    low: float
    high: float
    samples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    @property
    def reach(self) -> float:
        """Half of the interval's length."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        return f"{self.mean:.3g} ±{self.reach:.2g}"


def interval(values: Tensor | Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean and its interval, by the percentile bootstrap over samples; always the same draws.

    Raises:
        InputError: there are no samples.
        MissingExtraError: scipy is not installed.
    """
    given = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
    if given.ndim != 1 or not len(given):
        raise InputError(f"an interval of {given.shape} samples", remedy="pass one number a sample")
    mean = float(given.mean())
    if len(given) < 2 or np.ptp(given) == 0:
        return Interval(mean, mean, mean, len(given))
    found = (
        _scipy_stats()
        .bootstrap(
            (given,),
            np.mean,
            n_resamples=DRAWS,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(0),
        )
        .confidence_interval
    )
    return Interval(mean, float(found.low), float(found.high), len(given))


def paired_difference(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> Interval:
    """The mean of a − b, sample by sample: sharper than two intervals, as samples vary together.

    Raises:
        InputError: a and b are not of the same samples.
        MissingExtraError: scipy is not installed.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape:
        raise InputError(f"{first.shape} samples against {second.shape}", remedy="pair them")
    return interval((first - second).tolist())


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError(
            "Intervals need scipy.",
            why=str(error),
            remedy="pip install 'attnlrp_fx[evaluation]'",
        ) from error
    return stats
