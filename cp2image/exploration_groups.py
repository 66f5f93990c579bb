"""Typical cells of wells, treatments, clusters; plates and maps of them. Floor: below the step."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import COMPOUND, METADATA, MOA, PLATE, WELL, listed, nearest
from cp2image.config import Config
from cp2image.errors import EvaluationError
from cp2image.exploration_album import Album, file_name, join_parts
from cp2image.exploration_cells import AXES, MOST, ExploredCells, group_names
from cp2image.figures.explorations import representatives_figure
from cp2image.figures.maps import treatment_map
from cp2image.figures.plates import plate_overview
from cp2image.figures.sheets import stain_legend
from cp2image.figures.words import count, shorten
from cp2image.metrics.phenotypes.paths import PrincipalAxes
from cp2image.metrics.phenotypes.representatives import cluster, prototypes

_PAGE = 12
"""Groups of a figure."""


def groups_of(config: Config, explored: ExploredCells) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each group whose typical cells are asked for; a compound is all its doses.

    Raises
    ------
    EvaluationError, ColumnError
        If there is no such group.
    """
    settings = config.explore.representatives
    if settings.by == "cluster":
        labels = cluster(_points(explored), settings.clusters, config.run.seed)
        names = np.array([f"cluster {label + 1}" for label in labels], dtype=object)
    else:
        names = group_names(explored, settings.by)
    groups = {str(name): np.flatnonzero(names == name) for name in sorted(set(names) - {""})}
    if not groups:
        raise EvaluationError(
            f"explore.representatives.by = {settings.by!r}: the cells have no such column, or it "
            "is empty; group them by well or cluster, or map the column"
        )
    wanted = []
    by_dose = settings.by == "treatment" and COMPOUND in explored.cells
    compounds = explored.names(COMPOUND) if by_dose else np.full(len(names), "", dtype=object)
    for name in settings.groups:
        own = [name] if name in groups else sorted(set(names[compounds == name]) - {""})
        if not own:
            known = sorted({*groups, *compounds} - {""})
            raise EvaluationError(
                f"explore.representatives.groups: no cell of {settings.by} {name!r}"
                f"{nearest(name, known)}; there are {len(groups)}: {listed(list(groups))}"
            )
        wanted += own
    return {name: groups[name] for name in dict.fromkeys(wanted or groups)}


def _points(explored: ExploredCells) -> NDArray[np.float64]:
    return PrincipalAxes.fit(explored.coordinates, AXES).project(explored.coordinates)


