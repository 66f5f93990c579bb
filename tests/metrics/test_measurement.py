"""Batch measurement against cp_measure, patch by patch, and against CellProfiler itself."""

import re

import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy.ndimage import distance_transform_edt

from cp2image.benchmarks.plain_measurement import measure_plain
from cp2image.errors import MeasurementError
from cp2image.metrics.measurement import COMPARTMENTS, FAMILIES, feature_names, measure
from cp2image.metrics.segmentation import segment
from tests.metrics.argsort import measure_with_ties

CHANNELS = ("DNA", "Actin", "Tubulin")

# Where a batch may deviate from cp_measure by more than 1e-9 relative: by how much, and why.
NOISE = {
    r"AreaShape_CentralMoment_(0_1|1_0)": (1e-9, "0 by definition; cp_measure sums rounding noise"),
    r"Granularity_\d+_": (2e-12, "per cent lost; cp_measure has rounding noise where nothing is"),
    r"Texture_InfoMeas1_": (1e-14, "a difference of equal entropies where grey levels are few"),
    r"Texture_InfoMeas2_": (1e-11, "the square root of such a difference"),
}
# Where CellProfiler's own output may deviate by more than 1e-4 relative, and why.
CELLPROFILER_EXCEPTIONS = {
    r"AreaShape_CentralMoment_(0_1|1_0)$": "0 by definition; CellProfiler sums rounding noise",
    r"RadialDistribution_RadialCV_": "a small spread of means, summed in 32-bit floats",
    r"Correlation_(Manders|RWC|K|Overlap)_": "a pixel at 15 % of the maximum, in 32-bit floats",
}


@pytest.fixture(scope="module")
def oracle(shared_data):
    return np.load(shared_data / "cellprofiler_oracle" / "oracle.npz")


@pytest.fixture(scope="module")
def plain_table(oracle):
    return measure_with_ties(oracle["images"] / 65535, oracle["masks"], CHANNELS)


def deviate(found, expected):
    """Return the relative deviation, 0 where both are NaN, inf where one is."""
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.abs(found - expected) / np.maximum(np.abs(found), np.abs(expected))
    deviation[(found == expected) | (np.isnan(found) & np.isnan(expected))] = 0
    return np.where(np.isnan(deviation), np.inf, deviation)


def assert_equals_cp_measure(table, expected):
    assert set(table) == set(expected)
    expected = expected[list(table)]
    deviation = deviate(table.to_numpy(), expected.to_numpy())
    floors = np.array([find_floor(name) for name in table])
    small = np.abs(table.to_numpy() - expected.to_numpy()) <= floors
    bad = (deviation > 1e-9) & ~small
    assert not bad.any(), {table.columns[j]: (i, deviation[i, j]) for i, j in np.argwhere(bad)}


def find_floor(name):
    floors = [floor for pattern, (floor, _) in NOISE.items() if re.search(pattern, name)]
    return max(floors, default=0.0)


def test_thirty_real_cells_measure_as_with_cp_measure(oracle, plain_table):
    table = measure(oracle["images"], oracle["masks"], channels=CHANNELS)
    assert_equals_cp_measure(table, plain_table)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.timeout(1800)
def test_five_hundred_real_patches_measure_as_with_cp_measure(shared_data):
    cells = pd.read_csv(shared_data / "bbbc021" / "cells.csv").sample(520, random_state=7)
    images = np.empty((len(cells), 3, 68, 68), np.uint16)
    for i, (file, page) in enumerate(zip(cells.file, cells.page_index, strict=True)):
        images[i] = tifffile.imread(shared_data / "bbbc021" / file)[page]
    masks = segment(images, 0, (1, 2))
    assert_equals_cp_measure(
        measure(images, masks, channels=CHANNELS),
        measure_with_ties(images / 65535, masks, CHANNELS),
    )


