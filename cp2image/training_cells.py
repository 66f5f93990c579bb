"""The cells a training worker holds in memory. Floor: beside training."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
from numpy.typing import NDArray
from torch import Tensor

from cp2image.columns import PLATE
from cp2image.data.identity import cell_keys, texts, treatment_names
from cp2image.data.schema import (
    PATCH,
    PatchFormat,
    decode_metadata,
    decode_patches,
    feature_columns,
)
from cp2image.data.splits import TRAIN, VALIDATION
from cp2image.dataset import CellDataset, CellRange, read_range
from cp2image.errors import TrainingError
from cp2image.kernel import compile_kernel
from cp2image.profiles import Preparation


class TrainingRead:
    """Ray Data's map: ranges of cells → keys, treatment, plate, scaled features, patch.

    Parameters
    ----------
    dataset
        What is read.
    preparation
        Says how, and which cells are not wanted.
    cells
        Most cells of a range.
    threads
        Ranges that a task reads side by side, and so the most it holds but one.

    Attributes
    ----------
    ranges
        All of them, in order; a batch names them by their numbers.
    """

    def __init__(
        self, dataset: CellDataset, preparation: Preparation, cells: int, threads: int = 1
    ) -> None:
        self.ranges, self._preparation = dataset.ranges(cells), preparation
        self._threads = threads
        self._columns = [*dataset.metadata, *preparation.scaling.features, PATCH]

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> Iterator[pa.Table]:
        """Yield the ranges numbered ``batch["id"]`` in order, without cells to test on."""
        under_way: deque[Future[pa.Table]] = deque()
        with ThreadPoolExecutor(self._threads) as pool:
            for number in batch["id"]:
                under_way.append(pool.submit(self._read, self.ranges[int(number)]))
                if len(under_way) > self._threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()

    def _read(self, cells: CellRange) -> pa.Table:
        scaling = self._preparation.scaling
        table = read_range(cells, self._columns, threads=False)
        metadata = decode_metadata(table)
        plates = texts(metadata[PLATE]).tolist()
        scaled = scaling.apply_columns(feature_columns(table, scaling.features), plates)
        found = pa.table(
            {
                "key": pa.array(cell_keys(metadata), type=pa.uint64()),
                "treatment": pa.array(treatment_names(metadata).tolist(), pa.string()),
                "plate": pa.array(plates, pa.string()),
                "features": pa.FixedSizeListArray.from_arrays(scaled.ravel(), scaled.shape[1]),
                PATCH: table.column(PATCH),
            }
        )
        wanted = np.isin(self._preparation.splits.of(metadata).astype(str), (TRAIN, VALIDATION))
        return found if wanted.all() else found.filter(pa.array(wanted))


@dataclass(frozen=True)
class CellArrays:
    """Cells in memory, in the order of their keys.

    Attributes
    ----------
    patches
        Acquisition scale, (N, C, H, W), uint8 or uint16.
    features
        Scaled, (N, p) float32.
    offset, factor
        Normalisation of each patch and channel, (N, C) float32.
    treatments
        Number of each cell's treatment, (N,).
    plates
        Number of each cell's plate among the scaling's, (N,); after the last: none of them.
    """

    patches: NDArray[Any]
    features: NDArray[np.float32]
    offset: NDArray[np.float32]
    factor: NDArray[np.float32]
    treatments: NDArray[np.int64]
    plates: NDArray[np.int32]

    def normalised(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the chosen patches in [0, 1], (N, C, H, W) float32 channels last, on the device.

        On the way to a GPU they pass through pinned memory, so that copying does not wait.
        """
        channels, height, width = self.patches.shape[1:]
        pinned = device.type == "cuda"
        out = torch.empty((len(rows), height, width, channels), pin_memory=pinned)
        planes = self.patches.reshape(len(self.patches), channels, height * width)
        lines = out.numpy().reshape(len(rows), height * width * channels)
        _normalise(channels)(planes, rows, self.offset, self.factor, lines)
        return out.permute(0, 3, 1, 2).to(device, non_blocking=pinned)

    def scaled(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the chosen cells' features on the device."""
        return torch.from_numpy(self.features[rows]).to(device)

    def restored(
        self, drawn: NDArray[np.uint8], rows: NDArray[np.int64], full_scale: float
    ) -> NDArray[np.float32]:
        """Return drawn patches, normalised as the chosen cells' own, as shares of the full scale.

        Parameters
        ----------
        drawn
            (N, C, H, W).
        rows
            Of N cells.
        full_scale
            Value of the acquisition that stands for 1.
        """
        factor = self.factor[rows]
        span = np.divide(1.0, factor, out=np.zeros_like(factor), where=factor > 0)
        low, span = (v[..., None, None] / np.float32(full_scale) for v in (self.offset[rows], span))
        shares: NDArray[np.float32] = np.clip(low + drawn * (span / np.float32(255)), 0, 1)
        return shares

    def plate_names(self, rows: NDArray[np.int64], known: Sequence[str]) -> list[str]:
        """Return the chosen cells' plates; empty where the scaling does not know them."""
        names = [*known, ""]
        return [names[number] for number in self.plates[rows]]


@lru_cache
def _normalise(channels: int) -> Callable[..., None]:
    """Return the loop that normalises patches of so many channels.

    With the number of channels known when it is compiled, a pixel's channels are handled
    together; with a loop over any number it takes three to seven times as long.
    """
    zero, one = np.float32(0), np.float32(1)

    @compile_kernel
    def kernel(
        patches: NDArray[Any],
        rows: NDArray[np.int64],
        offset: NDArray[np.float32],
        factor: NDArray[np.float32],
        out: NDArray[np.float32],
    ) -> None:
        """Fill ``out`` (rows, pixels · C) with the chosen ones of ``patches`` (N, C, pixels)."""
        for i in range(len(rows)):
            row = rows[i]
            patch, start, slope, line = patches[row], offset[row], factor[row], out[i]
            for pixel in range(patches.shape[2]):
                for c in range(channels):
                    value = (np.float32(patch[c, pixel]) - start[c]) * slope[c]
                    value = value if value > zero else zero
                    line[channels * pixel + c] = value if value < one else one

    return kernel


@compile_kernel
def _place(
    found: NDArray[np.uint8],
    rows: NDArray[np.int64],
    kept: NDArray[np.uint8],
    places: NDArray[np.int64],
) -> None:
    """Copy lines of ``found`` to their places, without holding up other threads."""
    for i in range(len(rows)):
        row, place = rows[i], places[i]
        for k in range(found.shape[1]):
            kept[place, k] = found[row, k]


def load_cells(
    tables: Iterable[pa.Table],
    preparation: Preparation,
    patch_format: PatchFormat,
    *,
    rank: int,
    world: int,
    validation_cells: int,
) -> tuple[CellArrays, CellArrays]:
    """Gather a worker's share of the training cells, and the validation sample.

    A training cell belongs to the worker that its key names, whatever order the blocks come in;
    the validation sample, on rank 0 alone, is the ``validation_cells`` cells with the smallest
    keys.

    Parameters
    ----------
    tables
        What `TrainingRead` made of the whole dataset.
    preparation, patch_format
        Of the dataset.
    rank, world
        Number of this worker and of all workers.
    validation_cells
        Most cells to validate on.

    Raises
    ------
    TrainingError
        If this worker gets no cells.
    """
    mine = worker_keys(preparation, rank, world)
    if not len(mine):
        raise TrainingError(
            f"worker {rank} of {world} has no training cells; use fewer workers "
            "(train.workers) or more data"
        )
    held_out = preparation.keys[VALIDATION][: validation_cells if rank == 0 else 0]
    parts = [_Gathering(keys, preparation, patch_format) for keys in (mine, held_out)]
    for table in tables:
        for part in parts:
            part.add(table)
    train, validation = (part.finish() for part in parts)
    return train, validation


def worker_keys(preparation: Preparation, rank: int, world: int) -> NDArray[np.uint64]:
    """Return the sorted keys of the training cells that belong to a worker, uint64."""
    known = preparation.keys[TRAIN]
    mine: NDArray[np.uint64] = known[known % np.uint64(world) == rank]
    return mine


class _Gathering:
    """Puts cells where their keys say, as they come."""

    def __init__(
        self, keys: NDArray[np.uint64], preparation: Preparation, patch_format: PatchFormat
    ) -> None:
        self._keys, self._format, self._intensity = keys, patch_format, preparation.intensity
        self._numbers = {name: i for i, name in enumerate(preparation.treatments)}
        self._plates = {name: i for i, name in enumerate(preparation.scaling.plates)}
        limits = (len(keys), len(patch_format.channels))
        self._cells = CellArrays(
            np.empty((len(keys), *patch_format.shape), dtype=patch_format.dtype),
            np.empty((len(keys), len(preparation.scaling.features)), dtype=np.float32),
            np.empty(limits, dtype=np.float32),
            np.empty(limits, dtype=np.float32),
            np.full(len(keys), -1, dtype=np.int64),
            np.empty(len(keys), dtype=np.int32),
        )
        self._filled = np.zeros(len(keys), dtype=bool)

    def add(self, table: pa.Table) -> None:
        """Take those of a table's cells that are asked for."""
        if not len(self._keys):
            return
        keys = table.column("key").to_numpy()
        places = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        rows = np.flatnonzero(self._keys[places] == keys)
        if not len(rows):
            return
        places = places[rows]
        patches = decode_patches(table, self._format)
        scaled = table.column("features").combine_chunks().flatten().to_numpy()
        cells = self._cells
        for found, kept in ((patches, cells.patches), (scaled, cells.features)):
            lines = found.reshape(table.num_rows, -1).view(np.uint8)
            _place(lines, rows, kept.reshape(len(kept), -1).view(np.uint8), places)
        plates = table.column("plate").to_pylist()
        offset, factor = self._intensity.limits(patches, plates, self._format.full_scale)
        cells.offset[places], cells.factor[places] = offset[rows], factor[rows]
        names = table.column("treatment").to_pylist()
        numbers = np.array([self._numbers.get(name, -1) for name in names])
        cells.treatments[places] = numbers[rows]
        known = np.array([self._plates.get(plate, len(self._plates)) for plate in plates])
        cells.plates[places] = known[rows]
        self._filled[places] = True

    def finish(self) -> CellArrays:
        """Return the arrays, full.

        Raises
        ------
        TrainingError
            If cells did not come.
        """
        if not self._filled.all():
            raise TrainingError(
                f"{np.count_nonzero(~self._filled):,} of {len(self._keys):,} cells were not read: "
                "the dataset was changed while training began; start again"
            )
        return self._cells
