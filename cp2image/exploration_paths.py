"""Ways between phenotypes: to a mechanism, along a dose. Floor: below the step."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import COMPOUND, CONCENTRATION, MOA, PLATE, WELL, listed, nearest
from cp2image.config import Config
from cp2image.errors import EvaluationError
from cp2image.exploration_album import Album, file_name, join_parts
from cp2image.exploration_cells import AXES, MOST, ExploredCells
from cp2image.figures.explorations import concentration_figure, trajectory_figure
from cp2image.figures.words import count, format_number
from cp2image.metrics.phenotypes.paths import (
    PrincipalAxes,
    line,
    nearest_to_mean,
    position_on_line,
    swap_features,
)
from cp2image.metrics.phenotypes.representatives import prototypes


def travel(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Walk from the typical control to the typical cell of each target, see `targets_of`."""
    settings, artist = config.explore.trajectories, explored.artist
    control = np.flatnonzero(explored.cells["control"].to_numpy())
    targets = targets_of(config, explored)
    if not len(control) or not targets:
        what = "mechanism of action to go to" if len(control) else "negative control to start from"
        album.notes.append(f"no trajectory was drawn: the cells have no {what}")
        return {}
    start = int(control[nearest_to_mean(explored.coordinates[control])])
    found: dict[str, Any] = {}
    tables = []
    for name, rows in targets.items():
        end = int(rows[nearest_to_mean(explored.coordinates[rows])])
        way = swap_features(
            explored.scaled[start], explored.scaled[end], settings.features_per_step
        )
        steps = len(way.profiles)
        here = np.full(steps, start)
        scaled = way.profiles.astype(np.float32)
        relative = explored.relative(scaled, here)
        patches = artist.draw(scaled, explored.keys(here))
        about = pd.DataFrame(
            {
                "Metadata_Target": name,
                "Metadata_Step": np.arange(steps),
                "Metadata_Swapped": way.swapped,
                "Metadata_Cosine": way.similarity,
            }
        )
        shown = np.unique(np.linspace(0, steps - 1, min(settings.shown, steps)).round().astype(int))
        ends = explored.real(np.array([start, end]))
        figure = trajectory_figure(
            f"{_about(explored, start)} → {name}: {_about(explored, end)}",
            patches[shown],
            way.swapped[shown],
            way.similarity[shown],
            relative[shown] > 1,
            explored.look,
            real=None if ends is None else {"start": ends[:1], "target": ends[1:]},
        )
        album.add(file_name(name), figure, here, about, scaled, relative, patches)
        tables.append(about.assign(outside=relative > 1, distance=relative))
        found[name] = {
            "cells": len(rows),
            "steps": steps - 1,
            "after_five_steps": float(way.similarity[min(5, steps - 1)]),
            "at_the_start": float(way.similarity[0]),
            "outside": float((relative > 1).mean()),
        }
    album.table("steps", pd.concat(tables, ignore_index=True))
    return found


def targets_of(config: Config, explored: ExploredCells) -> dict[str, NDArray[np.int64]]:
    """Return the rows of each target of ``explore.trajectories``: none named: all mechanisms.

    Raises
    ------
    EvaluationError
        If no cell is of a target, or only controls are, which are where the ways begin.
    """
    wanted = config.explore.trajectories.targets
    control = explored.cells["control"].to_numpy()
    groups: dict[str, NDArray[np.bool_]] = {}
    moas = explored.names(MOA) if MOA in explored.cells else np.full(len(control), "", object)
    treatments = explored.cells["treatment"].to_numpy(dtype=object)
    for name in wanted or sorted(set(moas[~control]) - {""}):
        rows = (moas == name) | (treatments == name)
        if not rows.any():
            known = sorted({*moas, *treatments} - {""})
            raise EvaluationError(
                f"explore.trajectories.targets: no cell of {name!r}{nearest(name, known)}; known "
                f"mechanisms: {listed(sorted(set(moas[~control]) - {''}))}"
            )
        if not (rows & ~control).any():
            raise EvaluationError(
                f"explore.trajectories.targets: {name!r} are the negative controls, where every "
                f"way begins; known mechanisms: {listed(sorted(set(moas[~control]) - {''}))}"
            )
        groups[name] = rows
    return {name: np.flatnonzero(rows) for name, rows in groups.items()}


