"""Grammar of CellProfiler's column names. Ground floor: standard library only.

``Nuclei_Texture_Contrast_DNA_3_01_256`` is compartment, category, feature, channel and the
parameters of the measurement (CellProfiler 4.2, ``MeasureTexture``: scale, direction, grey
levels). ``Metadata_*`` columns say where a cell comes from; everything else that is not a
measurement (``ObjectNumber``, ``Parent_*``, ``Children_*`` …) is bookkeeping.
"""

import difflib
import re
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
    rf"^(?P<compartment>[A-Za-z][A-Za-z0-9]*)_(?P<category>{'|'.join(CATEGORIES)})_(?P<rest>.+)$"
)
_POSITION = re.compile(
    r"_(AreaShape_(BoundingBoxM(ax|in)imum|Center)_[XYZ]|Location_.+"
    r"|Neighbors_(First|Second)ClosestObjectNumber_.+)$"
)
_ANGLE = re.compile(
    r"_(AreaShape_Orientation|RadialDistribution_ZernikePhase_.+|Neighbors_AngleBetweenNeighbors_.+)$"
)
_TWO_CHANNELS = ("Correlation",)
_CHANNEL_FIRST_PARAMETER = ("Intensity", "Texture", "RadialDistribution")


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
        What was measured, such as ``Area`` or ``Zernike_2_2``.
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
        return _POSITION.search(self.name) is not None

    @property
    def period(self) -> float | None:
        """Length of the circle an angle lives on, in the column's own units; None if no angle.

        ``Orientation`` is an axis in degrees (period 180); Zernike phases are radians (2 pi);
        ``AngleBetweenNeighbors`` is an ordinary angle of a triangle, from 0 to 180 degrees.
        """
        if self.feature == "Orientation":
            return 180.0
        return 6.283185307179586 if self.feature == "ZernikePhase" else None


def parse_column(name: str) -> Column | None:
    """Take a measurement's name apart; None for metadata and bookkeeping.

    Examples
    --------
    >>> parse_column("Nuclei_Texture_Contrast_DNA_3_01_256").parameters
    ('3', '01', '256')
    >>> parse_column("Cells_Correlation_Correlation_DNA_Actin").channels
    ('DNA', 'Actin')
    >>> parse_column("Metadata_Plate") is None
    True
    """
    match = _MEASUREMENT.match(name)
    if match is None or name.startswith(METADATA):
        return None
    compartment, category, rest = match["compartment"], match["category"], match["rest"]
    parts = rest.split("_")
    feature, channels, parameters = rest, (), ()  # type: str, tuple[str, ...], tuple[str, ...]
    if category in _TWO_CHANNELS and len(parts) >= 3:
        feature, channels, parameters = parts[0], tuple(parts[1:3]), tuple(parts[3:])
    elif category in _CHANNEL_FIRST_PARAMETER and len(parts) >= 2:
        feature, channels, parameters = parts[0], (parts[1],), tuple(parts[2:])
    elif category == "Granularity" and len(parts) >= 2:
        feature, channels = parts[0], ("_".join(parts[1:]),)
    elif category == "Location" and len(parts) >= 3:
        feature, channels = "_".join(parts[:-1]), (parts[-1],)
    elif category == "Neighbors":
        feature, parameters = parts[0], tuple(parts[1:])
    return Column(name, compartment, category, feature, channels, parameters)


def measurements(names: Iterable[str]) -> list[Column]:
    """Return the measurements among ``names``, in their order."""
    return [column for column in map(parse_column, names) if column is not None]


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the most similar known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def require_columns(present: Sequence[str], wanted: Iterable[str], where: str) -> None:
    """Check that every wanted column is present once.

    Raises
    ------
    ColumnError
        Naming ``where``, the first missing or doubled columns and the nearest names there.
    """
    have = set(present)
    if len(have) < len(present):
        doubled = sorted({name for name in present if list(present).count(name) > 1})
        raise ColumnError(f"{where}: columns occur more than once: {', '.join(doubled[:5])}")
    missing = [name for name in wanted if name not in have]
    if missing:
        shown = ", ".join(f"{name!r}{nearest(name, present)}" for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ColumnError(
            f"{where}: {len(missing)} column(s) missing: {shown}{more}; "
            f"it has {len(present)} columns. Rename them or point the config at the right table"
        )
