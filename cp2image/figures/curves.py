"""Curves, scatters and boxes of scores and of training. Pure: numpy, pandas, matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import EvaluationError
from cp2image.figures.canvas import (
    ACCENT,
    CONTRAST,
    INK,
    MUTED,
    PALETTE,
    SMALL,
    TEXT,
    blank,
    legend,
    quiet,
)

THRESHOLD = 0.5
_MANY_POINTS = 2000


def correlation_curve(
    table: pd.DataFrame,
    *,
    ceiling: pd.DataFrame | None = None,
    shuffled: pd.DataFrame | None = None,
    title: str = "",
) -> Figure:
    """Draw the features sorted by how well they are kept, as in the paper's Fig. 4a.

    Parameters
    ----------
    table
        Has a column ``r``, one row per feature; rows without a defined r are left out.
    ceiling
        The same for real patches against the input table: as good as it can get.
    shuffled
        The same for cells generated from shuffled feature rows: what chance gives.
    title
        Text above.

    Raises
    ------
    EvaluationError
        If no r is defined.
    """
    r = _sorted_r(table)
    figure = blank(5.6, 3.9)
    axes = quiet(figure.subplots(), title=title, x="features, best first (%)", y="correlation r")
    axes.axhline(0, color=MUTED, linewidth=0.8)
    axes.axhline(THRESHOLD, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    share = 100 * float((r > THRESHOLD).mean())
    label = f"generated cells: {share:.0f} % of {len(r)} features above {THRESHOLD:g}"
    curves = [(label, r, ACCENT, 2.0)]
    if ceiling is not None:
        curves.insert(0, ("ceiling: real patches against the table", _sorted_r(ceiling), INK, 1.1))
    if shuffled is not None:
        curves.append(("control: shuffled features", _sorted_r(shuffled), CONTRAST, 1.1))
    for name, values, colour, width in curves:
        axes.plot(_percent(len(values)), values, color=colour, linewidth=width, label=name)
    above = np.maximum(r, THRESHOLD)
    axes.fill_between(_percent(len(r)), THRESHOLD, above, color=ACCENT, alpha=0.15, linewidth=0)
    axes.plot([share, share], [THRESHOLD, -1], color=ACCENT, linewidth=0.8, linestyle=(0, (1, 2)))
    lowest = min(float(values.min()) for _, values, _, _ in curves)
    axes.set(xlim=(0, 100), ylim=(max(-1.0, min(-0.1, lowest - 0.05)), 1.02))
    figure.legend(loc="outside lower center", frameon=False, fontsize=SMALL, labelcolor=INK)
    return figure


def best_features(
    original: pd.DataFrame, generated: pd.DataFrame, table: pd.DataFrame, *, count: int = 6
) -> Figure:
    """Draw the best-kept features cell by cell, original against generated (Fig. 4b).

    Parameters
    ----------
    original, generated
        Tables with one row per cell, in the same order.
    table
        One row per feature with columns ``feature`` and ``r``.
    count
        How many features.

    Raises
    ------
    EvaluationError
        If no r is defined or the tables differ in length.
    """
    if len(original) != len(generated):
        raise EvaluationError(
            f"{len(original)} original and {len(generated)} generated rows cannot be paired"
        )
    best = table.dropna(subset=["r"]).sort_values("r", ascending=False, kind="stable").head(count)
    if best.empty:
        raise EvaluationError("no feature has a defined correlation: nothing to draw")
    columns = min(3, len(best))
    rows = -(-len(best) // columns)
    figure = blank(2.35 * columns + 0.3, 2.35 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name, r in zip(grid, best["feature"], best["r"], strict=False):
        x, y = (_floats(part[name]) for part in (original, generated))
        valid = np.isfinite(x) & np.isfinite(y)
        _scatter(quiet(axes, title=_two_lines(str(name))), x[valid], y[valid])
        axes.text(
            0.05, 0.95, f"r = {r:.2f}", transform=axes.transAxes, va="top", fontsize=TEXT, color=INK
        )
    for axes in grid[len(best) :]:
        axes.set_visible(False)
    figure.supxlabel("original", fontsize=TEXT, color=INK)
    figure.supylabel("generated", fontsize=TEXT, color=INK)
    return figure


def correlation_boxes(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Draw the spread of r by category and compartment.

    Parameters
    ----------
    table
        One row per feature with columns ``category``, ``compartment`` and ``r``.
    title
        Text above.

    Raises
    ------
    EvaluationError
        If no r is defined.
    """
    defined = table.dropna(subset=["r"])
    if defined.empty:
        raise EvaluationError("no feature has a defined correlation: nothing to draw")
    medians = defined.groupby("category")["r"].median().sort_values()
    categories = [str(name) for name in medians.index]
    compartments = sorted({str(name) for name in defined["compartment"]}, key=_compartment_order)
    boxes = [
        (category, compartment, values.to_numpy(dtype=np.float64))
        for category in categories
        for compartment in compartments
        if len(values := defined.loc[_rows(defined, category, compartment), "r"])
    ]
    figure = blank(5.6, 0.24 * len(boxes) + 0.18 * len(categories) + 1.0)
    axes = quiet(figure.subplots(), title=title, x="correlation r")
    axes.axvline(0, color=MUTED, linewidth=0.8, zorder=0)
    axes.axvline(THRESHOLD, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    position, previous = 0.0, ""
    middles: dict[str, list[float]] = {}
    for category, compartment, values in boxes:
        position += 1.7 if category != previous and previous else 1.0
        previous = category
        middles.setdefault(category, []).append(position)
        _box(axes, values, position, PALETTE[compartments.index(compartment) % len(PALETTE)])
        axes.text(
            1.0,
            position,
            f"{len(values)}",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=SMALL - 1,
            color=MUTED,
        )
    axes.set_yticks([float(np.mean(p)) for p in middles.values()], list(middles), fontsize=TEXT)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set(ylim=(0.3, position + 0.7), xlim=(min(-0.1, float(defined["r"].min()) - 0.03), 1.02))
    shown = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(compartments)}
    legend(figure, dict(reversed(shown.items())))
    return figure


