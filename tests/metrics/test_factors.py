import numpy as np
import pytest

from cp2image.errors import EvaluationError
from cp2image.metrics.factors import Factors


def data(rows=300, width=12, factors=3):
    rng = np.random.default_rng(0)
    loadings, hidden = rng.normal(size=(width, factors)), rng.normal(size=(rows, factors))
    noise = rng.normal(size=(rows, width)) * np.linspace(0.2, 2, width)
    return hidden @ loadings.T + noise + 5, hidden, loadings


def test_fit_equals_scikit_learns():
    reference = pytest.importorskip("sklearn.decomposition").FactorAnalysis(
        3, tol=1e-2, svd_method="lapack"
    )
    x, _, _ = data()
    found, expected = Factors.fit(x, 3), reference.fit(x)
    np.testing.assert_allclose(found.noise, expected.noise_variance_, rtol=1e-6)
    np.testing.assert_allclose(
        found.loadings @ found.loadings.T, expected.components_.T @ expected.components_, rtol=1e-6
    )
    assert found.log_likelihood == pytest.approx(expected.loglike_[-1], rel=1e-9)
    signs = np.sign((found.loadings * expected.components_.T).sum(axis=0))
    np.testing.assert_allclose(found.expected(x) * signs, expected.transform(x), atol=1e-8)


def test_what_features_share_is_found_again_and_their_own_noise_is_not_in_it():
    x, hidden, _ = data(rows=3000)
    found = Factors.fit(x, 3).expected(x)
    least, *_ = np.linalg.lstsq(np.c_[found, np.ones(len(found))], hidden, rcond=None)
    rest = hidden - np.c_[found, np.ones(len(found))] @ least
    assert rest.var() < 0.2 * hidden.var()


@pytest.mark.parametrize("x", [np.zeros((4, 9)), np.zeros((9, 4)), np.full((9, 9), np.nan)])
def test_too_small_tables_and_holes_are_refused(x):
    with pytest.raises(EvaluationError, match="5 factors"):
        Factors.fit(x, 5)
