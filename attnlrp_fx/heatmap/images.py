"""An image as it was before a model's pre-processing, to draw relevance on.

A processor gives a model ``x = (f · p − mean) / std`` for a pixel ``p`` in 0…255, with
``f = 1/255`` unless it says otherwise. So ``p / 255 = (x · std + mean) / (255 · f)``, in 0…1. Where
no processor is known, 0…1 is from the smallest value of the image to its largest, and the caption
says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnlrp_fx.errors import InputError

CHANNELS = (1, 3, 4)
"""How many channels an image may have: grey, colours, or colours and one that is not drawn."""

_BYTE = 255
_GREY = (0.299, 0.587, 0.114)
"""The weight of red, green and blue in brightness (ITU-R BT.601)."""


@dataclass(frozen=True, slots=True)
class Normalisation:
    """What a processor did to the pixels, a number a channel, or one for all.

    Args:
        mean: subtracted.
        std: divided by, afterwards; not 0.
        white: what 255 became before the mean was subtracted.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float = 1.0

    @classmethod
    def of(cls, processor: Any) -> Normalisation | None:
        """That of an image processor, or of a processor that has one.

        Args:
            processor: anything with `image_mean` and `image_std`; `do_normalize`, `do_rescale` and
                `rescale_factor` are heeded where it has them, as transformers' processors do.

        Returns:
            None if it normalises, and has None for by what.

        Raises:
            InputError: it is no image processor, or has numbers that cannot be undone.
        """
        processor = getattr(processor, "image_processor", processor)
        if not hasattr(processor, "image_mean") or not hasattr(processor, "image_std"):
            raise InputError(
                f"the processor, a {type(processor).__name__}, is none of images",
                why="it has no image_mean and image_std",
                remedy="pass an image processor, or leave it out: images are then stretched",
            )
        mean, std = processor.image_mean, processor.image_std
        if not getattr(processor, "do_normalize", True):
            mean, std = 0.0, 1.0
        if mean is None or std is None:
            return None
        rescales = getattr(processor, "do_rescale", True)
        factor = getattr(processor, "rescale_factor", 1 / _BYTE) if rescales else 1.0
        found = cls(_numbers(mean), _numbers(std), _BYTE * factor)
        if 0 in (*found.std, found.white) or len(found.mean) != len(found.std):
            raise InputError(
                f"the processor, a {type(processor).__name__}, cannot be undone",
                why=f"its mean is {mean}, its std {std}, its rescale_factor {factor}",
                remedy="leave it out: images are then stretched",
            )
        return found

    def fits(self, image: Tensor) -> bool:
        """Whether it has a number for each channel of an image (channels, height, width)."""
        return len(self.mean) in (1, image.shape[0])

    def undone(self, image: Tensor) -> Tensor:
        """An image (channels, height, width) with 0 for what was 0, and 1 for what was 255."""
        mean, std = (image.new_tensor(numbers)[:, None, None] for numbers in (self.mean, self.std))
        return (image * std + mean) / self.white


def _numbers(value: float | Iterable[float]) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, Iterable) else (float(value),)


@dataclass(frozen=True, slots=True)
class Backdrop:
    """The image that relevance is drawn on: (height, width, 3) in 0…1, and what was done to it."""

    pixels: Tensor
    caption: str = ""

    def grey(self) -> Tensor:
        """The same without colours and with less contrast, so that colours drawn on it show."""
        grey = 0.5 + 0.45 * (self.pixels * self.pixels.new_tensor(_GREY)).sum(-1, keepdim=True)
        return grey.expand_as(self.pixels)


def backdrop(image: Tensor, normalisation: Normalisation | None) -> Backdrop:
    """What a model was given, as it looked before.

    Args:
        image: (channels, height, width), floating, with 1, 3 or 4 channels.
        normalisation: what to undo; None, or one that does not fit: the image is stretched.
    """
    image = image.detach().double().cpu()
    said = ["the fourth channel is not drawn"] if image.shape[0] > 3 else []
    if normalisation is not None and normalisation.fits(image):
        image = normalisation.undone(image)[:3]
        if bool(((image < -0.01) | (image > 1.01)).any()):
            said.append("the image has values beyond black and white")
    else:
        image = image[:3]
        finite = image[image.isfinite()]
        low, high = (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)
        image = (image - low) / (high - low or 1.0)
        said.append(f"the image is stretched: black is {low:.4g}, white {high:.4g}")
    pixels = image.nan_to_num(0.5).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
    return Backdrop(pixels.contiguous(), ", ".join(said))


def is_image(values: Tensor) -> bool:
    """Whether an input is a batch of images: (batch, channels, height, width), floating."""
    return values.is_floating_point() and values.dim() == 4 and values.shape[1] in CHANNELS


def spread(cells: Tensor, sigma: float) -> Tensor:
    """Images (..., height, width) blurred by a Gaussian; sums stay, and so does what is constant.

    The image goes on beyond its edges as in a mirror, which makes the blur along an axis a
    symmetric matrix whose rows add up to 1; its columns then do too, so that nothing is lost. What
    is not finite stays where it is and takes no part.
    """
    finite = cells.isfinite()
    height, width = cells.shape[-2:]
    blurred = _blur(height, sigma) @ cells.where(finite, 0) @ _blur(width, sigma)
    return blurred.where(finite, cells)


def _blur(size: int, sigma: float) -> Tensor:
    """(size, size) float64."""
    reach = max(1, round(4 * sigma))
    steps = torch.arange(-reach, reach + 1)
    weights = torch.exp(-0.5 * (steps.double() / sigma) ** 2)
    weights /= weights.sum()
    places = (torch.arange(size)[:, None] + steps) % (2 * size)
    places = places.minimum(2 * size - 1 - places)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, places, weights.expand(places.shape))
