"""From CellProfiler tables and fields, or ready-made stacks, to ``cells/``. Step."""

import io
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.cluster import join_cluster
from cp2image.columns import IMAGE_NUMBER, METADATA, PLATE, measurements, nearest
from cp2image.config import Config
from cp2image.data.fields import read_field
from cp2image.data.illumination import SMOOTHING_PX, IlluminationSum, correct
from cp2image.data.locations import locate_fields
from cp2image.data.patches import crop_patches
from cp2image.data.quality import judge_patches
from cp2image.data.schema import PatchFormat, build_table
from cp2image.data.stacks import FILE, PAGE, open_stacks, read_stack
from cp2image.data.tables import Table, join_metadata, nucleus_centers, open_table
from cp2image.dataset import CellRange, plate_folder, read_range
from cp2image.errors import ColumnError, ConfigError, Cp2ImageError, FieldError, TableError
from cp2image.publication import Outcome, Publication, finished_plates, publish
from cp2image.staging import STAGING, stage_plate
from cp2image.storage import delete_tree, join, read_bytes, write_bytes
from cp2image.tracking import record_beside

_SOURCE, _Y, _X = "source_", "center_y", "center_x"
_BORDER = "border"
_CELLS_PER_UNIT = 256
"""Fields are large beside the patches cut from them: small units keep all workers busy."""


