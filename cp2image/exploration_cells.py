"""The cells an exploration looks at; a model that draws and measures. Floor: below the step."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from cp2image.checkpoint import Model
from cp2image.columns import (
    COMPOUND,
    CONCENTRATION,
    METADATA,
    MOA,
    PLATE,
    WELL,
    listed,
    nearest,
    parse_column,
    require_columns,
)
from cp2image.config import Config
from cp2image.data.identity import cell_keys, texts, treatment_names
from cp2image.data.scaling import Scaling, is_control
from cp2image.data.schema import ROW_GROUP, decode_features, decode_metadata
from cp2image.data.splits import TRAIN
from cp2image.data.tables import open_table
from cp2image.dataset import CellDataset, open_dataset, read_manifests, read_range
from cp2image.errors import ColumnError, DatasetError, EvaluationError
from cp2image.evaluation_sets import patches_of
from cp2image.figures.patches import contrast_limits
from cp2image.figures.sheets import Look
from cp2image.metrics.measurement import FAMILIES, measure
from cp2image.metrics.phenotypes.coordinates import Coordinates
from cp2image.metrics.phenotypes.covariance import Guard
from cp2image.models.presets import PAPER

CONTRAST_CELLS = 200
"""Cells that set the contrast of all figures."""
AXES = 50
"""Principal axes in which cells are compared for being typical."""
MOST = 2_000
"""Cells of one group among which the typical ones are looked for."""


@dataclass(frozen=True)
class Artist:
    """A model that draws from coordinates and measures what it drew.

    Attributes
    ----------
    model
        The checkpoint, its scaling extended by the plates at hand.
    space
        Coordinates of its features.
    guard
        Says which coordinates are far from the training cells.
    compartments, nucleus_channel
        As the config measures.
    seed
        Of the first draw.
    """

    model: Model
    space: Coordinates
    guard: Guard
    compartments: tuple[str, ...]
    nucleus_channel: str | None
    seed: int

    def scaled(self, coordinates: NDArray[Any], plates: Sequence[str]) -> NDArray[np.float32]:
        """Turn coordinates into the model's input, (N, p), each cell by its plate's scaling."""
        center, scale = self.model.scaling.center_and_scale(plates)
        return self.space.decode(coordinates, center, scale).astype(np.float32)

    def own_units(self, scaled: NDArray[np.float32], plates: Sequence[str]) -> pd.DataFrame:
        """Turn the model's input into the table's units."""
        center, scale = self.model.scaling.center_and_scale(plates)
        return pd.DataFrame(center + scale * scaled, columns=list(self.model.features))

    def draws(self, wanted: int) -> int:
        """Return how many draws make sense: one where there is no noise."""
        return 1 if self.model.card.preset == PAPER else wanted

    def draw(
        self, scaled: NDArray[np.float32], keys: NDArray[np.uint64], turn: int = 0
    ) -> NDArray[np.uint8]:
        """Draw cells; ``turn`` is the draw, the same key and turn the same noise."""
        return self.model.draw(scaled, keys, self.seed + turn)

    def measurable(self, feature: str) -> bool:
        """Tell whether this program measures a feature on patches."""
        column = parse_column(feature)
        known = column is not None and column.category in FAMILIES
        return known and column is not None and column.compartment in self.compartments

    def same_scale(self, feature: str) -> bool:
        """Tell whether what is measured on drawn patches has the table's units.

        ``per_patch_max`` forgets brightness, so what depends on it has not.
        """
        column = parse_column(feature)
        if column is None or self.model.intensity.kind != "per_patch_max":
            return column is not None
        return column.category == "AreaShape"

    def measure(
        self, patches: NDArray[np.uint8], plates: Sequence[str], feature: str
    ) -> NDArray[np.float64]:
        """Measure one feature on drawn patches, at the acquisition scale if that is known, (N,).

        NaN where this program does not measure it, or it is undefined.
        """
        column = parse_column(feature, self.model.channels)
        if column is None or not self.measurable(feature):
            return np.full(len(patches), np.nan)
        table = measure(
            self.model.intensity.restore(patches, plates),
            channels=self.model.channels,
            families=[column.category],
            compartments=(column.compartment,),
            nucleus_channel=self.nucleus_channel,
        )
        if feature not in table:
            return np.full(len(patches), np.nan)
        return table[feature].to_numpy(dtype=np.float64)


@dataclass(frozen=True)
class ExploredCells:
    """Cells with metadata, features and coordinates; row i of everything is the same cell.

    Attributes
    ----------
    cells
        Metadata with ``key``, ``treatment``, ``control`` and ``split``.
    scaled
        The model's input, (N, p).
    coordinates
        (N, q).
    dataset
        Where their patches are; None if there are none.
    artist
        The model beside them.
    look
        Colours and contrast of all figures.
    notes
        What was done other than asked, a sentence each.
    unit
        Of the concentrations, for labels.
    """

    cells: pd.DataFrame
    scaled: NDArray[np.float32]
    coordinates: NDArray[np.float64]
    dataset: CellDataset | None
    artist: Artist
    look: Look
    notes: tuple[str, ...]
    unit: str = ""

    def label(self, treatment: str) -> str:
        """Return a treatment as figures name it: with its unit, without a dose of 0."""
        compound, _, dose = treatment.rpartition(" ")
        if CONCENTRATION not in self.cells or not compound or not _is_number(dose):
            return treatment
        return compound if float(dose) == 0 else f"{treatment} {self.unit}".rstrip()

    def keys(self, rows: NDArray[Any]) -> NDArray[np.uint64]:
        """Return the keys of some rows."""
        keys: NDArray[np.uint64] = self.cells["key"].to_numpy(dtype=np.uint64)
        chosen: NDArray[np.uint64] = keys[rows]
        return chosen

    def plates(self, rows: NDArray[Any]) -> list[str]:
        """Return the plates of some rows."""
        plates: list[str] = texts(self.cells[PLATE].iloc[rows]).tolist()
        return plates

    def real(self, rows: NDArray[Any]) -> NDArray[np.uint8] | None:
        """Return the patches of some rows as the model sees them, None if there are none."""
        if self.dataset is None:
            return None
        if not len(rows):
            return np.empty((0, *self.artist.model.patch_format.shape), dtype=np.uint8)
        return patches_of(self.dataset, self.artist.model, self.keys(rows))

    def relative(self, scaled: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return how far vectors drawn in place of some rows are, over the guard's limit."""
        artist = self.artist
        center, scale = artist.model.scaling.center_and_scale(self.plates(rows))
        return artist.guard.relative(artist.space.encode(scaled, center, scale))

    def names(self, column: str) -> NDArray[np.object_]:
        """Return a metadata column as texts, empty where missing.

        Raises
        ------
        ColumnError
            If the cells have no such column.
        """
        if column not in self.cells:
            raise ColumnError(
                f"explore.input: the cells have no column {column!r}"
                f"{nearest(column, self.cells.columns)}; choose another exploration in "
                "explore.which, or prepare the cells with it"
            )
        return texts(self.cells[column])

    def sample(
        self, count: int, split: str, treatments: Sequence[str], key: str
    ) -> NDArray[np.int64]:
        """Choose cells by their keys: of a split, of treatments (none named: the controls).

        ``key`` is the section of the config that asks, for errors.

        Raises
        ------
        EvaluationError
            If there is none.
        """
        chosen = np.ones(len(self.cells), dtype=bool)
        what = "negative controls"
        if treatments:
            compounds = self.names(COMPOUND)
            known = sorted({*compounds, *self.cells["treatment"]} - {""})
            for name in treatments:
                if name not in known:
                    raise EvaluationError(
                        f"{key}.treatments: no cell of {name!r}{nearest(name, known)}; there are "
                        f"{len(known)}: {listed(known)}"
                    )
            chosen = np.isin(compounds, treatments) | self.cells["treatment"].isin(treatments)
            what = " or ".join(treatments)
        elif self.cells["control"].any():
            chosen = self.cells["control"].to_numpy(dtype=bool)
        if split != "all":
            chosen = chosen & (self.cells["split"] == split).to_numpy()
        rows = np.flatnonzero(chosen)
        if not len(rows):
            raise EvaluationError(
                f"{key}: no cell to manipulate: none of the {len(self.cells):,} cells is one of "
                f"the {what} in split {split!r}"
            )
        return rows[np.argsort(self.keys(rows), kind="stable")[:count]]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def gather(config: Config, model: Model) -> ExploredCells:
    """Read the cells of ``explore.input``, fit what is normal among the training ones.

    Raises
    ------
    DatasetError, TableError, ColumnError
        If the input is missing, or lacks features of the model.
    EvaluationError
        If there are too few training cells to tell what is far from them.
    """
    settings = config.explore
    notes: list[str] = []
    if read_manifests(settings.input):
        dataset = open_dataset(settings.input)
        cells, values = _from_dataset(dataset, model, config)
        has_patches = dataset.patch_format.channels == model.channels
        if not has_patches:
            notes.append(
                f"the input's patches have channels {', '.join(dataset.patch_format.channels)}, "
                f"the model draws {', '.join(model.channels)}: no real cell is shown"
            )
    else:
        dataset, has_patches = None, False
        cells, values = _from_table(model, config)
    control = is_control(cells, config.scaling.control)
    cells = cells.assign(
        control=control, treatment=treatment_names(cells), split=model.splits.of(cells)
    )
    plates = texts(cells[PLATE])
    model.scaling = _extend(model.scaling, plates, control, values)
    scaled = model.scaling.apply(values, plates.tolist())
    space = Coordinates(model.features, model.scaling.clip)
    center, scale = model.scaling.center_and_scale(plates.tolist())
    coordinates = space.encode(scaled, center, scale)
    train = (cells["split"] == TRAIN).to_numpy(copy=True)
    if train.sum() < 50:
        notes.append(
            f"only {train.sum()} of the cells are of the model's training split: covariance and "
            f"distances are those of all {len(cells):,}"
        )
        train[:] = True
    guard = Guard.fit(coordinates[train], settings.outside, settings.shrinkage)
    nucleus, compartments = config.measure.nucleus_channel, tuple(config.measure.compartments)
    artist = Artist(model, space, guard, compartments, nucleus, config.run.seed)
    rows = np.argsort(cells["key"].to_numpy(), kind="stable")[:CONTRAST_CELLS]
    keys = cells["key"].to_numpy(dtype=np.uint64)[rows]
    shown = patches_of(dataset, model, keys) if dataset and has_patches else None
    if shown is None:
        shown = artist.draw(scaled[rows], keys)
    look = Look(model.channels, contrast_limits(shown), settings.pixel_size)
    kept = dataset if has_patches else None
    return ExploredCells(
        cells,
        scaled,
        coordinates,
        kept,
        artist,
        look,
        tuple(notes),
        settings.concentration_unit,
    )


