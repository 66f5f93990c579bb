"""Gathering both sets of a comparison from the cluster: patches, features, embeddings. Step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from cp2image.checkpoint import Model
from cp2image.columns import PLATE
from cp2image.config import Config
from cp2image.data.identity import cell_keys
from cp2image.data.schema import (
    PATCH,
    ROW_GROUP,
    decode_metadata,
    decode_patches,
)
from cp2image.dataset import CellDataset, read_range
from cp2image.errors import DatasetError
from cp2image.evaluation_workers import (
    Redraw,
    Source,
    Unit,
    Work,
    Workers,
    build_embeddings,
    matrix_of,
    note_of,
)
from cp2image.metrics.embedding import quantise
from cp2image.models.presets import sees
from cp2image.stopwatch import Stopwatch

_CONTROL_CELLS = 2_000
_DRAWN_AGAIN = 200
"""Cells that are drawn several times, to see how far draws differ."""
_CELLS_PER_TASK = 256
"""Fewest cells of a unit, where there are that many."""


@dataclass
class MeasuredCells:
    """One set of cells, row i the i-th of the comparison.

    Attributes
    ----------
    table
        Features that stand in the dataset: measured before, or requested of the model.
    measured
        Features measured on the patches as they are compared.
    patches
        Of the cells to show, 8 bit, (shown, C, H, W).
    embedded
        Embedding → vectors, (N, D).
    noise
        Patches at acquisition scale that are camera noise, (N,).
    """

    table: pd.DataFrame
    measured: pd.DataFrame
    patches: NDArray[np.uint8]
    embedded: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    noise: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))

    @property
    def without_nucleus(self) -> int:
        """Patches in which no nucleus was found: all their features are undefined."""
        return int(self.measured.isna().all(axis=1).sum())


@dataclass
class EvaluationSet:
    """Paired cells: row i of everything is the same cell.

    Attributes
    ----------
    cells
        Metadata and key.
    shown
        Rows of ``cells`` to show.
    real, generated
        The two sets.
    protocols
        Embedding → what it says of itself.
    shuffled
        Features measured on cells drawn from permuted feature rows; None without the control.
    shuffled_rows
        Rows of ``cells`` that the shuffled ones stand in for.
    draws
        Features measured on further draws of some cells, one table per draw.
    drawn_rows
        Rows of ``cells`` that were drawn again.
    training
        Embedding → vectors of cells the model was trained on, in the order of `training_keys`.
    training_keys
        Their keys.
    """

    cells: pd.DataFrame
    shown: NDArray[np.int64]
    real: MeasuredCells
    generated: MeasuredCells
    protocols: dict[str, dict[str, Any]]
    shuffled: pd.DataFrame | None = None
    shuffled_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    draws: list[pd.DataFrame] = field(default_factory=list)
    drawn_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    training: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    training_keys: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))


def gather_cells(
    config: Config,
    model: Model,
    real: CellDataset,
    generated: CellDataset,
    cells: pd.DataFrame,
    shown: NDArray[np.int64],
    training: NDArray[np.uint64],
    watch: Stopwatch,
    *,
    shown_images: bool = False,
) -> EvaluationSet:
    """Normalise, measure and embed both sets on the cluster.

    Parameters
    ----------
    config
        The experiment.
    model
        The generator: its normalisation is applied to the real patches.
    real, generated
        The datasets.
    cells
        Metadata of the cells to compare with their ``key``, sorted by it.
    shown
        Rows of ``cells`` whose patches are wanted.
    training
        Keys of training cells to embed beside, sorted.
    watch
        Is told what the workers do.
    shown_images
        Whether the model was shown the cells that it drew. Cells are drawn again from shuffled
        features only where the model sees features, several times only where it sees noise.

    Returns
    -------
    EvaluationSet
        In the order of ``cells``.
    """
    keys = cells["key"].to_numpy()
    plates = sorted(cells[PLATE].astype(str).unique())
    seen_by_model = sees(model.card.preset, image=shown_images)
    draws = config.evaluate.draws if "noise" in seen_by_model else 0
    shuffles = config.evaluate.shuffle_control and "features" in seen_by_model
    redraws = shuffles or draws > 1
    requested = list(model.features) if redraws else []
    wanted = ((real, real.features), (generated, requested))
    sources = [
        Source(dataset.patch_format, dataset.metadata, columns, keys, keys[shown])
        for dataset, columns in wanted
    ]
    if len(training):
        source = Source(real.patch_format, real.metadata, [], training, training[:0], False)
        sources.append(source)
    total = 2 * len(keys)
    workers = Workers(config, partial(Work, config, sources), -(-total // _CELLS_PER_TASK))
    units = [
        Unit(number, unit)
        for number, (dataset, _) in enumerate(wanted)
        for unit in dataset.ranges(_unit_size(total, workers.size), plates)
    ]
    parts = workers.map(units, "measure", total, watch)
    seen, drawn = (_assemble(parts, number, sources[number]) for number in (0, 1))
    embeddings = build_embeddings(config, len(model.channels))
    protocols = {name: one.protocol for name, one in embeddings.items()}
    found = EvaluationSet(cells, shown, seen, drawn, protocols)
    seed = config.run.seed

    def redraw(
        rows: NDArray[np.int64], source: NDArray[np.int64], seeds: Sequence[int]
    ) -> list[pd.DataFrame]:
        """Draw cells from features of others, with each seed, and measure each of these sets."""
        plate = cells[PLATE].astype(str).iloc[rows].tolist()
        scaled = model.scaling.apply(drawn.table.iloc[source].to_numpy(), plate)
        cuts = [slice(k, k + _CELLS_PER_TASK) for k in range(0, len(rows), _CELLS_PER_TASK)]
        units = [
            Redraw(turn * len(rows) + cut.start, scaled[cut], keys[rows[cut]], one)
            for turn, one in enumerate(seeds)
            for cut in cuts
        ]
        label = "shuffle control" if len(seeds) == 1 else "further draws"
        table = _assemble_drawn(workers.map(units, label, len(rows) * len(seeds), watch))
        return [
            table.iloc[start : start + len(rows)].reset_index(drop=True)
            for start in range(0, len(table), len(rows))
        ]

    if shuffles:
        rows, other = _permute(cells)
        (found.shuffled,), found.shuffled_rows = redraw(rows, other, [seed]), rows
    if draws > 1:
        rows = np.sort(np.random.default_rng(1).permutation(len(cells))[:_DRAWN_AGAIN])
        found.drawn_rows = rows
        found.draws = redraw(rows, rows, [seed + 1 + turn for turn in range(draws)])
    if len(training):
        size = _unit_size(len(training), workers.size)
        units = [Unit(2, unit) for unit in real.ranges(size)]
        beside = workers.map(units, "training cells", len(training), watch)
        near = _assemble(beside, 2, sources[2])
        found.training, found.training_keys = near.embedded, training
    return found


def patches_of(dataset: CellDataset, model: Model, keys: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Return the patches of some cells as they are compared, in the order of ``keys``.

    Parameters
    ----------
    dataset
        Where they are; only row groups that hold one are read.
    model
        Its normalisation is applied to patches at acquisition scale.
    keys
        Of the cells, (N,).

    Returns
    -------
    NDArray
        (N, C, H, W).

    Raises
    ------
    DatasetError
        If a cell is not there.
    """
    form, found = dataset.patch_format, dict[int, NDArray[np.uint8]]()
    for cells in dataset.ranges(ROW_GROUP):
        metadata = decode_metadata(read_range(cells, dataset.metadata))
        own = cell_keys(metadata)
        rows = np.flatnonzero(np.isin(own, keys))
        if len(rows):
            patches = decode_patches(read_range(cells, [PATCH]).take(pa.array(rows)), form)
            if form.normalisation == "none":
                plates = metadata[PLATE].astype(str).iloc[rows].tolist()
                patches = model.intensity.apply(patches, plates, form.full_scale)
            found |= dict(zip(own[rows].tolist(), quantise(patches), strict=True))
    missing = [key for key in keys.tolist() if key not in found]
    if missing:
        raise DatasetError(f"{dataset.uri}: {len(missing)} cells are gone since it was opened")
    return np.stack([found[key] for key in keys.tolist()])


