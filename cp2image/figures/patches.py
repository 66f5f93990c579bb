"""Pictures of single cells: stains to colours, rows of cells, real above generated. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import PatchError
from cp2image.figures.canvas import INK, SMALL, TEXT, blank, legend
from cp2image.figures.words import shorten

Colour = tuple[float, float, float]
STAINS: tuple[tuple[str, Colour], ...] = (
    ("dna|dapi|hoechst|nucle(us|i)|draq", (0.25, 0.45, 1.0)),
    ("actin|phalloidin|agp", (1.0, 0.35, 0.1)),
    ("tubulin|microtub", (0.15, 0.9, 0.3)),
    ("mito", (0.9, 0.2, 0.8)),
    ("rna|syto", (0.95, 0.85, 0.2)),
    (r"\ber\b|concanavalin|reticulum", (0.2, 0.85, 0.85)),
)
"""Colour of a stain by what its channel's name contains."""
SPARE: tuple[Colour, ...] = (
    *((1.0, 0.35, 0.1), (0.15, 0.9, 0.3), (0.25, 0.45, 1.0), (0.9, 0.2, 0.8)),
    *((0.95, 0.85, 0.2), (0.2, 0.85, 0.85), (0.7, 0.7, 0.7), (0.6, 0.4, 0.9)),
)
"""Colours of stains that are not known by name: the first that no other channel has."""
PERCENTILES = (1.0, 99.5)
_GAP = 2


def stain_colours(channels: Sequence[str]) -> list[Colour]:
    """Return one RGB colour in [0, 1] per channel name; a single channel is white."""
    if len(channels) == 1:
        return [(1.0, 1.0, 1.0)]
    found: list[Colour | None] = [
        next((c for pattern, c in STAINS if re.search(pattern, name, re.IGNORECASE)), None)
        for name in channels
    ]
    left = [colour for colour in SPARE if colour not in found]
    return [c if c is not None else (left.pop(0) if left else (0.7, 0.7, 0.7)) for c in found]


def contrast_limits(
    patches: ArrayLike, percentiles: tuple[float, float] = PERCENTILES
) -> NDArray[np.float32]:
    """Return the black and white point of each channel over all patches, shape (C, 2).

    Values are in units of the type's range, as in `colour_patches`. An empty channel is drawn
    black.

    Raises
    ------
    PatchError
        If there is no patch or it has not four axes.
    """
    x = _unit(patches)
    if len(x) == 0:
        raise PatchError("no patch to draw: the selection is empty")
    limits = np.percentile(x, percentiles, axis=(0, 2, 3)).T.astype(np.float32)
    limits[:, 1] = np.maximum(limits[:, 1], limits[:, 0] + 1e-4)
    return limits


def colour_patches(
    patches: ArrayLike,
    channels: Sequence[str],
    colours: Sequence[Colour] | None = None,
    limits: ArrayLike | None = None,
) -> NDArray[np.uint8]:
    """Add up the stains of each patch, each in its colour.

    Parameters
    ----------
    patches
        Shape (N, C, H, W): uint8, uint16, or floats in [0, 1].
    channels
        C channel names.
    colours
        C RGB colours in [0, 1]; by default DNA blue, actin orange, tubulin green (`stain_colours`).
    limits
        Black and white point of each channel in units of the type's range, shape (C, 2); by default
        those of these patches (`contrast_limits`). Pass the same limits to what is compared.

    Returns
    -------
    ndarray
        Shape (N, H, W, 3), uint8.

    Raises
    ------
    PatchError
        If shapes and names do not fit or there is no patch.
    """
    x = _unit(patches)
    colours = stain_colours(channels) if colours is None else colours
    if not len(channels) == len(colours) == x.shape[1]:
        raise PatchError(
            f"patches have {x.shape[1]} channels, but {len(channels)} names and "
            f"{len(colours)} colours were given"
        )
    points = np.asarray(contrast_limits(x) if limits is None else limits, dtype=np.float32)
    low, high = points[:, 0, None, None], points[:, 1, None, None]
    shown = np.clip((x - low) / (high - low), 0, 1)
    rgb = np.einsum("nchw,ck->nhwk", shown, np.asarray(colours, dtype=np.float32))
    image: NDArray[np.uint8] = np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    return image


