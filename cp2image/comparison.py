"""Several systems and seeds: train, generate and evaluate each, one table. Above the steps."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import ValidationError

from cp2image.checkpoint import Model, load_model
from cp2image.comparison_table import tabulate, to_markdown
from cp2image.config import Config
from cp2image.config_errors import explain
from cp2image.dataset import open_dataset
from cp2image.errors import ConfigError
from cp2image.evaluation import evaluate, refuse_few
from cp2image.evaluation_distances import SPLITS
from cp2image.evaluation_sets import patches_of
from cp2image.evaluation_workers import check_weights
from cp2image.figures.canvas import save
from cp2image.figures.patches import figure_rows
from cp2image.generation import generate, require_features
from cp2image.profiles import split_cells
from cp2image.storage import exists, join, read_bytes, write_bytes
from cp2image.tracking import record, tracking_uri
from cp2image.training import train

_SHOWN = 12


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes
    ----------
    uri
        Folder of the table, the picture and the runs.
    table
        One row per system and metric: ``mean``, ``sd``, ``seeds``, ``floor``, ``excess``.
    text
        The same as Markdown.
    """

    uri: str
    table: pd.DataFrame
    text: str

    def __str__(self) -> str:
        return f"{self.uri}/table/comparison.md\n{self.text}"


def compare(config: Config) -> Comparison:
    """Train, generate and evaluate every system with every seed, then tabulate.

    What is finished is not done again, and an interrupted training goes on where it was: run the
    same command until it ends. A system with ``checkpoints`` is not trained.

    Raises
    ------
    ConfigError
        If no systems are named, or the settings of one are refused.
    CheckpointError
        If a given checkpoint cannot be loaded; nothing has been trained then.
    EvaluationError
        If Inception is asked for and its weights cannot be loaded; likewise.
    """
    settings = config.compare
    if not settings.systems:
        raise ConfigError(
            "compare.systems names no system; give at least one, as "
            "systems: {paper: {train: {preset: paper}}}"
        )
    runs = derive_all(config)
    for (name, _), one in runs.items():  # what would be refused hours later is refused now
        check_weights(one)
        if _given(settings.systems[name]) is None:
            _refuse_few_held_out(one)
        else:
            _refuse_foreign(one)
    reports: dict[tuple[str, int], dict[str, Any]] = {}
    for number, ((name, seed), one) in enumerate(runs.items(), start=1):
        print(f"\ncompare [{number}/{len(runs)}] {name}, seed {seed}", flush=True)
        reports[name, seed] = _run(one, trains=_given(settings.systems[name]) is None)
    table = tabulate(reports, list(settings.systems))
    text = to_markdown(table, reports)
    out = settings.output
    with record(config, "compare") as recorder:
        write_bytes(join(out, "table", "comparison.csv"), table.to_csv(index=False).encode())
        write_bytes(join(out, "table", "comparison.md"), text.encode())
        save(_picture(config, runs, reports), join(out, "table", "comparison.png"))
        recorder.folder(join(out, "table"), "comparison")
        names = table["system"] + "/" + table["metric"].map(_metric_name)
        recorder.metrics(dict(zip(names, table["mean"], strict=True)))
    return Comparison(out, table, text)


def derive_all(config: Config) -> dict[tuple[str, int], Config]:
    """Return the experiment of every (system, seed), see `derive`; nothing is read or written.

    Raises
    ------
    ConfigError
        If the settings of one are refused.
    """
    settings = config.compare
    return {
        (name, seed): derive(config, name, seed)
        for seed in settings.seeds
        for name in settings.systems
    }


def derive(config: Config, system: str, seed: int) -> Config:
    """Return the experiment of one system and seed, in a folder of its own.

    A system with ``trained_as: OTHER`` is the other one's checkpoint with what else it names, such
    as ``generate: {by: prior}``: it is not trained again. One with ``checkpoints``, a folder,
    ``models:/…`` or ``runs:/…`` for each of ``compare.seeds``, is not trained here at all.

    Raises
    ------
    ConfigError
        If the system's settings are refused.
    """
    data = config.model_dump()
    cells = data["train"]["input"]
    folder, changes, checkpoint = _place(config, system, seed)
    data["run"] |= {"folder": folder, "seed": seed, "name": f"{config.run.name}-{system}-{seed}"}
    data["tracking"]["uri"] = tracking_uri(config) if config.tracking.enabled else None
    given = _given(config.compare.systems[system]) is not None
    data["train"]["output"] = "" if given else checkpoint
    data["generate"] |= {"input": cells, "checkpoint": checkpoint, "output": ""}
    data["evaluate"] |= {"real": cells, "generated": "", "checkpoint": checkpoint, "output": ""}
    data["compare"]["systems"] = {}
    for section, values in changes.items():
        if not isinstance(values, dict):
            raise ConfigError(
                f"compare.systems.{system}: {section!r} holds a value; expected a section, as "
                "train: {preset: paper}"
            )
        data[section] = _merge(data.get(section, {}), values)
    try:
        return Config.model_validate(data).resolve().anchor()
    except ValidationError as error:
        raise ConfigError(f"compare.systems.{system}: {explain(error, Config)}") from error


def _given(system: Mapping[str, Any]) -> list[str] | None:
    """Return a system's own checkpoints; None for one that is trained here."""
    given: list[str] | None = system.get("checkpoints")
    return given


