import json

import numpy as np
import pandas as pd
import pytest

from cp2image.config_train import Split
from cp2image.data.identity import treatment_names
from cp2image.data.splits import Splits, assign_splits, fit_splits
from cp2image.errors import CheckpointError, ColumnError, ConfigError, DatasetError


def screen(plates=6, wells=24, cells=8, treatments=10):
    rows = []
    for plate in range(plates):
        for well in range(wells):
            treatment = (well + 5 * plate) % treatments
            rows += [
                (f"P{plate}", f"W{well:02d}", 1, well, cell, f"c{treatment % 4}", treatment / 10)
                for cell in range(cells)
            ]
    names = ["Plate", "Well", "Site", "ImageNumber", "ObjectNumber", "Compound", "Concentration"]
    return pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names])


SCREEN = screen()
UNITS = {
    "well": ["Metadata_Plate", "Metadata_Well"],
    "plate": ["Metadata_Plate"],
    "cell": ["Metadata_Plate", "Metadata_Well", "Metadata_ImageNumber", "Metadata_ObjectNumber"],
}
BY = pytest.mark.parametrize("by", ["well", "plate", "cell"])


@BY
def test_no_unit_is_in_two_splits(by):
    cells = SCREEN.assign(split=assign_splits(SCREEN, Split(by=by), 0))
    assert (cells.groupby(UNITS[by])["split"].nunique() == 1).all()


@BY
def test_shares_are_met_to_the_unit(by):
    split = Split(by=by, validation=0.2, test=0.1)
    cells = SCREEN.assign(split=assign_splits(SCREEN, split, 0)).drop_duplicates(UNITS[by])
    counts, units = cells["split"].value_counts(), len(cells)
    assert abs(counts["validation"] - 0.2 * units) <= 1
    assert abs(counts["test"] - 0.1 * units) <= 1


@pytest.mark.parametrize("by", ["well", "cell"])
def test_each_treatment_gets_its_share_to_within_one_unit(by):
    split = Split(by=by, validation=0.2, test=0.1)
    cells = SCREEN.assign(split=assign_splits(SCREEN, split, 3), treatment=treatment_names(SCREEN))
    units = cells.drop_duplicates(UNITS[by])
    for _, mine in units.groupby("treatment"):
        assert abs((mine["split"] == "validation").sum() - 0.2 * len(mine)) <= 1
        assert abs((mine["split"] == "test").sum() - 0.1 * len(mine)) <= 1


@BY
def test_row_order_and_repeated_rows_change_nothing(by):
    shuffled = pd.concat([SCREEN, SCREEN[::3]]).sample(frac=1, random_state=1)
    expected = assign_splits(SCREEN, Split(by=by), 0)
    found = assign_splits(shuffled, Split(by=by), 0)
    assert (found == expected[found.index]).all()


def test_one_row_per_group_gives_the_same_wells_as_one_row_per_cell():
    names = ["Metadata_Plate", "Metadata_Well", "Metadata_Compound", "Metadata_Concentration"]
    groups = SCREEN[names].drop_duplicates()
    assert fit_splits(groups, Split(), 5) == fit_splits(SCREEN, Split(), 5)


@BY
def test_another_seed_gives_another_split(by):
    split = Split(by=by, validation=0.4)
    one, other = (assign_splits(SCREEN, split, seed) for seed in (0, 1))
    assert (one != other).any()


@BY
@pytest.mark.parametrize("seed", range(5))
def test_treatment_with_two_units_keeps_one_in_training(by, seed):
    cells = screen(plates=5, wells=4, cells=1, treatments=8)
    split = Split(by=by, validation=0.45, test=0.45)
    cells = cells.assign(split=assign_splits(cells, split, seed), treatment=treatment_names(cells))
    for _, mine in cells.groupby("treatment"):
        units = mine.drop_duplicates(UNITS[by])
        assert len(units) < 2 or (units["split"] == "train").any()


@pytest.mark.parametrize("seed", range(3))
def test_large_treatment_does_not_pay_for_what_small_ones_could_not_give(seed):
    cells = pd.DataFrame({"Metadata_Plate": "P", "Metadata_Well": [f"W{i}" for i in range(130)]})
    cells["Metadata_Compound"] = [f"c{i // 2}" if i < 80 else "DMSO" for i in range(130)]
    splits = assign_splits(cells, Split(validation=0.4, test=0.4), seed)
    assert 10 - 4 <= (splits[80:] == "train").sum() <= 10 + 4


def test_held_out_plates_are_held_out_whole_and_the_others_divided():
    split = Split(validation_plates=["P1"], test_plates=["P2", "P4"])
    cells = SCREEN.assign(split=assign_splits(SCREEN, split, 0))
    by_plate = cells.groupby("Metadata_Plate")["split"].agg(set)
    assert by_plate["P1"] == {"validation"}
    assert by_plate["P2"] == by_plate["P4"] == {"test"}
    assert {"train", "validation", "test"} <= by_plate["P0"] | by_plate["P3"] | by_plate["P5"]


