import numpy as np
import pandas as pd
import pytest

from cp2image.errors import EvaluationError
from cp2image.metrics.moa import match_moa, treatment_profiles


def cells(rows):
    names = ["Plate", "Well", "Compound", "Concentration", "MOA"]
    return pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names])


def test_treatment_is_the_median_of_its_wells_means_relative_to_the_plates_controls():
    table = cells(
        [
            ("P1", "A01", "DMSO", 0.0, "DMSO"),
            ("P1", "A01", "DMSO", 0.0, "DMSO"),
            ("P1", "A02", "taxol", 0.3, "stabiliser"),
            ("P1", "A02", "taxol", 0.3, "stabiliser"),
            ("P1", "A03", "taxol", 0.3, "stabiliser"),
            ("P2", "A02", "taxol", 0.3, "stabiliser"),
            ("P2", "A02", "taxol", 1.0, "stabiliser"),
            ("P2", "A04", "unknown", 1.0, None),
        ]
    )
    vectors = np.array([1.0, 3, 5, 9, 30, 14, 20, 99])[:, None]
    found = treatment_profiles(vectors, table, table["Metadata_Compound"].eq("DMSO").to_numpy())
    # P1 is taken from its controls' mean 2, P2 (without controls) from that of all controls.
    assert found.profiles[:, 0].tolist() == [np.median([7 - 2, 30 - 2, 14 - 2]), 18.0]
    assert found.compounds == ("taxol", "taxol")
    assert found.plates == (frozenset({"P1", "P2"}), frozenset({"P2"}))
    assert found.cells == (4, 1)


def test_neighbours_of_the_same_compound_and_batch_do_not_count():
    profiles = np.array([[1.0, 0.0], [1.0, 0.01], [0.9, 0.3], [0.0, 1.0], [0.3, 0.9]])
    compounds = ["a", "a", "b", "c", "d"]
    moas = ["x", "x", "x", "y", "y"]
    found = match_moa(profiles, compounds, moas)
    assert (found.accuracy, found.treatments, found.unmatched) == (1.0, 5, 0)
    # b is alone with x's other compound in a batch: its nearest of another batch is d.
    strict = match_moa(profiles, compounds, moas, [["1"], ["1"], ["1"], ["2"], ["3"]])
    assert strict.unmatched == 3
    assert strict.accuracy == 1.0
    moved = match_moa(profiles, compounds, ["x", "x", "y", "y", "y"])
    assert moved.predicted == ("y", "y", "x") or moved.treatments == 3
    assert moved.accuracy < 1


def test_confusion_counts_truth_by_rows():
    profiles = np.eye(4)[[0, 0, 1, 1]] + 0.01
    found = match_moa(profiles, ["a", "b", "c", "d"], ["x", "y", "x", "y"])
    assert found.accuracy == 0
    assert found.confusion().loc["x", "y"] == 2
    assert found.confusion().to_numpy().sum() == 4


def test_nothing_to_match_is_not_a_perfect_score():
    found = match_moa(np.eye(2), ["a", "b"], ["x", "y"])
    assert np.isnan(found.accuracy)
    assert found.unmatched == 2
    assert match_moa(np.empty((0, 3)), [], []).treatments == 0


def test_lengths_and_columns_are_checked():
    with pytest.raises(EvaluationError, match="2 profiles, 1 compounds"):
        match_moa(np.eye(2), ["a"], ["x", "y"])
    with pytest.raises(EvaluationError, match="Metadata_MOA"):
        treatment_profiles(
            np.eye(2), cells([]).drop(columns="Metadata_MOA"), np.zeros(2, dtype=bool)
        )