def _place(config: Config, system: str, seed: int) -> tuple[str, dict[str, Any], str]:
    """Return a run's folder, its sections of settings, and its checkpoint."""
    systems, out = config.compare.systems, config.compare.output
    own = dict(systems[system])
    other, given = own.pop("trained_as", system), _given(own)
    own.pop("checkpoints", None)
    folder, trained = (join(out, str(name), f"seed-{seed}") for name in (system, other))
    fixed = sorted({"train", "split", "scaling"} & set(own))
    if given is not None:
        seeds = config.compare.seeds
        if len(given) != len(seeds) or other != system or fixed:
            raise ConfigError(
                f"compare.systems.{system}: checkpoints names one folder, models:/… or runs:/… for "
                f"each of compare.seeds ({len(seeds)}), found {given!r}; train, split, scaling and "
                "trained_as do not go with it"
            )
        return folder, own, str(given[seeds.index(seed)])
    if other == system:
        return folder, own, join(trained, "checkpoint")
    if other not in systems or "trained_as" in systems[other] or _given(systems[other]):
        raise ConfigError(
            f"compare.systems.{system}: trained_as {other!r}; expected a system of the list that "
            "is trained itself"
        )
    if fixed:
        raise ConfigError(
            f"compare.systems.{system}: {', '.join(fixed)} belong to {other!r}, whose checkpoint "
            "this is; leave them out or drop trained_as"
        )
    return folder, _merge(dict(systems[other]), own), join(trained, "checkpoint")


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return ``values`` with ``changes``, level by level: what is not named stays."""
    merged = dict(values)
    for key, change in changes.items():
        known = merged.get(key)
        nested = isinstance(known, dict) and isinstance(change, dict)
        merged[key] = _merge(dict(known or {}), change) if nested else change
    return merged


def _run(config: Config, *, trains: bool = True) -> dict[str, Any]:
    """Do what is left of one run; return its report."""
    place = join(config.evaluate.output, "report.json")
    done = join(config.evaluate.output, "_compared.json")
    if trains:
        print(train(config), flush=True)
    print(generate(config), flush=True)
    model = load_model(config.generate.checkpoint, store=tracking_uri(config))
    mark = _mark(config, model)
    content = read_bytes(place) if exists(place) and exists(done) else b""
    if not content or json.loads(read_bytes(done)) != mark | {"report": _hash(content)}:
        print(evaluate(config), flush=True)
        content = read_bytes(place)
        write_bytes(done, json.dumps(mark | {"report": _hash(content)}).encode())
    report: dict[str, Any] = json.loads(content)
    report["training"] = {"steps": model.card.steps, "preset": model.card.preset}
    report["training"] |= {k: model.card.notes.get(k) for k in ("seconds", "cells_seen")}
    return report


def _mark(config: Config, model: Model) -> dict[str, str]:
    """Name all that a report rests on: settings, weights, the plates of both sets of cells."""
    settings, measure = config.evaluate, config.measure
    chosen = [
        settings.model_dump(mode="json"),
        {"families": measure.families, "compartments": measure.compartments},
        {"nucleus_channel": measure.nucleus_channel, "control": config.scaling.control},
        {"seed": config.run.seed, "splits": SPLITS},
    ]
    sets = {
        uri: {plate: one.identity for plate, one in sorted(open_dataset(uri).manifests.items())}
        for uri in (settings.real, settings.generated)
    }
    inception = "inception" in settings.embeddings and settings.inception_weights
    parts = {"settings": json.dumps(chosen).encode(), "cells": json.dumps(sets).encode()}
    parts |= {"inception": read_bytes(inception)} if inception else {}
    return {name: _hash(data) for name, data in parts.items()} | {"weights": model.hash}


def _hash(data: bytes) -> str:
    return sha256(data).hexdigest()[:16]


def _refuse_few_held_out(config: Config) -> None:
    """Refuse to train what cannot be scored: too few held-out cells for an embedding."""
    settings = config.evaluate
    if "inception" in settings.embeddings:
        _, _, keys = split_cells(open_dataset(settings.real), config)
        held = keys.values() if settings.split == "all" else [keys[settings.split]]
        refuse_few(min(settings.cells, sum(map(len, held))), settings)


def _refuse_foreign(config: Config) -> None:
    """Refuse a given checkpoint that cannot be loaded, or not draw the cells to compare with."""
    place = config.generate.checkpoint
    model = load_model(place, store=tracking_uri(config))
    cells = open_dataset(config.generate.input)
    require_features(cells.schema.names, model, config)
    if model.channels != cells.patch_format.channels:
        raise ConfigError(
            f"{place} draws {', '.join(model.channels)}; {cells.uri} has "
            f"{', '.join(cells.patch_format.channels)}: compare checkpoints of the same channels"
        )


def _metric_name(heading: str) -> str:
    """Return a heading as MLflow takes it: letters, digits, spaces and ``_-.:/``."""
    return re.sub(r"[^\w .:/-]", "", heading.replace("N → ∞", "limit"))


def _picture(
    config: Config, runs: Mapping[tuple[str, int], Config], reports: Mapping[Any, Any]
) -> Figure:
    """Show the same held-out cells as every system draws them with its first seed."""
    rows: dict[str, NDArray[np.uint8]] = {}
    seed = config.compare.seeds[0]
    first = next(iter(config.compare.systems))
    keys = np.array(reports[first, seed]["shown"][:_SHOWN], dtype=np.uint64)
    channels: tuple[str, ...] = ()
    for name in config.compare.systems:
        one = runs[name, seed]
        model = load_model(one.generate.checkpoint, store=tracking_uri(one))
        if not rows:
            channels = model.channels
            rows["real"] = patches_of(open_dataset(one.evaluate.real), model, keys)
        rows[name] = patches_of(open_dataset(one.generate.output), model, keys)
    return figure_rows(rows, channels)