def prepare(config: Config) -> Publication:
    """Cut, check and publish one patch per cell of every table or stack in the config.

    Raises
    ------
    ConfigError
        If the config names neither tables nor stacks, or both.
    TableError, ColumnError, StorageError
        If a table or an index cannot be used; nothing is published then.
    DatasetError
        If images cannot be used: plates without fault are published all the same. Also if the
        output holds plates of other settings.
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
    if settings.stacks and settings.illumination:
        raise ConfigError(
            "prepare.illumination: patches show too little of a field to estimate it from; "
            "correct the fields before cutting, or set it to false"
        )
    mark = _fingerprint(config)
    published = set(finished_plates(settings.output, mark))
    join_cluster(config.cluster)
    staging = join(settings.output, STAGING)
    with record_beside(config, "prepare") as recorder:
        try:
            find = _stage_tables if settings.tables else _stage_stacks
            staged = find(config, staging, published)
            refused = (
                _fit_illumination(config, staged.units, staging) if settings.illumination else {}
            )
            factory: Any = partial(_PrepareFields if settings.tables else _PrepareStacks, config)
            result = publish(
                settings.output,
                staged.units,
                factory,
                config,
                mark,
                label="prepare",
                ready=recorder.opened,
                left_out=staged.left_out,
                refused=refused,
            )
        finally:
            delete_tree(staging)
        recorder.metrics({f"cells/{name}": value for name, value in result.totals.items()})
    return result


def _fingerprint(config: Config) -> str:
    """Hash the settings; which tables are listed does not count, so that plates can be added."""
    settings = config.prepare.model_copy(update={"tables": []})
    return config.model_copy(update={"prepare": settings}).fingerprint("prepare")


@dataclass(frozen=True)
class _Staged:
    """Units to do, and plate → reason → cells that the table left out."""

    units: list[CellRange] = field(default_factory=list)
    left_out: dict[str, dict[str, int]] = field(default_factory=dict)


def _stage_tables(config: Config, staging: str, published: set[str]) -> _Staged:
    """Parse every table, plate by plate."""
    settings = config.prepare
    staged = _Staged()
    tables = [(uri, _open(config, uri)) for uri in settings.tables]
    _require_plates(settings.plates, _known_plates(tables), ", ".join(settings.tables))
    features: list[str] = []
    for uri, table in tables:
        images = table.images()
        try:
            sources = locate_fields(
                images,
                list(settings.channels.values()),
                root=settings.images,
                replace=settings.image_folders,
            )
        except ColumnError as error:
            raise ColumnError(f"{uri}: {error}; prepare.channels names the images") from error
        sources.columns = [f"{_SOURCE}{number}" for number in range(len(settings.channels))]
        sources[IMAGE_NUMBER] = images[IMAGE_NUMBER]
        sources[PLATE] = images[PLATE]
        for plate in table.plates:
            if plate in published or (settings.plates and plate not in settings.plates):
                continue
            cells = table.read(plate)
            names = [column.name for column in measurements(cells.columns)]
            features = features or names
            _require_same(features, names, f"{uri} plate {plate}")
            staged.left_out[plate] = {
                name: count
                for name, count in cells.attrs["account"].items()
                if name.startswith("without_")
            }
            try:
                places = nucleus_centers(cells, settings.nuclei)
            except ColumnError as error:
                raise ColumnError(f"{uri}: {error} (prepare.nuclei)") from error
            centers = pd.DataFrame(places, columns=[_Y, _X])
            cells = pd.concat([cells, centers], axis=1).merge(
                sources, on=[PLATE, IMAGE_NUMBER], how="left", validate="many_to_one"
            )
            staged.units.extend(stage_plate(staging, plate, cells, _CELLS_PER_UNIT, [IMAGE_NUMBER]))
    return staged


def _open(config: Config, uri: str) -> Table:
    table = open_table(uri, metadata=config.prepare.metadata)
    for extra in config.prepare.metadata_files:
        table = join_metadata(table, extra.uri, extra.on, extra.columns)
    return table


def _known_plates(tables: list[tuple[str, Table]]) -> list[str]:
    seen: dict[str, str] = {}
    for uri, table in tables:
        for plate in table.plates:
            if plate in seen:
                raise TableError(
                    f"{uri}: plate {plate!r} is in {seen[plate]} already; a plate must come from "
                    "one table, or its cells would be doubled"
                )
            seen[plate] = uri
    return list(seen)


def _require_plates(chosen: list[str], known: list[str], where: str) -> None:
    for plate in chosen:
        if plate not in known:
            raise TableError(
                f"{where}: no plate {plate!r}{nearest(plate, known)}; "
                f"there are {len(known)}: {', '.join(sorted(known)[:8])}"
            )


def _require_same(known: list[str], found: list[str], where: str) -> None:
    missing, extra = sorted(set(known) - set(found)), sorted(set(found) - set(known))
    if missing or extra:
        raise ColumnError(
            f"{where}: its measurements differ from the plates before it: "
            f"missing {', '.join(missing[:5]) or 'none'}; extra {', '.join(extra[:5]) or 'none'}. "
            "All plates of a dataset must come from one pipeline; leave this table out"
        )


def _stage_stacks(config: Config, staging: str, published: set[str]) -> _Staged:
    stacks = config.prepare.stacks
    if stacks is None:
        raise ConfigError("prepare.stacks is empty")
    staged = _Staged()
    index = open_stacks(stacks.index, stacks.columns)
    chosen = config.prepare.plates or index[PLATE].astype(str).unique().tolist()
    _require_plates(chosen, index[PLATE].astype(str).unique().tolist(), stacks.index)
    for plate, cells in index.groupby(PLATE, sort=True):
        if str(plate) in chosen and str(plate) not in published:
            rows = cells.sort_values([FILE, PAGE], ignore_index=True)
            size = config.cluster.cells_per_task
            staged.units.extend(stage_plate(staging, str(plate), rows, size))
    return staged


class _Prepare:
    """Turns one unit of staged rows into cells; the parts both kinds of input share."""

    def __init__(self, config: Config) -> None:
        self._settings = config.prepare
        self._channels: tuple[str, ...] = ()

    def __call__(self, unit: CellRange) -> Outcome:
        frame = read_range(unit).to_pandas()
        patches, reasons = self._patches(frame)
        keep = ~np.isin(reasons, [_BORDER, *self._settings.quality.drop])
        dropped = Counter(reasons[~keep].tolist())
        noted = Counter(f"noted_{reason}" for reason in reasons[keep].tolist() if reason)
        frame, patches = frame.loc[keep].reset_index(drop=True), patches[keep]
        metadata = frame[[name for name in frame.columns if name.startswith(METADATA)]]
        names = [column.name for column in measurements(frame.columns)]
        shape = PatchFormat(
            self._channels,
            self._settings.patch_size,
            str(patches.dtype),
            self._settings.bit_depth or 8 * patches.dtype.itemsize,
        )
        table = build_table(metadata, frame[names] if names else None, patches, shape)
        return Outcome(table, dict(dropped), dict(noted))

    def _patches(self, frame: pd.DataFrame) -> tuple[NDArray[Any], NDArray[np.str_]]:
        """Return one patch per row, and why it is not wanted (or an empty string)."""
        raise TypeError("a _Prepare is one of its two kinds")

    def _judge(self, patches: NDArray[Any]) -> NDArray[np.str_]:
        depth = self._settings.bit_depth
        return judge_patches(patches, full_scale=None if depth is None else 2.0**depth - 1)


class _PrepareFields(_Prepare):
    """Cuts patches out of fields.

    What the camera saw is judged: not what was corrected, and at the border of the field not the
    padding, whose edge would look like structure, but the nearest window within the field.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._channels = tuple(config.prepare.channels)
        self._staging = join(config.prepare.output, STAGING)

    def _patches(self, frame: pd.DataFrame) -> tuple[NDArray[Any], NDArray[np.str_]]:
        parts, reasons = [], []
        size, border = self._settings.patch_size, self._settings.border
        for number, cells in frame.groupby(IMAGE_NUMBER, sort=False):
            sources = _sources(cells)
            field_ = read_field(sources, expected_channels=len(sources))
            if field_[0].min() == field_[0].max():
                raise FieldError(
                    f"image {number} ({sources[0]}): channel {self._channels[0]!r} is empty, all "
                    f"pixels are {field_[0].min()}; check the file, or leave the image out"
                )
            centers = cells[[_Y, _X]].to_numpy(dtype=np.float64)
            try:
                patches, inside = crop_patches(field_, centers, size, border)
            except FieldError as error:
                raise FieldError(f"image {number} ({sources[0]}): {error}") from error
            seen, _ = crop_patches(field_, _move_inside(centers, field_.shape[1:], size), size)
            reasons.append(np.where(inside, self._judge(seen), _BORDER))
            if self._settings.illumination:
                plate = str(cells[PLATE].iloc[0])
                corrected = correct(field_, _illumination(self._staging, plate))
                patches, _ = crop_patches(corrected, centers, size, border)
            parts.append(patches)
        return _stack(parts, frame), np.concatenate(reasons)


