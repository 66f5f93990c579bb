"""Draw and render cells whose shape, brightness and texture are known. Floor 1: numpy, scipy.

The scale is that of MCF-7 cells under a 20 x objective: nuclei of about 25 px, cells of about
50 px. Angles follow CellProfiler and scikit-image: degrees between the y axis (rows) and the major
axis, from -90 to 90.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from cp2image.data.simulated_stains import collect_pixels, paint_actin, paint_dna, paint_tubulin
from cp2image.errors import ConfigError

CHANNELS = ("DNA", "Actin", "Tubulin")

_ANGLES = 256
_HARMONICS = np.arange(3, 7)
_GAP = 3.0


@dataclass(frozen=True)
class Phenotype:
    """What a treatment does to the average cell; the defaults are the untreated cell.

    ``nucleus_area``, ``nucleus_brightness``, ``chromatin_contrast``, ``cell_area``, ``cortex``,
    ``fibres`` and ``tubulin`` are factors on the untreated cell's value. ``granularity`` (0: coarse
    chromatin, 1: fine), ``lobes`` (amplitude of the three-lobed outline in radii), ``roundness``
    (0: as untreated, 1: circular cell), ``spots`` (actin aggregates) and ``bundling`` (of
    microtubules) are values from 0 to 1.
    """

    nucleus_area: float = 1.0
    nucleus_brightness: float = 1.0
    chromatin_contrast: float = 1.0
    granularity: float = 0.4
    lobes: float = 0.03
    cell_area: float = 1.0
    roundness: float = 0.0
    cortex: float = 1.0
    fibres: float = 1.0
    spots: float = 0.05
    tubulin: float = 1.0
    bundling: float = 0.1

    def at(self, strength: float) -> "Phenotype":
        """Return the phenotype at a share of its full effect, 0 being the untreated cell."""
        untreated = Phenotype()
        return replace(
            untreated,
            **{
                name: value + strength * (getattr(self, name) - value)
                for name, value in vars(untreated).items()
            },
        )


@dataclass(frozen=True)
class RenderedCells:
    """A field of view before the camera.

    Attributes
    ----------
    signal
        Float32, shape (3, height, width) in the order of ``CHANNELS``: camera counts above the
        offset, without noise.
    nuclei, cells
        Int32 label images, shape (height, width): 0 outside, n for row n - 1 of the cells. Every
        nucleus lies in its own cell and touches no other nucleus.
    """

    signal: NDArray[np.float32]
    nuclei: NDArray[np.int32]
    cells: NDArray[np.int32]


def draw_cells(
    phenotype: Phenotype, count: int, field_size: int, rng: np.random.Generator
) -> pd.DataFrame:
    """Draw the latent parameters of the cells of one field.

    Returns
    -------
    DataFrame with ``count`` rows: ``center_x``, ``center_y`` of the nucleus (px, from 0);
    ``nucleus_area``, ``cell_area`` (px, the cell's before its neighbours take their part);
    ``nucleus_eccentricity``, ``cell_eccentricity``; ``nucleus_orientation``, ``cell_orientation``,
    ``fibre_orientation`` (degrees); ``nucleus_brightness`` (camera counts); ``chromatin_contrast``
    (standard deviation over mean), ``granularity``, ``lobes``, ``cortex``, ``fibres``, ``spots``,
    ``tubulin``, ``bundling``.

    Raises
    ------
    ConfigError
        If the nuclei do not fit into the field without touching.
    """

    def spread(deviation: float) -> NDArray[np.float64]:
        return np.exp(rng.normal(0.0, deviation, count))

    cycle = 1.0 + rng.beta(0.6, 0.9, count)
    nucleus_ratio = np.clip(rng.normal(0.78, 0.09, count), 0.5, 0.97)
    cell_ratio = np.clip(rng.normal(0.72, 0.12, count), 0.4, 0.95)
    cell_ratio += phenotype.roundness * (0.95 - cell_ratio)
    orientation = rng.uniform(-90.0, 90.0, count)
    cell_orientation = _wrap(orientation + rng.normal(0.0, 25.0, count))
    cells = pd.DataFrame(
        {
            "nucleus_area": 430.0 * phenotype.nucleus_area * cycle**0.6 * spread(0.10),
            "nucleus_eccentricity": np.sqrt(1.0 - nucleus_ratio**2),
            "nucleus_orientation": orientation,
            "nucleus_brightness": 190.0 * phenotype.nucleus_brightness * cycle**0.3 * spread(0.22),
            "chromatin_contrast": 0.19 * phenotype.chromatin_contrast * spread(0.15),
            "granularity": np.clip(rng.normal(phenotype.granularity, 0.08, count), 0.0, 1.0),
            "lobes": np.clip(phenotype.lobes * spread(0.25), 0.0, 0.3),
            "cell_area": 1800.0 * phenotype.cell_area * cycle**0.5 * spread(0.16),
            "cell_eccentricity": np.sqrt(1.0 - cell_ratio**2),
            "cell_orientation": cell_orientation,
            "fibre_orientation": _wrap(cell_orientation + rng.normal(0.0, 12.0, count)),
            "cortex": phenotype.cortex * spread(0.25),
            "fibres": phenotype.fibres * spread(0.30),
            "spots": np.clip(phenotype.spots * spread(0.25), 0.0, 1.0),
            "tubulin": phenotype.tubulin * spread(0.20),
            "bundling": np.clip(phenotype.bundling * spread(0.20), 0.0, 1.0),
        }
    )
    x, y = _place_nuclei(cells, field_size, rng)
    cells.insert(0, "center_x", x)
    cells.insert(1, "center_y", y)
    return cells


def render_cells(cells: pd.DataFrame, field_size: int, rng: np.random.Generator) -> RenderedCells:
    """Render a field of cells in DNA, actin and tubulin.

    The outlines are ellipses bent by harmonics of order 3 and above, which leave area, orientation
    and eccentricity as drawn. Where two bodies overlap, the pixel belongs to the cell in which it
    lies deeper, and their light adds up.

    Parameters
    ----------
    cells
        As ``draw_cells`` returns them.
    field_size
        Side of the square field in pixels.
    rng
        For all that has no parameter: the harmonics' phases and the place in the noise textures.
    """
    shape = (field_size, field_size)
    nucleus_depth = np.full(shape, -1.0, np.float32)
    body_depth = np.full(shape, -1.0, np.float32)
    body = np.zeros(shape, np.float32)
    nuclei = np.zeros(shape, np.int32)
    owner = np.zeros(shape, np.int32)
    nucleus_outlines = _draw_outlines(cells["lobes"].to_numpy(), rng)
    body_outlines = _draw_outlines(np.full(len(cells), 0.10), rng)
    nucleus_centers = cells[["center_y", "center_x"]].to_numpy(np.float64)
    body_centers = _shift_bodies(cells, rng)
    ellipse = ("area", "eccentricity", "orientation")
    nucleus_ellipses = cells[[f"nucleus_{name}" for name in ellipse]].to_numpy(np.float64)
    body_ellipses = cells[[f"cell_{name}" for name in ellipse]].to_numpy(np.float64)
    for index in range(len(cells)):
        window, depth = _measure_depth(
            nucleus_centers[index], nucleus_ellipses[index], nucleus_outlines[index], field_size
        )
        _claim(nucleus_depth[window], nuclei[window], depth, index + 1)
        window, depth = _measure_depth(
            body_centers[index], body_ellipses[index], body_outlines[index], field_size
        )
        _claim(body_depth[window], owner[window], depth, index + 1)
        body[window] += np.clip(depth / 9.0, 0.0, 1.0) ** 0.7
    owner = np.where(nuclei > 0, nuclei, owner)
    signal = np.zeros((len(CHANNELS), *shape), np.float32)
    if owner.any():
        pixels = collect_pixels(cells, owner, nucleus_depth, body, rng)
        signal[0].ravel()[pixels.index] = paint_dna(pixels, nuclei)
        signal[1].ravel()[pixels.index] = paint_actin(pixels)
        signal[2].ravel()[pixels.index] = paint_tubulin(pixels)
        signal[0] *= np.clip(nucleus_depth + 0.5, 0.0, 1.0)
    for plane in signal:
        ndimage.gaussian_filter(plane, 0.8, output=plane)
    return RenderedCells(signal, nuclei, owner)


def _wrap(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bring axis directions into [-90, 90)."""
    return (degrees + 90.0) % 180.0 - 90.0


def _place_nuclei(
    cells: pd.DataFrame, field_size: int, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Spread the cells like a monolayer: random, then pushed apart until no two nuclei touch."""
    ratio = np.sqrt(1.0 - cells["nucleus_eccentricity"].to_numpy() ** 2)
    reach = np.sqrt(cells["nucleus_area"].to_numpy() / (np.pi * ratio))
    reach = reach * (1.0 + 1.5 * cells["lobes"].to_numpy()) + _GAP / 2.0
    body = np.sqrt(cells["cell_area"].to_numpy() / np.pi)
    wanted = np.maximum(reach, 0.8 * body)
    low, high = reach + 1.0, field_size - 2.0 - reach
    if np.any(low > high):
        raise _crowded(len(cells), field_size)
    spot = rng.uniform(low, high, (2, len(cells)))
    apart = reach[:, None] + reach[None, :]
    preferred = wanted[:, None] + wanted[None, :]
    for step in range(500):
        delta = spot[:, :, None] - spot[:, None, :]
        distance = np.sqrt((delta**2).sum(axis=0)) + np.eye(len(cells)) * 1e6
        if step >= 40 and np.all(distance >= apart):
            return spot[0], spot[1]
        target = preferred if step < 40 else 1.02 * apart
        push = np.maximum(target - distance, 0.0) / distance
        spot = np.clip(spot + 0.5 * (delta * push).sum(axis=2), low, high)
    raise _crowded(len(cells), field_size)


def _crowded(count: int, field_size: int) -> ConfigError:
    return ConfigError(
        f"{count} nuclei do not fit into a field of {field_size} x {field_size} px without "
        "touching; raise field_size or lower cells_per_site"
    )


def _draw_outlines(lobes: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return the radius of each unit outline over ``_ANGLES`` directions, area pi."""
    share = np.array([1.0, 0.5, 0.25, 0.2])
    amplitude = lobes[:, None] * share * rng.uniform(0.8, 1.2, (len(lobes), len(share)))
    phase = rng.uniform(0.0, 2.0 * np.pi, amplitude.shape)
    angle = np.linspace(-np.pi, np.pi, _ANGLES, endpoint=False)
    waves = np.cos(_HARMONICS[:, None] * angle + phase[:, :, None])
    radius = 1.0 + (amplitude[:, :, None] * waves).sum(axis=1)
    scale = np.sqrt(1.0 + (amplitude**2).sum(axis=1) / 2.0)
    return np.asarray(radius / scale[:, None], np.float32)


def _shift_bodies(cells: pd.DataFrame, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the (y, x) centres of the cell bodies: the nuclei sit a little off centre."""
    shift = 0.08 * np.sqrt(cells["cell_area"].to_numpy())
    nuclei = cells[["center_y", "center_x"]].to_numpy()
    return np.asarray(nuclei + rng.normal(0.0, 1.0, (len(cells), 2)) * shift[:, None])


def _measure_depth(
    center_yx: NDArray[np.float64],
    ellipse: NDArray[np.float64],
    outline: NDArray[np.float32],
    field_size: int,
) -> tuple[tuple[slice, slice], NDArray[np.float32]]:
    """Return the window around one outline and how far inside it each pixel lies, in pixels.

    ``ellipse`` is area, eccentricity and orientation.
    """
    area, eccentricity, orientation = ellipse.tolist()
    ratio = np.sqrt(1.0 - eccentricity**2)
    major = np.sqrt(area / (np.pi * ratio))
    minor = major * ratio
    half = int(np.ceil(major * float(outline.max()))) + 2
    top, left = round(center_yx[0]) - half, round(float(center_yx[1])) - half
    rows = np.arange(max(top, 0), min(top + 2 * half + 1, field_size), dtype=np.float32)
    columns = np.arange(max(left, 0), min(left + 2 * half + 1, field_size), dtype=np.float32)
    window = (
        slice(int(rows[0]), int(rows[-1]) + 1),
        slice(int(columns[0]), int(columns[-1]) + 1),
    )
    dy = rows[:, None] - np.float32(center_yx[0])
    dx = columns[None, :] - np.float32(center_yx[1])
    turn = np.deg2rad(orientation)
    cosine, sine = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    along = (dy * cosine + dx * sine) / np.float32(major)
    across = (dx * cosine - dy * sine) / np.float32(minor)
    radius = np.hypot(along, across)
    angle = np.arctan2(across, along)
    bins = ((angle + np.pi) * (_ANGLES / (2.0 * np.pi)) + 0.5).astype(np.intp) % _ANGLES
    depth = (outline[bins] - radius) * np.float32(np.sqrt(major * minor))
    return window, depth.astype(np.float32)


def _claim(
    deepest: NDArray[np.float32], labels: NDArray[np.int32], depth: NDArray[np.float32], label: int
) -> None:
    """Give ``label`` the pixels that lie deeper in its outline than in any before, in place."""
    labels[(depth > 0.0) & (depth > deepest)] = label
    np.maximum(deepest, depth, out=deepest)
