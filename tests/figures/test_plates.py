import numpy as np
import pytest
from matplotlib.colors import to_hex

from cp2image.errors import DatasetError, PatchError
from cp2image.figures.plates import parse_well, plate_format, plate_overview, row_name


def images(n):
    return (np.arange(n) + 1).astype(np.uint8).reshape(n, 1, 1, 1) * np.ones((n, 4, 4, 3), np.uint8)


def placed(figure):
    """Row and column of each drawn cell → its grey value."""
    found = {}
    for image in figure.axes[0].get_images():
        left, right, bottom, top = image.get_extent()
        place = round((top + bottom) / 2, 3), round((left + right) / 2, 3)
        found[place] = int(image.get_array()[0, 0, 0])
    return found


@pytest.mark.parametrize(
    ("name", "place"),
    [("A01", (0, 0)), ("a1", (0, 0)), ("H12", (7, 11)), ("P24", (15, 23)), ("AF48", (31, 47))],
)
def test_a_wells_name_says_its_row_and_column(name, place):
    assert parse_well(name) == place
    assert row_name(place[0]) == name.upper().rstrip("0123456789")


@pytest.mark.parametrize("name", ["", "A", "12", "A0", "A-1", "well 1", "A001B"])
def test_other_names_are_no_wells(name):
    with pytest.raises(DatasetError, match=f"'{name}' is not a row letter"):
        parse_well(name)


def test_the_smallest_plate_that_holds_the_wells_is_drawn():
    assert plate_format(["B02"]) == plate_format([]) == (8, 12)
    assert plate_format(["A13"]) == plate_format(["I01"]) == (16, 24)
    assert plate_format(["Q01"]) == (32, 48)
    with pytest.raises(DatasetError, match="row 1, column 49"):
        plate_format(["A49"])


@pytest.mark.parametrize(
    ("wells", "total"), [(["A01", "H12", "C7"], 96), (["A1", "P24", "O23"], 384)]
)
def test_every_cell_is_at_its_well_and_the_other_wells_are_grey(wells, total):
    figure = plate_overview(wells, images(3))
    assert placed(figure) == {parse_well(well): i + 1 for i, well in enumerate(wells)}
    assert len(figure.axes[0].patches) == total - 3
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (names[0], names[-1]) == ("A", "H" if total == 96 else "P")


def test_groups_are_framed_in_the_colours_of_the_legend_and_labels_are_cut():
    figure = plate_overview(
        ["B02", "B03", "B04"],
        images(3),
        groups=["Eg5", "DMSO", "Eg5"],
        labels=["short", "x" * 60, ""],
        colours={"Eg5": "#ff0000", "DMSO": "#00ff00"},
        title="P1",
    )
    frames = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert [to_hex(f.get_edgecolor()) for f in frames] == ["#ff0000", "#00ff00", "#ff0000"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["DMSO", "Eg5"]
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[0] == "short"
    assert texts[1].endswith("x…")
    assert len(texts[1]) < 30


def test_wells_and_cells_that_do_not_fit_are_refused():
    with pytest.raises(PatchError, match=r"expected \(2, height, width, 3\)"):
        plate_overview(["A01", "A02"], images(3))
    with pytest.raises(PatchError, match="1 labels for 2 wells"):
        plate_overview(["A01", "A02"], images(2), labels=["x"])
    with pytest.raises(DatasetError, match="more than once: A01, A1"):
        plate_overview(["A01", "A1"], images(2))
    with pytest.raises(DatasetError, match="A13 is outside a plate of 8 × 12"):
        plate_overview(["A13"], images(1), shape=(8, 12))
