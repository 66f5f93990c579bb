"""What validation says of drawn cells beside their loss: distances and correlation. Pure.

These are the numbers a search may steer by: none of them is a loss, so no weight of a loss scales
them, and all are taken on the same held-out cells, at the same N, in spaces fitted on the real
ones alone.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import EvaluationError
from cp2image.metrics.correlation import (
    compared_features,
    feature_correlation,
    summarise_correlation,
)
from cp2image.metrics.embedding import CellProfilerEmbedding, FilterBank, quantise
from cp2image.metrics.frechet import Moments, frechet_distance
from cp2image.metrics.measurement import measure

Space = Literal["cp", "filterbank"]


class ValidationScores:
    """Real held-out cells, measured once, and how far drawn ones are from them.

    Parameters
    ----------
    real
        Normalised patches in [0, 1] as `quantise` takes them, (N, C, H, W); the order is kept.
    channels
        Their names.
    spaces
        ``cp``: CellProfiler features in 64 dimensions, with the correlation feature by feature;
        ``filterbank``: `FilterBank`, which needs more cells than its dimensions.
    families
        Of features; all when None.

    Raises
    ------
    EvaluationError
        If fewer cells are given than a distance needs.
    """

    def __init__(
        self,
        real: ArrayLike,
        channels: Sequence[str],
        spaces: Sequence[Space],
        families: Sequence[str] | None = None,
    ) -> None:
        patches = quantise(real)
        self._channels, self._families = tuple(channels), families
        self._floors: dict[str, float] = {}
        self._embedding: CellProfilerEmbedding | None = None
        self._bank = FilterBank(len(self._channels)) if "filterbank" in spaces else None
        if "cp" in spaces:
            measured = self._measure(patches)
            self._seen = np.flatnonzero(measured.notna().any(axis=1).to_numpy())
            self._real = measured.iloc[self._seen].reset_index(drop=True)
            _check_size("cp", len(self._real), 64)
            self._names = compared_features(self._real)
            self._middle = self._real.median()
            self._embedding = CellProfilerEmbedding.fit(self._real)
            self._moments = self._note("cp", self._embedding.embed(self._real))
        if self._bank is not None:
            _check_size("filterbank", len(patches), self._bank.dimension)
            self._filtered = self._note("filterbank", self._bank.embed(patches))

    def of(self, drawn: ArrayLike) -> dict[str, float]:
        """Score the cells drawn from the same features, in the same order as the real ones.

        A drawn cell in which no nucleus is found counts as the median cell: it cannot be left
        out, which would make failures disappear from the score.

        Returns
        -------
        dict
            For each space ``frechet_<space>`` and ``frechet_<space>_floor``, the distance of two
            halves of the real cells (at half the N, so higher than a floor at N would be); with
            ``cp`` also ``mean_r`` (0 for a feature that the drawn cells do not vary in),
            ``share_above_half`` (of features with r > 0.5) and ``without_nucleus`` (share of
            drawn cells).
        """
        patches = quantise(drawn)
        found = dict(self._floors)
        if self._embedding is not None:
            measured = self._measure(patches).iloc[self._seen].reset_index(drop=True)
            empty = measured.isna().all(axis=1)
            measured.loc[empty] = np.broadcast_to(
                self._middle, (int(empty.sum()), len(self._middle))
            )
            moments = Moments.of(self._embedding.embed(measured))
            found["frechet_cp"] = frechet_distance(self._moments, moments)
            table = feature_correlation(self._real, measured, self._names)
            own = feature_correlation(self._real, self._real, self._names)["r"].notna()
            summary = summarise_correlation(table[own].assign(r=table.loc[own, "r"].fillna(0.0)))
            found["mean_r"] = summary["mean_r"]
            found["share_above_half"] = summary["share_above_half"]
            found["without_nucleus"] = float(empty.mean())
        if self._bank is not None:
            moments = Moments.of(self._bank.embed(patches))
            found["frechet_filterbank"] = frechet_distance(self._filtered, moments)
        return found

    def _measure(self, patches: NDArray[np.uint8]) -> pd.DataFrame:
        return measure(patches, channels=self._channels, families=self._families)

    def _note(self, space: str, vectors: NDArray[np.float32]) -> Moments:
        halves = [Moments.of(vectors[start::2]) for start in (0, 1)]
        if min(half.n for half in halves) > vectors.shape[1]:
            self._floors[f"frechet_{space}_floor"] = frechet_distance(*halves)
        return Moments.of(vectors)


def _check_size(space: str, cells: int, dimension: int) -> None:
    if cells <= dimension:
        raise EvaluationError(
            f"{cells} validation cells are too few for a distance in {dimension} dimensions "
            f"({space}); hold out more wells (split.validation), or raise score.cells and "
            "train.validation_cells"
        )
