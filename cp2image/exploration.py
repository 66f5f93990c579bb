"""What a feature looks like: manipulations, paths, typical cells, an atlas. Step.

Everything is drawn by one checkpoint from the features of ``explore.input``; a figure, its vectors
and its images lie side by side in ``explore.output``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.checkpoint import load_model
from cp2image.columns import COMPOUND, CONCENTRATION, MOA, PLATE, WELL, nearest
from cp2image.config import Config
from cp2image.errors import EvaluationError
from cp2image.exploration_album import Album, file_name
from cp2image.exploration_cells import ExploredCells, gather, group_names, match_features
from cp2image.exploration_responses import (
    Base,
    knob_table,
    manipulate,
    measure_drawn,
    observed_range,
    respond,
    response_rows,
)
from cp2image.figures.explorations import (
    concentration_figure,
    format_number,
    manipulation_figure,
    representatives_figure,
    trajectory_figure,
)
from cp2image.figures.maps import treatment_map
from cp2image.figures.plates import plate_overview
from cp2image.figures.sheets import stain_legend
from cp2image.metrics.phenotypes.paths import (
    PrincipalAxes,
    line,
    nearest_to_mean,
    position_on_line,
    swap_features,
)
from cp2image.metrics.phenotypes.representatives import cluster, prototypes
from cp2image.storage import join, write_bytes
from cp2image.tracking import record, tracking_uri

_AXES = 50
"""Principal axes in which cells are compared for being typical."""
_MOST = 2_000
"""Cells of one group among which the typical ones are looked for."""
_PAGE = 12
"""Groups of a figure of representatives."""


@dataclass(frozen=True)
class Exploration:
    """What an exploration found; ``exploration.json`` holds the same.

    Attributes
    ----------
    uri
        The folder.
    protocol
        Everything that changes what is seen: checkpoint, cells, guard.
    found
        Exploration → its numbers.
    pictures
        Names without suffix.
    metrics
        The same numbers, flat, for MLflow.
    """

    uri: str
    protocol: dict[str, Any]
    found: dict[str, Any]
    pictures: list[str]
    metrics: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        far = self.protocol["images_outside"]
        lines = [
            f"{self.uri}: {len(self.pictures)} figures with vectors and images; "
            f"{far:,} of {self.protocol['images']:,} generated images are far from the training "
            "cells and marked"
        ]
        for name, modes in self.found.get("manipulate", {}).items():
            for mode, found in modes.items():
                rises = "rises with every step" if found["rises"] else "does not rise at every step"
                lines.append(
                    f"  {name}, {mode}: Spearman {found['spearman']:.2f}, the mean {rises}, "
                    f"{100 * found['outside']:.0f} % far out"
                )
        if "responses" in self.found:
            for mode, found in self.found["responses"].items():
                lines.append(
                    f"  all knobs, {mode}: {found['rising']} of {found['features']} rise with "
                    f"every step, {found['above_0.9']} have Spearman ≥ 0.9, median "
                    f"{found['median_spearman']:.2f}"
                )
        for name, found in self.found.get("trajectories", {}).items():
            lines.append(
                f"  to {name}: cosine {found['after_five_steps']:.2f} after five steps, of "
                f"{found['steps']}"
            )
        lines += [f"  note: {note}" for note in self.protocol["notes"]]
        return "\n".join(lines)


def explore(config: Config) -> Exploration:
    """Draw what ``explore.which`` asks for and store it below ``explore.output``.

    Raises
    ------
    CheckpointError, DatasetError, TableError
        If an input is missing or damaged.
    ColumnError
        If the input lacks features of the model, or a feature or column asked for is not there.
    EvaluationError
        If no cell is left to look at.
    """
    settings = config.explore
    model = load_model(settings.checkpoint, store=tracking_uri(config))
    with record(config, "explore") as recorder:
        explored = gather(config, model)
        album = Album(settings.output, explored)
        found: dict[str, Any] = {}
        for name in dict.fromkeys(settings.which):
            print(f"explore: {name}", flush=True)
            found[name] = _EXPLORATIONS[name](config, explored, album)
        result = _finish(config, explored, album, found)
        recorder.metrics(result.metrics)
        recorder.folder(settings.output, "exploration")
    return result


def _finish(
    config: Config, explored: ExploredCells, album: Album, found: dict[str, Any]
) -> Exploration:
    settings, artist = config.explore, explored.artist
    guard = artist.guard
    card = artist.model.card
    protocol = {
        "checkpoint": {
            "uri": settings.checkpoint,
            "sha256": artist.model.hash,
            "preset": card.preset,
            "steps": card.steps,
        },
        "input": settings.input,
        "cells": len(explored.cells),
        "by_split": {str(k): int(v) for k, v in explored.cells["split"].value_counts().items()},
        "seed": config.run.seed,
        "normalisation": artist.model.intensity.kind,
        "space": f"{len(artist.model.features)} scaled features, angles as cosine and sine",
        "covariance": {
            "cells": guard.covariance.cells,
            "shrinkage": guard.covariance.shrinkage,
        },
        "outside": {
            "distance": "Mahalanobis, shrunk covariance of training cells",
            "limit": guard.limit,
            "share": guard.share,
            "held_back_cells": guard.held_back,
        },
        "images": album.images,
        "images_outside": album.outside,
        "notes": list(explored.notes),
    }
    metrics = dict(_flat(found))
    result = Exploration(album.uri, protocol, found, album.names, metrics)
    write_bytes(join(album.uri, "_config.yaml"), config.yaml().encode())
    content = {"protocol": protocol, **found, "pictures": album.names}
    text = json.dumps(_plain(content), indent=1, default=str, allow_nan=False)
    write_bytes(join(album.uri, "exploration.json"), text.encode())
    return result


def _manipulate(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Set one feature after another over its range; draw, measure, tabulate."""
    settings, artist = config.explore.manipulate, explored.artist
    key = "explore.manipulate.features"
    features = match_features(settings.features, artist.model.features, key)
    rows = explored.sample(settings.cells, settings.split, settings.treatments)
    base = Base.of(explored, rows)
    shown = min(settings.shown, len(rows))
    found: dict[str, Any] = {}
    tables = []
    for feature in features:
        requested = observed_range(explored, feature, settings.percentiles, settings.steps)
        images, far, responses = {}, {}, {}
        parts: list[tuple[Any, ...]] = []
        found[feature] = {}
        for mode in settings.modes:
            scaled, relative = manipulate(artist, base, feature, requested, mode)
            measured, first = measure_drawn(artist, base, feature, scaled, settings.draws)
            response, table = response_rows(artist, feature, mode, requested, measured, relative)
            tables.append(table)
            images[mode], far[mode] = first[:shown], relative[:shown] > 1
            responses[mode] = response
            about = pd.DataFrame(
                {
                    "Metadata_Feature": feature,
                    "Metadata_Mode": mode,
                    "Metadata_Step": np.tile(np.arange(len(requested)), len(rows)),
                    "Metadata_Requested": np.tile(requested, len(rows)),
                    "Metadata_Measured": measured.ravel(),
                }
            )
            flat = scaled.reshape(-1, scaled.shape[-1])
            patches = first.reshape(-1, *first.shape[2:])
            parts.append((np.repeat(rows, len(requested)), about, flat, relative.ravel(), patches))
            found[feature][mode] = {
                "spearman": response.spearman,
                "spearman_of_means": response.spearman_of_means,
                "slope": response.slope,
                "rises": response.rises,
                "outside": float((relative > 1).mean()),
                "cells": len(rows),
                "draws": artist.draws(settings.draws),
            }
        draws = artist.draws(settings.draws)
        averaged = f", {draws} draws of each averaged" if draws > 1 else ""
        figure = manipulation_figure(
            feature,
            images,
            far,
            responses,
            explored.look,
            same_scale=artist.same_scale(feature),
            note=f"mean and standard deviation over {len(rows)} cells{averaged}",
        )
        joined = [_join([part[i] for part in parts]) for i in range(5)]
        album.add(f"manipulate/{file_name(feature)}", figure, *joined)
    album.table("manipulate/responses", pd.concat(tables, ignore_index=True))
    return found


