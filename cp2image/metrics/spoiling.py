"""Ways to spoil cells on purpose, to see whether a metric notices. Pure: numpy and scipy."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Patches = NDArray[np.uint8]

_BLUR, _NOISE, _MODES = 2.0, 0.1, 10


def blurred(patches: Patches, rng: np.random.Generator) -> Patches:
    """Blur each channel by a Gaussian of 2 px."""
    return _eight_bit(gaussian_filter(patches.astype(np.float32), (0, 0, _BLUR, _BLUR)))


def noisy(patches: Patches, rng: np.random.Generator) -> Patches:
    """Add normal noise of a tenth of the full scale."""
    noise = rng.normal(0, 255 * _NOISE, patches.shape).astype(np.float32)
    return _eight_bit(patches + noise)


def mean_image(patches: Patches, rng: np.random.Generator) -> Patches:
    """Replace every cell by the mean of all."""
    return _eight_bit(np.broadcast_to(patches.mean(axis=0, dtype=np.float64), patches.shape))


def few_modes(patches: Patches, rng: np.random.Generator) -> Patches:
    """Replace every cell by one of ten of them."""
    return patches[rng.choice(len(patches), _MODES, replace=False)][
        rng.integers(_MODES, size=len(patches))
    ]


def swapped_channels(patches: Patches, rng: np.random.Generator) -> Patches:
    """Exchange the first two channels.

    Raises
    ------
    IndexError
        If there is only one.
    """
    order = [1, 0, *range(2, patches.shape[1])]
    return np.ascontiguousarray(patches[:, order])


def shuffled(patches: Patches, rng: np.random.Generator) -> Patches:
    """Give every cell the patch of another: the set stays, the pairing goes."""
    return patches[np.roll(rng.permutation(len(patches)), 1)]


WAYS: dict[str, Callable[[Patches, np.random.Generator], Patches]] = {
    "blur": blurred,
    "noise": noisy,
    "mean image": mean_image,
    "ten cells only": few_modes,
    "channels swapped": swapped_channels,
    "features shuffled": shuffled,
}


def _eight_bit(values: NDArray[np.floating]) -> Patches:
    found: Patches = np.rint(np.clip(values, 0, 255)).astype(np.uint8)
    return found
