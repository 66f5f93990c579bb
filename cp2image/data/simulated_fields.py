"""The fields of a simulated screen: its layout, treatments and camera. Floor 1: no Ray, no torch.

Three plates a week are replicates of one layout: untreated wells (DMSO) on the diagonal, and
compounds of five mechanisms of action (MOA) at up to three concentrations. Fields are 12-bit camera
images shifted left by 4 bits, as in BBBC021 (Caie et al. 2010, doi:10.1158/1535-7163.MCT-09-1148;
Ljosa et al. 2012, doi:10.1038/nmeth.2083). Compounds and concentrations are BBBC021's; what they do
to a cell is made up after what is known of the mechanism.
"""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import ndimage

from cp2image.data.simulated_cells import CHANNELS, Phenotype, draw_cells, render_cells
from cp2image.errors import ConfigError

CONTROL = "DMSO"
SATURATION = 4095

_ROWS = "BCDEFG"
_COLUMNS = range(2, 12)
_REPLICATES = 3
_OFFSET = 40.0
_WAVELENGTHS = {"DNA": "w1", "Tubulin": "w2", "Actin": "w4"}
# The streams of random numbers; 10 gives the default screen a defect of each kind.
_PLATE, _WELL, _FIELD, _NAME, _DEFECT = 0, 1, 2, 3, 10

_Compounds = tuple[tuple[str, tuple[float, float, float]], ...]
_MECHANISMS: dict[str, tuple[Phenotype, _Compounds]] = {
    "DNA damage": (
        Phenotype(
            nucleus_area=1.45,
            nucleus_brightness=0.75,
            chromatin_contrast=0.6,
            granularity=0.2,
            cell_area=1.35,
            fibres=1.3,
        ),
        (("etoposide", (1.0, 3.0, 10.0)), ("mitomycin C", (0.3, 1.0, 3.0))),
    ),
    "Actin disruptors": (
        Phenotype(
            nucleus_area=0.9, cell_area=0.62, roundness=0.8, cortex=0.35, fibres=0.1, spots=0.75
        ),
        (("cytochalasin B", (3.0, 10.0, 30.0)), ("latrunculin B", (0.3, 1.0, 3.0))),
    ),
    "Microtubule stabilizers": (
        Phenotype(nucleus_area=1.1, lobes=0.08, cell_area=0.95, tubulin=1.5, bundling=0.9),
        (("taxol", (0.3, 1.0, 3.0)), ("epothilone B", (0.1, 0.3, 1.0))),
    ),
    "Protein synthesis": (
        Phenotype(
            nucleus_area=0.66, nucleus_brightness=1.25, cell_area=0.62, tubulin=0.6, fibres=0.6
        ),
        (("emetine", (0.1, 0.3, 1.0)), ("anisomycin", (0.1, 0.3, 1.0))),
    ),
    "Aurora kinase inhibitors": (
        Phenotype(
            nucleus_area=1.6,
            lobes=0.15,
            granularity=0.7,
            chromatin_contrast=1.4,
            cell_area=1.6,
            tubulin=1.15,
        ),
        (("AZ258", (0.1, 0.3, 1.0)), ("AZ841", (0.1, 0.3, 1.0))),
    ),
}
_POTENCY = (1.0, 0.85)
_DOSE_EFFECT = (0.4, 0.7, 1.0)
_BLOCKS = ((0, 2), (1, 2), (0, 0), (1, 0), (0, 1), (1, 1))