def _from_dataset(
    dataset: CellDataset, model: Model, config: Config
) -> tuple[pd.DataFrame, NDArray[np.float32]]:
    settings = config.explore
    require_columns(dataset.schema.names, model.features, settings.input)
    ranges = dataset.ranges(ROW_GROUP, settings.plates or None)
    known = [decode_metadata(read_range(cells, dataset.metadata)) for cells in ranges]
    everything = pd.concat(known, ignore_index=True)
    part = np.repeat(np.arange(len(known)), [len(frame) for frame in known])
    place = np.concatenate([np.arange(len(frame)) for frame in known])
    everything = everything.assign(key=cell_keys(everything), part=part, place=place)
    chosen = _evenly(everything, settings.cells)
    frames, values = [], []
    for number, cells in enumerate(ranges):
        rows = chosen[chosen["part"] == number]
        if len(rows):
            table = read_range(cells, list(model.features)).take(pa.array(rows["place"].to_numpy()))
            frames.append(rows)
            values.append(decode_features(table, model.features))
    found = pd.concat(frames, ignore_index=True).drop(columns=["part", "place"])
    order = np.argsort(found["key"].to_numpy(), kind="stable")  # whatever files they lie in
    return found.iloc[order].reset_index(drop=True), np.concatenate(values)[order]


