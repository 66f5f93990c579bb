"""How a generation job grows with the screen: time, and memory of driver and head. Above the steps.

The job runs as a process of its own with a Ray of its own, so that its peaks are its own.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np

from cp2image.benchmarks.patches import Patches
from cp2image.benchmarks.report import Findings, Table, tell
from cp2image.benchmarks.stand_ins import publish_cells, save_stand_in
from cp2image.config import Config
from cp2image.dataset import open_dataset
from cp2image.errors import Cp2ImageError
from cp2image.metrics.measurement import feature_names

_SIDE, _CHANNEL, _PLATES = 36, "DNA", 8
_FAMILIES = ("AreaShape",)
_MIB = 1024


@dataclass(frozen=True)
class ScreenRun:
    """One job: its cells, wall time in seconds, and peak memory in MiB."""

    cells: int
    seconds: float
    driver_mib: float
    head_mib: float


def benchmark_screen(config: Config) -> Findings:
    """Generate screens of ``benchmark.screens`` cells, each with jobs of their own.

    Raises
    ------
    Cp2ImageError
        If a job fails.
    """
    settings = config.benchmark
    features = feature_names((_CHANNEL,), families=_FAMILIES)
    images = np.random.default_rng(0).integers(0, 4096, (256, 1, _SIDE, _SIDE), np.uint16)
    masks = np.ones((256, 3, _SIDE, _SIDE), np.uint8)
    patches = Patches(images, masks, (_CHANNEL,), 0, (0,), "random numbers")
    runs: list[ScreenRun] = []
    with tempfile.TemporaryDirectory(prefix="cp2image-benchmark-") as folder:
        checkpoint = save_stand_in(folder, (_CHANNEL,), _SIDE, features)
        for count in settings.screens:
            tell(f"screen: publishing {count:,} cells on {_PLATES} plates")
            cells = publish_cells(
                patches, folder, count, plates=_PLATES, name=f"cells-{count}", features=features
            )
            for number in range(settings.screen_jobs):
                tell(f"screen: job {number + 1} of {settings.screen_jobs}, {count:,} cells")
                runs.append(_run(folder, cells, checkpoint, count))
            shutil.rmtree(cells)
    first, last = (_of(runs, count) for count in (settings.screens[0], settings.screens[-1]))
    ratio = median(r.seconds for r in last) / median(r.seconds for r in first)
    note = (
        f"{last[0].cells / first[0].cells:g} × the cells take {ratio:.2f} × the time; the driver's "
        f"peak is {median(r.driver_mib for r in last) / median(r.driver_mib for r in first):.2f} "
        f"×, the head's {median(r.head_mib for r in last) / median(r.head_mib for r in first):.2f}"
        " ×."
    )
    rows = [
        [f"{r.cells:,}", f"{r.seconds:.1f} s", f"{r.driver_mib:.0f} MiB", f"{r.head_mib:.0f} MiB"]
        for r in runs
    ]
    columns = ["cells", "whole job, Ray's start included", "driver", "head (GCS)"]
    introduction = (
        f"`paper`'s untrained generator, {len(features)} features, patches of {_SIDE} px and one "
        f"channel, {_PLATES} plates; every job is a process with a local Ray of its own."
    )
    table = Table("Growth with the screen", columns, rows, note)
    return Findings(introduction, [table], {"runs": [asdict(run) for run in runs]})


def _of(runs: list[ScreenRun], count: int) -> list[ScreenRun]:
    return [run for run in runs if run.cells == count]


def _run(folder: str, cells: str, checkpoint: str, count: int) -> ScreenRun:
    output = f"{folder}/screen"
    shutil.rmtree(output, ignore_errors=True)
    code = (
        "from cp2image.command import run_job\nfrom cp2image.generation import generate\n"
        "raise SystemExit(run_job('', generate))"
    )
    changes = {"input": cells, "checkpoint": checkpoint, "output": output}
    command = [sys.executable, "-c", code, "--set", "tracking.enabled=false"]
    command += [f"--set=generate.{key}={value}" for key, value in changes.items()]
    command += ["--set", f"run.folder={folder}"]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        driver = head = 0.0
        while job.poll() is None:
            driver = max(driver, _peak(job.pid))
            head = max([head, *(_peak(pid) for pid in _children(job.pid, "gcs_server"))])
            time.sleep(0.2)
        seconds = time.perf_counter() - started
        if job.returncode:
            log.seek(0)
            raise Cp2ImageError(f"the job failed: {log.read().decode(errors='replace')[-2000:]}")
    rows = open_dataset(output).rows
    if rows != count:
        raise Cp2ImageError(f"the job published {rows} of {count} cells")
    return ScreenRun(count, seconds, driver, head)


def _peak(pid: int) -> float:
    """Return the peak resident memory of a process so far, in MiB; 0 where there is no /proc."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) / _MIB
    return 0.0


def _children(pid: int, name: str) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            head, _, tail = place.read_text().rpartition(")")
            if head.endswith(f"({name}") and int(tail.split()[1]) == pid:
                found.append(int(place.parent.name))
    return found
