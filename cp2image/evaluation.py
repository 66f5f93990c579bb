"""Real against generated cells: correlations, distances, control, pictures. Step.

Both sets are brought to the model's normalisation and to 8 bits, then measured by the same code.
The real cells are those the generated ones were drawn for, so plates, wells and treatments match.
"""

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.checkpoint import Model, load_model
from cp2image.cluster import join_cluster
from cp2image.columns import COMPOUND, CONCENTRATION, PLATE, WELL
from cp2image.config import Config
from cp2image.config_evaluate import Evaluate
from cp2image.data.identity import cell_keys
from cp2image.data.schema import decode_metadata
from cp2image.data.splits import TRAIN
from cp2image.dataset import CellDataset, open_dataset
from cp2image.errors import EvaluationError
from cp2image.evaluation_distances import describe_beside
from cp2image.evaluation_scores import Copies, score_sets
from cp2image.evaluation_sets import EvaluationSet, gather_cells, patches_of
from cp2image.evaluation_workers import check_weights
from cp2image.figures.canvas import save
from cp2image.figures.confusion import confusion_matrix
from cp2image.figures.curves import best_features, correlation_boxes, correlation_curve
from cp2image.figures.patches import figure_pairs, figure_rows
from cp2image.metrics.correlation import (
    bootstrap_correlation,
    compared_features,
    feature_correlation,
    group_moments,
    summarise_correlation,
)
from cp2image.metrics.inception import DIMENSION
from cp2image.models.presets import sees
from cp2image.stopwatch import Stopwatch
from cp2image.storage import exists, join, read_bytes, write_bytes
from cp2image.tracking import record, tracking_uri
from cp2image.yaml_dialect import load_yaml

_SHOWN = 24
_SHOWN_DRAWS = 12


@dataclass(frozen=True)
class Report:
    """What an evaluation found; ``report.json`` holds the same.

    Attributes
    ----------
    uri
        The report's folder.
    protocol
        Everything that changes the numbers: sets, sizes, normalisation, embeddings.
    correlation
        Share of features with r > 0.5, mean r and so on, for the model, the ceiling (real patches
        against the input table) and the shuffle control.
    distances
        Embedding → Fréchet and kernel distances, with the real-against-real floor; precision,
        recall, density and coverage.
    beside
        ``moa``, ``consistency``, ``copies``: see `cp2image.evaluation_scores`; what could not be
        found out is not there.
    """

    uri: str
    protocol: dict[str, Any]
    correlation: dict[str, Any]
    distances: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        n = self.protocol["cells"]
        lines = [f"{self.uri}: {n:,} generated cells against the {n:,} real ones"]
        for name, found in self.correlation.items():
            lines.append(
                f"  feature correlation, {name}: {100 * found['share_above_half']:.0f} % of "
                f"{found['features']} features with r > 0.5, mean r {found['mean_r']:.2f}"
            )
        for name, found in self.distances.items():
            lines.append(
                f"  Fréchet distance, {name} ({found['dimension']} dimensions): "
                f"{found['frechet']:.3g} at n = {n:,}; at n = {found['half_n']:,}: "
                f"{found['frechet_half']:.3g} against a real-real floor of "
                f"{found['floor_half']:.3g}; recall {found['recall']:.2f}, coverage "
                f"{found['coverage']:.2f} (real cells: {found['recall_floor']:.2f}, "
                f"{found['coverage_floor']:.2f}){describe_beside(found)}"
            )
        if "moa" in self.beside:
            real, drawn = (self.beside["moa"][name]["nsc"] for name in ("real", "generated"))
            lines.append(
                f"  mechanism of action, NSC over {drawn['treatments']} treatments: "
                f"{100 * drawn['accuracy']:.0f} % generated, {100 * real['accuracy']:.0f} % real"
            )
        if "consistency" in self.beside:
            found = self.beside["consistency"]
            lines.append(
                f"  spread over {found['draws']} draws: {100 * found['median_spread']:.0f} % of "
                f"the spread over cells in the median feature"
            )
        if "copies" in self.beside:
            found = self.beside["copies"]
            lines.append(
                f"  nearest training cell: {found['generated_over_real']:.2f} × as far from "
                "generated cells as from real ones of the same wells (copies: far below 1)"
            )
        return "\n".join(lines)