def _from_table(model: Model, config: Config) -> tuple[pd.DataFrame, NDArray[np.float32]]:
    settings = config.explore
    table = open_table(settings.input, metadata=config.prepare.metadata)
    frames = [table.read(plate) for plate in sorted(set(settings.plates)) or table.plates]
    frame = pd.concat(frames, ignore_index=True)
    require_columns(list(frame.columns), model.features, settings.input)
    chosen = _evenly(frame.assign(key=cell_keys(frame)), settings.cells)
    values = chosen[list(model.features)].to_numpy(dtype=np.float32)
    metadata = [name for name in map(str, chosen) if name.startswith(METADATA)]
    return chosen[[*metadata, "key"]].reset_index(drop=True), values


def _evenly(cells: pd.DataFrame, limit: int) -> pd.DataFrame:
    """Choose cells evenly over wells; which ones depends on their names alone."""
    if cells.empty:
        raise DatasetError("explore.input: no cell; see explore.plates")
    by = [name for name in (PLATE, WELL) if name in cells]
    ordered = cells.sort_values("key")
    turn = ordered.groupby(by, dropna=False).cumcount()
    chosen = ordered.assign(turn=turn).sort_values(["turn", "key"]).head(limit)
    return chosen.drop(columns="turn").sort_values("key", ignore_index=True)


def _extend(
    scaling: Scaling,
    plates: NDArray[np.object_],
    control: NDArray[np.bool_],
    values: NDArray[np.float32],
) -> Scaling:
    """Add plates that the checkpoint does not know, where they bring enough controls."""
    for plate in sorted(set(plates) - set(scaling.plates)):
        own = control & (plates == plate)
        if scaling.takes(int(own.sum())):
            scaling = scaling.with_plate(str(plate), values[own])
    return scaling


def match_features(patterns: Sequence[str], features: Sequence[str], key: str) -> list[str]:
    """Return the features that names or patterns (``Nuclei_AreaShape_*``) choose, in their order.

    Raises
    ------
    ColumnError
        If one chooses none, with the nearest name.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        names = [name for name in features if fnmatchcase(name, pattern)]
        if not names:
            raise ColumnError(
                f"{key}: {pattern!r} is no feature of the checkpoint{nearest(pattern, features)}; "
                f"it has {len(features)} (near-duplicates and constants were left out in training, "
                "see 'left_out' in checkpoint.json)"
            )
        found |= dict.fromkeys(names)
    return list(found)


def group_names(explored: ExploredCells, by: str) -> NDArray[np.object_]:
    """Return the group of each cell: its well, treatment, mechanism or plate."""
    if by == "treatment":
        return explored.cells["treatment"].to_numpy(dtype=object)
    if by == "well":
        pairs = zip(explored.names(PLATE), explored.names(WELL), strict=True)
        return np.array([f"{plate} {well}" for plate, well in pairs], dtype=object)
    return explored.names({"moa": MOA, "plate": PLATE}[by])