def test_real_cells_measure_as_with_cellprofiler(oracle):
    table = measure(oracle["images"], oracle["masks"], channels=("DNA", "C1", "C2"))
    expected = pd.DataFrame(oracle["features"], columns=[str(name) for name in oracle["names"]])
    assert {name for name in expected if name not in table} == {
        name for name in expected if "_Costes_" in name
    }
    assert all("_Slope_" in name for name in table if name not in expected)
    shared = [name for name in table if name in expected]
    bad = deviate(table[shared].to_numpy(), expected[shared].to_numpy()) > 1e-4
    excepted = np.array([any(re.search(p, n) for p in CELLPROFILER_EXCEPTIONS) for n in shared])
    assert not bad[:, ~excepted].any()
    assert bad.mean() < 0.0035
    assert bad[:, ["CentralMoment" not in name for name in shared]].mean() < 0.0002
    assert bad[:, ["_Correlation_" in name for name in shared]].mean() < 0.005


def test_rings_and_brightest_pixels_are_cellprofilers_where_they_are_a_tie(oracle):
    names = ("DNA", "C1", "C2")
    families = ["RadialDistribution", "Location"]
    table = measure(oracle["images"], oracle["masks"], channels=names, families=families)
    expected = pd.DataFrame(oracle["features"], columns=[str(name) for name in oracle["names"]])
    deep = bright = 0
    for k, compartment in enumerate(COMPARTMENTS):
        rings = [n for n in table if n.startswith(f"{compartment}_Radial") and "Zernike" not in n]
        for i, mask in enumerate(oracle["masks"][:, k]):
            depth = distance_transform_edt(mask)
            deep += (depth == depth.max()).sum() > 1
            np.testing.assert_allclose(
                table.loc[i, rings], expected.loc[i, rings], rtol=1e-4, atol=1e-5
            )
            for image, channel in zip(oracle["images"][i], names, strict=True):
                pixels = image[mask != 0]
                bright += (pixels == pixels.max()).sum() > 1
                place = [f"{compartment}_Location_MaxIntensity_{a}_{channel}" for a in "XY"]
                assert table.loc[i, place].tolist() == expected.loc[i, place].tolist()
    assert (deep, bright) == (26, 28)


def test_a_cell_measures_the_same_alone_and_in_a_batch(oracle):
    images, masks = oracle["images"][:8], oracle["masks"][:8]
    together = measure(images, masks, channels=CHANNELS)
    for i in range(len(images)):
        alone = measure(images[i : i + 1], masks[i : i + 1], channels=CHANNELS)
        np.testing.assert_array_equal(alone.to_numpy()[0], together.to_numpy()[i])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", ">u2", "int16", "float32"])
def test_integers_are_divided_by_the_largest_of_their_type(oracle, dtype):
    kind = np.dtype(dtype)
    largest = np.iinfo(str(kind)).max if kind.kind in "iu" else 1
    images = (oracle["images"][:2] / 65535 * largest).astype(kind)
    table = measure(images, oracle["masks"][:2], channels=CHANNELS, families=["Intensity"])
    expected = measure(
        images.astype(float) / largest,
        oracle["masks"][:2],
        channels=CHANNELS,
        families=["Intensity"],
    )
    pd.testing.assert_frame_equal(table, expected)


def test_patches_without_masks_are_segmented_by_the_nuclear_stain(oracle):
    images = oracle["images"][:4]
    turned = measure(images[:, [1, 0, 2]], channels=("Actin", "Hoechst", "Tubulin"))
    named = measure(images, channels=("a", "b", "c"), nucleus_channel="a", cell_channels=("b", "c"))
    given = measure(images, segment(images, 0, (1, 2)), channels=CHANNELS)
    area = "Cells_AreaShape_Area"
    assert turned[area].tolist() == named[area].tolist() == given[area].tolist()


def test_a_patch_without_a_nucleus_is_a_row_of_nan(oracle):
    images = oracle["images"][:3].copy()
    images[1, 0] = 0
    missing = measure(images, channels=CHANNELS).isna()
    assert missing.all(axis=1).tolist() == [False, True, False]


def test_columns_follow_the_order_of_feature_names():
    assert len(feature_names(CHANNELS)) == 1863 - 18 + 9
    assert len(set(feature_names(CHANNELS))) == 1854
    names = feature_names(CHANNELS, ("Cells",), ("Granularity", "AreaShape"))
    assert names[0] == "Cells_Granularity_1_DNA"
    assert names[-1] == "Cells_AreaShape_Zernike_9_9"
    one = feature_names(("DNA",), ("Nuclei",), ("Correlation", "Location"))
    assert len(one) == 6


