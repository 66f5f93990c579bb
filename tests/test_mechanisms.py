"""Mechanisms of wells: a screen whose answer is known, tables that do not fit, BBBC021 itself."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cp2image.config import Config
from cp2image.config_scoring import WellTable
from cp2image.errors import ConfigError, TableError
from cp2image.mechanisms import batch_of, match_mechanisms, read_wells

FEATURES = [f"Cells_Texture_Contrast_DNA_{i}_00_256" for i in range(12)]


def screen(folder, scale=1.0):
    """Four compounds of two mechanisms on two plates, each plate with its own offset and gain."""
    rng = np.random.default_rng(3)
    direction = rng.normal(0, 6, (2, 12))
    rows, layout = [], []
    for plate, week in (("Week1_1", 0), ("Week2_1", 1)):
        offset, gain = rng.normal(0, 50, 12), np.exp(rng.normal(0, 0.3, 12))
        for well in range(16):
            compound = "DMSO" if well < 8 else f"c{week * 2 + (well - 8) // 4}"
            truth = 0 if well < 8 else (direction[(well - 8) // 4] * scale)
            values = offset + gain * (truth + rng.normal(size=12))
            rows.append((plate, f"A{well:02d}", *values))
            layout.append((plate, f"A{well:02d}", compound, 1.0))
    pd.DataFrame(rows, columns=["P", "W", *FEATURES]).to_csv(folder / "wells.csv", index=False)
    names = ["plate", "well", "drug", "dose"]
    pd.DataFrame([*layout, *layout], columns=names).to_csv(folder / "layout.csv.gz", index=False)
    mechanisms = [("c0", 1.0, "x"), ("c1", 1.0, "y"), ("c2", 1.0, "x"), ("c3", 1.0, "y")]
    pd.DataFrame(mechanisms, columns=["drug", "dose", "moa"]).to_csv(
        folder / "moa.csv", index=False
    )


def config_of(folder, **more):
    treatment = {"Metadata_Compound": "drug", "Metadata_Concentration": "dose"}
    wells = {"Metadata_Plate": "plate", "Metadata_Well": "well"}
    section = {
        "profiles": {
            "uri": str(folder / "wells.csv"),
            "columns": {"Metadata_Plate": "P", "Metadata_Well": "W"},
        },
        "joined": [
            {"uri": str(folder / "layout.csv.gz"), "columns": wells | treatment},
            {"uri": str(folder / "moa.csv"), "columns": treatment | {"Metadata_MOA": "moa"}},
        ],
        "batch": "^(Week[0-9]+)",
        "factors": 4,
        "output": str(folder / "report"),
    }
    return Config.model_validate({"mechanisms": section | more})


def test_every_recipe_finds_the_mechanisms_across_plates(tmp_path):
    screen(tmp_path)
    found = match_mechanisms(config_of(tmp_path))
    assert (found.wells, found.controls, found.features) == (32, 16, 12)
    assert set(found.recipes) == {"sd", "mad", "percentiles", "factors"}
    for recipe in found.recipes.values():
        assert (recipe.nsc.accuracy, recipe.nsc.treatments) == (1.0, 4)
        assert (recipe.nscb.accuracy, recipe.nscb.treatments) == (1.0, 4)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["recipes"]["mad"]["nscb"] == {"accuracy": 1.0, "treatments": 4}
    matrix = pd.read_csv(tmp_path / "report" / "confusion_sd_nsc.csv", index_col=0)
    assert matrix.to_numpy().tolist() == [[2, 0], [0, 2]]
    with Image.open(tmp_path / "report" / "confusion_sd_nsc.png") as picture:
        assert min(picture.size) > 200
    assert "NSC 1.000 (4 of 4)" in str(found)


def test_wells_without_an_effect_are_not_told_apart(tmp_path):
    screen(tmp_path, scale=0.0)
    found = match_mechanisms(config_of(tmp_path))
    assert min(recipe.nsc.accuracy for recipe in found.recipes.values()) < 1


def test_what_cannot_be_joined_is_refused(tmp_path):
    screen(tmp_path)
    config = config_of(tmp_path).mechanisms
    other = WellTable(uri=str(tmp_path / "moa.csv"), columns={"Metadata_MOA": "moa"})
    with pytest.raises(TableError, match=r"moa\.csv: shares none of Metadata_MOA"):
        read_wells(config.profiles, [other])
    ambiguous = WellTable(
        uri=str(tmp_path / "layout.csv.gz"),
        columns={"Metadata_Plate": "plate", "Metadata_Compound": "drug"},
    )
    with pytest.raises(TableError, match="different rows have the same Metadata_Plate"):
        read_wells(config.profiles, [ambiguous])
    frame = pd.read_csv(tmp_path / "wells.csv")
    pd.concat([frame, frame.head(1)]).to_csv(tmp_path / "wells.csv", index=False)
    with pytest.raises(TableError, match="stand twice"):
        read_wells(config.profiles, config.joined)
    with pytest.raises(ConfigError, match=r"mechanisms\.profiles is not set"):
        match_mechanisms(Config())


def test_a_plate_without_a_batch_in_its_name_is_its_own():
    assert batch_of("Week10_40111", "^(Week[0-9]+)") == "Week10"
    assert batch_of("B02", "^(Week[0-9]+)") == batch_of("B02", "") == "B02"


@pytest.mark.real_data
def test_on_bbbc021_well_means_land_where_the_literature_is(shared_data, tmp_path):
    """Ljosa et al. 2013: 0.83 with means of cells; here with means of wells as published."""
    folder = shared_data / "bbbc021" / "well_profiles"
    treatment = {"Metadata_Compound": "compound", "Metadata_Concentration": "concentration"}
    image = {
        "Metadata_Plate": "Image_Metadata_Plate_DAPI",
        "Metadata_Well": "Image_Metadata_Well_DAPI",
        "Metadata_Compound": "Image_Metadata_Compound",
        "Metadata_Concentration": "Image_Metadata_Concentration",
    }
    profiles = folder / "ljosa_jbiomolscreen_2013_per_well_mean.csv.gz"
    wells = {
        "Metadata_Plate": "Image_Metadata_Plate",
        "Metadata_Well": "Image_Metadata_Well",
    }
    section = {
        "profiles": {"uri": str(profiles), "columns": wells},
        "joined": [
            {"uri": str(folder / "BBBC021_v1_image.csv.gz"), "columns": image},
            {
                "uri": str(folder / "BBBC021_v1_moa_unix.csv"),
                "columns": treatment | {"Metadata_MOA": "moa"},
            },
        ],
        "batch": "^(Week[0-9]+)",
        "output": str(tmp_path),
    }
    found = match_mechanisms(Config.model_validate({"mechanisms": section}))
    assert (found.wells, found.recipes["sd"].nsc.treatments) == (632, 103)
    assert found.recipes["sd"].nsc.accuracy == pytest.approx(0.83, abs=0.05)
    assert found.recipes["mad"].nsc.accuracy == pytest.approx(0.83, abs=0.06)
    assert found.recipes["sd"].nscb.accuracy < found.recipes["sd"].nsc.accuracy
