"""Where the time of an evaluation goes, and its parts beside a plain script. Above the steps.

The evaluation is the step itself, on Ray and with all that it writes. The generated cells are the
real ones as a model sees them, blurred: nothing is generated but the shuffle control. The plain
script (`plain_evaluation`) and the package's functions take turns in a process of one thread.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from cp2image.benchmarks import plain_evaluation as plain
from cp2image.benchmarks.patches import Patches, take_patches
from cp2image.benchmarks.processes import open_process
from cp2image.benchmarks.report import (
    Comparison,
    Findings,
    Sample,
    Table,
    Timing,
    compare,
    interleave,
    take_sample,
    tell,
)
from cp2image.benchmarks.stand_ins import publish_cells, save_stand_in
from cp2image.config import Config
from cp2image.config_cells import Measure
from cp2image.data.intensity import Intensity
from cp2image.evaluation import evaluate
from cp2image.metrics.correlation import (
    bootstrap_correlation,
    feature_correlation,
    group_moments,
)
from cp2image.metrics.embedding import CellProfilerEmbedding, quantise
from cp2image.metrics.frechet import Moments, frechet_distance, kernel_distance
from cp2image.metrics.measurement import feature_names, measure
from cp2image.stopwatch import Stopwatch

_DISTINCT = 1_000
"""Patches that are published over and over."""
_WELLS = 96
_RESAMPLES = 10
"""Of the bootstrap beside the plain one; the step takes 200."""


def benchmark_evaluate(config: Config) -> Findings:
    """Time the parts of an evaluation with the ``cp`` embedding; set them beside a plain script.

    Raises
    ------
    DatasetError
        If ``measure.input`` is published, but has too few patches.
    MeasurementError
        If it cannot be told which channel shows nuclei.
    """
    settings = config.benchmark
    count, size = settings.evaluated_cells, settings.patches
    patches = take_patches(config, max(size, min(count, _DISTINCT)))
    drawn = _blur(patches)
    tell(f"evaluate: {count:,} real and {count:,} generated cells")
    seconds = _time_step(config, patches, drawn, count)
    tell(f"evaluate: measuring {size} pairs, plain and the package's in turn")
    some = replace(patches, images=drawn.images[:size], masks=drawn.masks[:size])
    with open_process() as one:
        measured = one.submit(_time_measuring, some, settings.repetitions).result()
        tell(f"evaluate: statistics of {count:,} pairs, plain and the package's in turn")
        names = feature_names(patches.channels)
        compared = one.submit(_time_statistics, names, count, settings.repetitions).result()
    total = sum(seconds.values())
    figures = {
        "source": patches.source,
        "cells": count,
        "seconds": seconds,
        "total_seconds": total,
        "shares": {name: part / total for name, part in seconds.items()},
        "compared": {one.title: one.to_json() for one in [measured, *compared]},
    }
    introduction = (
        f"{count:,} real and {count:,} generated cells ({patches.source}), "
        f"{len(patches.channels)} channels of {patches.images.shape[-1]} px, {len(names):,} "
        f"features, embedding cp, {_WELLS} wells; shuffle control, pictures and MLflow included."
    )
    tables = [_tell_parts(seconds, count), _tell_sides(measured, compared, size, count)]
    return Findings(introduction, tables, figures)


def _blur(patches: Patches) -> Patches:
    """Return the patches as a model that paints averages might draw them, 8 bit."""
    full_scale = 1.0 if patches.images.dtype.kind == "f" else np.iinfo(patches.images.dtype).max
    seen = Intensity().apply(patches.images, [""] * len(patches.images), float(full_scale))
    return replace(patches, images=quantise(gaussian_filter(seen, (0, 0, 1, 1))))


def _time_step(config: Config, patches: Patches, drawn: Patches, count: int) -> dict[str, float]:
    """Publish both sets and a checkpoint, evaluate them; return the seconds of each part."""
    import ray

    alone = not ray.is_initialized()
    side = patches.images.shape[-1]
    with tempfile.TemporaryDirectory(prefix="cp2image-benchmark-") as folder:
        settings = config.evaluate.model_copy(
            update={
                "real": publish_cells(patches, folder, count),
                "generated": publish_cells(
                    drawn, folder, count, name="drawn", normalisation="per_patch_max"
                ),
                "checkpoint": save_stand_in(folder, patches.channels, side),
                "output": os.path.join(folder, "report"),
                "cells": count,
                "split": "all",
                "embeddings": ["cp"],
            }
        )
        changed = {
            "evaluate": settings,
            "measure": Measure(nucleus_channel=patches.nucleus_name),
            "tracking": config.tracking.model_copy(
                update={"uri": f"sqlite:///{folder}/mlflow.db"},
            ),
        }
        measure(
            patches.images[:2], channels=patches.channels, nucleus_channel=patches.nucleus_name
        )  # compiles, once per machine
        watch, before = Stopwatch(), time.perf_counter()
        try:
            evaluate(config.model_copy(update=changed), watch)
            lasted = time.perf_counter() - before
        finally:
            if alone:
                ray.shutdown()
        seconds = watch.take()
    seconds["other"] = lasted - sum(seconds.values())
    return seconds


def _time_measuring(drawn: Patches, repetitions: int) -> Comparison:
    """Segment and measure patches with both ways."""

    def measure_batch(n: int) -> pd.DataFrame:
        return measure(
            drawn.images[:n], channels=drawn.channels, nucleus_channel=drawn.nucleus_name
        )

    def measure_singly(n: int) -> pd.DataFrame:
        return plain.measure_set_plain(drawn.images[:n], drawn.channels, drawn.nucleus, drawn.body)

    calls = {"plain": measure_singly, "ours": measure_batch}
    timings = interleave(calls, len(drawn.images), repetitions)
    return Comparison("segmenting and measuring", timings["plain"], timings["ours"])


@dataclass(frozen=True)
class _Pairs:
    """Random features under a table's real names, paired cells that correlate."""

    real: pd.DataFrame
    drawn: pd.DataFrame
    wells: list[str]

    @classmethod
    def make(cls, names: Sequence[str], count: int) -> "_Pairs":
        random = np.random.default_rng(0)
        real, other = random.normal(size=(2, count, len(names))).astype(np.float32)
        tables = [pd.DataFrame(values, columns=list(names)) for values in (real, real + other)]
        return cls(tables[0], tables[1], [str(k % _WELLS) for k in range(count)])


