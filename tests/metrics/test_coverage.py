import numpy as np
import pytest

from cp2image.errors import EvaluationError
from cp2image.metrics.coverage import coverage, nearest


def plain(real, drawn, k):
    """The definitions, cell by cell."""

    def distance(a, b):
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radius(cells, i):
        return sorted(distance(cells[i], other) for other in cells)[k]

    around = [radius(real, i) for i in range(len(real))]
    around_drawn = [radius(drawn, j) for j in range(len(drawn))]
    inside = np.array([[distance(r, d) <= around[i] for d in drawn] for i, r in enumerate(real)])
    back = np.array(
        [[distance(r, d) <= around_drawn[j] for j, d in enumerate(drawn)] for r in real]
    )
    return (
        inside.any(axis=0).mean(),
        back.any(axis=1).mean(),
        inside.sum(axis=0).mean() / k,
        inside.any(axis=1).mean(),
    )


def test_equals_the_definitions_cell_by_cell():
    rng = np.random.default_rng(0)
    real, drawn = rng.normal(size=(40, 3)), 0.6 * rng.normal(size=(30, 3)) + 0.3
    found = coverage(real, drawn, neighbours=3)
    expected = plain(real, drawn, 3)
    got = (found.precision, found.recall, found.density, found.coverage)
    assert got == pytest.approx(expected, abs=1e-12)


def test_collapse_costs_recall_and_noise_precision():
    rng = np.random.default_rng(1)
    real, again = rng.normal(size=(2, 1500, 8))
    same = coverage(real, again)
    mean_image = coverage(real, 0.01 * rng.normal(size=(1500, 8)))
    wild = coverage(real, 6 * rng.normal(size=(1500, 8)))
    assert same.precision > 0.7
    assert same.recall > 0.7
    assert mean_image.recall < 0.05
    assert wild.precision < 0.2
    assert mean_image.coverage < 0.5 * same.coverage


def test_nearest_finds_the_copied_cell():
    rng = np.random.default_rng(2)
    training = rng.normal(size=(1300, 4))
    rows, distances = nearest(training[[7, 1200]] + 1e-6, training)
    assert rows.tolist() == [7, 1200]
    assert (distances < 1e-5).all()


@pytest.mark.parametrize("sets", [((5, 2), (50, 2)), ((50, 2), (50, 3))])
def test_sets_that_cannot_be_compared_are_refused(sets):
    with pytest.raises(EvaluationError):
        coverage(*(np.zeros(shape) for shape in sets))
