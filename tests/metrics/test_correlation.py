import numpy as np
import pandas as pd
import pytest
from scipy.stats import pearsonr

from cp2image.errors import ColumnError, EvaluationError
from cp2image.metrics.correlation import (
    PairedMoments,
    bootstrap_correlation,
    feature_correlation,
    group_moments,
    summarise_correlation,
)

AREA, TEXTURE = "Nuclei_AreaShape_Area", "Cells_Texture_Contrast_DNA_3_01_256"
ANGLE = "Nuclei_AreaShape_Orientation"
PHASE = "Cells_RadialDistribution_ZernikePhase_Actin_2_2"
FLAT = "Cytoplasm_Intensity_MaxIntensity_Actin"


@pytest.fixture
def tables():
    rng = np.random.default_rng(0)
    n = 400
    latent = rng.normal(size=n)
    direction = rng.uniform(-90, 90, n)
    original = pd.DataFrame(
        {
            "Metadata_Well": rng.choice(list("ABCDEFGH"), n),
            AREA: latent + rng.normal(size=n),
            TEXTURE: 1e6 + 10 * latent,
            ANGLE: direction,
            PHASE: rng.vonmises(2.9, 4, n),
            FLAT: 0.1 + rng.normal(0, 1e-9, n),
            "Nuclei_Location_Center_X": np.arange(n),
        }
    )
    generated = pd.DataFrame(
        {
            FLAT: rng.normal(size=n),
            AREA: latent + rng.normal(size=n),
            TEXTURE: 1e6 + 10 * latent + rng.normal(size=n),
            ANGLE: (direction + 100 + rng.normal(0, 5, n)) % 180 - 90,
            PHASE: (original[PHASE] + rng.normal(0, 0.2, n) + np.pi) % (2 * np.pi) - np.pi,
        }
    )
    original.loc[:9, AREA] = np.nan
    generated.loc[5:14, AREA] = np.inf
    return original, generated


def r_of(table, feature):
    return table.set_index("feature").loc[feature, "r"]


def plain_circular(a, b):
    """Sines about μ, ν with μ ∓ ν the mean directions of a ∓ b; sums written out."""
    minus = np.arctan2(np.sin(a - b).sum(), np.cos(a - b).sum())
    plus = np.arctan2(np.sin(a + b).sum(), np.cos(a + b).sum())
    x, y = np.sin(a - (plus + minus) / 2), np.sin(b - (plus - minus) / 2)
    return (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())


def test_r_equals_scipy_over_the_pairs_that_are_finite(tables):
    original, generated = tables
    table = feature_correlation(original, generated)
    for name in (AREA, TEXTURE):
        x, y = original[name].to_numpy(), generated[name].to_numpy()
        valid = np.isfinite(x) & np.isfinite(y)
        assert r_of(table, name) == pytest.approx(pearsonr(x[valid], y[valid])[0], abs=1e-9)
    assert table.set_index("feature").loc[AREA, "n"] == 385


def test_each_feature_has_its_compartment_category_and_kind_and_positions_are_left_out(tables):
    table = feature_correlation(*tables).set_index("feature")
    assert list(table.index) == [AREA, TEXTURE, ANGLE, PHASE, FLAT]
    assert list(table["kind"]) == ["linear", "linear", "circular", "circular", "linear"]
    assert tuple(table.loc[TEXTURE, ["compartment", "category"]]) == ("Cells", "Texture")


def test_angles_that_follow_across_the_wrap_correlate(tables):
    original, generated = tables
    table = feature_correlation(original, generated)
    for name, period in ((ANGLE, 180), (PHASE, 2 * np.pi)):
        a, b = (part[name].to_numpy() * 2 * np.pi / period for part in tables)
        assert r_of(table, name) == pytest.approx(plain_circular(a, b), abs=1e-10)
        assert r_of(table, name) > 0.9
        assert pearsonr(original[name], generated[name])[0] < r_of(table, name) - 0.1


def test_circular_r_is_pearsons_for_a_narrow_range_of_angles():
    rng = np.random.default_rng(1)
    a = rng.normal(20, 2, 3000)
    b = a + rng.normal(0, 3, 3000)
    found = feature_correlation(pd.DataFrame({ANGLE: a}), pd.DataFrame({ANGLE: b}))
    assert r_of(found, ANGLE) == pytest.approx(pearsonr(a, b)[0], abs=0.01)


def test_circular_r_of_unrelated_and_of_mirrored_even_angles_is_zero_and_minus_one():
    rng = np.random.default_rng(2)
    a, b = (rng.uniform(-90, 90, 4000) for _ in range(2))
    unrelated = feature_correlation(pd.DataFrame({ANGLE: a}), pd.DataFrame({ANGLE: b}))
    mirrored = feature_correlation(pd.DataFrame({ANGLE: a}), pd.DataFrame({ANGLE: -a}))
    assert abs(r_of(unrelated, ANGLE)) < 0.05
    assert r_of(mirrored, ANGLE) == pytest.approx(-1, abs=0.03)


