"""What the workers of an evaluation do: read, measure and embed cells. Floor: below its sets."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from tqdm import tqdm

from cp2image.checkpoint import load_model
from cp2image.columns import PLATE
from cp2image.config import Config
from cp2image.data.identity import cell_keys
from cp2image.data.quality import autocorrelation
from cp2image.data.schema import (
    PATCH,
    PatchFormat,
    decode_features,
    decode_metadata,
    decode_patches,
)
from cp2image.dataset import CellRange, read_range
from cp2image.errors import EvaluationError, StorageError
from cp2image.metrics.embedding import FilterBank, InceptionEmbedding, quantise
from cp2image.metrics.measurement import measure
from cp2image.stopwatch import Stopwatch
from cp2image.tracking import tracking_uri

_NOISE_BELOW = 0.5


def build_embeddings(config: Config, channels: int) -> dict[str, Any]:
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
class Source:
    """One of the two sets: what its patches are, what is wanted of which cells."""

    patch_format: PatchFormat
    metadata: list[str]
    columns: list[str]
    keys: NDArray[np.uint64]
    shown: NDArray[np.uint64]
    measured: bool = True


@dataclass(frozen=True)
class Unit:
    """Cells of one set to read, measure and embed."""

    source: int
    cells: CellRange


@dataclass(frozen=True)
class Redraw:
    """Cells to draw and measure: scaled features (n, p), keys (n,)."""

    start: int
    scaled: NDArray[np.float32]
    keys: NDArray[np.uint64]
    seed: int


class Work:
    """What an actor does: reads, measures and embeds cells of either set, draws the control's."""

    def __init__(self, config: Config, sources: Sequence[Source]) -> None:
        self._config, self._sources = config, sources
        self._watch = Stopwatch()
        with self._watch.part("loading the model"):
            self._model = load_model(config.evaluate.checkpoint, store=tracking_uri(config))
            self._embeddings = build_embeddings(config, len(self._model.channels))

    def __call__(self, unit: Unit | Redraw) -> pa.Table:
        """Return what one unit gives; empty where no cell was asked for."""
        return self._gather(unit) if isinstance(unit, Unit) else self._draw(unit)

    def _gather(self, unit: Unit) -> pa.Table:
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

    def _draw(self, unit: Redraw) -> pa.Table:
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


def note_of(table: pa.Table) -> dict[str, Any]:
    """Return what a worker noted in a table: ``number``, ``measured``, ``seconds``."""
    note: dict[str, Any] = json.loads(table.schema.metadata[b"about"])
    return note


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


def matrix_of(table: pa.Table, name: str, dtype: Any = np.float32) -> NDArray[Any]:
    """Read back what `_rows` stored; the column must be in one chunk."""
    chunk = table.column(name).chunk(0)
    width = chunk.type.byte_width
    data = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
    data = data[chunk.offset * width : (chunk.offset + len(chunk)) * width]
    matrix: NDArray[Any] = data.view(dtype).reshape(len(chunk), width // np.dtype(dtype).itemsize)
    return matrix


class Workers:
    """A pool of Ray actors that are started once and do all units of an evaluation."""

    def __init__(self, config: Config, factory: Callable[[], Work], most: int) -> None:
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
        self, units: Sequence[Unit | Redraw], label: str, cells: int, watch: Stopwatch
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
                    watch.credit(note_of(table)["seconds"], self.size)
                    found.append(table)
        return found


class _Actor:
    def __init__(self) -> None:
        self._work: Work | None = None

    def run(self, factory: Callable[[], Work], unit: Unit | Redraw) -> pa.Table:
        if self._work is None:
            self._work = factory()
        return self._work(unit)
