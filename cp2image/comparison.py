"""Several systems and seeds: train, generate and evaluate each, one table. Above the steps."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import ValidationError

from cp2image.checkpoint import load_model
from cp2image.config import Config
from cp2image.config_errors import explain
from cp2image.dataset import open_dataset
from cp2image.errors import ConfigError
from cp2image.evaluation import evaluate
from cp2image.evaluation_sets import patches_of
from cp2image.figures.canvas import save
from cp2image.figures.patches import figure_rows
from cp2image.figures.words import format_number
from cp2image.generation import generate
from cp2image.storage import exists, join, read_bytes, write_bytes
from cp2image.tracking import record, tracking_uri
from cp2image.training import train

_SHOWN = 12


@dataclass(frozen=True)
class Metric:
    """One column of the table.

    Attributes
    ----------
    name
        Its heading.
    path
        Where a report has it.
    floor
        Where the report has what real cells reach against real cells, if it has.
    lower
        Whether less is better.
    """

    name: str
    path: tuple[str, ...]
    floor: tuple[str, ...] = ()
    lower: bool = False


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
    """
    settings = config.compare
    if not settings.systems:
        raise ConfigError(
            "compare.systems names no system; give at least one, as "
            "systems: {paper: {train: {preset: paper}}}"
        )
    runs = {
        (name, seed): derive(config, name, seed)
        for seed in settings.seeds
        for name in settings.systems
    }
    reports: dict[tuple[str, int], dict[str, Any]] = {}
    for number, ((name, seed), one) in enumerate(runs.items(), start=1):
        print(f"\ncompare [{number}/{len(runs)}] {name}, seed {seed}", flush=True)
        reports[name, seed] = _run(one, trains="checkpoints" not in settings.systems[name])
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
    given = "checkpoints" in config.compare.systems[system]
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


def _place(config: Config, system: str, seed: int) -> tuple[str, dict[str, Any], str]:
    """Return a run's folder, its sections of settings, and its checkpoint."""
    systems, out = config.compare.systems, config.compare.output
    own = dict(systems[system])
    other, given = own.pop("trained_as", system), own.pop("checkpoints", None)
    folder, trained = (join(out, str(name), f"seed-{seed}") for name in (system, other))
    fixed = sorted({"train", "split", "scaling"} & set(own))
    if given is not None:
        seeds = config.compare.seeds
        if not isinstance(given, list) or len(given) != len(seeds) or other != system or fixed:
            raise ConfigError(
                f"compare.systems.{system}: checkpoints names one folder, models:/… or runs:/… for "
                f"each of compare.seeds ({len(seeds)}), found {given!r}; train, split, scaling and "
                "trained_as do not go with it"
            )
        return folder, own, str(given[seeds.index(seed)])
    if other == system:
        return folder, own, join(trained, "checkpoint")
    if other not in systems or {"trained_as", "checkpoints"} & set(systems[other]):
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
    mark = sha256(config.evaluate.model_dump_json().encode()).hexdigest()[:16]
    done = join(config.evaluate.output, "_compared.json")
    if trains:
        print(train(config), flush=True)
    print(generate(config), flush=True)
    model = load_model(config.generate.checkpoint, store=tracking_uri(config))
    if not (exists(done) and json.loads(read_bytes(done)) == [mark, model.hash]):
        print(evaluate(config), flush=True)
        write_bytes(done, json.dumps([mark, model.hash]).encode())
    report: dict[str, Any] = json.loads(read_bytes(place))
    report["training"] = {"steps": model.card.steps, "preset": model.card.preset}
    report["training"] |= {k: model.card.notes.get(k) for k in ("seconds", "cells_seen")}
    return report


