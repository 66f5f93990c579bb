"""Scale features against the negative control of a plate or of all. Floor 1: numpy and pandas.

Per plate, the median and MAD · 1.4826 of its control cells, as pycytominer's ``mad_robustize``
with ``samples`` = the controls and ``mad_robustize_epsilon`` = 0. Plates come one after another
and a bounded sample of each is kept, so memory does not grow with the number of cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import COMPOUND, nearest
from cp2image.config_train import Scaling as ScalingConfig
from cp2image.data.identity import Words, texts
from cp2image.data.keyed_sample import KeyedSample
from cp2image.data.spread import Spread, global_row, plate_row, spread_of
from cp2image.errors import CheckpointError, ColumnError, DatasetError
from cp2image.kernel import compile_kernel

Values = NDArray[np.floating]

MAX_GLOBAL = 20_000
"""Cells of all plates together that the global scaling is computed from."""
_CHUNK, _TILE = 2_064, 32
"""Cells and features scaled at a time: what fits in a cache, rows not a power of two apart."""


def is_control(frame: pd.DataFrame, control: Mapping[str, str]) -> NDArray[np.bool_]:
    """Say which cells are negative controls.

    Parameters
    ----------
    frame
        N cells with their ``Metadata_*`` columns.
    control
        Column → value, as ``{"Metadata_Compound": "DMSO"}``; all must hold. Whole numbers are
        compared as such: ``"0"`` is 0.0.

    Returns
    -------
    NDArray[np.bool_]
        Shape (N,); all False where the table has no ``Metadata_Compound`` and it is asked for.

    Raises
    ------
    ColumnError
        If another column is missing.
    """
    chosen = np.full(len(frame), bool(control))
    for name, wanted in control.items():
        if name not in frame:
            if name == COMPOUND:
                return np.zeros(len(frame), dtype=bool)
            raise ColumnError(
                f"scaling.control: the cells have no column {name!r}{nearest(name, frame.columns)}"
            )
        value = texts(pd.Series([wanted], dtype=object), whole_numbers=True)[0]
        chosen &= texts(frame[name], whole_numbers=True) == value
    return chosen


@compile_kernel
def _scale(
    block: Values,
    start: int,
    first: int,
    rows: NDArray[np.int64],
    center: NDArray[np.float64],
    scale: NDArray[np.float64],
    clip: float,
    scaled: NDArray[np.float32],
) -> None:
    """Fill a part of ``scaled`` (cells, columns), cells from ``start``, columns from ``first``.

    ``block`` has a row per column; values that are not finite become 0.
    """
    for i in range(min(block.shape[1], scaled.shape[0] - start)):
        row = rows[start + i]
        for k in range(min(block.shape[0], scaled.shape[1] - first)):
            value = np.float64(block[k, i])
            found = (value - center[row, first + k]) / scale[row, first + k]
            found = clip if found > clip else found
            found = -clip if found < -clip else found
            scaled[start + i, first + k] = found if value - value == 0.0 else 0.0


@dataclass(frozen=True)
class Scaling:
    """A centre and a scale per plate and feature, and one of each for unknown plates.

    Attributes
    ----------
    features
        Names of the p features, in the model's order.
    plates
        Names of the P plates that rows 0 to P - 1 belong to; the last row is the global one.
    center, scale
        Shape (P + 1, p); the scale is > 0.
    clip
        Limit of the scaled values.
    min_controls
        Cells needed to scale a plate's feature by the plate itself.
    per_plate
        Whether plates are scaled by themselves at all; if not, P is 0.
    notes
        What was done other than by default, a sentence each.
    """

    features: tuple[str, ...]
    plates: tuple[str, ...]
    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    clip: float
    min_controls: int = 25
    per_plate: bool = True
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check shapes and values."""
        shape = (len(self.plates) + 1, len(self.features))
        if self.center.shape != shape or self.scale.shape != shape:
            raise CheckpointError(
                f"scaling of {shape[0] - 1} plates and {shape[1]} features needs arrays of shape "
                f"{shape}, found center {self.center.shape} and scale {self.scale.shape}"
            )
        if len(set(self.plates)) < len(self.plates):
            raise CheckpointError("scaling names a plate more than once")
        if not (np.isfinite(self.center).all() and np.isfinite(self.scale).all()):
            raise CheckpointError("scaling holds values that are not finite; fit it again")
        if not ((self.scale > 0).all() and self.clip > 0):
            raise CheckpointError("scaling holds a scale or clip that is not positive")

    def apply(self, values: Values, plates: Sequence[str]) -> NDArray[np.float32]:
        """Scale cells, each by its plate.

        Parameters
        ----------
        values
            Shape (N, p), columns in the order of `features`.
        plates
            Plate of each cell, length N; unknown ones are scaled by the global row.

        Returns
        -------
        NDArray[np.float32]
            Shape (N, p), in ± `clip`; NaN and infinite values become 0, the control's median.

        Raises
        ------
        DatasetError
            If the shapes do not fit.
        """
        if values.shape != (len(plates), len(self.features)):
            raise DatasetError(
                f"values of shape {values.shape} for {len(plates)} cells; "
                f"expected {len(self.features)} features in the scaling's order"
            )
        return self.apply_columns(list(values.T), plates)

    def apply_columns(
        self, columns: Sequence[Values], plates: Sequence[str]
    ) -> NDArray[np.float32]:
        """Scale cells that lie column by column, as tables do; see `apply`.

        Parameters
        ----------
        columns
            p arrays of N values, in the order of `features`.
        plates
            Plate of each cell, length N.

        Raises
        ------
        DatasetError
            If the numbers do not fit.
        """
        if len(columns) != len(self.features) or any(len(c) != len(plates) for c in columns):
            raise DatasetError(
                f"{len(columns)} columns for {len(plates)} cells; expected "
                f"{len(self.features)} features in the scaling's order, a value for each cell"
            )
        rows = self._rows(plates)
        scaled = np.empty((len(plates), len(columns)), dtype=np.float32)
        kind = np.result_type(np.float32, *{column.dtype for column in columns})
        block = np.empty((_TILE, _CHUNK), dtype=kind)
        for start in range(0, len(plates), _CHUNK):
            for first in range(0, len(columns), _TILE):
                for line, column in zip(block, columns[first : first + _TILE], strict=False):
                    part = column[start : start + _CHUNK]
                    line[: len(part)] = part
                _scale(block, start, first, rows, self.center, self.scale, self.clip, scaled)
        return scaled

    def center_and_scale(
        self, plates: Sequence[str]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the centre and scale of each plate's features, (N, p) each.

        A value in a feature's own units is centre + scale · scaled value.
        """
        rows = self._rows(plates)
        return self.center[rows], self.scale[rows]

    def takes(self, controls: int) -> bool:
        """Say whether so many controls of a plate not known yet should scale it themselves."""
        return self.per_plate and controls >= self.min_controls

    def with_plate(self, plate: str, controls: Values) -> "Scaling":
        """Add a plate that was not in training, from its own controls.

        Parameters
        ----------
        plate
            A new name.
        controls
            Control cells of the plate, shape (n, p), in the order of `features`; any n.

        Raises
        ------
        DatasetError
            If the plate is there already, plates are not scaled by themselves, or the columns do
            not fit.
        """
        if not self.per_plate:
            raise DatasetError(f"plate {plate!r}: this scaling is the whole screen's (scaling.by)")
        if plate in self.plates:
            raise DatasetError(f"plate {plate!r} has a scaling already; use it or another name")
        _check_width(controls, self.features, plate)
        center, scale, note = plate_row(
            plate, spread_of(controls), self.center[-1], self.scale[-1], self.min_controls
        )
        return replace(
            self,
            plates=(*self.plates, plate),
            center=np.vstack([self.center[:-1], center, self.center[-1]]),
            scale=np.vstack([self.scale[:-1], scale, self.scale[-1]]),
            notes=(*self.notes, *note),
        )

    def to_tensors(self) -> dict[str, NDArray[np.float64]]:
        """Return the arrays, for safetensors; `describe` has the rest.

        In C order: safetensors stores the memory as it lies, whatever the strides say.
        """
        arrays = {"center": self.center, "scale": self.scale}
        return {name: np.ascontiguousarray(values) for name, values in arrays.items()}

    def describe(self) -> dict[str, Any]:
        """Return everything but the arrays, as JSON can hold it."""
        return {
            "features": list(self.features),
            "plates": list(self.plates),
            "clip": self.clip,
            "min_controls": self.min_controls,
            "per_plate": self.per_plate,
            "notes": list(self.notes),
        }

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, NDArray[np.float64]], description: Mapping[str, Any]
    ) -> "Scaling":
        """Restore what `to_tensors` and `describe` returned.

        Raises
        ------
        CheckpointError
            If a part is missing or they do not fit each other.
        """
        try:
            return cls(
                features=tuple(description["features"]),
                plates=tuple(description["plates"]),
                center=np.array(tensors["center"], dtype=np.float64),
                scale=np.array(tensors["scale"], dtype=np.float64),
                clip=float(description["clip"]),
                min_controls=int(description["min_controls"]),
                per_plate=bool(description.get("per_plate", True)),
                notes=tuple(description["notes"]),
            )
        except KeyError as error:
            raise CheckpointError(f"scaling has no {error}; the checkpoint is damaged") from error

    def _rows(self, plates: Sequence[str]) -> NDArray[np.int64]:
        known = {plate: row for row, plate in enumerate(self.plates)}
        codes, distinct = pd.factorize(np.asarray(plates, dtype=object))
        rows = [known.get(str(plate), len(known)) for plate in distinct]
        return np.array([*rows, len(known)], dtype=np.int64)[codes]


class ScalingFit:
    """Fit a `Scaling` plate by plate; what is kept does not grow with the cells of a plate.

    Parameters
    ----------
    features
        Names of the p features, as selected.
    config
        The config's section: ``min_controls`` and ``clip``.
    per_plate
        Scale each plate by its own controls; if not, all by those of all plates.
    """

    def __init__(
        self, features: Sequence[str], config: ScalingConfig, *, per_plate: bool = True
    ) -> None:
        self.features = tuple(features)
        self._config, self._per_plate = config, per_plate
        self._spreads: dict[str, Spread] = {}
        self._controls = KeyedSample(len(self.features), MAX_GLOBAL)
        self._cells = KeyedSample(len(self.features), MAX_GLOBAL)

    def add_plate(
        self,
        plate: str,
        controls: Values,
        keys: Words,
        others: Values | None = None,
        other_keys: Words | None = None,
    ) -> None:
        """Add one plate's training cells, all at once.

        Of more than `MAX_CONTROLS` controls, those with the smallest keys are used; a caller
        that reads a plate in blocks gathers them in a `KeyedSample` and gives its content.

        Parameters
        ----------
        plate
            Its name, new.
        controls
            Negative controls, shape (n, p), n may be 0.
        keys
            Their `cell_keys`, shape (n,).
        others, other_keys
            The plate's other training cells, or a sample of them. Needed where the screen has
            no controls; also the last resort for features without spread in the controls.

        Raises
        ------
        DatasetError
            If the plate came before or the columns do not fit.
        """
        if plate in self._spreads:
            raise DatasetError(f"plate {plate!r} was added twice; give all its cells at once")
        _check_width(controls, self.features, plate)
        sample = KeyedSample(len(self.features))
        sample.add(keys, controls)
        self._spreads[plate] = spread_of(sample.values)
        self._controls.add(sample.keys, sample.values)
        self._cells.add(sample.keys, sample.values)
        if others is not None and other_keys is not None:
            _check_width(others, self.features, plate)
            self._cells.add(other_keys, others)

    def finish(self) -> Scaling:
        """Return the scaling: of all plates, in the order of their names, and the global one.

        Raises
        ------
        DatasetError
            If no cell was added.
        """
        notes: list[str] = []
        sample = self._controls
        if sample.seen < self._config.min_controls:
            sample = self._cells
            notes.append(
                f"{self._controls.seen} control cells in the screen, fewer than "
                f"{self._config.min_controls}: the global scaling is that of all training cells"
            )
        if not len(sample.keys):
            raise DatasetError(
                "no cells to fit the scaling on; check split and scaling.control, or give the "
                "other cells of each plate"
            )
        center, scale, note = global_row(self.features, sample.values, self._cells.values)
        notes += note
        centers, scales = [], []
        own = sorted(self._spreads) if self._per_plate else []
        for plate in own:
            row, width, note = plate_row(
                plate, self._spreads[plate], center, scale, self._config.min_controls
            )
            centers.append(row)
            scales.append(width)
            notes += note
        return Scaling(
            features=self.features,
            plates=tuple(own),
            center=np.vstack([*centers, center]),
            scale=np.vstack([*scales, scale]),
            clip=self._config.clip,
            min_controls=self._config.min_controls,
            per_plate=self._per_plate,
            notes=tuple(notes),
        )


def _check_width(values: Values, features: Sequence[str], plate: str) -> None:
    if values.ndim != 2 or values.shape[1] != len(features):
        raise DatasetError(
            f"plate {plate}: values of shape {values.shape}, expected (cells, {len(features)})"
        )
