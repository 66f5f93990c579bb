"""How fast patches are drawn: the bare model, and the whole job around it. Above the steps."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cp2image.benchmarks.networks import Size, measure_growth, tell_drawing, time_drawing
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

    def draw(one: Size, cells: int = 64) -> Timing:
        found = time_drawing(one, cells=cells, repetitions=settings.repetitions, plain=False)
        return found.timings["float32"]

    jobs, bare = [], [draw(size, settings.drawn).wall]
    with tempfile.TemporaryDirectory(prefix="cp2image-benchmark-") as folder:
        tell(f"generate: publishing a plate of {settings.plate_cells:,} cells")
        cells = publish_cells(patches, folder, settings.plate_cells)
        checkpoint = save_stand_in(folder, patches.channels, size.side)
        for _ in range(settings.jobs):
            job = _time_job(config, folder, cells, checkpoint, settings.plate_cells)
            bare.append(draw(size, settings.drawn).wall)  # before and after: machines vary
            jobs.append(job | {"bare_cells_per_s": 2000 / (bare[-2] + bare[-1])})
    tables = [tell_drawing(drawing, size), _tell_jobs(jobs)]
    grown: list[dict[str, Any]] = []
    if settings.growth:
        sizes = [Size(n, size.channels, size.side) for n in (50, 500, 2000)]
        sizes += [Size(features, size.channels, side) for side in (64, 96, 128)]
        table, grown = measure_growth(draw, sizes, "drawn cell")
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
) -> dict[str, float]:
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
    begun = min(workers, len(ends) - 1) - 1  # every actor has ended its first unit
    flow = (len(ends) - 1 - begun) * job.cluster.cells_per_task / max(ends[-1] - ends[begun], 1e-9)
    return {
        "cells": count,
        "seconds": seconds,
        "first_unit_s": ends[0] - before,
        "flow_cells_per_s": flow,
    }


def _tell_jobs(jobs: list[dict[str, float]]) -> Table:
    flow = [job["flow_cells_per_s"] / job["bare_cells_per_s"] for job in jobs]
    whole = [job["cells"] / job["seconds"] / job["bare_cells_per_s"] for job in jobs]
    rows = [
        [
            f"{job['cells']:,.0f}",
            f"{job['seconds']:.1f} s",
            f"{job['first_unit_s']:.1f} s",
            f"{job['bare_cells_per_s']:,.0f}",
            f"{job['flow_cells_per_s']:,.0f}",
            f"{in_flow:.2f}",
            f"{job['cells'] / job['seconds']:,.0f}",
            f"{in_all:.2f}",
        ]
        for job, in_flow, in_all in zip(jobs, flow, whole, strict=True)
    ]
    columns = ["cells", "whole job", "until the first unit", "bare model, cells/s"]
    columns += ["cells/s from the first unit on", "of the bare model"]
    columns += ["cells/s, all of it", "of the bare model"]
    note = (
        "Read, scale, draw, compress, write, publish, plate picture and MLflow; Ray was up. Bare "
        "model: all threads, the mean of its speed before and after the job. Medians: "
        f"{median(flow):.2f} of it from the first unit on, {median(whole):.2f} in all."
    )
    return Table("The whole job, one plate", columns, rows, note)