def evaluate(config: Config, watch: Stopwatch | None = None) -> Report:
    """Compare ``evaluate.generated`` with the real cells it was drawn for; publish a report.

    Parameters
    ----------
    config
        The experiment.
    watch
        Is told how long each part takes, as ``seconds`` of ``report.json`` is.

    Raises
    ------
    DatasetError, CheckpointError
        If an input is missing.
    EvaluationError
        If the sets share no cells, are too small for an embedding, or its weights are not there
        or another network's. Nothing has been started then.
    """
    settings = config.evaluate
    watch = watch or Stopwatch()
    with watch.part("loading the model"):
        real, generated = open_dataset(settings.real), open_dataset(settings.generated)
        model = load_model(settings.checkpoint, store=tracking_uri(config))
        check_weights(config)
    if generated.patch_format.channels != real.patch_format.channels:
        raise EvaluationError(
            f"{settings.generated} has channels {generated.patch_format.channels}, "
            f"{settings.real} has {real.patch_format.channels}; compare like with like"
        )
    with watch.part("pairing"):
        pairs = _pair(real, generated, model, settings)
    refuse_few(len(pairs), settings)
    print(f"evaluate: {len(pairs):,} cells in both sets", flush=True)
    with watch.part("joining Ray"):
        join_cluster(config.cluster)
    with watch.part("recording in MLflow"), record(config, "evaluate") as recorder:
        with watch.part("moving"):
            looks = any(name != "cp" for name in settings.embeddings)
            limit = settings.training_cells if looks else 0
            training = _training_keys(real, model, pairs, limit)
            shown = _spread(pairs, _SHOWN)
            image = _is_shown(settings.generated, model)
            sets = gather_cells(
                config, model, real, generated, pairs, shown, training, watch, shown_images=image
            )
        with watch.part("writing"):
            seen = sees(model.card.preset, image=image)
            report = _report(config, model, (real, generated), sets, watch, seen)
        recorder.metrics(_flat(report))
        recorder.folder(settings.output, "report")
    return report


def _is_shown(generated: str, model: Model) -> bool:
    """Tell from the config beside a screen whether the model was shown the cells it drew."""
    place = join(generated, "_config.yaml")
    by = None
    if model.reconstructs and exists(place):
        by = (load_yaml(read_bytes(place).decode()) or {}).get("generate", {}).get("by")
    return model.reconstructs and by != "prior"


def _pair(
    real: CellDataset, generated: CellDataset, model: Model, settings: Evaluate
) -> pd.DataFrame:
    """Return the metadata of the cells to compare: in both sets, of the split, even over wells."""
    plates = sorted(set(generated.manifests) & set(real.manifests))
    drawn, known = _keyed(generated, plates), _keyed(real, plates)
    both = drawn[drawn["key"].isin(known["key"])]
    if both.empty:
        raise EvaluationError(
            f"{settings.generated} and {settings.real} share no cell (same plate, well, site, "
            "image and object number); evaluate a screen against the cells it was generated from"
        )
    if settings.split != "all":
        both = both[model.splits.of(both) == settings.split]
        if both.empty:
            raise EvaluationError(
                f"none of the cells in both sets is in the {settings.split} split of "
                f"{settings.checkpoint}; set evaluate.split, or generate those cells"
            )
    both = both.sort_values("key")
    turn = both.groupby([PLATE, WELL]).cumcount()
    chosen = both.assign(turn=turn).sort_values(["turn", "key"]).head(settings.cells)
    return chosen.drop(columns="turn").sort_values("key", ignore_index=True)


def refuse_few(cells: int, settings: Evaluate) -> None:
    """Refuse Inception's 2,048 dimensions where a half of the cells has no full covariance.

    The floor, real against real, is taken on halves.
    """
    fewest = 2 * (DIMENSION + 1)
    if "inception" in settings.embeddings and cells < fewest and not settings.allow_singular:
        raise EvaluationError(
            f"{cells:,} cells for the {DIMENSION:,} dimensions of Inception: the covariance of "
            "their halves, which the real-against-real floor compares, is singular and FID mostly "
            f"tells the sample size; score {fewest:,} or more (evaluate.cells, evaluate.split), "
            "leave 'inception' out of evaluate.embeddings, or ask for it all the same "
            "(evaluate.allow_singular=true)"
        )


