"""A simulated screen: its files belong together, and its pictures show what was drawn."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import ndimage
from skimage.filters import threshold_li
from skimage.measure import label, regionprops_table

from cp2image.data.simulate import SimulatedScreen, measure_truth, simulate_fields, simulate_screen
from cp2image.data.simulated_cells import CHANNELS, Phenotype, draw_cells, render_cells
from cp2image.data.simulated_fields import SATURATION, name_well, simulate_field, treat_well
from cp2image.errors import ConfigError

WRITTEN = SimulatedScreen(
    plates=2, wells_per_plate=7, sites_per_well=2, cells_per_site=8, field_size=192
)
CLEAN = SimulatedScreen(plates=1, wells_per_plate=24, defect_share=0.0)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("screen")
    return folder, simulate_screen(folder, WRITTEN)


@pytest.fixture(scope="module")
def clean_fields():
    return list(simulate_fields(CLEAN))


@pytest.fixture(scope="module")
def measured(clean_fields):
    """Nuclei found again by a global threshold on each DNA image, beside what was drawn."""
    rows = []
    for field in clean_fields:
        dna = field.images[0].astype(np.float64) / 16
        smooth = ndimage.gaussian_filter(dna, 1.0)
        found = label(smooth > threshold_li(smooth))
        names = ("label", "area", "orientation", "eccentricity", "intensity_mean")
        table = pd.DataFrame(regionprops_table(found, dna, properties=names)).set_index("label")
        drawn = field.cells
        at_center = found[
            drawn["center_y"].round().astype(int), drawn["center_x"].round().astype(int)
        ]
        rows.append(pd.concat([drawn, table.reindex(at_center).reset_index(drop=True)], axis=1))
    return pd.concat(rows, ignore_index=True)


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / name)


def all_bytes(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def plain_orientation(mask):
    """Angle from the y axis to the major axis in degrees, by the eigenvectors of the pixels."""
    y, x = np.nonzero(mask)
    _, vectors = np.linalg.eigh(np.cov(y, x))
    along_y, along_x = vectors[:, 1]
    return np.rad2deg(np.arctan(along_x / along_y))


def turned_by(first, second):
    """Angle between two axes in degrees, 0 to 90."""
    return np.abs((np.asarray(first) - np.asarray(second) + 90) % 180 - 90)


def test_every_nucleus_is_found_again_by_a_threshold(measured):
    assert measured["area"].notna().mean() > 0.995


@pytest.mark.parametrize(
    ("drawn", "seen"),
    [
        ("nucleus_area", "area"),
        ("nucleus_eccentricity", "eccentricity"),
        ("nucleus_brightness", "intensity_mean"),
    ],
)
def test_thresholded_nuclei_have_the_drawn_size_shape_and_brightness(measured, drawn, seen):
    cells = measured.dropna()
    assert np.corrcoef(cells[drawn], cells[seen])[0, 1] > 0.95


def test_thresholded_nuclei_have_the_drawn_orientation(measured):
    cells = measured.dropna()
    long = cells[cells["nucleus_eccentricity"] > 0.5]
    turned = turned_by(np.rad2deg(long["orientation"]), long["nucleus_orientation"])
    assert len(long) > 500
    assert np.cos(np.deg2rad(2 * turned)).mean() > 0.95


def test_drawn_area_is_the_masks_area_within_two_percent(clean_fields):
    for field in clean_fields[:6]:
        area = measure_truth(field)["Nuclei"]["AreaShape_Area"]
        assert np.abs(area / field.cells["nucleus_area"] - 1).mean() < 0.02


@pytest.mark.parametrize("angle", [-60.0, 0.0, 30.0, 75.0])
def test_orientation_is_the_angle_from_the_y_axis_to_the_major_axis(angle):
    rng = np.random.default_rng(3)
    cells = draw_cells(Phenotype(lobes=0.0), 1, 128, rng)
    cells["nucleus_orientation"] = cells["cell_orientation"] = angle
    cells["nucleus_eccentricity"] = 0.85
    rendered = render_cells(cells, 128, rng)
    assert turned_by(plain_orientation(rendered.nuclei == 1), angle) < 1.5


def test_tables_hold_the_orientation_and_axes_of_the_true_masks(clean_fields):
    field = clean_fields[1]
    nuclei = measure_truth(field)["Nuclei"]
    for number in range(1, 11):
        mask = field.nuclei == number
        row = nuclei.iloc[number - 1]
        y, x = np.nonzero(mask)
        spread = np.linalg.eigvalsh(np.cov(y, x, ddof=0))
        assert row["AreaShape_Area"] == mask.sum()
        assert row["AreaShape_Center_X"] == pytest.approx(x.mean())
        assert row["AreaShape_Center_Y"] == pytest.approx(y.mean())
        assert row["AreaShape_MajorAxisLength"] == pytest.approx(4 * np.sqrt(spread[1]), rel=0.01)
        assert turned_by(row["AreaShape_Orientation"], plain_orientation(mask)) < 2


def test_tables_hold_the_intensities_of_the_images_in_the_true_masks(clean_fields):
    field = clean_fields[2]
    tables = measure_truth(field)
    for channel, plane in zip(CHANNELS, field.images / 65535, strict=True):
        for name, masks in (("Nuclei", field.nuclei), ("Cells", field.cell_bodies)):
            table = tables[name]
            seen = [plane[masks == number].mean() for number in range(1, len(table) + 1)]
            np.testing.assert_allclose(table[f"Intensity_MeanIntensity_{channel}"], seen, rtol=0.02)


def test_nuclei_never_touch_and_lie_in_their_own_cell(clean_fields):
    for field in clean_fields:
        inside = field.nuclei > 0
        np.testing.assert_array_equal(field.cell_bodies[inside], field.nuclei[inside])
        grown = ndimage.maximum_filter(field.nuclei, 3)
        assert np.all(grown[inside] == field.nuclei[inside])
        assert label(inside, connectivity=2).max() == CLEAN.cells_per_site
        border = np.concatenate([inside[0], inside[-1], inside[:, 0], inside[:, -1]])
        assert not border.any()


def test_untreated_cells_have_the_scale_of_mcf7_and_neighbours_that_touch(clean_fields):
    untreated = [field for field in clean_fields if field.treatment.moa == "DMSO"]
    for field in untreated:
        tables = measure_truth(field)
        assert 22 < tables["Nuclei"]["AreaShape_EquivalentDiameter"].median() < 30
        assert 40 < tables["Cells"]["AreaShape_EquivalentDiameter"].median() < 60
        bodies = field.cell_bodies
        beside = (bodies[:, 1:] != bodies[:, :-1]) & (bodies[:, 1:] > 0) & (bodies[:, :-1] > 0)
        assert len(np.unique(bodies[:, 1:][beside])) > CLEAN.cells_per_site / 3


def test_pixels_are_12_bits_shifted_left_by_4(clean_fields):
    for field in clean_fields:
        assert field.images.dtype == np.uint16
        assert not np.any(field.images % 16)
        assert field.images.max() < 0.8 * 65535


@pytest.mark.parametrize(
    ("moa", "parameter", "direction"),
    [
        ("DNA damage", "nucleus_area", 1),
        ("DNA damage", "nucleus_brightness", -1),
        ("DNA damage", "chromatin_contrast", -1),
        ("Actin disruptors", "cell_area", -1),
        ("Actin disruptors", "cell_eccentricity", -1),
        ("Actin disruptors", "spots", 1),
        ("Microtubule stabilizers", "bundling", 1),
        ("Microtubule stabilizers", "tubulin", 1),
        ("Protein synthesis", "nucleus_area", -1),
        ("Protein synthesis", "cell_area", -1),
        ("Aurora kinase inhibitors", "nucleus_area", 1),
        ("Aurora kinase inhibitors", "lobes", 1),
    ],
)
def test_treatments_shift_what_they_claim_to_the_more_the_higher_the_dose(
    clean_fields, moa, parameter, direction
):
    def mean(wanted):
        return pd.concat([f.cells for f in clean_fields if wanted(f.treatment)])[parameter].mean()

    untreated = mean(lambda treatment: treatment.moa == "DMSO")
    doses = [field.treatment for field in clean_fields if field.treatment.moa == moa]
    for compound in {treatment.compound for treatment in doses}:
        weak, strong = sorted({t.concentration for t in doses if t.compound == compound})
        effects = [
            direction
            * (
                mean(lambda t, d=dose, c=compound: (t.compound, t.concentration) == (c, d))
                - untreated
            )
            for dose in (weak, strong)
        ]
        assert effects[1] > effects[0] > -0.25 * effects[1]
        assert effects[1] > 0


def test_bundles_and_aggregates_are_seen_in_the_images(clean_fields):
    def peak(moa, channel):
        fields = [f for f in clean_fields if f.treatment.moa == moa][:2]
        inside = [f.images[channel][f.cell_bodies > 0] for f in fields]
        return np.mean([np.percentile(values, 99.5) / np.median(values) for values in inside])

    assert peak("Actin disruptors", 1) > 1.5 * peak("DMSO", 1)
    assert peak("Microtubule stabilizers", 2) > 1.5 * peak("DMSO", 2)


def test_24_wells_hold_each_moa_with_two_compounds_at_two_doses_and_four_controls():
    treatments = [treat_well(well) for well in range(24)]
    counts = pd.Series([treatment.moa for treatment in treatments]).value_counts()
    assert dict(counts) == dict.fromkeys(counts.index, 4)
    assert len(counts) == 6
    assert len({(t.compound, t.concentration) for t in treatments}) == 21
    assert len({name_well(well) for well in range(60)}) == 60
    assert {name_well(well)[0] for well in (0, 6, 12, 18)} == set("BCDE")


def test_a_larger_screen_holds_the_fields_of_a_smaller_one():
    small = SimulatedScreen(plates=1, wells_per_plate=2, cells_per_site=4, field_size=128)
    large = SimulatedScreen(
        plates=2, wells_per_plate=4, sites_per_well=3, cells_per_site=4, field_size=128
    )
    fields = {(f.plate, f.well, f.site): f for f in simulate_fields(large)}
    for field in simulate_fields(small):
        again = fields[field.plate, field.well, field.site]
        np.testing.assert_array_equal(field.images, again.images)
        pd.testing.assert_frame_equal(field.cells, again.cells)
        assert field.files == again.files


def test_replicates_share_the_layout_but_not_the_cells_nor_the_plates_brightness():
    first, second = (simulate_field(CLEAN, plate, 0, 0) for plate in (0, 1))
    assert (first.well, first.treatment) == (second.well, second.treatment)
    assert first.plate.split("_")[0] == second.plate.split("_")[0]
    assert not np.allclose(first.cells["center_x"], second.cells["center_x"])
    darkest = [np.median(f.expected[:, f.cell_bodies == 0], axis=1) for f in (first, second)]
    assert np.all(np.abs(darkest[0] - darkest[1]) > 0.01)


def test_same_seed_writes_identical_bytes_and_another_seed_does_not(tmp_path):
    screen = SimulatedScreen(plates=1, wells_per_plate=2, cells_per_site=4, field_size=128)
    other = SimulatedScreen(plates=1, wells_per_plate=2, cells_per_site=4, field_size=128, seed=1)
    for name, wanted in (("one", screen), ("two", screen), ("other", other)):
        simulate_screen(tmp_path / name, wanted)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "two")
    assert all_bytes(tmp_path / "one").keys() != all_bytes(tmp_path / "other").keys()
    truths = [read(tmp_path / name, "truth.csv") for name in ("one", "other")]
    assert not np.isclose(truths[0]["center_x"], truths[1]["center_x"]).any()


def test_every_field_of_the_index_is_an_image_that_holds_its_pixels(written):
    folder, files = written
    index = read(folder, "BBBC021_v1_image.csv")
    fields = list(simulate_fields(WRITTEN))
    assert len(index) == files.fields == len(fields) == 28
    for row, field in zip(index.itertuples(), fields, strict=True):
        names = (row.Image_FileName_DAPI, row.Image_FileName_Actin, row.Image_FileName_Tubulin)
        for name, wavelength, plane in zip(names, ("w1", "w4", "w2"), field.images, strict=True):
            assert name.startswith(f"{field.well}_s{field.site}_{wavelength}")
            path = folder / "images" / row.Image_PathName_DAPI / name
            np.testing.assert_array_equal(tifffile.imread(io.BytesIO(path.read_bytes())), plane)
        assert row.Image_Metadata_Well_DAPI == field.well
        assert row.Image_Metadata_Compound == field.treatment.compound
    assert len(list((folder / "images").rglob("*.tif"))) == 3 * len(index)


def test_index_and_moa_have_the_columns_of_bbbc021(written, shared_data):
    folder, _ = written
    for name, real in (
        ("BBBC021_v1_image.csv", "BBBC021_v1_image.csv.gz"),
        ("BBBC021_v1_moa.csv", "BBBC021_v1_moa_unix.csv"),
    ):
        columns = pd.read_csv(shared_data / "bbbc021" / "well_profiles" / real, nrows=1).columns
        assert list(read(folder, name).columns) == list(columns)


def test_tables_have_columns_that_cellprofiler_writes(written, shared_data):
    folder, _ = written
    for name in ("Nuclei", "Cells", "Cytoplasm"):
        real = pd.read_csv(shared_data / "examplehuman" / f"{name}.csv", nrows=1).columns
        ours = read(folder, f"tables/{name}.csv").columns
        stained = [c.replace("_Actin", "_DNA").replace("_Tubulin", "_DNA") for c in ours]
        assert set(stained) <= set(real)


def test_tables_index_and_truth_tell_of_the_same_cells(written):
    folder, files = written
    truth, image = read(folder, "truth.csv"), read(folder, "tables/Image.csv")
    keys = ["ImageNumber", "ObjectNumber"]
    assert len(truth) == files.cells == 28 * WRITTEN.cells_per_site
    assert not truth.duplicated(keys).any()
    tables = {n: read(folder, f"tables/{n}.csv") for n in ("Nuclei", "Cells", "Cytoplasm")}
    for table in tables.values():
        pd.testing.assert_frame_equal(table[keys], truth[keys])
    assert (tables["Cells"]["Parent_Nuclei"] == truth["ObjectNumber"]).all()
    assert (tables["Cytoplasm"]["Parent_Cells"] == truth["ObjectNumber"]).all()
    area = {name: table["AreaShape_Area"] for name, table in tables.items()}
    assert (area["Cells"] == area["Nuclei"] + area["Cytoplasm"]).all()
    assert (
        np.hypot(
            tables["Nuclei"]["AreaShape_Center_X"] - truth["center_x"],
            tables["Nuclei"]["AreaShape_Center_Y"] - truth["center_y"],
        ).max()
        < 2
    )
    metadata = [column for column in image.columns if column.startswith("Metadata_")]
    joined = truth.merge(image, on="ImageNumber", suffixes=("", "_image"))
    for column in metadata:
        assert (joined[column] == joined[f"{column}_image"]).all()
    moa = read(folder, "BBBC021_v1_moa.csv")
    known = set(moa[["compound", "concentration", "moa"]].itertuples(index=False, name=None))
    names = ["Metadata_Compound", "Metadata_Concentration", "Metadata_MOA"]
    assert known == set(truth[names].itertuples(index=False, name=None))


def test_default_screen_has_a_field_of_noise_one_out_of_focus_and_saturated_debris():
    screen = SimulatedScreen(cells_per_site=4, field_size=160)
    fields = list(simulate_fields(screen))
    by_defect = {f.defect: f for f in fields}
    assert set(by_defect) == {"none", "noise", "defocus"}
    noise = by_defect["noise"].images.astype(float)
    assert np.corrcoef(noise[0, :, 1:].ravel(), noise[0, :, :-1].ravel())[0, 1] < 0.05
    assert by_defect["noise"].expected.std(axis=(1, 2)).max() < 1e-4

    def sharpness(field):
        dna = field.expected[0]
        return np.abs(np.diff(dna, axis=0)).max() / (dna.max() - dna.min())

    assert sharpness(by_defect["defocus"]) < 0.3 * sharpness(fields[0])
    saturated = [f for f in fields if f.images.max() == SATURATION * 16]
    assert len(saturated) == 2
    assert all(f.defect == "none" for f in saturated)
    assert not any(f.cells["debris"].any() for f in fields if f.images.max() < SATURATION * 16)


def test_debris_is_marked_on_the_cells_it_lies_on():
    screen = SimulatedScreen(plates=1, defect_share=0.3)
    fields = [f for f in simulate_fields(screen) if f.images.max() == SATURATION * 16]
    marked = [f.cells["debris"].sum() for f in fields]
    assert len(fields) > 8
    assert sum(marked) > len(fields) / 2
    for field in fields:
        covered = np.unique(field.cell_bodies[field.expected.min(axis=0) > 2000])
        assert field.cells["debris"].to_numpy()[covered[covered > 0] - 1].all()


def test_share_of_defective_fields_is_as_asked():
    screen = SimulatedScreen(
        plates=3, wells_per_plate=60, cells_per_site=1, field_size=96, defect_share=0.2
    )
    share = np.mean([field.defect != "none" for field in simulate_fields(screen)])
    assert share == pytest.approx(0.2, abs=4 * np.sqrt(0.2 * 0.8 / 180))


def test_cells_that_do_not_fit_are_refused_with_the_sizes_named():
    with pytest.raises(ConfigError, match=r"60 nuclei .* 160 x 160 px .* raise field_size"):
        draw_cells(Phenotype(), 60, 160, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("name", "value"), [("plates", 0), ("wells_per_plate", 61), ("defect_share", 0.5), ("seed", -1)]
)
def test_a_screen_out_of_range_is_refused_with_the_setting_and_its_range(name, value):
    with pytest.raises(ConfigError, match=rf"{name} is {value}, expected"):
        SimulatedScreen(**{name: value})


def test_simulated_patches_are_as_bright_as_untreated_mcf7_cells(clean_fields, shared_data):
    index = pd.read_csv(shared_data / "bbbc021" / "cells.csv")
    untreated = index[index["moa"] == "DMSO"]
    real = np.concatenate(
        [
            tifffile.imread(shared_data / "bbbc021" / file)[rows["page_index"].to_numpy()]
            for file, rows in list(untreated.groupby("file"))[::6]
        ]
    )
    patches = []
    for field in (f for f in clean_fields if f.treatment.moa == "DMSO"):
        for y, x in field.cells[["center_y", "center_x"]].round().astype(int).to_numpy():
            patch = field.images[:, y - 34 : y + 34, x - 34 : x + 34]
            if y >= 34 and x >= 34 and patch.shape == (3, 68, 68):
                patches.append(patch)
    for channel in range(3):
        bright = [np.percentile(np.asarray(p)[:, channel], 90) for p in (patches, real)]
        assert 1 / 2 < bright[0] / bright[1] < 2