def test_families_and_compartments_are_parts_of_the_whole(oracle):
    images, masks = oracle["images"][:2], oracle["masks"][:2]
    whole = measure(images, masks, channels=CHANNELS)
    for family in FAMILIES:
        part = measure(images, masks, channels=CHANNELS, families=[family], compartments=["Cells"])
        pd.testing.assert_frame_equal(part, whole[list(part)])


@pytest.mark.parametrize("side", [32, 33, 101, 256])
def test_patches_of_32_to_256_pixels_with_eight_channels_are_measured(side):
    random = np.random.default_rng(side)
    images = random.random((2, 8, side, side), dtype=np.float32)
    masks = np.zeros((2, 3, side, side), np.uint8)
    masks[:, :, side // 4 : side // 2, side // 5 : side // 2] = 1
    table = measure(images, masks, channels=[f"C{c}" for c in range(8)], compartments=["Nuclei"])
    assert table.shape == (2, len(feature_names([f"C{c}" for c in range(8)], ["Nuclei"])))
    assert not np.isnan(table.drop(columns=table.filter(like="NormalizedMoment")).to_numpy()).any()


@pytest.mark.parametrize("subsample", [0.25, 0.3, 0.5, 1.0])
def test_granularity_follows_its_subsampling(oracle, subsample):
    images, masks = oracle["images"][:2, :1], oracle["masks"][:2]
    table = measure(
        images,
        masks,
        channels=("DNA",),
        families=["Granularity"],
        compartments=["Nuclei"],
        granularity_subsample=subsample,
    )
    plain = measure_plain(images / 65535, masks, ("DNA",), subsample, compartments=("Nuclei",))
    np.testing.assert_allclose(table, plain[list(table)], rtol=1e-9, atol=1e-12)


PATCH, MASKS = np.full((2, 2, 8, 8), 0.5), np.ones((2, 3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ["Textures"]}, "unknown family 'Textures'; did you mean 'Texture'"),
        ({"compartments": ["Cell"]}, "unknown compartment 'Cell'; did you mean 'Cells'"),
        ({"families": []}, "at least one family"),
        ({"channels": ("DNA", "DNA")}, "unique names"),
        ({"channels": ("DNA",)}, "have 2 channels, but 1 are named"),
        ({"images": PATCH[0]}, r"shape \(2, 8, 8\)"),
        ({"images": PATCH > 0}, "images are bool"),
        ({"images": PATCH * 3}, r"image 0, channel 0 has 1\.5 at y=0, x=0"),
        ({"images": np.full((2, 2, 8, 8), -1)}, "has -1 at"),
        ({"masks": MASKS[:, :2]}, r"masks have shape \(2, 2, 8, 8\); expected \(2, 3, 8, 8\)"),
        ({"granularity_subsample": 0}, "granularity_subsample is 0"),
        ({"masks": None, "channels": ("A", "B")}, "which of A, B shows nuclei"),
        ({"masks": None, "nucleus_channel": "DAN"}, "unknown channel 'DAN'; did you mean 'DNA'"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(changes, message):
    arguments = {"images": PATCH, "masks": MASKS, "channels": ("DNA", "Actin")} | changes
    images, masks = arguments.pop("images"), arguments.pop("masks")
    with pytest.raises(MeasurementError, match=message):
        measure(images, masks, **arguments)


def test_a_nan_pixel_is_refused_with_its_image_and_channel():
    images = np.zeros((700, 2, 48, 48))
    images[650, 1, 3, 4] = np.nan
    with pytest.raises(MeasurementError, match="image 650, channel 1 has nan at y=3, x=4"):
        measure(images, np.ones((700, 3, 48, 48)), channels=("DNA", "A"), families=["Location"])


def test_no_images_give_an_empty_table():
    table = measure(PATCH[:0], MASKS[:0], channels=("DNA", "Actin"))
    assert table.shape == (0, len(feature_names(("DNA", "Actin"))))