def _metrics(reports: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    """List what any of the reports has; systems that draw no nuclei have no features to compare."""
    reports = list(reports)
    yield Metric(
        "cells with a nucleus",
        ("protocol", "with_nucleus", "generated"),
        ("protocol", "with_nucleus", "real"),
    )
    for name in dict.fromkeys(name for report in reports for name in report["distances"]):
        place = ("distances", name)
        yield Metric(
            f"Fréchet, {name}", (*place, "frechet_half"), (*place, "floor_half"), lower=True
        )
        yield Metric(f"Fréchet, {name}, N → ∞", (*place, "limit"), lower=True)
        yield Metric(f"KID, {name}", (*place, "kernel"), (*place, "kernel_floor"), lower=True)
        for share in ("recall", "coverage", "precision"):
            yield Metric(f"{share}, {name}", (*place, share), (*place, f"{share}_floor"))
    for name, key in (("features with r > 0.5", "share_above_half"), ("mean r", "mean_r")):
        yield Metric(name, ("correlation", "model", key), ("correlation", "ceiling", key))
        if any("shuffle control" in report["correlation"] for report in reports):
            yield Metric(f"{name}, shuffled (control)", ("correlation", "shuffle control", key))
    if any("moa" in report for report in reports):
        yield Metric(
            "NSC",
            ("moa", "generated", "nsc", "accuracy"),
            ("moa", "real", "nsc", "accuracy"),
        )
        yield Metric(
            "NSCB",
            ("moa", "generated", "nscb", "accuracy"),
            ("moa", "real", "nscb", "accuracy"),
        )
    if any("copies" in report for report in reports):
        yield Metric("distance to training cells", ("copies", "generated_over_real"))


def _metric_name(heading: str) -> str:
    """Return a heading as MLflow takes it: letters, digits, spaces and ``_-.:/``."""
    return re.sub(r"[^\w .:/-]", "", heading.replace("N → ∞", "limit"))


def _value(report: Mapping[str, Any], path: tuple[str, ...]) -> float:
    node: Any = report
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return float("nan") if node is None or not path else float(node)


def tabulate(
    reports: Mapping[tuple[str, int], Mapping[str, Any]], systems: list[str]
) -> pd.DataFrame:
    """Put the numbers of all reports in one table.

    Parameters
    ----------
    reports
        (system, seed) → report.
    systems
        In the order wanted.

    Returns
    -------
    DataFrame
        One row per metric and system: ``mean`` and ``sd`` over ``seeds``, the ``floor`` (mean of
        what the reports give), ``excess`` over it (mean − floor), ``lower`` if less is better.
    """
    rows = []
    metrics = list(_metrics(reports.values()))
    for metric in metrics:
        for system in systems:
            own = [report for (name, _), report in reports.items() if name == system]
            values = np.array([_value(report, metric.path) for report in own])
            floor = float(np.mean([_value(report, metric.floor) for report in own]))
            mean = float(values.mean())
            sd = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
            excess = mean - floor
            rows.append((metric.name, system, mean, sd, len(values), floor, excess, metric.lower))
    columns = ["metric", "system", "mean", "sd", "seeds", "floor", "excess", "lower"]
    return pd.DataFrame(rows, columns=columns)


def to_markdown(table: pd.DataFrame, reports: Mapping[tuple[str, int], Mapping[str, Any]]) -> str:
    """Write the table with systems as columns, and its protocol below."""
    systems = list(dict.fromkeys(table["system"]))
    lines = [
        "| | " + " | ".join(systems) + " | real against real |",
        "| --- |" + " ---: |" * (len(systems) + 1),
    ]
    for metric, rows in table.groupby("metric", sort=False):
        found = rows.set_index("system")
        sign = "↓" if found["lower"].iloc[0] else "↑"
        cells = [_cell(found.loc[name, "mean"], found.loc[name, "sd"]) for name in systems]
        cells.append(_cell(found["floor"].mean()))
        lines.append(f"| {metric} {sign} | " + " | ".join(cells) + " |")
    sees = {name: r["protocol"]["system"]["sees"] for (name, _), r in reports.items()}
    lines.insert(2, "| sees | " + " | ".join(" and ".join(sees[n]) for n in systems) + " | |")
    protocol = next(iter(reports.values()))["protocol"]
    seeds = int(table["seeds"].min())
    spent = [
        f"{name}: {np.mean([r['training']['seconds'] for r in own]) / 60:.0f} minutes, "
        f"{np.mean([r['training']['cells_seen'] for r in own]):,.0f} cells seen in "
        f"{np.mean([r['training']['steps'] for r in own]):,.0f} steps"
        for name in systems
        for own in [[report for (system, _), report in reports.items() if system == name]]
    ]
    lines += [
        "",
        f"Mean ± standard deviation over {seeds} seeds; {protocol['cells']:,} cells of "
        f"{protocol['wells']} wells on {len(protocol['plates'])} plates, split "
        f"{protocol['split']!r}; {protocol['normalisation']}; Fréchet distances, precision, recall "
        "and coverage: half of the real cells against the cells drawn for the other half, floor: "
        "the two real halves; KID: all cells, floor: the two halves; N → ∞: all cells, a line over "
        "1/N followed to 0 (Chong and Forsyth 2020); r: measured on drawn against measured on real "
        "cells, beside it the real ones against the input table; control: drawn from the features "
        "of other cells.",
        *_plates(reports),
        *_other_cells(reports),
        f"Training: {'; '.join(spent)}.",
        "",
    ]
    return "\n".join(lines)


def _plates(reports: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[str]:
    """Say how far real plates are from each other, for scale."""
    report, lines = next(iter(reports.values())), []
    for name, found in report["distances"].items():
        if "plates" in found:
            plates = found["plates"]
            lines.append(
                f"Real plates apart, {name}: {plates['frechet']:.3g} (halves of one plate: "
                f"{plates['floor']:.3g}), n = {plates['n']:,}, {plates['pairs']} pairs."
            )
    return lines


def _other_cells(reports: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[str]:
    """Say which systems were scored on other cells: checkpoints bring their own splits."""
    cells: dict[tuple[Any, ...], list[str]] = {}
    for (name, seed), report in reports.items():
        protocol = report["protocol"]
        mark = (protocol["cells"], protocol["wells"], *protocol["plates"])
        cells.setdefault(mark, []).append(f"{name}, seed {seed}")
    if len(cells) == 1:
        return []
    shown = "; ".join(f"{mark[0]:,} cells: {', '.join(runs)}" for mark, runs in cells.items())
    return [f"**Not all were scored on the same cells**, so they do not compare: {shown}."]


def _cell(mean: float, sd: float = float("nan")) -> str:
    if np.isnan(mean):
        return "—"
    shown = format_number(mean)
    return shown if np.isnan(sd) else f"{shown} ± {format_number(float(f'{sd:.2g}'))}"


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
