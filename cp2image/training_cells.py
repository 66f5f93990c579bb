"""The cells a training worker holds in memory. Floor: beside training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    decode_features,
    decode_metadata,
    decode_patches,
)
from cp2image.data.splits import TRAIN, VALIDATION
from cp2image.dataset import CellRange, read_range
from cp2image.errors import TrainingError
from cp2image.kernel import compile_kernel
from cp2image.profiles import Preparation


class TrainingRead:
    """Ray Data's map: ranges of cells → keys, split, treatment, scaled features, patch."""

    def __init__(self, ranges: Sequence[CellRange], preparation: Preparation) -> None:
        self._ranges, self._preparation = ranges, preparation

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> pa.Table:
        """Read the ranges numbered ``batch["id"]``; cells to test on are left out."""
        tables = [self._read(self._ranges[int(i)]) for i in batch["id"]]
        return pa.concat_tables(tables)

    def _read(self, cells: CellRange) -> pa.Table:
        table = read_range(cells)
        metadata = decode_metadata(table)
        scaling = self._preparation.scaling
        plates = texts(metadata[PLATE]).tolist()
        scaled = scaling.apply(decode_features(table, scaling.features), plates)
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
    """

    patches: NDArray[Any]
    features: NDArray[np.float32]
    offset: NDArray[np.float32]
    factor: NDArray[np.float32]
    treatments: NDArray[np.int64]

    def normalised(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the chosen patches in [0, 1], (N, C, H, W) float32 channels last, on the device.

        On the way to a GPU they pass through pinned memory, so that copying does not wait.
        """
        channels, height, width = self.patches.shape[1:]
        pinned = device.type == "cuda"
        out = torch.empty((len(rows), height, width, channels), pin_memory=pinned)
        _normalise(self.patches, rows, self.offset, self.factor, out.numpy())
        return out.permute(0, 3, 1, 2).to(device, non_blocking=pinned)

    def scaled(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the chosen cells' features on the device."""
        return torch.from_numpy(self.features[rows]).to(device)


@compile_kernel
def _normalise(
    patches: NDArray[Any],
    rows: NDArray[np.int64],
    offset: NDArray[np.float32],
    factor: NDArray[np.float32],
    out: NDArray[np.float32],
) -> None:
    """Fill ``out`` (rows, H, W, C) with the chosen patches, normalised: one pass over memory."""
    for i in range(len(rows)):
        row = rows[i]
        for c in range(patches.shape[1]):
            start, slope = offset[row, c], factor[row, c]
            for y in range(patches.shape[2]):
                for x in range(patches.shape[3]):
                    value = (np.float32(patches[row, c, y, x]) - start) * slope
                    out[i, y, x, c] = min(max(value, np.float32(0)), np.float32(1))


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
    known = preparation.keys[TRAIN]
    mine = known[known % np.uint64(world) == rank]
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


class _Gathering:
    """Puts cells where their keys say, as they come."""

    def __init__(
        self, keys: NDArray[np.uint64], preparation: Preparation, patch_format: PatchFormat
    ) -> None:
        self._keys, self._format, self._intensity = keys, patch_format, preparation.intensity
        self._numbers = {name: i for i, name in enumerate(preparation.treatments)}
        limits = (len(keys), len(patch_format.channels))
        self._cells = CellArrays(
            np.empty((len(keys), *patch_format.shape), dtype=patch_format.dtype),
            np.empty((len(keys), len(preparation.scaling.features)), dtype=np.float32),
            np.empty(limits, dtype=np.float32),
            np.empty(limits, dtype=np.float32),
            np.full(len(keys), -1, dtype=np.int64),
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
        if len(rows) < table.num_rows:
            table, places = table.take(pa.array(rows)), places[rows]
        patches = decode_patches(table, self._format)
        scaled = table.column("features").combine_chunks().flatten().to_numpy()
        plates = table.column("plate").to_pylist()
        cells = self._cells
        cells.patches[places] = patches
        cells.features[places] = scaled.reshape(len(places), -1)
        limits = self._intensity.limits(patches, plates, self._format.full_scale)
        cells.offset[places], cells.factor[places] = limits
        names = table.column("treatment").to_pylist()
        cells.treatments[places] = [self._numbers.get(name, -1) for name in names]
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
