import csv
import gzip
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cp2image.columns import (
    CATEGORIES,
    listed,
    measurements,
    nearest,
    parse_column,
    require_columns,
    unit_of,
)
from cp2image.errors import ColumnError

WELLS = "bbbc021/well_profiles/ljosa_jbiomolscreen_2013_per_well_mean.csv.gz"
BOOKKEEPING = ("Children_", "Parent_", "Number_Object_Number")


@pytest.fixture(scope="module")
def oracle_names(shared_data):
    return np.load(shared_data / "cellprofiler_oracle" / "oracle.npz")["names"].tolist()


@pytest.fixture(scope="module")
def well_names(shared_data):
    with gzip.open(shared_data / WELLS, "rt", newline="") as text:
        return next(csv.reader(text))


def rebuilt(column):
    parts = [column.feature, *column.channels, *column.parameters]
    return "_".join([column.compartment, column.category, *parts])


def take_apart(name, channels=()):
    column = parse_column(name, channels)
    return column.category, column.feature, column.channels, column.parameters


@pytest.mark.real_data
def test_all_1863_names_of_cellprofiler_come_apart_and_together_again(oracle_names):
    columns = measurements(oracle_names)
    assert [column.name for column in columns] == oracle_names
    assert [rebuilt(column) for column in columns] == oracle_names
    assert {column.compartment for column in columns} == {"Nuclei", "Cells", "Cytoplasm"}
    channels = {channel for column in columns for channel in column.channels}
    assert channels == {"DNA", "C1", "C2"}
    assert not {channel for column in columns for channel in column.feature.split("_")} & channels
    assert {len(c.channels) for c in columns if c.category == "Correlation"} == {2}
    assert Counter(column.category for column in columns) == {
        "AreaShape": 324,
        "Correlation": 90,
        "Granularity": 144,
        "Intensity": 135,
        "Location": 54,
        "RadialDistribution": 648,
        "Texture": 468,
    }


@pytest.mark.real_data
def test_the_516_names_of_an_old_pipeline_are_measurements_or_known_bookkeeping(well_names):
    columns = measurements(well_names)
    left = set(well_names) - {column.name for column in columns}
    left -= {"Image_Metadata_Plate", "Image_Metadata_Well"}
    assert len(columns) + len(left) == 516
    assert all(name.split("_", 1)[1].startswith(BOOKKEEPING) for name in left)
    assert [rebuilt(column) for column in columns] == [column.name for column in columns]
    channels = {channel for column in columns for channel in column.channels}
    assert channels == {"CorrActin", "CorrTub", "CorrDAPI"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Nuclei_AreaShape_Zernike_9_7", ("AreaShape", "Zernike_9_7", (), ())),
        ("Cells_Granularity_16_DNA", ("Granularity", "16", ("DNA",), ())),
        ("Cells_Intensity_MADIntensity_DNA", ("Intensity", "MADIntensity", ("DNA",), ())),
        ("Cells_Location_Center_X", ("Location", "Center_X", (), ())),
        ("Cells_Location_MaxIntensity_Z_T", ("Location", "MaxIntensity_Z", ("T",), ())),
        ("Cells_Neighbors_NumberOfNeighbors_10", ("Neighbors", "NumberOfNeighbors", (), ("10",))),
        (
            "Cells_Neighbors_PercentTouching_Adjacent",
            ("Neighbors", "PercentTouching", (), ("Adjacent",)),
        ),
        (
            "Nuclei_RadialDistribution_FracAtD_DNA_1of4",
            ("RadialDistribution", "FracAtD", ("DNA",), ("1of4",)),
        ),
        (
            "Nuclei_RadialDistribution_MeanFrac_DNA_Overflow",
            ("RadialDistribution", "MeanFrac", ("DNA",), ("Overflow",)),
        ),
        (
            "Nuclei_RadialDistribution_ZernikePhase_DNA_9_9",
            ("RadialDistribution", "ZernikePhase", ("DNA",), ("9", "9")),
        ),
        ("Nuclei_Texture_Gabor_CorrTub_10", ("Texture", "Gabor", ("CorrTub",), ("10",))),
        ("Nuclei_Texture_Contrast_CorrTub_3_0", ("Texture", "Contrast", ("CorrTub",), ("3", "0"))),
        ("Nuclei_Texture_Contrast_Ch_5_10_3", ("Texture", "Contrast", ("Ch_5",), ("10", "3"))),
        ("Nuclei_Texture_Contrast_DNA_10_03", ("Texture", "Contrast", ("DNA",), ("10", "03"))),
        (
            "Nuclei_Texture_Correlation_DNA_3_01_256",
            ("Texture", "Correlation", ("DNA",), ("3", "01", "256")),
        ),
        (
            "Nuclei_Correlation_Costes_DNA_Actin",
            ("Correlation", "Costes", ("DNA", "Actin"), ()),
        ),
    ],
)
def test_each_form_of_name_comes_apart(name, expected):
    assert take_apart(name) == expected


TAILS = {
    "Granularity_3": "",
    "Intensity_MeanIntensity": "",
    "Location_CenterMassIntensity_X": "",
    "RadialDistribution_RadialCV": "_3of4",
    "RadialDistribution_ZernikeMagnitude": "_5_1",
    "Texture_Gabor": "_10",
    "Texture_Variance": "_10_3",
    "Texture_Entropy": "_5_02_256",
}
CHANNELS = st.from_regex(r"[A-Za-z][A-Za-z0-9]{0,5}(_[A-Za-z0-9]{1,4}){0,2}", fullmatch=True)