@dataclass(frozen=True)
class SimulatedScreen:
    """What is simulated. A larger screen holds the same fields where the two overlap.

    Attributes
    ----------
    plates
        Number of plates; every three are one week's replicates.
    wells_per_plate
        1 to 60, the inner wells of a 96-well plate. 6 hold a control and one compound of each MOA,
        12 both compounds, 24 a second concentration of each, 36 the third; then it starts again.
    sites_per_well
        Fields per well.
    cells_per_site
        Cells in each field, exactly.
    field_size
        Side of a field in pixels.
    seed
        Same seed, same bytes.
    defect_share
        Share of the fields that show only camera noise or are out of focus; twice as many others
        have a piece of saturated debris. 0 to 0.3.
    """

    plates: int = 3
    wells_per_plate: int = 24
    sites_per_well: int = 1
    cells_per_site: int = 40
    field_size: int = 352
    seed: int = 0
    defect_share: float = 0.02

    def __post_init__(self) -> None:
        limits = {
            "plates": (1, 10_000),
            "wells_per_plate": (1, len(_ROWS) * len(_COLUMNS)),
            "sites_per_well": (1, 10_000),
            "cells_per_site": (1, 10_000),
            "field_size": (96, 4096),
            "seed": (0, 2**63),
            "defect_share": (0.0, 0.3),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(
                    f"simulated screen: {name} is {value!r}, expected {low} to {high}; change it"
                )


@dataclass(frozen=True)
class Treatment:
    """One compound at one concentration (µM) and what it does to the average cell."""

    compound: str
    concentration: float
    moa: str
    phenotype: Phenotype


@dataclass(frozen=True)
class SimulatedField:
    """One site of one well: what the camera saw and what was there.

    Attributes
    ----------
    plate, well, site, replicate
        Such as ``Week1_20000``, ``B02``, 1, 1.
    treatment
        What the well was treated with.
    defect
        ``none``, ``noise`` (nothing but camera noise in the images) or ``defocus``.
    files
        File name of each channel, by channel name.
    cells
        One row per cell, as `simulated_cells.draw_cells` returns it, and ``debris``: whether debris
        lies on the cell. Row n - 1 is object n.
    images
        Uint16, shape (3, height, width), channels DNA, actin, tubulin: 12 bits shifted left by 4.
    expected
        Float32, the same shape: the images without noise, in camera counts 0 to 4095.
    nuclei, cell_bodies
        Int32 label images, shape (height, width).
    """

    plate: str
    well: str
    site: int
    replicate: int
    treatment: Treatment
    defect: str
    files: dict[str, str]
    cells: pd.DataFrame
    images: NDArray[np.uint16]
    expected: NDArray[np.float32]
    nuclei: NDArray[np.int32]
    cell_bodies: NDArray[np.int32]

    @property
    def folder(self) -> str:
        """Path of the images inside ``images/``, such as ``Week1/Week1_20000``."""
        return f"{self.plate.split('_')[0]}/{self.plate}"


def name_well(well: int) -> str:
    """Return the name of the n-th well, from 0: the columns of B02 to G11, each turned by one."""
    column, row = divmod(well, len(_ROWS))
    return f"{_ROWS[(row + column) % len(_ROWS)]}{_COLUMNS[column]:02d}"


def name_plate(plate: int) -> str:
    """Return the name of the n-th plate, from 0, such as ``Week1_20000``."""
    return f"Week{plate // _REPLICATES + 1}_{20000 + 20 * plate}"


def treat_well(well: int) -> Treatment:
    """Return what the n-th well, from 0, is treated with: the same on every plate."""
    block, place = divmod(well, len(_MECHANISMS) + 1)
    if place == 0:
        return Treatment(CONTROL, 0.0, CONTROL, Phenotype())
    moa = list(_MECHANISMS)[place - 1]
    phenotype, compounds = _MECHANISMS[moa]
    choice, dose = _BLOCKS[block % len(_BLOCKS)]
    compound, concentrations = compounds[choice]
    strength = _POTENCY[choice] * _DOSE_EFFECT[dose]
    return Treatment(compound, concentrations[dose], moa, phenotype.at(strength))


def simulate_field(screen: SimulatedScreen, plate: int, well: int, site: int) -> SimulatedField:
    """Simulate one field; ``plate``, ``well`` and ``site`` count from 0.

    Raises
    ------
    ConfigError
        If the screen's cells do not fit into its fields.
    """
    treatment = treat_well(well)
    well_rng = _random(screen, _WELL, plate, well)
    growth, well_gain = np.exp(well_rng.normal(0.0, 0.03)), np.exp(well_rng.normal(0.0, 0.03, 3))
    phenotype = replace(
        treatment.phenotype,
        nucleus_area=treatment.phenotype.nucleus_area * growth,
        cell_area=treatment.phenotype.cell_area * growth,
    )
    rng = _random(screen, _FIELD, plate, well, site)
    cells = draw_cells(phenotype, screen.cells_per_site, screen.field_size, rng)
    rendered = render_cells(cells, screen.field_size, rng)
    defect, debris = _draw_defects(screen, plate, well, site)
    blur = {"none": rng.uniform(0.0, 0.7), "noise": 0.0, "defocus": 12.0}[defect]
    light = np.stack([ndimage.gaussian_filter(plane, blur) for plane in rendered.signal + debris])
    if defect == "noise":
        light[:] = 0.0
    expected = _expose(light, screen, plate, well_gain)
    touched = np.unique(rendered.cells[debris.max(axis=0) > 100.0])
    cells["debris"] = np.isin(np.arange(1, len(cells) + 1), touched)
    name = f"{name_well(well)}_s{site + 1}"
    guids = _random(screen, _NAME, plate, well, site).bytes(16 * len(CHANNELS))
    return SimulatedField(
        plate=name_plate(plate),
        well=name_well(well),
        site=site + 1,
        replicate=plate % _REPLICATES + 1,
        treatment=treatment,
        defect=defect,
        files={
            channel: f"{name}_{_WAVELENGTHS[channel]}"
            f"{str(uuid.UUID(bytes=guids[16 * place : 16 * place + 16])).upper()}.tif"
            for place, channel in enumerate(CHANNELS)
        },
        cells=cells,
        images=_read_out(expected, rng),
        expected=expected,
        nuclei=rendered.nuclei,
        cell_bodies=rendered.cells,
    )


def simulate_fields(screen: SimulatedScreen) -> Iterator[SimulatedField]:
    """Yield the fields of a screen: plate by plate, well by well, site by site."""
    for plate in range(screen.plates):
        for well in range(screen.wells_per_plate):
            for site in range(screen.sites_per_well):
                yield simulate_field(screen, plate, well, site)


def _random(screen: SimulatedScreen, stream: int, *place: int) -> np.random.Generator:
    """Return the generator of one stream at one place: independent of the order of simulation."""
    return np.random.default_rng(np.random.SeedSequence(screen.seed, spawn_key=(stream, *place)))


def _draw_defects(
    screen: SimulatedScreen, plate: int, well: int, site: int
) -> tuple[str, NDArray[np.float32]]:
    """Return the field's defect and the light of debris in counts, (3, height, width)."""
    rng = _random(screen, _DEFECT, plate, well, site)
    size = screen.field_size
    light = np.zeros((len(CHANNELS), size, size), np.float32)
    lot = rng.uniform()
    if lot < screen.defect_share:
        return ("noise" if lot < screen.defect_share / 2 else "defocus"), light
    if lot < 3 * screen.defect_share:
        y, x = rng.uniform(0.1 * size, 0.9 * size, 2)
        long, short = rng.uniform(3.0, 5.0), rng.uniform(1.5, 3.0)
        turn = rng.uniform(0.0, np.pi)
        dy, dx = np.arange(size)[:, None] - y, np.arange(size)[None, :] - x
        along = (dy * np.cos(turn) + dx * np.sin(turn)) / long
        across = (dx * np.cos(turn) - dy * np.sin(turn)) / short
        blob = np.exp(-0.5 * (along**2 + across**2))
        light += rng.uniform(8_000, 30_000, (len(CHANNELS), 1, 1)).astype(np.float32) * blob
    return "none", light


def _expose(
    light: NDArray[np.float32],
    screen: SimulatedScreen,
    plate: int,
    well_gain: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Return what the camera expects in counts: plate and well gain, shading, offset, saturation.

    The shading falls by 15 % from its centre to the middle of an edge.
    """
    rng = _random(screen, _PLATE, plate)
    gain = np.exp(rng.normal(0.0, 0.08, len(CHANNELS))) * well_gain
    offset = _OFFSET + rng.normal(0.0, 3.0, len(CHANNELS))
    center = rng.normal(0.5, 0.05, (len(CHANNELS), 2))
    axis = np.arange(screen.field_size) / screen.field_size
    expected = np.empty_like(light)
    for channel in range(len(CHANNELS)):
        y, x = center[channel]
        shading = 1.0 - 0.6 * ((axis[:, None] - y) ** 2 + (axis[None, :] - x) ** 2)
        expected[channel] = offset[channel] + gain[channel] * shading * light[channel]
    return np.minimum(expected, SATURATION)


def _read_out(expected: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.uint16]:
    """Add shot and read noise, digitise to 12 bits and shift left by 4."""
    noise = rng.standard_normal(expected.shape, dtype=np.float32)
    counts = np.rint(expected + noise * np.sqrt(0.2 * expected + 4.0))
    return np.asarray(np.clip(counts, 0, SATURATION).astype(np.uint16) << 4, np.uint16)
