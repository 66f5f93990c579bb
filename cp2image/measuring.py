"""CellProfiler features for patches that have no table, through Ray Data. Step."""

from dataclasses import dataclass
from functools import partial

import numpy as np

from cp2image.cluster import join_cluster
from cp2image.columns import nearest
from cp2image.config import Config
from cp2image.data.orientations import ORIENTATIONS, turn
from cp2image.data.schema import PATCH, PatchFormat, build_table, decode_metadata, decode_patches
from cp2image.dataset import CellDataset, CellRange, open_dataset, read_range
from cp2image.errors import MeasurementError
from cp2image.metrics.measurement import feature_names, measure
from cp2image.publication import Outcome, Publication, publish
from cp2image.storage import join
from cp2image.tracking import Recorder, record_beside

NO_NUCLEUS = "no_nucleus"


@dataclass(frozen=True)
class TurnedMeasurement:
    """The accounts of the seven other orientations, a dataset each."""

    orientations: tuple[Publication, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.orientations))


def measure_cells(config: Config) -> Publication | TurnedMeasurement:
    """Do `measure_dataset`, or with ``measure.turned`` `measure_turned`."""
    return measure_turned(config) if config.measure.turned else measure_dataset(config)


def measure_dataset(config: Config) -> Publication:
    """Measure every patch of ``measure.input`` and publish the cells with their features.

    A patch without a nucleus at its centre cannot be measured: it is left out and counted as
    ``no_nucleus``. Features that the input has are replaced.

    Raises
    ------
    DatasetError
        If the input is no dataset, or plates failed.
    MeasurementError
        If a family, compartment or channel is unknown.
    """
    dataset = _open(config)
    with record_beside(config, "measure") as recorder:
        return _publish(config, dataset, config.measure.output, 0, recorder)


def measure_turned(config: Config) -> TurnedMeasurement:
    """Measure every patch of ``measure.input`` turned and mirrored, for training.

    Each of the other seven orientations becomes a dataset of its own, the folders ``1`` to ``7``
    of ``measure.output`` (see `cp2image.data.orientations.turn`), with the same cells.

    Raises
    ------
    DatasetError, MeasurementError
        As `measure_dataset`; orientations that were finished stay.
    """
    dataset = _open(config)
    done: list[Publication] = []
    with record_beside(config, "measure") as recorder:
        for orientation in range(1, ORIENTATIONS):
            place = join(config.measure.output, str(orientation))
            done.append(_publish(config, dataset, place, orientation, recorder))
            print(f"measure: orientation {orientation} of 7, {done[-1]}", flush=True)
    return TurnedMeasurement(tuple(done))


def _open(config: Config) -> CellDataset:
    """Open the input, refuse settings it does not fit, and join the cluster."""
    settings = config.measure
    dataset = open_dataset(settings.input)
    feature_names(dataset.patch_format.channels, settings.compartments, settings.families)
    chosen = settings.nucleus_channel
    if chosen is not None and chosen not in dataset.patch_format.channels:
        raise MeasurementError(
            f"measure.nucleus_channel: {settings.input} has no channel {chosen!r}"
            f"{nearest(chosen, dataset.patch_format.channels)}; it has "
            f"{', '.join(dataset.patch_format.channels)}"
        )
    join_cluster(config.cluster)
    return dataset


def _publish(
    config: Config, dataset: CellDataset, output: str, orientation: int, recorder: Recorder
) -> Publication:
    """Measure all patches in one orientation."""
    result = publish(
        output,
        dataset.ranges(config.cluster.cells_per_task, config.measure.plates or None),
        partial(_Measure, config, dataset.patch_format, dataset.metadata, orientation),
        config,
        config.fingerprint("measure"),
        label="measure",
        ready=recorder.opened,
        inputs={plate: manifest.identity for plate, manifest in dataset.manifests.items()},
    )
    recorder.metrics({f"cells/{name}": value for name, value in result.totals.items()})
    return result


class _Measure:
    """Measures one range of cells, in one orientation."""

    def __init__(
        self,
        config: Config,
        patch_format: PatchFormat,
        metadata: list[str],
        orientation: int = 0,
    ) -> None:
        self._settings, self._format = config.measure, patch_format
        self._columns, self._orientation = [*metadata, PATCH], orientation

    def __call__(self, unit: CellRange) -> Outcome:
        table = read_range(unit, self._columns)
        patches = turn(decode_patches(table, self._format), self._orientation)
        features = measure(
            patches,
            channels=self._format.channels,
            families=self._settings.families,
            compartments=tuple(self._settings.compartments),
            nucleus_channel=self._settings.nucleus_channel,
        )
        found = features.notna().any(axis=1).to_numpy()
        metadata = decode_metadata(table).loc[found].reset_index(drop=True)
        kept = features.loc[found].reset_index(drop=True)
        cells = build_table(metadata, kept, patches[found], self._format)
        missing = int(np.count_nonzero(~found))
        return Outcome(cells, {NO_NUCLEUS: missing} if missing else {})
