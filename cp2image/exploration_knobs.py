"""Features turned like knobs: some with figures, all as a table. Floor: below the step."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.columns import unit_of
from cp2image.config import Config
from cp2image.exploration_album import Album, file_name, join_parts
from cp2image.exploration_cells import ExploredCells, match_features
from cp2image.exploration_responses import (
    Base,
    Knob,
    Measured,
    knob_table,
    manipulate,
    measure_drawn,
    observed_range,
    respond,
    response_rows,
)
from cp2image.figures.explorations import manipulation_figure
from cp2image.figures.sheets import FAR, ODD
from cp2image.figures.words import count
from cp2image.metrics.phenotypes.response import Response

_SOME, _ALL = "explore.manipulate", "explore.responses"


def chosen_knobs(config: Config, explored: ExploredCells) -> tuple[list[str], NDArray[np.int64]]:
    """Return the features to be set one by one and the rows of the cells they are set in.

    Raises
    ------
    ColumnError, EvaluationError
        If the checkpoint has no such feature, or there is no such cell.
    """
    settings = config.explore.manipulate
    known = explored.artist.model.features
    features = match_features(settings.features, known, f"{_SOME}.features")
    rows = explored.sample(settings.cells, settings.split, settings.treatments, _SOME)
    return features, rows


def all_knobs(config: Config, explored: ExploredCells) -> tuple[list[str], NDArray[np.int64]]:
    """Return the same for ``explore.responses``: of the features, those that can be measured.

    Raises
    ------
    ColumnError, EvaluationError
        If the checkpoint has no such feature, or there is no such cell.
    """
    settings, artist = config.explore.responses, explored.artist
    features = match_features(settings.features, artist.model.features, f"{_ALL}.features")
    rows = explored.sample(settings.cells, settings.split, settings.treatments, _ALL)
    return [feature for feature in features if artist.measurable(feature)], rows


def turn_some(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Set one feature after another over its range; draw, measure, tabulate; see `chosen_knobs`."""
    settings, artist = config.explore.manipulate, explored.artist
    features, rows = chosen_knobs(config, explored)
    base = Base.of(explored, rows)
    shown = min(settings.shown, len(rows))
    found: dict[str, Any] = {}
    tables = []
    for feature in features:
        requested = observed_range(
            explored, feature, settings.percentiles, settings.steps, base.plates
        )
        if not requested[0] < requested[-1]:
            album.notes.append(f"{feature} has no range to be set over on the cells' plates")
            continue
        images: dict[str, Any] = {}
        marks: dict[str, Any] = {}
        responses: dict[str, Response] = {}
        parts: list[tuple[Any, ...]] = []
        found[feature] = {}
        for mode in settings.modes:
            turned = manipulate(artist, base, feature, requested, mode)
            measured, first = measure_drawn(artist, base, feature, turned.scaled, settings.draws)
            far, odd = turned.relative, turned.contradicts
            one = Measured(Knob(feature, mode, requested), measured, far, odd)
            response, table = response_rows(artist, one)
            tables.append(table)
            images[mode] = first[:shown]
            marks[mode] = np.where(far > 1, FAR, np.where(odd > 1, ODD, 0))[:shown]
            responses[mode] = response
            about = pd.DataFrame(
                {
                    "Metadata_Feature": feature,
                    "Metadata_Mode": mode,
                    "Metadata_Step": np.tile(np.arange(len(requested)), len(rows)),
                    "Metadata_Requested": np.tile(requested, len(rows)),
                    "Metadata_Measured": measured.ravel(),
                    "Metadata_Contradiction": odd.ravel(),
                }
            )
            flat = turned.scaled.reshape(-1, turned.scaled.shape[-1])
            patches = first.reshape(-1, *first.shape[2:])
            parts.append((np.repeat(rows, len(requested)), about, flat, far.ravel(), patches))
            found[feature][mode] = {
                "spearman": response.spearman,
                "spearman_of_means": response.spearman_of_means,
                "slope": response.slope,
                "directed": response.directed,
                "same_scale": artist.same_scale(feature),
                "rises": response.rises,
                "outside": float((far > 1).mean()),
                "contradictory": float((odd > 1).mean()),
                "cells": len(rows),
                "draws": artist.draws(settings.draws),
            }
        draws = artist.draws(settings.draws)
        averaged = f", {draws} draws of each averaged" if draws > 1 else ""
        period = artist.space.period_of(feature)
        wraps = f"; ± {period / 2:g}° are the same" if period else ""
        figure = manipulation_figure(
            feature,
            images,
            marks,
            responses,
            explored.look,
            same_scale=artist.same_scale(feature),
            unit=unit_of(feature),
            note=f"mean and standard deviation over {count(len(rows), 'cell')}{averaged}{wraps}",
        )
        joined = [join_parts([part[i] for part in parts]) for i in range(5)]
        album.add(file_name(feature), figure, *joined)
    if tables:
        album.table("responses", pd.concat(tables, ignore_index=True))
    return found


def turn_all(config: Config, explored: ExploredCells, album: Album) -> dict[str, Any]:
    """Turn every knob of `all_knobs` and say which ones work."""
    steps = respond(config, explored, *all_knobs(config, explored))
    album.table("steps", steps)
    album.table("knobs", knob_table(steps))
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
