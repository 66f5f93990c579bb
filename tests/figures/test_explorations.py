"""Figures of explorations: every image where it belongs, marks and legends as told."""

import io
from types import SimpleNamespace

import numpy as np
import pytest

from cp2image.errors import PatchError
from cp2image.figures.canvas import blank
from cp2image.figures.explorations import (
    concentration_figure,
    manipulation_figure,
    representatives_figure,
    trajectory_figure,
)
from cp2image.figures.maps import spread_apart, treatment_map
from cp2image.figures.patches import contrast_limits
from cp2image.figures.sheets import CONTRADICTS, FAR, ODD, OUTSIDE, Look, draw_sheet
from cp2image.figures.words import count, course, format_number, shorten, signed

CHANNELS = ("DNA", "Actin", "Tubulin")
SIZE = 16


def cells(*shape, seed=0):
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (*shape, 3, SIZE, SIZE), dtype=np.uint8)


@pytest.fixture
def look():
    return Look(CHANNELS, contrast_limits(cells(20)), pixel_size=0.5)


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.texts]


def frames(axes):
    styles = [p.get_linestyle() for p in axes.patches if not p.get_fill()]
    return len(styles), sum(style == "-" for style in styles)


def texts(axes):
    return [text.get_text() for text in axes.texts]


def drawn(figure):
    with io.BytesIO() as sink:
        figure.savefig(sink, format="png")
        return sink.tell()


def test_a_sheet_puts_each_image_in_its_row_and_column_in_one_contrast(look):
    rows = {"a": cells(3), "b": cells(2, seed=1)}
    axes = draw_sheet(
        blank(4, 3).subplots(), look, rows, titles=["x", "y"], marked={"a": [0, 1, 2]}
    )
    sheet = np.asarray(axes.get_images()[0].get_array())
    step = SIZE + 4
    for row, patches in enumerate(rows.values()):
        for column, patch in enumerate(look.colour(patches)):
            top, left = row * step, column * step
            np.testing.assert_array_equal(sheet[top : top + SIZE, left : left + SIZE], patch)
    assert (sheet[step:, 2 * step :] == 255).all()
    assert frames(axes) == (2, 1)
    assert {"x", "y", "2 µm"} <= set(texts(axes))


def test_a_sheet_with_captions_leaves_room_for_them(look):
    axes = draw_sheet(blank(4, 3).subplots(), look, {"a": cells(2)}, captions={"a": ["1.0", "0.5"]})
    sheet = np.asarray(axes.get_images()[0].get_array())
    assert (sheet[SIZE:] == 255).all()
    assert {"1.0", "0.5"} <= set(texts(axes))
    with pytest.raises(PatchError, match="1 captions and 2 marks for 2 cells"):
        draw_sheet(blank(4, 3).subplots(), look, {"a": cells(2)}, captions={"a": ["1.0"]})
    with pytest.raises(PatchError, match="every row of the sheet is empty"):
        draw_sheet(blank(4, 3).subplots(), look, {"a": cells(0)})


def response(rises, directed=True, slope=-0.5):
    line = np.linspace(1, 5, 4)
    numbers = {"spearman": 0.93, "slope": slope, "rises": rises, "directed": directed}
    cells = np.tile(line, (2, 1))
    return SimpleNamespace(requested=line, mean=line, deviation=line, measured=cells, **numbers)


def test_a_manipulation_shows_both_ways_their_marks_and_what_was_measured(look):
    marks = {"conditional": np.zeros((2, 4), int), "single": np.full((2, 4), ODD)}
    marks["conditional"][1, 3] = FAR
    figure = manipulation_figure(
        "Nuclei_AreaShape_Area",
        {"conditional": cells(2, 4), "single": cells(2, 4)},
        marks,
        {"conditional": response(True), "single": response(False)},
        look,
        unit="px²",
        note="over 2 cells",
    )
    assert legend_of(figure) == [*CHANNELS, OUTSIDE, CONTRADICTS]
    assert [frames(axes) for axes in figure.axes[:2]] == [(1, 1), (8, 0)]
    assert {"1", "2.33", "3.67", "5"} <= set(texts(figure.axes[0]))
    told = [text.get_text() for text in figure.axes[2].get_legend().texts]
    assert "Spearman 0.93, slope −0.50, rises with every step" in told[0]
    labels = (figure.axes[2].get_xlabel(), figure.axes[2].get_ylabel())
    assert labels == ("requested Nuclei_AreaShape_Area (px²)", "measured (px²)")
    assert "does not rise" in told[1]
    assert told[2] == "equal"
    assert drawn(figure) > 5000


def test_angles_without_a_direction_are_drawn_cell_by_cell(look):
    figure = manipulation_figure(
        "Nuclei_AreaShape_Orientation",
        {"single": cells(1, 4)},
        {"single": np.zeros((1, 4), int)},
        {"single": response(True, directed=False)},
        look,
        same_scale=False,
    )
    axes = figure.axes[-1]
    assert "no mean: single cells" in axes.get_legend().texts[0].get_text()
    (points,) = axes.lines
    assert points.get_linestyle() == "None"
    assert points.get_xdata().tolist() == 2 * np.linspace(1, 5, 4).tolist()
    assert not axes.collections  # no band


