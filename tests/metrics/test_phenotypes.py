"""Moves, paths and typical cells where the answer is known without them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf as reference_ledoit_wolf

from cp2image.errors import ColumnError, EvaluationError
from cp2image.metrics.phenotypes.coordinates import Coordinates
from cp2image.metrics.phenotypes.covariance import Guard, ShrunkCovariance, ledoit_wolf
from cp2image.metrics.phenotypes.paths import (
    PrincipalAxes,
    cosine,
    line,
    nearest_to_mean,
    position_on_line,
    swap_features,
)
from cp2image.metrics.phenotypes.representatives import cluster, medoid, prototypes
from cp2image.metrics.phenotypes.response import circular_mean, summarise_response

FEATURES = (
    "Nuclei_AreaShape_Area",
    "Nuclei_AreaShape_Orientation",
    "Nuclei_AreaShape_Eccentricity",
    "Cells_RadialDistribution_ZernikePhase_DNA_2_2",
)
CENTER, SCALE = np.array([500.0, 3.0, 0.5, 0.2]), np.array([80.0, 60.0, 0.1, 1.5])


def rng(seed=0):
    return np.random.default_rng(seed)


def own_to_scaled(own):
    return (own - CENTER) / SCALE


def test_coordinates_give_profiles_back_and_close_angles_to_circles():
    own = np.array([[420.0, -89.0, 0.7, 3.1], [580.0, 89.5, 0.2, -3.1]])
    space = Coordinates(FEATURES)
    assert (space.size, space.columns_of(FEATURES[1])) == (6, (1, 4))
    assert (space.period_of(FEATURES[1]), space.period_of(FEATURES[0])) == (180, None)
    seen = space.encode(own_to_scaled(own), CENTER, SCALE)
    np.testing.assert_allclose(space.decode(seen, CENTER, SCALE), own_to_scaled(own), atol=1e-9)
    assert np.linalg.norm(seen[0, [1, 4]] - seen[1, [1, 4]]) < 0.06  # 1.5° apart across the seam
    assert np.linalg.norm(seen[0, [3, 5]] - seen[1, [3, 5]]) < 0.09
    value = space.encode_value(FEATURES[1], [-89.0], CENTER[1], SCALE[1])
    np.testing.assert_allclose(value[0], seen[0, [1, 4]])
    with pytest.raises(ColumnError, match="did you mean 'Nuclei_AreaShape_Area'"):
        space.columns_of("Nuclei_AreaShape_Aera")


def test_decoded_features_are_limited_as_the_model_limits_them():
    space = Coordinates(FEATURES[:1], clip=5.0)
    assert space.decode([[9.0], [-7.0]], CENTER[:1], SCALE[:1]).ravel().tolist() == [5, -5]


def correlated(n=4000, seed=0):
    """x, y = 0.8 x + 0.6 e, and z apart: known conditional mean and distances."""
    x, e, z = rng(seed).standard_normal((3, n))
    return np.stack([10 + 2 * x, -3 + 5 * (0.8 * x + 0.6 * e), z], axis=1)


def test_the_others_move_by_the_conditional_mean_and_keep_what_is_their_own():
    cells = correlated()
    fitted = ShrunkCovariance.fit(cells, shrinkage=0.0)
    moved = fitted.move(cells[:5], (0,), cells[:5, :1] + 2.0)
    np.testing.assert_allclose(moved[:, 0], cells[:5, 0] + 2)
    np.testing.assert_allclose(moved[:, 1] - cells[:5, 1], 5 * 0.8, rtol=0.05)
    np.testing.assert_allclose(moved[:, 2], cells[:5, 2], atol=0.1)
    slope = np.polyfit(cells[:, 0], cells[:, 1], 1)[0]  # the oracle: a plain regression
    np.testing.assert_allclose(moved[:, 1] - cells[:5, 1], 2 * slope, rtol=2e-3)


def test_two_set_coordinates_agree_with_a_regression_on_both():
    cells = rng(1).standard_normal((3000, 4)) @ rng(2).standard_normal((4, 4))
    fitted = ShrunkCovariance.fit(cells, shrinkage=0.0)
    moved = fitted.move(cells[:3], (0, 2), np.zeros((3, 2)))
    centred = cells - cells.mean(axis=0)
    weights = np.linalg.lstsq(centred[:, [0, 2]], centred[:, [1, 3]], rcond=None)[0]
    expected = cells[:3, [1, 3]] - cells[:3, [0, 2]] @ weights
    np.testing.assert_allclose(moved[:, [1, 3]], expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(30, 60), (400, 20)], ids=["fewer cells", "more cells"])
def test_shrinkage_is_that_of_scikit_learn(shape):
    x = rng(3).standard_normal(shape) @ rng(4).standard_normal((shape[1], shape[1]))
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    _, expected = reference_ledoit_wolf(z, assume_centered=True)
    assert ledoit_wolf(z, z.T @ z / len(z)) == pytest.approx(expected, rel=1e-9)


def test_distance_is_mahalanobis_and_contradiction_the_conditional_residual():
    cells = correlated()
    fitted = ShrunkCovariance.fit(cells, shrinkage=0.0)
    inverse = np.linalg.inv(np.cov(cells.T, bias=True))
    apart = cells[:4] - cells.mean(axis=0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", apart, inverse, apart))
    np.testing.assert_allclose(fitted.distance(cells[:4]), expected, rtol=0.01)
    residual = cells[:, 1] - np.polyval(np.polyfit(cells[:, 0], cells[:, 1], 1), cells[:, 0])
    found = fitted.contradiction(cells, [1])[:, 0]
    np.testing.assert_allclose(found, np.abs(residual) / residual.std(), rtol=0.05, atol=0.05)


def test_the_guard_lets_its_share_of_new_cells_pass_and_marks_what_is_far():
    guard = Guard.fit(correlated(5000), share=0.95)
    inside = (guard.relative(correlated(4000, seed=9)) <= 1).mean()
    assert 0.93 < inside < 0.97
    assert guard.held_back == 1000
    assert guard.relative([[10 + 2 * 8, -3, 0]])[0] > 1.5
    odd = np.array([[10 + 2 * 2.0, -3 - 5 * 2.0, 0]])  # both usual alone, never together
    assert guard.contradicts(odd, (1,))[0] > 1.5
    along = guard.covariance.move([[10.0, -3, 0]], (0,), [[14.0]])
    assert guard.contradicts(along, (0, 1))[0] < 1


def test_constant_and_repeated_columns_do_no_harm():
    x = correlated(100)
    cells = np.column_stack([x, x[:, 0], np.full(100, 7.0)])
    fitted = ShrunkCovariance.fit(cells)
    assert np.isfinite(fitted.distance(cells)).all()
    assert (fitted.move(cells, (0,), cells[:, :1] + 1)[:, 4] == 7).all()


def test_too_few_or_missing_values_are_refused():
    with pytest.raises(EvaluationError, match="19 cells are too few"):
        Guard.fit(correlated(19), 0.99)
    with pytest.raises(EvaluationError, match="NaN"):
        ShrunkCovariance.fit(np.full((5, 2), np.nan))


def test_a_knob_that_works_is_told_from_one_that_does_not():
    requested = np.linspace(100, 200, 6)
    noise = rng(5).normal(0, 4, (20, 6))
    good = summarise_response(requested, 0.5 * requested + noise)
    assert good.rises
    assert good.spearman > 0.9
    assert good.slope == pytest.approx(0.5, abs=0.05)
    bad = summarise_response(requested, 150 + noise)
    assert not bad.rises
    assert abs(bad.spearman) < 0.3
    flat = summarise_response(requested, np.full((3, 6), 2.0))
    assert np.isnan(flat.spearman)
    assert not flat.rises


def test_undefined_measurements_are_left_out_and_counted():
    measured = np.tile(np.arange(4.0), (3, 1))
    measured[0, 1] = measured[:, 3] = np.nan
    found = summarise_response(np.arange(4.0), measured)
    assert found.cells.tolist() == [3, 2, 3, 0]
    assert not found.rises
    np.testing.assert_allclose(found.mean[:3], [0, 1, 2])


def wrap(angles):
    return (angles + 90) % 180 - 90


def test_angles_that_follow_are_unrolled_over_the_seam():
    requested = np.linspace(-88, 88, 9)
    measured = wrap(requested + 10 + rng(6).normal(0, 5, (30, 9)))
    found = summarise_response(requested, measured, period=180)
    assert found.rises
    assert found.spearman > 0.97
    assert found.slope == pytest.approx(1, abs=0.05)
    assert not summarise_response(requested, measured).rises  # as plain numbers they jump


def test_angles_that_ignore_the_request_are_not_talked_into_following():
    requested = np.linspace(-88, 88, 9)
    still = np.tile(rng(7).normal(70, 10, (30, 1)), (1, 9))
    found = summarise_response(requested, wrap(still), period=180)
    assert found.directed
    assert not found.rises
    assert abs(found.slope) < 1e-9
    for seed in range(20):
        random = rng(seed).uniform(-90, 90, (30, 9))
        found = summarise_response(requested, random, period=180)
        assert abs(found.spearman) < 0.25
        assert not found.directed
        assert not found.rises
        assert np.isnan([found.slope, *found.mean, *found.deviation]).all()


@pytest.mark.parametrize("cells", [1, 4])
def test_a_few_cells_have_no_mean_direction_but_their_ranks(cells):
    requested = np.linspace(-80, 80, 9)
    found = summarise_response(requested, np.tile(requested, (cells, 1)), period=180)
    assert not found.directed
    assert found.spearman == pytest.approx(1)
    np.testing.assert_allclose(found.measured, np.tile(requested, (cells, 1)))
    assert summarise_response(requested, np.tile(requested, (5, 1)), period=180).directed


def test_mean_of_axes_on_either_side_of_the_seam():
    assert abs(circular_mean([89.0, -89.0, np.nan], 180)) == pytest.approx(90)


def test_a_trajectory_takes_the_largest_differences_first_and_ends_at_the_target():
    start, target = np.array([0.0, 1, 0, 2, 5]), np.array([3.0, -9, 0.5, 2, 4])
    way = swap_features(start, target, 2)
    assert way.order[:4].tolist() == [1, 0, 4, 2]
    assert way.swapped.tolist() == [0, 2, 4]
    np.testing.assert_array_equal(way.profiles[1], [3, -9, 0, 2, 5])
    np.testing.assert_array_equal(way.profiles[-1], target)
    assert way.similarity[-1] == pytest.approx(1)
    expected = start @ target / np.sqrt((start @ start) * (target @ target))
    assert way.similarity[0] == pytest.approx(expected)
    still = swap_features(target, target, 3)
    assert still.swapped.tolist() == [0, 0]


@given(st.integers(1, 30), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_every_step_takes_its_number_of_features(features, step):
    start, target = rng(features).standard_normal((2, features))
    way = swap_features(start, target, step)
    changed = (way.profiles != start).sum(axis=1)
    assert changed.tolist() == way.swapped.tolist()
    assert (np.diff(way.swapped)[:-1] == step).all()
    assert 0 < way.swapped[-1] - way.swapped[-2] <= step
    distance = np.linalg.norm(way.profiles - target, axis=1)
    assert (np.diff(distance) < 0).all()


def test_principal_axes_span_the_same_whichever_side_is_smaller():
    base = rng(9).standard_normal((40, 3)) @ rng(10).standard_normal((3, 60))
    wide = PrincipalAxes.fit(base, 3)
    tall = PrincipalAxes.fit(np.vstack([base, base]), 3)
    np.testing.assert_allclose(wide.axes, tall.axes, atol=1e-8)
    np.testing.assert_allclose(wide.explained.sum(), 1)
    _, singular, _ = np.linalg.svd(base - base.mean(axis=0))
    np.testing.assert_allclose(wide.explained, singular[:3] ** 2 / (singular**2).sum())
    back = wide.project(base) @ wide.axes + wide.mean
    np.testing.assert_allclose(back, base, atol=1e-8)


def test_places_on_a_line():
    a, b = np.array([1.0, 1]), np.array([3.0, 1])
    np.testing.assert_allclose(line(a, b, [0, 0.5, 1]), [[1, 1], [2, 1], [3, 1]])
    np.testing.assert_allclose(position_on_line([[2, 9], [4, -3]], a, b), [0.5, 1.5])
    with pytest.raises(EvaluationError, match="one point"):
        position_on_line([[0, 0]], a, a)
    assert nearest_to_mean([[0, 0], [4, 4], [5, 5]]) == 1
    assert cosine([[0.0, 0], [2, 0]], [1, 0]).tolist() == [0, 1]


def test_the_medoid_is_no_outlier_and_prototypes_reach_every_clump():
    clumps = np.array([[0.0, 0], [10, 0], [0, 10]])
    counts = [40, 30, 20]
    cells = np.concatenate(
        [clumps[i] + rng(i).normal(0, 0.5, (count, 2)) for i, count in enumerate(counts)]
    )
    cells = np.vstack([cells, [[30.0, 30]]])
    truth = np.repeat([0, 1, 2, 3], [*counts, 1])
    sums = np.linalg.norm(cells[:, None] - cells[None], axis=2).sum(axis=1)
    assert medoid(cells) == sums.argmin()
    chosen = prototypes(cells, 3)
    assert chosen[0] == medoid(cells)
    assert sorted(truth[chosen]) == [0, 1, 2]
    assert len(prototypes(cells[:2], 5)) == 2
    labels = cluster(cells[:-1], 3, seed=0)
    assert [np.unique(labels[truth[:-1] == k]).tolist() for k in range(3)] == [[0], [1], [2]]
    with pytest.raises(EvaluationError, match="5 clusters of 2"):
        cluster(cells[:2], 5)
