"""Every distance between two paired sets of vectors, with floors and intervals. Step's part."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import PLATE, WELL
from cp2image.metrics.coverage import coverage
from cp2image.metrics.extrapolation import frechet_at_infinity
from cp2image.metrics.frechet import Moments, frechet_distance, kernel_distance
from cp2image.metrics.intervals import bootstrap_frechet, bootstrap_kernel
from cp2image.metrics.plate_distance import plate_distance

_FEWEST_WELLS = 5
"""Fewer wells give no interval."""
_MANY_DIMENSIONS = 512
"""In more, a hundred Fréchet distances take minutes."""


def compare_sets(
    real: NDArray[np.float32],
    drawn: NDArray[np.float32],
    cells: pd.DataFrame,
    alike: NDArray[np.bool_],
    noise: NDArray[np.bool_],
) -> dict[str, Any]:
    """Distances at full size, and at half size beside the floor of real against real.

    Half the real cells stand against the other half (the floor) and against the generated cells
    of that other half, so floor and distance have the same size and the same wells.

    Parameters
    ----------
    real, drawn
        Vectors of paired cells, (N, D).
    cells
        Their metadata: plate and well.
    alike
        Cells that plates have in common, for the distance between plates, (N,).
    noise
        Real patches that are camera noise, (N,): without them there is one more distance.

    Returns
    -------
    dict
        Numbers for the report. Intervals are over wells; ``limit`` is for endlessly many cells.
        ``singular``: a half has no more cells than dimensions, so its Fréchet distances mostly
        tell the sample size.
    """
    order = np.random.default_rng(0).permutation(len(real))
    first, second = order[0::2], order[1::2]
    small = len(second) <= real.shape[1]
    kernel = kernel_distance(real, drawn)
    floor = kernel_distance(real[first], real[second])
    half = [Moments.of(part) for part in (real[first], real[second], drawn[second])]
    found = {
        "n": len(real),
        "dimension": real.shape[1],
        "frechet": frechet_distance(Moments.of(real), Moments.of(drawn), allow_singular=small),
        "half_n": len(second),
        "frechet_half": frechet_distance(half[0], half[2], allow_singular=small),
        "floor_half": frechet_distance(half[0], half[1], allow_singular=small),
        "singular": small,
        "kernel": kernel.mean,
        "kernel_standard_error": kernel.standard_error,
        "kernel_floor": floor.mean,
        "kernel_floor_standard_error": floor.standard_error,
    }
    if len(second) > 5:
        around = coverage(real[first], drawn[second])
        among = coverage(real[first], real[second])
        found |= asdict(around)
        found |= {f"{name}_floor": v for name, v in asdict(among).items() if name != "neighbours"}
    wells = (cells[PLATE].astype(str) + "/" + cells[WELL].astype(str)).tolist()
    found |= _over_wells(real, drawn, wells)
    if len(real) >= max(1.5 * real.shape[1], 20):
        line = frechet_at_infinity(real, drawn)
        found |= {"limit": line.limit, "limit_standard_error": line.standard_error}
    between = plate_distance(real, cells[PLATE].astype(str).tolist(), alike)
    if between is not None:
        found["plates"] = asdict(between)
    found["noise_patches"] = int(noise.sum())
    if noise.any() and np.count_nonzero(~noise) > real.shape[1]:
        clean = [Moments.of(part[~noise]) for part in (real, drawn)]
        found["frechet_without_noise"] = frechet_distance(*clean)
        found["kernel_without_noise"] = kernel_distance(real[~noise], drawn[~noise]).mean
    return found


def _over_wells(
    real: NDArray[np.float32], drawn: NDArray[np.float32], wells: list[str]
) -> dict[str, Any]:
    """Intervals by drawing wells anew; the Fréchet distance's only in few dimensions."""
    found: dict[str, Any] = {}
    if len(set(wells)) < _FEWEST_WELLS:
        return found
    value, interval = bootstrap_kernel(real, drawn, wells)
    found["kernel_between_wells"] = value
    found["kernel_between_wells_interval_95"] = list(interval)
    if real.shape[1] <= _MANY_DIMENSIONS and len(real) > real.shape[1]:
        found["frechet_interval_95_by_well"] = list(bootstrap_frechet(real, drawn, wells))
    return found


def describe_beside(found: dict[str, Any]) -> str:
    """Say what else the report has of a distance."""
    text = "; singular: mostly the sample size" if found.get("singular") else ""
    if "frechet_interval_95_by_well" in found:
        low, high = found["frechet_interval_95_by_well"]
        text += f"; 95 % over wells: {low:.3g} to {high:.3g}"
    if "limit" in found:
        text += f"; endlessly many cells: {found['limit']:.3g}"
    if "plates" in found:
        plates = found["plates"]
        text += (
            f"; real plate against plate: {plates['frechet']:.3g} at n = {plates['n']:,}, halves "
            f"of one: {plates['floor']:.3g}"
        )
    if found.get("noise_patches"):
        text += f"; {found['noise_patches']} real patches are noise"
        if "frechet_without_noise" in found:
            text += f", without them {found['frechet_without_noise']:.3g}"
    return text
