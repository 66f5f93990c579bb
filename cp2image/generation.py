"""A screen of generated cells from features and a checkpoint, plate by plate. Step."""

import hashlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from cp2image.checkpoint import Model, load_model, load_scaling, save_scaling
from cp2image.cluster import join_cluster
from cp2image.columns import COMPOUND, MOA, PLATE, WELL, require_columns
from cp2image.config import Config
from cp2image.data.identity import cell_keys
from cp2image.data.scaling import KeyedSample, Scaling, is_control
from cp2image.data.schema import PATCH, build_table, decode_metadata, decode_patches
from cp2image.data.tables import open_table
from cp2image.dataset import (
    CellRange,
    open_dataset,
    plate_folder,
    read_manifests,
    read_range,
)
from cp2image.errors import ColumnError, DatasetError
from cp2image.figures.canvas import save
from cp2image.figures.patches import colour_patches
from cp2image.figures.plates import plate_overview
from cp2image.publication import Outcome, Publication, publish
from cp2image.staging import STAGING, stage_plate
from cp2image.storage import delete_tree, join
from cp2image.tracking import record


def generate(config: Config) -> Publication:
    """Draw one patch per cell of ``generate.input`` and publish them as a dataset.

    The input may be a dataset of this program or any CellProfiler table that has the model's
    columns. Each cell's identity seeds its noise, so neither the size of the cluster nor that of
    a batch nor a retry changes what is drawn.

    Raises
    ------
    ColumnError
        If the table lacks features of the checkpoint: names the difference.
    CheckpointError, DatasetError, TableError
        If an input is missing or damaged, or plates failed.
    """
    settings = config.generate
    model = load_model(settings.checkpoint)
    join_cluster(config.cluster)
    staging = join(settings.output, STAGING)
    with record(config, "generate") as recorder:
        try:
            if read_manifests(settings.input):
                units, scaling, inputs = _from_dataset(config, model)
            else:
                units, scaling, inputs = _from_table(config, model, staging)
            mark = config.fingerprint("generate", inputs=[model.hash, str(config.run.seed), *inputs])
            place = join(staging, "scaling.safetensors")
            save_scaling(place, scaling)
            factory = partial(_Generate, config, place)
            result = publish(
                settings.output, units, factory, config, mark,
                label="generate", gpus_per_task=1.0 if settings.gpu else 0.0,
            )
        finally:
            delete_tree(staging)
        recorder.metrics({f"cells/{name}": value for name, value in result.totals.items()})
        pictures = draw_plates(settings.output, model.channels, list(result.plates))
        recorder.folder(pictures, "plates")
    return result


def _from_dataset(config: Config, model: Model) -> tuple[list[CellRange], Scaling, list[str]]:
    settings = config.generate
    dataset = open_dataset(settings.input)
    require_columns(dataset.schema.names, model.features, settings.input)
    units = dataset.ranges(config.cluster.cells_per_task, settings.plates or None)
    scaling = model.scaling
    plates = sorted({unit.plate for unit in units} - set(scaling.plates))
    for plate in plates:
        sample = KeyedSample(len(model.features))
        for unit in (u for u in units if u.plate == plate):
            frame = read_range(unit, [*dataset.metadata, *model.features]).to_pandas()
            _add_controls(sample, frame, model.features, config)
        scaling = _with_controls(scaling, plate, sample)
    inputs = [f"{m.plate}:{m.fingerprint}:{m.rows}" for m in dataset.manifests.values()]
    return units, scaling, inputs


