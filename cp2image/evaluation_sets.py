"""Gathering both sets of a comparison from the cluster: patches, features, embeddings. Step."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from cp2image.checkpoint import Model, load_model
from cp2image.columns import PLATE
from cp2image.config import Config
from cp2image.data.identity import cell_keys
from cp2image.data.quality import autocorrelation
from cp2image.data.schema import (
    PATCH,
    ROW_GROUP,
    PatchFormat,
    decode_features,
    decode_metadata,
    decode_patches,
)
from cp2image.dataset import CellDataset, CellRange, read_range
from cp2image.errors import DatasetError, EvaluationError, StorageError
from cp2image.metrics.embedding import FilterBank, InceptionEmbedding, quantise
from cp2image.metrics.measurement import measure
from cp2image.models.presets import sees
from cp2image.stopwatch import Stopwatch
from cp2image.tracking import tracking_uri

_CONTROL_CELLS = 2_000
_DRAWN_AGAIN = 200
"""Cells that are drawn several times, to see how far draws differ."""
_NOISE_BELOW = 0.5
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
        _Source(dataset.patch_format, dataset.metadata, columns, keys, keys[shown])
        for dataset, columns in wanted
    ]
    if len(training):
        source = _Source(real.patch_format, real.metadata, [], training, training[:0], False)
        sources.append(source)
    total = 2 * len(keys)
    workers = _Workers(config, partial(_Work, config, sources), -(-total // _CELLS_PER_TASK))
    units = [
        _Unit(number, unit)
        for number, (dataset, _) in enumerate(wanted)
        for unit in dataset.ranges(_unit_size(total, workers.size), plates)
    ]
    parts = workers.map(units, "measure", total, watch)
    seen, drawn = (_assemble(parts, number, sources[number]) for number in (0, 1))
    protocols = {name: e.protocol for name, e in _embeddings(config, len(model.channels)).items()}
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
            _Redraw(turn * len(rows) + cut.start, scaled[cut], keys[rows[cut]], one)
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
        units = [_Unit(2, unit) for unit in real.ranges(size)]
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


def _embeddings(config: Config, channels: int) -> dict[str, Any]:
    """Build the embeddings that look at pixels."""
    found: dict[str, Any] = {}
    settings = config.evaluate
    if "filterbank" in settings.embeddings:
        found["filterbank"] = FilterBank(channels)
    if "inception" in settings.embeddings:
        seen = (0, 1, 2) if channels >= 3 else (0, 0, 0)
        found["inception"] = InceptionEmbedding(settings.inception_weights or "", seen)
    return found


def check_weights(config: Config) -> None:
    """Load the weights that the embeddings ask for once, before any worker does.

    Raises
    ------
    EvaluationError
        If Inception is asked for and its weights are not named, not there or another network's.
    """
    settings = config.evaluate
    if "inception" not in settings.embeddings:
        return
    if not settings.inception_weights:
        raise EvaluationError(
            "evaluate.embeddings asks for 'inception', and evaluate.inception_weights is not set; "
            "give the path or URI of FID's published weights (pt_inception-2015-12-05, a state "
            "dict), or leave 'inception' out"
        )
    try:
        InceptionEmbedding(settings.inception_weights)
    except (EvaluationError, StorageError) as error:
        raise EvaluationError(f"evaluate.inception_weights: {error}") from error


@dataclass(frozen=True)
class _Source:
    """One of the two sets: what its patches are, what is wanted of which cells."""

    patch_format: PatchFormat
    metadata: list[str]
    columns: list[str]
    keys: NDArray[np.uint64]
    shown: NDArray[np.uint64]
    measured: bool = True


@dataclass(frozen=True)
class _Unit:
    """Cells of one set to read, measure and embed."""

    source: int
    cells: CellRange


@dataclass(frozen=True)
class _Redraw:
    """Cells to draw and measure: scaled features (n, p), keys (n,)."""

    start: int
    scaled: NDArray[np.float32]
    keys: NDArray[np.uint64]
    seed: int


class _Work:
    """What an actor does: reads, measures and embeds cells of either set, draws the control's."""

    def __init__(self, config: Config, sources: Sequence[_Source]) -> None:
        self._config, self._sources = config, sources
        self._watch = Stopwatch()
        with self._watch.part("loading the model"):
            self._model = load_model(config.evaluate.checkpoint, store=tracking_uri(config))
            self._embeddings = _embeddings(config, len(self._model.channels))

    def __call__(self, unit: _Unit | _Redraw) -> pa.Table:
        return self._gather(unit) if isinstance(unit, _Unit) else self._draw(unit)

    def _gather(self, unit: _Unit) -> pa.Table:
        source, watch = self._sources[unit.source], self._watch
        form = source.patch_format
        with watch.part("reading"):
            table = read_range(unit.cells, [*source.metadata, *source.columns, PATCH])
            metadata = decode_metadata(table)
            keys = cell_keys(metadata)
            rows = np.flatnonzero(np.isin(keys, source.keys))
            if not len(rows):
                return pa.table({})
            table, metadata, keys = table.take(pa.array(rows)), metadata.iloc[rows], keys[rows]
            patches = decode_patches(table, form)
            features = decode_features(table, source.columns)
        with watch.part("judging"):
            noise = np.zeros(len(patches), dtype=bool)
            if form.normalisation == "none" and source.measured:
                noise = autocorrelation(patches)[:, 0] < _NOISE_BELOW  # as in `judge_patches`
        with watch.part("normalising"):
            if form.normalisation == "none":
                plates = metadata[PLATE].astype(str).tolist()
                patches = self._model.intensity.apply(patches, plates, form.full_scale)
            pixels = quantise(patches)
        with watch.part("measuring"):
            measured = pd.DataFrame(index=range(len(pixels)))
            if source.measured:
                measured = _measure(pixels, form.channels, self._config)
        with watch.part("embedding"):
            embedded = {name: one.embed(pixels) for name, one in self._embeddings.items()}
        with watch.part("moving"):
            shown = np.isin(keys, source.shown)
            wanted = [
                patch.tobytes() if s else None for patch, s in zip(pixels, shown, strict=True)
            ]
            columns = {
                "key": pa.array(keys, type=pa.uint64()),
                PATCH: pa.array(wanted, type=pa.binary()),
                "noise": pa.array(noise),
            }
            if source.measured:
                columns["measured"] = _rows(measured.to_numpy(dtype=np.float32))
            if source.columns:
                columns["table"] = _rows(features)
            for name, vectors in embedded.items():
                columns[f"embedded_{name}"] = _rows(vectors)
            found = pa.table(columns)
        return _label(found, measured, watch, unit.source)

    def _draw(self, unit: _Redraw) -> pa.Table:
        with self._watch.part("control: drawing"):
            pixels = self._model.draw(unit.scaled, unit.keys, unit.seed)
        with self._watch.part("control: measuring"):
            measured = _measure(pixels, self._model.channels, self._config)
        found = pa.table({"measured": _rows(measured.to_numpy(dtype=np.float32))})
        return _label(found, measured, self._watch, unit.start)


