"""Features set to values, drawn, measured again: here or on a cluster. Floor: below the step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from cp2image.checkpoint import load_model
from cp2image.cluster import join_cluster
from cp2image.columns import parse_column
from cp2image.config import Config
from cp2image.config_explore import Mode
from cp2image.data.scaling import Scaling
from cp2image.data.splits import TRAIN
from cp2image.exploration_cells import Artist, ExploredCells
from cp2image.metrics.phenotypes.covariance import Guard
from cp2image.metrics.phenotypes.response import Response, circular_mean, summarise_response
from cp2image.tracking import tracking_uri

_FEW = 2_000
"""Images up to which workers take longer to start than the work takes."""


@dataclass(frozen=True)
class Base:
    """The N cells whose features are set: coordinates (N, q), keys and plates."""

    coordinates: NDArray[np.float64]
    keys: NDArray[np.uint64]
    plates: list[str]

    @classmethod
    def of(cls, explored: ExploredCells, rows: NDArray[np.int64]) -> "Base":
        """Take some rows of the explored cells."""
        return cls(explored.coordinates[rows], explored.keys(rows), explored.plates(rows))


def observed_range(
    explored: ExploredCells,
    feature: str,
    percentiles: tuple[float, float],
    steps: int,
    plates: Sequence[str],
) -> NDArray[np.float64]:
    """Return ``steps`` values, evenly over the range of the training cells, in own units.

    The scaling limits what the model sees to some robust deviations of a plate's controls; the
    range ends where that limit is on any of ``plates``, beyond which a request would change
    nothing. What is left is empty (all values equal) if there is no such range.
    """
    column = explored.artist.space.columns_of(feature)[0]
    train = np.flatnonzero((explored.cells["split"] == TRAIN).to_numpy())
    rows = train if len(train) >= 50 else np.arange(len(explored.cells))
    center, scale = explored.artist.model.scaling.center_and_scale(explored.plates(rows))
    own = center[:, column] + scale[:, column] * explored.scaled[rows, column]
    low, high = np.percentile(own, percentiles)
    if explored.artist.space.period_of(feature) is None:
        scaling = explored.artist.model.scaling
        center, scale = (x[:, column] for x in scaling.center_and_scale(sorted(set(plates))))
        low = max(low, float((center - scaling.clip * scale).max()))
        high = min(high, float((center + scaling.clip * scale).min()))
    return np.linspace(low, max(low, high), steps)


@dataclass(frozen=True)
class Turned:
    """N cells with one feature at S values.

    Attributes
    ----------
    scaled
        The model's input, (N, S, p).
    relative
        Distance from the training cells over the guard's limit, (N, S).
    contradicts
        How far the feature is from what the others say, over that limit, (N, S).
    """

    scaled: NDArray[np.float32]
    relative: NDArray[np.float64]
    contradicts: NDArray[np.float64]


def manipulate(
    artist: Artist, base: Base, feature: str, requested: NDArray[np.float64], mode: Mode
) -> "Turned":
    """Set one feature of N cells to S values.

    Parameters
    ----------
    artist
        The model and what is normal for it.
    base
        The cells.
    feature
        One of the model's.
    requested
        In the feature's own units, (S,).
    mode
        ``single``: all others stay; ``conditional``: they move by their conditional mean.

    Returns
    -------
    Turned
        The model's input and what the guard says of it.
    """
    space = artist.space
    columns = space.columns_of(feature)
    center, scale = artist.model.scaling.center_and_scale(base.plates)
    n, steps = len(base.coordinates), len(requested)
    cells = np.repeat(base.coordinates, steps, axis=0)
    goal = np.concatenate(
        [
            space.encode_value(feature, requested, center[i, columns[0]], scale[i, columns[0]])
            for i in range(n)
        ]
    )
    if mode == "conditional":
        cells = artist.guard.covariance.move(cells, columns, goal)
    else:
        cells[:, list(columns)] = goal
    plates = [plate for plate in base.plates for _ in range(steps)]
    scaled = artist.scaled(cells, plates)
    rows = np.repeat(np.arange(n), steps)
    seen = space.encode(scaled, center[rows], scale[rows])
    return Turned(
        scaled.reshape(n, steps, -1),
        artist.guard.relative(seen).reshape(n, steps),
        artist.guard.contradicts(seen, columns).reshape(n, steps),
    )


def measure_drawn(
    artist: Artist, base: Base, feature: str, scaled: NDArray[np.float32], draws: int
) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """Draw the input (N, S, p) and measure a feature.

    Returns
    -------
    tuple of NDArray
        The mean over draws in which the feature is defined (of angles the circular one), (N, S),
        and the first draw, (N, S, C, H, W). A cell keeps its key, so its noise, over the steps.
    """
    n, steps = scaled.shape[:2]
    keys = np.repeat(base.keys, steps)
    plates = [plate for plate in base.plates for _ in range(steps)]
    flat = scaled.reshape(n * steps, -1)
    first = artist.draw(flat, keys)
    others = (artist.draw(flat, keys, turn) for turn in range(1, artist.draws(draws)))
    found = [artist.measure(patches, plates, feature) for patches in chain([first], others)]
    period = artist.space.period_of(feature)
    values = np.stack(found)
    if period is not None:
        mean = circular_mean(values, period)
    else:
        known = np.isfinite(values)
        total = np.where(known, values, 0).sum(axis=0)
        mean = np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan)
    return mean.reshape(n, steps), first.reshape(n, steps, *first.shape[1:])


@dataclass(frozen=True)
class Knob:
    """A feature, how it is turned, and to which S values."""

    feature: str
    mode: Mode
    requested: NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """What was measured on N cells at S steps, and what the guard says, all (N, S)."""

    knob: Knob
    measured: NDArray[np.float64]
    relative: NDArray[np.float64]
    contradicts: NDArray[np.float64]


def respond(
    config: Config, explored: ExploredCells, features: Sequence[str], rows: NDArray[np.int64]
) -> pd.DataFrame:
    """Turn every knob as ``explore.responses`` says and measure what happens.

    Parameters
    ----------
    config
        The experiment; says where the cluster is.
    explored
        The cells.
    features
        That can be measured.
    rows
        Of the cells they are set in.

    Returns
    -------
    DataFrame
        A row per feature, mode and step: see `response_rows`.
    """
    artist, settings = explored.artist, config.explore.responses
    base = Base.of(explored, rows)
    knobs = [
        Knob(feature, mode, requested)
        for feature in features
        for requested in [
            observed_range(explored, feature, settings.percentiles, settings.steps, base.plates)
        ]
        for mode in settings.modes
        if requested[0] < requested[-1]
    ]
    images = len(knobs) * len(base.keys) * settings.steps * artist.draws(settings.draws)
    work = partial(_turn, base=base, draws=settings.draws)
    found: list[pd.DataFrame] = []
    with tqdm(total=len(knobs), desc="responses", unit=" knobs", mininterval=1) as bar:
        turned: Iterator[Measured] = (work(artist, knob) for knob in knobs)
        if images > _FEW:
            turned = _on_cluster(config, explored, knobs, base, settings.draws)
        for one in turned:
            bar.update()
            found.append(response_rows(artist, one)[1])
    if not found:
        return pd.DataFrame()
    return pd.concat(found).sort_values(["feature", "mode", "step"], ignore_index=True)


def _turn(artist: Artist, knob: Knob, base: Base, draws: int) -> Measured:
    turned = manipulate(artist, base, knob.feature, knob.requested, knob.mode)
    measured, _ = measure_drawn(artist, base, knob.feature, turned.scaled, draws)
    return Measured(knob, measured, turned.relative, turned.contradicts)


def _on_cluster(
    config: Config, explored: ExploredCells, knobs: Sequence[Knob], base: Base, draws: int
) -> Iterator[Measured]:
    import ray

    join_cluster(config.cluster)
    cluster, artist = config.cluster, explored.artist
    room = int(ray.cluster_resources().get("CPU", 1) // cluster.cpus_per_task)
    size = max(1, min(cluster.tasks or room, room, len(knobs)))
    shared = ray.put((config, artist.model.scaling, artist.guard, base, draws))
    actor = ray.remote(num_cpus=cluster.cpus_per_task, max_restarts=3, max_task_retries=3)(_Actor)
    pool = ray.util.ActorPool([actor.remote() for _ in range(size)])
    yield from pool.map_unordered(lambda worker, knob: worker.run.remote(shared, knob), knobs)


class _Actor:
    """Holds a model and turns knobs."""

    def __init__(self) -> None:
        self._artist: Artist | None = None

    def run(self, shared: tuple[Config, Scaling, Guard, Base, int], knob: Knob) -> Measured:
        config, scaling, guard, base, draws = shared
        if self._artist is None:
            self._artist = _load_artist(config, scaling, guard)
        return _turn(self._artist, knob, base, draws)


def _load_artist(config: Config, scaling: Scaling, guard: Guard) -> Artist:
    import torch

    from cp2image.metrics.phenotypes.coordinates import Coordinates

    torch.set_num_threads(max(1, int(config.cluster.cpus_per_task)))
    model = load_model(config.explore.checkpoint, store=tracking_uri(config))
    model.scaling = scaling
    measure = config.measure
    return Artist(
        model,
        Coordinates(model.features, scaling.clip),
        guard,
        tuple(measure.compartments),
        measure.nucleus_channel,
        config.run.seed,
    )


def response_rows(
    artist: Artist,
    one: Measured,
) -> tuple[Response, pd.DataFrame]:
    """Sum up one knob: as a `Response` and as rows of a table, one per step.

    Columns: ``feature``, ``compartment``, ``category``, ``mode``, ``step``, ``requested``,
    ``measured`` (mean over cells), ``deviation``, ``cells`` in which it is defined, ``outside``
    (share of the cells that are far from the training cells), ``distance`` (median, over the
    limit), ``contradictory`` (share whose value the cell's other features contradict), and, the
    same in each row of a knob, ``spearman``, ``spearman_of_means``, ``slope``, ``rises``,
    ``directed``, ``same_scale``.
    """
    feature, requested = one.knob.feature, one.knob.requested
    found = summarise_response(requested, one.measured, artist.space.period_of(feature))
    column = parse_column(feature)
    table = pd.DataFrame(
        {
            "feature": feature,
            "compartment": column.compartment if column else "",
            "category": column.category if column else "",
            "mode": one.knob.mode,
            "step": np.arange(len(requested)),
            "requested": requested,
            "measured": found.mean,
            "deviation": found.deviation,
            "cells": found.cells,
            "outside": (one.relative > 1).mean(axis=0),
            "distance": np.median(one.relative, axis=0),
            "contradictory": (one.contradicts > 1).mean(axis=0),
            "spearman": found.spearman,
            "spearman_of_means": found.spearman_of_means,
            "slope": found.slope,
            "rises": found.rises,
            "directed": found.directed,
            "same_scale": artist.same_scale(feature),
        }
    )
    return found, table


def knob_table(steps: pd.DataFrame) -> pd.DataFrame:
    """Reduce a table of responses to a row per feature, the knobs that work best first.

    ``spearman``, ``rises``, ``slope``, and the shares ``outside`` and ``contradictory`` over cells
    and steps stand side by side for each mode.
    """
    keys = ["feature", "compartment", "category"]
    found: pd.DataFrame | None = None
    for mode in steps["mode"].unique():
        one = steps[steps["mode"] == mode].groupby(keys, sort=False)
        part = one.agg(
            spearman=("spearman", "first"),
            rises=("rises", "first"),
            slope=("slope", "first"),
            outside=("outside", "mean"),
            contradictory=("contradictory", "mean"),
            cells=("cells", "min"),
        ).add_suffix(f"_{mode}")
        found = part if found is None else found.join(part, how="outer")
    if found is None:
        return steps
    best = str(found.columns[0])
    return found.sort_values(best, ascending=False, kind="stable").reset_index()