def test_a_mean_that_hardly_moves_is_not_said_to_rise():
    assert course(0.04, True, True, True) == "slope 0.04: hardly moves"
    assert course(0.04, True, True, False) == "slope 0.04, rises with every step"
    assert course(0.4, False, True, True) == "slope 0.40, does not rise with every step"


def test_a_text_is_cut_but_not_its_dose():
    assert shorten("mevinolin/lovastatin 20", 20) == "mevinolin/lovast… 20"
    assert shorten("mevinolin/lovastatin 0.3 µM", 20) == "mevinolin/lo… 0.3 µM"
    assert shorten("a name without any number", 10) == "a name wi…"
    assert shorten("taxol 3", 20) == "taxol 3"


def test_a_trajectory_has_the_similarity_under_every_image(look):
    similarity = np.linspace(0.1, 1, 13)
    figure = trajectory_figure(
        "a → b",
        cells(13),
        np.arange(13) * 50,
        similarity,
        similarity < 0.2,
        look,
        real={"start": cells(1), "target": cells(1)},
        columns=5,
    )
    sheet = figure.axes[0]
    assert {f"{value:.2f}" for value in similarity} <= set(texts(sheet))
    labels = [label.get_text() for label in sheet.get_yticklabels()]
    assert labels[0] == "generated\n0–200\nfeatures"
    assert labels[-1] == "real"
    assert {"start", "target"} <= set(texts(sheet))
    assert frames(sheet) == (2, 2)
    assert legend_of(figure)[-1] == OUTSIDE
    assert drawn(figure) > 5000


@pytest.mark.parametrize("with_real", [True, False])
def test_a_dose_line_shows_the_plane_the_line_and_the_real_cells_if_there_are_any(look, with_real):
    places = {
        "control": np.zeros((4, 2)),
        "drug 1": np.ones((3, 2)),
        "drug 3": np.full((3, 2), 2.0),
    }
    figure = concentration_figure(
        "drug",
        places,
        np.linspace([0, 0], [2, 2], 5),
        [0.4, 0.2],
        {"mean": cells(5)},
        np.linspace(0, 1, 5).tolist(),
        {"mean": np.zeros(5, bool)},
        look,
        real={name: cells(2) for name in places} if with_real else None,
        positions={"control": -0.004, "drug 1": 0.45, "drug 3": 1},
        between=["< 1 µM", "< 1 µM", "≈ 1.1 µM", "≈ 2 µM", "≈ 3 µM"],
    )
    assert "50 %\n≈ 1.1 µM" in texts(figure.subfigs[1].axes[0])
    assert OUTSIDE not in legend_of(figure)
    scatter = next(axes for axes in figure.axes if axes.get_xlabel())
    assert scatter.get_xlabel() == "PC1 of these cells (40 % of the variance)"
    told = [text.get_text() for text in scatter.get_legend().texts]
    assert [text.partition(" (")[0] for text in told] == list(places)
    labels = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
    assert ("drug 1\n(45 % of the way)" in labels) == with_real
    assert drawn(figure) > 5000


def test_representatives_stand_beside_their_own_patches_or_alone(look):
    groups = {"a": cells(3), "b": cells(2)}
    far = {"a": np.array([True, False, False]), "b": np.zeros(2, bool)}
    both = representatives_figure(groups, far, look, real=groups, title="by moa")
    assert len(both.axes) == 2
    assert frames(both.axes[1]) == (1, 1)
    assert frames(both.axes[0]) == (0, 0)
    alone = representatives_figure(groups, far, look)
    assert len(alone.axes) == 1
    assert drawn(both) > drawn(alone)


def test_squares_are_pushed_apart_and_points_with_room_stay():
    points = np.array([[0.0, 0], [0.1, 0], [0.1, 0.05], [0.1, 0.05], [9, 9]])
    moved = spread_apart(points, 1.0)
    apart = np.abs(moved[:, None] - moved[None]).max(axis=2)[~np.eye(5, dtype=bool)]
    assert apart.min() > 0.98
    np.testing.assert_allclose(moved[4], points[4], atol=1e-4)


def test_a_map_shows_every_treatment_its_group_and_what_is_far(look):
    figure = treatment_map(
        np.random.default_rng(0).normal(size=(5, 2)),
        cells(5),
        ["a", "b", "c", "d", "a very long name of a treatment"],
        look,
        groups=["x", "x", "y", "y", "y"],
        outside=[False, True, False, False, False],
        title="map",
    )
    axes = figure.axes[0]
    assert len(axes.get_images()) == 5
    assert texts(axes) == ["a", "b ▲", "c", "d", "a very long name of…"]
    assert {"x", "y", *CHANNELS} <= set(legend_of(figure))
    with pytest.raises(PatchError, match="2 places, 1 cells, 2 labels"):
        treatment_map(np.zeros((2, 2)), cells(1), ["a", "b"], look)


def test_numbers_are_written_short():
    assert format_number(-22.31) == "−22.3"
    assert signed("Week1-22 taxol -0.5") == "Week1-22 taxol −0.5"
    assert (count(1, "cell"), count(2000, "cell")) == ("1 cell", "2,000 cells")
    assert [format_number(x) for x in (0, 0.1234, 12.34, 1234.5, 1e-7)] == [
        "0",
        "0.123",
        "12.3",
        "1,234",
        "1.00e−07",
    ]
