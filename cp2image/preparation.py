"""From CellProfiler tables and fields, or ready-made stacks, to ``cells/``. Step."""

import io
from collections import Counter

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.cluster import join_cluster
from cp2image.columns import IMAGE_NUMBER, METADATA, PLATE, measurements
from cp2image.config import Config
from cp2image.data.fields import read_field
from cp2image.data.illumination import IlluminationSum, correct
from cp2image.data.locations import locate_fields
from cp2image.data.patches import crop_patches
from cp2image.data.quality import judge_patches
from cp2image.data.schema import PatchFormat, build_table
from cp2image.data.stacks import FILE, PAGE, open_stacks, read_stack
from cp2image.data.tables import join_metadata, nucleus_centers, open_table
from cp2image.dataset import CellRange, plate_folder, read_manifests, read_range
from cp2image.errors import ConfigError, FieldError, TableError
from cp2image.publication import Outcome, Publication, publish
from cp2image.staging import STAGING, stage_plate
from cp2image.storage import delete_tree, join, read_bytes, write_bytes
from cp2image.tracking import record

_SOURCE, _Y, _X = "source_", "center_y", "center_x"
_CELLS_PER_UNIT = 256
"""Fields are large beside the patches cut from them: small units keep all workers busy."""


def prepare(config: Config) -> Publication:
    """Cut, check and publish one patch per cell of every table or stack in the config.

    Raises
    ------
    ConfigError
        If the config names neither tables nor stacks, or both.
    TableError, ColumnError, FieldError, PatchError, DatasetError
        For bad input; see their messages. Plates without fault are published all the same.
    """
    settings = config.prepare
    if bool(settings.tables) == (settings.stacks is not None):
        raise ConfigError(
            "prepare: set either 'tables' (with 'channels' and images) or 'stacks' (patches that "
            "are cut already); see configs/ for one of each"
        )
    if settings.tables and not settings.channels:
        raise ConfigError(
            "prepare.channels is empty; name the channels in patch order, as {DNA: DAPI, …} "
            "where the table has FileName_DAPI"
        )
    join_cluster(config.cluster)
    mark = config.fingerprint("prepare")
    staging = join(settings.output, STAGING)
    with record(config, "prepare") as recorder:
        try:
            published = set(read_manifests(settings.output))
            find = _stage_tables if settings.tables else _stage_stacks
            staged = find(config, staging, published)
            factory: Any = partial(_PrepareFields if settings.tables else _PrepareStacks, config)
            if settings.illumination:
                _fit_illumination(config, staged.units, staging)
            result = publish(
                settings.output, [*staged.units, *staged.done], factory, config, mark,
                label="prepare", left_out=staged.left_out,
            )
        finally:
            delete_tree(staging)
        recorder.metrics({f"cells/{name}": value for name, value in result.totals.items()})
    return result


@dataclass(frozen=True)
class _Staged:
    """Units to do, one empty unit per plate that is published already, cells the table left out."""

    units: list[CellRange]
    done: list[CellRange]
    left_out: dict[str, dict[str, int]]


def _stage_tables(config: Config, staging: str, published: set[str]) -> _Staged:
    """Parse every table, plate by plate."""
    settings = config.prepare
    units: list[CellRange] = []
    done: list[CellRange] = []
    left_out: dict[str, dict[str, int]] = {}
    seen: dict[str, str] = {}
    for uri in settings.tables:
        table = open_table(uri, metadata=settings.metadata)
        for extra in settings.metadata_files:
            table = join_metadata(table, extra.uri, extra.on, extra.columns)
        images = table.images()
        sources = locate_fields(
            images, list(settings.channels.values()), root=settings.images,
            replace=settings.image_folders,
        )
        sources.columns = [f"{_SOURCE}{number}" for number in range(len(settings.channels))]
        sources[IMAGE_NUMBER] = images[IMAGE_NUMBER]
        sources[PLATE] = images[PLATE]
        for plate in table.plates:
            if plate in seen:
                raise TableError(
                    f"{uri}: plate {plate!r} is in {seen[plate]} already; a plate must come from "
                    "one table, or its cells would be doubled"
                )
            seen[plate] = uri
            if plate in published:
                done.append(CellRange(plate, 0, "", 0, 0))
                continue
            cells = table.read(plate)
            account = cells.attrs["account"]
            left_out[plate] = {
                name: count for name, count in account.items() if name.startswith("without_")
            }
            centers = pd.DataFrame(nucleus_centers(cells, settings.nuclei), columns=[_Y, _X])
            cells = pd.concat([cells, centers], axis=1).merge(
                sources, on=[PLATE, IMAGE_NUMBER], how="left", validate="many_to_one"
            )
            units += stage_plate(staging, plate, cells, _CELLS_PER_UNIT, [IMAGE_NUMBER])
    return _Staged(units, done, left_out)


def _stage_stacks(config: Config, staging: str, published: set[str]) -> _Staged:
    stacks = config.prepare.stacks
    if stacks is None:
        raise ConfigError("prepare.stacks is empty")
    index = open_stacks(stacks.index, stacks.columns)
    units: list[CellRange] = []
    done: list[CellRange] = []
    for plate, cells in index.groupby(PLATE, sort=True):
        name = str(plate)
        if name in published:
            done.append(CellRange(name, 0, "", 0, 0))
        else:
            cells = cells.sort_values([FILE, PAGE], ignore_index=True)
            units += stage_plate(staging, name, cells, config.cluster.cells_per_task)
    return _Staged(units, done, {})


