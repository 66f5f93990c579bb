"""How fast patches are measured, beside cp_measure and scikit-image. Above the steps.

All timings are taken in processes of their own with one thread each (`processes`). cp_measure runs
at its best settings: its numba backend, labels that need no sanitising, images as floats
beforehand; laying many patches out in one label image would save it another 6 %, but changes the
features of cells that touch the border. Costes is left out on both sides.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.benchmarks.patches import Patches, publish_patches, take_patches
from cp2image.benchmarks.plain_measurement import measure_plain
from cp2image.benchmarks.plain_segmentation import segment_plain
from cp2image.benchmarks.processes import open_process, read_peak_memory
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
from cp2image.config import Config
from cp2image.config_cells import Measure
from cp2image.data.schema import to_parquet
from cp2image.dataset import open_dataset
from cp2image.measuring import _Measure
from cp2image.metrics.measurement import COMPARTMENTS, FAMILIES, measure
from cp2image.metrics.segmentation import segment

_GROWTH_PATCHES = 30_000
"""Patches of one size over all its repetitions, about: the large sizes are not repeated."""


def benchmark_measure(config: Config) -> Findings:
    """Time batches against cp_measure, one core against two, and how time and memory grow.

    Raises
    ------
    MeasurementError
        If it cannot be told which channel shows nuclei.
    """
    settings = config.benchmark
    sizes = sorted(settings.sizes)
    patches = take_patches(config, settings.patches)
    with tempfile.TemporaryDirectory(prefix="cp2image-benchmark-") as folder:
        work = _Work.store(patches, folder)
        with open_process() as one, open_process() as two:
            tell(f"measure: {len(patches.images)} patches, batch and plain, in turn")
            sides = one.submit(_time_sides, work, settings.repetitions).result()
            tell("measure: one process, two processes")
            cores = _time_cores(work, sizes[0], settings.repetitions, one, two)
        with open_process() as one:
            tell(f"measure: growth over {', '.join(f'{size:,}' for size in sizes)} patches")
            growth = one.submit(_time_growth, work, sizes, settings.repetitions).result()
        tell(f"measure: memory of a job's actor over {sizes[-1]:,} cells")
        dataset = publish_patches(patches, folder, sizes[-1], config.cluster.cells_per_task)
        with open_process() as one:
            actor = one.submit(_run_actor, dataset, config, patches.nucleus_name, sizes).result()
    tables = [_tell_sides(sides), _tell_cores(cores), _tell_growth(growth)]
    tables += [_tell_actor(actor), _tell_families(sides.families)]
    figures = {
        "source": patches.source,
        "patches": list(patches.images.shape),
        "compared": {one.title: one.to_json() for one in sides.compared},
        "share_of_equal_values": sides.equal,
        "columns_with_other_values": sides.unequal,
        "cores": {str(number): timing.to_json() for number, timing in cores.items()},
        "growth": {str(size): timing.to_json() for size, timing in growth.items()},
        "actor": [{**timing.to_json(), "peak_mib": peak} for timing, peak in actor],
        "families": {name: timing.to_json() for name, timing in sides.families.items()},
    }
    n, channels, height, width = patches.images.shape
    introduction = (
        f"{n} patches of {height} × {width} px ({patches.source}), {channels} channels, "
        f"{len(COMPARTMENTS)} compartments, all families but Costes; one thread a process, "
        f"medians of {settings.repetitions} repetitions in turn."
    )
    return Findings(introduction, tables, figures)


@dataclass(frozen=True)
class _Work:
    """The patches and their masks on disk, for the processes."""

    folder: str
    channels: tuple[str, ...]
    nucleus: int
    body: tuple[int, ...]

    @classmethod
    def store(cls, patches: Patches, folder: str) -> "_Work":
        np.save(Path(folder, "images.npy"), patches.images)
        np.save(Path(folder, "masks.npy"), patches.masks)
        return cls(folder, patches.channels, patches.nucleus, patches.body)

    def load(self, size: int | None = None) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """Return images and masks, repeated up to ``size``."""
        images = np.load(Path(self.folder, "images.npy"))
        masks = np.load(Path(self.folder, "masks.npy"))
        if size is None:
            return images, masks
        chosen = np.arange(size) % len(images)
        return images[chosen], masks[chosen]

    def measure(
        self, images: NDArray[Any], masks: NDArray[np.uint8] | None, family: str | None = None
    ) -> pd.DataFrame:
        """Measure as the package does, segmenting where there are no masks."""
        return measure(
            images,
            masks,
            channels=self.channels,
            families=None if family is None else [family],
            nucleus_channel=self.channels[self.nucleus],
            cell_channels=[self.channels[index] for index in self.body],
        )


@dataclass(frozen=True)
class _Sides:
    """Timings of both sides and of the families; the share of equal values, the other columns."""

    compared: tuple[Comparison, ...]
    families: dict[str, Timing]
    equal: float
    unequal: list[str]


def _time_sides(work: _Work, repetitions: int) -> _Sides:
    """Time both sides in one process."""
    images, masks = work.load()
    scale = np.iinfo(images.dtype).max if np.issubdtype(images.dtype, np.integer) else 1
    floats = images / scale
    tables: dict[str, pd.DataFrame] = {}

    def measure_given(n: int) -> None:
        tables["ours"] = work.measure(images[:n], masks[:n])

    def measure_with_cp_measure(n: int) -> None:
        plain = measure_plain(floats[:n], masks[:n], work.channels, accelerated=True)
        tables["plain"] = plain

    def measure_family(name: str, n: int) -> None:
        work.measure(images[:n], masks[:n], name)

    calls: dict[str, Callable[[int], object]] = {
        "given": measure_given,
        "cp_measure": measure_with_cp_measure,
        "all": lambda n: work.measure(images[:n], None),
        "libraries": lambda n: [segment_plain(x, work.nucleus, work.body) for x in floats[:n]],
        "Segmentation": lambda n: segment(images[:n], work.nucleus, work.body),
        **{family: partial(measure_family, family) for family in FAMILIES},
    }
    taken = interleave(calls, len(images), repetitions)
    plain = taken["cp_measure"]
    compared = (
        Comparison("masks given", plain, taken["given"]),
        Comparison("segmentation included", plain + taken["libraries"], taken["all"]),
    )
    families = {name: taken[name] for name in ("Segmentation", *FAMILIES)}
    return _Sides(compared, families, *_find_equal(tables["ours"], tables["plain"]))


def _find_equal(ours: pd.DataFrame, plain: pd.DataFrame) -> tuple[float, list[str]]:
    """Return the share of values within 1e-9 (relative, or absolute), and columns with others."""
    a, b = ours.to_numpy(), plain[list(ours)].to_numpy()
    equal = np.isclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
    return float(equal.mean()), [str(name) for name in ours.columns[~equal.all(axis=0)]]


def _time_cores(
    work: _Work, size: int, repetitions: int, one: ProcessPoolExecutor, two: ProcessPoolExecutor
) -> dict[int, Timing]:
    """Time one process with all patches, and two that start together with a half each."""
    half = size // 2
    for process in (one, two):
        process.submit(_time_part, work, 2).result()
    samples: dict[int, list[Sample]] = {1: [], 2: []}
    for _ in range(repetitions):
        for parts in ([(one, 2 * half)], [(one, half), (two, half)]):
            waiting = [process.submit(_time_part, work, cells) for process, cells in parts]
            begins, ends, cpu = zip(*(part.result() for part in waiting), strict=True)
            samples[len(parts)].append(Sample(max(ends) - min(begins), sum(cpu)))
    return {number: Timing(2 * half, tuple(taken)) for number, taken in samples.items()}


def _time_part(work: _Work, size: int) -> tuple[float, float, float]:
    """Segment and measure; return begin and end on the machine's clock, and CPU seconds."""
    images, _ = work.load(size)
    begin = time.monotonic()
    sample = take_sample(work.measure, images, None)
    return begin, time.monotonic(), sample.cpu


