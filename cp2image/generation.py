"""A screen of generated cells from features and a checkpoint, plate by plate. Step."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from cp2image.checkpoint import Model, load_model, save_scaling
from cp2image.cluster import join_cluster
from cp2image.columns import COMPOUND, METADATA, MOA, WELL, require_columns
from cp2image.config import Config
from cp2image.data.identity import cell_keys
from cp2image.data.keyed_sample import KeyedSample
from cp2image.data.scaling import Scaling, is_control
from cp2image.data.schema import PATCH, ROW_GROUP, PatchFormat, decode_metadata, decode_patches
from cp2image.data.tables import open_table
from cp2image.dataset import (
    CellDataset,
    CellRange,
    open_dataset,
    plate_folder,
    read_manifests,
    read_range,
)
from cp2image.drawing import Draw
from cp2image.errors import ColumnError, ConfigError, DatasetError
from cp2image.figures.canvas import save
from cp2image.figures.patches import colour_patches
from cp2image.figures.plates import plate_overview
from cp2image.publication import Publication, publish
from cp2image.staging import STAGING, stage_plate
from cp2image.storage import delete_tree, join
from cp2image.tracking import record_beside, tracking_uri

_THREADS = 4
"""Units that an actor draws side by side: they share the weights, in memory and in its caches."""


def generate(config: Config) -> Publication:
    """Draw one patch per cell of ``generate.input`` and publish them as a dataset.

    The input may be a dataset of this program or any CellProfiler table that has the model's
    columns. Each cell's identity seeds its noise, so neither the size of the cluster nor that of
    a batch nor a retry changes what is drawn.

    Raises
    ------
    ColumnError
        If the table lacks features of the checkpoint: names the difference.
    ConfigError
        If ``generate.by`` asks for what the model or the input does not allow.
    CheckpointError, DatasetError, TableError
        If an input is missing or damaged, or plates failed.
    """
    settings = config.generate
    model = load_model(settings.checkpoint, store=tracking_uri(config))
    mark = _fingerprint(config, model)
    shown = _shown(config, model)
    join_cluster(config.cluster)
    staging = join(settings.output, STAGING)
    try:
        find = _from_dataset if read_manifests(settings.input) else _from_table
        wanted = find(config, model, staging)
        place = join(staging, "scaling.safetensors")
        save_scaling(place, wanted.scaling)
        with record_beside(config, "generate") as recorder:
            result = publish(
                settings.output,
                wanted.units,
                partial(Draw, config, place, shown),
                config,
                mark,
                label="generate",
                ready=recorder.opened,
                inputs=wanted.inputs,
                gpus_per_task=1.0 if settings.gpu else 0.0,
                threads=1 if settings.gpu else _THREADS,
            )
            recorder.metrics({f"cells/{name}": value for name, value in result.totals.items()})
            pictures = draw_plates(settings.output, model.channels, list(result.plates))
            recorder.folder(pictures, "plates")
    finally:
        delete_tree(staging)
    return result


def _fingerprint(config: Config, model: Model) -> str:
    """Hash what decides the pixels of a plate."""
    control = json.dumps(config.scaling.control, sort_keys=True)
    return config.fingerprint("generate", inputs=[model.hash, f"seed {config.run.seed}", control])


def shows_images(by: str | None, model: Model) -> bool:
    """Tell whether a model is shown the cells it draws; ``by`` is ``generate.by``.

    Raises
    ------
    ConfigError
        If a way is asked for and the model has only its own.
    """
    if by is not None and not model.reconstructs:
        raise ConfigError(
            f"generate.by={by}: the checkpoint's preset {model.card.preset!r} has one way to draw; "
            "leave the setting out (vae and vaeplus have two)"
        )
    return model.reconstructs and by != "prior"


def _shown(config: Config, model: Model) -> PatchFormat | None:
    """Return the format of the patches that the model is shown, if it is."""
    settings = config.generate
    if not shows_images(settings.by, model):
        return None
    if not read_manifests(settings.input):
        raise ConfigError(
            f"{settings.input} is a table without patches, and {model.card.preset!r} reconstructs "
            "patches; give a cells/ dataset, or draw from noise (generate.by=prior)"
        )
    form, own = open_dataset(settings.input).patch_format, model.patch_format
    if form.channels != own.channels or form.size != own.size or form.normalisation != "none":
        raise DatasetError(
            f"{settings.input}: patches of {', '.join(form.channels)}, {form.size} px, "
            f"normalisation {form.normalisation!r}; the checkpoint reconstructs "
            f"{', '.join(own.channels)}, {own.size} px, on the acquisition scale ('none')"
        )
    return form


@dataclass(frozen=True)
class _Wanted:
    """The cells to draw, how their plates are scaled, and what identifies each plate's rows."""

    units: list[CellRange]
    scaling: Scaling
    inputs: dict[str, str]