def _keyed(dataset: CellDataset, plates: list[str]) -> pd.DataFrame:
    """Return the metadata of some plates' cells with their keys, no rows if there are none."""
    tables = dataset.read(dataset.metadata, plates) if plates else iter(())
    frames = [decode_metadata(table) for table in tables]
    if not frames:
        return pd.DataFrame({"key": np.empty(0, np.uint64)})
    frame = pd.concat(frames, ignore_index=True)
    return frame.assign(key=cell_keys(frame))


def _training_keys(
    real: CellDataset, model: Model, pairs: pd.DataFrame, limit: int
) -> NDArray[np.uint64]:
    """Return the smallest keys of the training split; none if the compared cells are of it."""
    none = np.empty(0, dtype=np.uint64)
    if not limit or (model.splits.of(pairs) == TRAIN).any():
        return none
    known = _keyed(real, sorted(real.manifests))
    keys = known.loc[model.splits.of(known) == TRAIN, "key"].to_numpy(dtype=np.uint64)
    return np.sort(keys)[:limit]


def _report(
    config: Config,
    model: Model,
    datasets: tuple[CellDataset, CellDataset],
    sets: EvaluationSet,
    watch: Stopwatch,
    seen: tuple[str, ...],
) -> Report:
    settings = config.evaluate
    out = settings.output
    names = list(compared_features(sets.real.measured))
    real, drawn, table = sets.real.measured, sets.generated.measured, sets.real.table
    with watch.part("correlation"):
        tables = {"model": feature_correlation(real, drawn, names)}
        shared = [name for name in names if name in table]
        if shared:
            tables["ceiling"] = feature_correlation(table[shared], real[shared], shared)
        if sets.shuffled is not None:
            held = real.iloc[sets.shuffled_rows].reset_index(drop=True)
            tables["shuffle control"] = feature_correlation(held, sets.shuffled, names)
        summary = {name: summarise_correlation(found) for name, found in tables.items()}
    groups = (sets.cells[PLATE].astype(str) + "/" + sets.cells[WELL].astype(str)).tolist()
    if len(set(groups)) > 1:
        with watch.part("bootstrap over wells"):
            parts = group_moments(real, drawn, groups, names)
            interval = bootstrap_correlation(parts, resamples=200)
        summary["model"]["interval_95_by_well"] = interval.summary
    scores = score_sets(config, sets, watch)
    protocol = {
        "cells": len(sets.cells),
        "plates": sorted(sets.cells[PLATE].astype(str).unique()),
        "wells": len(set(groups)),
        "split": settings.split,
        "system": {"preset": model.card.preset, "sees": list(seen)},
        "pairing": "each generated cell against the real cell its features came from",
        "normalisation": f"{model.intensity.kind}, clamped to [0, 1], 8 bit, both sets",
        "measured": f"{len(names)} features without positions, the same code on both sets",
        "without_nucleus": {
            "real": sets.real.without_nucleus,
            "generated": sets.generated.without_nucleus,
        },
        "with_nucleus": {
            "real": 1 - sets.real.without_nucleus / len(sets.cells),
            "generated": 1 - sets.generated.without_nucleus / len(sets.cells),
        },
        "angles": "circular correlation (Jammalamadaka and SenGupta)",
        "shuffle_control_cells": 0 if sets.shuffled is None else len(sets.shuffled),
        "ceiling": "features of the real patches against the same features in the input table",
        "checkpoint": {"uri": settings.checkpoint, "sha256": model.hash, "steps": model.card.steps},
    }
    report = Report(out, protocol, summary, scores.distances, scores.beside)
    with watch.part("pictures"):
        _draw(out, model, sets, tables)
        if scores.copies is not None:
            _draw_copies(out, model, *datasets, scores.copies)
        if sets.draws:
            _draw_draws(out, config, model, sets)
    for name, found in tables.items():
        text = found.sort_values("r", ascending=False).to_csv(index=False)
        write_bytes(join(out, f"correlation_{name.replace(' ', '_')}.csv"), text.encode())
    for name, found in scores.tables.items():
        write_bytes(join(out, f"{name}.csv"), found.to_csv().encode())
        if name.startswith("moa_"):
            save(confusion_matrix(found, title=name.replace("_", " ")), join(out, f"{name}.png"))
    write_bytes(join(out, "_config.yaml"), config.yaml().encode())
    content = {
        "protocol": protocol,
        "correlation": summary,
        "distances": scores.distances,
        **scores.beside,
        "shown": sets.cells["key"].iloc[sets.shown].tolist(),
        "seconds": watch.seconds,
    }
    write_bytes(join(out, "report.json"), json.dumps(content, indent=1, default=str).encode())
    return report


