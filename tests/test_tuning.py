"""A whole search on Ray Tune: trials, early stops, kills, records, the best config."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from cp2image import tuning
from cp2image.config import Config
from cp2image.config_reading import read_config
from cp2image.errors import TuningError
from cp2image.tracking import tracking_uri
from cp2image.training import train
from cp2image.tuning import tune
from cp2image.tuning_table import TrialTable
from tests.test_training import children_of, is_running
from tests.training_experiments import experiment, write_dataset

ROOT = Path(__file__).resolve().parents[1]
SPACE = {
    "train.gamma.1": {"low": 0.01, "high": 10, "zero": True},
    "train.learning_rate": {"low": 1e-3, "high": 1e-2},
}
REFERENCES = {"gamma-1": {"train.gamma.1": 1.0, "train.learning_rate": 0.003}}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("tuning") / "cells")


def search(folder, cells, **changes):
    sections = experiment(folder, cells, tracking=True).model_dump()
    sections["tracking"]["register_as"] = "blobs"
    sections["tune"] |= {
        "space": SPACE,
        "references": REFERENCES,
        "objective": {"metric": "validation/L_MSE", "floors": {}},
        "trials": 3,
        "grace": 20,
        "reduction": 2,
        "finalists": 1,
        "seeds": [3, 4],
        "output": "",
        **changes,
    }
    return Config.model_validate(sections).resolve()


def runs_of(config):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(config))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    return client, parents, [run for run in runs if run not in parents]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cells, ray_session):
    """One complete search: its config and what it found."""
    config = search(tmp_path_factory.mktemp("search"), cells)
    return config, tune(config)


def test_every_trial_and_every_seed_of_the_finalists_is_run_once(finished):
    config, found = finished
    trials = TrialTable(config.tune.output).trials
    assert [trial.number for trial in trials] == list(range(len(trials)))
    searched = [trial for trial in trials if trial.kind == "search"]
    assert len(searched) == 3
    assert searched[0].values == REFERENCES["gamma-1"]
    assert {trial.status for trial in trials} <= {"complete", "stopped"}
    whole = [(str(t.values), t.seed) for t in trials if t.status == "complete"]
    assert len(set(whole)) == len(whole)
    assert set(found.finalists["seeds"]) == {2}
    assert "gamma-1" in set(found.finalists["name"])
    assert found.finalists["mean"].is_monotonic_increasing


def test_mlflow_holds_one_parent_with_all_trials_nested_and_closed(finished):
    config, found = finished
    client, (parent,), children = runs_of(config)
    trials = TrialTable(config.tune.output).trials
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    expected = {"complete": "FINISHED", "stopped": "KILLED"}
    assert {int(r.data.tags["cp2image.trial"]): r.info.status for r in children} == {
        trial.number: expected[trial.status] for trial in trials
    }
    pictures = {file.path for file in client.list_artifacts(parent.info.run_id, "search")}
    names = ("parallel_coordinates.png", "numbers_against_objective.png", "best.yaml")
    assert {f"search/{name}" for name in names} <= pictures
    version = client.get_model_version_by_alias("blobs", "best")
    source = client.get_run(version.tags["cp2image.run"])
    best = TrialTable(config.tune.output)[int(source.data.tags["cp2image.trial"])]
    assert best.values == found.best


def test_the_best_config_trains_to_the_very_metric_of_the_best_trial(finished):
    config, found = finished
    best = read_config(str(Path(config.tune.output, "result", "best.yaml")))
    assert best.train.gamma[0] == found.best.get("train.gamma.1")
    result = train(best)
    (trial,) = [
        trial
        for trial in TrialTable(config.tune.output).trials
        if (trial.values, trial.seed, trial.status) == (found.best, best.run.seed, "complete")
    ]
    assert result.metrics["validation/L_MSE"] == pytest.approx(trial.score, rel=1e-3)


def test_a_finished_search_is_read_again_and_goes_on_with_more_trials_only(finished, monkeypatch):
    config, found = finished
    before = TrialTable(config.tune.output).trials
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "run_trials", lambda *_, **__: None)
        again = tune(config)
    assert again.best == found.best
    pd.testing.assert_frame_equal(again.finalists, found.finalists)
    assert TrialTable(config.tune.output).trials == before
    asked = []
    monkeypatch.setattr(
        tuning, "run_trials", lambda sweep, wanted, over, **_: asked.extend(iter(wanted, None))
    )
    with pytest.raises(TuningError, match="holds a search with other settings"):
        tune(search(Path(config.run.folder), config.train.input, reduction=3))
    tune(search(Path(config.run.folder), config.train.input, trials=5, finalists=0))
    assert [trial.number for trial in asked] == [len(before), len(before) + 1]
    assert all(trial.values not in [t.values for t in before] for trial in asked)
    assert len(runs_of(config)[1]) == 1


@pytest.mark.timeout(900)
def test_a_search_whose_driver_is_killed_goes_on_where_it_was(tmp_path, cells):
    config = search(tmp_path / "run", cells, trials=3, finalists=0, parallel=1)
    file = tmp_path / "search.yaml"
    file.write_text(config.yaml())
    command = [sys.executable, "jobs/tune.py", "--config", str(file)]
    outside = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)

    def second_is_under_way():
        trials = {trial.number: trial for trial in TrialTable(config.tune.output).trials}
        return 1 in trials and trials[1].status == "running" and trials[1].step >= 20

    while not second_is_under_way():
        assert driver.poll() is None, "the search ended before it could be killed"
        time.sleep(0.05)
    orphans = children_of(driver.pid)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    writers = [p for p, name in orphans.items() if "RayTrainWorker" in name or "run_trial" in name]
    while any(map(is_running, writers)):
        time.sleep(0.1)
    for pid in filter(is_running, orphans):
        os.kill(pid, signal.SIGKILL)
    killed = TrialTable(config.tune.output).trials
    ended = killed[0]
    assert ended.status == "complete"
    written = Path(config.tune.output, "trials", "0000", "trial.json").stat().st_mtime_ns

    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert again.returncode == 0, again.stderr
    assert "trial 0 starts" not in again.stdout
    assert "trial 1 starts at step" in again.stdout
    trials = TrialTable(config.tune.output).trials
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert all(trial.is_over for trial in trials)
    assert trials[0] == ended
    assert trials[1].values == killed[1].values
    assert Path(config.tune.output, "trials", "0000", "trial.json").stat().st_mtime_ns == written
    _, (parent,), children = runs_of(config)
    assert parent.info.status == "FINISHED"
    assert sorted(int(run.data.tags["cp2image.trial"]) for run in children) == [0, 1, 2]
    assert {run.info.status for run in children} <= {"FINISHED", "KILLED"}
    best = yaml.safe_load(Path(config.tune.output, "result", "best.yaml").read_text())
    assert best["train"]["input"] == cells
    assert json.loads(Path(config.tune.output, "search.json").read_text())["run_id"]


def test_asha_is_told_what_an_earlier_run_of_the_search_saw(tmp_path, cells):
    from types import SimpleNamespace

    from cp2image.tuning_runs import Sweep, _asha
    from cp2image.tuning_table import Trial

    config = search(tmp_path, cells, reduction=2)
    table = TrialTable(config.tune.output)
    for number in range(4):
        trial = Trial(number, {}, 0, 40, status="stopped")
        table.put(trial.reported({"step": 20, "score": float(number)}))
    for number in (4, 5):  # neither ended, nor of the search
        trial = Trial(number, {}, 0, 40, kind=("search", "final")[number - 4])
        table.put(trial.reported({"step": 20, "score": 100.0}))
    scheduler = _asha(Sweep(config, table))

    def decide(name, step, score):
        trial = SimpleNamespace(trial_id=name)
        scheduler.on_trial_add(None, trial)
        return scheduler.on_trial_result(None, trial, {"step": step, "score": score})

    assert decide("good", 20, 1.0) == "CONTINUE"
    assert decide("weak", 20, 2.5) == "STOP"
    assert decide("weak, but all its steps done", 40, 50.0) == "CONTINUE"
