"""Gathering both sets of a comparison from the cluster: patches, features, embeddings. Step."""

import json
from collections.abc import Callable, Iterator, Sequence
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
from cp2image.data.schema import PATCH, decode_features, decode_metadata, decode_patches
from cp2image.dataset import CellDataset, read_range
from cp2image.metrics.embedding import FilterBank, InceptionEmbedding, quantise
from cp2image.metrics.measurement import measure
from cp2image.stopwatch import Stopwatch
from cp2image.tracking import tracking_uri

WAITING = "starting and awaiting workers"
_CONTROL_CELLS = 2_000
_CELLS_PER_TASK = 256


@dataclass
class MeasuredCells:
    """One set of cells, row i the i-th of the comparison.

    Attributes
    ----------
    table
        Features that stand in the dataset: measured before, or requested.
    measured
        Features measured on the patches as they are compared.
    patches
        8 bit, (N, C, H, W).
    embedded
        Embedding → vectors, (N, D).
    """

    table: pd.DataFrame
    measured: pd.DataFrame
    patches: NDArray[np.uint8]
    embedded: dict[str, NDArray[np.float32]] = field(default_factory=dict)

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
    real, generated
        The two sets.
    protocols
        Embedding → what it says of itself.
    shuffled
        Features measured on cells drawn from permuted feature rows; None without the control.
    shuffled_rows
        Rows of ``cells`` that the shuffled ones stand in for.
    """

    cells: pd.DataFrame
    real: MeasuredCells
    generated: MeasuredCells
    protocols: dict[str, dict[str, Any]]
    shuffled: pd.DataFrame | None = None
    shuffled_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))


def gather_cells(
    config: Config,
    model: Model,
    real: CellDataset,
    generated: CellDataset,
    cells: pd.DataFrame,
    watch: Stopwatch,
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
    watch
        Is told what the workers do.

    Returns
    -------
    EvaluationSet
        In the order of ``cells``.
    """
    found = EvaluationSet(
        cells,
        _gather(config, real, cells, "measure real", watch),
        _gather(config, generated, cells, "measure generated", watch),
        {name: e.protocol for name, e in _embeddings(config, len(model.channels)).items()},
    )
    if config.evaluate.shuffle_control:
        rows, source = _permute(cells)
        requested = found.generated.table[list(model.features)].iloc[source].to_numpy()
        plates = cells[PLATE].astype(str).iloc[rows].tolist()
        scaled = model.scaling.apply(requested, plates)
        found.shuffled = _measure_drawn(config, scaled, cells["key"].to_numpy()[rows], watch)
        found.shuffled_rows = rows
    return found


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


def _gather(
    config: Config, dataset: CellDataset, cells: pd.DataFrame, label: str, watch: Stopwatch
) -> MeasuredCells:
    keys = cells["key"].to_numpy()
    plates = sorted(cells[PLATE].astype(str).unique())
    columns = dataset.features
    units = [{"range": unit} for unit in dataset.ranges(_CELLS_PER_TASK, plates)]
    factory = partial(_Gather, config, dataset.patch_format, dataset.metadata, columns, keys)
    with watch.part(WAITING):
        parts = list(_map(config, factory, units, label, len(keys), watch))
    found = pa.concat_tables(parts)
    order = np.argsort(found.column("key").to_numpy(), kind="stable")
    found = found.take(pa.array(order)).combine_chunks()
    names = [name for name in found.column_names if name.startswith("embedded_")]
    shape = (len(dataset.patch_format.channels), *dataset.patch_format.shape[1:])
    measured = found.schema.metadata[b"measured"].decode().split(",")
    return MeasuredCells(
        pd.DataFrame(_matrix(found, "table"), columns=columns),
        pd.DataFrame(_matrix(found, "measured"), columns=measured),
        _matrix(found, PATCH, np.uint8).reshape(-1, *shape),
        {name.removeprefix("embedded_"): _matrix(found, name) for name in names},
    )


