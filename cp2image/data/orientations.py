"""The eight ways a square patch can lie: quarter turns, and mirrored. Ground floor: numpy.

A cell has no right way up, so each is as much a cell as the patch itself; not all that CellProfiler
measures on it is the same (orientation, Texture's directions, phases), so it is measured again.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

ORIENTATIONS = 8
"""As it is (0), after quarter turns (1 to 3), mirrored (4), mirrored and turned (5 to 7)."""


def turn(patches: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Return patches in another orientation.

    Parameters
    ----------
    patches
        (..., H, W) with H = W, any type.
    orientation
        0 to 7: for 4 and more columns are reversed first, then ``orientation % 4`` quarter turns
        follow, counter-clockwise.

    Returns
    -------
    NDArray
        Contiguous, of the same shape and type.

    Raises
    ------
    ValueError
        If there is no such orientation, or the patches are not square.
    """
    if not 0 <= orientation < ORIENTATIONS:
        raise ValueError(f"orientation {orientation}: expected 0 to {ORIENTATIONS - 1}")
    if patches.shape[-2] != patches.shape[-1]:
        raise ValueError(f"patches of {patches.shape[-2:]} px: only square ones can be turned")
    mirrored = patches[..., ::-1] if orientation >= 4 else patches
    return np.ascontiguousarray(np.rot90(mirrored, orientation % 4, axes=(-2, -1)))
