import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from cp2image.errors import EvaluationError
from cp2image.metrics.frechet import (
    Moments,
    frechet_distance,
    kernel_distance,
    merge_moments,
)

DIMENSION = 12


class Flatten(torch.nn.Module):
    """The 'embedding' given to torchmetrics: the pixels themselves."""

    num_features = DIMENSION

    def forward(self, images):
        return images.double().flatten(1)


@pytest.fixture
def two_sets():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(DIMENSION, DIMENSION))
    real = rng.integers(0, 200, size=(400, DIMENSION)).astype(np.uint8)
    generated = np.clip(rng.normal(size=(300, DIMENSION)) @ mixing * 12 + 110, 0, 255)
    return real, generated.astype(np.uint8)


def images(features):
    return torch.from_numpy(features.reshape(len(features), 3, 2, 2))


def test_frechet_distance_equals_torchmetrics_fid(two_sets):
    oracle = FrechetInceptionDistance(feature=Flatten())
    oracle.set_dtype(torch.float64)
    for features, real in zip(two_sets, (True, False), strict=True):
        oracle.update(images(features), real=real)
    ours = frechet_distance(*map(Moments.of, two_sets))
    assert ours == pytest.approx(float(oracle.compute()), rel=1e-6)


def test_frechet_distance_equals_the_matrix_square_root(two_sets):
    a, b = (x.astype(np.float64) for x in two_sets)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    expected = shift + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_gaussians_in_one_dimension():
    a, b = (
        Moments(11, np.array([1.0]), np.array([[40.0]])),
        Moments(11, np.array([4.0]), np.array([[90.0]])),
    )
    assert frechet_distance(a, b) == pytest.approx(3**2 + (3 - 2) ** 2)


def test_frechet_distance_is_symmetric_and_zero_on_itself(two_sets):
    a, b = map(Moments.of, two_sets)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e6], ids=["centred", "far from zero"])
def test_merged_shards_equal_one_pass(offset):
    x = np.random.default_rng(1).normal(size=(1000, 8)) + offset
    shards = [Moments.of(part) for part in np.split(x, [1, 1, 17, 400])]
    one, merged = Moments.of(x), merge_moments(shards[::-1])
    assert merged.n == one.n == 1000
    np.testing.assert_allclose(merged.mean, one.mean, rtol=1e-12, atol=1e-12)
    scale = np.abs(one.m2).max()
    np.testing.assert_allclose(merged.m2, one.m2, atol=scale * (1e-12 if offset == 0 else 1e-9))
    np.testing.assert_allclose(one.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-12)


def test_adding_batches_equals_one_pass_and_leaves_the_first_untouched():
    x = np.random.default_rng(2).normal(size=(50, 3))
    first = Moments.of(x[:20])
    total = first.add(x[20:])
    np.testing.assert_allclose(total.m2, Moments.of(x).m2, rtol=1e-12)
    assert first.n == 20
    assert Moments.empty(3).add(x).n == 50


def test_fewer_cells_than_dimensions_are_refused_unless_asked_for():
    rng = np.random.default_rng(3)
    a, b = (Moments.of(rng.normal(size=(n, 30))) for n in (100, 30))
    with pytest.raises(EvaluationError, match=r"30 cells in 30 dimensions.*allow_singular"):
        frechet_distance(a, b)
    with pytest.warns(UserWarning, match="singular"):
        assert frechet_distance(a, b, allow_singular=True) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Moments.of(np.zeros(3)), r"shape \(3,\)"),
        (lambda: Moments.of([[0.0], [np.nan]]), "1 of 2 feature vectors.*row 1"),
        (lambda: Moments.empty(2).merge(Moments.empty(3)), "2 and 3 dimensions"),
        (lambda: Moments.of(np.zeros((1, 2))).covariance, "1 feature vector"),
        (lambda: merge_moments([]), "empty"),
        (lambda: kernel_distance(np.zeros((5, 2)), np.zeros((5, 2)), subset_size=3), "two subsets"),
        (lambda: kernel_distance(np.zeros((5, 2)), np.zeros((5, 3))), "2 and 3 dimensions"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(call, message):
    with pytest.raises(EvaluationError, match=message):
        call()


def plain_mmd2(x, y):
    def kernel(u, v):
        return (float(u @ v) / len(u) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(kernel(u, v) for u in x for v in y) / (n * m)


def test_kernel_distance_is_the_mean_of_plain_mmd_over_disjoint_subsets():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(17, 5)), rng.normal(size=(14, 5)) + 0.5
    found = kernel_distance(x, y, subset_size=7, seed=9)
    order = np.random.default_rng(9)
    rows_x, rows_y = order.permutation(17), order.permutation(14)
    values = [plain_mmd2(x[rows_x[s]], y[rows_y[s]]) for s in (slice(0, 7), slice(7, 14))]
    assert found.subsets == 2
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / np.sqrt(2), rel=1e-9)


def test_kernel_distance_equals_torchmetrics_kid_in_expectation(two_sets):
    torch.manual_seed(0)
    oracle = KernelInceptionDistance(feature=Flatten(), subsets=200, subset_size=60)
    oracle.set_dtype(torch.float64)
    for features, real in zip(two_sets, (True, False), strict=True):
        oracle.update(images(features), real=real)
    expected, spread = map(float, oracle.compute())
    ours = [kernel_distance(*two_sets, subset_size=60, seed=seed).mean for seed in range(40)]
    assert np.mean(ours) == pytest.approx(expected, abs=4 * spread * np.sqrt(1 / 200 + 1 / 40 / 5))


def test_kernel_distance_of_one_population_is_zero_within_its_error():
    rng = np.random.default_rng(5)
    scores = [
        kernel_distance(rng.normal(size=(300, 6)), rng.normal(size=(300, 6))) for _ in range(60)
    ]
    z = np.array([score.mean / score.standard_error for score in scores])
    assert abs(z.mean()) < 4 * z.std() / np.sqrt(len(z))
    assert 0.7 < z.std() < 1.5
