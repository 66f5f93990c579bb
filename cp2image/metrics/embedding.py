"""Turn cells into vectors whose distributions are compared. Pure: numpy, pandas, torch; no Ray.

Three ways, each with its protocol to print beside the score:

* `CellProfilerEmbedding` (``cp``): measured CellProfiler features; needs no weights.
* `FilterBank` (``filterbank``): energies of fixed oriented filters; needs no weights, any channels.
* `InceptionEmbedding` (``inception``): FID's own network; needs the published weights.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh
from torch import Tensor
from torch.nn import functional

from cp2image.columns import measurements, require_columns
from cp2image.errors import EvaluationError, PatchError
from cp2image.metrics.inception import DIMENSION, SIDE, load_inception, read_weights
from cp2image.storage import read_bytes

_BRIGHTEST_FLOAT = 4.0


class Embedding(Protocol):
    """Maps patches to vectors; the same instance must embed both sets of a comparison."""

    @property
    def name(self) -> str:
        """Short name for reports."""

    @property
    def dimension(self) -> int:
        """Length D of a vector."""

    @property
    def protocol(self) -> dict[str, str | int]:
        """Everything that changes the numbers: sizes, normalisation, hash of the weights."""

    def embed(self, patches: ArrayLike) -> NDArray[np.float32]:
        """Map patches (N, C, H, W) as `quantise` takes them to (N, D)."""


def quantise(patches: ArrayLike) -> NDArray[np.uint8]:
    """Bring patches to 8 bit, as both sets of a comparison must be.

    Parameters
    ----------
    patches
        Shape (N, C, H, W): uint8 as is, uint16 divided by 257, floats clamped to [0, 1], × 255,
        rounded.

    Raises
    ------
    PatchError
        If the shape or type is another, a value is not finite, or floats plainly are not in [0, 1].
    """
    x: NDArray[Any] = np.asarray(patches)
    if x.ndim != 4:
        raise PatchError(f"patches have shape {x.shape}; expected (cells, channels, height, width)")
    if x.dtype == np.uint8:
        return x
    if x.dtype == np.uint16:
        return np.rint(x / np.float32(257)).astype(np.uint8)
    if not np.issubdtype(x.dtype, np.floating):
        raise PatchError(f"patches are {x.dtype}; expected uint8, uint16 or floats in [0, 1]")
    if not np.isfinite(x).all():
        raise PatchError("patches hold NaN or infinity; the generator that made them has diverged")
    if x.size and x.max() > _BRIGHTEST_FLOAT:
        raise PatchError(
            f"float patches reach {x.max():.4g}; expected [0, 1]: divide by the type's maximum or "
            "normalise both sets the same way first"
        )
    quantised: NDArray[np.uint8] = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8)
    return quantised


class FilterBank:
    """Log energies of a fixed bank of oriented band-pass filters, in the manner of scattering.

    A binomial pyramid of four levels; on each, Gabor pairs of wavelength 4 px (so 4, 8, 16 and
    32 px of the patch) in four orientations, whose modulus is averaged over the centre (Gaussian,
    σ = a sixth of the side: the nucleus) and over the rest. With ε = 1/255, per channel: 2 log
    mean intensities, 32 log moduli, 4 log ratios of mean square to squared mean (sparseness); per
    pair of channels: the cosine between their intensities and between their moduli on each level.
    That is 129 numbers for three channels. Nothing is learned or random.

    Parameters
    ----------
    channels
        Number of channels of the patches.
    batch
        Patches at a time.
    device
        Torch device.
    """

    name = "filterbank"
    LEVELS, ORIENTATIONS, WAVELENGTH, SIGMA, KERNEL = 4, 4, 4.0, 2.0, 7

    def __init__(self, channels: int = 3, *, batch: int = 64, device: str = "cpu") -> None:
        self.channels, self.batch, self.device = channels, batch, torch.device(device)
        self.bank = _gabor_bank(self.ORIENTATIONS, self.WAVELENGTH, self.SIGMA, self.KERNEL).to(
            self.device
        )

    @property
    def dimension(self) -> int:
        """38 per channel and 5 per pair of channels."""
        pairs = self.channels * (self.channels - 1) // 2
        per_channel = 2 + self.LEVELS * (2 * self.ORIENTATIONS + 1)
        return per_channel * self.channels + (self.LEVELS + 1) * pairs

    @property
    def protocol(self) -> dict[str, str | int]:
        """What was compared."""
        return {
            "embedding": self.name,
            "version": 1,
            "dimension": self.dimension,
            "channels": self.channels,
            "input": "8 bit",
        }

    def embed(self, patches: ArrayLike) -> NDArray[np.float32]:
        """Map patches (N, C, H, W) of at least 32 × 32 px to (N, D).

        Raises
        ------
        PatchError
            If the number of channels or the size does not fit, or as `quantise` does.
        """
        x = quantise(patches)
        if x.shape[1] != self.channels:
            raise PatchError(f"patches have {x.shape[1]} channels, the filter bank {self.channels}")
        if min(x.shape[2:]) < 32:
            raise PatchError(
                f"patches of {x.shape[2]} × {x.shape[3]} px; expected at least 32 × 32"
            )
        return _in_batches(x, self._features, self.dimension, self.batch, self.device)

    def _features(self, x: Tensor) -> Tensor:
        x = x / 255
        found = list(_log(_pool(x)).unbind(-1))
        ratios = [_cosines(x)]
        for level in range(self.LEVELS):
            if level:
                x = functional.avg_pool2d(_blur(x), 2)
            modulus = self._modulus(x)
            found += list(_log(_pool(modulus)).flatten(2).unbind(-1))
            found.append(_log(modulus.square().mean((2, 3, 4))) - 2 * _log(modulus.mean((2, 3, 4))))
            ratios.append(_cosines(modulus.flatten(2).unsqueeze(-1)))
        return torch.cat([torch.cat(found, 1), *ratios], 1)

    def _modulus(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        margin = self.KERNEL // 2
        padded = functional.pad(x.reshape(n * c, 1, h, w), [margin] * 4, mode="reflect")
        even, odd = functional.conv2d(padded, self.bank).chunk(2, dim=1)
        return (even.square() + odd.square()).sqrt().reshape(n, c, self.ORIENTATIONS, h, w)


def _gabor_bank(orientations: int, wavelength: float, sigma: float, size: int) -> Tensor:
    axis = torch.arange(size, dtype=torch.float64) - size // 2
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    envelope = torch.exp(-(x.square() + y.square()) / (2 * sigma**2))
    even, odd = [], []
    for index in range(orientations):
        angle = torch.tensor(np.pi * index / orientations, dtype=torch.float64)
        phase = 2 * np.pi / wavelength * (x * angle.cos() + y * angle.sin())
        wave = phase.cos() * envelope
        wave = wave - envelope * (wave.sum() / envelope.sum())
        even.append(wave / wave.norm())
        ripple = phase.sin() * envelope
        odd.append(ripple / ripple.norm())
    return torch.stack(even + odd).unsqueeze(1).float()


def _blur(x: Tensor) -> Tensor:
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device) / 16
    n, c, h, w = x.shape
    padded = functional.pad(x.reshape(n * c, 1, h, w), [2, 2, 2, 2], mode="reflect")
    return functional.conv2d(padded, torch.outer(weights, weights)[None, None]).reshape(n, c, h, w)


def _pool(x: Tensor) -> Tensor:
    """Return the weighted means over the centre and over the rest, shape (…, 2)."""
    h, w = x.shape[-2:]
    y = (torch.arange(h, device=x.device) - (h - 1) / 2) / (h / 6)
    z = (torch.arange(w, device=x.device) - (w - 1) / 2) / (w / 6)
    centre = torch.exp(-(y[:, None].square() + z[None, :].square()) / 2)
    rest = 1 - centre
    weights = torch.stack([centre / centre.sum(), rest / rest.sum()])
    return torch.einsum("...hw,khw->...k", x, weights)


def _log(x: Tensor) -> Tensor:
    return (x + 1 / 255).log()


def _cosines(x: Tensor) -> Tensor:
    flat = x.flatten(2)
    unit = flat / (flat.norm(dim=-1, keepdim=True) + 1e-6)
    pairs = [(unit[:, a] * unit[:, b]).sum(-1) for a, b in combinations(range(x.shape[1]), 2)]
    return torch.stack(pairs, 1) if pairs else x.new_zeros((len(x), 0))


class InceptionEmbedding:
    """Pool features of the FID Inception network.

    Parameters
    ----------
    weights
        Path or URI of the published weights (``pt_inception-2015-12-05``): a PyTorch state dict or
        the same as safetensors. Nothing in the file is executed.
    channels
        Three channel indices of the patches that the network sees as red, green and blue; the same
        index three times shows a single stain.
    batch
        Patches at a time. Float results depend on it in the last digits, so it is in the protocol.
    device
        Torch device.

    Raises
    ------
    EvaluationError
        If the file is no state dict, or any of its 566 names or shapes differs.
    StorageError
        If it cannot be read.
    """

    name = "inception"
    dimension = DIMENSION

    def __init__(
        self,
        weights: str,
        channels: Sequence[int] = (0, 1, 2),
        *,
        batch: int = 64,
        device: str = "cpu",
    ) -> None:
        if len(channels) != 3:
            raise EvaluationError(
                f"{len(channels)} channels for Inception; name three, or one three times"
            )
        data = read_bytes(weights)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.channels, self.batch, self.device = tuple(channels), batch, torch.device(device)
        self.network = load_inception(read_weights(data, weights), weights).to(self.device)

    @property
    def protocol(self) -> dict[str, str | int]:
        """What was compared."""
        return {
            "embedding": self.name,
            "dimension": self.dimension,
            "weights_sha256": self.sha256,
            "channels": ",".join(map(str, self.channels)),
            "input": f"8 bit, TensorFlow 1 bilinear to {SIDE} px, (x - 128) / 128",
            "batch": self.batch,
        }

    def embed(self, patches: ArrayLike) -> NDArray[np.float32]:
        """Map patches (N, C, H, W) to (N, 2048).

        Raises
        ------
        PatchError
            If a chosen channel is not there, or as `quantise` does.
        """
        x = quantise(patches)
        if not all(0 <= channel < x.shape[1] for channel in self.channels):
            raise PatchError(
                f"channels {self.channels} were chosen for Inception, but the patches have "
                f"{x.shape[1]}; repeat one of them, such as (0, 0, 0)"
            )
        chosen = x[:, list(self.channels)]
        return _in_batches(chosen, self.network, self.dimension, self.batch, self.device)


def _in_batches(
    x: NDArray[np.uint8], network: Any, dimension: int, batch: int, device: torch.device
) -> NDArray[np.float32]:
    result = np.empty((len(x), dimension), dtype=np.float32)
    with torch.inference_mode():
        for start in range(0, len(x), batch):
            part = torch.from_numpy(np.ascontiguousarray(x[start : start + batch])).to(device)
            result[start : start + batch] = network(part.float()).cpu().numpy()
    return result


@dataclass(frozen=True, eq=False)
class CellProfilerEmbedding:
    """Measured features, standardised and reduced by what the real set looks like.

    Positions are left out, angles become cosine and sine on their own period. Columns that are
    constant or more than 5 % missing in the real set are dropped; the others are centred on the
    median, divided by 1.4826 × MAD (by the standard deviation where the MAD is 0), clipped at ± 5,
    missing values set to 0, and projected on the leading principal axes of the real set.

    Attributes
    ----------
    columns
        Columns read, in order.
    axes
        Principal axes, shape (D, columns after the angles are doubled).
    """

    columns: tuple[str, ...]
    kept: NDArray[np.int64]
    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    mean: NDArray[np.float64]
    axes: NDArray[np.float64]

    name = "cp"
    CLIP, MISSING = 5.0, 0.05

    @classmethod
    def fit(cls, real: pd.DataFrame, dimensions: int = 64) -> "CellProfilerEmbedding":
        """Learn columns, scales and axes from the real cells, one row each.

        Parameters
        ----------
        real
            CellProfiler columns of the real cells (metadata is ignored).
        dimensions
            Number of principal axes; fewer when there are fewer columns or cells.

        Raises
        ------
        EvaluationError
            If no column is left.
        """
        columns = tuple(c.name for c in measurements(map(str, real.columns)) if not c.is_position)
        raw = _numbers(real, columns)
        missing = (~np.isfinite(raw)).sum(axis=0)
        present = np.flatnonzero(missing <= max(min(cls.MISSING * len(raw), len(raw) - 1), 0))
        raw = raw[:, present]
        centre, spread = _robust_scale(raw)
        varies = spread > 0
        kept = present[varies]
        if len(kept) == 0:
            raise EvaluationError(
                f"none of {len(columns)} measured columns varies over {len(real)} real cells; "
                "check that the table holds CellProfiler features of more than one cell"
            )
        x = _standardise(raw[:, varies], centre[varies], spread[varies], cls.CLIP)
        mean = x.mean(axis=0)
        if len(x) <= x.shape[1]:
            axes = np.linalg.svd(x - mean, full_matrices=False)[2][:dimensions].copy()
        else:
            last = len(kept) - 1
            covariance = np.cov(x, rowvar=False).reshape(len(kept), -1)
            leading = [max(0, last + 1 - dimensions), last]
            axes = np.ascontiguousarray(eigh(covariance, subset_by_index=leading)[1].T[::-1])
        return cls(columns, kept, centre[varies], spread[varies], mean, axes)

    @property
    def dimension(self) -> int:
        """Number of principal axes."""
        return len(self.axes)

    @property
    def protocol(self) -> dict[str, str | int]:
        """What was compared."""
        return {
            "embedding": self.name,
            "dimension": self.dimension,
            "features": len(self.kept),
            "input": f"robust z-score, clipped at {self.CLIP:g}, and PCA, both of the real set",
        }

    def embed(self, table: pd.DataFrame) -> NDArray[np.float32]:
        """Map the cells of ``table``, which has at least the fitted columns, to (N, D).

        Raises
        ------
        ColumnError
            If a column is missing.
        """
        require_columns([str(c) for c in table.columns], self.columns, "table of measured features")
        raw = _numbers(table, self.columns)[:, self.kept]
        x = _standardise(raw, self.centre, self.scale, self.CLIP)
        return ((x - self.mean) @ self.axes.T).astype(np.float32)


def _numbers(table: pd.DataFrame, columns: Sequence[str]) -> NDArray[np.float64]:
    parts = []
    for column in measurements(columns):
        values = table[column.name].to_numpy(dtype=np.float64, na_value=np.nan)
        if column.period is None:
            parts.append(values)
        else:
            angle = np.where(np.isfinite(values), values * (2 * np.pi / column.period), np.nan)
            parts += [np.cos(angle), np.sin(angle)]
    return np.stack(parts).T if parts else np.empty((len(table), 0))  # columns are contiguous


def _robust_scale(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the median and the robust standard deviation of each column; 0 where constant."""
    if x.size == 0:
        return np.zeros(x.shape[1]), np.zeros(x.shape[1])
    x = np.where(np.isfinite(x), x, np.nan)
    centre = np.nanmedian(x, axis=0)
    distance = np.abs(x - centre)
    spread = 1.4826 * np.nanmedian(distance, axis=0)
    least = 1e-6 * np.nanmax(np.abs(x), axis=0)
    narrow = np.flatnonzero(~(spread > least))
    deviation = np.nanstd(x[:, narrow], axis=0)
    spread[narrow] = np.where(deviation > least[narrow], deviation, 0.0)
    return centre, spread


def _standardise(
    x: NDArray[np.float64], centre: NDArray[np.float64], scale: NDArray[np.float64], clip: float
) -> NDArray[np.float64]:
    z = np.clip((x - centre) / scale, -clip, clip)
    return np.where(np.isnan(z), 0.0, z)
