"""Settings of what is scored beside a run: well profiles, the metrics. Ground floor."""

from cp2image.config_section import Count, Positive, Section


class WellTable(Section):
    """A CSV about wells or treatments."""

    uri: str
    columns: dict[str, str] = {}
    """Canonical name → the file's column, as ``Metadata_Plate: Image_Metadata_Plate``."""


class Mechanisms(Section):
    """Mechanisms of action from CellProfiler profiles of wells (`cp2image.mechanisms`)."""

    profiles: WellTable | None = None
    """One row per well: plate, well, features."""
    joined: list[WellTable] = []
    """What says more of the wells (compound, concentration, mechanism); each is joined, in order,
    on the ``Metadata_*`` columns it shares with what is known before it."""
    batch: str = ""
    """Regular expression whose first group is a plate's batch; empty: each plate is its own."""
    factors: Positive = 50
    """Of factor analysis, fitted on the controls."""
    output: str = ""


class Sanity(Section):
    """Whether each metric moves the right way on cells that were spoilt on purpose."""

    input: str = ""
    """A ``cells/`` dataset."""
    output: str = ""
    cells: Positive = 800
    """Most real cells; half of them are spoilt and compared with the other half."""
    seed: Count = 0