def _draw(out: str, model: Model, sets: EvaluationSet, tables: dict[str, pd.DataFrame]) -> None:
    figure = correlation_curve(
        tables["model"],
        ceiling=tables.get("ceiling"),
        shuffled=tables.get("shuffle control"),
        title=f"{len(sets.cells):,} cells, {model.card.preset}",
    )
    save(figure, join(out, "correlation.png"))
    best = best_features(sets.real.measured, sets.generated.measured, tables["model"])
    save(best, join(out, "best_features.png"))
    save(correlation_boxes(tables["model"]), join(out, "correlation_by_category.png"))
    titles = None
    if COMPOUND in sets.cells:
        part = sets.cells.iloc[sets.shown]
        dose = part[CONCENTRATION] if CONCENTRATION in part else [""] * len(part)
        titles = [
            f"{c} {d:g}" if isinstance(d, float) and d else f"{c}"
            for c, d in zip(part[COMPOUND], dose, strict=True)
        ]
    figure = figure_pairs(sets.real.patches, sets.generated.patches, model.channels, titles=titles)
    save(figure, join(out, "cells.png"))


def _spread(cells: pd.DataFrame, count: int) -> NDArray[np.int64]:
    """Choose cells over as many treatments as there are, one of each in turn."""
    columns = [name for name in (COMPOUND, CONCENTRATION) if name in cells] or [PLATE]
    turn = cells.groupby(columns, dropna=False).cumcount()
    order = cells.assign(turn=turn).sort_values(["turn", *columns], kind="stable").index
    return order.to_numpy()[:count]


def _draw_copies(
    out: str, model: Model, real: CellDataset, generated: CellDataset, copies: Copies
) -> None:
    """Show the generated cells that are nearest to a training cell, and those cells."""
    rows = {
        "generated": patches_of(generated, model, copies.keys),
        "nearest training cell": patches_of(real, model, copies.training_keys),
    }
    titles = [f"{distance:.2f}" for distance in copies.relative]
    save(figure_rows(rows, model.channels, titles=titles), join(out, "nearest_training_cells.png"))


def _draw_draws(out: str, config: Config, model: Model, sets: EvaluationSet) -> None:
    """Show some cells and several draws of each."""
    rows = sets.shown[:_SHOWN_DRAWS]
    plates = sets.cells[PLATE].astype(str).iloc[rows].tolist()
    scaled = model.scaling.apply(sets.generated.table.iloc[rows].to_numpy(), plates)
    keys = sets.cells["key"].to_numpy(dtype=np.uint64)[rows]
    pictures = {"real": sets.real.patches[:_SHOWN_DRAWS]}
    for turn in range(config.evaluate.draws):
        pictures[f"draw {turn + 1}"] = model.draw(scaled, keys, config.run.seed + 1 + turn)
    save(figure_rows(pictures, model.channels), join(out, "draws.png"))


def _flat(report: Report) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, found in report.correlation.items():
        label = name.replace(" ", "_")
        for key in ("share_above_half", "mean_r", "median_r"):
            if found.get(key) is not None:
                values[f"correlation/{label}/{key}"] = float(found[key])
    for name, found in report.distances.items():
        for key in ("frechet", "frechet_half", "floor_half", "kernel", "kernel_floor"):
            values[f"distance/{name}/{key}"] = float(found[key])
        for key in ("precision", "recall", "density", "coverage"):
            if key in found:
                values[f"distance/{name}/{key}"] = float(found[key])
    for name, found in report.beside.get("moa", {}).items():
        values[f"moa/{name}/nsc"] = float(found["nsc"]["accuracy"])
    for name, key in (("consistency", "median_spread"), ("copies", "generated_over_real")):
        if name in report.beside:
            values[f"{name}/{key}"] = float(report.beside[name][key])
    return values
