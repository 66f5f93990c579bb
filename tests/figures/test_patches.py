import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from cp2image.errors import PatchError, StorageError
from cp2image.figures.canvas import blank, save
from cp2image.figures.patches import (
    colour_patches,
    contrast_limits,
    figure_pairs,
    figure_rows,
    montage,
    stain_colours,
    tile,
)

CHANNELS = ("DNA", "Actin", "Tubulin")


def cells(n=3, channels=3, side=20):
    return np.random.default_rng(0).integers(0, 2**16, (n, channels, side, side), dtype=np.uint16)


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


@pytest.mark.parametrize(
    ("names", "strongest"),
    [(CHANNELS, [2, 0, 1]), (("tubulin", "DAPI", "phalloidin"), [1, 2, 0])],
)
def test_dna_is_blue_actin_red_and_tubulin_green_in_any_order(names, strongest):
    for channel, primary in enumerate(strongest):
        one = np.zeros((1, 3, 4, 4), dtype=np.uint8)
        one[0, channel] = 200
        image = colour_patches(one, names, limits=[[0, 200 / 255]] * 3)
        assert image[0, 0, 0].argmax() == primary
        assert image[0, 0, 0, primary] > 220


def test_unknown_stains_get_colours_of_their_own_and_a_single_one_is_white():
    colours = stain_colours(["w1", "DNA", "w3", "Mito", "w5"])
    assert len(set(colours)) == 5
    assert stain_colours(["w1"]) == [(1.0, 1.0, 1.0)]


def test_contrast_is_stretched_between_the_points_and_clipped_beyond():
    ramp = np.linspace(0, 1, 11).reshape(1, 1, 1, 11)
    shown = colour_patches(ramp, ["DNA"], limits=[[0.2, 0.7]])[0, 0, :, 0]
    expected = np.rint(255 * np.clip((np.linspace(0, 1, 11) - 0.2) / 0.5, 0, 1))
    np.testing.assert_allclose(shown, expected, atol=1)


def test_all_types_of_the_same_picture_look_the_same():
    eight = np.random.default_rng(0).integers(0, 256, (4, 3, 9, 9), dtype=np.uint8)
    reference = colour_patches(eight, CHANNELS).astype(int)
    for same in (eight.astype(np.uint16) * 257, eight / 255):
        assert np.abs(colour_patches(same, CHANNELS) - reference).max() <= 1


def test_an_empty_channel_is_black_and_any_number_of_channels_is_drawn():
    five = cells(channels=5)
    five[:, 1:] = 0
    image = colour_patches(five, ["DNA", "a", "b", "c", "d"])
    lone = colour_patches(five[:, :1], ["DNA"], colours=stain_colours(["DNA", "a"])[:1])
    np.testing.assert_array_equal(image, lone)


def test_tile_places_every_image_in_reading_order():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((5, 2, 3, 3), np.uint8)
    sheet = tile(images, columns=2, gap=1)
    assert sheet.shape == (8, 7, 3)
    corners = [sheet[3 * (i // 2), 4 * (i % 2), 0] for i in range(6)]
    assert corners == [0, 1, 2, 3, 4, 255]


def test_real_and_generated_are_drawn_in_the_real_cells_contrast():
    real = cells(4)
    figure = figure_pairs(real, real // 2, CHANNELS, titles=list("abcd"), pixel_size=0.5)
    sheet = figure.axes[0].get_images()[0].get_array()
    limits = contrast_limits(real)
    np.testing.assert_array_equal(sheet[:20, :20], colour_patches(real, CHANNELS, limits=limits)[0])
    np.testing.assert_array_equal(
        sheet[22:42, 22:42], colour_patches(real // 2, CHANNELS, limits=limits)[1]
    )
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["real", "generated"]
    assert {"a", "d", "5 µm"} <= {text.get_text() for text in figure.axes[0].texts}
    assert [text.get_text() for text in figure.legends[0].texts] == list(CHANNELS)


def test_more_cells_than_columns_begin_a_new_block_and_none_is_lost():
    figure = figure_rows({"real": cells(7)}, CHANNELS, columns=3, titles=list("abcdefg"))
    assert len(figure.axes) == 3
    assert [text.get_text() for axes in figure.axes for text in axes.texts] == list("abcdefg")
    coloured = colour_patches(cells(7), CHANNELS)
    last = figure.axes[2].get_images()[0].get_array()
    np.testing.assert_array_equal(last[:, :20], coloured[6])
    assert (np.asarray(last[:, 22:]) == 255).all()


def test_montage_of_a_single_stain_and_one_cell_is_drawn():
    figure = montage(cells(1, 1), ["DNA"], title="one", pixel_size=0.65)
    assert pixels(figure).std() > 10


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(PatchError, match="3 channels, but 2 names"):
        colour_patches(cells(), ["DNA", "Actin"])
    with pytest.raises(PatchError, match="empty"):
        montage(cells(0), CHANNELS)
    with pytest.raises(PatchError, match=r"real \(3, 3, 20, 20\), generated \(2, 3, 20, 20\)"):
        figure_pairs(cells(3), cells(2), CHANNELS)
    with pytest.raises(PatchError, match="1 titles for 3 cells"):
        figure_pairs(cells(), cells(), CHANNELS, titles=["a"])
    with pytest.raises(PatchError, match=r"shape \(20, 20\)"):
        colour_patches(cells()[0, 0], ["DNA"])


def test_figures_are_stored_as_png_or_svg_by_their_suffix(tmp_path):
    figure = montage(cells(), CHANNELS)
    uri = save(figure, str(tmp_path / "new/folder/sheet.png"))
    with Image.open(uri) as image:
        size = tuple(round(150 * inch) for inch in figure.get_size_inches())
        assert np.abs(np.subtract(image.size, size)).max() <= 1
    save(figure, str(tmp_path / "sheet.svg"))
    assert b"<svg" in (tmp_path / "sheet.svg").read_bytes()
    with pytest.raises(StorageError, match=r"sheet.gif: .*not 'gif'"):
        save(figure, str(tmp_path / "sheet.gif"))


def test_drawing_leaves_matplotlibs_global_state_alone():
    import matplotlib
    from matplotlib import _pylab_helpers

    before = dict(matplotlib.rcParams)
    blank(1, 1).savefig(io.BytesIO())
    pixels(montage(cells(), CHANNELS))
    assert dict(matplotlib.rcParams) == before
    assert not _pylab_helpers.Gcf.get_all_fig_managers()


@pytest.mark.real_data
def test_real_cells_show_a_blue_nucleus_in_the_middle(shared_data):
    patches = tifffile.imread(shared_data / "bbbc021/patches/Week4_27801.tif")
    images = colour_patches(patches, CHANNELS).astype(float)
    middle, corner = images[:, 30:38, 30:38].mean((0, 1, 2)), images[:, :8, :8].mean((0, 1, 2))
    assert middle[2] > 1.25 * middle[0]
    assert middle[2] > 1.3 * corner[2]
