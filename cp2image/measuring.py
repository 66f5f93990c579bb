"""CellProfiler features for patches that have no table, through Ray Data. Step."""

from functools import partial

import numpy as np

from cp2image.cluster import join_cluster
from cp2image.columns import nearest
from cp2image.config import Config
from cp2image.data.schema import PATCH, PatchFormat, build_table, decode_metadata, decode_patches
from cp2image.dataset import CellRange, open_dataset, read_range
from cp2image.errors import MeasurementError
from cp2image.metrics.measurement import feature_names, measure
from cp2image.publication import Outcome, Publication, publish
from cp2image.tracking import record_beside

NO_NUCLEUS = "no_nucleus"


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
    mark = config.fingerprint("measure")
    inputs = {plate: manifest.identity for plate, manifest in dataset.manifests.items()}
    units = dataset.ranges(config.cluster.cells_per_task, settings.plates or None)
    with record_beside(config, "measure") as recorder:
        factory = partial(_Measure, config, dataset.patch_format, dataset.metadata)
        result = publish(
            settings.output,
            units,
            factory,
            config,
            mark,
            label="measure",
            ready=recorder.opened,
            inputs=inputs,
        )
        recorder.metrics({f"cells/{name}": value for name, value in result.totals.items()})
    return result


class _Measure:
    """Measures one range of cells."""

    def __init__(self, config: Config, patch_format: PatchFormat, metadata: list[str]) -> None:
        self._settings, self._format = config.measure, patch_format
        self._columns = [*metadata, PATCH]

    def __call__(self, unit: CellRange) -> Outcome:
        table = read_range(unit, self._columns)
        patches = decode_patches(table, self._format)
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
