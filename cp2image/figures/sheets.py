"""Sheets of coloured cells with captions, marks and one contrast. Pure: numpy and matplotlib."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import ArrayLike, NDArray

from cp2image.errors import PatchError
from cp2image.figures.canvas import CONTRAST, INK, MUTED, SMALL, TEXT
from cp2image.figures.patches import colour_patches, draw_scale_bar, stain_colours, strip, tile

OUTSIDE = "far from the training cells"
CONTRADICTS = "value contradicts the cell's other features"
"""What the legend says of frames, solid and dotted."""
FAR, ODD = 1, 2
"""Marks of an image: a solid frame, a dotted one."""
INCH = 0.85
_GAP = 4


@dataclass(frozen=True)
class Look:
    """How cells are coloured, the same in all figures of one exploration.

    Attributes
    ----------
    channels
        C names.
    limits
        Black and white point of each channel, (C, 2), see `contrast_limits`.
    pixel_size
        Micrometres; None: no scale bar.
    """

    channels: tuple[str, ...]
    limits: NDArray[np.float32]
    pixel_size: float | None = None

    def colour(self, patches: ArrayLike) -> NDArray[np.uint8]:
        """Colour patches (N, C, H, W) as (N, H, W, 3)."""
        return colour_patches(patches, self.channels, limits=self.limits)


def draw_sheet(
    axes: Any,
    look: Look,
    rows: Mapping[str, ArrayLike],
    *,
    titles: Sequence[str] = (),
    captions: Mapping[str, Sequence[str]] | None = None,
    marked: Mapping[str, ArrayLike] | None = None,
    title: str = "",
) -> Any:
    """Draw rows of cells into axes.

    Parameters
    ----------
    axes
        Empty axes; returned.
    look
        Colours and contrast.
    rows
        Label → patches (N, C, H, W); rows may differ in N, the rest stays white.
    titles
        Texts above the columns.
    captions
        Label → texts below the row's images.
    marked
        Label → which images get a frame, (N,): 0 none, `FAR` (True) a solid, `ODD` a dotted one.
    title
        Text above all.

    Raises
    ------
    PatchError
        If there is no patch, or captions or marks do not fit a row.
    """
    counts = {label: len(np.asarray(patches)) for label, patches in rows.items()}
    columns = max(counts.values(), default=0)
    if not columns:
        raise PatchError("no patch to draw: every row of the sheet is empty")
    lines = max(
        (t.count("\n") + 1 for texts in (captions or {}).values() for t in texts), default=0
    )
    coloured = {label: look.colour(patches) for label, patches in rows.items() if counts[label]}
    height, width = next(iter(coloured.values())).shape[1:3]
    room = round(lines * 0.15 * width)
    sheet = np.full((len(rows) * columns, height + room, width, 3), 255, dtype=np.uint8)
    strip(axes)
    for row, label in enumerate(rows):
        count = counts[label]
        texts = (captions or {}).get(label, ())
        frames = np.asarray((marked or {}).get(label, np.zeros(count))).astype(int)
        if len(frames) != count or len(texts) not in (0, count):
            raise PatchError(
                f"row {label!r}: {len(texts)} captions and {len(frames)} marks for {count} cells"
            )
        top = row * (height + room + _GAP)
        for column in range(count):
            sheet[row * columns + column, :height] = coloured[label][column]
            left = column * (width + _GAP)
            if frames[column]:
                frame = Rectangle((left - 1.5, top - 1.5), width + 2, height + 2, fill=False)
                axes.add_patch(frame)
                style = "-" if frames[column] == FAR else (0, (1, 1.5))
                frame.set(edgecolor=CONTRAST, linewidth=1.6, linestyle=style, clip_on=False)
            if texts:
                at = (left + width / 2, top + height + 1)
                axes.text(
                    *at, texts[column], ha="center", va="top", fontsize=SMALL - 1.5, color=INK
                )
    axes.imshow(tile(sheet, columns, _GAP), interpolation="nearest")
    centres = [row * (height + room + _GAP) + height / 2 for row in range(len(rows))]
    axes.set_yticks(centres, list(rows), fontsize=SMALL, color=INK)
    for column, text in enumerate(titles):
        x = column * (width + _GAP) + width / 2
        axes.text(x, -4, text, ha="center", va="bottom", fontsize=SMALL - 1, color=INK)
    if title:
        pad = 4 + 9 * (max((text.count("\n") + 1 for text in titles), default=0))
        axes.set_title(title, fontsize=TEXT, color=INK, loc="left", pad=pad)
    if look.pixel_size is not None:
        draw_scale_bar(axes, look.pixel_size, width, height)
    return axes


def sheet_height(rows: int, *, caption_lines: int = 0, title_lines: int = 0) -> float:
    """Return the height in inches that a sheet of square patches wants."""
    return rows * INCH * (1 + 0.15 * caption_lines) + 0.14 * title_lines + 0.3


def stain_legend(
    figure: Figure, look: Look, marks: ArrayLike = (), place: str = "lower center"
) -> None:
    """Put the stains' colours, and what the frames mean that are there, under a figure.

    ``marks`` are those of all its images, as `draw_sheet` takes them.
    """
    stains = dict(zip(look.channels, stain_colours(look.channels), strict=True))
    handles: list[Any] = [
        Patch(facecolor=colour, edgecolor=MUTED, linewidth=0.4, label=name)
        for name, colour in stains.items()
    ]
    there = set(np.asarray(marks).astype(int).ravel().tolist())
    for mark, text, style in ((FAR, OUTSIDE, "-"), (ODD, CONTRADICTS, ":")):
        if mark in there:
            frame = Patch(facecolor="none", edgecolor=CONTRAST, linewidth=1.5, label=text)
            frame.set_linestyle(style)
            handles.append(frame)
    figure.legend(
        handles=handles,
        loc=f"outside {place}",
        ncols=len(handles),
        frameon=False,
        fontsize=SMALL,
        labelcolor=INK,
        handlelength=0.9,
        handleheight=0.9,
    )
