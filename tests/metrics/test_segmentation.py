"""Batch segmentation against scikit-image and centrosome, patch by patch."""

import numpy as np
import pytest
from scipy import ndimage

from cp2image.benchmarks.plain_segmentation import segment_plain
from cp2image.errors import MeasurementError
from cp2image.metrics.segmentation import segment


def draw_blobs(random, blobs, side=68):
    """A smooth patch with one blob in the middle, others anywhere, and a wider body channel."""
    y, x = np.mgrid[:side, :side]
    image = np.zeros((3, side, side))
    for k in range(blobs):
        cy, cx = (side // 2, side // 2) if k == 0 else random.integers(0, side, 2)
        squared = (y - cy) ** 2 + (x - cx) ** 2 * random.uniform(0.5, 2)
        image[0] += random.uniform(0.3, 1) * np.exp(-squared / random.uniform(40, 150))
        image[1] += random.uniform(0.3, 1) * np.exp(-squared / random.uniform(200, 500))
        image[2] += random.uniform(0.3, 1) * np.exp(-squared / random.uniform(200, 500))
    image += random.uniform(0, 0.05, image.shape)
    return np.rint(image / image.max() * 4095) / 4095


def test_real_patches_segment_as_with_the_libraries(shared_data):
    images = np.load(shared_data / "cellprofiler_oracle" / "oracle.npz")["images"]
    expected = np.stack([segment_plain(image / 65535, 0, (1, 2)) for image in images])
    np.testing.assert_array_equal(segment(images, 0, (1, 2)), expected)


def test_crowded_patches_segment_as_with_the_libraries():
    random = np.random.default_rng(5)
    images = np.stack([draw_blobs(random, blobs) for blobs in range(1, 13)])
    expected = np.stack([segment_plain(image, 0, (1, 2)) for image in images])
    np.testing.assert_array_equal(segment(images, 0, (1, 2)), expected)


def test_real_patches_segment_as_the_reference_masks(shared_data):
    reference = np.load(shared_data / "cellprofiler_oracle" / "oracle.npz")
    found, expected = segment(reference["images"], 0, (1, 2)), reference["masks"]
    both, either = (found & expected).sum((2, 3)), (found | expected).sum((2, 3))
    assert (both / either).min() > 0.99


def test_masks_nest_and_the_nuclear_outline_belongs_to_the_cytoplasm():
    random = np.random.default_rng(6)
    images = np.stack([draw_blobs(random, blobs) for blobs in (1, 3, 6)])
    for nucleus, cell, cytoplasm in segment(images, 0, (1, 2)).astype(bool):
        assert nucleus[34, 34]
        assert (cell | nucleus).sum() == cell.sum() == (cytoplasm | nucleus).sum()
        outline = nucleus & ~ndimage.binary_erosion(nucleus, np.ones((3, 3)))
        np.testing.assert_array_equal(cytoplasm & nucleus, outline)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_a_constant_patch_has_no_masks(level):
    assert not segment(np.full((2, 3, 40, 40), level), 0, (1, 2)).any()


def test_a_nucleus_beside_the_centre_gives_empty_masks():
    images = draw_blobs(np.random.default_rng(7), 1)[None]
    shifted = np.roll(images, 25, axis=3)
    masks = segment(np.concatenate([images, shifted]), 0, (1, 2))
    assert masks[0].any(axis=(1, 2)).all()
    assert not masks[1].any()


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (7, 3)])
def test_tiny_patches_do_not_crash(shape):
    images = np.random.default_rng(8).random((2, 2, *shape))
    assert segment(images, 0, [1]).shape == (2, 3, *shape)


def test_a_missing_channel_and_a_pixel_beyond_the_scale_are_refused():
    images = np.zeros((2, 2, 8, 8))
    with pytest.raises(MeasurementError, match="channel 2 does not exist: images have 2"):
        segment(images, 0, [2])
    with pytest.raises(MeasurementError, match="no channel to find the cell by"):
        segment(images, 0, [])
    images[1, 1, 2, 3] = np.nan
    with pytest.raises(MeasurementError, match="image 1, channel 1 has nan at y=2, x=3"):
        segment(images, 0, [1])
