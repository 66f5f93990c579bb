"""What a feature looks like: manipulations, paths, typical cells, an atlas. Step.

Everything is drawn by one checkpoint from the features of ``explore.input``; a figure, its vectors
and its images lie side by side, the protocol with them, in a folder of each exploration.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cp2image.checkpoint import load_model
from cp2image.config import Config
from cp2image.exploration_album import Album, file_name
from cp2image.exploration_cells import ExploredCells, gather
from cp2image.exploration_groups import draw_atlas, groups_of, plates_of, represent
from cp2image.exploration_knobs import all_knobs, chosen_knobs, turn_all, turn_some
from cp2image.exploration_paths import doses_of, follow_doses, targets_of, travel
from cp2image.figures.words import course
from cp2image.storage import join
from cp2image.tracking import record, tracking_uri


@dataclass(frozen=True)
class Exploration:
    """What was found; ``exploration.json`` in the folder of each exploration holds its part.

    Attributes
    ----------
    uri
        The folder.
    protocol
        Everything that changes what is seen: checkpoint, cells, guard.
    found
        Exploration → its numbers.
    pictures
        Paths below ``uri``, without suffix.
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
                how = f"Spearman {found['spearman']:.2f}, {_course(found)}"
                if not np.isfinite(found["spearman"]):
                    how = "not measured: too few cells in which it is defined"
                lines.append(
                    f"  {name}, {mode}: {how}, "
                    f"{100 * found['outside']:.0f} % far out, "
                    f"{100 * found['contradictory']:.0f} % contradict their other features"
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


def _course(found: dict[str, Any]) -> str:
    return course(found["slope"], found["rises"], found["directed"], found["same_scale"])


def explore(config: Config) -> Exploration:
    """Draw what ``explore.which`` asks for and store it below ``explore.output``.

    Every name that is asked for is looked up before anything is drawn. Each exploration has a
    folder of its own with its own protocol, so one that is run again leaves the others as they are.

    Raises
    ------
    CheckpointError, DatasetError, TableError
        If an input is missing or damaged.
    ColumnError
        If the input lacks features of the model, or a feature or column asked for is not there.
    EvaluationError
        If no cell is left to look at, or a group asked for has none.
    """
    settings = config.explore
    model = load_model(settings.checkpoint, store=tracking_uri(config))
    explored = gather(config, model)
    wanted = list(dict.fromkeys(settings.which))
    for name in wanted:
        _EXPLORATIONS[name].check(config, explored)
    found: dict[str, Any] = {}
    albums: list[Album] = []
    with record(config, "explore") as recorder:
        for name in wanted:
            print(f"explore: {name}", flush=True)
            album = Album(join(settings.output, name), explored)
            found[name] = _EXPLORATIONS[name].draw(config, explored, album)
            protocol = _protocol(config, explored, [album])
            content = {"protocol": protocol, name: found[name], "pictures": album.names}
            album.close(_plain(content), config.yaml())
            recorder.metrics(dict(_flat({name: found[name]})))
            recorder.folder(album.uri, f"exploration/{name}")
            albums.append(album)
    pictures = [
        f"{n}/{picture}" for n, one in zip(wanted, albums, strict=True) for picture in one.names
    ]
    return Exploration(
        settings.output, _protocol(config, explored, albums), found, pictures, dict(_flat(found))
    )


def _protocol(config: Config, explored: ExploredCells, albums: list[Album]) -> dict[str, Any]:
    settings, artist = config.explore, explored.artist
    guard = artist.guard
    card = artist.model.card
    return {
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
            "of": f"training cells among those of {settings.input}",
            "shrinkage": guard.covariance.shrinkage,
        },
        "outside": {
            "distance": "Mahalanobis, shrunk covariance",
            "limit": guard.limit,
            "share": guard.share,
            "held_back_cells": guard.held_back,
        },
        "images": sum(album.images for album in albums),
        "images_outside": sum(album.outside for album in albums),
        "notes": [*explored.notes, *(note for album in albums for note in album.notes)],
    }


def _flat(found: dict[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {}
    for feature, modes in found.get("manipulate", {}).items():
        for mode, numbers in modes.items():
            for name in ("spearman", "slope", "outside", "contradictory", "rises"):
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


@dataclass(frozen=True)
class _Kind:
    """An exploration: its check refuses what the cells have not, before anything is drawn."""

    check: Callable[[Config, ExploredCells], object]
    draw: Callable[[Config, ExploredCells, Album], dict[str, Any]]


_EXPLORATIONS = {
    "manipulate": _Kind(chosen_knobs, turn_some),
    "responses": _Kind(all_knobs, turn_all),
    "trajectories": _Kind(targets_of, travel),
    "concentrations": _Kind(doses_of, follow_doses),
    "representatives": _Kind(groups_of, represent),
    "atlas": _Kind(plates_of, draw_atlas),
}
