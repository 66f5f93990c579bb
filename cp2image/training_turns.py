"""Training cells in all eight orientations. Floor: beside training.

The features of the other seven are read from datasets that `cp2image.measuring.measure_turned`
wrote; their patches are the training cells' own, turned when a batch is made.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from cp2image.columns import PLATE
from cp2image.data.identity import cell_keys, texts
from cp2image.data.orientations import ORIENTATIONS, turn
from cp2image.data.schema import decode_metadata, feature_columns
from cp2image.data.splits import TRAIN
from cp2image.dataset import CellDataset, CellRange, open_dataset, read_range
from cp2image.errors import DatasetError, TrainingError
from cp2image.profiles import Preparation
from cp2image.storage import join
from cp2image.training_cells import CellArrays


def open_turned(uri: str, upright: CellDataset) -> list[CellDataset]:
    """Open the other seven orientations of a measured dataset, in order.

    Raises
    ------
    DatasetError
        If they are not there, or are not the same cells measured in the same way.
    """
    found = [open_dataset(join(uri, str(k))) for k in range(1, ORIENTATIONS)]
    for dataset in found:
        for plate, known in upright.manifests.items():
            other = dataset.manifests.get(plate)
            if other is not None and (other.input, other.fingerprint) != (
                known.input,
                known.fingerprint,
            ):
                raise DatasetError(
                    f"{dataset.uri}: plate {plate!r} was not measured from the cells of "
                    f"{upright.uri} in the same way; measure both from the same cells with the "
                    "same settings (jobs/measure.py, then with measure.turned=true), to new folders"
                )
    return found


class TurnedRead:
    """Ray Data's map: ranges of turned cells → keys, orientation, scaled features.

    Parameters
    ----------
    datasets
        The orientations 1 to 7.
    preparation
        Of the cells as they are: scaling and split are theirs.
    cells
        Most cells of a range.

    Attributes
    ----------
    ranges
        Orientation and range; a batch names them by their numbers.
    """

    def __init__(
        self, datasets: Sequence[CellDataset], preparation: Preparation, cells: int
    ) -> None:
        held_out = {
            p for p, split in preparation.splits.plates.items() if split not in (None, TRAIN)
        }
        self.ranges = [
            (k, one)
            for k, dataset in enumerate(datasets, start=1)
            for one in dataset.ranges(cells)
            if one.plate not in held_out
        ]
        self._scaling, self._known = preparation.scaling, preparation.keys[TRAIN]
        self._columns = [*datasets[0].metadata, *preparation.scaling.features]

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> Iterator[pa.Table]:
        """Yield the training cells of the ranges numbered ``batch["id"]``, in order."""
        for number in batch["id"]:
            yield self._read(*self.ranges[int(number)])

    def _read(self, orientation: int, cells: CellRange) -> pa.Table:
        scaling = self._scaling
        table = read_range(cells, self._columns, threads=False)
        metadata = decode_metadata(table)
        plates = texts(metadata[PLATE]).tolist()
        scaled = scaling.apply_columns(feature_columns(table, scaling.features), plates)
        keys = cell_keys(metadata)
        wanted = np.isin(keys, self._known)
        scaled, keys = scaled[wanted], keys[wanted]
        return pa.table(
            {
                "key": pa.array(keys, type=pa.uint64()),
                "orientation": pa.array(np.full(len(keys), orientation, np.uint8)),
                "features": pa.FixedSizeListArray.from_arrays(scaled.ravel(), scaled.shape[1]),
            }
        )


@dataclass(frozen=True)
class TurnedCells:
    """Training cells in all orientations that were measured; a row is a cell in one of them.

    Attributes
    ----------
    cells
        As they are: their rows come first.
    sources
        Row → row in ``cells``, (R,).
    orientations
        Row → 0 to 7, (R,) uint8.
    features
        Scaled, (R, p) float32.
    treatments
        Number of each row's treatment, (R,).
    """

    cells: CellArrays
    sources: NDArray[np.int64]
    orientations: NDArray[np.uint8]
    features: NDArray[np.float32]
    treatments: NDArray[np.int64]

    def normalised(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the chosen patches as they lie, see `CellArrays.normalised`."""
        upright = self.cells.normalised(self.sources[rows], torch.device("cpu"))
        lines = upright.numpy()
        for line, orientation in zip(lines, self.orientations[rows], strict=True):
            if orientation:
                line[...] = turn(line, int(orientation))
        return upright.to(device)

    def scaled(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the chosen rows' features on the device."""
        return torch.from_numpy(self.features[rows]).to(device)

    def restored(
        self, drawn: NDArray[np.uint8], rows: NDArray[np.int64], full_scale: float
    ) -> NDArray[np.float32]:
        """Return drawn patches on the chosen cells' scale, see `CellArrays.restored`."""
        return self.cells.restored(drawn, self.sources[rows], full_scale)

    def plate_names(self, rows: NDArray[np.int64], known: Sequence[str]) -> list[str]:
        """Return the chosen cells' plates, see `CellArrays.plate_names`."""
        return self.cells.plate_names(self.sources[rows], known)


def add_turned(
    cells: CellArrays, tables: Iterable[pa.Table], keys: NDArray[np.uint64]
) -> TurnedCells:
    """Add the other orientations to a worker's training cells.

    Parameters
    ----------
    cells
        As they are.
    tables
        What `TurnedRead` made of all orientations; cells of other workers are passed over. The
        order of rows does not depend on theirs.
    keys
        Of ``cells``, sorted.

    Raises
    ------
    TrainingError
        If none of the cells is among them.
    """
    sources, orientations = [np.arange(len(keys))], [np.zeros(len(keys), np.uint8)]
    features = [cells.features]
    for table in tables:
        found = table.column("key").to_numpy()
        places = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
        mine = keys[places] == found
        sources.append(places[mine])
        orientations.append(table.column("orientation").to_numpy()[mine])
        lines = table.column("features").combine_chunks().flatten().to_numpy()
        features.append(lines.reshape(table.num_rows, cells.features.shape[1])[mine])
    source, orientation = np.concatenate(sources), np.concatenate(orientations)
    if len(source) == len(keys):
        raise TrainingError(
            f"train.turned: none of the {len(keys):,} training cells is there; measure their "
            "plates (jobs/measure.py with measure.turned=true)"
        )
    order = np.lexsort((source, orientation))
    source = source[order]
    return TurnedCells(
        cells,
        source,
        orientation[order],
        np.concatenate(features)[order],
        cells.treatments[source],
    )
