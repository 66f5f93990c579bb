import numpy as np
import pandas as pd
import pytest

from cp2image.config import Config
from cp2image.evaluation_scores import Scores, _score_moa, consistency


def test_settled_features_agree_over_draws_and_free_ones_differ_as_cells_do():
    rng = np.random.default_rng(0)
    settled, free, angle = rng.normal(100, 10, (3, 500))
    names = ["Nuclei_AreaShape_Area", "Cells_Texture_Contrast_DNA", "Nuclei_AreaShape_Orientation"]
    real = pd.DataFrame(np.stack([settled, free, angle], axis=1), columns=names)
    rows = np.arange(0, 500, 2)
    draws = []
    for _ in range(6):
        drawn = np.stack([settled, rng.normal(100, 10, 500), angle], axis=1)[rows]
        drawn[:, 0] += rng.normal(0, 0.5, len(rows))
        draws.append(pd.DataFrame(drawn, columns=names))
    draws[2].iloc[5] = np.nan  # no nucleus was found in one draw
    found = consistency(real, draws, rows)
    assert list(found.index) == names[:2]
    assert found.loc[names[0], "relative"] == pytest.approx(0.05, rel=0.15)
    assert found.loc[names[1], "relative"] == pytest.approx(1.0, rel=0.15)
    assert found.loc[names[0], "r"] > 0.99
    assert abs(found.loc[names[1], "r"]) < 0.4
    assert found.loc[names[1], "category"] == "Texture"
    assert found.loc[names[0], "spread"] == pytest.approx(0.5, rel=0.1)


def test_a_feature_without_values_has_no_spread():
    real = pd.DataFrame({"Nuclei_AreaShape_Area": [1.0, 2, 3], "Nuclei_AreaShape_Extent": np.nan})
    draws = [real.copy(), real + 0.1]
    found = consistency(real, draws, np.arange(3))
    assert np.isnan(found.loc["Nuclei_AreaShape_Extent", "relative"])
    assert np.isnan(found.loc["Nuclei_AreaShape_Extent", "r"])


def test_mechanisms_are_matched_by_other_compounds_and_other_batches():
    rng = np.random.default_rng(1)
    centres = rng.normal(0, 5, (2, 8))
    rows, vectors = [], []
    for number, (compound, moa, batch) in enumerate(
        [("a", 0, "1"), ("b", 0, "1"), ("c", 1, "1"), ("d", 1, "2")]
    ):
        for _ in range(20):
            rows.append((f"P{batch}", f"A0{number}", compound, f"moa {moa}", batch))
            vectors.append(centres[moa] + rng.normal(size=8))
    for batch in "12":
        rows += [(f"P{batch}", "H12", "DMSO", "DMSO", batch)] * 20
        vectors += list(rng.normal(size=(20, 8)))
    names = ["Plate", "Well", "Compound", "MOA", "Batch"]
    cells = pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names])
    scores = Scores({})
    good = np.array(vectors, dtype=np.float32)
    swapped = good.copy()
    swapped[20:40], swapped[40:60] = good[40:60], good[20:40]
    _score_moa(Config(), cells, [good, swapped], scores)
    found = scores.beside["moa"]["real"]
    assert found["nsc"] == {"accuracy": 1.0, "treatments": 4, "unmatched": 0}
    assert found["nscb"] == {"accuracy": 1.0, "treatments": 2, "unmatched": 2}
    assert scores.tables["moa_real"].loc["moa 0", "moa 0"] == 2
    assert scores.beside["moa"]["generated"]["nsc"]["accuracy"] == 0


def test_without_two_compounds_of_a_mechanism_nothing_is_claimed():
    names = ["Plate", "Well", "Compound", "MOA"]
    rows = [("P", "A01", "a", "x"), ("P", "A02", "b", "y"), ("P", "H12", "DMSO", "DMSO")] * 5
    cells = pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names])
    scores = Scores({})
    values = np.random.default_rng(2).normal(size=(15, 3)).astype(np.float32)
    _score_moa(Config(), cells, [values, values], scores)
    assert not scores.beside