def _from_dataset(config: Config, model: Model, _: str) -> _Wanted:
    """Cut the plates of a dataset into units; nothing needs staging."""
    settings = config.generate
    dataset = open_dataset(settings.input)
    require_features(dataset.schema.names, model, config)
    units = dataset.ranges(config.cluster.cells_per_task, settings.plates or None)
    scaling = model.scaling
    unknown = {unit.plate for unit in units} - set(scaling.plates) if scaling.per_plate else set()
    for plate in sorted(unknown):
        sample = KeyedSample(len(model.features))
        for table in dataset.read([*dataset.metadata, *model.features], [plate]):
            _add_controls(sample, table.to_pandas(), model.features, config)
        scaling = _with_controls(scaling, plate, sample)
    inputs = {plate: manifest.identity for plate, manifest in dataset.manifests.items()}
    return _Wanted(units, scaling, inputs)


def _from_table(config: Config, model: Model, staging: str) -> _Wanted:
    """Parse a CellProfiler table plate by plate and lay the rows down for the workers."""
    settings = config.generate
    table = open_table(settings.input, metadata=config.prepare.metadata)
    wanted = _Wanted([], model.scaling, {})
    scaling = model.scaling
    for plate in sorted(set(settings.plates)) or table.plates:
        frame = table.read(plate)
        require_features(list(frame.columns), model, config)
        metadata = [name for name in frame.columns if name.startswith(METADATA)]
        frame = frame[[*metadata, *model.features]]
        if scaling.per_plate and plate not in scaling.plates:
            sample = KeyedSample(len(model.features))
            _add_controls(sample, frame, model.features, config)
            scaling = _with_controls(scaling, plate, sample)
        hashed = pd.util.hash_pandas_object(frame, index=False).to_numpy()
        wanted.inputs[plate] = hashlib.sha256(hashed.tobytes()).hexdigest()[:16]
        wanted.units.extend(stage_plate(staging, plate, frame, config.cluster.cells_per_task))
    return replace(wanted, scaling=scaling)


def require_features(names: Sequence[str], model: Model, config: Config) -> None:
    """Refuse a table without the columns that a model needs.

    Raises
    ------
    ColumnError
        Naming the difference.
    """
    settings = config.generate
    try:
        require_columns(names, model.features, settings.input)
    except ColumnError as error:
        raise ColumnError(
            f"{error}. The checkpoint {settings.checkpoint} needs {len(model.features)} features; "
            "take a table of the same pipeline, or train on one that this table has"
        ) from error


def _add_controls(
    sample: KeyedSample, frame: pd.DataFrame, features: Sequence[str], config: Config
) -> None:
    controls = frame.loc[is_control(frame, config.scaling.control)]
    sample.add(cell_keys(controls), controls[list(features)].to_numpy(dtype=np.float32))


def _with_controls(scaling: Scaling, plate: str, sample: KeyedSample) -> Scaling:
    """Add a plate that the checkpoint does not know, if its controls shall and can scale it."""
    return scaling.with_plate(plate, sample.values) if scaling.takes(sample.seen) else scaling


def draw_plates(uri: str, channels: Sequence[str], plates: Sequence[str]) -> str:
    """Draw each plate with one generated cell per well; return the folder of the pictures."""
    dataset = open_dataset(uri)
    folder = join(uri, "_plates")
    for plate in plates:
        if not dataset.manifests[plate].parts or WELL not in dataset.metadata:
            continue
        wells, patches = _first_of_wells(dataset, plate)
        images = colour_patches(patches, channels)
        labels, groups = (
            wells[name].fillna("").astype(str).tolist() if name in wells else None
            for name in (COMPOUND, MOA)
        )
        names = wells[WELL].tolist()
        figure = plate_overview(names, images, labels=labels, groups=groups, title=plate)
        save(figure, join(folder, f"{plate_folder(plate)}.png"))
    return folder


def _first_of_wells(dataset: CellDataset, plate: str) -> tuple[pd.DataFrame, NDArray[Any]]:
    """Return metadata and patch of the first cell of each well, reading no more than needed."""
    wanted = [name for name in (WELL, COMPOUND, MOA) if name in dataset.metadata]
    rows: list[pd.DataFrame] = []
    patches: list[NDArray[Any]] = []
    seen: set[str] = set()
    for cells in dataset.ranges(ROW_GROUP, [plate]):
        metadata = decode_metadata(read_range(cells, wanted))
        first = metadata[~metadata[WELL].isin(seen)].drop_duplicates(WELL)
        if len(first):
            found = read_range(cells, [PATCH]).take(pa.array(first.index.to_numpy()))
            patches.append(decode_patches(found, dataset.patch_format))
            rows.append(first)
            seen.update(first[WELL])
    wells = pd.concat(rows, ignore_index=True)
    order = wells[WELL].argsort(kind="stable").to_numpy()
    return wells.iloc[order], np.concatenate(patches)[order]
