"""The config's section of `cp2image.exploration`. Ground floor: pydantic."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from cp2image.config_section import Amount, Count, Name, Positive, Section, Share

Mode = Literal["conditional", "single"]
"""``conditional``: the other features move along, by the table's covariance; ``single``: they stay,
as in the paper's Fig. 4c."""
Split = Literal["all", "train", "validation", "test"]


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 <= pair[0] < pair[1] <= 100:
        raise ValueError("expected two percentiles, the smaller one first, as [1, 99]")
    return pair


Percentiles = Annotated[tuple[float, float], AfterValidator(_rising)]
_Steps = Annotated[Positive, Field(ge=3)]
_Features = Annotated[list[Name], Field(min_length=1)]
_Modes = Annotated[list[Mode], Field(min_length=1)]


class Manipulate(Section):
    """One feature over its observed range, drawn and measured again (the paper's Fig. 4c)."""

    features: _Features = [
        "Nuclei_AreaShape_Area",
        "Nuclei_AreaShape_Orientation",
        "Nuclei_Intensity_MeanIntensity_DNA",
        "Cells_AreaShape_Area",
    ]
    """Names or patterns (``Nuclei_AreaShape_*``); a figure for each feature."""
    modes: _Modes = ["conditional", "single"]
    percentiles: Percentiles = (1.0, 99.0)
    """Of the training cells: the ends of the observed range."""
    steps: _Steps = 9
    cells: Positive = 32
    """Cells that the response is measured on."""
    split: Split = "all"
    """Where those cells are taken from."""
    treatments: list[Name] = []
    """Compounds, or compounds with concentration (``taxol 0.3``); empty: the negative controls."""
    shown: Positive = 3
    """Cells in the figure."""
    draws: Positive = 4
    """Draws whose measurements are averaged; ``paper`` has no noise and is drawn once."""


class Responses(Section):
    """The same without figures, for many features: which knobs work."""

    features: _Features = ["*"]
    """Names or patterns, of the checkpoint's features."""
    modes: _Modes = ["conditional", "single"]
    percentiles: Percentiles = (1.0, 99.0)
    steps: _Steps = 5
    cells: Positive = 8
    split: Split = "all"
    treatments: list[Name] = []
    draws: Positive = 1


class Trajectories(Section):
    """From the typical control cell to the typical cell of a mechanism (the paper's Fig. 5a)."""

    targets: list[Name] = []
    """Mechanisms of action, or treatments; empty: all mechanisms."""
    features_per_step: Positive = 50
    """Features that each step takes from the target, the most different first."""
    shown: Annotated[Positive, Field(ge=2)] = 40
    """Most images of a figure, both ends included; steps in between are left out evenly."""


class Concentrations(Section):
    """From the controls to a compound's highest dose with enough cells (the paper's Fig. 5b, c)."""

    compounds: list[Name] = []
    """Empty: every compound with two concentrations or more."""
    points: Annotated[Positive, Field(ge=2)] = 7
    real: Count = 4
    """Real cells shown at each concentration."""
    fewest: Positive = 5
    """Cells that a concentration needs to be taken in."""


class Representatives(Section):
    """The typical cells of each group."""

    by: Literal["well", "treatment", "moa", "plate", "cluster"] = "treatment"
    groups: list[Name] = []
    """Only these; empty: all. Of treatments, a compound is all its concentrations."""
    prototypes: Positive = 4
    """Cells of each group: the medoid, then such as stand for what the others are far from."""
    clusters: Annotated[Positive, Field(ge=2)] = 8
    """Number of them where ``by`` is ``cluster``."""


class Atlas(Section):
    """Plates and treatments as pictures of generated representative cells."""

    plates: list[Name] = []
    """Drawn well by well; empty: all."""
    treatments: bool = True
    """Whether the map of treatments is drawn."""


Which = Literal[
    "manipulate", "responses", "trajectories", "concentrations", "representatives", "atlas"
]


class Explore(Section):
    """What a feature looks like (`cp2image.exploration`)."""

    which: Annotated[list[Which], Field(min_length=1)] = [
        "manipulate",
        "trajectories",
        "concentrations",
        "representatives",
        "atlas",
    ]
    """``responses``, the table of all features, takes longest and has to be asked for."""
    input: str = ""
    """Cells with or without patches, or any CellProfiler table with the checkpoint's columns."""
    checkpoint: str = ""
    output: str = ""
    plates: list[str] = []
    """Only these; empty: all."""
    cells: Annotated[Positive, Field(ge=50)] = 20_000
    """Most cells to look at, taken evenly over wells."""
    pixel_size: Amount | None = None
    """Micrometres; draws scale bars."""
    concentration_unit: str = ""
    """Such as ``µM``, for the labels; a CellProfiler table does not tell it."""
    shrinkage: Share | None = None
    """Of correlations towards 0; None: as Ledoit and Wolf estimate it."""
    outside: Annotated[float, Field(gt=0.5, lt=1)] = 0.99
    """A vector farther out than this share of held-back training cells is marked."""
    manipulate: Manipulate = Manipulate()
    responses: Responses = Responses()
    trajectories: Trajectories = Trajectories()
    concentrations: Concentrations = Concentrations()
    representatives: Representatives = Representatives()
    atlas: Atlas = Atlas()
