import numpy as np
import pytest

from cp2image.errors import EvaluationError
from cp2image.metrics.extrapolation import frechet_at_infinity
from cp2image.metrics.frechet import Moments, frechet_distance
from cp2image.metrics.intervals import bootstrap_frechet, bootstrap_kernel
from cp2image.metrics.plate_distance import plate_distance


def screen(wells=30, cells=20, width=6, shift=0.5, seed=0):
    """Pairs of sets; each well has an offset that its cells share, in both sets."""
    rng = np.random.default_rng(seed)
    offset = np.repeat(rng.normal(size=(wells, width)), cells, axis=0)
    real = offset + rng.normal(size=offset.shape)
    drawn = offset + rng.normal(size=offset.shape) + shift
    return real, drawn, np.repeat([f"W{i}" for i in range(wells)], cells).tolist()


def test_endlessly_many_cells_are_foreseen_from_few():
    rng = np.random.default_rng(1)
    truth = 8 * 0.3**2
    found, at_size = [], []
    for _ in range(12):
        x, y = rng.normal(size=(2, 400, 8))
        found.append(frechet_at_infinity(x, y + 0.3).limit)
        at_size.append(frechet_distance(Moments.of(x), Moments.of(y + 0.3)))
    assert np.mean(at_size) > truth + 0.05  # biased upwards
    assert abs(np.mean(found) - truth) < 0.4 * (np.mean(at_size) - truth)


def test_the_line_says_what_it_was_drawn_through():
    x, y = np.random.default_rng(2).normal(size=(2, 400, 8))
    found = frechet_at_infinity(x, y)
    assert (found.sizes[0], found.sizes[-1]) == (100, 400)
    assert found.slope > 0
    assert abs(found.limit) < 4 * found.standard_error + 0.05
    with pytest.raises(EvaluationError, match="100 cells in 70 dimensions"):
        frechet_at_infinity(*np.random.default_rng(0).normal(size=(2, 100, 70)))


def kernel_between_wells(x, y, wells):
    """The definition: the mean over pairs of cells from different wells."""
    other = np.array(wells)[:, None] != np.array(wells)[None, :]
    k = lambda a, b: ((a @ b.T / a.shape[1] + 1) ** 3)[other].mean()  # noqa: E731
    return k(x, x) + k(y, y) - 2 * k(x, y)


def test_kernel_distance_between_wells_is_its_definition():
    x, y, wells = screen()
    order = np.random.default_rng(5).permutation(len(x))
    found, (low, high) = bootstrap_kernel(x[order], y[order], np.array(wells)[order].tolist())
    assert found == pytest.approx(kernel_between_wells(x, y, wells), rel=1e-9)
    assert low < found < high


@pytest.mark.parametrize("measure", [bootstrap_frechet, bootstrap_kernel])
def test_an_interval_over_wells_is_wider_than_one_over_cells(measure):
    """Cells of a well share its offset: taken as independent they promise too much."""
    x, y, wells = screen(cells=30)
    y = y + np.repeat(np.random.default_rng(9).normal(size=(30, 6)), 30, axis=0)
    spans = []
    for groups in (wells, [f"{i}" for i in range(len(x))]):
        found = measure(x, y, groups, resamples=60)
        low, high = found if measure is bootstrap_frechet else found[1]
        spans.append(high - low)
    assert spans[0] > 1.5 * spans[1]


def test_the_interval_of_equal_sets_reaches_zero_and_of_shifted_ones_does_not():
    x, y, wells = screen(shift=0.0)
    assert bootstrap_frechet(x, x, wells)[0] == 0
    low, high = bootstrap_kernel(x, y, wells)[1]
    assert low < 0 < high
    x, y, wells = screen(shift=1.0)
    assert bootstrap_frechet(x, y, wells)[0] > 1
    assert bootstrap_kernel(x, y, wells)[1][0] > 0


def test_sets_that_are_no_pairs_are_refused():
    x, y, wells = screen()
    with pytest.raises(EvaluationError, match="expected pairs"):
        bootstrap_frechet(x, y[:-1], wells)
    with pytest.raises(EvaluationError, match="one well alone"):
        bootstrap_frechet(x, y, ["W"] * len(x))
    with pytest.raises(EvaluationError, match="at least three"):
        bootstrap_kernel(x[:40], y[:40], wells[:40])


def test_plates_are_farther_apart_than_their_halves():
    rng = np.random.default_rng(3)
    plates = np.repeat(["P1", "P2", "P3"], [200, 200, 30])
    x = rng.normal(size=(430, 5)) + 0.5 * (plates == "P2")[:, None]
    found = plate_distance(x, plates.tolist(), np.ones(430, dtype=bool))
    assert (found.pairs, found.n) == (1, 100)  # P3 has too few cells
    assert found.frechet > 5 * found.floor
    assert found.kernel > 0
    assert plate_distance(x, plates.tolist(), plates != "P2") is None
