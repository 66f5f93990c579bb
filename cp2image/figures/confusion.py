"""Confusion matrix of classes. Pure: numpy, pandas, matplotlib."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cp2image.figures.canvas import ACCENT, INK, SMALL, TEXT, blank, quiet


def confusion_matrix(table: pd.DataFrame, *, title: str = "") -> Figure:
    """Draw how often each true class was taken for each other; rows are the truth.

    Parameters
    ----------
    table
        Counts, truth by rows, prediction by columns, the same classes in both.
    title
        Text above.
    """
    counts = table.to_numpy()
    size = 1.9 + 0.28 * len(table)
    figure = blank(size, size)
    axes = quiet(figure.subplots(), title=title, x="predicted", y="true")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for (row, column), count in np.ndenumerate(counts):
        if not count:
            continue
        part = float(share[row, column])
        axes.add_patch(_square(column, row, part))
        colour = "white" if part > 0.6 else INK
        axes.text(column, row, f"{count}", ha="center", va="center", fontsize=SMALL, color=colour)
    places = range(len(table))
    axes.set_xticks(places, list(table.columns), rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(places, list(table.index))
    axes.set(xlim=(-0.5, len(table) - 0.5), ylim=(len(table) - 0.5, -0.5), aspect="equal")
    axes.title.set_fontsize(TEXT)
    return figure


def _square(column: int, row: int, share: float) -> object:
    from matplotlib.patches import Rectangle

    return Rectangle(
        (column - 0.5, row - 0.5), 1, 1, facecolor=ACCENT, alpha=0.12 + 0.88 * share, linewidth=0
    )
