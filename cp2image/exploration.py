"""What a feature looks like: manipulations, paths, typical cells, an atlas. Step.

Everything is drawn by one checkpoint from the features of ``explore.input``; a figure, its vectors
and its images lie side by side in ``explore.output``.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cp2image.checkpoint import load_model
from cp2image.config import Config
from cp2image.exploration_album import Album, file_name
from cp2image.exploration_cells import ExploredCells, gather
from cp2image.exploration_groups import draw_atlas, represent
from cp2image.exploration_knobs import turn_all, turn_some
from cp2image.exploration_paths import follow_doses, travel
from cp2image.storage import join, write_bytes
from cp2image.tracking import record, tracking_uri


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
        "notes": [*explored.notes, *album.notes],
    }
    metrics = dict(_flat(found))
    result = Exploration(album.uri, protocol, found, album.names, metrics)
    write_bytes(join(album.uri, "_config.yaml"), config.yaml().encode())
    content = {"protocol": protocol, **found, "pictures": album.names}
    text = json.dumps(_plain(content), indent=1, default=str, allow_nan=False)
    write_bytes(join(album.uri, "exploration.json"), text.encode())
    return result


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


_EXPLORATIONS: dict[str, Callable[[Config, ExploredCells, Album], dict[str, Any]]] = {
    "manipulate": turn_some,
    "responses": turn_all,
    "trajectories": travel,
    "concentrations": follow_doses,
    "representatives": represent,
    "atlas": draw_atlas,
}
