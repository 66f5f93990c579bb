"""Search for the numbers of a training run: trials, finalists, best.yaml. Above the steps."""

import json
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import pandas as pd

from cp2image.cluster import join_cluster
from cp2image.config import Config
from cp2image.dataset import CellDataset, open_dataset
from cp2image.errors import TuningError
from cp2image.profiles import measured_features
from cp2image.storage import delete_tree, join, read_bytes, write_bytes
from cp2image.tracking import Recorder, close_children, record, register_model, tracking_uri
from cp2image.training import fingerprint
from cp2image.tuning_finding import (
    best_yaml,
    compared,
    describe,
    draw_search,
    finalists_of,
    is_same,
    tabulate_results,
)
from cp2image.tuning_proposals import Proposals, next_generation
from cp2image.tuning_runs import Sweep, run_trials
from cp2image.tuning_space import (
    Values,
    check_search,
    filled,
    is_allowed,
    is_whole,
)
from cp2image.tuning_table import FINAL, SEARCH, Trial, TrialTable, read_json, to_frame


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes
    ----------
    uri
        Folder of the trials and, below ``result``, tables, pictures and ``best.yaml``.
    best
        The winning numbers.
    finalists
        One row per finalist and reference: ``mean``, ``sd`` and ``seeds`` of the objective.
    text
        The finding as text.
    """

    uri: str
    best: Values
    finalists: pd.DataFrame
    text: str

    def __str__(self) -> str:
        return f"{join(self.uri, 'result', 'best.yaml')}\n{self.text}"


def tune(config: Config) -> Tuning:
    """Search as ``config.tune`` says; publish tables, pictures, ``best.yaml`` and the best model.

    Each report of a trial is on storage at once. A search that was interrupted goes on when the
    same job is started again: trials that are over are not repeated, others go on from their
    newest state, and the sampler learns again from all that is known. More ``tune.trials``
    continue a finished search.

    Raises
    ------
    ConfigError
        If the space or the objective is refused, see `check_search`.
    TuningError
        If ``tune.output`` holds another search, or no trial could be completed.
    """
    check_search(config)
    dataset = open_dataset(config.train.input)
    measured_features(dataset)
    out = config.tune.output
    base = _base(config)
    begun = _begun(config, dataset)
    join_cluster(config.cluster)
    with record(config, "tune", begun["run_id"]) as recorder:
        write_bytes(
            join(out, "search.json"), json.dumps(begun | {"run_id": recorder.run_id}).encode()
        )
        sweep = Sweep(base, TrialTable(out), recorder.run_id)
        try:
            _search(sweep, recorder)
            _finals(sweep, recorder)
            return _publish(sweep, recorder)
        finally:
            for trial in sweep.table.trials:
                delete_tree(join(sweep.table.folder(trial.number), "checkpoint", "_ray"))
            delete_tree(join(out, "_ray"))
            became = {trial.number: trial.status for trial in sweep.table.trials if trial.is_over}
            close_children(recorder, became, others=True)


def _base(config: Config) -> Config:
    """Return the config that all trials vary: one MLflow store for all, nothing to search for."""
    data = config.model_dump()
    data["tracking"]["uri"] = tracking_uri(config) if config.tracking.enabled else None
    return Config.model_validate(data)


def _begun(config: Config, dataset: CellDataset) -> dict[str, str]:
    """Return the mark and the MLflow run of the search in this folder, old or new."""
    tune_section = config.tune.model_dump(mode="json")
    free = ("trials", "parallel", "finalists", "seeds", "references", "retries", "alias", "output")
    kept = {key: value for key, value in tune_section.items() if key not in free}
    judged = (config.train.validate_every, config.train.validation_cells)
    parts = [fingerprint(config, dataset), config.train.steps, judged, kept]
    parts.append(config.score.model_dump(mode="json"))
    mark = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    earlier = read_json(join(config.tune.output, "search.json"))
    if earlier is not None and earlier["mark"] != mark:
        raise TuningError(
            f"{config.tune.output}: holds a search with other settings or data, whose trials do "
            "not compare with these; set tune.output or run.folder to a new place, or remove "
            "that folder yourself"
        )
    return {"mark": mark, "run_id": earlier["run_id"] if earlier else ""}


def _search(sweep: Sweep, recorder: Recorder) -> None:
    if sweep.config.tune.search == "population":
        _search_by_generations(sweep, recorder)
        return
    settings, table, seed = sweep.config.tune, sweep.table, sweep.config.run.seed
    known = [trial for trial in table.trials if trial.kind == SEARCH]
    again = [trial for trial in known if not trial.is_over]
    first = [
        (name, filled(sweep.config, values))
        for name, values in settings.references.items()
        if name not in {trial.name for trial in known}
    ]
    proposals = Proposals(sweep.config, [t for t in known if t.is_over], len(known))
    count = len(known)
    _announce(sweep, known)

    def wanted() -> Trial | None:
        nonlocal count
        if again:
            return again.pop(0)
        if count >= settings.trials:
            return None
        count += 1
        number = table.next_number()
        name, values = first.pop(0) if first else ("", proposals.propose(number))
        trial = Trial(number, values, seed, sweep.config.train.steps, name=name)
        table.put(trial)
        return trial

    def over(trial: Trial) -> None:
        proposals.tell(trial)
        _note(table, trial, recorder)

    run_trials(sweep, wanted, over, stops_early=settings.early_stop == "asha")


def _search_by_generations(sweep: Sweep, recorder: Recorder) -> None:
    """Train a population in generations; between them the weak take over from the strong."""
    settings, config, table = sweep.config.tune, sweep.config, sweep.table
    size = settings.trials // settings.generations
    whole = {key: is_whole(config, key, one) for key, one in settings.space.items()}
    proposals = Proposals(_random(config))
    parents: list[Trial] = []
    for generation in range(settings.generations):
        steps = config.train.steps * (generation + 1) // settings.generations
        known = [t for t in table.trials if t.kind == SEARCH and t.generation == generation]
        if not known:
            seed = int(np.random.SeedSequence([config.run.seed, generation]).generate_state(1)[0])
            if generation == 0:
                first = list(settings.references.items())[:size]
                values: list[tuple[str, Values, int | None]] = []
                values += [(name, filled(config, one), None) for name, one in first]
                values += [("", proposals.propose(i), None) for i in range(size - len(first))]
            else:
                members = next_generation(parents, settings.space, whole, seed)
                values = [("", one.values, one.parent) for one in members]
            number = table.next_number()
            for place, (name, one, parent) in enumerate(values):
                trial = Trial(
                    number + place,
                    one,
                    config.run.seed,
                    steps,
                    name=name,
                    parent=parent,
                    generation=generation,
                )
                table.put(trial)
            known = [t for t in table.trials if t.kind == SEARCH and t.generation == generation]
        _announce(sweep, known)
        _run_all(sweep, recorder, known)
        parents = [table[trial.number] for trial in known]


def _random(config: Config) -> Config:
    return config.model_copy(update={"tune": config.tune.model_copy(update={"search": "random"})})


def _run_all(sweep: Sweep, recorder: Recorder, trials: list[Trial]) -> None:
    """Run those of the trials that are not over, to their end."""
    waiting = [trial for trial in trials if not trial.is_over]
    if waiting:
        run_trials(
            sweep,
            lambda: waiting.pop(0) if waiting else None,
            lambda trial: _note(sweep.table, trial, recorder),
            stops_early=False,
        )


def _finals(sweep: Sweep, recorder: Recorder) -> None:
    """Train the best of the search, and the references, with every seed."""
    settings, table, steps = sweep.config.tune, sweep.table, sweep.config.train.steps
    if not settings.finalists:
        return
    planned = [trial for trial in table.trials if trial.kind == FINAL]
    for name, values in finalists_of(sweep):
        for seed in settings.seeds:
            if not any(is_same(trial, values, seed, steps) for trial in table.trials):
                trial = Trial(table.next_number(), values, seed, steps, FINAL, name)
                table.put(trial)
                planned.append(trial)
    _run_all(sweep, recorder, planned)


def _note(table: TrialTable, trial: Trial, recorder: Recorder) -> None:
    """Close a trial's MLflow run and put its score into the parent's.

    Raises
    ------
    TuningError
        If the first three trials have failed: all will, for the same reason.
    """
    if trial.status == "failed":
        ended = [one for one in table.trials if one.status != "running"]
        if len(ended) >= 3 and all(one.status == "failed" for one in ended):
            raise TuningError(f"the first {len(ended)} trials failed: {trial.reason[-1000:]}")
    close_children(recorder, {trial.number: trial.status})
    if trial.score is not None and is_allowed(trial.score):
        recorder.metrics({"trial_score": trial.score}, trial.number)


def _announce(sweep: Sweep, known: list[Trial]) -> None:
    over = sum(trial.is_over for trial in known)
    if known and over:
        print(f"tune: {over} of {len(known)} trials of an earlier run are over", flush=True)


def _publish(sweep: Sweep, recorder: Recorder) -> Tuning:
    config = sweep.config
    out = join(config.tune.output, "result")
    results = tabulate_results(sweep)
    winner = results.iloc[0]
    best = dict(compared(sweep))[winner["name"]]
    text = describe(sweep, results)
    meets = not winner["below"]
    model = _register(sweep, recorder, best) if meets else ""
    text += f"\nRegistered as {model}." if model else ""
    files = {
        "trials.csv": to_frame(sweep.table.trials).to_csv(index=False),
        "finalists.csv": results.to_csv(index=False),
        "finding.md": text + "\n",
        "best.yaml": best_yaml(sweep, best, text),
    }
    for name, content in files.items():
        write_bytes(join(out, name), content.encode())
    draw_search(sweep, results, out)
    recorder.folder(out, "search")
    if meets:
        recorder.metrics({"best_score": float(winner["mean"])})
    return Tuning(config.tune.output, best, results, text)


def _register(sweep: Sweep, recorder: Recorder, best: Values) -> str:
    name = sweep.config.tracking.register_as
    if not name or not recorder.run_id:
        return ""
    steps = sweep.config.train.steps
    own = [
        trial
        for seed in (sweep.config.run.seed, *sweep.config.tune.seeds)
        for trial in sweep.table.trials
        if is_same(trial, best, seed, steps) and trial.status == "complete"
    ]
    chosen = min(own, key=lambda trial: (trial.score, trial.number))
    place = join(sweep.table.folder(chosen.number), "checkpoint", "_resume", "recorded.json")
    run_id = json.loads(read_bytes(place))["run_id"]
    return register_model(recorder, run_id, name, sweep.config.tune.alias)
