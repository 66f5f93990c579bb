"""Trials as Ray Tune runs them: what each does, and how they are worked off. Above the steps."""

import json
import logging
import math
import os
import time
import traceback
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cp2image.cluster import quieten
from cp2image.config import Config
from cp2image.errors import Cp2ImageError, DivergenceError
from cp2image.storage import delete_tree, filesystem, join, write_bytes
from cp2image.training import Place, train
from cp2image.tuning_space import is_allowed, score_of, with_values
from cp2image.tuning_table import Trial, TrialTable

_TRIAL_CPUS = 0.05
"""Of the process that starts a trial's training and waits for it."""


@dataclass(frozen=True)
class Sweep:
    """What all trials of a search share.

    Attributes
    ----------
    config
        The experiment they are variations of.
    table
        Their results, on storage.
    run_id
        MLflow's parent run; empty without tracking.
    """

    config: Config
    table: TrialTable
    run_id: str = ""

    def config_of(self, trial: Trial) -> Config:
        """Return the experiment of one trial, in a folder of its own, on the same split."""
        config = self.config
        data = with_values(config, trial.values).model_dump()
        folder = self.table.folder(trial.number)
        name = f"{config.run.name}-{trial.name or trial.kind}-{trial.number:04d}"
        own = config.split.seed
        data["run"] |= {"folder": folder, "seed": trial.seed, "name": name}
        data["split"]["seed"] = config.run.seed if own is None else own
        data["train"] |= {"output": join(folder, "checkpoint"), "steps": trial.steps}
        data["tracking"]["register_as"] = None
        return Config.model_validate(data)

    def tags_of(self, trial: Trial) -> dict[str, str]:
        """Return the tags that make a trial's MLflow run a child of the search's."""
        if not self.run_id:
            return {}
        return {"mlflow.parentRunId": self.run_id, "cp2image.trial": str(trial.number)}


def run_trials(
    sweep: Sweep,
    wanted: Callable[[], Trial | None],
    over: Callable[[Trial], None],
    *,
    stops_early: bool,
) -> None:
    """Run trials side by side until there is none left.

    Parameters
    ----------
    sweep
        What they share; its table is kept up to date with every report.
    wanted
        Returns the next trial, which is in the table, or None when there are no more.
    over
        Called with each trial that has ended, in whatever way.
    stops_early
        Whether ASHA (Li et al., MLSys 2020) may stop trials. It is told what trials that are over
        reported, in an earlier run of the search too.
    """
    settings = sweep.config.tune
    # Ray would take Ctrl-C and SIGTERM for itself; the job unwinds by them, see `run_job`.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    scheduler = _asha(sweep) if stops_early else FIFOScheduler()
    source = _Source(sweep, wanted, over)
    scratch = join(sweep.table.uri, "_ray", uuid.uuid4().hex[:12])
    files, path = filesystem(scratch)
    try:
        tuner = tune.Tuner(
            tune.with_resources(run_trial, {"CPU": _TRIAL_CPUS}),
            tune_config=tune.TuneConfig(
                metric="score",
                mode="min",
                search_alg=source,
                scheduler=scheduler,
                num_samples=-1,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=path,
                storage_filesystem=files,
                failure_config=tune.FailureConfig(max_failures=settings.retries),
                verbose=0,
            ),
        )
        tuner.fit()
    finally:
        delete_tree(scratch)
    if source.refusal is not None:
        raise source.refusal


def run_trial(settings: Mapping[str, Any]) -> None:
    """Train one trial in a process of its own, as `jobs/train.py` does; Ray Tune calls it.

    Parameters
    ----------
    settings
        ``config`` (JSON), ``share`` of the cluster, ``tags``, ``start_from``; see `Place`.
    """
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    quieten()
    config = Config.model_validate_json(settings["config"])
    place = Place(
        share=settings["share"],
        callbacks=[_Report(config)],
        tags=json.loads(settings["tags"]),
        quiet=True,
        start_from=settings["start_from"],
    )
    try:
        result = train(config, place)
    except DivergenceError as error:
        tune.report({"score": 1e12, "reason": str(error), "diverged": 1})
        return
    except Exception as error:
        told = str(error) if isinstance(error, Cp2ImageError) else traceback.format_exc()
        write_bytes(join(config.run.folder, "failure.txt"), told.encode())
        raise
    numbers = {**result.metrics, "step": result.steps}
    tune.report({**numbers, "published": 1, "score": score_of_known(numbers, config)})


def score_of_known(metrics: Mapping[str, float], config: Config) -> float:
    """Return `score_of`, or NaN where a loss that only training logs is asked for."""
    wanted = config.tune.objective
    known = all(name in metrics for name in (wanted.metric, *wanted.floors))
    return score_of(metrics, config) if known else float("nan")


class _Report(TuneReportCallback):  # type: ignore[misc]
    """Takes what a trial's training reports to Ray Tune, with its score."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        """Add the score to what rank 0 reported."""
        score = score_of(metrics[0], self._config)
        super().after_report(run_context, [{**metrics[0], "score": score}], checkpoint)


class _Asha(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA by training step; a trial that has done all its steps is left to publish its model."""

    def __init__(self, steps: int, grace: int, reduction: int) -> None:
        super().__init__("step", "score", "min", steps, grace, reduction, stop_last_trials=False)
        self._steps = steps

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Say whether a trial goes on."""
        decision = super().on_trial_result(tune_controller, trial, result)
        over = result.get("step", 0) >= self._steps
        return str(TrialScheduler.CONTINUE if over else decision)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Take the metric that Tune was given: it is the same."""
        return True


