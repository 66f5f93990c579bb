"""Whether each metric moves the right way on cells that were spoilt on purpose. Step.

Half of the real cells, spoilt, are compared with the other half, beside the same half as it is. A
metric moves where the difference is more than three times its scatter over draws of four fifths of
both halves.
"""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import PLATE
from cp2image.config import Config
from cp2image.data.identity import cell_keys
from cp2image.data.intensity import Intensity
from cp2image.data.schema import PATCH, decode_metadata, decode_patches
from cp2image.dataset import open_dataset, read_range
from cp2image.errors import EvaluationError
from cp2image.metrics.correlation import (
    compared_features,
    feature_correlation,
    summarise_correlation,
)
from cp2image.metrics.coverage import coverage
from cp2image.metrics.embedding import CellProfilerEmbedding, FilterBank, quantise
from cp2image.metrics.frechet import Moments, frechet_distance, kernel_distance
from cp2image.metrics.measurement import measure
from cp2image.metrics.spoiling import WAYS
from cp2image.storage import join, write_bytes

_DRAWS, _SHARE, _CLEARLY, _FEWEST = 6, 0.8, 3.0, 40
_FAMILIES = ["AreaShape", "Intensity", "Texture"]
UP, DOWN, STAYS = "up", "down", "stays"
_DISTANCES = ("Fréchet", "KID")
_SHARES = ("precision", "density", "recall", "coverage")


@dataclass(frozen=True)
class Sanity:
    """What moved which way; ``sanity.csv`` holds the same.

    Attributes
    ----------
    uri
        Folder of the tables.
    cells
        Real cells.
    table
        One row per way to spoil and metric: ``spoilt`` and ``real`` values (means over draws),
        ``z`` (difference over its scatter), ``moved``, ``expected`` (empty: nothing), ``right``.
    """

    uri: str
    cells: int
    table: pd.DataFrame

    @property
    def wrong(self) -> pd.DataFrame:
        """The rows where a metric did not move as it should."""
        return self.table[self.table["right"] == "no"]

    def __str__(self) -> str:
        text = f"{self.uri}: {self.cells:,} real cells, each way against {self.cells // 2:,}\n"
        text += to_markdown(self.table)
        wrong = [f"{row.metric} on {row.way}: {row.moved}" for row in self.wrong.itertuples()]
        return text + "moves the wrong way: " + ("; ".join(wrong) or "none") + "\n"


def check_metrics(config: Config) -> Sanity:
    """Spoil real cells in every way and see which metrics notice.

    Raises
    ------
    DatasetError
        If ``sanity.input`` is no dataset of cells at acquisition scale.
    EvaluationError
        If there are fewer than 300 cells.
    """
    settings = config.sanity
    patches, channels = _real_cells(settings.input, settings.cells)
    if len(patches) < 300:
        raise EvaluationError(
            f"{settings.input}: {len(patches)} cells; distances in 129 dimensions need at "
            "least 300; simulate or prepare more (simulate.plates)"
        )
    rng = np.random.default_rng(settings.seed)
    bank = FilterBank(len(channels))
    order = rng.permutation(len(patches))
    held, own = patches[order[0::2]], patches[order[1::2]]
    real, kept = (_Seen.of(part, channels, bank) for part in (held, own))
    embedding = CellProfilerEmbedding.fit(real.measured[real.whole], dimensions=48)
    draws = [
        tuple(rng.permutation(len(part))[: int(_SHARE * len(part))] for part in (held, own))
        for _ in range(_DRAWS)
    ]
    rows = []
    plain = [_metrics(real, kept, kept, draw, embedding) for draw in draws]
    for way, spoil in WAYS.items():
        spoilt = _Seen.of(spoil(own, rng), channels, bank)
        found = [_metrics(real, kept, spoilt, draw, embedding) for draw in draws]
        for metric in plain[0]:
            values = np.array([one[metric] for one in found])
            before = np.array([one[metric] for one in plain])
            rows.append(_judge(way, metric, values, before))
    table = pd.DataFrame(rows)
    result = Sanity(settings.output, len(patches), table)
    write_bytes(join(settings.output, "sanity.csv"), table.to_csv(index=False).encode())
    write_bytes(join(settings.output, "sanity.md"), str(result).encode())
    about = {"cells": len(patches), "families": _FAMILIES, "seed": settings.seed}
    write_bytes(join(settings.output, "protocol.json"), json.dumps(about).encode())
    return result