def test_a_constant_feature_has_no_r_however_large_its_value():
    n = 50
    noise = np.random.default_rng(3).normal(size=n)
    big = np.float32(123456.7) * (1 + 1e-8 * noise)
    for flat in (np.zeros(n), np.full(n, 7.5), big):
        table = feature_correlation(pd.DataFrame({AREA: flat}), pd.DataFrame({AREA: noise}))
        assert np.isnan(r_of(table, AREA))
    small = feature_correlation(pd.DataFrame({AREA: 1e-9 * noise}), pd.DataFrame({AREA: noise}))
    assert r_of(small, AREA) == pytest.approx(1)
    still = feature_correlation(
        pd.DataFrame({ANGLE: np.full(n, 30.0)}), pd.DataFrame({ANGLE: noise})
    )
    assert np.isnan(r_of(still, ANGLE))


def test_merged_shards_equal_one_pass(tables):
    original, generated = tables
    one = PairedMoments.of(original, generated)
    cuts = [slice(0, 3), slice(3, 12), slice(12, 12), slice(12, 400)]
    parts = [PairedMoments.of(original.iloc[c], generated.iloc[c]) for c in cuts]
    merged = parts[3].merge(parts[0]).merge(parts[2]).merge(parts[1])
    np.testing.assert_array_equal(merged.n, one.n)
    np.testing.assert_allclose(merged.mean, one.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.m2[:, :2], one.m2[:, :2], rtol=1e-10)
    np.testing.assert_allclose(merged.correlation(), one.correlation(), atol=1e-12)


def test_r_survives_a_mean_far_larger_than_the_spread():
    rng = np.random.default_rng(4)
    x = rng.normal(size=2000)
    y = x + rng.normal(size=2000)
    parts = [
        PairedMoments.of(pd.DataFrame({AREA: a + 1e5}), pd.DataFrame({AREA: b + 1e5}))
        for a, b in zip(np.split(x, 20), np.split(y, 20), strict=True)
    ]
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    assert total.correlation()[0] == pytest.approx(pearsonr(x, y)[0], abs=1e-9)


def test_summary_counts_shares_over_the_defined_features_only():
    table = pd.DataFrame(
        {
            "feature": list("abcd"),
            "compartment": ["Nuclei", "Nuclei", "Cells", "Cells"],
            "category": ["Texture"] * 4,
            "r": [0.9, 0.5, 0.6, np.nan],
        }
    )
    summary = summarise_correlation(table)
    assert (summary["features"], summary["undefined"]) == (4, 1)
    assert summary["share_above_half"] == pytest.approx(2 / 3)
    assert summary["mean_r"] == pytest.approx(2 / 3)
    assert summary["median_r"] == pytest.approx(0.6)
    assert summary["by_compartment"]["Cells"]["share_above_half"] == 1
    assert summary["by_category"]["Texture"]["features"] == 4
    assert summarise_correlation(table[3:])["mean_r"] is None


def test_bootstrap_from_group_sums_equals_drawing_the_rows_themselves(tables):
    original, generated = tables
    wells = original["Metadata_Well"]
    parts = group_moments(original, generated, list(wells))
    found = bootstrap_correlation(parts, resamples=20, seed=5)
    rng = np.random.default_rng(5)
    names, draws = sorted(parts), []
    for _ in range(20):
        rows = [np.flatnonzero(wells == names[i]) for i in rng.integers(8, size=8)]
        rows = np.concatenate(rows)
        draws.append(PairedMoments.of(original.iloc[rows], generated.iloc[rows]).correlation())
    low, high = np.quantile(np.array(draws)[:, :4], [0.025, 0.975], axis=0)
    np.testing.assert_allclose(found.r[:, :4], [low, high], atol=1e-9)
    assert np.isnan(found.r[:, 4]).all()
    means = [np.nanmean(draw) for draw in draws]
    np.testing.assert_allclose(found.summary["mean_r"], np.quantile(means, [0.025, 0.975]))


def test_interval_over_wells_is_wider_than_over_cells_when_wells_differ():
    rng = np.random.default_rng(6)
    well = np.repeat(np.arange(12), 50)
    effect = rng.normal(0, 3, size=(2, 12))[:, well]
    a, b = (pd.DataFrame({AREA: e + rng.normal(size=len(well))}) for e in effect)
    by_well = bootstrap_correlation(group_moments(a, b, list(well)), resamples=300).r
    by_cell = bootstrap_correlation(group_moments(a, b, range(len(well))), resamples=300).r
    assert np.ptp(by_well) > 3 * np.ptp(by_cell)


def test_tables_that_cannot_be_paired_are_refused(tables):
    original, generated = tables
    with pytest.raises(EvaluationError, match="400 original and 399 generated"):
        feature_correlation(original, generated[1:])
    with pytest.raises(ColumnError, match=rf"generated features.*{AREA}"):
        feature_correlation(original, generated.drop(columns=AREA))
    with pytest.raises(EvaluationError, match="no CellProfiler measurement"):
        feature_correlation(original[["Metadata_Well"]], generated)
    area, texture = (PairedMoments.of(original, generated, [f]) for f in (AREA, TEXTURE))
    with pytest.raises(EvaluationError, match="cannot be merged"):
        area.merge(texture)
    with pytest.raises(EvaluationError, match="at least 2"):
        bootstrap_correlation({"A01": PairedMoments.of(original, generated)})
    with pytest.raises(EvaluationError, match="3 group labels for 400 rows"):
        group_moments(original, generated, [1, 2, 3])