def represent(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Choose and draw the typical cells of each group of `groups_of`."""
    settings, artist = config.explore.representatives, explored.artist
    points, groups = _points(explored), groups_of(config, explored)
    chosen = {
        name: rows[prototypes(points[rows[:MOST]], settings.prototypes)]
        for name, rows in groups.items()
    }
    pages = [list(chosen)[i : i + _PAGE] for i in range(0, len(chosen), _PAGE)]
    tables = []
    for number, page in enumerate(pages, start=1):
        rows = join_parts([chosen[name] for name in page])
        scaled = explored.scaled[rows]
        relative = artist.guard.relative(explored.coordinates[rows])
        patches = artist.draw(scaled, explored.keys(rows))
        real = explored.real(rows)
        ends = np.cumsum([len(chosen[name]) for name in page])
        cut = [slice(end - len(chosen[n]), end) for n, end in zip(page, ends, strict=True)]
        label = [
            f"{shorten(explored.label(name), 26)}\n{count(len(groups[name]), 'cell')}"
            for name in page
        ]
        places = dict(zip(label, cut, strict=True))
        drawn = {name: patches[part] for name, part in places.items()}
        far = {name: relative[part] > 1 for name, part in places.items()}
        seen = None if real is None else {name: real[part] for name, part in places.items()}
        figure = representatives_figure(
            drawn,
            far,
            explored.look,
            real=seen,
            title=f"typical cells by {settings.by}: the medoid, then such as stand for the rest",
        )
        about = pd.DataFrame(
            {
                "Metadata_Group": np.repeat(page, [len(chosen[name]) for name in page]),
                "Metadata_Rank": join_parts([np.arange(len(chosen[name])) for name in page]),
            }
        )
        suffix = f"_{number}" if len(pages) > 1 else ""
        album.add(f"{settings.by}{suffix}", figure, rows, about, scaled, relative, patches)
        known = [name for name in map(str, explored.cells) if name.startswith(METADATA)]
        identity = explored.cells[known].iloc[rows].reset_index(drop=True)
        tables.append(pd.concat([about, identity], axis=1).assign(distance=relative))
    album.table("cells", pd.concat(tables, ignore_index=True))
    return {name: {"cells": len(groups[name])} for name in groups}


def plates_of(config: Config, explored: ExploredCells) -> list[str]:
    """Return the plates to be drawn well by well: none if nothing says what the wells are.

    Raises
    ------
    EvaluationError, ColumnError
        If there is no cell of a plate that is asked for, or no well.
    """
    wanted = config.explore.atlas.plates
    known = sorted(set(explored.names(PLATE)))
    for name in wanted:
        if name not in known:
            raise EvaluationError(
                f"explore.atlas.plates: no cell of plate {name!r}{nearest(name, known)}; there are "
                f"{len(known)}: {listed(known)}"
            )
    if wanted:
        explored.names(WELL)
    return wanted or (known if WELL in explored.cells else [])


def draw_atlas(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Draw `plates_of` well by well and the map of treatments, each with generated medoids."""
    settings = config.explore.atlas
    points, plates = _points(explored), explored.names(PLATE)
    moas = explored.names(MOA) if MOA in explored.cells else None
    treatments = explored.cells["treatment"].to_numpy(dtype=object)
    found: dict[str, Any] = {}
    for plate in plates_of(config, explored):
        wells = explored.names(WELL)
        own = np.flatnonzero(plates == plate)
        names = sorted(set(wells[own]) - {""})
        rows = np.array([_medoid(points, own[wells[own] == well]) for well in names])
        scaled, relative, patches = _draw_rows(explored, rows)
        marks = np.where(relative > 1, "▲ ", "")
        figure = plate_overview(
            names,
            explored.look.colour(patches),
            labels=[
                f"{m}{explored.label(t)}" for m, t in zip(marks, treatments[rows], strict=True)
            ],
            groups=None if moas is None else [m or "unknown" for m in moas[rows]],
            title=f"{plate}: generated medoid of each well; grey: no cell in the table"
            + ("; ▲: far from the training cells" if (relative > 1).any() else ""),
        )
        stain_legend(figure, explored.look, place="upper right")
        about = pd.DataFrame({"Metadata_Group": names})
        album.add(file_name(plate), figure, rows, about, scaled, relative, patches)
        found[plate] = {"wells": len(names), "outside": int((relative > 1).sum())}
    names = sorted(set(treatments) - {""})
    if settings.treatments and len(names) > 2:
        groups = [np.flatnonzero(treatments == name) for name in names]
        means = np.stack([explored.coordinates[rows].mean(axis=0) for rows in groups])
        axes = PrincipalAxes.fit(means, 2)
        rows = np.array([_medoid(points, rows) for rows in groups])
        scaled, relative, patches = _draw_rows(explored, rows)
        first, second = (
            f"PC{i + 1} of the mean profiles ({100 * s:.0f} % of the variance)"
            for i, s in enumerate(axes.explained)
        )
        figure = treatment_map(
            axes.project(means),
            patches,
            [explored.label(name) for name in names],
            explored.look,
            groups=None if moas is None else [m or "unknown" for m in moas[rows]],
            outside=relative > 1,
            axes_names=(first, second),
            title=f"{len(names)} treatments by their mean profiles (dots); cells are moved apart",
        )
        about = pd.DataFrame({"Metadata_Group": names})
        album.add("treatments", figure, rows, about, scaled, relative, patches)
        found["treatments"] = {"treatments": len(names), "outside": int((relative > 1).sum())}
    return found


def _medoid(points: NDArray[np.float64], rows: NDArray[np.int64]) -> int:
    return int(rows[prototypes(points[rows[:MOST]], 1)[0]])


def _draw_rows(
    explored: ExploredCells, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.uint8]]:
    scaled = explored.scaled[rows]
    relative = explored.artist.guard.relative(explored.coordinates[rows])
    return scaled, relative, explored.artist.draw(scaled, explored.keys(rows))
