"""Mechanisms of action from the profiles of wells, in several recipes. Step.

The check of the matching itself: on BBBC021's well means by CellProfiler the literature's accuracy
is known (Ljosa et al., J Biomol Screen 18, 2013: 0.83 with means, 0.94 with factor analysis).
"""

import gzip
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cp2image.columns import COMPOUND, MOA, PLATE, WELL, measurements, require_columns
from cp2image.config import Config
from cp2image.config_scoring import WellTable
from cp2image.data.scaling import is_control
from cp2image.errors import ConfigError, TableError
from cp2image.figures.canvas import save
from cp2image.figures.confusion import confusion_matrix
from cp2image.metrics.factors import Factors
from cp2image.metrics.moa import MoaMatch, match_moa, treatment_profiles
from cp2image.storage import join, read_bytes, write_bytes

_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Recipe:
    """How wells become profiles, and what comes of it.

    Attributes
    ----------
    text
        The recipe in words.
    nsc, nscb
        Matches among other compounds; and of other batches, too.
    """

    text: str
    nsc: MoaMatch
    nscb: MoaMatch


@dataclass(frozen=True)
class Mechanisms:
    """What `match_mechanisms` found; ``report.json`` holds the same.

    Attributes
    ----------
    uri
        Folder of the report, the confusion matrices and their pictures.
    wells, controls, features
        How many.
    recipes
        Name → recipe.
    """

    uri: str
    wells: int
    controls: int
    features: int
    recipes: Mapping[str, Recipe]

    def __str__(self) -> str:
        lines = [
            f"{self.uri}: {self.wells} wells ({self.controls} controls), {self.features} features"
        ]
        for name, found in self.recipes.items():
            pairs = (("NSC", found.nsc), ("NSCB", found.nscb))
            numbers = ", ".join(
                f"{label} {m.accuracy:.3f} ({round(m.accuracy * m.treatments)} of {m.treatments})"
                for label, m in pairs
                if m.treatments
            )
            lines.append(f"  {name}: {numbers} - {found.text}")
        return "\n".join(lines)


def match_mechanisms(config: Config) -> Mechanisms:
    """Match the treatments of a screen by the profiles of its wells.

    Raises
    ------
    ConfigError
        If ``mechanisms.profiles`` is not given.
    ColumnError, TableError
        If a table lacks a column, wells stand twice, or nothing can be joined.
    """
    settings = config.mechanisms
    if settings.profiles is None:
        raise ConfigError(
            "mechanisms.profiles is not set; give a CSV with a row per well, as "
            "profiles: {uri: wells.csv, columns: {Metadata_Plate: Plate, Metadata_Well: Well}}"
        )
    wells = read_wells(settings.profiles, settings.joined)
    names = [c.name for c in measurements(list(wells.columns)) if not c.is_position]
    values = wells[names].to_numpy(dtype=np.float64)
    control = is_control(wells, config.scaling.control)
    plates = wells[PLATE].astype(str).to_numpy()
    clip = config.scaling.clip
    recipes = {}
    scaled = {
        kind: _scale(values, plates, control, kind, clip) for kind in ("sd", "mad", "percentiles")
    }
    texts = {
        "sd": f"features minus the mean, over the sd, of the plate's controls, within ± {clip:g}",
        "mad": f"the same with median and 1.4826 MAD, within ± {clip:g}",
        "percentiles": "1st and 99th percentile of the plate's controls to 0 and 1",
        "factors": f"expected {settings.factors} factors, fitted on the controls, of 'sd'",
    }
    kept = scaled["sd"]
    with threadpool_limits(1, user_api="blas"):  # small decompositions: threads wait
        scaled["factors"] = Factors.fit(kept[control], settings.factors).expected(kept)
    for kind, vectors in scaled.items():
        known = treatment_profiles(vectors, wells, control)
        batches = [{batch_of(plate, settings.batch) for plate in own} for own in known.plates]
        recipes[kind] = Recipe(
            texts[kind],
            match_moa(known.profiles, known.compounds, known.moas),
            match_moa(known.profiles, known.compounds, known.moas, batches),
        )
    found = Mechanisms(settings.output, len(wells), int(control.sum()), len(names), recipes)
    _write(found, config)
    return found


