"""Scores of drawn cells against held-out real ones: what they are, and that they are not gamed."""

import numpy as np
import pytest

from cp2image.errors import EvaluationError
from cp2image.metrics.correlation import feature_correlation
from cp2image.metrics.embedding import CellProfilerEmbedding
from cp2image.metrics.frechet import Moments, frechet_distance
from cp2image.metrics.measurement import measure
from cp2image.metrics.validation import ValidationScores

CHANNELS, FAMILIES = ("DNA", "Actin"), ["AreaShape", "Intensity"]
BLACK = np.zeros((2, 40, 40), np.float32)


def blobs(count, seed):
    """Nuclei of random size, position and brightness, and a wider ring around them."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :40][:, None] - 19.5 - random.normal(0, 1, (2, count, 1, 1))
    distance = np.hypot(y, x * random.uniform(0.7, 1.3, (count, 1, 1)))
    level = random.uniform(0.4, 1, (2, count, 1, 1))
    radius = random.uniform(5, 9, (count, 1, 1))
    cells = [level[i] / (1 + np.exp(distance - radius - 5 * i)) for i in range(2)]
    return np.stack(cells, axis=1).clip(0, 1).astype(np.float32)


@pytest.fixture(scope="module")
def real():
    return blobs(160, 0)


@pytest.fixture(scope="module")
def scores(real):
    return ValidationScores(real, CHANNELS, ["cp", "filterbank"], FAMILIES)


def test_the_cells_themselves_are_at_distance_0_with_every_r_at_1(scores, real):
    found = scores.of(real)
    assert found["frechet_cp"] == pytest.approx(0, abs=1e-5)
    assert found["frechet_filterbank"] == pytest.approx(0, abs=1e-3)
    assert found["mean_r"] == pytest.approx(1)
    assert found["without_nucleus"] == 0
    assert found["frechet_cp_floor"] > 0


def test_scores_equal_the_metrics_computed_one_by_one(scores, real):
    drawn = (0.5 * real + 0.5 * blobs(160, 1)).clip(0, 1)
    table, other = (
        measure(np.rint(part * 255).astype(np.uint8), channels=CHANNELS, families=FAMILIES)
        for part in (real, drawn)
    )
    assert other.notna().any(axis=1).all()
    embedding = CellProfilerEmbedding.fit(table)
    distance = frechet_distance(*(Moments.of(embedding.embed(part)) for part in (table, other)))
    found = scores.of(drawn)
    assert found["frechet_cp"] == pytest.approx(distance, rel=1e-6)
    assert found["mean_r"] == pytest.approx(feature_correlation(table, other)["r"].mean())


def test_the_more_cells_have_no_nucleus_the_worse_the_scores(scores, real):
    found = []
    for every in (4, 2, 1):
        drawn = real.copy()
        drawn[::every] = BLACK
        found.append(scores.of(drawn))
        assert found[-1]["without_nucleus"] == pytest.approx(1 / every)
    distances, correlations = ([one[n] for one in found] for n in ("frechet_cp", "mean_r"))
    assert 10 < distances[0] < distances[1] < distances[2]
    assert 0.9 > correlations[0] > correlations[1] > correlations[2] == 0


def test_one_picture_for_all_cells_has_no_correlation(scores, real):
    found = scores.of(np.broadcast_to(real[:1], real.shape).copy())
    assert found["mean_r"] == 0
    assert found["share_above_half"] == 0


def test_too_few_cells_for_a_distance_are_refused(real):
    with pytest.raises(EvaluationError, match=r"60 validation cells are too few .*score\.cells"):
        ValidationScores(real[:60], CHANNELS, ["cp"], FAMILIES)
