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
                "split": pa.array(self._preparation.splits.of(metadata).tolist(), pa.string()),
                "treatment": pa.array(treatment_names(metadata).tolist(), pa.string()),
                "plate": pa.array(plates, pa.string()),
                "features": pa.FixedSizeListArray.from_arrays(scaled.ravel(), scaled.shape[1]),
                PATCH: table.column(PATCH),
            }
        )
        return found.filter(pa.compute.is_in(found["split"], pa.array(["train", "validation"])))


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
    train: list[pa.Table] = []
    validation: list[pa.Table] = []
    for table in tables:
        keys = table.column("key").to_numpy()
        trains = pa.compute.equal(table["split"], "train").to_numpy()
        train.append(table.filter(pa.array(trains & (keys % np.uint64(world) == rank))))
        validation.append(table.filter(pa.array(~trains & (rank == 0))))
        if sum(part.num_rows for part in validation) > 4 * validation_cells:
            validation = [_smallest_keys(validation, validation_cells)]
    if not sum(part.num_rows for part in train):
        raise TrainingError(
            f"worker {rank} of {world} has no training cells; use fewer workers "
            "(train.workers) or more data"
        )
    held_out = [_smallest_keys(validation, validation_cells)]
    return _arrays(train, preparation, patch_format), _arrays(held_out, preparation, patch_format)


def _smallest_keys(parts: list[pa.Table], limit: int) -> pa.Table:
    table = pa.concat_tables(parts)
    order = np.argsort(table.column("key").to_numpy(), kind="stable")
    return table.take(pa.array(order[:limit]))


def _arrays(
    parts: list[pa.Table], preparation: Preparation, patch_format: PatchFormat
) -> CellArrays:
    """Copy tables into arrays ordered by key; ``parts`` is emptied, to hold no cell twice."""
    keys = np.concatenate([part.column("key").to_numpy() for part in parts])
    place = np.empty(len(keys), dtype=np.int64)
    place[np.argsort(keys, kind="stable")] = np.arange(len(keys))
    patches = np.empty((len(keys), *patch_format.shape), dtype=patch_format.dtype)
    features = np.empty((len(keys), len(preparation.scaling.features)), dtype=np.float32)
    treatments = np.empty(len(keys), dtype=np.int64)
    plates = np.empty(len(keys), dtype=object)
    number = {name: i for i, name in enumerate(preparation.treatments)}
    start = 0
    while parts:
        part = parts.pop(0)
        rows = place[start : start + part.num_rows]
        start += part.num_rows
        patches[rows] = decode_patches(part, patch_format)
        scaled = part.column("features").combine_chunks().flatten()
        features[rows] = scaled.to_numpy().reshape(len(rows), features.shape[1])
        treatments[rows] = [number.get(name, -1) for name in part.column("treatment").to_pylist()]
        plates[rows] = part.column("plate").to_pylist()
    intensity, scale = preparation.intensity, patch_format.full_scale
    offset, factor = intensity.limits(patches, plates.tolist(), scale)
    return CellArrays(patches, features, offset, factor, treatments)