def training_curves(
    histories: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    floors: Mapping[str, float] | None = None,
    beside: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    title: str = "",
) -> Figure:
    """Draw one small panel per recorded metric over the training steps.

    A panel is logarithmic when its values are positive and span more than a factor of 30.

    Parameters
    ----------
    histories
        Metric name → (steps, values); values that are not finite are left out.
    floors
        Metric name → a value to beat, drawn as a dashed line (the mean image's loss, say).
    beside
        The same metrics of another run, drawn on top as a thin dashed curve.
    title
        Text above all panels.

    Raises
    ------
    EvaluationError
        If there is nothing to draw.
    """
    if not histories:
        raise EvaluationError("no training history to draw")
    columns = min(3, len(histories))
    rows = -(-len(histories) // columns)
    figure = blank(2.8 * columns + 0.2, 1.9 * rows + (0.5 if title else 0.25))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for index, (axes, (name, (steps, values))) in enumerate(
        zip(grid, histories.items(), strict=False)
    ):
        x, y = _floats(steps), _floats(values)
        keep = np.isfinite(x) & np.isfinite(y)
        x, y = x[keep], y[keep]
        quiet(axes, title=name, x="step" if index + columns >= len(histories) else "")
        axes.plot(
            x, y, color=ACCENT, linewidth=1.4, marker="." if len(x) < 30 else "", markersize=4
        )
        if beside is not None and name in beside:
            other = [_floats(values) for values in beside[name]]
            axes.plot(*other, color=CONTRAST, linewidth=0.8, linestyle=(0, (3, 3)))
        if len(y) and y.min() > 0 and y.max() > 30 * y.min():
            axes.set_yscale("log")
        if floors is not None and name in floors:
            axes.axhline(floors[name], color=CONTRAST, linewidth=0.9, linestyle=(0, (4, 3)))
    for axes in grid[len(histories) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=TEXT, color=INK)
    return figure


def _sorted_r(table: pd.DataFrame) -> NDArray[np.float64]:
    r = _floats(table["r"])
    r = np.sort(r[np.isfinite(r)])[::-1]
    if len(r) == 0:
        raise EvaluationError("no feature has a defined correlation: nothing to draw")
    return r


def _percent(n: int) -> NDArray[np.float64]:
    return 100 * (np.arange(n) + 0.5) / n


def _floats(values: Any) -> NDArray[np.float64]:
    series = pd.Series(np.asarray(values) if not isinstance(values, pd.Series) else values)
    return series.to_numpy(dtype=np.float64, na_value=np.nan)


def _scatter(axes: Any, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    size = 5.0 if len(x) < _MANY_POINTS else 2.0
    alpha = float(np.clip(60 / np.sqrt(max(len(x), 1)) / 4, 0.08, 0.6))
    axes.scatter(x, y, s=size, color=ACCENT, alpha=alpha, linewidths=0, rasterized=True)
    for values, setter in ((x, axes.set_xlim), (y, axes.set_ylim)):
        if len(values):
            low, high = np.percentile(values, [0.5, 99.5])
            margin = 0.06 * (high - low) or 1.0
            setter(low - margin, high + margin)
    low, high = (
        max(axes.get_xlim()[0], axes.get_ylim()[0]),
        min(axes.get_xlim()[1], axes.get_ylim()[1]),
    )
    if high > low:
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.8, zorder=0)
    axes.locator_params(nbins=4)
    axes.ticklabel_format(scilimits=(-3, 4), useMathText=True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_offset_text().set(fontsize=SMALL - 1, color=MUTED)


def _box(axes: Any, values: NDArray[np.float64], position: float, colour: str) -> None:
    jitter = np.random.default_rng(0).uniform(-0.22, 0.22, len(values))
    axes.scatter(values, position + jitter, s=3, color=colour, alpha=0.35, linewidths=0)
    axes.boxplot(
        [values],
        positions=[position],
        orientation="horizontal",
        widths=0.6,
        showfliers=False,
        manage_ticks=False,
        patch_artist=True,
        boxprops={"facecolor": colour, "alpha": 0.35, "linewidth": 0},
        medianprops={"color": INK, "linewidth": 1.2},
        whiskerprops={"color": colour, "linewidth": 0.9},
        capprops={"linewidth": 0},
    )


def _rows(table: pd.DataFrame, category: str, compartment: str) -> Any:
    return (table["category"].astype(str) == category) & (
        table["compartment"].astype(str) == compartment
    )


def _compartment_order(name: str) -> tuple[int, str]:
    known: Sequence[str] = ("Cytoplasm", "Cells", "Nuclei")
    return (known.index(name) if name in known else len(known), name)


def _two_lines(name: str) -> str:
    """Break a long column name after its category."""
    head, category, rest = [*name.split("_", 2), "", ""][:3]
    return f"{head} {category}\n{rest}" if rest else name
