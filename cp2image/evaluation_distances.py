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
_NEIGHBOURS = 5
"""k of the balls that coverage looks at."""
SPLITS = 10
"""Ways to halve the cells; what is told of halves is the mean over them."""


def compare_sets(
    real: NDArray[np.float32],
    drawn: NDArray[np.float32],
    cells: pd.DataFrame,
    alike: NDArray[np.bool_],
    noise: NDArray[np.bool_],
) -> dict[str, Any]:
    """Distances at full size, and at half size beside the floor of real against real.

    Half the real cells stand against the other half (the floor) and against the generated cells
    of that other half, so floor and distance have the same size and the same wells. A distance
    between halves depends on the split as much as on anything, so it is the mean over ten of them
    (one in more than 512 dimensions), the Fréchet distance in both directions.

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
    halves = _halves(len(real), 1 if real.shape[1] > _MANY_DIMENSIONS else SPLITS)
    smaller = len(halves[0][1])
    small = smaller <= real.shape[1]
    kernel = kernel_distance(real, drawn)
    found = {
        "n": len(real),
        "dimension": real.shape[1],
        "frechet": frechet_distance(Moments.of(real), Moments.of(drawn), allow_singular=small),
        "half_n": smaller,
        "splits": len(halves),
        "singular": small,
        "kernel": kernel.mean,
        "kernel_standard_error": kernel.standard_error,
        **_mean_over(halves, real, drawn, small),
    }
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


def _halves(cells: int, splits: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return the same random splits for all sets of so many cells; the second half is smaller."""
    orders = [np.random.default_rng(split).permutation(cells) for split in range(splits)]
    return [(order[0::2], order[1::2]) for order in orders]


def _mean_over(
    halves: list[tuple[NDArray[np.int64], NDArray[np.int64]]],
    real: NDArray[np.float32],
    drawn: NDArray[np.float32],
    small: bool,
) -> dict[str, float]:
    """Compare halves, real with real and real with drawn: means over the splits."""
    lines: list[dict[str, float]] = []
    for split in halves:
        seen = [Moments.of(real[half]) for half in split]
        made = [Moments.of(drawn[half]) for half in split]
        across = [
            frechet_distance(seen[0], made[1], allow_singular=small),
            frechet_distance(seen[1], made[0], allow_singular=small),
        ]
        first, second = (real[half] for half in split)
        line = {
            "frechet_half": float(np.mean(across)),
            "floor_half": frechet_distance(*seen, allow_singular=small),
            "kernel_floor": kernel_distance(first, second).mean,
        }
        if len(second) > _NEIGHBOURS:
            around = asdict(coverage(first, drawn[split[1]], _NEIGHBOURS))
            among = asdict(coverage(first, second, _NEIGHBOURS))
            among.pop("neighbours")
            line |= around | {f"{name}_floor": value for name, value in among.items()}
        lines.append(line)
    return {name: float(np.mean([line[name] for line in lines])) for name in lines[0]}


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
