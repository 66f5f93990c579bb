"""From two gathered sets to numbers: distances, variety, mechanisms, copies, consistency. Step."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import COMPOUND, MOA, PLATE, parse_column
from cp2image.config import Config
from cp2image.data.scaling import is_control
from cp2image.evaluation_distances import compare_sets
from cp2image.evaluation_sets import EvaluationSet
from cp2image.metrics.correlation import compared_features
from cp2image.metrics.coverage import nearest
from cp2image.metrics.embedding import CellProfilerEmbedding
from cp2image.metrics.frechet import Moments, frechet_distance
from cp2image.metrics.moa import MoaMatch, TreatmentProfiles, match_moa, treatment_profiles
from cp2image.stopwatch import Stopwatch

_CLOSEST = 12
_FEWEST = 40
"""Fewest cells with a nucleus in both sets whose features are compared as distributions."""
_BATCH = "Metadata_Batch"


@dataclass(frozen=True)
class Copies:
    """The generated cells that are nearest to a cell of the training set.

    Attributes
    ----------
    keys, training_keys
        Of each such cell, and of the training cell nearest to it; nearest pair first.
    relative
        Their distance over the median distance of real held-out cells to the training set.
    """

    keys: NDArray[np.uint64]
    training_keys: NDArray[np.uint64]
    relative: NDArray[np.float64]


@dataclass(frozen=True)
class Scores:
    """What the sets say.

    Attributes
    ----------
    distances
        Embedding → distances with their floors, precision, recall, density and coverage.
    beside
        ``moa``, ``copies``, ``consistency``, as far as they could be found out.
    tables
        Name → table to store.
    copies
        For the picture.
    """

    distances: dict[str, Any]
    beside: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    copies: Copies | None = None


def score_sets(config: Config, sets: EvaluationSet, watch: Stopwatch) -> Scores:
    """Score paired sets.

    Parameters
    ----------
    config
        The experiment.
    sets
        What `gather_cells` found.
    watch
        Is told how long each part takes.
    """
    real, drawn = sets.real.measured, sets.generated.measured
    complete = (real.notna().any(axis=1) & drawn.notna().any(axis=1)).to_numpy()
    scores, noise = Scores({}), sets.real.noise
    control = is_control(sets.cells, config.scaling.control)
    chosen = control if control.any() else np.ones(len(control), dtype=bool)
    for name in config.evaluate.embeddings:
        if name == "cp" and np.count_nonzero(complete) < _FEWEST:
            continue  # what is drawn shows no nuclei: the report says how many are without one
        if name == "cp":
            with watch.part("embedding"):
                embedding = CellProfilerEmbedding.fit(real[complete])
                vectors = [embedding.embed(part[complete]) for part in (real, drawn)]
            with watch.part("distances"):
                held, made = vectors
                found = compare_sets(
                    held, made, sets.cells[complete], chosen[complete], noise[complete]
                )
                scores.distances[name] = {**found, **embedding.protocol}
            if sets.shuffled is not None:
                shuffled = _control(sets, sets.shuffled, embedding, complete, vectors, watch)
                scores.distances[name]["shuffle_control"] = shuffled
            if COMPOUND in sets.cells and MOA in sets.cells:
                with watch.part("mechanisms"):
                    _score_moa(config, sets.cells[complete], vectors, scores)
        else:
            with watch.part("distances"):
                held, made = (part.embedded[name] for part in (sets.real, sets.generated))
                found = compare_sets(held, made, sets.cells, chosen, noise)
                scores.distances[name] = {**found, **sets.protocols[name]}
    if sets.draws:
        scores.tables["consistency"] = table = consistency(real, sets.draws, sets.drawn_rows)
        scores.beside["consistency"] = _sum_up(table, sets)
    if not sets.training:
        return scores
    looked_at, training = next(iter(sets.training.items()))
    with watch.part("nearest training cells"):
        held, made = (part.embedded[looked_at] for part in (sets.real, sets.generated))
        copies, summary = _copies(sets, held, made, training)
    scores.beside["copies"] = {"embedding": looked_at, **summary}
    return replace(scores, copies=copies)


def _control(
    sets: EvaluationSet,
    measured: pd.DataFrame,
    embedding: CellProfilerEmbedding,
    complete: NDArray[np.bool_],
    vectors: list[NDArray[np.float32]],
    watch: Stopwatch,
) -> dict[str, Any]:
    """Distance of cells drawn from other cells' features, beside that of the same cells' own."""
    sound = measured.notna().any(axis=1).to_numpy() & complete[sets.shuffled_rows]
    places = (np.cumsum(complete) - 1)[sets.shuffled_rows[sound]]
    with watch.part("embedding"):
        shuffled = embedding.embed(measured[sound])
    with watch.part("distances"):
        held, plain, control = (
            Moments.of(part) for part in (vectors[0][places], vectors[1][places], shuffled)
        )
        return {
            "n": int(sound.sum()),
            "frechet": frechet_distance(held, plain, allow_singular=True),
            "frechet_shuffled": frechet_distance(held, control, allow_singular=True),
        }


def _score_moa(
    config: Config, cells: pd.DataFrame, vectors: list[NDArray[np.float32]], scores: Scores
) -> None:
    """Match each treatment with the nearest of another compound, in either set by itself."""
    control = is_control(cells, config.scaling.control)
    cells = cells.reset_index(drop=True)
    found: dict[str, Any] = {}
    profiles: list[TreatmentProfiles] = []
    for name, values in zip(("real", "generated"), vectors, strict=True):
        known = treatment_profiles(values, cells, control)
        if not len(known.profiles):
            return
        profiles.append(known)
        batches = known.plates
        if _BATCH in cells:
            batch = dict(zip(cells[PLATE].astype(str), cells[_BATCH].astype(str), strict=True))
            batches = tuple(frozenset(batch[plate] for plate in plates) for plates in known.plates)
        nsc = match_moa(known.profiles, known.compounds, known.moas)
        nscb = match_moa(known.profiles, known.compounds, known.moas, batches)
        found[name] = {"nsc": _brief(nsc), "nscb": _brief(nscb)}
        for label, match in (("", nsc), ("_nscb", nscb)):
            if match.treatments:
                scores.tables[f"moa_{name}{label}"] = match.confusion()
    scores.tables["treatments"] = _by_treatment(*profiles)
    if found["generated"]["nsc"]["treatments"]:
        scores.beside["moa"] = found


def _by_treatment(real: TreatmentProfiles, drawn: TreatmentProfiles) -> pd.DataFrame:
    """Compare each treatment's real and generated profile: direction and length."""
    lengths = [np.linalg.norm(one.profiles, axis=1) for one in (real, drawn)]
    apart = np.linalg.norm(real.profiles - drawn.profiles, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (real.profiles * drawn.profiles).sum(axis=1) / (lengths[0] * lengths[1])
        relative = apart / lengths[0]
    columns = {"compound": real.compounds, "moa": real.moas, "cells": real.cells}
    columns |= {"cosine": cosine, "distance": apart, "distance_over_effect": relative}
    return pd.DataFrame(columns)


def _brief(match: MoaMatch) -> dict[str, Any]:
    return {
        "accuracy": match.accuracy if match.treatments else None,
        "treatments": match.treatments,
        "unmatched": match.unmatched,
    }


def consistency(
    real: pd.DataFrame, draws: list[pd.DataFrame], rows: NDArray[np.int64]
) -> pd.DataFrame:
    """Tell, feature by feature, how far draws of the same profile differ.

    Parameters
    ----------
    real
        Measured on the real cells, (N, F).
    draws
        Measured on K draws, (M, F) each.
    rows
        Rows of ``real`` that were drawn, (M,).

    Returns
    -------
    DataFrame
        Row per feature: ``spread``, the standard deviation over draws (root of its mean square
        over cells); ``cells``, that over real cells; ``relative``, their ratio: 0 where the profile
        settles the feature, about 1 where it leaves it open; ``r``, the correlation of the draws'
        mean with the real cell; ``category``. Angles are left out: they have no such deviation.
    """
    names = [name for name in compared_features(real) if not name.endswith("Orientation")]
    stack = np.stack([draw[names].to_numpy(dtype=np.float64) for draw in draws])
    truth = real[names].to_numpy(dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        known = np.isfinite(stack).all(axis=0)
        variance = np.where(known, stack.var(axis=0, ddof=1), 0).sum(axis=0) / known.sum(axis=0)
        there = np.isfinite(truth)
        count = there.sum(axis=0)  # of a feature that no cell has, nothing is known: NaN
        centre = np.where(there, truth, 0).sum(axis=0) / count
        cells = np.sqrt(np.where(there, (truth - centre) ** 2, 0).sum(axis=0) / count)
        mean, own = stack.mean(axis=0), truth[rows]
        both = known & np.isfinite(own)
        r = [
            np.corrcoef(mean[b, i], own[b, i])[0, 1] if np.count_nonzero(b) > 2 else np.nan
            for i, b in enumerate(both.T)
        ]
        spread = np.sqrt(variance)
        found = {"spread": spread, "cells": cells, "relative": spread / cells, "r": r}
    columns = [parse_column(name) for name in names]
    found["category"] = [column.category if column else "" for column in columns]
    return pd.DataFrame(found, index=pd.Index(names, name="feature"))


def _sum_up(table: pd.DataFrame, sets: EvaluationSet) -> dict[str, Any]:
    relative = table["relative"].replace([np.inf, -np.inf], np.nan)
    by_category = relative.groupby(table["category"]).median()
    named = [
        n for n in table.index if n.endswith(("Nuclei_AreaShape_Area", "Cells_AreaShape_Area"))
    ]
    named += [n for n in table.index if n.startswith("Nuclei_Intensity_IntegratedIntensity_")]
    return {
        "draws": len(sets.draws),
        "cells": len(sets.drawn_rows),
        "median_spread": float(relative.median()),
        "by_category": {str(k): float(v) for k, v in by_category.dropna().items()},
        "features": {name: float(relative[name]) for name in named},
    }


def _copies(
    sets: EvaluationSet,
    real: NDArray[np.float32],
    drawn: NDArray[np.float32],
    training: NDArray[np.float32],
) -> tuple[Copies, dict[str, Any]]:
    """Compare how far generated and real held-out cells are from the training cells."""
    deviation = training.std(axis=0, dtype=np.float64)
    deviation[deviation == 0] = 1
    scaled = [part / deviation for part in (real, drawn, training)]
    _, usual = nearest(scaled[0], scaled[2])
    rows, distances = nearest(scaled[1], scaled[2])
    order = np.argsort(distances, kind="stable")[:_CLOSEST]
    keys = sets.cells["key"].to_numpy(dtype=np.uint64)
    median = float(np.median(usual))
    copies = Copies(keys[order], sets.training_keys[rows[order]], distances[order] / median)
    summary = {
        "training_cells": len(training),
        "generated": float(np.median(distances)),
        "real": median,
        "generated_over_real": float(np.median(distances)) / median,
        "closest_over_real": float(distances.min()) / float(usual.min() or 1),
    }
    return copies, summary