def _asha(sweep: Sweep) -> _Asha:
    steps, settings = sweep.config.train.steps, sweep.config.tune
    grace = min(steps, settings.grace or max(1, steps // 9))
    scheduler = _Asha(steps, grace, settings.reduction)
    for trial in sweep.table.trials:
        if trial.is_over and trial.history and trial.kind == "search":
            past = SimpleNamespace(trial_id=f"earlier-{trial.number}")
            scheduler.on_trial_add(None, past)
            for one in trial.history:
                scheduler.on_trial_result(None, past, dict(one))
            scheduler.on_trial_remove(None, past)
    return scheduler


class _Source(Searcher):  # type: ignore[misc]
    """Hands trials to Ray Tune and writes down what becomes of them."""

    def __init__(
        self,
        sweep: Sweep,
        wanted: Callable[[], Trial | None],
        over: Callable[[Trial], None],
    ) -> None:
        super().__init__(metric="score", mode="min")
        self._sweep, self._wanted, self._over = sweep, wanted, over
        self._running: dict[str, int] = {}
        self._began: dict[str, float] = {}
        self.refusal: Cp2ImageError | None = None
        """Why the search was given up; raised when Tune has ended, which would wrap it."""

    def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
        """Accept: what is searched for is not Tune's business."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's settings, None to be asked again, or that there are no more."""
        sweep = self._sweep
        if self.refusal is not None:
            return Searcher.FINISHED
        if len(self._running) >= sweep.config.tune.parallel:
            return None
        trial = self._wanted()
        if trial is None:
            return Searcher.FINISHED
        sweep.table.put(replace(trial, status="running", reason=""))
        self._running[trial_id], self._began[trial_id] = trial.number, time.time()
        parent = trial.parent
        values = ", ".join(f"{k}={v:.4g}" for k, v in trial.values.items())
        _tell(trial, f"starts{f' at step {trial.step:,}' if trial.step else ''}: {values}")
        return {
            "config": sweep.config_of(trial).model_dump_json(),
            "share": 1 / sweep.config.tune.parallel,
            "tags": json.dumps(sweep.tags_of(trial)),
            "start_from": "" if parent is None else join(sweep.table.folder(parent), "checkpoint"),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Write down one report."""
        if trial_id in self._running:
            self._note(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Write down how a trial ended."""
        if trial_id not in self._running:
            return
        if result:
            self._note(trial_id, result)
        trial = self._sweep.table[self._running.pop(trial_id)]
        folder = self._sweep.table.folder(trial.number)
        if error:
            trial = replace(trial, status="failed", reason=_failure(folder))
        elif result and result.get("diverged"):
            trial = replace(trial, status="diverged", reason=str(result["reason"]))
        elif result and result.get("published"):
            trial = replace(trial, status="complete")
        else:
            trial = replace(trial, status="stopped")
            _release(result or {})
        self._sweep.table.put(trial)
        score = "" if trial.score is None else f", score {_shown(trial.score)}"
        _tell(
            trial,
            f"{trial.status} at step {trial.step:,}{score}{trial.reason and ': '}"
            f"{trial.reason[-300:]}",
        )
        try:
            self._over(trial)
        except Cp2ImageError as refusal:
            self.refusal = refusal

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the table is on storage."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing."""

    def _note(self, trial_id: str, result: dict[str, Any]) -> None:
        number = self._running[trial_id]
        trial = self._sweep.table[number]
        if "step" not in result or result.get("diverged"):
            return
        names = [n for n in result if n.startswith(("train/", "validation/"))]
        kept = {n: float(result[n]) for n in [*names, "step", "score"]}
        if kept["step"] == trial.step:
            kept = {**trial.history[-1], **{n: v for n, v in kept.items() if not math.isnan(v)}}
        if not trial.history and trial.parent is None and "train_seconds" in result:
            seconds = time.time() - self._began[trial_id] - float(result["train_seconds"])
            trial = replace(trial, overhead=round(seconds, 2))
        if kept["step"] > trial.step:
            _tell(trial, f"step {int(kept['step']):,}, score {_shown(kept['score'])}")
        self._sweep.table.put(trial.reported(kept))


def _release(result: Mapping[str, Any]) -> None:
    """Free the CPUs of a training that was stopped: Ray keeps its workers' until the job ends.

    (Its own cleaner asks the state API, which fails where several Rays run on one machine.)
    """
    name = result.get("placement_group")
    if name:
        group = PlacementGroup(ray.PlacementGroupID.from_hex(name))
        remove_placement_group(group)


def _failure(folder: str) -> str:
    from cp2image.storage import exists, read_bytes

    place = join(folder, "failure.txt")
    return read_bytes(place).decode().strip() if exists(place) else "its process ended"


def _shown(score: float) -> str:
    return f"{score:.4g}" if is_allowed(score) else "below a floor"


def _tell(trial: Trial, text: str) -> None:
    print(f"tune: trial {trial.number} {text}", flush=True)
