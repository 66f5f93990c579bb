"""A plate at a glance: one cell per well at the well's place. Pure: numpy and matplotlib."""

import re
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from cp2image.errors import DatasetError, PatchError
from cp2image.figures.canvas import FAINT, INK, MUTED, PALETTE, SMALL, TEXT, blank, legend
from cp2image.figures.words import shorten

FORMATS = ((2, 3), (4, 6), (8, 12), (16, 24), (32, 48))
"""Rows and columns of 6-, 24-, 96-, 384- and 1536-well plates."""
_WELL = re.compile(r"^([A-Za-z]{1,2})0*([1-9][0-9]?)$")


def parse_well(name: str) -> tuple[int, int]:
    """Return row and column of a well, both from 0.

    >>> parse_well("B02"), parse_well("p24"), parse_well("AF48")
    ((1, 1), (15, 23), (31, 47))

    Raises
    ------
    DatasetError
        If it is no letter and number.
    """
    match = _WELL.match(name.strip())
    if match is None:
        raise DatasetError(f"well {name!r} is not a row letter and a column number, such as B02")
    row = 0
    for letter in match[1].upper():
        row = row * 26 + ord(letter) - ord("A") + 1
    return row - 1, int(match[2]) - 1


def row_name(row: int) -> str:
    """Return the letter or letters of a row from 0: A … Z, AA … AF."""
    return chr(65 + row) if row < 26 else chr(64 + row // 26) + chr(65 + row % 26)


def plate_format(wells: Sequence[str]) -> tuple[int, int]:
    """Return rows and columns of the smallest common plate, from 96 wells up, with these wells.

    Raises
    ------
    DatasetError
        If a well lies outside a 1536-well plate.
    """
    places = [parse_well(well) for well in wells]
    rows = 1 + max((row for row, _ in places), default=0)
    columns = 1 + max((column for _, column in places), default=0)
    for shape in FORMATS[2:]:
        if rows <= shape[0] and columns <= shape[1]:
            return shape
    raise DatasetError(f"wells reach row {rows}, column {columns}: outside a 1536-well plate")


def plate_overview(
    wells: Sequence[str],
    images: NDArray[np.uint8],
    *,
    labels: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    colours: Mapping[str, str] | None = None,
    shape: tuple[int, int] | None = None,
    title: str = "",
) -> Figure:
    """Draw one cell per well at its row and column; wells without a cell are grey.

    Parameters
    ----------
    wells
        N well names, each once, such as ``B02``.
    images
        N coloured cells, shape (N, H, W, 3), uint8, as `colour_patches` returns.
    labels
        N short texts under the cells (treatment); long ones are cut.
    groups
        N group names (mechanism of action), shown as a coloured frame with a legend.
    colours
        Group name → colour; by default the palette in the groups' sorted order. Give it to draw
        several plates alike.
    shape
        Rows and columns of the plate; by default the smallest of 96, 384, 1536 that fits.
    title
        Text above.

    Raises
    ------
    PatchError
        If the lengths or shapes do not fit.
    DatasetError
        If a well has no such name, is given twice, or lies outside the plate.
    """
    _check(wells, images, labels, groups)
    rows, columns = plate_format(wells) if shape is None else shape
    large = columns <= FORMATS[2][1]
    inch = 0.95 if large else 0.55
    names = sorted(set(groups)) if groups is not None else []
    colour = dict(colours or {g: PALETTE[i % len(PALETTE)] for i, g in enumerate(names)})
    per_line = max(1, int(columns * inch // 1.7))
    extra = 0.6 + 0.2 * -(-len(names) // per_line) + 0.2 * bool(title)
    figure = blank(columns * inch + 0.4, rows * inch + extra)
    axes = figure.subplots()
    places = dict(zip(map(parse_well, wells), range(len(wells)), strict=True))
    outside = [wells[i] for (row, column), i in places.items() if row >= rows or column >= columns]
    if outside:
        raise DatasetError(f"well {outside[0]} is outside a plate of {rows} × {columns} wells")
    half, up = (0.45, 0.0) if labels is None else (0.41, 0.06)
    for row, column in product(range(rows), range(columns)):
        index = places.get((row, column))
        if index is None:
            axes.add_patch(Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, facecolor=FAINT))
            continue
        y = row - up
        extent = (column - half, column + half, y + half, y - half)
        axes.imshow(images[index], extent=extent, interpolation="nearest")
        if groups is not None:
            edge = colour.get(groups[index], MUTED)
            frame = Rectangle((column - half, y - half), 2 * half, 2 * half, fill=False)
            frame.set(edgecolor=edge, linewidth=1.8 if large else 1.2)
            axes.add_patch(frame)
        if labels is not None:
            text, size = shorten(labels[index], 24 if large else 16), SMALL - (2.5 if large else 4)
            axes.text(column, row + 0.37, text, ha="center", va="top", fontsize=size, color=INK)
    axes.set(xlim=(-0.52, columns - 0.48), ylim=(rows - 0.48, -0.52), aspect="equal")
    axes.set_xticks(range(columns), [str(c + 1) for c in range(columns)])
    axes.set_yticks(range(rows), [row_name(row) for row in range(rows)])
    axes.tick_params(length=0, labelsize=SMALL, labelcolor=MUTED, top=False, bottom=False)
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=TEXT + 1, color=INK)
    if names:
        legend(figure, {name: colour.get(name, MUTED) for name in names}, per_line)
    return figure


def _check(
    wells: Sequence[str],
    images: NDArray[np.uint8],
    labels: Sequence[str] | None,
    groups: Sequence[str] | None,
) -> None:
    if images.ndim != 4 or images.shape[-1] != 3 or len(images) != len(wells):
        raise PatchError(
            f"images have shape {images.shape}; expected ({len(wells)}, height, width, 3), one "
            "coloured cell per well"
        )
    for name, texts in (("labels", labels), ("groups", groups)):
        if texts is not None and len(texts) != len(wells):
            raise PatchError(f"{len(texts)} {name} for {len(wells)} wells")
    places = [parse_well(well) for well in wells]
    twice = sorted({well for well in wells if places.count(parse_well(well)) > 1})
    if twice:
        raise DatasetError(f"well(s) given more than once: {', '.join(twice[:5])}; pick one cell")
