import numpy as np
import pytest

from cp2image.data.illumination import IlluminationSum, correct
from cp2image.errors import FieldError


def vignette(height, width):
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return 1 / (1 + 0.5 * (x**2 + y**2))


def fields(count, shape=(2, 120, 161), seed=0):
    rng = np.random.default_rng(seed)
    shade = vignette(*shape[1:])
    return [(rng.gamma(4, 500, shape) * shade).astype(np.uint16) for _ in range(count)]


def test_correction_removes_the_vignette_that_was_put_in():
    plate = fields(40)
    total = IlluminationSum()
    for field in plate:
        total.add(field)
    function = total.function(smoothing_px=25)
    before = np.mean(plate, axis=0)
    after = np.mean([correct(field, function) for field in plate], axis=0)
    assert function.min() == 1
    assert function.dtype == np.float32
    for channel in range(2):
        edge, middle = np.s_[channel, :20, :20], np.s_[channel, 50:70, 70:90]
        assert before[edge].mean() / before[middle].mean() < 0.65
        assert after[edge].mean() / after[middle].mean() == pytest.approx(1, abs=0.08)
        assert after[edge].mean() == pytest.approx(before[edge].mean(), rel=0.12)


def test_merged_sums_equal_one_sum_in_any_order():
    plate = fields(6)
    whole, left, right = IlluminationSum(), IlluminationSum(), IlluminationSum()
    for number, field in enumerate(plate):
        whole.add(field)
        (left if number % 2 else right).add(field)
    merged = IlluminationSum().merge(right).merge(left).merge(IlluminationSum())
    assert merged.count == 6
    np.testing.assert_array_equal(merged.total, whole.total)


def test_a_flat_field_and_an_empty_channel_stay_as_they_are():
    field = np.stack([np.full((60, 70), 300), np.zeros((60, 70))]).astype(np.uint16)
    function = IlluminationSum().add(field).function(smoothing_px=30)
    np.testing.assert_array_equal(function, 1)
    np.testing.assert_array_equal(correct(field, function), field)


def test_integers_are_rounded_and_floats_are_not():
    function = np.full((1, 2, 2), 1.5, dtype=np.float32)
    whole = correct(np.full((1, 2, 2), 100, np.uint8), function)
    assert whole.dtype == np.uint8
    assert (whole == 67).all()
    real = correct(np.full((1, 2, 2), 100, np.float32), function)
    assert real.dtype == np.float32
    assert real[0, 0, 0] == pytest.approx(100 / 1.5)


def test_bright_pixels_are_clipped_to_the_types_range():
    brighter = np.full((1, 2, 2), 0.5, dtype=np.float32)
    assert (correct(np.full((1, 2, 2), 200, np.uint8), brighter) == 255).all()


def test_fields_of_another_shape_are_refused():
    total = IlluminationSum().add(np.zeros((1, 4, 4), np.uint8))
    with pytest.raises(FieldError, match="differ in shape"):
        total.add(np.zeros((1, 4, 5), np.uint8))
    with pytest.raises(FieldError, match=r"\(1, 4, 5\)"):
        correct(np.zeros((1, 4, 5), np.uint8), total.function())
    with pytest.raises(FieldError, match="no field"):
        IlluminationSum().function()
