"""How fast patches are drawn: the bare model, and the whole job around it. Above the steps."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cp2image.benchmarks.networks import (
    Size,
    measure_growth,
    tell_drawing,
    time_bare,
    time_drawing,
)
from cp2image.benchmarks.patches import take_patches
from cp2image.benchmarks.report import Findings, Table, Timing, tell
from cp2image.benchmarks.stand_ins import publish_cells, save_stand_in
from cp2image.cluster import join_cluster
from cp2image.config import Config
from cp2image.generation import generate
from cp2image.metrics.measurement import feature_names
from cp2image.storage import join

_PATCHES = 96


def benchmark_generate(config: Config) -> Findings:
    """Time the bare model against plain PyTorch, the whole job against it, and how cost grows.

    Raises
    ------
    MeasurementError
        If it cannot be told which channel shows nuclei.
    """
    settings = config.benchmark
    patches = take_patches(config, _PATCHES)
    features = len(feature_names(patches.channels))
    size = Size(features, len(patches.channels), patches.images.shape[-1])
    tell(f"generate: {settings.drawn} cells, plain and folded in turn")
    drawing = time_drawing(size, cells=settings.drawn, repetitions=settings.repetitions)
    threads = torch.get_num_threads()
    sizes = [settings.plate_cells] * settings.jobs + [settings.small_plate_cells]
    jobs, bare = [], [time_bare(size, settings.bare_cells, threads)]
    with tempfile.TemporaryDirectory(prefix="cp2image-benchmark-") as folder:
        tell(f"generate: publishing a plate of {settings.plate_cells:,} cells")
        plates = {
            n: publish_cells(patches, folder, n, name=f"cells-{n}") for n in sorted(set(sizes))
        }
        checkpoint = save_stand_in(folder, patches.channels, size.side)
        for count in sizes:
            job = _time_job(config, folder, plates[count], checkpoint, count)
            bare.append(time_bare(size, settings.bare_cells, threads))  # machines vary
            limits = {name: (bare[-2][name] + bare[-1][name]) / 2 for name in bare[-1]}
            jobs.append(job | {"bare_cells_per_s": limits})

    def draw(one: Size) -> Timing:
        found = time_drawing(one, cells=64, repetitions=settings.repetitions, plain=False)
        return found.timings["float32"]

    tables = [tell_drawing(drawing, size), _tell_jobs(jobs)]
    grown: list[dict[str, Any]] = []
    if settings.growth:
        grow = [Size(n, size.channels, size.side) for n in (50, 500, 2000)]
        grow += [Size(features, size.channels, side) for side in (64, 96, 128)]
        table, grown = measure_growth(draw, grow, "drawn cell")
        tables.append(table)
    figures = {
        "drawing": {name: timing.to_json() for name, timing in drawing.timings.items()},
        "difference": drawing.difference,
        "jobs": jobs,
        "growth": grown,
    }
    introduction = (
        f"{torch.get_num_threads()} threads; {features:,} features, {size.channels} channels, "
        f"{size.side} px; medians of {settings.repetitions} repetitions in turn."
    )
    return Findings(introduction, tables, figures)


def _time_job(
    config: Config, folder: str, cells: str, checkpoint: str, count: int
) -> dict[str, Any]:
    """Run the job on the whole plate; return its seconds and those between two units' ends."""
    output = join(folder, "screen")
    shutil.rmtree(output, ignore_errors=True)
    data: dict[str, Any] = config.model_dump()
    data["run"] |= {"folder": folder}
    data["generate"] |= {"input": cells, "checkpoint": checkpoint, "output": output}
    data["generate"] |= {"plates": [], "split": "all", "gpu": False}
    job = Config.model_validate(data)
    join_cluster(job.cluster)
    tell(f"generate: the job, {count:,} cells")
    before, clock = time.time(), time.perf_counter()
    generate(job)
    seconds = time.perf_counter() - clock
    ends = sorted(part.stat().st_mtime for part in Path(output).rglob("part-*.parquet"))
    workers = max(1, int(job.cluster.tasks or (os.cpu_count() or 1)))
    flow = None
    if len(ends) > workers:  # each has ended its first unit, and there are more
        left = len(ends) - workers
        flow = left * job.cluster.cells_per_task / (ends[-1] - ends[workers - 1])
    return {
        "cells": count,
        "seconds": seconds,
        "first_unit_s": ends[0] - before,
        "flow_cells_per_s": flow,
    }


def _tell_jobs(jobs: list[dict[str, Any]]) -> Table:
    rows = []
    for job in jobs:
        rate, flow, bare = job["cells"] / job["seconds"], job["flow_cells_per_s"], _bare(job)
        rows.append(
            [
                f"{job['cells']:,}",
                f"{job['seconds']:.1f} s",
                f"{job['first_unit_s']:.1f} s",
                "–" if flow is None else f"{flow:,.0f}",
                f"{rate:,.0f}",
                *(f"{rate / limit:.2f} of {limit:,.0f}" for limit in bare),
            ]
        )
    columns = ["cells", "whole job", "until the first unit", "cells/s from then on"]
    columns += ["cells/s, all of it", "of the bare model, torch's threads"]
    columns += ["of the bare model, Python's threads"]
    large = [job for job in jobs if job["cells"] == max(one["cells"] for one in jobs)]
    shares = [
        median(job["cells"] / job["seconds"] / _bare(job)[way] for job in large) for way in (0, 1)
    ]
    note = (
        "Read, scale, draw, compress, write, publish, plate picture and MLflow; Ray was up. Bare "
        "model, the mean of its speed before and after the job: one pass after another on torch's "
        "own threads, or one pass per Python thread side by side. Medians of the "
        f"{len(large)} jobs of {large[0]['cells']:,} cells: {shares[0]:.2f} and {shares[1]:.2f}."
    )
    return Table("The whole job, one plate", columns, rows, note)


def _bare(job: dict[str, Any]) -> tuple[float, float]:
    limits = job["bare_cells_per_s"]
    return limits["torch threads"], limits["Python threads"]
