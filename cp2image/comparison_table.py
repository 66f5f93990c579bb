"""The table of a comparison: reports of several systems and seeds as numbers and as text. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cp2image.figures.words import format_number


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
        for share in ("recall", "coverage", "precision", "density"):
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
        _spent(name, [report for (system, _), report in reports.items() if system == name])
        for name in systems
    ]
    lines += [
        "",
        f"Mean ± standard deviation over {seeds} seeds; {protocol['cells']:,} cells of "
        f"{protocol['wells']} wells on {len(protocol['plates'])} plates, split "
        f"{protocol['split']!r}; {protocol['normalisation']}; real against real: the mean over "
        "systems; Fréchet distances, precision, density, recall and coverage: half of the real "
        "cells against the cells drawn for the other half, floor: the two real halves, each the "
        "mean over ten splits (one for Inception); KID: all cells, floor: such halves; N → ∞: all "
        "cells, a line over 1/N followed to 0 (Chong and Forsyth 2020); r: measured on drawn "
        "against measured on real cells, beside it the real ones against the input table; control: "
        "drawn from the features of other cells. A single cell far from all others makes precision "
        "and recall high for anything (jobs/sanity.py shows it); density and coverage do not have "
        "this fault.",
        *_singular(reports),
        *_plates(reports),
        *_other_cells(reports),
        f"Training: {'; '.join(spent)}.",
        "",
    ]
    return "\n".join(lines)


def _spent(name: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """Say what a system's training took; checkpoints from elsewhere may not know all of it."""

    def mean(key: str) -> float | None:
        values = [report["training"].get(key) for report in reports]
        return None if None in values else float(np.mean(values))

    seconds, cells, steps = (mean(key) for key in ("seconds", "cells_seen", "steps"))
    parts = [
        "time not recorded" if seconds is None else f"{seconds / 60:.0f} minutes",
        "cells seen not recorded" if cells is None else f"{cells:,.0f} cells seen",
        "steps not recorded" if steps is None else f"{steps:,.0f} steps",
    ]
    return f"{name}: {', '.join(parts)}"


def _singular(reports: Mapping[tuple[str, int], Mapping[str, Any]]) -> list[str]:
    """Name the embeddings that had too few cells for their dimensions in any report."""
    names = {
        name
        for report in reports.values()
        for name, found in report["distances"].items()
        if found.get("singular")
    }
    return [
        f"**{name}: no more cells in a half than dimensions**: its covariance is singular and the "
        "Fréchet distances mostly tell the number of cells; KID does not have this bias."
        for name in sorted(names)
    ]


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
