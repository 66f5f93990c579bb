import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cp2image.config_train import Scaling
from cp2image.data.selection import (
    FeatureStatistics,
    Selection,
    drop_near_duplicates,
    select_features,
)
from cp2image.errors import ConfigError, DatasetError

NAMES = [
    "Nuclei_AreaShape_Area",
    "Metadata_Plate",
    "ObjectNumber",
    "Nuclei_AreaShape_Center_X",
    "Nuclei_Location_Center_Y",
    "Cells_Intensity_MeanIntensity_DNA",
    "Cells_Intensity_MinIntensity_DNA",
    "Cells_Texture_Contrast_DNA_3_01_256",
    "Cells_Granularity_16_DNA",
]


def values(cells=200):
    table = np.random.default_rng(0).normal(5, 2, (cells, len(NAMES)))
    table[:, 6] = 0.25
    table[: cells // 10, 7] = np.nan
    table[: cells // 10, 8] = np.inf
    return table


def statistics(table):
    found = FeatureStatistics(table.shape[1])
    found.add(table)
    return found


def test_statistics_equal_numpys_over_the_finite_values():
    table = values()
    found = statistics(table)
    for column in range(table.shape[1]):
        good = table[np.isfinite(table[:, column]), column]
        assert found.mean[column] == pytest.approx(good.mean(), rel=1e-12)
        assert found.deviation[column] == pytest.approx(good.std(), rel=1e-12, abs=1e-15)
        assert (found.minimum[column], found.maximum[column]) == (good.min(), good.max())
    np.testing.assert_array_equal(found.missing, np.isnan(table).sum(axis=0))
    np.testing.assert_array_equal(found.infinite, np.isinf(table).sum(axis=0))
    assert found.count == len(table)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.sampled_from([0.0, 1e5, -1e8]))
def test_merging_blocks_of_any_size_equals_adding_all_at_once(sizes, offset):
    table = np.random.default_rng(1).normal(offset, 1, (sum(sizes), 3))
    table[::7, 1] = np.nan
    whole, merged = statistics(table), FeatureStatistics(3)
    for block in np.split(table, np.cumsum(sizes)[:-1]):
        merged.merge(statistics(block))
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(merged.finite, whole.finite)
    np.testing.assert_array_equal(merged.maximum, whole.maximum)


def test_spread_survives_a_large_mean_in_float32_blocks():
    table = (1e5 + np.random.default_rng(2).normal(0, 1, (20_000, 1))).astype(np.float32)
    found = FeatureStatistics(1)
    for block in np.array_split(table, 50):
        found.add(block)
    assert found.deviation[0] == pytest.approx(table.astype(float).std(), rel=1e-9)


def test_each_column_is_kept_or_dropped_for_its_reason():
    chosen = select_features(NAMES, statistics(values()), Scaling())
    assert chosen.kept == ("Nuclei_AreaShape_Area", "Cells_Intensity_MeanIntensity_DNA")
    reasons = {name: reason.partition(":")[0] for name, reason in chosen.dropped.items()}
    assert reasons == {
        "Metadata_Plate": "identifier",
        "ObjectNumber": "identifier",
        "Nuclei_AreaShape_Center_X": "position",
        "Nuclei_Location_Center_Y": "position",
        "Cells_Intensity_MinIntensity_DNA": "constant",
        "Cells_Texture_Contrast_DNA_3_01_256": "missing",
        "Cells_Granularity_16_DNA": "infinite",
    }


def test_a_few_missing_or_infinite_values_do_not_cost_a_feature():
    table = values()
    table[:, 7:] = 1 + np.random.default_rng(3).random((len(table), 2))
    table[:5, 7], table[:5, 8] = np.nan, np.inf
    assert select_features(NAMES, statistics(table), Scaling()).kept[-2:] == tuple(NAMES[7:])


def test_constant_is_judged_relative_to_the_size_of_the_values():
    rng = np.random.default_rng(4)
    table = np.stack([1e6 + 1e-2 * rng.random(99), 1e-9 * rng.random(99)], axis=1)
    chosen = select_features(
        ["Nuclei_AreaShape_Area", "Nuclei_AreaShape_Extent"], statistics(table), Scaling()
    )
    assert chosen.kept == ("Nuclei_AreaShape_Extent",)


def test_the_later_of_two_features_that_say_the_same_is_left_out():
    random = np.random.default_rng(5)
    a, b = random.normal(size=(2, 500))
    table = np.stack([a, b, -3 * a + 7, a + 0.1 * b, np.zeros(500), a + b], axis=1)
    before = Selection(tuple("abcdef"), {"x": "constant: 1"})
    chosen = drop_near_duplicates(before, table, 0.98)
    assert chosen.kept == ("a", "b", "e", "f")
    assert chosen.dropped["c"] == "duplicate: r = -1.000 with a"
    assert chosen.dropped["d"].startswith("duplicate: r = 0.99")
    assert chosen.dropped["x"] == "constant: 1"
    assert drop_near_duplicates(before, table, 0.999).kept == ("a", "b", "d", "e", "f")
    assert drop_near_duplicates(before, table, 1.0).kept == before.kept


def test_categories_and_columns_not_wanted_are_left_out():
    wish = Scaling(categories=["AreaShape"], drop=["Cells_Granularity_16_DNA"])
    chosen = select_features(NAMES, statistics(values()), wish)
    assert chosen.kept == ("Nuclei_AreaShape_Area",)
    assert chosen.dropped["Cells_Granularity_16_DNA"].startswith("unwanted")
    assert chosen.dropped["Cells_Intensity_MeanIntensity_DNA"].startswith("category")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"drop": ["Nuclei_AreaShape_Aera"]}, "scaling.drop: 'Nuclei_AreaShape_Aera'.*Shape_Area'"),
        ({"categories": ["Textur"]}, r"scaling.categories: 'Textur'.*'Texture'"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(wish, message):
    with pytest.raises(ConfigError, match=message):
        select_features(NAMES, statistics(values()), Scaling(**wish))


def test_a_table_without_any_feature_is_refused_with_the_counts():
    names = ["Metadata_Plate", "area", "Nuclei_AreaShape_Center_X"]
    with pytest.raises(DatasetError, match=re.escape("2 identifier, 1 position")):
        select_features(names, statistics(np.random.default_rng(0).random((9, 3))), Scaling())


def test_no_training_cells_are_refused():
    with pytest.raises(DatasetError, match="no training cells"):
        select_features(NAMES, FeatureStatistics(len(NAMES)), Scaling())


def test_block_of_another_width_is_refused():
    with pytest.raises(DatasetError, match=r"\(4, 2\).*3 features"):
        FeatureStatistics(3).add(np.zeros((4, 2)))