def _label(found: pa.Table, measured: pd.DataFrame, watch: Stopwatch, number: int) -> pa.Table:
    """Note in a worker's table whose it is, what was measured, and what has taken how long."""
    about = {"number": number, "measured": list(measured.columns), "seconds": watch.take()}
    return found.replace_schema_metadata({"about": json.dumps(about)})


def _about(table: pa.Table) -> dict[str, Any]:
    about: dict[str, Any] = json.loads(table.schema.metadata[b"about"])
    return about


def _assemble(tables: Sequence[pa.Table], number: int, source: _Source) -> MeasuredCells:
    """Put together the tables of one set, in the order of the keys."""
    parts = [table for table in tables if _about(table)["number"] == number]
    measured = _about(parts[0])["measured"]
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
    table = _matrix(found, "table") if source.columns else nothing
    values = _matrix(found, "measured") if source.measured else nothing
    names = [name for name in found.column_names if name.startswith("embedded_")]
    return MeasuredCells(
        pd.DataFrame(table, columns=source.columns),
        pd.DataFrame(values, columns=measured),
        np.frombuffer(shown, np.uint8).reshape(-1, *source.patch_format.shape),
        {name.removeprefix("embedded_"): _matrix(found, name) for name in names},
        found["noise"].to_numpy(zero_copy_only=False),
    )


