import json

import numpy as np
import pytest

from cp2image.data.intensity import HIGH, LOW, Intensity, IntensityFit
from cp2image.errors import CheckpointError

LEVEL = 1 / 65535


def patches(seed=0, count=20, dtype="uint16", channels=2):
    random = np.random.default_rng(seed)
    if dtype == "float32":
        return random.gamma(2, 0.05, (count, channels, 8, 8)).clip(0, 1).astype(np.float32)
    top = np.iinfo(dtype).max
    return (random.gamma(2, 0.05, (count, channels, 8, 8)).clip(0, 1) * top).astype(dtype)


def fitted(**plates):
    fit = IntensityFit(2)
    for plate, cells in plates.items():
        fit.add(plate, cells, 65535.0)
    return fit.finish()


def test_per_patch_max_divides_every_patch_and_channel_by_its_own_maximum():
    cells = patches()
    found = Intensity("per_patch_max").apply(cells, ["P"] * 20, 65535.0)
    assert found.dtype == np.float32
    for patch, expected in zip(found, cells, strict=True):
        for plane, raw in zip(patch, expected, strict=True):
            np.testing.assert_allclose(plane, raw / raw.max(), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_empty_channel_stays_empty_and_finite(dtype):
    cells = patches(dtype=dtype)
    cells[3, 1] = 0
    found = Intensity("per_patch_max").apply(cells, ["P"] * 20, 1.0)
    assert np.isfinite(found).all()
    assert not found[3, 1].any()
    assert found[3, 0].max() == pytest.approx(1)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_plate_percentiles_are_numpys_within_one_level(dtype):
    cells = patches(dtype=dtype, count=50)
    scale = 1.0 if dtype == "float32" else float(np.iinfo(dtype).max)
    fit = IntensityFit(2)
    fit.add("P", cells[:30], scale)
    fit.add("P", cells[30:], scale)
    found = fit.finish()
    level = LEVEL if dtype == "float32" else 1 / scale
    for channel in range(2):
        values = cells[:, channel] / scale
        for limit, percent in ((found.low, LOW), (found.high, HIGH)):
            below = np.percentile(values, percent, method="lower")
            above = np.percentile(values, percent, method="higher")
            assert below - level <= limit[0, channel] <= above + level


def test_plates_have_limits_of_their_own_and_unknown_ones_those_of_all():
    dim, bright = patches(1) // 4, patches(2)
    found = fitted(dim=dim, bright=bright)
    assert found.plates == ("bright", "dim")
    assert (found.high[1] < found.high[0]).all()
    low, factor = found.limits(np.concatenate([dim[:1]] * 3), ["dim", "bright", "new"], 65535.0)
    np.testing.assert_allclose(low, (found.low[[1, 0, 2]] * 65535).astype(np.float32))
    together = fitted(both=np.concatenate([dim, bright]))
    np.testing.assert_array_equal(found.high[2], together.high[0])
    assert factor.shape == (3, 2)


def test_order_and_blocks_of_cells_do_not_change_the_limits():
    cells = patches(3)
    whole = fitted(P=cells)
    fit = IntensityFit(2)
    for block in (cells[15:], cells[:4], cells[4:4], cells[4:15]):
        fit.add("P", block, 65535.0)
    np.testing.assert_array_equal(fit.finish().high, whole.high)


def test_plate_percentile_keeps_brightness_between_cells():
    cells = patches(4)
    cells[0] //= 2
    found = fitted(P=patches(4)).apply(cells, ["P"] * 20, 65535.0)
    assert 0 <= found.min() <= found.max() == 1
    full = fitted(P=patches(4)).apply(patches(4), ["P"] * 20, 65535.0)
    assert found[0].mean() < 0.6 * full[0].mean()


def test_screen_percentile_is_that_of_all_plates_and_keeps_how_they_differ():
    dim, bright = patches(4) // 4, patches(5)
    fit = IntensityFit(2)
    fit.add("dim", dim, 65535.0)
    fit.add("bright", bright, 65535.0)
    screen = fit.finish("screen_percentile")
    assert (screen.kind, screen.plates, screen.high.shape) == ("screen_percentile", (), (1, 2))
    np.testing.assert_array_equal(screen.high[-1], fit.finish().high[-1])
    own, both = (i.apply(dim, ["dim"] * 20, 65535.0) for i in (fit.finish(), screen))
    assert own.max() == 1
    assert both.max() < 0.5
    unknown = screen.apply(dim, ["new"] * 20, 65535.0)
    np.testing.assert_array_equal(unknown, both)
    seen = np.rint(both * 255).astype(np.uint8)
    np.testing.assert_allclose(
        screen.restore(seen, ["new"] * 20), dim / 65535, atol=screen.high.max() / 255
    )


def test_plate_with_an_empty_channel_gives_finite_zeros():
    cells = patches(5)
    cells[:, 1] = 0
    found = fitted(P=cells).apply(cells, ["P"] * 20, 65535.0)
    assert np.isfinite(found).all()
    assert not found[:, 1].any()


def test_floats_beyond_their_range_count_as_its_ends():
    cells = patches(6, dtype="float32")
    beyond = cells.copy()
    beyond[0, 0, 0, :2] = 1.5, -0.5
    cells[0, 0, 0, :2] = 1, 0
    limits = []
    for block in (cells, beyond):
        fit = IntensityFit(2)
        fit.add("P", block, 1.0)
        limits.append(fit.finish().high)
    np.testing.assert_array_equal(*limits)


def test_no_patches_are_normalised_to_none():
    none = np.empty((0, 2, 8, 8), dtype=np.uint16)
    for intensity in (Intensity("per_patch_max"), fitted(P=patches())):
        assert intensity.apply(none, [], 65535.0).shape == none.shape


@pytest.mark.parametrize(
    "intensity",
    [
        Intensity("per_patch_max"),
        fitted(A=patches(7)),
        Intensity("screen_percentile", (), np.zeros((1, 2)), np.full((1, 2), 0.5)),
    ],
)
def test_json_holds_all_of_it(intensity):
    found = Intensity.from_json(json.loads(json.dumps(intensity.to_json())))
    assert (found.kind, found.plates) == (intensity.kind, intensity.plates)
    np.testing.assert_array_equal(found.low, intensity.low)
    np.testing.assert_array_equal(found.high, intensity.high)
    cells = patches(8)
    np.testing.assert_array_equal(
        found.apply(cells, ["A"] * 20, 65535.0), intensity.apply(cells, ["A"] * 20, 65535.0)
    )


def test_unknown_kind_is_refused():
    entry = {**Intensity().to_json(), "kind": "per_mood"}
    with pytest.raises(CheckpointError, match="'per_mood' is not one of per_patch_max"):
        Intensity.from_json(entry)


def test_restored_patches_are_back_at_the_acquisition_scale_within_a_level():
    patches = np.random.default_rng(0).integers(100, 4000, (3, 2, 6, 6)).astype(np.uint16)
    fitted = Intensity(
        "plate_percentile", ("P1",), np.array([[0.0, 0], [0.001, 0.0]]), np.full((2, 2), 0.07)
    )
    plates = ["P1", "other", "P1"]
    seen = np.rint(fitted.apply(patches, plates, 65535) * 255).astype(np.uint8)
    restored = fitted.restore(seen, plates)
    assert restored.dtype == np.float32
    np.testing.assert_allclose(restored, patches / 65535, atol=0.07 / 255)
    lost = Intensity().restore(seen, plates)
    np.testing.assert_allclose(lost, seen / 255, atol=1e-6)
