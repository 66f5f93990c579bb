"""Normalisation of patches: from the acquisition scale to [0, 1] and what it forgets. Pure numpy.

``per_patch_max`` (the paper's) divides each patch and channel by its own maximum: absolute
brightness is lost. ``plate_percentile`` maps a plate's percentiles of each channel to 0 and 1:
brightness is comparable within a plate, and how plates differ is lost. ``screen_percentile`` maps
those of all training plates together, for every plate alike: how they differ stays, and a plate
needs no pixels of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cp2image.errors import CheckpointError

KINDS = ("per_patch_max", "plate_percentile", "screen_percentile")
LOW, HIGH = 0.1, 99.9
"""Percentiles of a plate's, or the screen's, pixels that become 0 and 1."""
_LEVELS = 65536


@dataclass(frozen=True)
class Intensity:
    """How a model sees pixels.

    Attributes
    ----------
    kind
        One of `KINDS`.
    plates
        Plates with limits of their own; the last row of ``low`` and ``high`` is for all others.
    low, high
        Intensities (as shares of the type's full scale) that become 0 and 1, (plates + 1,
        channels), float64; empty for ``per_patch_max``.
    """

    kind: str = "per_patch_max"
    plates: tuple[str, ...] = ()
    low: NDArray[np.float64] = field(default_factory=lambda: np.zeros((1, 0)))
    high: NDArray[np.float64] = field(default_factory=lambda: np.zeros((1, 0)))

    def limits(
        self, patches: NDArray[Any], plates: Sequence[str], full_scale: float
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the intensities that become 0 and 1 for each patch and channel.

        Parameters
        ----------
        patches
            Shape (N, C, H, W), on the acquisition scale.
        plates
            N names.
        full_scale
            Value of the type that stands for intensity 1.

        Returns
        -------
        tuple of NDArray
            Offset and factor, (N, C) float32: normalised = (patch − offset) · factor. A channel
            without any signal gets factor 0.
        """
        if self.kind == "per_patch_max":
            high = patches.max(axis=(2, 3)).astype(np.float64)
            low = np.zeros_like(high)
        else:
            known = {plate: row for row, plate in enumerate(self.plates)}
            rows = np.array([known.get(plate, len(self.plates)) for plate in plates], dtype=int)
            low, high = self.low[rows] * full_scale, self.high[rows] * full_scale
        span = high - low
        factor = np.divide(1.0, span, out=np.zeros_like(span), where=span > 0)
        return low.astype(np.float32), factor.astype(np.float32)

    def apply(
        self, patches: NDArray[Any], plates: Sequence[str], full_scale: float
    ) -> NDArray[np.float32]:
        """Return the patches normalised and limited to [0, 1], float32, (N, C, H, W)."""
        offset, factor = self.limits(patches, plates, full_scale)
        scaled = (patches.astype(np.float32) - offset[..., None, None]) * factor[..., None, None]
        limited: NDArray[np.float32] = np.clip(scaled, 0.0, 1.0)
        return limited

    def restore(self, patches: NDArray[np.uint8], plates: Sequence[str]) -> NDArray[np.float32]:
        """Return normalised 8-bit patches at the acquisition scale, shares of its full scale.

        ``per_patch_max`` forgets that scale: its patches come back as they are, in [0, 1]. What
        normalisation clipped stays clipped.

        Parameters
        ----------
        patches
            Shape (N, C, H, W).
        plates
            N names.
        """
        shares = patches.astype(np.float32) / np.float32(255)
        if self.kind == "per_patch_max":
            return shares
        known = {plate: row for row, plate in enumerate(self.plates)}
        rows = np.array([known.get(plate, len(self.plates)) for plate in plates], dtype=int)
        low, high = (part[rows, :, None, None].astype(np.float32) for part in (self.low, self.high))
        restored = np.clip(low + shares * (high - low), 0.0, 1.0)
        return restored.astype(np.float32, copy=False)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-able form."""
        limits = {"low": self.low.tolist(), "high": self.high.tolist()}
        return {"kind": self.kind, "plates": list(self.plates), **limits}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Intensity":
        """Read back `to_json`'s form.

        Raises
        ------
        CheckpointError
            If the kind is not known to this version.
        """
        if data["kind"] not in KINDS:
            raise CheckpointError(
                f"normalisation {data['kind']!r} is not one of {', '.join(KINDS)}; update cp2image"
            )
        low = np.array(data["low"], dtype=np.float64)
        return cls(data["kind"], tuple(data["plates"]), low, np.array(data["high"]))


class IntensityFit:
    """Collects pixel histograms plate by plate; memory does not grow with the cells."""

    def __init__(self, channels: int) -> None:
        self._histograms: dict[str, NDArray[np.int64]] = {}
        self._channels = channels

    def add(self, plate: str, patches: NDArray[Any], full_scale: float) -> None:
        """Count the pixels of (N, C, H, W) patches of one plate."""
        shares = np.clip(patches.astype(np.float64) / full_scale, 0.0, 1.0)
        levels = np.rint(shares * (_LEVELS - 1)).astype(np.int64)
        counts = self._histograms.setdefault(
            plate, np.zeros((self._channels, _LEVELS), dtype=np.int64)
        )
        for channel in range(self._channels):
            counts[channel] += np.bincount(levels[:, channel].ravel(), minlength=_LEVELS)

    def finish(self, kind: str = "plate_percentile") -> Intensity:
        """Return the limits of all plates together, and for ``plate_percentile`` of every one."""
        plates = tuple(sorted(self._histograms)) if kind == "plate_percentile" else ()
        everything = sum(self._histograms.values(), np.zeros((self._channels, _LEVELS), np.int64))
        tables = [*(self._histograms[plate] for plate in plates), everything]
        low = np.array([[_percentile(c, LOW) for c in table] for table in tables])
        high = np.array([[_percentile(c, HIGH) for c in table] for table in tables])
        return Intensity(kind, plates, low, high)


def _percentile(counts: NDArray[np.int64], percent: float) -> float:
    total = np.cumsum(counts)
    level = int(np.searchsorted(total, total[-1] * percent / 100.0))
    return level / (_LEVELS - 1)
