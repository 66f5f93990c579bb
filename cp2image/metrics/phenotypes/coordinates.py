"""Profiles as points of a space in which angles close to circles. Pure: numpy.

A scaled feature is a coordinate as it is. An angle (an orientation, a Zernike phase) becomes the
cosine and sine of its turn: 89° and -89° are neighbours there, means and covariances mean
something (Mardia and Jupp, Directional Statistics, 2000, chapter 2), and an elongated object's
second moments, which follow cos 2θ and sin 2θ, are linear in them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cp2image.columns import nearest, parse_column
from cp2image.errors import ColumnError, EvaluationError

Values = NDArray[np.float64]


class Coordinates:
    """From p scaled features to q = p + a coordinates and back, a of the features being angles.

    Coordinates are in the order of the features, an angle's cosine at its place; the sines follow
    behind, in the angles' order.

    Parameters
    ----------
    features
        CellProfiler's names, p of them.
    clip
        Limit of scaled features, as in `cp2image.data.scaling.Scaling`.

    Attributes
    ----------
    angles
        Places of the a angles among the features.
    turns
        Full circle of each angle in its own units, (a,).
    """

    def __init__(self, features: Sequence[str], clip: float = np.inf) -> None:
        self.features, self.clip = tuple(features), clip
        periods = [column.period if column else None for column in map(parse_column, features)]
        known = [(place, period) for place, period in enumerate(periods) if period is not None]
        self.angles = np.array([place for place, _ in known], dtype=np.int64)
        self.turns = np.array([period for _, period in known], dtype=np.float64)

    @property
    def size(self) -> int:
        """Number q of coordinates."""
        return len(self.features) + len(self.angles)

    def columns_of(self, feature: str) -> tuple[int, ...]:
        """Return the coordinates a feature has: one, or cosine and sine.

        Raises
        ------
        ColumnError
            If it is not one of the features, with the nearest name.
        """
        if feature not in self.features:
            raise ColumnError(
                f"the model has no feature {feature!r}{nearest(feature, self.features)}; it has "
                f"{len(self.features)}, see .features (near-duplicates may have been left out)"
            )
        place = self.features.index(feature)
        if place not in self.angles:
            return (place,)
        return place, len(self.features) + int(np.flatnonzero(self.angles == place)[0])

    def period_of(self, feature: str) -> float | None:
        """Return the full circle of an angle in its own units, None for other features."""
        columns = self.columns_of(feature)
        return float(self.turns[self.angles == columns[0]][0]) if len(columns) == 2 else None

    def encode(self, scaled: ArrayLike, center: ArrayLike, scale: ArrayLike) -> Values:
        """Turn scaled features into coordinates.

        Parameters
        ----------
        scaled
            (N, p), scaled = (own - center) / scale.
        center, scale
            Of each cell's plate, (N, p) or (p,).

        Returns
        -------
        ndarray
            (N, q).

        Raises
        ------
        EvaluationError
            If the number of features is another.
        """
        x = self._matrix(scaled, len(self.features))
        own = x[:, self.angles] * self._part(scale) + self._part(center)
        phase = 2 * np.pi * own / self.turns
        found = np.concatenate([x, np.sin(phase)], axis=1)
        found[:, self.angles] = np.cos(phase)
        return found

    def decode(self, coordinates: ArrayLike, center: ArrayLike, scale: ArrayLike) -> Values:
        """Turn coordinates into scaled features, limited to ± ``clip``.

        Angles are taken into half a circle to either side of 0, as CellProfiler writes them; where
        cosine and sine are both 0 the angle is open, and 0. Shapes as in `encode`.
        """
        x = self._matrix(coordinates, self.size)
        found = x[:, : len(self.features)].copy()
        phase = np.arctan2(x[:, len(self.features) :], x[:, self.angles])
        own = phase * self.turns / (2 * np.pi)
        found[:, self.angles] = (own - self._part(center)) / self._part(scale)
        return np.clip(found, -self.clip, self.clip)

    def encode_value(
        self, feature: str, values: ArrayLike, center: float, scale: float
    ) -> NDArray[np.float64]:
        """Return the coordinates of one feature's values in its own units, (S, 1) or (S, 2)."""
        x = np.asarray(values, dtype=np.float64)
        period = self.period_of(feature)
        if period is None:
            return np.clip((x - center) / scale, -self.clip, self.clip)[:, None]
        return np.stack([np.cos(2 * np.pi * x / period), np.sin(2 * np.pi * x / period)], axis=1)

    def _part(self, values: ArrayLike) -> Values:
        return np.asarray(values, dtype=np.float64)[..., self.angles]

    def _matrix(self, values: ArrayLike, width: int) -> Values:
        x = np.asarray(values, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != width:
            raise EvaluationError(f"profiles have shape {x.shape}; expected (cells, {width})")
        return x
