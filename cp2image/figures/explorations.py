"""Features, paths and typical cells as pictures. Pure: numpy and matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from cp2image.figures.canvas import ACCENT, CONTRAST, INK, MUTED, PALETTE, SMALL, blank, quiet
from cp2image.figures.sheets import INCH, Look, draw_sheet, sheet_height, stain_legend
from cp2image.figures.words import course, format_number, signed

Patches = NDArray[np.uint8]


class Response(Protocol):
    """What was measured where a feature was requested, as `summarise_response` returns it."""

    @property
    def requested(self) -> NDArray[np.float64]:
        """Values asked for, (S,)."""

    @property
    def mean(self) -> NDArray[np.float64]:
        """Measured, over cells, (S,)."""

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Over cells, (S,)."""

    @property
    def spearman(self) -> float:
        """Rank correlation over cells and steps."""

    @property
    def slope(self) -> float:
        """Of the means against what was requested."""

    @property
    def rises(self) -> bool:
        """Whether the mean rises with every step."""

    @property
    def directed(self) -> bool:
        """False for angles without a common direction, which have no mean."""

    @property
    def measured(self) -> NDArray[np.float64]:
        """Of the single cells, (N, S)."""


_MODES = {
    "conditional": "the others moved along (conditional mean)",
    "single": "all others fixed",
}
_COLOURS = {"conditional": ACCENT, "single": CONTRAST}


def manipulation_figure(
    feature: str,
    images: Mapping[str, Patches],
    marks: Mapping[str, NDArray[Any]],
    responses: Mapping[str, Response],
    look: Look,
    *,
    same_scale: bool = True,
    unit: str = "",
    note: str = "",
) -> Figure:
    """Draw one feature over its range: cells above, what is measured on them below.

    Parameters
    ----------
    feature
        CellProfiler's name.
    images
        Mode → generated patches, (cells, S, C, H, W).
    marks
        Mode → which of them are far from the training cells, or ask for a value that contradicts
        the others, (cells, S), see `draw_sheet`.
    responses
        Mode → what was measured; all have the same S requested values.
    look
        Colours and contrast.
    same_scale
        Whether measured and requested values have the same scale: then the line of equal values is
        drawn.
    unit
        Of the values.
    note
        Text above the curves: cells, draws.
    """
    requested = next(iter(responses.values())).requested
    cells, steps = next(iter(images.values())).shape[:2]
    heights = [sheet_height(cells, title_lines=2) for _ in images]
    figure = blank(max(steps * INCH + 0.9, 6.0), sum(heights) + 3.0)
    grid = figure.subplots(len(images) + 1, 1, height_ratios=[*heights, 2.4], squeeze=False)[:, 0]
    texts = [format_number(value) for value in requested]
    for axes, (mode, drawn) in zip(grid, images.items(), strict=False):
        rows = {f"cell {row + 1}": drawn[row] for row in range(cells)}
        marked = {f"cell {row + 1}": marks[mode][row] for row in range(cells)}
        draw_sheet(axes, look, rows, titles=texts, marked=marked, title=_MODES[mode])
    tail = f" ({unit})" if unit else ""
    axes = quiet(grid[-1], x=f"requested {feature}{tail}", y=f"measured{tail}")
    for mode, found in responses.items():
        label = f"{_MODES[mode]}: {_course(found, same_scale)}"
        if not found.directed:  # no mean to draw: the cells themselves
            steps = np.broadcast_to(requested, found.measured.shape)
            axes.plot(
                steps.ravel(),
                found.measured.ravel(),
                "o",
                color=_COLOURS[mode],
                markersize=2.5,
                alpha=0.5,
                label=label,
            )
            continue
        low, high = found.mean - found.deviation, found.mean + found.deviation
        axes.fill_between(requested, low, high, color=_COLOURS[mode], alpha=0.15, linewidth=0)
        axes.plot(requested, found.mean, "o-", color=_COLOURS[mode], markersize=3.5, label=label)
    if same_scale:
        ends = requested[[0, -1]]
        axes.plot(ends, ends, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), label="equal")
    axes.legend(fontsize=SMALL, labelcolor=INK, loc="best", framealpha=0.85, edgecolor="none")
    axes.set_title(note, fontsize=SMALL, color=MUTED, loc="left")
    figure.suptitle(feature, fontsize=SMALL + 3, color=INK)
    stain_legend(figure, look, np.stack(list(marks.values())))
    return figure


