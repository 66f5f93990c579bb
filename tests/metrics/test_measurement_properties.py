"""What CellProfiler's definitions say must stay when a patch is moved, relabelled or dimmed."""

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from cp2image.metrics.measurement import measure

CHANNELS = ("DNA", "Actin")
SIDE = 40
STILL = r"Center_|BoundingBoxM|Granularity|_Location_|Zernike|CentralMoment_(0_1|1_0)"


@st.composite
def draw_cell(draw):
    """A blob of 12 x 12 random cells around a solid middle, and two random channels."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    blob = random.random((12, 12)) < draw(st.floats(0.3, 1.0))
    blob[4:8, 3:9] = True
    pixels = random.integers(1, 256, (2, 12, 12)) / 255
    return blob, pixels


def place(cell, y, x):
    blob, pixels = cell
    images, masks = np.zeros((1, 2, SIDE, SIDE)), np.zeros((1, 3, SIDE, SIDE), np.uint8)
    images[0, :, y : y + 12, x : x + 12] = pixels
    masks[0, :, y : y + 12, x : x + 12] = blob
    return images, masks


def measure_cells(images, masks, channels=CHANNELS):
    return measure(images, masks, channels=channels, compartments=["Cells"]).iloc[0]


def assert_same(found, expected, atol=1e-11):
    np.testing.assert_allclose(
        found.to_numpy(dtype=float), expected.to_numpy(dtype=float), rtol=1e-9, atol=atol
    )


@settings(max_examples=15, deadline=None)
@given(draw_cell(), st.integers(1, 27), st.integers(1, 27))
def test_moving_a_cell_moves_its_locations_and_nothing_else(cell, y, x):
    before, after = measure_cells(*place(cell, 5, 9)), measure_cells(*place(cell, y, x))
    depth = distance_transform_edt(np.pad(cell[0], 1))
    tied = (depth == depth.max()).sum() > 1  # CellProfiler's choice hangs on the place in the patch
    moving = f"{STILL}|RadialDistribution_" if tied else STILL
    still = [name for name in before.index if not re.search(moving, name)]
    assert_same(after[still], before[still])
    for name in before.index:
        if re.search(r"Center_|BoundingBoxM|_Location_(Max|CenterMass)Intensity_[XY]", name):
            step = x - 9 if re.search(r"_X($|_)", name) else y - 5
            np.testing.assert_allclose(after[name] - before[name], step, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(draw_cell())
def test_the_order_of_channels_changes_only_the_order_of_columns(cell):
    images, masks = place(cell, 10, 10)
    before = measure_cells(images, masks)
    after = measure_cells(images[:, ::-1], masks, CHANNELS[::-1])
    kept = [name for name in before.index if name in after.index]
    assert_same(after[kept], before[kept])
    for name in ("Correlation", "Overlap"):
        straight, turned = f"{name}_DNA_Actin", f"{name}_Actin_DNA"
        np.testing.assert_allclose(
            after[f"Cells_Correlation_{turned}"], before[f"Cells_Correlation_{straight}"], 1e-9
        )
    assert len(before) - len(kept) == 3


@settings(max_examples=15, deadline=None)
@given(draw_cell(), st.sampled_from([0.5, 0.25, 0.125]))
def test_dimming_scales_intensities_and_leaves_shapes_and_ratios(cell, factor):
    images, masks = place(cell, 10, 10)
    before, after = measure_cells(images, masks), measure_cells(images * factor, masks)
    scaled = r"Intensity_(?!MassDisplacement).*Intensity|ZernikeMagnitude"
    for name in before.index:
        if "Texture" in name:
            continue
        expected = (
            before[name] * factor
            if re.search(scaled, name) and ("_Location_" not in name)
            else before[name]
        )
        np.testing.assert_allclose(after[name], expected, rtol=1e-9, atol=1e-10, err_msg=name)


@settings(max_examples=15, deadline=None)
@given(draw_cell(), st.sampled_from([True, 7, 255]))
def test_any_value_but_zero_belongs_to_the_mask(cell, value):
    images, masks = place(cell, 10, 10)
    other = np.where(masks, value, 0).astype(type(value) if value is True else np.uint8)
    np.testing.assert_array_equal(measure_cells(images, masks), measure_cells(images, other))


@settings(max_examples=15, deadline=None)
@given(draw_cell())
def test_a_quarter_turn_keeps_size_intensity_and_turns_the_texture(cell):
    images, masks = place(cell, 10, 10)
    turned = (np.ascontiguousarray(np.rot90(a, axes=(2, 3))) for a in (images, masks))
    before, after = measure_cells(images, masks), measure_cells(*turned)
    kept = r"AreaShape_(Area|Perim|Solid|ConvexA|Euler|M.*Radius|M.*Feret|HuMoment|Ecc)"
    kept += r"|Intensity_.*(?<!Edge)_(DNA|Actin)$|Cells_Correlation_"
    names = [n for n in before.index if re.search(kept, n) and "_Location_" not in n]
    assert_same(after[names], before[names])
    for old, new in (("00", "02"), ("02", "00"), ("01", "03"), ("03", "01")):
        for feature in ("Contrast", "Entropy", "InfoMeas1"):
            name = f"Cells_Texture_{feature}_DNA_3_{{}}_256"
            np.testing.assert_allclose(after[name.format(new)], before[name.format(old)], 1e-9)
