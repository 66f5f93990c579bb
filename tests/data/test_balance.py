from collections import Counter

import numpy as np
import pytest

from cp2image.data.balance import TreatmentSampler
from cp2image.errors import TrainingError

CELLS = np.random.default_rng(0).choice(12, 5000, p=np.arange(1, 13) / 78)


def treatments_drawn(sampler, steps, cells=CELLS, stream="original"):
    return [cells[sampler.draw(step, stream)] for step in range(steps)]


def test_batch_of_default_size_holds_one_cell_of_each_treatment():
    for drawn in treatments_drawn(TreatmentSampler(CELLS), 20):
        assert sorted(drawn) == list(range(12))


@pytest.mark.parametrize("size", [1, 5, 11, 12, 13, 40])
def test_every_treatment_is_drawn_equally_often_whatever_the_batch_size(size):
    drawn = np.concatenate(treatments_drawn(TreatmentSampler(CELLS, size), 12))
    assert set(Counter(drawn.tolist()).values()) == {size}


def test_small_batches_draw_treatments_without_replacement():
    drawn = treatments_drawn(TreatmentSampler(CELLS, 6), 10)
    assert all(len(set(batch)) == 6 for batch in drawn)


def test_batch_is_a_function_of_seed_step_and_stream_alone():
    first, resumed = TreatmentSampler(CELLS, seed=3), TreatmentSampler(CELLS, seed=3)
    for step in range(10):
        first.draw(step)
    np.testing.assert_array_equal(first.draw(10), resumed.draw(10))


@pytest.mark.parametrize(
    "other",
    [
        lambda: TreatmentSampler(CELLS, 600, seed=1).draw(5),
        lambda: TreatmentSampler(CELLS, 600).draw(6),
        lambda: TreatmentSampler(CELLS, 600).draw(5, "real"),
    ],
    ids=["seed", "step", "stream"],
)
def test_other_seed_step_or_stream_draws_other_cells_in_another_order(other):
    batch, another = TreatmentSampler(CELLS, 600).draw(5), other()
    assert (batch == another).mean() < 0.05
    assert (CELLS[batch] == CELLS[another]).mean() < 0.2


def test_cells_of_a_treatment_are_drawn_evenly():
    sampler = TreatmentSampler(CELLS)
    rows = np.concatenate([sampler.draw(step) for step in range(8000)])
    counts = np.bincount(rows[CELLS[rows] == 0], minlength=len(CELLS))[CELLS == 0]
    expected = 8000 / len(counts)
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - len(counts)) < 5 * np.sqrt(2 * len(counts))


def test_workers_with_all_treatments_share_one_balanced_batch():
    workers = [
        TreatmentSampler(CELLS, 12, rank=rank, world=5, treatments_in_all=12) for rank in range(5)
    ]
    for step in range(5):
        pieces = [CELLS[worker.draw(step)] for worker in workers]
        assert sorted(np.concatenate(pieces)) == list(range(12))
        assert [len(piece) for piece in pieces] == [3, 3, 2, 2, 2]


def test_one_worker_of_one_draws_what_it_would_draw_alone():
    alone = TreatmentSampler(CELLS, 7, seed=2)
    counted = TreatmentSampler(CELLS, 7, seed=2, treatments_in_all=12)
    np.testing.assert_array_equal(alone.draw(4), counted.draw(4))


def test_worker_without_a_treatment_draws_another_of_its_own():
    mine = CELLS[CELLS % 3 == 0]
    worker = TreatmentSampler(mine, 12, rank=1, world=2, treatments_in_all=12)
    drawn = np.concatenate(treatments_drawn(worker, 300, mine))
    assert len(drawn) == 6 * 300
    assert set(drawn) == {0, 3, 6, 9}
    assert min(Counter(drawn.tolist()).values()) > 350


def test_numbers_of_treatments_need_not_be_consecutive():
    cells = np.array([5, 5, 90, 1000])
    assert sorted(cells[TreatmentSampler(cells).draw(0)]) == [5, 90, 1000]


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        ([], {}, "worker 0 of 1 has no training cells"),
        ([0, 1], {"world": 2}, "treatments_in_all"),
        ([0, 7], {"treatments_in_all": 5}, "0 to 7 found, expected numbers from 0 to 4"),
        ([0, 1], {"world": 3, "treatments_in_all": 2}, "cannot share batches of 2"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(cells, options, message):
    with pytest.raises(TrainingError, match=message):
        TreatmentSampler(np.array(cells, dtype=int), **options)