def _course(found: Response, same_scale: bool) -> str:
    if not np.isfinite(found.spearman):
        return "too few values"
    rank = f"Spearman {found.spearman:.2f}, "
    return signed(rank + course(found.slope, found.rises, found.directed, same_scale))


_TAKEN = "features taken over from the target, the most different first"


def trajectory_figure(
    title: str,
    drawn: Patches,
    swapped: ArrayLike,
    similarity: ArrayLike,
    outside: NDArray[np.bool_],
    look: Look,
    *,
    real: Mapping[str, Patches] | None = None,
    columns: int = 10,
) -> Figure:
    """Draw the way between two cells, the cosine similarity to the target under each image.

    Parameters
    ----------
    title
        From where to where.
    drawn
        Generated along the way, (K, C, H, W).
    swapped
        Features taken over from the target at each, (K,).
    similarity
        Cosine to the target, (K,).
    outside
        Which are far from the training cells, (K,).
    look
        Colours and contrast.
    real
        ``start`` and ``target`` → the real cell, (1, C, H, W), if there are any.
    columns
        Images side by side.
    """
    count, taken, alike = len(drawn), np.asarray(swapped), np.asarray(similarity)
    rows: dict[str, Any] = {}
    captions, marks = {}, {}
    for start in range(0, count, columns):
        part = slice(start, min(start + columns, count))
        label = f"generated\n{taken[start]:,}–{taken[part.stop - 1]:,}\nfeatures"
        rows[label], marks[label] = drawn[part], outside[part]
        captions[label] = [signed(f"{value:.2f}") for value in alike[part]]
    if real:
        rows["real"] = np.concatenate(list(real.values()))
        captions["real"] = list(real)
    height = sheet_height(len(rows), caption_lines=1)
    figure = blank(max(min(count, columns) * INCH + 1.2, 6.0), height + 2.4)
    top, below = figure.subplots(2, 1, height_ratios=[height, 1.7])
    draw_sheet(top, look, rows, captions=captions, marked=marks)
    axes = quiet(below, x=_TAKEN, y="cosine of profile and target")
    axes.plot(taken, alike, "o-", color=ACCENT, markersize=3)
    axes.plot(taken[outside], alike[outside], "o", color=CONTRAST, markersize=4)
    figure.suptitle(title, fontsize=SMALL + 2, color=INK)
    stain_legend(figure, look, outside)
    return figure


