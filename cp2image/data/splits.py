"""Divide cells into training, validation and test. Floor 1: numpy and pandas.

Cells of one field look alike, so the unit is the well or the plate; the cell only to match the
paper. Which unit goes where depends on the names and the seed alone, not on the order of rows.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import IDENTITY, PLATE, WELL, nearest, require_columns
from cp2image.config_train import Split
from cp2image.data.identity import (
    Words,
    cell_keys,
    cell_seeds,
    text_keys,
    texts,
    treatment_names,
)
from cp2image.errors import CheckpointError, ConfigError, DatasetError

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
UNSEEN = "unseen"
"""What `Splits.of` says of units that were not there when the splits were made."""
_DOMAIN = 0x73706C697473


@dataclass(frozen=True)
class Splits:
    """Where each unit went: small enough for a checkpoint, and an answer for any table.

    Attributes
    ----------
    by
        The unit.
    seed
        The run's.
    plates
        Every plate → its split, or None where the plate is divided by well or cell.
    wells
        By well: plate → split → its wells.
    thresholds
        By cell: treatment → two 64-bit numbers in hexadecimal. A cell whose seed is below the
        first validates, below the second tests, else trains.
    """

    by: Literal["well", "plate", "cell"]
    seed: int
    plates: dict[str, str | None]
    wells: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    thresholds: dict[str, tuple[str, str]] = field(default_factory=dict)

    def of(self, frame: pd.DataFrame) -> NDArray[np.object_]:
        """Say which split each row belongs to.

        Parameters
        ----------
        frame
            N rows of cells, with ``Metadata_Plate``; by well also ``Metadata_Well``; by cell
            the whole identity and the treatment's columns.

        Returns
        -------
        NDArray[np.object_]
            Shape (N,): "train", "validation", "test", or "unseen" for plates, wells and (by
            cell) treatments that were not there when the splits were made.

        Raises
        ------
        ColumnError
            If a column is missing.
        """
        require_columns(list(frame.columns), _needed(self.by), "split of the cells")
        plates = texts(frame[PLATE])
        answers = np.array([self.plates.get(plate, UNSEEN) for plate in plates], dtype=object)
        divided = np.array([answer is None for answer in answers], dtype=bool)
        if divided.any():
            rows = frame.loc[divided]
            by_well = self.by == "well"
            answers[divided] = self._by_well(rows) if by_well else self._by_cell(rows)
        return answers

    def to_json(self) -> dict[str, Any]:
        """Return the splits as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Splits":
        """Restore what `to_json` returned.

        Raises
        ------
        CheckpointError
            If a part is missing.
        """
        try:
            thresholds = {name: (a, b) for name, (a, b) in data["thresholds"].items()}
            return cls(data["by"], data["seed"], data["plates"], data["wells"], thresholds)
        except KeyError as error:
            raise CheckpointError(f"splits have no {error}; the checkpoint is damaged") from error

    def _by_well(self, frame: pd.DataFrame) -> list[str]:
        where = {
            (plate, well): split
            for plate, splits in self.wells.items()
            for split, wells in splits.items()
            for well in wells
        }
        units = zip(texts(frame[PLATE]), texts(frame[WELL]), strict=True)
        return [where.get(unit, UNSEEN) for unit in units]

    def _by_cell(self, frame: pd.DataFrame) -> NDArray[np.object_]:
        codes, names = pd.factorize(treatment_names(frame))
        known = np.array([name in self.thresholds for name in names], dtype=bool)[codes]
        limits = [self.thresholds.get(name, ("0", "0")) for name in names]
        below = np.array([[int(text, 16) for text in pair] for pair in limits], dtype=np.uint64)
        seeds = cell_seeds(cell_keys(frame), self.seed ^ _DOMAIN)
        answers = np.full(len(frame), TRAIN, dtype=object)
        answers[seeds < below[codes, 1]] = TEST
        answers[seeds < below[codes, 0]] = VALIDATION
        answers[~known] = UNSEEN
        return answers


def fit_splits(cells: pd.DataFrame, split: Split, seed: int) -> Splits:
    """Divide the units among the splits, evenly over treatments.

    Plates named in the config are held out whole; the shares apply to the others. Units are
    dealt treatment by treatment, in an order that the seed sets, and what rounding leaves owing
    to a split, up to one unit, is carried to the next treatment: the shares are met over the
    screen and nearly so in each treatment. A treatment with two or more units keeps one in
    training, whatever the shares. Of three or more units, a share above 0 gets one if it can.
    Plates carry many treatments, so by plate they are dealt as one stratum.

    Parameters
    ----------
    cells
        One row per cell, or by well and plate one per (plate, well, compound, concentration);
        without columns for the treatment all cells are one stratum.
    split
        The config's section.
    seed
        The run's.

    Raises
    ------
    ColumnError
        If a column is missing.
    ConfigError
        If a held-out plate is unknown or named twice, or the shares exceed 1.
    DatasetError
        If no cell is left for training.
    """
    require_columns(list(cells.columns), _needed(split.by), f"cells to split by {split.by}")
    if split.validation + split.test > 1:
        raise ConfigError(
            f"split.validation + split.test is {split.validation + split.test:g}; "
            "expected at most 1, as 0.1 + 0.1"
        )
    plates = texts(cells[PLATE])
    held_out = _held_out(split, sorted(set(plates)))
    free = cells.loc[[plate not in held_out for plate in plates]]
    if not len(free):
        raise DatasetError(
            f"no cells are left for training: {len(cells)} rows, {len(held_out)} of "
            f"{len(set(plates))} plates held out; name fewer plates in split"
        )
    known: dict[str, str | None] = dict.fromkeys(sorted(set(plates)))
    known.update(held_out)
    if split.by == "cell":
        return Splits(split.by, seed, known, thresholds=_deal_cells(free, split, seed))
    dealt = _deal_groups(free, split, seed)
    if split.by == "plate":
        known.update({plate: where for (plate,), where in dealt.items()})
        return Splits(split.by, seed, known)
    wells: dict[str, dict[str, list[str]]] = {}
    for (plate, well), where in sorted(dealt.items()):
        wells.setdefault(plate, {}).setdefault(where, []).append(well)
    return Splits(split.by, seed, known, wells)