class _PrepareStacks(_Prepare):
    """Takes patches that are cut already."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._channels = tuple(config.prepare.stacks.channels if config.prepare.stacks else ())

    def _patches(self, frame: pd.DataFrame) -> tuple[NDArray[Any], NDArray[np.str_]]:
        parts = []
        for file, cells in frame.groupby(FILE, sort=False):
            patches = read_stack(str(file), cells[PAGE].to_numpy(), len(self._channels))
            if patches.shape[-1] != self._settings.patch_size:
                raise FieldError(
                    f"{file}: its patches are {patches.shape[-1]} px, prepare.patch_size is "
                    f"{self._settings.patch_size}; set it to the stacks' size"
                )
            parts.append(patches)
        patches = _stack(parts, frame)
        return patches, self._judge(patches)


def _move_inside(
    centers: NDArray[np.float64], shape: tuple[int, ...], size: int
) -> NDArray[np.float64]:
    """Shift centres so that their windows lie in the field, where the field is large enough."""
    low = size // 2
    high = np.maximum(np.array(shape) - size + low, low)
    moved: NDArray[np.float64] = np.clip(centers, low, np.minimum(high, np.array(shape) - 1))
    return moved


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


def _fit_illumination(config: Config, units: list[CellRange], staging: str) -> dict[str, str]:
    """Average every plate's fields on the cluster and lay its function down for the workers.

    Returns
    -------
    dict
        Plates whose fields cannot be used, with the reason.
    """
    import ray

    refused = {}
    total = ray.remote(num_cpus=config.cluster.cpus_per_task)(_sum_fields)
    for plate in sorted({unit.plate for unit in units}):
        waiting = [total.remote(unit) for unit in units if unit.plate == plate]
        whole = IlluminationSum()
        try:
            while waiting:
                ready, waiting = ray.wait(waiting)
                whole.merge(ray.get(ready[0]))
        except Cp2ImageError as error:  # Ray adds its traceback to the message
            refused[plate] = str(getattr(error, "cause", error))
            continue
        buffer = io.BytesIO()
        np.save(buffer, whole.function(_smoothing(whole)), allow_pickle=False)
        write_bytes(_function_uri(staging, plate), buffer.getvalue())
    return refused


def _smoothing(fields: IlluminationSum) -> int:
    """Return the window to smooth with: the usual one, half the field where that is smaller."""
    sides = SMOOTHING_PX if fields.total is None else min(fields.total.shape[1:])
    return min(SMOOTHING_PX, sides // 2)


def _function_uri(staging: str, plate: str) -> str:
    return join(staging, f"{plate_folder(plate)}.npy")


def _sum_fields(unit: CellRange) -> IlluminationSum:
    found = IlluminationSum()
    for _, cells in read_range(unit).to_pandas().groupby(IMAGE_NUMBER, sort=False):
        sources = _sources(cells)
        found.add(read_field(sources, expected_channels=len(sources)))
    return found


@lru_cache(maxsize=2)
def _illumination(staging: str, plate: str) -> NDArray[np.float32]:
    data = read_bytes(_function_uri(staging, plate))
    function: NDArray[np.float32] = np.load(io.BytesIO(data), allow_pickle=False)
    return function
