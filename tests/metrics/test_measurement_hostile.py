"""Masks and images that nobody would choose: measured as cp_measure does, never a crash."""

import re
import warnings

import numpy as np
import pytest

from cp2image.metrics.measurement import feature_names, measure
from tests.metrics.argsort import measure_with_ties

SIDE = 36  # below that cp_measure's granularity reads beyond its 2 x 2 background image


def draw(*windows, holes=()):
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for rows, columns in windows:
        mask[rows, columns] = 1
    for rows, columns in holes:
        mask[rows, columns] = 0
    return mask


ALL = slice(None)
MASKS = {
    "one pixel": draw((5, 7)),
    "corner pixel": draw((0, 0)),
    "one row": draw((9, slice(3, 20))),
    "one column": draw((slice(3, 20), 4)),
    "two pixels": draw((5, slice(6, 8))),
    "disconnected": draw((slice(3, 9), slice(4, 9)), (slice(15, 28), slice(17, 25))),
    "with a hole": draw((slice(4, 20), slice(5, 22)), holes=[(slice(8, 12), slice(9, 14))]),
    "touching the border": draw((ALL, slice(20, SIDE))),
    "full frame": draw((ALL, ALL)),
    "full frame but one": draw((ALL, ALL), holes=[(3, 4)]),
    "frame": draw((ALL, ALL), holes=[(slice(1, -1), slice(1, -1))]),
    "diagonal": np.eye(SIDE, dtype=np.uint8),
    "scattered": (np.random.default_rng(3).random((SIDE, SIDE)) < 0.4).astype(np.uint8),
    "square": draw((slice(4, 12), slice(4, 12))),
}
NOISE = np.random.default_rng(0).random((SIDE, SIDE))
IMAGES = {
    "noise": NOISE,
    "constant": np.full((SIDE, SIDE), 0.3),
    "saturated": np.ones((SIDE, SIDE)),
    "zero": np.zeros((SIDE, SIDE)),
    "dim": NOISE * 0.003,
    "few levels": np.rint(NOISE * 5) / 255,
    "half zero": np.where(np.arange(SIDE) < SIDE // 2, 0, 0.5) * np.ones((SIDE, 1)),
    "low contrast": 0.5 + NOISE * 1e-6,
}
PAIRS = [
    ("noise", "constant"),
    ("saturated", "zero"),
    ("dim", "few levels"),
    ("half zero", "low contrast"),
    ("zero", "zero"),
]
# Undefined by cancellation: an even image has moments of 0, a constant channel no correlation.
UNDEFINED = r"ZernikePhase|CentralMoment_(0_1|1_0)"


@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_hostile_masks_and_images_measure_as_with_cp_measure(mask, pair):
    images = np.stack([IMAGES[name] for name in pair])[None]
    masks = np.stack([mask] * 3)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = measure(images, masks, channels=("A", "B"), compartments=["Cells"])
    expected = measure_with_ties(images, masks, ("A", "B"), compartments=("Cells",))
    assert set(table) == set(expected)
    if "constant" in pair:
        r = "Cells_Correlation_Correlation_A_B"
        assert np.isnan(table[r][0])
        expected[r] = np.nan
    names = [name for name in table if not re.search(UNDEFINED, name)]
    np.testing.assert_allclose(
        table[names].to_numpy(), expected[names].to_numpy(), rtol=1e-9, atol=1e-10
    )


def test_an_empty_mask_is_nan_and_leaves_the_other_masks_alone():
    images = np.stack([NOISE, NOISE[::-1]])[None].repeat(3, axis=0)
    masks = np.stack([MASKS["square"], MASKS["full frame"], MASKS["with a hole"]])[None].repeat(
        3, axis=0
    )
    masks[1, 1] = 0
    masks[2] = 0
    table = measure(images, masks, channels=("A", "B"))
    cells = feature_names(("A", "B"), ["Cells"])
    others = feature_names(("A", "B"), ["Nuclei", "Cytoplasm"])
    assert table.loc[1, cells].isna().all()
    np.testing.assert_array_equal(table.loc[1, others], table.loc[0, others])
    assert table.loc[2].isna().all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 3), (8, 5)])
def test_the_smallest_patches_are_measured_without_a_crash(shape):
    images = np.random.default_rng(1).random((2, 2, *shape))
    table = measure(images, np.ones((2, 3, *shape), bool), channels=("DNA", "Actin"))
    assert (table["Nuclei_AreaShape_Area"] == shape[0] * shape[1]).all()
    measure(images, channels=("DNA", "Actin"))
