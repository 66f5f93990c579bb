"""What a dataset's features need before a model: splits, selection, scaling. Floor: beside dataset.

Everything streams plate by plate; what is kept does not grow with the number of cells.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import IDENTITY, measurements
from cp2image.config import Config
from cp2image.data.identity import cell_keys, treatment_names
from cp2image.data.intensity import Intensity, IntensityFit
from cp2image.data.keyed_sample import KeyedSample
from cp2image.data.scaling import Scaling, ScalingFit, is_control
from cp2image.data.schema import PATCH, decode_features, decode_metadata, decode_patches
from cp2image.data.selection import (
    FeatureStatistics,
    Selection,
    drop_near_duplicates,
    select_features,
)
from cp2image.data.splits import SPLITS, TRAIN, Splits, fit_splits
from cp2image.dataset import CellDataset
from cp2image.errors import DatasetError

_OTHERS = 1_000
"""Cells per plate, other than controls, that the global scaling may fall back on."""
_CORRELATED = 4_096
"""Training cells over which near-duplicate features are looked for."""


@dataclass(frozen=True)
class Preparation:
    """What training learns about a table before it starts.

    Attributes
    ----------
    splits, selection, scaling, intensity
        See their modules; the scaling's features are the selected ones.
    treatments
        Names of the treatments in the training split, sorted.
    counts
        Cells per split.
    keys
        Split → its cells' keys, sorted: which cells train and validate, 8 bytes each.
    """

    splits: Splits
    selection: Selection
    scaling: Scaling
    intensity: Intensity
    treatments: tuple[str, ...]
    counts: dict[str, int]
    keys: dict[str, NDArray[np.uint64]]


def measured_features(dataset: CellDataset) -> list[str]:
    """Return the names of the dataset's CellProfiler features, in table order.

    Raises
    ------
    DatasetError
        If it has none: only patches.
    """
    names = [column.name for column in measurements(dataset.features)]
    if not names:
        raise DatasetError(
            f"{dataset.uri}: has patches but no CellProfiler features; run jobs/measure.py on it "
            "and train on what that writes"
        )
    return names


def prepare_profiles(dataset: CellDataset, config: Config) -> Preparation:
    """Split the cells, select features and fit their scaling on the training split.

    Raises
    ------
    DatasetError
        If the dataset has no measurements or no cell is left to train on.
    """
    names = measured_features(dataset)
    splits, treatments, known = split_cells(dataset, config)
    statistics = FeatureStatistics(len(names))
    limit = config.max_correlation
    numbered = KeyedSample(len(names) + 1, _CORRELATED)
    fit = ScalingFit(names, config.scaling, per_plate=config.scaled_by == "plate")
    held_out: dict[str, KeyedSample] = {}
    plates = sorted(dataset.manifests)
    for plate in plates:
        controls = KeyedSample(len(names))
        others = KeyedSample(len(names), _OTHERS)
        all_controls = KeyedSample(len(names))
        for table in dataset.read([*dataset.metadata, *names], [plate]):
            metadata, values = decode_metadata(table), decode_features(table, names)
            keys, control = cell_keys(metadata), is_control(metadata, config.scaling.control)
            train = splits.of(metadata) == "train"
            all_controls.add(keys[control], values[control])
            controls.add(keys[train & control], values[train & control])
            others.add(keys[train & ~control], values[train & ~control])
            statistics.add(values[train])
            if limit < 1:
                number = np.full((np.count_nonzero(train), 1), plates.index(plate), np.float32)
                numbered.add(keys[train], np.hstack([values[train], number]))
        if others.seen or controls.seen:
            fit.add_plate(plate, controls.values, controls.keys, others.values, others.keys)
        else:
            held_out[plate] = all_controls
    selection = select_features(names, statistics, config.scaling)
    scaling = fit.finish()
    for plate, sample in held_out.items():
        if scaling.takes(sample.seen):
            scaling = scaling.with_plate(plate, sample.values)
    if limit < 1:
        known_plates = [plates[int(number)] for number in numbered.values[:, -1]]
        scaled = scaling.apply(numbered.values[:, :-1], known_plates)
        chosen = scaled[:, [names.index(name) for name in selection.kept]]
        selection = drop_near_duplicates(selection, chosen, limit)
    kept = [names.index(name) for name in selection.kept]
    gone = tuple(f"{name}:" for name in selection.dropped)
    scaling = replace(
        scaling,
        features=selection.kept,
        center=scaling.center[:, kept],
        scale=scaling.scale[:, kept],
        notes=tuple(note for note in scaling.notes if not note.startswith(gone)),
    )
    intensity = _fit_intensity(dataset, splits, config.train.intensity)
    counts = {part: len(keys) for part, keys in known.items() if len(keys)}
    return Preparation(splits, selection, scaling, intensity, treatments, counts, known)


def split_cells(
    dataset: CellDataset, config: Config
) -> tuple[Splits, tuple[str, ...], dict[str, NDArray[np.uint64]]]:
    """Return the splits, the treatments of the training split, and each split's keys, sorted.

    Raises
    ------
    DatasetError
        If two cells have one identity.
    """
    frames = [decode_metadata(table) for table in dataset.read(dataset.metadata)]
    metadata = pd.concat(frames, ignore_index=True)
    own = config.split.seed
    splits = fit_splits(metadata, config.split, config.run.seed if own is None else own)
    parts = splits.of(metadata)
    treatments = np.unique(treatment_names(metadata[parts == TRAIN]).astype(str))
    keys = cell_keys(metadata)
    doubled = pd.Series(keys).duplicated()
    if doubled.any():
        first = metadata.loc[doubled.to_numpy()].iloc[0]
        identity = {name: first[name] for name in IDENTITY if name in first}
        raise DatasetError(
            f"{dataset.uri}: {doubled.sum():,} cells have the identity of another, such as "
            f"{identity}; publish it again from a table in which every cell is once"
        )
    return splits, tuple(treatments), {n: np.sort(keys[parts == n]) for n in SPLITS}


def _fit_intensity(dataset: CellDataset, splits: Splits, kind: str) -> Intensity:
    if kind == "per_patch_max":
        return Intensity(kind)
    shape = dataset.patch_format
    fit = IntensityFit(len(shape.channels))
    for plate in sorted(dataset.manifests):
        trains = kind == "screen_percentile"  # plates held out have no say in the screen's limits
        for chosen in ("train", None):  # a plate held out whole is normalised by its own pixels
            if chosen is None and trains:
                break
            for table in dataset.read([*dataset.metadata, PATCH], [plate]):
                patches = decode_patches(table, shape)
                if chosen is not None:
                    patches = patches[splits.of(decode_metadata(table)) == chosen]
                if len(patches):
                    fit.add(plate, patches, shape.full_scale)
                    trains = True
    return fit.finish(kind)