def read_wells(profiles: WellTable, joined: list[WellTable]) -> pd.DataFrame:
    """Read the wells' profiles and join what else is known of them.

    Returns
    -------
    DataFrame
        One row per well: ``Metadata_*`` with plate, well, compound and mechanism, and features.

    Raises
    ------
    ColumnError, TableError
        If a column is missing, a well stands twice, or a table has nothing to join on.
    """
    wells = _read(profiles)
    require_columns(list(wells.columns), [PLATE, WELL], profiles.uri)
    if wells.duplicated([PLATE, WELL]).any():
        raise TableError(f"{profiles.uri}: a plate and well stand twice; expected a row per well")
    for more in joined:
        table = _read(more)
        table = table[list(more.columns)].drop_duplicates()
        shared = [str(name) for name in table if name in wells]
        if not shared:
            raise TableError(
                f"{more.uri}: shares none of {', '.join(more.columns)} with the tables before it; "
                "name a column that both have under 'columns'"
            )
        if table.duplicated(shared).any():
            raise TableError(
                f"{more.uri}: different rows have the same {', '.join(shared)}; name all columns "
                "that tell them apart"
            )
        wells = wells.merge(table, on=shared, how="left")
    require_columns(list(wells.columns), [COMPOUND, MOA], "the joined tables of wells")
    return wells


def _read(table: WellTable) -> pd.DataFrame:
    try:
        data = read_bytes(table.uri)
        found = pd.read_csv(io.BytesIO(gzip.decompress(data) if data[:2] == _GZIP else data))
    except (ValueError, gzip.BadGzipFile, EOFError) as error:
        raise TableError(f"{table.uri}: not a CSV that can be read ({error})") from error
    require_columns(list(found.columns), list(table.columns.values()), table.uri)
    frame: pd.DataFrame = found.rename(columns={own: name for name, own in table.columns.items()})
    return frame


def batch_of(plate: str, pattern: str) -> str:
    """Return a plate's batch: the first group of ``pattern`` in its name, else the plate.

    >>> batch_of("Week4_27481", "^(Week[0-9]+)")
    'Week4'
    """
    found = re.search(pattern, plate) if pattern else None
    return found.group(1) if found and found.groups() else plate


def _scale(
    values: NDArray[np.float64],
    plates: NDArray[Any],
    control: NDArray[np.bool_],
    kind: str,
    clip: float,
) -> NDArray[np.float64]:
    """Scale each plate by its own controls; features that some plate's controls all share go."""
    scaled = np.full_like(values, np.nan)
    for plate in np.unique(plates):
        own = plates == plate
        held = values[own & control]
        if len(held) < 2:
            raise TableError(
                f"plate {plate} has {len(held)} control wells; scaling.control has to match at "
                "least two on each plate"
            )
        if kind == "sd":
            start, span = held.mean(axis=0), held.std(axis=0, ddof=1)
        elif kind == "mad":
            start = np.median(held, axis=0)
            span = 1.4826 * np.median(np.abs(held - start), axis=0)
        else:
            start = np.percentile(held, 1, axis=0)
            span = np.percentile(held, 99, axis=0) - start
        scaled[own] = (values[own] - start) / np.where(span > 0, span, np.nan)
    kept = scaled[:, np.isfinite(scaled).all(axis=0)]
    return kept if kind == "percentiles" else np.clip(kept, -clip, clip)


def _write(found: Mechanisms, config: Config) -> None:
    content: dict[str, Any] = {
        "wells": found.wells,
        "controls": found.controls,
        "features": found.features,
        "recipes": {},
    }
    for name, recipe in found.recipes.items():
        entry: dict[str, Any] = {"recipe": recipe.text}
        for label in ("nsc", "nscb"):
            match: MoaMatch = getattr(recipe, label)
            if not match.treatments:
                continue
            entry[label] = {"accuracy": match.accuracy, "treatments": match.treatments}
            table = match.confusion()
            place = join(found.uri, f"confusion_{name}_{label}")
            write_bytes(f"{place}.csv", table.to_csv().encode())
            title = f"{label.upper()} {match.accuracy:.2f}, {match.treatments} treatments"
            save(confusion_matrix(table, title=title), f"{place}.png")
        content["recipes"][name] = entry
    write_bytes(join(found.uri, "report.json"), json.dumps(content, indent=1).encode())
    write_bytes(join(found.uri, "_config.yaml"), config.yaml().encode())