def _unit_size(cells: int, workers: int) -> int:
    """Return the most cells of a unit: a row group, which each of its units reads, or its 2ⁿ-th.

    It leaves each worker eight units, so that all end at about the same time.
    """
    size = ROW_GROUP
    while size > _CELLS_PER_TASK and 8 * workers * size > cells:
        size //= 2
    return size


def _permute(cells: pd.DataFrame) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give each cell the features of another of its plate; at most `_CONTROL_CELLS` of them."""
    rng = np.random.default_rng(0)
    source = np.arange(len(cells))
    for rows in cells.groupby(PLATE).indices.values():
        source[rows] = rng.permutation(rows)
    chosen = np.sort(rng.permutation(len(cells))[:_CONTROL_CELLS])
    return chosen, source[chosen]


def _assemble(tables: Sequence[pa.Table], number: int, source: Source) -> MeasuredCells:
    """Put together the tables of one set, in the order of the keys."""
    parts = [table for table in tables if note_of(table)["number"] == number]
    measured = note_of(parts[0])["measured"]
    found = pa.concat_tables(part.replace_schema_metadata() for part in parts)
    order = np.argsort(found.column("key").to_numpy(), kind="stable")
    found = found.take(pa.array(order)).combine_chunks()
    patches = {
        key: patch
        for key, patch in zip(found["key"].to_pylist(), found[PATCH].to_pylist(), strict=True)
        if patch is not None
    }
    shown = b"".join(patches[key] for key in source.shown.tolist())
    nothing = np.empty((len(found), 0), np.float32)
    table = matrix_of(found, "table") if source.columns else nothing
    values = matrix_of(found, "measured") if source.measured else nothing
    names = [name for name in found.column_names if name.startswith("embedded_")]
    return MeasuredCells(
        pd.DataFrame(table, columns=source.columns),
        pd.DataFrame(values, columns=measured),
        np.frombuffer(shown, np.uint8).reshape(-1, *source.patch_format.shape),
        {name.removeprefix("embedded_"): matrix_of(found, name) for name in names},
        found["noise"].to_numpy(zero_copy_only=False),
    )


def _assemble_drawn(tables: Sequence[pa.Table]) -> pd.DataFrame:
    """Put together what was measured on the control's cells, in their order."""
    parts = sorted(tables, key=lambda table: int(note_of(table)["number"]))
    measured = note_of(parts[0])["measured"]
    found = pa.concat_tables(part.replace_schema_metadata() for part in parts).combine_chunks()
    return pd.DataFrame(matrix_of(found, "measured"), columns=measured)
