"""Paint DNA, actin and tubulin into simulated cells. Floor 1: numpy, scipy.

All textures come from four small periodic tiles of filtered noise, read at coordinates that are
bent to each cell: straight along its stress fibres, in polar coordinates for its microtubules.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

_TILE = 128


@lru_cache(maxsize=1)
def _make_tiles() -> dict[str, NDArray[np.float32]]:
    """Return periodic noise textures of mean 0 and deviation 1, shape (``_TILE``, ``_TILE``)."""
    rng = np.random.default_rng(2008)
    widths = {"fine": (1.1, 1.1), "coarse": (2.8, 2.8), "fibre": (0.9, 9.0), "mesh": (1.3, 6.0)}
    tiles = {}
    for name, width in widths.items():
        tile = ndimage.gaussian_filter(rng.normal(size=(_TILE, _TILE)), width, mode="wrap")
        tiles[name] = ((tile - tile.mean()) / tile.std()).astype(np.float32)
    return tiles


def _sample(
    tile: NDArray[np.float32], rows: NDArray[np.floating], columns: NDArray[np.floating]
) -> NDArray[np.float32]:
    """Return the texture at the nearest of its periodic pixels."""
    return np.asarray(
        tile[rows.astype(np.int32) & (_TILE - 1), columns.astype(np.int32) & (_TILE - 1)]
    )


@dataclass(frozen=True)
class CellPixels:
    """The pixels inside cells, flat, each with its place in its own cell and that cell's draws."""

    index: NDArray[np.intp]
    row: NDArray[np.int32]
    dy: NDArray[np.float32]
    dx: NDArray[np.float32]
    from_edge: NDArray[np.float32]
    height: NDArray[np.float32]
    over_nucleus: NDArray[np.float32]
    shift_y: NDArray[np.float32]
    shift_x: NDArray[np.float32]
    cells: pd.DataFrame

    def of(self, name: str) -> NDArray[np.float32]:
        """Return one latent parameter of the cell that each pixel belongs to."""
        return np.asarray(self.cells[name].to_numpy(np.float32)[self.row])


def collect_pixels(
    cells: pd.DataFrame,
    owner: NDArray[np.int32],
    nucleus_depth: NDArray[np.float32],
    body: NDArray[np.float32],
    rng: np.random.Generator,
) -> CellPixels:
    """Collect the pixels of a field that belong to a cell.

    Parameters
    ----------
    cells
        Latent parameters, one row per cell.
    owner
        Label image of the cells, shape (height, width).
    nucleus_depth
        How far inside a nucleus each pixel lies, in pixels; negative outside.
    body
        Thickness of the cell bodies, 0 to 1, more where they overlap.
    rng
        Gives each cell its place in the noise textures.
    """
    index = np.flatnonzero(owner)
    row = owner.ravel()[index] - 1
    edge = np.zeros(owner.shape, bool)
    edge[:-1] |= owner[:-1] != owner[1:]
    edge[:, :-1] |= owner[:, :-1] != owner[:, 1:]
    y, x = np.divmod(index, owner.shape[1])
    shift = rng.uniform(100 * _TILE, 101 * _TILE, (2, len(cells))).astype(np.float32)
    return CellPixels(
        index=index,
        row=row,
        dy=(y - cells["center_y"].to_numpy()[row]).astype(np.float32),
        dx=(x - cells["center_x"].to_numpy()[row]).astype(np.float32),
        from_edge=ndimage.distance_transform_edt(~edge).ravel()[index].astype(np.float32),
        height=body.ravel()[index],
        over_nucleus=np.clip(nucleus_depth.ravel()[index] / 4.0, 0.0, 1.0),
        shift_y=shift[0][row],
        shift_x=shift[1][row],
        cells=cells,
    )