def assign_splits(cells: pd.DataFrame, split: Split, seed: int) -> "pd.Series[str]":
    """Return the split of each row of ``cells``, with its index; see `fit_splits`."""
    return pd.Series(fit_splits(cells, split, seed).of(cells), index=cells.index, name="split")


def _needed(by: str) -> Sequence[str]:
    return {"plate": (PLATE,), "well": (PLATE, WELL), "cell": IDENTITY}[by]


def _held_out(split: Split, plates: Sequence[str]) -> dict[str, str]:
    held_out: dict[str, str] = {}
    named = ((VALIDATION, split.validation_plates), (TEST, split.test_plates))
    for where, names in named:
        for name in names:
            if name not in plates:
                raise ConfigError(
                    f"split.{where}_plates: no plate {name!r} among the {len(plates)} plates"
                    f"{nearest(name, plates)}"
                )
            if name in held_out:
                raise ConfigError(f"split: plate {name!r} is held out twice; name it once")
            held_out[name] = where
    return held_out


def _deal_groups(cells: pd.DataFrame, split: Split, seed: int) -> dict[tuple[str, ...], str]:
    """Deal wells or plates: unit → split."""
    columns = [texts(cells[PLATE])] + ([texts(cells[WELL])] if split.by == "well" else [])
    found: dict[tuple[str, ...], set[str]] = {}
    for unit, treatment in set(
        zip(zip(*columns, strict=True), treatment_names(cells), strict=True)
    ):
        found.setdefault(unit, set()).add(treatment)
    units = sorted(found)
    members = [tuple(sorted(found[unit])) for unit in units]
    strata = [names[0] if split.by == "well" else "" for names in members]
    hashes = _unit_hashes(units, seed)
    dealt = _deal(strata, hashes, members, split, seed)
    return dict(zip(units, dealt, strict=True))


def _unit_hashes(units: Sequence[tuple[str, ...]], seed: int) -> Words:
    columns = [np.array(names, dtype=object) for names in zip(*units, strict=True)]
    return cell_seeds(text_keys(columns), seed ^ _DOMAIN)


def _deal_cells(cells: pd.DataFrame, split: Split, seed: int) -> dict[str, tuple[str, str]]:
    """Deal cells: treatment → the seeds below which they validate and test."""
    hashes, first = np.unique(cell_seeds(cell_keys(cells), seed ^ _DOMAIN), return_index=True)
    treatments = treatment_names(cells)[first]
    members = [(name,) for name in treatments]
    dealt = np.array(_deal(treatments, hashes, members, split, seed), dtype=object)
    thresholds = {}
    for name in sorted(set(treatments)):
        mine = treatments == name
        validates = _above(hashes[mine & (dealt == VALIDATION)])
        tests = max(validates, _above(hashes[mine & (dealt == TEST)]))
        thresholds[name] = (f"{validates:016x}", f"{tests:016x}")
    return thresholds


def _above(hashes: Words) -> int:
    return min(int(hashes.max()) + 1, 2**64 - 1) if len(hashes) else 0


def _deal(
    strata: Iterable[str],
    hashes: Words,
    members: Sequence[tuple[str, ...]],
    split: Split,
    seed: int,
) -> list[str]:
    """Return each unit's split; validation takes a stratum's lowest hashes, then test."""
    dealt = [TRAIN] * len(members)
    by_stratum: dict[str, list[int]] = {}
    for index, stratum in enumerate(strata):
        by_stratum.setdefault(stratum, []).append(index)
    names = sorted(by_stratum)
    order = np.argsort(_unit_hashes([(name,) for name in names], seed), kind="stable")
    training = Counter(name for unit in members for name in unit)
    protected = {name for name, number in training.items() if number > 1}
    shares = {VALIDATION: split.validation, TEST: split.test}
    if len(members) > len(shares):
        shares = {where: max(s, 1 / len(members)) if s else 0.0 for where, s in shares.items()}
    owed = dict.fromkeys(shares, 0.0)
    for stratum in order:
        units = sorted(by_stratum[names[stratum]], key=lambda index: hashes[index])
        for where, share in shares.items():
            owed[where] += share * len(units)
        waiting = iter(units)
        for where in shares:
            while round(owed[where], 9) >= 0.5:
                unit = next(waiting, None)
                if unit is None:
                    break
                if any(name in protected and training[name] < 2 for name in members[unit]):
                    continue
                training.subtract(members[unit])
                dealt[unit] = where
                owed[where] -= 1
            owed[where] = min(owed[where], 1.0)
    if TRAIN not in dealt:
        raise DatasetError(
            f"no cells are left for training: {len(members)} {split.by}(s) to divide with "
            f"split.validation={split.validation:g} and split.test={split.test:g}; "
            "lower the shares or give more data"
        )
    return dealt
