"""A map drawn with cells instead of dots. Pure: numpy and matplotlib."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import PatchError
from cp2image.figures.canvas import CONTRAST, INK, MUTED, PALETTE, SMALL, TEXT, blank, legend
from cp2image.figures.sheets import OUTSIDE, Look, stain_legend
from cp2image.figures.words import shorten, signed

_SIDE, _HIGH, _CELL = 9.0, 6.48, 0.62
"""Inches: of the map, of a cell on it."""


def spread_apart(points: ArrayLike, side: float, rounds: int = 400) -> NDArray[np.float64]:
    """Move points apart until squares of this side around them do not overlap, or rounds are over.

    Two squares that overlap are pushed apart along the axis on which that is shorter, each by half.

    Parameters
    ----------
    points
        (N, 2).
    side
        Of the squares, in the points' units.
    rounds
        Most rounds over all pairs.
    """
    x = np.array(points, dtype=np.float64)
    x += 1e-6 * side * np.arange(len(x))[:, None] * np.array([1.0, -0.5])  # equal points part
    for _ in range(rounds):
        apart = x[:, None] - x[None]
        lack = side - np.abs(apart)
        overlap = (lack > 1e-9 * side).all(axis=2) & ~np.eye(len(x), dtype=bool)
        if not overlap.any():
            break
        shorter = lack.argmin(axis=2)
        push = np.zeros_like(apart)
        rows, columns = np.nonzero(overlap)
        axis = shorter[rows, columns]
        sign = np.where(apart[rows, columns, axis] >= 0, 1.0, -1.0)
        push[rows, columns, axis] = 0.5 * lack[rows, columns, axis] * sign
        x += push.sum(axis=1) * 0.5
    return x


def treatment_map(
    places: ArrayLike,
    patches: NDArray[np.uint8],
    labels: Sequence[str],
    look: Look,
    *,
    groups: Sequence[str] | None = None,
    outside: ArrayLike | None = None,
    axes_names: tuple[str, str] = ("", ""),
    title: str = "",
    colours: Mapping[str, str] | None = None,
) -> Figure:
    """Draw one cell per treatment near its place on a map; a line leads to the place itself.

    Parameters
    ----------
    places
        (N, 2).
    patches
        (N, C, H, W).
    labels
        N texts under the cells.
    look
        Colours and contrast.
    groups
        N names (mechanism of action), shown as a coloured frame with a legend.
    outside
        Which are far from the training cells, (N,): their label says so with a mark.
    axes_names
        Of both axes.
    title
        Text above.
    colours
        Group → colour; by default the palette in the groups' sorted order.

    Raises
    ------
    PatchError
        If the numbers do not fit.
    """
    at = np.asarray(places, dtype=np.float64)
    far = np.zeros(len(at), bool) if outside is None else np.asarray(outside, dtype=bool)
    if not len(at) == len(patches) == len(labels) == len(far):
        raise PatchError(f"{len(at)} places, {len(patches)} cells, {len(labels)} labels")
    names = sorted(set(groups)) if groups is not None else []
    colour = dict(colours or {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)})
    span = np.maximum(np.ptp(at, axis=0), 1e-9)
    unit = (at - at.min(axis=0)) / span * np.array([_SIDE, _HIGH])
    moved = spread_apart(unit, _CELL * 1.22)
    low, high = moved.min(axis=0) - _CELL, moved.max(axis=0) + _CELL
    size = high - low
    lines = -(-len(names) // 4)
    figure = blank(size[0] + 0.5, size[1] + 0.9 + 0.2 * lines)
    axes = figure.subplots()
    half = _CELL / 2
    for index, image in enumerate(look.colour(patches)):
        x, y = moved[index]
        axes.plot([x, unit[index, 0]], [y, unit[index, 1]], color=MUTED, linewidth=0.6, zorder=1)
        axes.plot(*unit[index], ".", color=MUTED, markersize=3, zorder=1)
        extent = (x - half, x + half, y - half, y + half)
        axes.imshow(image, extent=extent, interpolation="nearest", zorder=2)
        edge = MUTED if groups is None else colour.get(groups[index], MUTED)
        frame = Rectangle((x - half, y - half), _CELL, _CELL, fill=False, zorder=3)
        frame.set(edgecolor=edge, linewidth=1.6)
        axes.add_patch(frame)
        axes.text(x, y - half - 0.02, shorten(labels[index], 20) + (" ▲" if far[index] else ""),
                  ha="center", va="top", fontsize=SMALL - 3, zorder=4,
                  color=CONTRAST if far[index] else INK)  # fmt: skip
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    for axis, own, along in ((axes.xaxis, at[:, 0], 0), (axes.yaxis, at[:, 1], 1)):
        ticks = MaxNLocator(5).tick_values(own.min(), own.max())
        ticks = ticks[(ticks >= own.min()) & (ticks <= own.max())]
        here = (ticks - own.min()) / span[along] * (_SIDE, _HIGH)[along]
        axis.set_ticks(here, [signed(f"{tick:g}") for tick in ticks])
    axes.tick_params(colors=MUTED, labelcolor=MUTED, labelsize=SMALL - 1, width=0.6, length=3)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(axes_names[0], fontsize=SMALL, color=MUTED)
    axes.set_ylabel(axes_names[1], fontsize=SMALL, color=MUTED)
    if title or far.any():
        note = f"  (▲ {OUTSIDE})" if far.any() else ""
        figure.suptitle(title + note, fontsize=TEXT + 1, color=INK)
    if names:
        legend(figure, {name: colour.get(name, MUTED) for name in names}, 4)
    stain_legend(figure, look, place="upper right")
    return figure