def _assemble_drawn(tables: Sequence[pa.Table]) -> pd.DataFrame:
    """Put together what was measured on the control's cells, in their order."""
    parts = sorted(tables, key=lambda table: int(_about(table)["number"]))
    measured = _about(parts[0])["measured"]
    found = pa.concat_tables(part.replace_schema_metadata() for part in parts).combine_chunks()
    return pd.DataFrame(_matrix(found, "measured"), columns=measured)


def _measure(pixels: NDArray[np.uint8], channels: Sequence[str], config: Config) -> pd.DataFrame:
    settings = config.measure
    return measure(
        pixels,
        channels=channels,
        families=config.evaluate.families or settings.families,
        compartments=tuple(settings.compartments),
        nucleus_channel=settings.nucleus_channel,
    )


def _rows(matrix: NDArray[Any]) -> pa.Array:
    """Store a matrix as one fixed-size binary value per row."""
    data = np.ascontiguousarray(matrix)
    width = data.shape[1] * data.dtype.itemsize
    buffer = pa.py_buffer(data.reshape(-1).view(np.uint8))
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(data), [None, buffer])


def _matrix(table: pa.Table, name: str, dtype: Any = np.float32) -> NDArray[Any]:
    """Read back what `_rows` stored; the column must be in one chunk."""
    chunk = table.column(name).chunk(0)
    width = chunk.type.byte_width
    data = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
    data = data[chunk.offset * width : (chunk.offset + len(chunk)) * width]
    matrix: NDArray[Any] = data.view(dtype).reshape(len(chunk), width // np.dtype(dtype).itemsize)
    return matrix


class _Workers:
    """A pool of Ray actors that are started once and do all units of an evaluation."""

    def __init__(self, config: Config, factory: Callable[[], _Work], most: int) -> None:
        import ray

        cluster = config.cluster
        room = int(ray.cluster_resources().get("CPU", 1) // cluster.cpus_per_task)
        self.size = max(1, min(cluster.tasks or room, room, most))
        self._factory = ray.put(factory)  # not an argument of the constructor: it outlives restarts
        actor = ray.remote(num_cpus=cluster.cpus_per_task, max_restarts=3, max_task_retries=3)(
            _Actor
        )
        self._actors = [actor.remote() for _ in range(self.size)]

    def map(
        self, units: Sequence[_Unit | _Redraw], label: str, cells: int, watch: Stopwatch
    ) -> list[pa.Table]:
        """Do the units; return their tables in any order, without those that met no cell."""
        import ray

        pool, found = ray.util.ActorPool(self._actors), []
        with (
            watch.part("starting and awaiting workers"),
            tqdm(total=cells, desc=label, unit=" cells", mininterval=1) as bar,
        ):
            for table in pool.map_unordered(
                lambda worker, unit: worker.run.remote(self._factory, unit), units
            ):
                bar.update(table.num_rows)
                if table.num_rows:
                    watch.credit(_about(table)["seconds"], self.size)
                    found.append(table)
        return found


class _Actor:
    def __init__(self) -> None:
        self._work: _Work | None = None

    def run(self, factory: Callable[[], _Work], unit: _Unit | _Redraw) -> pa.Table:
        if self._work is None:
            self._work = factory()
        return self._work(unit)