def _about(explored: ExploredCells, row: int) -> str:
    cell = explored.cells.iloc[row]
    where = f"{cell[PLATE]} {cell[WELL]}" if WELL in explored.cells else str(cell[PLATE])
    return f"{explored.label(str(cell['treatment']))} ({where})"


def follow_doses(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Draw each compound's line from the controls to its highest dose of `doses_of`."""
    settings, artist = config.explore.concentrations, explored.artist
    shares = np.linspace(0, 1, settings.points)
    found: dict[str, Any] = {}
    tables = []
    lines = doses_of(config, explored)
    if not lines:
        album.notes.append(
            f"no line of concentrations was drawn: no compound has two concentrations of "
            f"{settings.fewest} cells or more and controls on its plates; see "
            "explore.concentrations.fewest, or name compounds"
        )
        return {}
    for compound, groups in lines.items():
        points = {name: explored.coordinates[rows] for name, rows in groups.items()}
        together = np.concatenate(list(points.values()))
        axes, wide = (PrincipalAxes.fit(together, count) for count in (2, AXES))
        means = {name: x.mean(axis=0) for name, x in points.items()}
        start, end = means[next(iter(groups))], means[list(groups)[-1]]
        control = next(iter(groups.values()))
        typical = int(control[nearest_to_mean(explored.coordinates[control])])
        along = line(start, end, shares)
        moved = explored.coordinates[typical] + along - start
        ways = {"one control\ncell moved": moved, "mean profile": along}
        here = np.full(len(shares), typical)
        scaled = {name: artist.scaled(x, explored.plates(here)) for name, x in ways.items()}
        relative = {name: explored.relative(x, here) for name, x in scaled.items()}
        drawn = {name: artist.draw(x, explored.keys(here)) for name, x in scaled.items()}
        real = {}
        for name, rows in groups.items():
            near = prototypes(wide.project(points[name][:MOST]), max(settings.real, 1))
            patches = explored.real(rows[near[: settings.real]])
            if patches is not None:
                real[name] = patches
        positions = {name: position_on_line(x, start, end) for name, x in points.items()}
        between = _between(explored, groups, positions, shares)
        if not between and len(groups) > 2:
            album.notes.append(
                f"{compound}: its doses do not lie in order along the line, so no concentrations "
                "are given between them"
            )
        left = _left_out(explored, compound, groups)
        if left:
            album.notes.append(f"{compound}: {left}; see explore.concentrations.fewest")
        figure = concentration_figure(
            f"{compound} ({left})" if left else compound,
            {name: axes.project(x) for name, x in points.items()},
            axes.project(along),
            axes.explained.tolist(),
            drawn,
            shares.tolist(),
            {name: x > 1 for name, x in relative.items()},
            explored.look,
            real=real,
            positions={name: float(x.mean()) for name, x in positions.items()},
            between=between,
        )
        names = list(ways)
        about = pd.DataFrame(
            {
                "Metadata_Line": compound,
                "Metadata_Start": np.repeat([n.replace("\n", " ") for n in names], len(shares)),
                "Metadata_Share": np.tile(shares, len(names)),
            }
        )
        album.add(
            file_name(compound),
            figure,
            np.tile(here, len(names)),
            about,
            join_parts([scaled[n] for n in names]),
            join_parts([relative[n] for n in names]),
            join_parts([drawn[n] for n in names]),
        )
        table = pd.DataFrame(
            {
                "compound": compound,
                "group": list(groups),
                "cells": [len(rows) for rows in groups.values()],
                "position": [positions[name].mean() for name in groups],
                "deviation": [positions[name].std() for name in groups],
            }
        )
        tables.append(table)
        found[compound] = {
            name: {"cells": len(groups[name]), "position": float(positions[name].mean())}
            for name in groups
        }
    album.table("positions", pd.concat(tables, ignore_index=True))
    return found


def doses_of(config: Config, explored: ExploredCells) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Return, per compound, the controls of its plates and its concentrations, rising.

    Raises
    ------
    EvaluationError, ColumnError
        If a compound that is asked for has too few cells, or the cells have no concentrations.
    """
    settings = config.explore.concentrations
    wanted, fewest = settings.compounds, settings.fewest
    cells, control = explored.cells, explored.cells["control"].to_numpy()
    if not wanted and not {COMPOUND, CONCENTRATION} <= set(cells):
        return {}
    compounds, plates = explored.names(COMPOUND), explored.names(PLATE)
    explored.names(CONCENTRATION)
    dose = pd.to_numeric(cells[CONCENTRATION], errors="coerce").to_numpy(dtype=np.float64)
    unknown = [name for name in wanted if not (compounds == name).any()]
    if unknown:
        raise EvaluationError(
            f"explore.concentrations.compounds: no cell of {unknown[0]!r}"
            f"{nearest(unknown[0], sorted(set(compounds)))}; there are: "
            f"{listed(sorted(set(compounds[~control]) - {''}))}"
        )
    found: dict[str, dict[str, NDArray[np.int64]]] = {}
    for name in wanted or sorted(set(compounds[~control]) - {""}):
        own = (compounds == name) & ~control & np.isfinite(dose)
        groups = {}
        beside = np.flatnonzero(control & np.isin(plates, plates[own]))
        if len(beside) >= fewest:
            groups["control"] = beside
        for value in np.unique(dose[own]):
            rows = np.flatnonzero(own & (dose == value))
            if len(rows) >= fewest:
                groups[explored.label(f"{name} {format_number(float(value))}")] = rows
        if len(groups) >= (2 if name in wanted else 3):
            found[name] = groups
        elif name in wanted:
            what = f"{name!r} are the negative controls, where every line begins"
            if not (control & (compounds == name)).any():
                what = (
                    f"{name!r} has {count(len(groups), 'group')} of {fewest} cells or more (its "
                    "concentrations, the controls of its plates); a line needs two, see "
                    "explore.concentrations.fewest"
                )
            raise EvaluationError(f"explore.concentrations.compounds: {what}")
    return found


def _between(
    explored: ExploredCells,
    groups: dict[str, NDArray[np.int64]],
    positions: dict[str, NDArray[np.float64]],
    shares: NDArray[np.float64],
) -> list[str]:
    """Return the concentration that each place of a line stands for, by where the doses' means lie.

    Between two of them it rises evenly in the logarithm, and is told to one digit, as cells of one
    dose lie far apart; below the lowest nothing is known of it. Empty where the doses do not lie in
    their order.
    """
    names = [name for name in groups if name != "control"]
    dose = [float(explored.cells[CONCENTRATION].iloc[groups[name][0]]) for name in names]
    at = np.array([positions[name].mean() for name in names])
    if len(at) < 2 or (np.diff(at) <= 0).any() or dose[0] <= 0:
        return []
    found = np.exp(np.interp(shares, at, np.log(dose)))
    texts = []
    for share, value in zip(shares, found, strict=True):
        text = f"≈ {format_number(float(f'{value:.0e}'))}"
        text = f"< {format_number(dose[0])}" if share < at[0] else text
        texts.append("control" if share == 0 else f"{text} {explored.unit}".rstrip())
    return texts


def _left_out(explored: ExploredCells, compound: str, groups: dict[str, NDArray[np.int64]]) -> str:
    """Say which concentrations of a compound have too few cells for its line."""
    own = explored.cells[
        (explored.names(COMPOUND) == compound) & ~explored.cells["control"].to_numpy()
    ]
    doses = pd.to_numeric(own[CONCENTRATION], errors="coerce").dropna().value_counts().sort_index()
    parts = [
        f"{format_number(float(dose))} {explored.unit}".rstrip() + f": {count(int(cells), 'cell')}"
        for dose, cells in doses.items()
        if explored.label(f"{compound} {format_number(float(dose))}") not in groups
    ]
    return f"left out: {', '.join(parts)}" if parts else ""
