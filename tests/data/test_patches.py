import numpy as np
import pytest

from cp2image.data.patches import crop_patch, crop_patches
from cp2image.errors import FieldError

FIELD = np.arange(1, 2 * 7 * 9 + 1, dtype=np.float32).reshape(2, 7, 9)  # no two pixels alike


def windows_one_by_one(field, centers, size):
    patches = np.zeros((len(centers), len(field), size, size), field.dtype)
    for patch, (y, x) in zip(patches, centers, strict=True):
        for row in range(size):
            for column in range(size):
                r, c = round(y) - size // 2 + row, round(x) - size // 2 + column
                if 0 <= r < field.shape[1] and 0 <= c < field.shape[2]:
                    patch[:, row, column] = field[:, r, c]
    return patches


@pytest.mark.parametrize("center", [(3, 4), (0, 0), (6, 8)], ids=["inside", "first", "last"])
def test_patch_equals_the_window_of_the_padded_field(center):
    padded = np.pad(FIELD, ((0, 0), (2, 2), (2, 2)))
    expected = padded[:, center[0] : center[0] + 4, center[1] : center[1] + 4]
    np.testing.assert_array_equal(crop_patch(FIELD, center, size=4), expected)


@pytest.mark.parametrize("size", [1, 4, 5, 20])
def test_a_batch_equals_pixel_by_pixel_copies_in_the_fields_own_type(size):
    rng = np.random.default_rng(0)
    field = FIELD.astype(np.uint16)
    centers = rng.uniform((0, 0), (6.99, 8.99), (30, 2))
    patches, kept = crop_patches(field, centers, size)
    np.testing.assert_array_equal(patches, windows_one_by_one(field, centers, size))
    assert patches.dtype == np.uint16
    assert kept.all()


def test_drop_keeps_exactly_the_windows_that_lie_inside():
    centers = [(y, x) for y in range(7) for x in range(9)]
    ones = windows_one_by_one(np.ones_like(FIELD), centers, 4)
    patches, kept = crop_patches(FIELD, centers, 4, border="drop")
    np.testing.assert_array_equal(kept, ones.all(axis=(1, 2, 3)))
    assert len(patches) == len(centers)


def test_no_centers_give_no_patches():
    patches, kept = crop_patches(FIELD, np.zeros((0, 2)), 4)
    assert patches.shape == (0, 2, 4, 4)
    assert kept.shape == (0,)


def test_center_outside_the_field_is_refused_with_both_sizes_named():
    with pytest.raises(FieldError, match=r"y=7\.0, x=4\.0 .* 7 x 9 px"):
        crop_patch(FIELD, (7, 4), size=4)


@pytest.mark.parametrize("center", [(-0.1, 3), (3, 9), (np.nan, 3)])
def test_one_bad_center_among_many_is_refused_and_counted(center):
    with pytest.raises(FieldError, match=r"1 of 3 nuclei"):
        crop_patches(FIELD, [(1, 1), center, (2, 2)], 4)