def _from_table(
    config: Config, model: Model, staging: str
) -> tuple[list[CellRange], Scaling, list[str]]:
    settings = config.generate
    table = open_table(settings.input, metadata=config.prepare.metadata)
    absent = sorted(set(settings.plates) - set(table.plates))
    if absent:
        raise DatasetError(
            f"{settings.input}: no plate {absent[0]!r}; it has {', '.join(table.plates[:8])}"
        )
    units: list[CellRange] = []
    scaling, inputs = model.scaling, []
    for plate in settings.plates or table.plates:
        frame = table.read(plate)
        try:
            require_columns(list(frame.columns), model.features, settings.input)
        except ColumnError as error:
            raise ColumnError(f"{error} (the checkpoint is {settings.checkpoint})") from error
        metadata = [name for name in frame.columns if name.startswith("Metadata_")]
        frame = frame[[*metadata, *model.features]]
        if plate not in scaling.plates:
            sample = KeyedSample(len(model.features))
            _add_controls(sample, frame, model.features, config)
            scaling = _with_controls(scaling, plate, sample)
        hashed = pd.util.hash_pandas_object(frame, index=False).to_numpy()
        inputs.append(f"{plate}:{hashlib.sha256(hashed.tobytes()).hexdigest()[:16]}")
        units += stage_plate(staging, plate, frame, config.cluster.cells_per_task)
    return units, scaling, inputs


def _add_controls(
    sample: KeyedSample, frame: pd.DataFrame, features: Sequence[str], config: Config
) -> None:
    controls = frame.loc[is_control(frame, config.scaling.control)]
    sample.add(cell_keys(controls), controls[list(features)].to_numpy(dtype=np.float32))


def _with_controls(scaling: Scaling, plate: str, sample: KeyedSample) -> Scaling:
    """Add a plate the checkpoint does not know, if it brings enough controls of its own."""
    if sample.seen < scaling.min_controls:
        return scaling
    return scaling.with_plate(plate, sample.values)


class _Generate:
    """Draws one range of cells; loads the model once per actor."""

    def __init__(self, config: Config, scaling: str) -> None:
        import torch

        settings = config.generate
        if not settings.gpu:
            torch.set_num_threads(max(1, int(config.cluster.cpus_per_task)))
        self._model = load_model(settings.checkpoint, "cuda" if settings.gpu else "cpu")
        self._model.scaling = load_scaling(scaling)
        self._split, self._seed = settings.split, config.run.seed

    def __call__(self, unit: CellRange) -> Outcome:
        names = list(self._model.features)
        table = read_range(unit)
        kept = [c for c in table.column_names if c.startswith("Metadata_")] + names
        frame = table.select(kept).to_pandas()
        dropped = {}
        if self._split != "all":
            wanted = self._model.splits.of(frame) == self._split
            if not wanted.all():
                dropped[f"not_{self._split}"] = int(np.count_nonzero(~wanted))
            frame = frame.loc[wanted].reset_index(drop=True)
        patches = self._model.generate(frame, self._seed)
        metadata = frame[[name for name in kept if name not in set(names)]]
        cells = build_table(metadata, frame[names], patches, self._model.patch_format)
        return Outcome(cells, dropped)


def draw_plates(uri: str, channels: Sequence[str], plates: Sequence[str]) -> str:
    """Draw each plate with one generated cell per well; return the folder of the pictures."""
    dataset = open_dataset(uri)
    folder = join(uri, "_plates")
    wanted = [name for name in (PLATE, WELL, COMPOUND, MOA) if name in dataset.metadata]
    for plate in plates:
        if not dataset.manifests[plate].parts or WELL not in wanted:
            continue
        wells: dict[str, tuple[np.ndarray, str, str]] = {}
        for table in dataset.read([*wanted, PATCH], [plate]):
            metadata = decode_metadata(table)
            first = metadata.drop_duplicates(WELL)
            new = first.loc[~first[WELL].isin(list(wells))]
            patches = decode_patches(table.take(new.index.to_numpy()), dataset.patch_format)
            for patch, (_, row) in zip(patches, new.iterrows(), strict=True):
                wells[str(row[WELL])] = (
                    patch, str(row.get(COMPOUND, "")), str(row.get(MOA, "")),
                )
        names = sorted(wells)
        images = colour_patches(np.stack([wells[name][0] for name in names]), channels)
        labels = [wells[name][1] for name in names] if COMPOUND in wanted else None
        groups = [wells[name][2] for name in names] if MOA in wanted else None
        figure = plate_overview(names, images, labels=labels, groups=groups, title=plate)
        save(figure, join(folder, f"{plate_folder(plate)}.png"))
    return folder