class _Prepare:
    """Turns one unit of staged rows into cells; the parts both kinds of input share."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._settings = config.prepare

    def __call__(self, unit: CellRange) -> Outcome:
        frame = read_range(unit).to_pandas()
        patches, kept = self._patches(frame)
        reasons = np.where(kept, self._judge(patches), "border")
        keep = kept & ~np.isin(reasons, self._settings.quality.drop)
        dropped = Counter(reasons[~keep].tolist())
        noted = Counter(f"noted_{reason}" for reason in reasons[keep].tolist() if reason)
        frame, patches = frame.loc[keep].reset_index(drop=True), patches[keep]
        metadata = frame[[name for name in frame.columns if name.startswith(METADATA)]]
        names = [column.name for column in measurements(frame.columns)]
        itemsize = patches.dtype.itemsize
        shape = PatchFormat(
            self._channels(), self._settings.patch_size, str(patches.dtype),
            self._settings.bit_depth or 8 * itemsize,
        )
        table = build_table(metadata, frame[names] if names else None, patches, shape)
        return Outcome(table, dict(dropped), dict(noted))

    def _judge(self, patches: NDArray[Any]) -> NDArray[np.str_]:
        depth = self._settings.bit_depth
        return judge_patches(patches, full_scale=None if depth is None else 2.0**depth - 1)

    def _channels(self) -> tuple[str, ...]:
        raise TypeError("a _Prepare is one of its two kinds")

    def _patches(self, frame: pd.DataFrame) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        raise TypeError("a _Prepare is one of its two kinds")


class _PrepareFields(_Prepare):
    def _channels(self) -> tuple[str, ...]:
        return tuple(self._settings.channels)

    def _patches(self, frame: pd.DataFrame) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        parts, kept = [], []
        for number, cells in frame.groupby(IMAGE_NUMBER, sort=False):
            sources = _sources(cells)
            field = read_field(sources, expected_channels=len(sources))
            if self._settings.illumination:
                plate = str(cells[PLATE].iloc[0])
                staging = join(self._settings.output, STAGING)
                field = correct(field, _illumination(staging, plate))
            centers = cells[[_Y, _X]].to_numpy(dtype=np.float64)
            try:
                patches, inside = crop_patches(
                    field, centers, self._settings.patch_size, self._settings.border
                )
            except FieldError as error:
                raise FieldError(f"image {number} ({sources[0]}): {error}") from error
            parts.append(patches)
            kept.append(inside)
        return _stack(parts, frame), np.concatenate(kept)


class _PrepareStacks(_Prepare):
    def _channels(self) -> tuple[str, ...]:
        return tuple(self._settings.stacks.channels if self._settings.stacks else ())

    def _patches(self, frame: pd.DataFrame) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        parts = []
        for file, cells in frame.groupby(FILE, sort=False):
            patches = read_stack(str(file), cells[PAGE].to_numpy(), len(self._channels()))
            if patches.shape[-1] != self._settings.patch_size:
                raise FieldError(
                    f"{file}: its patches are {patches.shape[-1]} px, prepare.patch_size is "
                    f"{self._settings.patch_size}; set it to the stacks' size"
                )
            parts.append(patches)
        return _stack(parts, frame), np.ones(len(frame), dtype=bool)


def _sources(cells: pd.DataFrame) -> list[str]:
    names = [name for name in cells.columns if name.startswith(_SOURCE)]
    return [str(cells[name].iloc[0]) for name in names]


def _stack(parts: list[NDArray[Any]], frame: pd.DataFrame) -> NDArray[Any]:
    kinds = {part.dtype.name for part in parts}
    if len(kinds) > 1:
        raise FieldError(
            f"plate {frame[PLATE].iloc[0]}: its images are of different types "
            f"({', '.join(sorted(kinds))}); convert them to one"
        )
    return np.concatenate(parts)


def _fit_illumination(config: Config, units: list[CellRange], staging: str) -> None:
    """Average the fields of every plate on the cluster and lay its function down for the workers."""
    import ray

    total = ray.remote(num_cpus=config.cluster.cpus_per_task)(_sum_fields)
    for plate in sorted({unit.plate for unit in units}):
        waiting = [total.remote(unit) for unit in units if unit.plate == plate]
        whole = IlluminationSum()
        while waiting:
            ready, waiting = ray.wait(waiting)
            whole.merge(ray.get(ready[0]))
        buffer = io.BytesIO()
        np.save(buffer, whole.function(), allow_pickle=False)
        write_bytes(join(staging, f"{plate_folder(plate)}.npy"), buffer.getvalue())


def _sum_fields(unit: CellRange) -> IlluminationSum:
    found = IlluminationSum()
    for _, cells in read_range(unit).to_pandas().groupby(IMAGE_NUMBER, sort=False):
        sources = _sources(cells)
        found.add(read_field(sources, expected_channels=len(sources)))
    return found


@lru_cache(maxsize=2)
def _illumination(staging: str, plate: str) -> NDArray[np.float32]:
    data = read_bytes(join(staging, f"{plate_folder(plate)}.npy"))
    function: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    return function


