"""What a search for numbers has seen. Pure: pandas, matplotlib."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cp2image.errors import EvaluationError
from cp2image.figures.canvas import ACCENT, CONTRAST, INK, MUTED, SMALL, TEXT, blank, quiet

_MAP = "viridis"


def parallel_coordinates(
    trials: pd.DataFrame,
    keys: Mapping[str, bool],
    objective: str,
    *,
    lower: bool = True,
    title: str = "",
) -> Figure:
    """Draw one line per trial over an axis per number and one for the objective.

    Parameters
    ----------
    trials
        One row per trial: the numbers, ``objective``, and ``status``; rows that are not
        ``complete`` are dashed, those without an objective left out.
    keys
        Column of a number → whether its axis is logarithmic; 0 stands apart below such an axis.
    objective
        Column that colours the lines: the better, the darker, and drawn on top.
    lower
        Whether less of it is better.
    title
        Text above.

    Raises
    ------
    EvaluationError
        If no trial has an objective.
    """
    shown = _with_objective(trials, objective)
    names = [*keys, objective]
    figure = blank(1.3 * len(names) + 1.2, 3.6)
    axes = figure.subplots()
    axes.set_title(title, fontsize=TEXT, color=INK, loc="left")
    axes.set(xlim=(-0.15, len(names) - 0.85), ylim=(-0.09, 1.06))
    places = np.stack(
        [_place(axes, x, shown[name], keys.get(name, False)) for x, name in enumerate(names)], 1
    )
    values = shown[objective].to_numpy(dtype=np.float64)
    colours = colormaps[_MAP if lower else f"{_MAP}_r"](
        Normalize(values.min(), values.max())(values)
    )
    order = np.argsort(-values if lower else values)
    for row in order:
        complete = shown["status"].iloc[row] == "complete"
        axes.plot(
            range(len(names)),
            places[row],
            color=colours[row],
            linewidth=1.6 if complete else 0.9,
            linestyle="-" if complete else (0, (3, 2)),
            alpha=0.9,
        )
    axes.set_xticks(range(len(names)), [_short(name) for name in names], fontsize=SMALL)
    axes.tick_params(axis="x", length=0, labelcolor=INK)
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
    figure.supxlabel(
        "solid: complete; dashed: stopped early, as it was then", fontsize=SMALL, color=MUTED
    )
    return figure


def numbers_against_objective(
    trials: pd.DataFrame,
    keys: Mapping[str, bool],
    objective: str,
    *,
    references: Mapping[str, float] | None = None,
    title: str = "",
) -> Figure:
    """Draw a panel per number: the objective of each trial against it.

    Parameters
    ----------
    trials, keys, objective
        As in `parallel_coordinates`.
    references
        Name → objective, drawn as a dashed line in every panel.
    title
        Text above.

    Raises
    ------
    EvaluationError
        If no trial has an objective.
    """
    shown = _with_objective(trials, objective)
    columns = min(4, len(keys))
    rows = -(-len(keys) // columns)
    figure = blank(2.3 * columns + 0.5, 2.3 * rows + 0.6)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    complete = (shown["status"] == "complete").to_numpy()
    for panel, (key, log) in zip(grid.flat, keys.items(), strict=False):
        axes = quiet(panel, x=_short(key))
        x, ticks, labels = _scale(shown[key], log)
        y = shown[objective].to_numpy(dtype=np.float64)
        axes.scatter(x[complete], y[complete], s=22, color=ACCENT, linewidths=0)
        hollow = {"facecolors": "none", "edgecolors": MUTED, "linewidths": 0.9}
        axes.scatter(x[~complete], y[~complete], s=22, **hollow)
        axes.set_xticks(ticks, labels)
        for name, value in (references or {}).items():
            axes.axhline(value, color=CONTRAST, linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                name,
                (0.98, value),
                xycoords=("axes fraction", "data"),
                fontsize=SMALL - 1,
                color=CONTRAST,
                ha="right",
                va="bottom",
            )
    for panel in grid.flat[len(keys) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=TEXT, color=INK)
    figure.supylabel(_short(objective), fontsize=TEXT, color=INK)
    figure.supxlabel(
        "filled: complete; hollow: stopped early, as it was then", fontsize=SMALL, color=MUTED
    )
    return figure


def _with_objective(trials: pd.DataFrame, objective: str) -> pd.DataFrame:
    known = np.zeros(len(trials), dtype=bool)
    if objective in trials:
        known = np.isfinite(trials[objective].to_numpy(dtype=np.float64))
    if not known.any():
        raise EvaluationError(f"no trial has reported {objective}: nothing to draw")
    return trials.loc[known].reset_index(drop=True)


def _scale(
    column: "pd.Series[Any]", log: bool
) -> tuple[NDArray[np.float64], Sequence[float], Sequence[str]]:
    """Return where values stand on an axis, and its ticks; on a logarithmic one 0 stands apart."""
    values = column.to_numpy(dtype=np.float64)
    if not log or not (values > 0).any():
        ticks = np.unique(np.linspace(values.min(), values.max(), 3))
        return values, ticks.tolist(), [f"{tick:.4g}" for tick in ticks]
    positive = values[values > 0]
    low, high = np.floor(np.log10(positive.min())), np.ceil(np.log10(positive.max()))
    high = max(high, low + 1)
    zero = low - 0.18 * (high - low)
    with np.errstate(divide="ignore"):
        place = np.where(values > 0, np.log10(np.where(values > 0, values, 1)), zero)
    ticks = np.arange(low, high + 0.5)
    labels = [f"{10.0**tick:g}" for tick in ticks]
    if (values == 0).any():
        return place, [zero, *ticks], ["0", *labels]
    return place, ticks.tolist(), labels


def _place(axes: Any, x: int, column: "pd.Series[Any]", log: bool) -> NDArray[np.float64]:
    """Draw one upright axis and return where its values stand between 0 and 1."""
    place, ticks, labels = _scale(column, log)
    low, high = min(*ticks, place.min()), max(*ticks, place.max())
    width = (high - low) or 1.0
    axes.plot([x, x], [0, 1], color=MUTED, linewidth=0.8, zorder=0)
    for tick, label in zip(ticks, labels, strict=True):
        height = (tick - low) / width
        axes.annotate(
            label,
            (x, height),
            xytext=(-4, 0),
            textcoords="offset points",
            fontsize=SMALL - 1,
            color=INK,
            ha="right",
            va="center",
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.8},
            zorder=5,
        )
    found: NDArray[np.float64] = (place - low) / width
    return found


def _short(name: str) -> str:
    """Return the last part of a dotted key or a metric, γ with its number below."""
    if name.startswith("train.gamma."):
        return "γ" + name.rpartition(".")[2].translate(str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉"))
    return name.rpartition(".")[2].replace("validation/", "").replace("_", " ")
