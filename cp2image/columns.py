"""Grammar of CellProfiler's column names. Ground floor: standard library only.

``Nuclei_Texture_Contrast_DNA_3_01_256`` is compartment, category, feature, channel and the
parameters of the measurement (CellProfiler 4.2, ``MeasureTexture``: scale, direction, grey
levels). ``Metadata_*`` columns say where a cell comes from; everything else that is not a
measurement of one object (``ObjectNumber``, ``Parent_*``, ``Children_*``, ``Image_*`` …) is
bookkeeping.
"""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cp2image.errors import ColumnError

METADATA = "Metadata_"
PLATE, WELL, SITE = "Metadata_Plate", "Metadata_Well", "Metadata_Site"
IMAGE_NUMBER, OBJECT_NUMBER = "Metadata_ImageNumber", "Metadata_ObjectNumber"
COMPOUND, CONCENTRATION, MOA = "Metadata_Compound", "Metadata_Concentration", "Metadata_MOA"
IDENTITY = (PLATE, WELL, SITE, IMAGE_NUMBER, OBJECT_NUMBER)
"""The columns that name one cell; they seed its noise, so results do not depend on order."""

CATEGORIES = (
    "AreaShape",
    "Correlation",
    "Granularity",
    "Intensity",
    "Location",
    "Neighbors",
    "RadialDistribution",
    "Texture",
)
_MEASUREMENT = re.compile(
    rf"(?P<compartment>[^\W\d_]\w*?)_(?P<category>{'|'.join(CATEGORIES)})_(?P<rest>.+)"
)
_NOT_OBJECTS = ("Metadata", "Image", "Experiment", "Mean", "Median", "StDev", *CATEGORIES)
_FEATURE_CHANNEL = r"(?P<feature>[^_]+)_(?P<channel>.+?)"
# What stands right of the channel is decided by its form, so that a channel may hold underscores.
# Texture: scale, two-digit direction, grey levels in version 4; scale and direction before it
# (0 to 3 in version 2, hence no grey level below 4); scale alone for Gabor.
_REST = {
    "Granularity": re.compile(_FEATURE_CHANNEL),
    "Intensity": re.compile(_FEATURE_CHANNEL),
    "Location": re.compile(r"(?P<feature>[^_]+_[XYZ])(_(?P<channel>.+))?"),
    "Neighbors": re.compile(r"(?P<feature>[^_]+)_(?P<parameters>.+)"),
    "RadialDistribution": re.compile(
        rf"{_FEATURE_CHANNEL}_(?P<parameters>\d+of\d+|Overflow|\d+_\d+)"
    ),
    "Texture": re.compile(
        rf"{_FEATURE_CHANNEL}_(?P<parameters>\d+_\d\d_([4-9]|[1-9]\d+)|\d+_\d\d?|\d+)"
    ),
}
_GABOR = re.compile(r"(?P<feature>Gabor)_(?P<channel>.+)_(?P<parameters>\d+)")
_COORDINATE = re.compile(r"(BoundingBoxM(ax|in)imum|Center)_[XYZ]")


@dataclass(frozen=True)
class Column:
    """One measurement's name, taken apart.

    Attributes
    ----------
    name
        The whole column name, verbatim.
    compartment
        Object that was measured: ``Nuclei``, ``Cells``, ``Cytoplasm`` or the user's own.
    category
        CellProfiler's module family, one of `CATEGORIES`.
    feature
        What was measured, such as ``Area``, ``Zernike_2_2``, or ``10`` of a granularity spectrum.
    channels
        Images it was measured on: none (shape), one, or two (correlation).
    parameters
        Scale, direction, bin and the like, as written.
    """

    name: str
    compartment: str
    category: str
    feature: str
    channels: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()

    @property
    def is_position(self) -> bool:
        """True for coordinates and neighbour numbers: where a cell is, not how it looks."""
        if self.category == "AreaShape":
            return _COORDINATE.fullmatch(self.feature) is not None
        return self.category == "Location" or self.feature.endswith("ClosestObjectNumber")

    @property
    def period(self) -> float | None:
        """Length of the circle an angle lives on, in the column's own units; None if no angle.

        ``Orientation`` is an axis in degrees (period 180); Zernike phases are radians (2 pi).
        ``AngleBetweenNeighbors`` is an ordinary angle of a triangle, from 0 to 180 degrees.
        """
        if self.category == "AreaShape" and self.feature == "Orientation":
            return 180.0
        return math.tau if self.feature == "ZernikePhase" else None