def paint_dna(pixels: CellPixels, nuclei: NDArray[np.int32]) -> NDArray[np.float32]:
    """Chromatin: coarse and fine clumps whose mean over the nucleus is the drawn brightness."""
    tiles = _make_tiles()
    y, x = pixels.dy + pixels.shift_y, pixels.dx + pixels.shift_x
    fine = np.sqrt(pixels.of("granularity"))
    coarse = np.sqrt(1.0 - pixels.of("granularity"))
    chromatin = coarse * _sample(tiles["coarse"], y, x) + fine * _sample(tiles["fine"], x, y)
    label = nuclei.ravel()[pixels.index]
    mean = np.bincount(label, chromatin) / np.maximum(np.bincount(label), 1)
    contrast = pixels.of("chromatin_contrast") * (chromatin - mean[label].astype(np.float32))
    return np.asarray(pixels.of("nucleus_brightness") * np.maximum(1.0 + contrast, 0.1))


def paint_actin(pixels: CellPixels) -> NDArray[np.float32]:
    """Diffuse actin, a cortical ring, stress fibres along one axis, and aggregates."""
    tiles = _make_tiles()
    y, x = pixels.dy + pixels.shift_y, pixels.dx + pixels.shift_x
    turn = np.deg2rad(pixels.of("fibre_orientation"))
    along = pixels.dy * np.cos(turn) + pixels.dx * np.sin(turn)
    across = pixels.dx * np.cos(turn) - pixels.dy * np.sin(turn) + 0.006 * along**2
    fibre = _sample(tiles["fibre"], across + pixels.shift_y, along + pixels.shift_x)
    cloud = 1.0 + 0.25 * _sample(tiles["coarse"], x, y) + 0.1 * _sample(tiles["fine"], y, x)
    cortex = np.exp(-((pixels.from_edge / 2.2) ** 2)) * (0.6 + 0.4 * cloud)
    spot = np.maximum(_sample(tiles["fine"], y * 0.8, x * 0.8) - 1.4, 0.0)
    return np.asarray(
        190.0 * cloud * pixels.height
        + 250.0 * pixels.of("cortex") * cortex
        + 95.0
        * pixels.of("fibres")
        * np.maximum(fibre - 0.2, 0.0)
        * (1 - 0.4 * pixels.over_nucleus)
        + 1300.0 * pixels.of("spots") * spot
    )


def paint_tubulin(pixels: CellPixels) -> NDArray[np.float32]:
    """Microtubules: filaments away from the nucleus, around it and across; bundles when asked."""
    mesh = _make_tiles()["mesh"]
    bundling = pixels.of("bundling")
    radius = np.hypot(pixels.dy, pixels.dx)
    angle = np.arctan2(pixels.dy, pixels.dx) * np.float32(_TILE / (2.0 * np.pi))
    turn = np.deg2rad(pixels.of("cell_orientation"))
    along = pixels.dy * np.cos(turn) + pixels.dx * np.sin(turn)
    across = pixels.dx * np.cos(turn) - pixels.dy * np.sin(turn)
    beside = np.exp(-(((radius - 14.0) / 7.0) ** 2))
    network = np.zeros_like(radius)
    for rows, columns, weight in (
        (angle + 0.5 * radius, 0.5 * radius + pixels.shift_x, 0.6),
        (angle - 1.1 * radius, 0.5 * radius + pixels.shift_y, 0.6),
        (radius + pixels.shift_y, angle, 0.8 * beside),
        (across + pixels.shift_y, along + pixels.shift_x, 0.8),
    ):
        filament = np.exp(-((_sample(mesh, rows, columns) / 0.35) ** 2))
        network = network + weight * filament
    bent = 0.5 * (across + 0.012 * along**2)
    bundle = np.maximum(_sample(mesh, bent + pixels.shift_x, 0.5 * along + pixels.shift_y) - 0.6, 0)
    outside = np.maximum(radius - 12.0, 0.0) / (0.6 * np.sqrt(pixels.of("cell_area")))
    envelope = np.exp(-(outside**2)) * np.minimum(pixels.from_edge / 4.0, 1.0)
    light = 70.0 * pixels.height + 120.0 * (0.35 + network) * (0.15 + envelope)
    light += 420.0 * bundling * bundle * (0.2 + envelope)
    return np.asarray(pixels.of("tubulin") * (1.0 - 0.45 * pixels.over_nucleus) * light)
