"""How well draws stand for the cells that share their features, without an adversary. Pure torch.

The energy score of a forecast that is drawn twice, ½ (|x − y| + |x − z| − |y − z|), is least on
average where draws y and z have the distribution that x has (Gneiting and Raftery, JASA 2007,
section 4.2): the first two terms pull draws to the cell, the last keeps them apart. Of whole maps
it hardly tells fine structure, so it is also taken within windows (patched scores: Pacchiardi et
al., JMLR 2024), of the map and of what is finer than three points in it.
"""

from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

_WINDOWS, _FINE_WINDOWS = (1, 5, None), (1, 3, 7)
"""Sides of windows in points, of the map and of its fine structure; None: the whole map."""
_SMOOTH = 1e-3


def latent_energy_score(real: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the energy score of two draws of each cell.

    Parameters
    ----------
    real
        Latents of cells, (N, L, side, side).
    first, second
        Draws of the same features with different noise, likewise.

    Returns
    -------
    Tensor
        Scalar: the mean over cells, over windows of a size, and over sizes, of the score within a
        window divided by its side; times the points of a map.
    """
    side = real.shape[-1]
    maps = (real, first, second)
    scores = [_score(maps, min(k or side, side)) for k in _WINDOWS]
    fine = tuple(one - _blurred(one) for one in maps)
    scores += [_score(fine, min(k, side)) for k in _FINE_WINDOWS]
    return side**2 * sum(scores[1:], scores[0]) / len(scores)


def _score(maps: tuple[Tensor, ...], window: int) -> Tensor:
    real, first, second = maps
    pulled = _distance(real, first, window) + _distance(real, second, window)
    return 0.5 * (pulled - _distance(first, second, window)).mean() / window


def _distance(one: Tensor, other: Tensor, window: int) -> Tensor:
    """Return the distance of all channels within each window, (N, 1, …), smooth at 0."""
    squares = (one - other).square().sum(dim=1, keepdim=True)
    return (window**2 * avg_pool2d(squares, window, stride=1) + _SMOOTH).sqrt()


def _blurred(maps: Tensor) -> Tensor:
    """Return the mean over 3 × 3 points, the border repeated."""
    return avg_pool2d(pad(maps, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