def concentration_figure(
    title: str,
    places: Mapping[str, NDArray[np.float64]],
    path: NDArray[np.float64],
    explained: Sequence[float],
    drawn: Mapping[str, Patches],
    shares: Sequence[float],
    outside: Mapping[str, NDArray[np.bool_]],
    look: Look,
    *,
    real: Mapping[str, Patches] | None = None,
    positions: Mapping[str, float] | None = None,
    between: Sequence[str] = (),
) -> Figure:
    """Draw a compound's cells in the plane of two principal axes and images along a line in it.

    Parameters
    ----------
    title
        The compound.
    places
        Group (control, concentrations) → its cells' places, (n, 2).
    path
        The line's places, (T, 2).
    explained
        Share of the variance along both axes.
    drawn
        What starts the line → patches generated along it, (T, C, H, W).
    shares
        Of the way, 0 to 1, (T,).
    outside
        As ``drawn``: which are far from the training cells.
    look
        Colours and contrast.
    real
        Group → real cells, (n, C, H, W).
    positions
        Group → where its mean falls on the line, 0 to 1.
    between
        Concentration that each place of the line stands for, T texts.
    """
    real = {name: patches for name, patches in (real or {}).items() if len(patches)}
    height = sheet_height(len(drawn), title_lines=2)
    side = max(3.4, sheet_height(len(real)) if real else 0)
    width = max(len(shares) * INCH + 1.2, 8.0)
    figure = blank(width, height + side + 0.7)
    halves: Any = figure.subfigures(2, 1, height_ratios=[side, height + 0.3])
    upper, lower = halves
    most = max((len(patches) for patches in real.values()), default=0)
    if real:
        left, right = upper.subplots(1, 2, width_ratios=[width - most * INCH - 1, most * INCH + 1])
        labels = {name: _place(name, positions) for name in real}
        draw_sheet(right, look, {labels[n]: x for n, x in real.items()}, title="real cells")
    else:
        left = upper.subplots()
    first, second = (
        f"PC{i + 1} of these cells ({100 * share:.0f} % of the variance)"
        for i, share in enumerate(explained)
    )
    axes = quiet(left, x=first, y=second)
    for index, (name, points) in enumerate(places.items()):
        colour = MUTED if index == 0 else PALETTE[(index - 1) % len(PALETTE)]
        label = f"{name} (n = {len(points):,})"
        axes.scatter(*points.T, s=6, color=colour, alpha=0.55, linewidths=0, label=label)
        axes.plot(*points.mean(axis=0), "D", color=colour, markeredgecolor=INK, markersize=6)
    axes.plot(*path.T, "-", color=INK, linewidth=1.0)
    axes.plot(*path.T, "o", color=INK, markersize=3)
    axes.legend(frameon=False, fontsize=SMALL - 1, labelcolor=INK, markerscale=2)
    axes = lower.subplots()
    marked = {name: outside[name] for name in drawn}
    texts = [f"{100 * share:.0f} %" for share in shares]
    texts = [f"{a}\n{b}".rstrip() for a, b in zip(texts, between or [""] * len(texts), strict=True)]
    draw_sheet(axes, look, drawn, titles=texts, marked=marked, title="generated along the line")
    figure.suptitle(title, fontsize=SMALL + 3, color=INK)
    stain_legend(figure, look, np.concatenate([np.ravel(part) for part in outside.values()]))
    return figure


def _place(name: str, positions: Mapping[str, float] | None) -> str:
    known = (positions or {}).get(name)
    return name if known is None else signed(f"{name}\n({round(100 * known)} % of the way)")


def representatives_figure(
    generated: Mapping[str, Patches],
    outside: Mapping[str, NDArray[np.bool_]],
    look: Look,
    *,
    real: Mapping[str, Patches] | None = None,
    title: str = "",
) -> Figure:
    """Draw the representative cells of each group: real ones left, the same generated right.

    Parameters
    ----------
    generated
        Group → patches drawn from the representatives' features, (n, C, H, W).
    outside
        Group → which are far from the training cells.
    look
        Colours and contrast.
    real
        Group → the representatives' own patches; None where there is only a table.
    title
        Text above.
    """
    most = max(len(patches) for patches in generated.values())
    parts = 1 if real is None else 2
    height = sheet_height(len(generated), title_lines=2)
    figure = blank(max(parts * (most * INCH + 0.3) + 2.0, 5.0), height + 0.6)
    grid = figure.subplots(1, parts, squeeze=False)[0]
    titles = ["medoid", *(f"prototype {i}" for i in range(2, most + 1))]
    if real is not None:
        draw_sheet(grid[0], look, real, titles=titles, title="real")
        grid[1].tick_params(labelleft=False)
    draw_sheet(grid[-1], look, generated, titles=titles, marked=outside, title="generated")
    if real is not None:
        grid[1].set_yticks([])
    figure.suptitle(title, fontsize=SMALL + 3, color=INK)
    stain_legend(figure, look, np.concatenate([np.ravel(part) for part in outside.values()]))
    return figure
