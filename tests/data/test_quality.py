import numpy as np
import pandas as pd
import pytest
import tifffile
from scipy import ndimage

from cp2image.data.quality import DROPPED, autocorrelation, judge_patches, sharpness
from cp2image.errors import PatchError


def cells(count=6, side=68, seed=0):
    """Textured ellipses on a dim, noisy background, three channels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] / side - 0.5
    patches = np.empty((count, 3, side, side))
    for patch in patches:
        for channel in patch:
            radius = np.hypot(y * rng.uniform(0.8, 1.2), x)
            channel[:] = 300 + 8000 / (1 + np.exp((radius - 0.25) * 80))
            channel *= 1 + 0.2 * ndimage.gaussian_filter(rng.normal(size=channel.shape), 1.5)
            channel += rng.normal(0, 60, channel.shape)
    return np.clip(patches, 0, 65535).astype(np.uint16)


def noise(count=6, side=68, seed=1):
    rng = np.random.default_rng(seed)
    return np.clip(rng.normal(500, 30, (count, 3, side, side)), 0, 65535).astype(np.uint16)


def test_good_cells_are_kept():
    assert (judge_patches(cells()) == "").all()


def test_pure_noise_is_named():
    assert (judge_patches(noise()) == "noise").all()


def test_a_patch_without_nucleus_is_noise_even_beside_other_cells():
    patches = cells()
    patches[:, 0] = noise()[:, 0]
    assert (judge_patches(patches) == "noise").all()
    assert (judge_patches(patches, nucleus_channel=1) == "empty_channel").all()


def test_blurred_cells_are_out_of_focus_at_any_magnification():
    for side in (40, 68, 136):
        sharp = cells(side=side)
        blurred = ndimage.gaussian_filter(sharp.astype(float), (0, 0, side / 5, side / 5))
        assert (judge_patches(blurred.astype(np.uint16)) == "out_of_focus").all()
        assert (judge_patches(sharp) == "").all()


def test_one_sharp_channel_keeps_a_patch():
    patches = cells()
    patches[:, :2] = ndimage.gaussian_filter(patches[:, :2].astype(float), (0, 0, 14, 14))
    assert (judge_patches(patches) == "").all()


def test_saturation_is_judged_by_the_cameras_full_scale():
    patches = cells()
    patches[0, 2, :40] = 65535
    patches[1, 1, :40] = 65520
    patches[2, 1, :40] = 4095
    assert list(judge_patches(patches)[:3]) == ["saturated", "saturated", ""]
    dim = (cells() // 4).clip(0, 4095)
    dim[2, 1, :40] = 4095
    assert list(judge_patches(dim, full_scale=4095)[:3]) == ["", "", "saturated"]
    small = (cells() // 64).astype(np.uint8)
    small[1, 0, :40] = 255
    assert list(judge_patches(small)[:3]) == ["", "saturated", ""]


def test_an_empty_channel_is_counted_but_not_among_the_reasons_to_drop():
    patches = cells()
    patches[3, 1] = 0
    reasons = judge_patches(patches)
    assert list(reasons) == ["", "", "", "empty_channel", "", ""]
    assert "empty_channel" not in DROPPED


def test_a_wholly_empty_patch_is_an_empty_channel_without_a_warning():
    assert (judge_patches(np.zeros((2, 3, 20, 20), np.uint8)) == "empty_channel").all()


def test_the_verdict_does_not_depend_on_the_batch():
    patches = np.concatenate([cells(), noise(), np.zeros_like(cells())])
    single = [judge_patches(patch[np.newaxis])[0] for patch in patches]
    assert list(judge_patches(patches)) == single


def test_autocorrelation_equals_pearson_of_the_shifted_image():
    patches = cells(2)
    for patch, row in zip(patches, autocorrelation(patches), strict=True):
        for image, found in zip(patch.astype(float), row, strict=True):
            right = np.corrcoef(image[:, 1:].ravel(), image[:, :-1].ravel())[0, 1]
            down = np.corrcoef(image[1:].ravel(), image[:-1].ravel())[0, 1]
            assert found == pytest.approx((right + down) / 2, abs=0.02)


def test_sharpness_does_not_depend_on_exposure():
    patches = cells(3)
    np.testing.assert_allclose(
        sharpness(patches // 2 + np.uint16(900)), sharpness(patches), rtol=0.01
    )


def test_no_patches_give_no_reasons():
    assert judge_patches(np.zeros((0, 3, 8, 8), np.uint16)).shape == (0,)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)])
def test_wrong_axes_or_channel_are_refused(shape):
    with pytest.raises(PatchError, match="expected"):
        judge_patches(np.zeros(shape, np.uint16), nucleus_channel=3)


@pytest.mark.real_data
def test_of_6049_real_cells_only_those_without_a_recognisable_cell_are_dropped(shared_data):
    index = pd.read_csv(shared_data / "bbbc021" / "cells.csv")
    reasons = pd.Series("", index=index.index)
    for name, rows in index.groupby("file"):
        stack = tifffile.imread(shared_data / "bbbc021" / name)
        reasons[rows.index] = judge_patches(stack.reshape(-1, 3, 68, 68)[rows.page_index])
    assert reasons.value_counts().to_dict() == {"": 6027, "noise": 21, "out_of_focus": 1}
    dropped = index[reasons != ""]
    assert set(dropped.plate) == {"Week6_32161", "Week7_34381"}