class _Gather:
    """Reads a range, keeps the chosen cells, measures and embeds them."""

    def __init__(
        self,
        config: Config,
        patch_format: Any,
        metadata: list[str],
        columns: list[str],
        keys: NDArray[np.uint64],
    ) -> None:
        self._config, self._format, self._keys = config, patch_format, keys
        self._metadata, self._columns = metadata, columns
        self._watch = Stopwatch()
        with self._watch.part("loading the model"):
            self._model = load_model(config.evaluate.checkpoint, store=tracking_uri(config))
            self._embeddings = _embeddings(config, len(patch_format.channels))

    def __call__(self, item: dict[str, Any]) -> pa.Table:
        watch = self._watch
        with watch.part("reading"):
            table = read_range(item["range"])
            metadata = decode_metadata(table)
            keys = cell_keys(metadata)
            rows = np.flatnonzero(np.isin(keys, self._keys))
            if not len(rows):
                return pa.table({})
            table, metadata, keys = table.take(pa.array(rows)), metadata.iloc[rows], keys[rows]
            patches = decode_patches(table, self._format)
            features = decode_features(table, self._columns)
        with watch.part("normalising"):
            if self._format.normalisation == "none":
                plates = metadata[PLATE].astype(str).tolist()
                patches = self._model.intensity.apply(patches, plates, self._format.full_scale)
            pixels = quantise(patches)
        with watch.part("measuring"):
            measured = _measure(pixels, self._format.channels, self._config)
        with watch.part("embedding"):
            embedded = {name: one.embed(pixels) for name, one in self._embeddings.items()}
        with watch.part("moving"):
            columns = {
                "key": pa.array(keys, type=pa.uint64()),
                "table": _rows(features),
                "measured": _rows(measured.to_numpy(dtype=np.float32)),
                PATCH: _rows(pixels.reshape(len(pixels), -1)),
            }
            for name, vectors in embedded.items():
                columns[f"embedded_{name}"] = _rows(vectors)
            found = pa.table(columns)
        return _label(found, measured, watch)


def _measure_drawn(
    config: Config, scaled: NDArray[np.float32], keys: NDArray[np.uint64], watch: Stopwatch
) -> pd.DataFrame:
    """Draw cells from scaled features on the cluster and measure them."""
    step = _CELLS_PER_TASK
    units = [
        {"scaled": scaled[i : i + step], "keys": keys[i : i + step], "start": i}
        for i in range(0, len(keys), step)
    ]
    factory = partial(_Draw, config)
    with watch.part(WAITING):
        parts = list(_map(config, factory, units, "shuffle control", len(keys), watch))
    parts.sort(key=lambda part: part.column("start")[0].as_py())
    found = pa.concat_tables(parts)
    names = found.schema.metadata[b"measured"].decode().split(",")
    return pd.DataFrame(_matrix(found.combine_chunks(), "measured"), columns=names)


class _Draw:
    """Draws and measures."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._watch = Stopwatch()
        with self._watch.part("loading the model"):
            self._model = load_model(config.evaluate.checkpoint, store=tracking_uri(config))

    def __call__(self, item: dict[str, Any]) -> pa.Table:
        with self._watch.part("control: drawing"):
            pixels = self._model.draw(item["scaled"], item["keys"], self._config.run.seed)
        with self._watch.part("control: measuring"):
            measured = _measure(pixels, self._model.channels, self._config)
        found = pa.table(
            {
                "start": pa.array([item["start"]] * len(pixels)),
                "measured": _rows(measured.to_numpy(dtype=np.float32)),
            }
        )
        return _label(found, measured, self._watch)


def _label(found: pa.Table, measured: pd.DataFrame, watch: Stopwatch) -> pa.Table:
    """Note in a worker's table what was measured, and what has taken how long."""
    seconds = json.dumps(watch.take())
    return found.replace_schema_metadata(
        {"measured": ",".join(measured.columns), "seconds": seconds}
    )


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


def _map(
    config: Config,
    factory: Callable[[], Callable[[dict[str, Any]], pa.Table]],
    units: list[dict[str, Any]],
    label: str,
    cells: int,
    watch: Stopwatch,
) -> Iterator[pa.Table]:
    """Run units on a pool of Ray actors; yield their tables in any order."""
    import ray

    cluster = config.cluster
    room = int(ray.cluster_resources().get("CPU", 1) // cluster.cpus_per_task)
    size = max(1, min(cluster.tasks or room, room, len(units)))
    actor = ray.remote(num_cpus=cluster.cpus_per_task, max_restarts=3, max_task_retries=3)(_Actor)
    pool = ray.util.ActorPool([actor.remote(factory) for _ in range(size)])
    with tqdm(total=cells, desc=label, unit=" cells", mininterval=1) as bar:
        for table in pool.map_unordered(lambda worker, unit: worker.run.remote(unit), units):
            bar.update(table.num_rows)
            if table.num_rows:
                watch.credit(json.loads(table.schema.metadata[b"seconds"]), size)
                yield table


class _Actor:
    def __init__(self, factory: Callable[[], Callable[[dict[str, Any]], pa.Table]]) -> None:
        self._work = factory()

    def run(self, unit: dict[str, Any]) -> pa.Table:
        return self._work(unit)