def _join(parts: list[Any]) -> Any:
    if isinstance(parts[0], pd.DataFrame):
        return pd.concat(parts, ignore_index=True)
    return np.concatenate(parts)


def _respond(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Turn every knob and say which ones work."""
    steps = respond(config, explored, config.explore.responses)
    album.table("responses/steps", steps)
    album.table("responses/knobs", knob_table(steps))
    found = {}
    for mode in config.explore.responses.modes if len(steps) else []:
        knobs = steps[steps["mode"] == mode].drop_duplicates("feature")
        found[str(mode)] = {
            "features": len(knobs),
            "rising": int(knobs["rises"].sum()),
            "above_0.9": int((knobs["spearman"] >= 0.9).sum()),
            "above_0.5": int((knobs["spearman"] >= 0.5).sum()),
            "median_spearman": float(knobs["spearman"].median()),
            "outside": float(steps.loc[steps["mode"] == mode, "outside"].mean()),
            "cells": config.explore.responses.cells,
        }
    return found


def _travel(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Walk from the typical control to the typical cell of each target."""
    settings, artist = config.explore.trajectories, explored.artist
    control = np.flatnonzero(explored.cells["control"].to_numpy())
    if not len(control):
        raise EvaluationError(
            "trajectories start at the negative controls, and no cell is one; set scaling.control, "
            "or leave trajectories out of explore.which"
        )
    start = int(control[nearest_to_mean(explored.coordinates[control])])
    found: dict[str, Any] = {}
    tables = []
    for name, rows in _targets(explored, settings.targets).items():
        end = int(rows[nearest_to_mean(explored.coordinates[rows])])
        way = swap_features(
            explored.scaled[start], explored.scaled[end], settings.features_per_step
        )
        steps = len(way.profiles)
        here = np.full(steps, start)
        scaled = way.profiles.astype(np.float32)
        relative = _relative(explored, scaled, here)
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
        figure = trajectory_figure(
            f"{_about(explored, start)} → {name}: {_about(explored, end)}",
            patches[shown],
            way.swapped[shown].tolist(),
            way.similarity[shown],
            relative[shown] > 1,
            explored.look,
            real=explored.real(np.array([start, end])),
            all_swapped=way.swapped,
            all_similarity=way.similarity,
        )
        album.add(
            f"trajectories/{file_name(name)}", figure, here, about, scaled, relative, patches
        )
        tables.append(about.assign(outside=relative > 1, distance=relative))
        found[name] = {
            "cells": len(rows),
            "steps": steps - 1,
            "after_five_steps": float(way.similarity[min(5, steps - 1)]),
            "at_the_start": float(way.similarity[0]),
            "outside": float((relative > 1).mean()),
        }
    album.table("trajectories/steps", pd.concat(tables, ignore_index=True))
    return found


def _targets(explored: ExploredCells, wanted: list[str]) -> dict[str, NDArray[np.int64]]:
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
                f"mechanisms: {', '.join(sorted(set(moas) - {''})) or 'none'}"
            )
        groups[name] = rows
    if not groups:
        raise EvaluationError(
            f"no mechanism of action to travel to: the cells have no {MOA}; name treatments in "
            "explore.trajectories.targets"
        )
    return {name: np.flatnonzero(rows) for name, rows in groups.items()}


