"""Repeated timings, their medians and ratios, and the report they end in. Above storage."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("numpy", "numba", "scipy", "scikit-image", "centrosome", "cp_measure", "torch", "ray")


@dataclass(frozen=True)
class Sample:
    """Seconds that one call took: on the clock, and of this process's CPU time."""

    wall: float
    cpu: float

    def __add__(self, other: "Sample") -> "Sample":
        return Sample(self.wall + other.wall, self.cpu + other.cpu)


@dataclass(frozen=True)
class Timing:
    """What one way of working on ``cells`` cells took each time it was tried."""

    cells: int
    samples: tuple[Sample, ...]

    @property
    def wall(self) -> float:
        """Median of the clock, milliseconds a cell."""
        return statistics.median(sample.wall for sample in self.samples) / self.cells * 1000

    @property
    def cpu(self) -> float:
        """Median of the CPU time, milliseconds a cell."""
        return statistics.median(sample.cpu for sample in self.samples) / self.cells * 1000

    def __add__(self, other: "Timing") -> "Timing":
        """Return the timing of doing both, repetition by repetition."""
        pairs = zip(self.samples, other.samples, strict=True)
        return Timing(self.cells, tuple(one + two for one, two in pairs))

    def to_json(self) -> dict[str, Any]:
        """Return medians and all samples (seconds)."""
        return {
            "cells": self.cells,
            "wall_ms_per_cell": self.wall,
            "cpu_ms_per_cell": self.cpu,
            "samples_wall_s": [sample.wall for sample in self.samples],
            "samples_cpu_s": [sample.cpu for sample in self.samples],
        }


def take_sample(call: Callable[..., object], *arguments: object) -> Sample:
    """Time one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call(*arguments)
    return Sample(time.perf_counter() - wall, time.process_time() - cpu)


def interleave(
    calls: Mapping[str, Callable[[int], object]], cells: int, repetitions: int
) -> dict[str, Timing]:
    """Time calls on ``cells`` cells in turn, so that other load hits them alike.

    All have run once, on a tenth of the cells, before the first is timed.
    """
    for call in calls.values():
        call(max(2, cells // 10))
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            samples[name].append(take_sample(call, cells))
    return {name: Timing(cells, tuple(taken)) for name, taken in samples.items()}


@dataclass(frozen=True)
class Comparison:
    """A plain way of doing something beside this package's, on the same cells."""

    title: str
    plain: Timing
    ours: Timing

    @property
    def wall_ratio(self) -> float:
        """How many times faster, by the medians of the clock."""
        return self.plain.wall / self.ours.wall

    @property
    def cpu_ratio(self) -> float:
        """How many times less CPU time, by the medians."""
        return self.plain.cpu / self.ours.cpu

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest ratio of CPU times of one repetition."""
        pairs = zip(self.plain.samples, self.ours.samples, strict=True)
        ratios = [plain.cpu / ours.cpu for plain, ours in pairs]
        return min(ratios), max(ratios)

    def to_json(self) -> dict[str, Any]:
        """Return both timings and their ratios."""
        return {
            "title": self.title,
            "wall_ratio": self.wall_ratio,
            "cpu_ratio": self.cpu_ratio,
            "cpu_ratio_range": self.range,
            "plain": self.plain.to_json(),
            "ours": self.ours.to_json(),
        }


@dataclass(frozen=True)
class Table:
    """A titled table of text and what to know about it; ``str`` is Markdown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"### {self.title}", table, self.note) if part)


def compare(title: str, comparisons: Sequence[Comparison], plain: str, note: str = "") -> Table:
    """Set comparisons out as a table; ``plain`` names the plain way."""
    columns = [
        "per cell, wall / CPU",
        plain,
        "cp2image",
        "ratio, wall",
        "ratio, CPU",
        "CPU, lowest to highest",
    ]
    rows = [
        [
            one.title,
            f"{one.plain.wall:.2f} / {one.plain.cpu:.2f} ms",
            f"{one.ours.wall:.2f} / {one.ours.cpu:.2f} ms",
            f"{one.wall_ratio:.1f} ×",
            f"{one.cpu_ratio:.1f} ×",
            f"{one.range[0]:.1f} to {one.range[1]:.1f}",
        ]
        for one in comparisons
    ]
    return Table(title, columns, rows, note)


@dataclass(frozen=True)
class Findings:
    """What a benchmark found: tables to read, figures to compute with."""

    introduction: str
    tables: Sequence[Table]
    figures: dict[str, Any]


@dataclass(frozen=True)
class Report:
    """Findings with the circumstances they were found in; ``str`` is Markdown.

    Attributes
    ----------
    name
        Of the benchmark.
    findings
        What it found.
    settings
        Of the run.
    circumstances
        Machine, load, versions, commit, time, as `observe` makes them.
    """

    name: str
    findings: Findings
    settings: dict[str, Any]
    circumstances: dict[str, Any]

    def __str__(self) -> str:
        seen, found = self.circumstances, self.findings
        before, after = seen["load_before"], seen["load_after"]
        lines = [
            f"- {seen['cpu_model']}, {seen['cores']} cores, {seen['memory_gib']:.0f} GiB; load "
            f"average {before:.2f} before, {after:.2f} after, {seen['seconds'] / 60:.1f} minutes",
            f"- commit {seen['commit']}, {seen['started']}, Python {seen['python']}, "
            + ", ".join(f"{name} {version}" for name, version in seen["versions"].items()),
        ]
        if before > 0.5:
            lines.append(
                "- **The machine was busy with other work**: trust the ratios more than the times, "
                "and those of CPU time more than those of the clock."
            )
        parts = [f"## Benchmark: {self.name}", found.introduction, "\n".join(lines)]
        return "\n\n".join([*parts, *map(str, found.tables)]) + "\n"

    def to_json(self) -> str:
        """Return everything, samples included, as JSON."""
        content = {
            "benchmark": self.name,
            **self.circumstances,
            "settings": self.settings,
            "results": self.findings.figures,
        }
        return json.dumps(content, indent=1, allow_nan=False)


def observe(name: str, benchmark: Callable[[], Findings], settings: dict[str, Any]) -> Report:
    """Run a benchmark and note the circumstances."""
    started, clock, before = datetime.now(UTC), time.monotonic(), os.getloadavg()[0]
    findings = benchmark()
    circumstances = {
        "started": started.isoformat(timespec="seconds"),
        "seconds": time.monotonic() - clock,
        "commit": _read_commit(),
        "cpu_model": _read_cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "load_before": before,
        "load_after": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": _read_versions(),
    }
    return Report(name, findings, settings, circumstances)


def tell(text: str) -> None:
    """Say on standard error what is going on: a benchmark takes minutes."""
    print(text, file=sys.stderr, flush=True)


def _read_commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return done.stdout.strip()


def _read_cpu_model() -> str:
    place = Path("/proc/cpuinfo")
    lines = place.read_text().splitlines() if place.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _read_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