def expected(way: str, metric: str) -> str:
    """Return how a metric should move: ``up``, ``down``, ``stays``, or ``""`` for either.

    >>> expected("blur", "Fréchet, cp"), expected("features shuffled", "mean r")
    ('up', 'down')
    """
    kind = metric.partition(",")[0]
    if kind in _DISTANCES:
        return STAYS if way == "features shuffled" else UP
    if kind in ("precision", "density") and way == "ten cells only":
        return ""  # ten real cells are as real as any; that they are few is for the others to tell
    return STAYS if way == "features shuffled" and kind in _SHARES else DOWN


def to_markdown(table: pd.DataFrame) -> str:
    """Write the table: a row per metric, a column per way; a wrong move is marked."""
    ways = list(dict.fromkeys(table["way"]))
    lines = [f"| | real | {' | '.join(ways)} |", "| --- |" + " ---: |" * (len(ways) + 1)]
    for metric, rows in table.groupby("metric", sort=False):
        own = rows.set_index("way")
        marks = {"no": " ✗", "yes": "", "": ""}
        cells = [f"{own.loc[way, 'spoilt']:.3g}{marks[own.loc[way, 'right']]}" for way in ways]
        lines.append(f"| {metric} | {own['real'].iloc[0]:.3g} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class _Seen:
    """Cells as the metrics see them."""

    measured: pd.DataFrame
    whole: NDArray[np.bool_]
    filtered: NDArray[np.float32]

    @classmethod
    def of(cls, patches: NDArray[np.uint8], channels: tuple[str, ...], bank: FilterBank) -> "_Seen":
        measured = measure(patches, channels=channels, families=_FAMILIES)
        return cls(measured, measured.notna().any(axis=1).to_numpy(), bank.embed(patches))


def _metrics(
    real: _Seen,
    own: _Seen,
    spoilt: _Seen,
    draw: tuple[NDArray[np.int64], ...],
    embedding: CellProfilerEmbedding,
) -> dict[str, float]:
    """Compare cells of one half with spoilt ones of the other, and those with what they were."""
    first, second = draw
    found = _compare("filterbank", real.filtered[first], spoilt.filtered[second])
    held, drawn = first[real.whole[first]], second[spoilt.whole[second]]
    if min(len(held), len(drawn)) >= _FEWEST:
        vectors = [embedding.embed(s.measured.iloc[r]) for s, r in ((real, held), (spoilt, drawn))]
        found |= _compare("cp", *vectors)
    else:
        found |= dict.fromkeys((f"{name}, cp" for name in (*_DISTANCES, *_SHARES)), float("nan"))
    if spoilt is own:
        return found | {"mean r": 1.0}
    names = list(compared_features(own.measured))
    before, after = (s.measured.iloc[second].reset_index(drop=True) for s in (own, spoilt))
    kept = summarise_correlation(feature_correlation(before, after, names))["mean_r"]
    return found | {"mean r": float(kept or 0)}


def _compare(name: str, a: NDArray[np.float32], b: NDArray[np.float32]) -> dict[str, float]:
    around = coverage(a, b)
    return {
        f"Fréchet, {name}": frechet_distance(Moments.of(a), Moments.of(b), allow_singular=True),
        f"KID, {name}": kernel_distance(a, b).mean,
        f"precision, {name}": around.precision,
        f"density, {name}": around.density,
        f"recall, {name}": around.recall,
        f"coverage, {name}": around.coverage,
    }


def _judge(
    way: str, metric: str, values: NDArray[np.float64], before: NDArray[np.float64]
) -> dict[str, object]:
    difference = values - before
    scatter = float(np.hypot(difference.std(ddof=1), 1e-12))
    z = float(difference.mean()) / scatter
    moved = STAYS if abs(z) < _CLEARLY else UP if z > 0 else DOWN
    wanted = expected(way, metric)
    known = bool(np.isfinite(difference).all())
    right = "" if not (wanted and known) else "yes" if moved == wanted else "no"
    return {
        "way": way,
        "metric": metric,
        "spoilt": float(values.mean()),
        "real": float(before.mean()),
        "z": z,
        "moved": moved if known else "",
        "expected": wanted,
        "right": right,
    }


def _real_cells(uri: str, most: int) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return real patches, 8 bit, each channel over its maximum; those of the smallest keys."""
    dataset = open_dataset(uri)
    form, keys, patches = dataset.patch_format, [], []
    for unit in dataset.ranges(1_024):
        table = read_range(unit, [*dataset.metadata, PATCH])
        metadata = decode_metadata(table)
        plates = metadata[PLATE].astype(str).tolist()
        seen = decode_patches(table, form)
        if form.normalisation == "none":
            seen = Intensity().apply(seen, plates, form.full_scale)
        patches.append(quantise(seen))
        keys.append(cell_keys(metadata))
    order = np.argsort(np.concatenate(keys), kind="stable")[:most]
    return np.concatenate(patches)[order], form.channels