def _follow_doses(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Draw each compound's line from the controls to its highest concentration."""
    settings, artist = config.explore.concentrations, explored.artist
    shares = np.linspace(0, 1, settings.points)
    found: dict[str, Any] = {}
    tables = []
    for compound, groups in _doses(explored, settings.compounds, settings.fewest).items():
        points = {name: explored.coordinates[rows] for name, rows in groups.items()}
        together = np.concatenate(list(points.values()))
        axes = PrincipalAxes.fit(together, 2)
        means = {name: x.mean(axis=0) for name, x in points.items()}
        start, end = means[next(iter(groups))], means[list(groups)[-1]]
        control = next(iter(groups.values()))
        typical = int(control[nearest_to_mean(explored.coordinates[control])])
        along = line(start, end, shares)
        ways = {"mean profile": along,
                "one control\ncell moved": explored.coordinates[typical] + along - start}  # fmt: skip
        here = np.full(len(shares), typical)
        scaled = {name: artist.scaled(x, explored.plates(here)) for name, x in ways.items()}
        relative = {name: _relative(explored, x, here) for name, x in scaled.items()}
        drawn = {name: artist.draw(x, explored.keys(here)) for name, x in scaled.items()}
        real = {}
        for name, rows in groups.items():
            near = prototypes(PrincipalAxes.fit(together, _AXES).project(points[name][:_MOST]),
                              settings.real) if settings.real else []  # fmt: skip
            patches = explored.real(rows[near]) if len(near) else None
            if patches is not None:
                real[name] = patches
        positions = {name: position_on_line(x, start, end) for name, x in points.items()}
        figure = concentration_figure(
            compound,
            {name: axes.project(x) for name, x in points.items()},
            axes.project(along),
            axes.explained.tolist(),
            drawn,
            shares.tolist(),
            {name: x > 1 for name, x in relative.items()},
            explored.look,
            real=real,
            positions={name: float(x.mean()) for name, x in positions.items()},
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
            f"concentrations/{file_name(compound)}",
            figure,
            np.tile(here, len(names)),
            about,
            _join([scaled[n] for n in names]),
            _join([relative[n] for n in names]),
            _join([drawn[n] for n in names]),
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
    album.table("concentrations/positions", pd.concat(tables, ignore_index=True))
    return found


def _doses(
    explored: ExploredCells, wanted: list[str], fewest: int
) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Return, per compound, the controls of its plates and its concentrations, rising."""
    cells, control = explored.cells, explored.cells["control"].to_numpy()
    compounds, plates = explored.names(COMPOUND), explored.names(PLATE)
    if CONCENTRATION not in cells:
        explored.names(CONCENTRATION)
    dose = pd.to_numeric(cells[CONCENTRATION], errors="coerce").to_numpy(dtype=np.float64)
    unknown = [name for name in wanted if not (compounds == name).any()]
    if unknown:
        raise EvaluationError(
            f"explore.concentrations.compounds: no cell of {unknown[0]!r}"
            f"{nearest(unknown[0], sorted(set(compounds)))}"
        )
    found: dict[str, dict[str, NDArray[np.int64]]] = {}
    for name in wanted or sorted(set(compounds[~control]) - {""}):
        own = (compounds == name) & ~control & np.isfinite(dose)
        groups = {}
        beside = np.flatnonzero(control & np.isin(plates, plates[own]))
        if len(beside) >= fewest:
            groups["control"] = beside[:_MOST]
        for value in np.unique(dose[own]):
            rows = np.flatnonzero(own & (dose == value))
            if len(rows) >= fewest:
                groups[f"{name} {format_number(float(value))}"] = rows
        if len(groups) >= (2 if name in wanted else 3):
            found[name] = groups
    if not found:
        raise EvaluationError(
            f"no compound has two concentrations of {fewest} cells or more, beside controls on its "
            "plates; name one in explore.concentrations.compounds, or lower "
            "explore.concentrations.fewest"
        )
    return found


def _represent(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Choose and draw the typical cells of each group."""
    settings, artist = config.explore.representatives, explored.artist
    axes = PrincipalAxes.fit(explored.coordinates, _AXES)
    points = axes.project(explored.coordinates)
    if settings.by == "cluster":
        labels = cluster(points, settings.clusters, config.run.seed)
        names = np.array([f"cluster {label + 1}" for label in labels], dtype=object)
    else:
        names = group_names(explored, settings.by)
    groups = {str(name): np.flatnonzero(names == name) for name in sorted(set(names) - {""})}
    missing = [name for name in settings.groups if name not in groups]
    if missing:
        raise EvaluationError(
            f"explore.representatives.groups: no cell of {settings.by} {missing[0]!r}"
            f"{nearest(missing[0], list(groups))}"
        )
    if settings.groups:
        groups = {name: groups[name] for name in settings.groups}
    chosen = {
        name: rows[prototypes(points[rows[:_MOST]], settings.prototypes)]
        for name, rows in groups.items()
    }
    pages = [list(chosen)[i : i + _PAGE] for i in range(0, len(chosen), _PAGE)]
    tables = []
    for number, page in enumerate(pages, start=1):
        rows = _join([chosen[name] for name in page])
        scaled = explored.scaled[rows]
        relative = artist.guard.relative(explored.coordinates[rows])
        patches = artist.draw(scaled, explored.keys(rows))
        real = explored.real(rows)
        ends = np.cumsum([len(chosen[name]) for name in page])
        cut = [slice(end - len(chosen[n]), end) for n, end in zip(page, ends, strict=True)]
        label = [f"{_short(name)}\n{len(groups[name]):,} cells" for name in page]
        drawn, far, seen = (
            {n: x[c] for n, c in zip(label, cut, strict=True)} if x is not None else None
            for x in (patches, relative > 1, real)
        )
        if drawn is None or far is None:
            continue
        figure = representatives_figure(
            drawn, far, explored.look, real=seen, title=f"typical cells by {settings.by}"
        )
        about = pd.DataFrame(
            {
                "Metadata_Group": np.repeat(page, [len(chosen[name]) for name in page]),
                "Metadata_Rank": _join([np.arange(len(chosen[name])) for name in page]),
            }
        )
        suffix = f"_{number}" if len(pages) > 1 else ""
        album.add(
            f"representatives/{settings.by}{suffix}", figure, rows, about, scaled, relative, patches
        )
        known = [name for name in explored.cells if str(name).startswith("Metadata_")]
        identity = explored.cells[known].iloc[rows].reset_index(drop=True)
        tables.append(pd.concat([about, identity], axis=1).assign(distance=relative))
    album.table("representatives/cells", pd.concat(tables, ignore_index=True))
    return {name: {"cells": len(groups[name])} for name in groups}


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"


def _draw_atlas(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Draw plates well by well and the map of treatments, each with generated medoids."""
    settings, artist = config.explore.atlas, explored.artist
    points = PrincipalAxes.fit(explored.coordinates, _AXES).project(explored.coordinates)
    plates = explored.names(PLATE)
    missing = [name for name in settings.plates if name not in plates]
    if missing:
        raise EvaluationError(
            f"explore.atlas.plates: no cell of plate {missing[0]!r}"
            f"{nearest(missing[0], sorted(set(plates)))}"
        )
    moas = explored.names(MOA) if MOA in explored.cells else None
    treatments = explored.cells["treatment"].to_numpy(dtype=object)
    found: dict[str, Any] = {}
    chosen_plates = settings.plates or (sorted(set(plates)) if WELL in explored.cells else [])
    for plate in chosen_plates:
        wells = explored.names(WELL)
        own = np.flatnonzero(plates == plate)
        names = sorted(set(wells[own]) - {""})
        rows = np.array([_medoid(points, own[wells[own] == well]) for well in names])
        scaled, relative, patches = _draw_rows(explored, rows)
        marks = np.where(relative > 1, "▲ ", "")
        figure = plate_overview(
            names,
            explored.look.colour(patches),
            labels=[f"{m}{t}" for m, t in zip(marks, treatments[rows], strict=True)],
            groups=None if moas is None else [m or "unknown" for m in moas[rows]],
            title=f"{plate}: generated medoid of each well"
            + (" (▲ far from the training cells)" if (relative > 1).any() else ""),
        )
        stain_legend(figure, explored.look, marked=False, place="upper right")
        about = pd.DataFrame({"Metadata_Group": names})
        album.add(f"atlas/{file_name(plate)}", figure, rows, about, scaled, relative, patches)
        found[plate] = {"wells": len(names), "outside": int((relative > 1).sum())}
    names = sorted(set(treatments) - {""})
    if settings.treatments and len(names) > 2:
        groups = [np.flatnonzero(treatments == name) for name in names]
        means = np.stack([explored.coordinates[rows].mean(axis=0) for rows in groups])
        axes = PrincipalAxes.fit(means, 2)
        rows = np.array([_medoid(points, rows) for rows in groups])
        scaled, relative, patches = _draw_rows(explored, rows)
        first, second = (f"PC{i + 1} ({100 * s:.0f} %)" for i, s in enumerate(axes.explained))
        figure = treatment_map(
            axes.project(means),
            patches,
            names,
            explored.look,
            groups=None if moas is None else [m or "unknown" for m in moas[rows]],
            outside=relative > 1,
            axes_names=(first, second),
            title=f"{len(names)} treatments by their mean profiles",
        )
        about = pd.DataFrame({"Metadata_Group": names})
        album.add("atlas/treatments", figure, rows, about, scaled, relative, patches)
        found["treatments"] = {"treatments": len(names), "outside": int((relative > 1).sum())}
    return found


def _medoid(points: NDArray[np.float64], rows: NDArray[np.int64]) -> int:
    return int(rows[prototypes(points[rows[:_MOST]], 1)[0]])


def _draw_rows(
    explored: ExploredCells, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.uint8]]:
    scaled = explored.scaled[rows]
    relative = explored.artist.guard.relative(explored.coordinates[rows])
    return scaled, relative, explored.artist.draw(scaled, explored.keys(rows))


def _relative(
    explored: ExploredCells, scaled: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the distance over the limit of vectors drawn in place of some rows."""
    artist = explored.artist
    center, scale = artist.model.scaling.center_and_scale(explored.plates(rows))
    return artist.guard.relative(artist.space.encode(scaled, center, scale))


def _about(explored: ExploredCells, row: int) -> str:
    cell = explored.cells.iloc[row]
    where = f"{cell[PLATE]} {cell[WELL]}" if WELL in explored.cells else str(cell[PLATE])
    return f"{cell['treatment']} ({where})"


def _flat(found: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for feature, modes in found.get("manipulate", {}).items():
        for mode, numbers in modes.items():
            for name in ("spearman", "slope", "outside", "rises"):
                values[f"manipulate/{mode}/{feature}/{name}"] = float(numbers[name])
    for mode, numbers in found.get("responses", {}).items():
        for name, value in numbers.items():
            values[f"responses/{mode}/{name}"] = float(value)
    for target, numbers in found.get("trajectories", {}).items():
        name = file_name(target)
        values[f"trajectories/{name}/after_five_steps"] = numbers["after_five_steps"]
    return values


def _plain(value: Any) -> Any:
    """Replace NaN by None: JSON has no such number."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


_EXPLORATIONS: dict[str, Callable[[Config, ExploredCells, Album], dict[str, Any]]] = {
    "manipulate": _manipulate,
    "responses": _respond,
    "trajectories": _travel,
    "concentrations": _follow_doses,
    "representatives": _represent,
    "atlas": _draw_atlas,
}