def parse_column(name: str, channels: Iterable[str] = ()) -> Column | None:
    """Take a measurement's name apart; None for metadata and bookkeeping.

    Parameters
    ----------
    name
        A column name with its compartment.
    channels
        Known channel names. Needed only to part the two channels of a ``Correlation`` column when
        they hold underscores; if they cannot be parted, they stay together as a parameter.

    Examples
    --------
    >>> parse_column("Nuclei_Texture_Contrast_DNA_3_01_256").parameters
    ('3', '01', '256')
    >>> parse_column("Cells_Correlation_Correlation_DNA_Actin").channels
    ('DNA', 'Actin')
    >>> parse_column("Metadata_Plate") is None
    True
    """
    match = _MEASUREMENT.fullmatch(name)
    if match is None or match["compartment"].split("_")[0] in _NOT_OBJECTS:
        return None
    compartment, category, rest = match["compartment"], match["category"], match["rest"]
    if category == "Correlation":
        feature, _, pair = rest.partition("_")
        found = _part(pair, channels)
        left = () if found or not pair else (pair,)
        return Column(name, compartment, category, feature, found, left)
    pattern = _GABOR if category == "Texture" and rest.startswith("Gabor_") else _REST.get(category)
    parts = pattern.fullmatch(rest) if pattern else None
    if parts is None:
        return Column(name, compartment, category, rest)
    groups = parts.groupdict()
    channel, parameters = groups.get("channel"), groups.get("parameters")
    return Column(
        name,
        compartment,
        category,
        parts["feature"],
        (channel,) if channel else (),
        tuple(parameters.split("_")) if parameters else (),
    )


def _part(pair: str, channels: Iterable[str]) -> tuple[str, ...]:
    known = set(channels)
    cuts = [place for place, letter in enumerate(pair) if letter == "_"]
    options = [(pair[:cut], pair[cut + 1 :]) for cut in cuts]
    if len(options) > 1:
        options = [(first, second) for first, second in options if {first, second} <= known]
    return options[0] if len(options) == 1 else ()


def measurements(names: Iterable[str]) -> list[Column]:
    """Return the measurements among ``names``, in their order.

    Channels of ``Correlation`` columns are recognised by the other columns of the table.
    """
    names = list(names)
    columns = [column for column in map(parse_column, names) if column is not None]
    known = {c.channels[0] for c in columns if len(c.channels) == 1}
    return [parse_column(c.name, known) or c if c.category == "Correlation" else c for c in columns]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the most similar known name, or an empty string."""
    folded = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.6)
    return f" (did you mean {folded[close[0]]!r}?)" if close else ""


def listed(names: Sequence[str], most: int = 40) -> str:
    """Return names as a text for an error, so many at most; ``none`` if there is none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more or "none"


_UNITS = {
    **dict.fromkeys(("Area", "BoundingBoxArea", "ConvexArea"), "px²"),
    **dict.fromkeys(("Perimeter", "MajorAxisLength", "MinorAxisLength"), "px"),
    **dict.fromkeys(("MaxFeretDiameter", "MinFeretDiameter", "EquivalentDiameter"), "px"),
    **dict.fromkeys(("MaximumRadius", "MeanRadius", "MedianRadius"), "px"),
    "Orientation": "°",
}
_BRIGHTNESS = ("Mean", "Median", "Min", "Max", "Std", "LowerQuartile", "UpperQuartile")


def unit_of(name: str) -> str:
    """Return the unit of a feature as its axis shows it, empty if it has none or it is not known.

    CellProfiler measures shapes in pixels and degrees, and brightness as a share of the image
    type's full range.
    """
    column = parse_column(name)
    if column is None:
        return ""
    if column.category == "AreaShape":
        return _UNITS.get(name.partition("_AreaShape_")[2], "")
    if column.category == "Intensity":
        kind = name.partition("_Intensity_")[2].partition("Intensity")[0]
        return "of the full range" if kind in _BRIGHTNESS else ""
    return ""


def require_columns(present: Sequence[str], wanted: Iterable[str], where: str) -> None:
    """Check that every wanted column is present, and no column twice.

    Raises
    ------
    ColumnError
        Naming ``where``, the first missing or doubled columns and the nearest names there.
    """
    counts = Counter(present)
    doubled = sorted(name for name, count in counts.items() if count > 1)
    if doubled:
        raise ColumnError(
            f"{where}: {len(doubled)} column(s) occur more than once: {_first_five(doubled)}; "
            "rename or remove the copies"
        )
    missing = [name for name in wanted if name not in counts]
    if missing:
        shown = _first_five([f"{name!r}{nearest(name, counts)}" for name in missing[:5]], missing)
        raise ColumnError(
            f"{where}: {len(missing)} column(s) missing: {shown}; "
            f"it has {len(counts)} columns. Rename them or point the config at the right table"
        )


def _first_five(shown: Sequence[str], of: Sequence[str] | None = None) -> str:
    more = len(of or shown) - 5
    return ", ".join(shown[:5]) + (f" and {more} more" if more > 0 else "")