@given(channel=CHANNELS, head=st.sampled_from(list(TAILS)), compartment=CHANNELS)
def test_a_channel_with_underscores_and_digits_is_found_whole(channel, head, compartment):
    if compartment.split("_")[0] in (*CATEGORIES, "Image", "Mean", "Median", "StDev", "Metadata"):
        return
    tail = TAILS[head]
    column = parse_column(f"{compartment}_{head}_{channel}{tail}")
    assert (column.compartment, column.channels) == (compartment, (channel,))
    assert column.parameters == tuple(tail.split("_")[1:])


def test_two_channels_with_underscores_are_parted_by_the_known_ones():
    name = "Cells_Correlation_K_Ch_1_Ch_2"
    assert take_apart(name) == ("Correlation", "K", (), ("Ch_1_Ch_2",))
    assert parse_column(name, ["Ch_1", "Ch_2"]).channels == ("Ch_1", "Ch_2")
    assert parse_column(name, ["Ch", "1_Ch_2", "Ch_1", "Ch_2"]).channels == ()  # two ways


def test_a_table_tells_its_own_channels():
    names = [
        "Cells_Correlation_K_Ch_1_Ch_2",
        "Cells_Granularity_1_Ch_1",
        "Cells_Granularity_1_Ch_2",
    ]
    assert measurements(names)[0].channels == ("Ch_1", "Ch_2")


@pytest.mark.parametrize(
    "name",
    [
        "Metadata_Plate",
        "Metadata_Texture_Contrast_DNA",
        "ObjectNumber",
        "Cells_Parent_Nuclei",
        "Cells_Children_Cytoplasm_Count",
        "Nuclei_Number_Object_Number",
        "Image_Granularity_3_DNA",
        "Mean_Nuclei_AreaShape_Area",
        "AreaShape_Area",
        "Texture_Correlation_DNA_3_00_256",
        "FileName_DNA",
        "",
    ],
)
def test_bookkeeping_and_names_without_an_object_are_no_measurements(name):
    assert parse_column(name) is None


@given(st.text(max_size=60))
def test_any_text_is_parsed_without_a_failure(text):
    for name in (text, f"Cells_{text}", f"Cells_Texture_{text}"):
        column = parse_column(name)
        assert column is None or column.name == name


def test_positions_are_told_from_shapes():
    positions = {
        "Cells_AreaShape_Center_X",
        "Cells_AreaShape_BoundingBoxMaximum_Y",
        "Cells_Location_Center_X",
        "Cells_Location_CenterMassIntensity_Y_DNA",
        "Cells_Neighbors_FirstClosestObjectNumber_10",
    }
    others = {
        "Cells_AreaShape_BoundingBoxArea",
        "Cells_AreaShape_SpatialMoment_0_1",
        "Cells_Neighbors_FirstClosestDistance_10",
        "Cells_Intensity_MaxIntensity_DNA",
    }
    found = {c.name for c in measurements([*positions, *others]) if c.is_position}
    assert found == positions


def test_only_orientations_and_zernike_phases_live_on_a_circle():
    assert parse_column("Cells_AreaShape_Orientation").period == 180
    phase = parse_column("Cells_RadialDistribution_ZernikePhase_DNA_1_1")
    assert phase.period == pytest.approx(2 * np.pi)
    for name in (
        "Cells_RadialDistribution_ZernikeMagnitude_DNA_1_1",
        "Cells_Neighbors_AngleBetweenNeighbors_10",
        "Cells_AreaShape_Area",
    ):
        assert parse_column(name).period is None


def test_a_missing_column_is_named_with_the_nearest_one():
    with pytest.raises(
        ColumnError, match=r"t\.csv: 1 column.*'Metadata_Well' \(did you mean 'metadata_well'"
    ):
        require_columns(
            ["Metadata_Plate", "metadata_well"], ["Metadata_Plate", "Metadata_Well"], "t.csv"
        )


def test_of_many_missing_columns_five_are_shown_and_all_counted():
    with pytest.raises(ColumnError, match=r"8 column.*'f4' and 3 more; it has 1 columns"):
        require_columns(["Metadata_Plate"], [f"f{i}" for i in range(8)], "t.csv")


def test_a_doubled_column_is_named_before_anything_is_missing():
    with pytest.raises(ColumnError, match=r"1 column\(s\) occur more than once: a;"):
        require_columns(["a", "b", "a"], ["c"], "t.csv")


def test_present_columns_pass_in_any_order():
    require_columns(["b", "a"], ["a", "b"], "t.csv")


def test_nearest_is_silent_when_nothing_is_near():
    assert nearest("DNA", ["Tubulin"]) == ""


def test_units_are_those_of_what_is_measured():
    units = {
        "Nuclei_AreaShape_Area": "px²",
        "Cells_AreaShape_MajorAxisLength": "px",
        "Nuclei_AreaShape_Orientation": "°",
        "Nuclei_AreaShape_Eccentricity": "",
        "Nuclei_Intensity_MeanIntensity_DNA": "of the full range",
        "Nuclei_Intensity_StdIntensityEdge_DNA": "of the full range",
        "Nuclei_Intensity_IntegratedIntensity_DNA": "",
        "Nuclei_Texture_Contrast_DNA_3_00_256": "",
        "Metadata_Well": "",
    }
    assert {name: unit_of(name) for name in units} == units


def test_a_long_list_is_cut():
    assert listed(["a", "b"]) == "a, b"
    assert listed([]) == "none"
    assert listed(["a", "b", "c"], most=2) == "a, b and 1 more"
