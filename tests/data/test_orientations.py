"""The eight ways a patch can lie."""

import numpy as np
import pytest

from cp2image.data.orientations import ORIENTATIONS, turn

PATCHES = np.arange(2 * 3 * 25, dtype=np.uint16).reshape(2, 3, 5, 5)


def test_each_orientation_is_another_and_the_first_is_the_patch_itself():
    found = [turn(PATCHES, k) for k in range(ORIENTATIONS)]
    np.testing.assert_array_equal(found[0], PATCHES)
    assert len({one.tobytes() for one in found}) == 8
    for one in found:
        assert (one.shape, one.dtype, one.flags.c_contiguous) == (PATCHES.shape, np.uint16, True)
        np.testing.assert_array_equal(np.sort(one, axis=None), np.sort(PATCHES, axis=None))
        np.testing.assert_array_equal(one[:, :, 2, 2], PATCHES[:, :, 2, 2])


def test_one_is_a_quarter_turn_against_the_clock_and_four_a_mirror():
    corner = np.zeros((5, 5))
    corner[0, 4] = 1  # above on the right
    assert turn(corner, 1)[0, 0] == 1
    assert turn(corner, 2)[4, 0] == 1
    assert turn(corner, 4)[0, 0] == 1
    assert turn(corner, 5)[4, 0] == 1


@pytest.mark.parametrize(
    ("patches", "orientation", "message"),
    [(PATCHES, 8, "0 to 7"), (PATCHES, -1, "0 to 7"), (PATCHES[..., :4], 1, "only square")],
)
def test_what_cannot_be_turned_is_refused(patches, orientation, message):
    with pytest.raises(ValueError, match=message):
        turn(patches, orientation)
