"""Config of the steps up to cells with features: simulate, prepare, measure. Ground floor."""

from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field

from cp2image.config_section import Positive, Section, Share


class Simulate(Section):
    """The simulated screen (`cp2image.data.simulate`)."""

    output: str = ""
    plates: Positive = 3
    wells_per_plate: Positive = 24
    sites_per_well: Positive = 1
    cells_per_site: Positive = 40
    field_size: Positive = 352
    defect_share: Share = 0.02
    """Share of fields that are noise or out of focus."""


_Names = TypeVar("_Names", list[str], dict[str, str])


def _unique(names: _Names) -> _Names:
    values = list(names.values()) if isinstance(names, dict) else names
    twice = sorted({name for name in values if values.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} stands twice; every channel is its own image")
    return names


class Stacks(Section):
    """Ready-made patches: image stacks and an index CSV with one row per cell."""

    index: str
    columns: dict[str, str]
    """Canonical name → the index's column, as ``Metadata_Plate: plate``; ``file``, ``page`` too."""
    channels: Annotated[list[str], Field(min_length=1, max_length=8), AfterValidator(_unique)]


class Quality(Section):
    """Which patches are left out (`cp2image.data.quality`)."""

    drop: list[Literal["noise", "out_of_focus", "saturated", "empty_channel"]] = [
        "noise",
        "out_of_focus",
        "saturated",
    ]


class MetadataFile(Section):
    """A CSV with more about the image sets: plate layout, mechanisms of action."""

    uri: str
    on: list[str]
    """Canonical names that file and table share, as ``[Metadata_Plate, Metadata_Well]``."""
    columns: dict[str, str] = {}
    """Canonical name → the file's column, where it is not one of the usual variants."""


class Prepare(Section):
    """CellProfiler tables and fields of view, or ready-made stacks, to ``cells/``."""

    tables: list[str] = []
    """Each an ExportToSpreadsheet folder, an SQLite file, or Parquet/CSV with a row per cell."""
    metadata: dict[str, str] = {}
    """Canonical name → the table's column, where it is not one of the usual variants."""
    metadata_files: list[MetadataFile] = []
    images: str | None = None
    """Folder of the images: below it a relative folder of the table is kept, an absolute one
    (of the machine CellProfiler ran on) is replaced by it. None: as the table says."""
    image_folders: dict[str, str] = {}
    """Start of a folder in the table → start of the real one; goes before ``images``."""
    nuclei: str = "Nuclei"
    """The compartment whose centre a patch is cut around."""
    channels: Annotated[dict[str, str], Field(max_length=8), AfterValidator(_unique)] = {}
    """Channel name → image name in the table's ``FileName_<image>``, in patch order."""
    stacks: Stacks | None = None
    patch_size: Annotated[Positive, Field(ge=16, le=512)] = 68
    """Pixels."""
    border: Literal["pad", "drop"] = "pad"
    illumination: bool = False
    """Correct each plate and channel by its own illumination function (Singh et al. 2014)."""
    bit_depth: Annotated[int, Field(ge=8, le=32)] | None = None
    """Bits of the camera, where they are the lower ones of a wider file (12 for 0…4095)."""
    quality: Quality = Quality()
    output: str = ""
    plates: list[str] = []
    """Only these; empty: all. The others can follow later."""


class Measure(Section):
    """CellProfiler features of patches that have no table."""

    input: str = ""
    output: str = ""
    plates: list[str] = []
    """Only these; empty: all. The others can follow later."""
    families: list[str] | None = None
    """None: all of `cp2image.metrics.measurement.FAMILIES`."""
    compartments: list[str] = ["Nuclei", "Cells", "Cytoplasm"]
    nucleus_channel: str | None = None
    """None: the first channel."""
    turned: bool = False
    """Measure the patches' seven other orientations, for ``train.turned``."""