def _time_statistics(names: Sequence[str], count: int, repetitions: int) -> list[Comparison]:
    pairs = _Pairs.make(names, count)
    real, drawn, wells = pairs.real, pairs.drawn, pairs.wells

    def embed() -> list[NDArray[np.float32]]:
        embedding = CellProfilerEmbedding.fit(real)
        return [embedding.embed(part) for part in (real, drawn)]

    def bootstrap() -> object:
        parts = group_moments(real, drawn, wells, names)
        return bootstrap_correlation(parts, resamples=_RESAMPLES)

    x, y = embed()
    u, v = x.astype(np.float64), y.astype(np.float64)
    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "correlation": (
            lambda: plain.correlate_plain(real, drawn),
            lambda: feature_correlation(real, drawn, names),
        ),
        f"bootstrap over wells, {_RESAMPLES} resamples": (
            lambda: plain.bootstrap_plain(real, drawn, wells, _RESAMPLES),
            bootstrap,
        ),
        "embedding": (lambda: plain.embed_plain(real, drawn), embed),
        "Fréchet distance": (
            lambda: plain.frechet_plain(u, v),
            lambda: frechet_distance(Moments.of(x), Moments.of(y), allow_singular=True),
        ),
        "kernel distance": (
            lambda: plain.kernel_plain(u, v),
            lambda: kernel_distance(x, y),
        ),
    }
    samples: dict[str, list[tuple[Sample, Sample]]] = {title: [] for title in sides}
    for _ in range(repetitions):
        for title, (slow, quick) in sides.items():
            samples[title].append((take_sample(slow), take_sample(quick)))
    found = []
    for title, taken in samples.items():
        slowly, quickly = (Timing(count, tuple(side)) for side in zip(*taken, strict=True))
        found.append(Comparison(title, slowly, quickly))
    return found


def _tell_parts(seconds: dict[str, float], count: int) -> Table:
    total = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda pair: -pair[1])
    rows = [[name, f"{part:.2f} s", f"{part / total:.1%}"] for name, part in ordered]
    rows.append(["all", f"{total:.1f} s", f"{1:.1%}"])
    note = (
        f"{1000 * total / (2 * count):.2f} ms on the clock for each of {2 * count:,} cells. What "
        "workers do counts as the clock's time by their number."
    )
    return Table("Where the time goes", ["part", "seconds", "share"], rows, note)


def _tell_sides(
    measured: Comparison, compared: Sequence[Comparison], size: int, count: int
) -> Table:
    note = (
        f"{size} patches measured, statistics of {count:,} pairs. Plain: cp_measure, scikit-image "
        "and centrosome one patch at a time, pandas' corrwith, scipy's sqrtm."
    )
    return compare("One core, beside a plain script", [measured, *compared], "plain", note)