def test_held_out_plates_alone_when_the_shares_are_zero():
    split = Split(by="plate", validation=0, test=0, test_plates=["P2"])
    cells = SCREEN.assign(split=assign_splits(SCREEN, split, 0))
    assert (cells["split"] == np.where(cells["Metadata_Plate"] == "P2", "test", "train")).all()


def test_small_share_still_gets_a_unit():
    cells = screen(plates=3, wells=4, cells=1)
    splits = assign_splits(cells, Split(by="plate", validation=0.1, test=0.1), 0)
    assert set(splits) == {"train", "validation", "test"}


def test_missing_treatment_columns_make_one_stratum():
    bare = SCREEN.drop(columns=["Metadata_Compound", "Metadata_Concentration"])
    wells = bare.assign(split=assign_splits(bare, Split(), 0)).drop_duplicates(UNITS["well"])
    assert wells["split"].value_counts()["test"] == round(0.1 * len(wells))


@BY
def test_splits_answer_alike_after_a_trip_through_json(by):
    splits = fit_splits(SCREEN, Split(by=by), 0)
    again = Splits.from_json(json.loads(json.dumps(splits.to_json())))
    assert again == splits
    np.testing.assert_array_equal(again.of(SCREEN[::-1]), splits.of(SCREEN)[::-1])


@BY
def test_plates_that_were_not_there_are_unseen(by):
    splits = fit_splits(SCREEN, Split(by=by), 0)
    other = SCREEN[:10].assign(Metadata_Plate="P99")
    assert set(splits.of(other)) == {"unseen"}


def test_well_that_was_not_there_is_unseen():
    splits = fit_splits(SCREEN, Split(), 0)
    assert set(splits.of(SCREEN[:3].assign(Metadata_Well="Z99"))) == {"unseen"}


def test_treatment_that_was_not_there_is_unseen_by_cell():
    splits = fit_splits(SCREEN, Split(by="cell"), 0)
    assert set(splits.of(SCREEN[:3].assign(Metadata_Compound="new"))) == {"unseen"}


def test_plate_named_by_a_number_is_held_out_by_its_text():
    cells = SCREEN.assign(Metadata_Plate=SCREEN["Metadata_Plate"].str[1:].astype(int))
    splits = assign_splits(cells, Split(test_plates=["3"]), 0)
    assert set(splits[cells["Metadata_Plate"] == 3]) == {"test"}


@pytest.mark.parametrize(
    ("split", "error", "message"),
    [
        ({"test_plates": ["P1a"]}, ConfigError, r"split.test_plates: no plate 'P1a'.*'P1'"),
        (
            {"validation_plates": ["P1"], "test_plates": ["P1"]},
            ConfigError,
            "'P1' is held out twice",
        ),
        ({"validation": 0.8, "test": 0.3}, ConfigError, r"is 1\.1; expected at most 1"),
        ({"test_plates": [f"P{i}" for i in range(6)]}, DatasetError, "6 of 6 plates held out"),
    ],
)
def test_impossible_wishes_are_refused(split, error, message):
    with pytest.raises(error, match=message):
        fit_splits(SCREEN, Split(**split), 0)


def test_shares_that_leave_nothing_for_training_are_refused():
    cells = screen(plates=1, wells=4, treatments=100)
    with pytest.raises(DatasetError, match="no cells are left for training: 4 well"):
        fit_splits(cells, Split(validation=0.5, test=0.5), 0)


def test_cells_without_numbers_cannot_be_split_by_cell():
    with pytest.raises(ColumnError, match="Metadata_ObjectNumber"):
        fit_splits(SCREEN.drop(columns="Metadata_ObjectNumber"), Split(by="cell"), 0)


def test_damaged_json_is_refused():
    data = fit_splits(SCREEN, Split(), 0).to_json()
    del data["wells"]
    with pytest.raises(CheckpointError, match="wells"):
        Splits.from_json(data)


def test_real_screen_keeps_every_treatment_of_two_wells_in_training(shared_data):
    cells = pd.read_csv(shared_data / "bbbc021" / "cells.csv").rename(
        columns={
            "plate": "Metadata_Plate",
            "well": "Metadata_Well",
            "compound": "Metadata_Compound",
            "concentration": "Metadata_Concentration",
        }
    )
    cells = cells.assign(split=assign_splits(cells, Split(), 0), treatment=treatment_names(cells))
    wells = cells.drop_duplicates(UNITS["well"])
    trains = wells.groupby("treatment")["split"].agg(lambda splits: (splits == "train").any())
    assert trains[wells.groupby("treatment").size() > 1].all()
    assert abs((wells["split"] == "test").mean() - 0.1) < 0.02