def _time_growth(work: _Work, sizes: Sequence[int], repetitions: int) -> dict[int, Timing]:
    """Time one call with masks given at each size; small sizes in turn, large ones once."""
    work.measure(*work.load(2))
    counts = {size: min(repetitions, max(1, _GROWTH_PATCHES // size)) for size in sizes}
    samples: dict[int, list[Sample]] = {size: [] for size in sizes}
    for turn in range(repetitions):
        for size in sizes:
            if turn < counts[size]:
                samples[size].append(take_sample(work.measure, *work.load(size)))
    return {size: Timing(size, tuple(taken)) for size, taken in samples.items()}


def _run_actor(
    dataset: str, config: Config, nucleus: str, sizes: Sequence[int]
) -> list[tuple[Timing, float]]:
    """Do what an actor of the job does; return time and peak memory (MiB) up to each size."""
    opened = open_dataset(dataset)
    settings = config.model_copy(update={"measure": Measure(nucleus_channel=nucleus)})
    process = _Measure(settings, opened.patch_format, opened.metadata)
    units = opened.ranges(config.cluster.cells_per_task)
    process(replace(units[0], rows=2))
    done, total, left = 0, Sample(0.0, 0.0), list(sizes)
    seen: list[tuple[Timing, float]] = []
    for unit in units:
        total += take_sample(lambda cells: to_parquet(process(cells).table), unit)
        done += unit.rows
        if left and done >= left[0]:
            left = [size for size in left if size > done]
            seen.append((Timing(done, (total,)), read_peak_memory()))
    return seen


def _tell_sides(sides: _Sides) -> Table:
    others = sorted({name.split("_", 1)[1].rsplit("_", 1)[0] for name in sides.unequal})
    note = (
        "Plain: cp_measure with its numba backend, one object at a time, and scikit-image with "
        f"centrosome for the segmentation. {sides.equal:.2%} of the values agree within 1e-9; "
        f"others in: {', '.join(others) or 'none'}. Where pixels tie, cp2image takes "
        "CellProfiler's centre and brightest pixel, cp_measure the first or the last."
    )
    return compare("One core, beside cp_measure", sides.compared, "plain", note)


def _tell_cores(cores: dict[int, Timing]) -> Table:
    rows = [
        [
            str(number),
            f"{timing.wall:.2f} ms",
            f"{timing.cpu:.2f} ms",
            f"{1000 / timing.wall:,.0f}",
            f"{cores[1].wall / timing.wall:.2f} ×",
        ]
        for number, timing in cores.items()
    ]
    columns = ["processes", "wall per cell", "CPU per cell", "cells/s", "speed-up"]
    note = f"{cores[1].cells:,} patches, segmentation included."
    return Table("One core and two", columns, rows, note)


def _tell_growth(growth: dict[int, Timing]) -> Table:
    first = next(iter(growth.values()))
    rows = [
        [
            f"{size:,}",
            str(len(timing.samples)),
            f"{timing.wall:.2f} ms",
            f"{timing.cpu:.2f} ms",
            f"{timing.wall / first.wall:.2f}",
            f"{timing.cpu / first.cpu:.2f}",
        ]
        for size, timing in growth.items()
    ]
    columns = ["patches", "repetitions", "wall per cell", "CPU per cell"]
    columns += ["wall, first = 1", "CPU, first = 1"]
    return Table("Growth: one call, masks given", columns, rows)


def _tell_actor(actor: Sequence[tuple[Timing, float]]) -> Table:
    rows = [
        [
            f"{timing.cells:,}",
            f"{timing.wall:.2f} ms",
            f"{timing.cpu:.2f} ms",
            f"{peak:.0f} MiB",
            f"{peak / actor[0][1]:.2f}",
        ]
        for timing, peak in actor
    ]
    note = "One process reads a published dataset range by range, segments, measures, serialises."
    columns = ["cells so far", "wall per cell", "CPU per cell", "peak memory", "first = 1"]
    return Table("A job's actor: time and memory", columns, rows, note)


def _tell_families(families: dict[str, Timing]) -> Table:
    total = sum(timing.cpu for timing in families.values())
    ordered = sorted(families.items(), key=lambda pair: -pair[1].cpu)
    rows = [[name, f"{one.cpu:.3f} ms", f"{one.cpu / total:.0%}"] for name, one in ordered]
    note = (
        f"Each alone, so what families share counts in each. The next bottleneck: {ordered[0][0]}, "
        f"then {ordered[1][0]}."
    )
    return Table("Where the time goes", ["part", "CPU per cell", "share"], rows, note)
