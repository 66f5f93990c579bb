"""What a search has found: finalists, the table over seeds, the verdict, pictures, best.yaml."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from cp2image.config import Config
from cp2image.errors import TuningError
from cp2image.figures.canvas import save
from cp2image.figures.search import numbers_against_objective, parallel_coordinates
from cp2image.figures.words import format_number
from cp2image.storage import join
from cp2image.tuning_runs import Sweep
from cp2image.tuning_space import ALLOWED, Values, filled, is_allowed, with_values
from cp2image.tuning_table import SEARCH, Trial, to_frame


def finalists_of(sweep: Sweep) -> Iterator[tuple[str, Values]]:
    """Yield name and numbers of what competes in the end."""
    settings = sweep.config.tune
    references = {n: filled(sweep.config, one) for n, one in settings.references.items()}
    found: list[Values] = list(references.values())
    yield from references.items()
    chosen = 0
    for trial in _ranked(sweep):
        if chosen == settings.finalists:
            return
        if trial.values not in found:
            found.append(trial.values)
            chosen += 1
            yield f"trial-{trial.number}", trial.values


def _ranked(sweep: Sweep) -> list[Trial]:
    """Return the complete trials of the search, best first, allowed ones before others."""
    complete = [
        trial
        for trial in sweep.table.trials
        if trial.kind == SEARCH
        and trial.status == "complete"
        and trial.step >= sweep.config.train.steps
        and trial.score is not None
    ]
    return sorted(complete, key=lambda trial: (trial.score or 0.0, trial.number))


def is_same(trial: Trial, values: Values, seed: int, steps: int) -> bool:
    """Tell whether a trial is a whole training run from new weights with these numbers and seed."""
    own = trial.parent is None and trial.steps == steps and trial.seed == seed
    over_early = trial.kind == SEARCH and trial.status != "complete"
    return own and trial.values == values and not over_early


def compared(sweep: Sweep) -> list[tuple[str, Values]]:
    """Return what is compared in the end: the finalists, or all of the search without them."""
    if sweep.config.tune.finalists:
        return list(finalists_of(sweep))
    found: list[tuple[str, Values]] = []
    for trial in sorted(_ranked(sweep), key=lambda one: not one.name):  # references keep their name
        if trial.values not in [values for _, values in found]:
            found.append((trial.name or f"trial-{trial.number}", trial.values))
    return found


def tabulate_results(sweep: Sweep) -> pd.DataFrame:
    """Tabulate what is compared, best first: mean, spread and seeds of the score, and metrics.

    Numbers of which ``below`` seeds miss a floor are not allowed, whatever the others have: their
    ``mean`` is that of the seeds below, and says how far below they are.
    """
    steps, seeds = sweep.config.train.steps, sweep.config.tune.seeds
    wanted = seeds if sweep.config.tune.finalists else [sweep.config.run.seed]
    rows = []
    for name, values in compared(sweep):
        found = [trial for trial in sweep.table.trials if trial.status == "complete"]
        by_seed = {
            seed: next((trial for trial in found if is_same(trial, values, seed, steps)), None)
            for seed in wanted
        }  # numbers that were proposed twice, as 0, count once
        own = [trial for trial in by_seed.values() if trial is not None]
        scores = np.array([trial.score for trial in own], dtype=np.float64)
        if not len(scores):
            continue
        sd = float(scores.std(ddof=1)) if len(scores) > 1 else float("nan")
        below = int(sum(not is_allowed(score) for score in scores))
        mean = float(scores[scores >= ALLOWED].mean() if below else scores.mean())
        names = [n for n in own[0].history[-1] if n.startswith("validation/")]
        means = {n: float(np.mean([trial.history[-1][n] for trial in own])) for n in names}
        about = {"name": name, "mean": mean, "sd": sd, "seeds": len(scores), "below": below}
        rows.append({**about, "lost": len(wanted) - len(scores), **values, **means})
    if not rows:
        reasons = {trial.reason.splitlines()[-1] for trial in sweep.table.trials if trial.reason}
        raise TuningError(
            f"none of {len(sweep.table.trials)} trials was completed"
            + (f": {'; '.join(sorted(reasons))[:1000]}" if reasons else "")
        )
    table = pd.DataFrame(rows)
    return table.sort_values(["lost", "below", "mean"], kind="stable", ignore_index=True)


def describe(sweep: Sweep, results: pd.DataFrame) -> str:
    """Write the protocol, the table and the verdict as Markdown."""
    settings = sweep.config.tune
    trials = [trial for trial in sweep.table.trials if trial.kind == SEARCH]
    counts = pd.Series([trial.status for trial in trials]).value_counts()
    floors = ", ".join(f"{name} ≥ {least:g}" for name, least in settings.objective.floors.items())
    sign = -1 if settings.objective.goal == "max" else 1
    lines = [
        f"{settings.objective.metric} ({settings.objective.goal}; {floors or 'no floor'}) on the "
        f"validation split by {sweep.config.split.by}, {sweep.config.train.steps:,} steps; "
        f"{len(trials)} trials ({', '.join(f'{n} {name}' for name, n in counts.items())})",
        "",
        "| | mean | sd | seeds |",
        "| --- | ---: | ---: | ---: |",
    ]
    for _, row in results.head(12).iterrows():
        mean = f"{row['below']} of {row['seeds']} below a floor"
        mean = mean if row["below"] else format_number(sign * row["mean"])
        known = not row["below"] and not np.isnan(row["sd"])
        spread = format_number(row["sd"]) if known else "—"
        lines.append(f"| {row['name']} | {mean} | {spread} | {row['seeds']} |")
    lines += ["", _verdict(sweep, results)]
    return "\n".join(lines)


def _verdict(sweep: Sweep, results: pd.DataFrame) -> str:
    """Say whether the search beat the references by more than the spread over seeds."""
    winner = results.iloc[0]
    if winner["below"]:
        return "No settings met the floors: lower them, or train longer."
    if winner["name"] in sweep.config.tune.references:
        return f"The search found nothing better than the reference {winner['name']}."
    sentences = []
    for name in sweep.config.tune.references:
        row = results[results["name"] == name]
        if row.empty:
            sentences.append(f"The reference {name} was not trained to the end.")
            continue
        if row["below"].iloc[0]:
            sentences.append(f"{winner['name']} meets the floors; the reference {name} does not.")
            continue
        gap, other = float(row["mean"].iloc[0] - winner["mean"]), row.iloc[0]
        if winner["seeds"] < 2 or other["seeds"] < 2:
            sentences.append(f"{winner['name']} is {gap:.3g} ahead of {name}, on one seed only.")
            continue
        error = float(
            np.hypot(winner["sd"] / winner["seeds"] ** 0.5, other["sd"] / other["seeds"] ** 0.5)
        )
        clear = "more" if gap > 2 * error else "no more"
        sentences.append(
            f"{winner['name']} is {gap:.3g} ahead of {name}, {clear} than twice the standard "
            f"error of the difference ({error:.2g})."
        )
    return " ".join(sentences) or f"Best: {winner['name']}."


def draw_search(sweep: Sweep, results: pd.DataFrame, out: str) -> None:
    """Draw the search's trials; those below a floor are left out unless all are."""
    settings = sweep.config.tune
    frame = to_frame(trial for trial in sweep.table.trials if trial.kind == SEARCH)
    metric = settings.objective.metric
    allowed = frame["score"].map(lambda score: score is not None and is_allowed(score))
    shown = frame[allowed & frame[list(settings.space)].notna().all(axis=1)]
    shown = frame[frame[list(settings.space)].notna().all(axis=1)] if shown.empty else shown
    keys = {key: one.log for key, one in settings.space.items()}
    lost = len(frame) - len(shown)
    title = f"{len(frame)} trials, {sweep.config.train.steps:,} steps"
    title += f"; {lost} failed or below a floor left out" if lost else ""
    title += "; all are below a floor" if not allowed.any() else ""
    save(
        parallel_coordinates(
            shown, keys, metric, lower=settings.objective.goal == "min", title=title
        ),
        join(out, "parallel_coordinates.png"),
    )
    references = {
        row["name"]: row[metric]
        for _, row in results.iterrows()
        if row["name"] in settings.references and metric in row
    }
    figure = numbers_against_objective(shown, keys, metric, references=references, title=title)
    save(figure, join(out, "numbers_against_objective.png"))


def best_yaml(sweep: Sweep, best: Values, text: str) -> str:
    """Return the winning experiment, ready for jobs/train.py."""
    config = with_values(sweep.config, best)
    data = config.model_dump()
    folder = join(config.tune.output, "best")
    own = config.split.seed
    data["run"] |= {"name": f"{config.run.name}-best", "folder": folder}
    data["split"]["seed"] = config.run.seed if own is None else own
    data["train"]["output"] = join(folder, "checkpoint")
    data["tracking"]["register_as"] = None  # the search has registered its best model
    for section, key in (("generate", "checkpoint"), ("evaluate", "checkpoint")):
        data[section][key] = join(folder, "checkpoint")
    data["generate"]["output"] = data["evaluate"]["generated"] = join(folder, "screen")
    data["evaluate"]["output"] = join(folder, "report")
    comment = "\n".join(f"# {line}".rstrip() for line in text.splitlines())
    head = f"# python jobs/train.py --config best.yaml\n{comment}\n"
    return head + Config.model_validate(data).yaml()
