"""One look for every figure, and how a figure is stored. Pure: matplotlib; no pyplot state.

Figures are objects: they are made with `blank`, drawn by the other modules of this folder, and
written with `save`; nothing here touches matplotlib's global state, so threads and Ray workers may
draw at the same time.
"""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cp2image.errors import StorageError
from cp2image.storage import name_of, write_bytes

INK, MUTED, FAINT = "#2b2b2b", "#8c8c8c", "#e4e4e4"
ACCENT, CONTRAST = "#2f6f9f", "#c8553d"
PALETTE = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#e08d3c", "#7a6fbf"),
    *("#a3622b", "#52b69a", "#c06c9b", "#7f8f29", "#333333", "#9fc5e8", "#f4b6c2", "#b7d7a8"),
)
"""Distinct colours for groups; they repeat after the sixteenth."""
TEXT, SMALL = 9.0, 7.5
RESOLUTION = 150
"""Dots per inch of a stored PNG."""


def blank(width: float, height: float) -> Figure:
    """Return an empty white figure of this size in inches, to be drawn on with Agg."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def quiet(axes: Any, *, title: str = "", x: str = "", y: str = "") -> Any:
    """Give axes the common look: two thin spines, small grey ticks, a plain title; return them."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set(color=MUTED, linewidth=0.8)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=SMALL, width=0.8, length=3)
    axes.set_title(title, fontsize=TEXT, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=TEXT, color=INK)
    axes.set_ylabel(y, fontsize=TEXT, color=INK)
    return axes


def legend(figure: Figure, colours: Mapping[str, Any], columns: int | None = None) -> None:
    """Put name → colour as small squares under a figure, in one line or this many columns."""
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor=MUTED, linewidth=0.4, label=name)
            for name, colour in colours.items()
        ],
        loc="outside lower center",
        ncols=columns or len(colours),
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
        handlelength=0.9,
        handleheight=0.9,
    )


def save(figure: Figure, uri: str) -> str:
    """Write a figure as PNG or SVG, whole or not at all, and return its URI.

    Raises
    ------
    StorageError
        If the suffix is neither ``.png`` nor ``.svg``, or the place cannot be written.
    """
    kind = name_of(uri).rpartition(".")[2].lower()
    if kind not in ("png", "svg"):
        raise StorageError(f"{uri}: a figure is stored as .png or .svg, not {kind!r}")
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=RESOLUTION)
    write_bytes(uri, data.getvalue())
    return uri