def tile(images: NDArray[np.uint8], columns: int, gap: int = _GAP) -> NDArray[np.uint8]:
    """Lay (N, H, W, 3) out in rows of ``columns`` on white, ``gap`` px apart; one RGB image."""
    n, height, width, _ = images.shape
    rows = -(-n // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def figure_rows(
    rows: Mapping[str, ArrayLike],
    channels: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    pixel_size: float | None = None,
    columns: int = 12,
) -> Figure:
    """Draw the same cells in one row per source, such as the paper's Fig. 3.

    Parameters
    ----------
    rows
        Row label → patches (N, C, H, W) of the same cells in the same order. The first row, the
        real cells, sets the contrast of all.
    channels
        C channel names.
    titles
        N texts above the cells, such as their treatments; what is too long for a cell is cut.
    pixel_size
        Micrometres per pixel; draws a scale bar.
    columns
        Cells side by side; more cells begin a new block of rows.

    Raises
    ------
    PatchError
        If the rows differ in shape, are empty, or the titles do not fit.
    """
    shapes = {label: np.asarray(patches).shape for label, patches in rows.items()}
    if len(set(shapes.values())) != 1:
        listed = ", ".join(f"{label} {shape}" for label, shape in shapes.items()) or "none"
        raise PatchError(f"rows of one figure must have one shape; found {listed}")
    limits = contrast_limits(next(iter(rows.values())))
    coloured = {name: colour_patches(x, channels, limits=limits) for name, x in rows.items()}
    n, height, width = next(iter(coloured.values())).shape[:3]
    if titles is not None and len(titles) != n:
        raise PatchError(f"{len(titles)} titles for {n} cells")
    columns = min(columns, n)
    blocks = -(-n // columns)
    inch = 0.85
    lines = max((text.count("\n") + 1 for text in titles), default=0) if titles else 0
    block_height = len(rows) * inch * height / width + lines * 0.14 + 0.06
    figure = blank(columns * inch + 0.9, blocks * block_height + 0.35)
    grid = figure.subplots(blocks, 1, squeeze=False)[:, 0]
    for block, axes in enumerate(grid):
        part = slice(block * columns, min((block + 1) * columns, n))
        count = part.stop - part.start
        images = np.full((len(rows) * columns, height, width, 3), 255, dtype=np.uint8)
        for row, image in enumerate(coloured.values()):
            images[row * columns : row * columns + count] = image[part]
        strip(axes).imshow(tile(images, columns), interpolation="nearest")
        centres = [row * (height + _GAP) + height / 2 for row in range(len(rows))]
        axes.set_yticks(centres, list(rows), fontsize=TEXT, color=INK)
        for index in range(count if titles else 0):
            x = index * (width + _GAP) + width / 2
            words = (titles[part.start + index] if titles else "").split("\n")
            text = "\n".join(shorten(line, 15) for line in words)
            axes.text(x, -4, text, ha="center", va="bottom", fontsize=SMALL - 1, color=INK)
        if pixel_size is not None and block == 0:
            draw_scale_bar(axes, pixel_size, width, height)
    legend(figure, dict(zip(channels, stain_colours(channels), strict=True)))
    return figure


def figure_pairs(
    real: ArrayLike,
    generated: ArrayLike,
    channels: Sequence[str],
    *,
    titles: Sequence[str] | None = None,
    pixel_size: float | None = None,
    columns: int = 12,
) -> Figure:
    """Draw real cells above the generated ones, in one contrast; parameters of `figure_rows`."""
    rows = {"real": real, "generated": generated}
    return figure_rows(rows, channels, titles=titles, pixel_size=pixel_size, columns=columns)


def montage(
    patches: ArrayLike,
    channels: Sequence[str],
    *,
    columns: int = 12,
    title: str = "",
    pixel_size: float | None = None,
) -> Figure:
    """Draw many cells (N, C, H, W) as one sheet with a legend of the stains.

    Raises
    ------
    PatchError
        If there is none, or the channels do not fit.
    """
    images = colour_patches(patches, channels)
    columns = min(columns, len(images))
    sheet = tile(images, columns)
    inch = 0.7 * columns / sheet.shape[1]
    figure = blank(sheet.shape[1] * inch + 0.2, sheet.shape[0] * inch + (0.75 if title else 0.45))
    axes = strip(figure.subplots())
    axes.imshow(sheet, interpolation="nearest")
    axes.set_title(title, fontsize=TEXT, color=INK, loc="left")
    if pixel_size is not None:
        draw_scale_bar(axes, pixel_size, images.shape[2], images.shape[1])
    legend(figure, dict(zip(channels, stain_colours(channels), strict=True)))
    return figure


def _unit(patches: ArrayLike) -> NDArray[np.float32]:
    x: NDArray[Any] = np.asarray(patches)
    if x.ndim != 4:
        raise PatchError(f"patches have shape {x.shape}; expected (cells, channels, height, width)")
    if np.issubdtype(x.dtype, np.integer):
        return x.astype(np.float32) / np.float32(np.iinfo(x.dtype).max)
    return np.nan_to_num(x.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)


def strip(axes: Any) -> Any:
    """Take ticks and frame off axes that show pictures; return them."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def draw_scale_bar(axes: Any, pixel_size: float, width: int, height: int) -> None:
    """Draw a bar of a round length, at most half a patch, into the first patch."""
    longest = width * pixel_size / 2
    decade = 10 ** np.floor(np.log10(longest))
    length = next(step * decade for step in (5, 2, 1) if step * decade <= longest)
    pixels, x, y = length / pixel_size, width * 0.06, height * 0.93
    axes.add_patch(Rectangle((x, y - 1), pixels, 2, facecolor="white", edgecolor="none"))
    axes.text(x, y - 3, f"{length:g} µm", color="white", fontsize=SMALL - 2, va="bottom")
