"""Mechanism of action from profiles: the treatment most alike. Pure: numpy and pandas.

Ljosa et al., J Biomol Screen 18 (2013): each treatment (compound and concentration) gets the
mechanism of the treatment with the nearest profile by cosine, among those of other compounds (NSC,
not same compound) and, more strictly, of other batches too (NSCB, Ando et al., bioRxiv 161422).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import COMPOUND, CONCENTRATION, MOA, PLATE, WELL
from cp2image.errors import EvaluationError


@dataclass(frozen=True)
class TreatmentProfiles:
    """One profile per treatment.

    Attributes
    ----------
    profiles
        Median over wells of the wells' means, (T, D) float64.
    compounds, moas
        Of each treatment.
    plates
        Plates its wells are on.
    cells
        Cells behind it.
    """

    profiles: NDArray[np.float64]
    compounds: tuple[str, ...]
    moas: tuple[str, ...]
    plates: tuple[frozenset[str], ...]
    cells: tuple[int, ...]


def treatment_profiles(
    vectors: NDArray[np.floating], cells: pd.DataFrame, control: NDArray[np.bool_]
) -> TreatmentProfiles:
    """Turn cells into treatments: the mean of each well, the median of each treatment's wells.

    Each plate's cells are taken relative to the mean of its negative controls, where it has some,
    and else to that of all plates' controls. Treatments without a mechanism, and the controls
    themselves, get no profile.

    Parameters
    ----------
    vectors
        Features or embedding of the cells, (N, D), finite.
    cells
        Their metadata: plate, well, compound, MOA, and the concentration if there is one.
    control
        Which cells are negative controls, (N,).

    Raises
    ------
    EvaluationError
        If a column is missing or the numbers of rows differ.
    """
    missing = [name for name in (PLATE, WELL, COMPOUND, MOA) if name not in cells]
    if missing or len(cells) != len(vectors):
        raise EvaluationError(
            f"profiles of treatments need {', '.join(missing) or 'a row of metadata per cell'}: "
            f"{len(vectors)} cells, {len(cells)} rows of metadata"
        )
    values = np.asarray(vectors, dtype=np.float64).copy()
    plates = cells[PLATE].astype(str).to_numpy()
    if control.any():
        everywhere = values[control].mean(axis=0)
        for plate in np.unique(plates):
            own = plates == plate
            start = values[own & control]
            values[own] -= start.mean(axis=0) if len(start) else everywhere
    columns = [COMPOUND, CONCENTRATION] if CONCENTRATION in cells else [COMPOUND]
    known = cells[MOA].notna() & (cells[MOA].astype(str) != "") & cells[COMPOUND].notna() & ~control
    keys = cells.loc[known, [*columns, MOA, PLATE, WELL]].astype(str)
    values = values[known.to_numpy()]
    number = keys.groupby([*columns, MOA], sort=True).ngroup().to_numpy()
    profiles, compounds, moas, seen, counts = [], [], [], [], []
    for treatment in range(number.max(initial=-1) + 1):
        rows = np.flatnonzero(number == treatment)
        own = keys.iloc[rows]
        well = own.groupby([PLATE, WELL], sort=True).ngroup().to_numpy()
        means = [values[rows[well == one]].mean(axis=0) for one in range(well.max() + 1)]
        profiles.append(np.median(means, axis=0))
        compounds.append(str(own[COMPOUND].iloc[0]))
        moas.append(str(own[MOA].iloc[0]))
        seen.append(frozenset(own[PLATE]))
        counts.append(len(rows))
    found = np.array(profiles).reshape(len(profiles), values.shape[1])
    return TreatmentProfiles(found, tuple(compounds), tuple(moas), tuple(seen), tuple(counts))


@dataclass(frozen=True)
class MoaMatch:
    """What the nearest other treatments say.

    Attributes
    ----------
    accuracy
        Share of the treatments matched with their own mechanism; NaN if none could be.
    treatments
        Number of treatments that were matched.
    truth, predicted
        Mechanisms of those treatments.
    unmatched
        Treatments left out: no other compound (and batch) has their mechanism.
    """

    accuracy: float
    treatments: int
    truth: tuple[str, ...]
    predicted: tuple[str, ...]
    unmatched: int

    def confusion(self) -> pd.DataFrame:
        """Return counts, true mechanism by rows, predicted by columns."""
        names = sorted(set(self.truth) | set(self.predicted))
        counts = np.zeros((len(names), len(names)), dtype=np.int64)
        for truth, predicted in zip(self.truth, self.predicted, strict=True):
            counts[names.index(truth), names.index(predicted)] += 1
        return pd.DataFrame(counts, index=names, columns=names)


def match_moa(
    profiles: NDArray[np.floating],
    compounds: Sequence[str],
    moas: Sequence[str],
    batches: Sequence[Collection[str]] | None = None,
) -> MoaMatch:
    """Give every treatment the mechanism of its nearest neighbour by cosine.

    Parameters
    ----------
    profiles
        (T, D).
    compounds, moas
        Of each treatment; neighbours of the same compound do not count (NSC).
    batches
        Batches each treatment was measured in; if given, neighbours that share one do not count
        either (NSCB).

    Raises
    ------
    EvaluationError
        If the lengths differ.
    """
    x = np.asarray(profiles, dtype=np.float64)
    if not len(x) == len(compounds) == len(moas) == len(batches if batches is not None else moas):
        raise EvaluationError(
            f"{len(x)} profiles, {len(compounds)} compounds, {len(moas)} mechanisms: expected one "
            "of each per treatment"
        )
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    alike = unit @ unit.T
    names, kinds = np.array(compounds, dtype=object), np.array(moas, dtype=object)
    allowed = names[:, None] != names[None, :]
    if batches is not None:
        shared = [[bool(set(a) & set(b)) for b in batches] for a in batches]
        allowed &= ~np.array(shared, dtype=bool).reshape(allowed.shape)
    possible = (allowed & (kinds[:, None] == kinds[None, :])).any(axis=1)
    nearest = np.where(allowed, alike, -np.inf).argmax(axis=1) if len(x) else np.empty(0, np.int64)
    truth, predicted = kinds[possible], kinds[nearest[possible]]
    accuracy = float((truth == predicted).mean()) if len(truth) else float("nan")
    return MoaMatch(
        accuracy, len(truth), tuple(truth), tuple(predicted), int(np.count_nonzero(~possible))
    )
