"""How fast cells get from a dataset to the training step. Above the steps.

Beside it stands what the method's published code does: one ``.npy`` file per cell and a
`torch.utils.data.DataLoader`, at its best number of workers. The limit is a bare pyarrow scan of
the same columns that decodes what it reads.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cp2image.benchmarks.patches import take_patches
from cp2image.benchmarks.report import Findings, Sample, Table, Timing, take_sample, tell
from cp2image.benchmarks.stand_ins import publish_cells
from cp2image.cluster import join_cluster
from cp2image.config import Config
from cp2image.data.schema import decode_features, decode_patches
from cp2image.dataset import CellDataset, open_dataset
from cp2image.profiles import Preparation, prepare_profiles
from cp2image.storage import join
from cp2image.training import read_cells
from cp2image.training_cells import CellArrays, load_cells
from cp2image.training_loop import TrainingLoop, TrainingPlan

_PATCHES = 96
_BYTES = 36_000
"""What a cell takes in memory, about."""
_BATCH = 104
_WORKERS = (0, 1, 2)
_STEPS = 12


def benchmark_input(config: Config) -> Findings:
    """Time the first read and later passes, beside one file per cell and a bare scan.

    Raises
    ------
    MeasurementError
        If it cannot be told which channel shows nuclei.
    """
    settings = config.benchmark
    with tempfile.TemporaryDirectory(prefix="cp2image-benchmark-") as folder:
        tell(f"input: publishing {settings.read_cells:,} cells, and one file for each")
        patches = take_patches(config, _PATCHES)
        uri = publish_cells(patches, folder, settings.read_cells, plates=2)
        job = _experiment(config, folder, uri)
        dataset = open_dataset(uri)
        preparation = prepare_profiles(dataset, job)
        files = _OneFilePerCell.write(dataset, preparation, Path(folder, "files"))
        join_cluster(job.cluster)
        _touch(dataset.rows * _BYTES)
        cold = take_sample(_read, dataset, preparation, job)
        samples: dict[str, list[Sample]] = {}
        held: list[CellArrays] = []
        for turn in range(settings.repetitions):
            tell(f"input: repetition {turn + 1} of {settings.repetitions}")
            held.clear()
            taken = {}
            for name, call in (
                ("bare scan", lambda: _scan(dataset, preparation)),
                ("first read", lambda: held.append(_read(dataset, preparation, job))),
            ):
                _touch(dataset.rows * _BYTES)
                taken[name] = take_sample(call)
            taken["later pass"] = take_sample(_pass, held[-1], turn)
            for workers in _WORKERS:
                taken[f"one file, {workers} workers"] = take_sample(_load, files, workers)
            for name, sample in taken.items():
                samples.setdefault(name, []).append(sample)
        waiting = _train(job, preparation, dataset, held[-1])
    samples["first read in a fresh Ray"] = [cold]
    cells = dict.fromkeys(samples, dataset.rows) | {"later pass": 2 * len(held[-1].patches)}
    timings = {name: Timing(cells[name], tuple(taken)) for name, taken in samples.items()}
    introduction = (
        f"{dataset.rows:,} cells on 2 plates, {len(preparation.scaling.features):,} features, "
        f"{patches.images.dtype} patches of {patches.images.shape[1:]}; files in the page "
        f"cache, memory in use before; medians of {settings.repetitions} repetitions in turn."
    )
    tables = [_tell(timings), _tell_waiting(waiting)]
    figures = {
        "timings": {name: timing.to_json() for name, timing in timings.items()},
        "training": waiting,
    }
    return Findings(introduction, tables, figures)


def _experiment(config: Config, folder: str, cells: str) -> Config:
    data: dict[str, Any] = config.model_dump()
    data["run"] |= {"folder": folder}
    data["train"] |= {"input": cells, "output": join(folder, "checkpoint"), "workers": 1}
    data["train"] |= {"batch_size": _BATCH, "balance": "cell", "steps": _STEPS, "minutes": None}
    data["train"] |= {"log_every": _STEPS, "validate_every": 1000, "checkpoint_every": 1000}
    data["split"] |= {"by": "well", "validation": 0.02, "test": 0.0}
    data["split"] |= {"validation_plates": [], "test_plates": []}
    return Config.model_validate(data)


def _scan(dataset: CellDataset, preparation: Preparation) -> None:
    """Read and decode features and patches, as plainly as pyarrow lets one."""
    names = list(preparation.scaling.features)
    files = [join(dataset.uri, p.name) for m in dataset.manifests.values() for p in m.parts]
    for batch in pads.dataset(files).to_batches(columns=[*names, "patch"], batch_size=2048):
        table = pa.Table.from_batches([batch])
        decode_features(table, names)
        np.array(decode_patches(table, dataset.patch_format))


def _touch(size: int) -> None:
    """Use so much memory and give it back, so that nobody is the first to have it.

    A virtual machine's host takes back memory that was not used for a while; to have it again
    can take ten times as long as to fill it with cells, and would be timed with what comes first.
    """
    np.ones(size, dtype=np.uint8)


def _read(dataset: CellDataset, preparation: Preparation, config: Config) -> CellArrays:
    """Do what a training worker does before its first step."""
    tables = read_cells(dataset, preparation, config).iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=2
    )
    kind = dataset.patch_format
    cells, _ = load_cells(tables, preparation, kind, rank=0, world=1, validation_cells=1000)
    return cells


def _pass(cells: CellArrays, seed: int) -> None:
    """Make every batch of two streams: what the steps of one epoch are given."""
    device = torch.device("cpu")
    for stream in range(2):
        order = np.random.default_rng([seed, stream]).permutation(len(cells.patches))
        for start in range(0, len(order), _BATCH):
            cells.normalised(order[start : start + _BATCH], device)
            cells.scaled(order[start : start + _BATCH], device)


class _OneFilePerCell(Dataset[tuple[Tensor, Tensor]]):
    """Patches from one file each, normalised by their maxima; features from one array."""

    def __init__(self, folder: Path, features: NDArray[np.float32]) -> None:
        self._folder, self._features = folder, features

    @classmethod
    def write(
        cls, dataset: CellDataset, preparation: Preparation, folder: Path
    ) -> "_OneFilePerCell":
        """Write the cells of a dataset."""
        folder.mkdir()
        features, count = [], 0
        for table in dataset.read():
            features.append(decode_features(table, preparation.scaling.features))
            for patch in decode_patches(table, dataset.patch_format):
                np.save(folder / f"{count}.npy", patch)
                count += 1
        return cls(folder, np.ascontiguousarray(np.concatenate(features)))

    def __len__(self) -> int:
        return len(self._features)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        patch = np.load(self._folder / f"{row}.npy").astype(np.float32)
        patch /= np.maximum(patch.max(axis=(1, 2), keepdims=True), 1)
        return torch.from_numpy(patch), torch.from_numpy(self._features[row])


def _load(files: _OneFilePerCell, workers: int) -> None:
    for _ in DataLoader(files, batch_size=_BATCH, shuffle=True, num_workers=workers):
        pass


@dataclass
class _Notes:
    """Keeps what a training loop records."""

    run_id: str = ""
    values: dict[str, float] = field(default_factory=dict)

    def opened(self) -> "_Notes":
        return self

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.values |= values

    def picture(self, figure: Figure, name: str) -> None:
        """Pictures are not kept."""

    def folder(self, uri: str, name: str) -> None:
        """Files are not kept."""


def _train(
    config: Config, preparation: Preparation, dataset: CellDataset, cells: CellArrays
) -> dict[str, float]:
    """Run a few real steps; return cells/s and the share of time spent on waiting for cells."""
    tell(f"input: {_STEPS} training steps")
    notes = _Notes()
    plan = TrainingPlan(config, preparation, dataset.patch_format, notes, "benchmark")
    nobody = CellArrays(*(getattr(cells, name)[:0] for name in CellArrays.__dataclass_fields__))
    TrainingLoop(plan, cells, nobody).run(lambda _: None)
    return {
        "steps": _STEPS,
        "cells_per_s": notes.values["train/cells_per_s"],
        "waiting_share": notes.values["train/waiting_share"],
    }


def _tell(timings: dict[str, Timing]) -> Table:
    best = min((t.wall, name) for name, t in timings.items() if name.startswith("one file"))[0]
    scan = timings["bare scan"].wall
    rows = [
        [
            name,
            f"{timing.wall:.3f} ms",
            f"{1000 / timing.wall:,.0f}",
            f"{best / timing.wall:.1f} ×",
            f"{scan / timing.wall:.2f}",
        ]
        for name, timing in timings.items()
    ]
    columns = ["", "wall per cell", "cells/s", "beside one file per cell", "of the bare scan"]
    note = (
        "First read: Ray Data's tasks read, scale and hand over, the worker keeps every cell in "
        "memory; in a fresh Ray, once, processes are started and import what they need first. The "
        "first read's share of the bare scan is the median of "
        f"{_paired(timings):.2f} over repetitions. Later pass: batches in random order made from "
        "memory, two streams. One file per cell reads the patch each time; its features are in "
        "memory from the start."
    )
    return Table("From a dataset to the step", columns, rows, note)


def _paired(timings: dict[str, Timing]) -> float:
    scans, reads = (timings[name].samples for name in ("bare scan", "first read"))
    return median(scan.wall / read.wall for scan, read in zip(scans, reads, strict=True))


def _tell_waiting(found: dict[str, float]) -> Table:
    row = [
        f"{found['steps']:.0f}",
        f"{found['cells_per_s']:.0f}",
        f"{found['waiting_share']:.2%}",
    ]
    columns = ["steps", "cells trained a second", "share of time waiting for cells"]
    return Table(f"Steps of {_BATCH} cells", columns, [row])
