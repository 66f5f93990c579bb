"""A whole search on Ray Tune, its driver killed on the way: trials, records, the best config."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cp2image.config import Config
from cp2image.config_reading import read_config
from cp2image.tracking import tracking_uri
from cp2image.training import train
from cp2image.tuning_runs import Sweep, _asha
from cp2image.tuning_table import Trial, TrialTable
from tests.test_training import children_of, is_running
from tests.training_experiments import experiment, write_dataset

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[1]
SPACE = {
    "train.gamma.1": {"low": 0.01, "high": 1, "zero": True},
    "train.learning_rate": {"low": 3e-3, "high": 1e-2},
}
REFERENCES = {
    "gamma-1": {"train.gamma.1": 1.0, "train.learning_rate": 0.003},
    "hopeless": {"train.gamma.1": 1.0, "train.learning_rate": 1e-6},
}


def search(folder, cells):
    """One trial after the other, so that ASHA's decisions are known: it stops the hopeless one."""
    sections = experiment(folder, cells, tracking=True).model_dump()
    sections["tracking"]["register_as"] = "blobs"
    sections["tune"] |= {
        "space": SPACE,
        "references": REFERENCES,
        "objective": {"metric": "validation/L_MSE", "floors": {}},
        "trials": 3,
        "parallel": 1,
        "grace": 20,
        "reduction": 2,
        "finalists": 0,
        "output": "",
    }
    return Config.model_validate(sections).resolve()


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("tuning") / "cells")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, cells):
    """A search whose driver is killed in its third trial and started again: config, table then."""
    folder = tmp_path_factory.mktemp("search")
    config = search(folder / "run", cells)
    file = folder / "search.yaml"
    file.write_text(config.yaml())
    command = [sys.executable, "jobs/tune.py", "--config", str(file)]
    outside = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    environment = {k: v for k, v in os.environ.items() if k not in outside}
    with (folder / "log").open("w") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    while not (folder / "run/tuning/trials/0002/checkpoint/_resume/latest.json").exists():
        assert driver.poll() is None, (folder / "log").read_text()
        time.sleep(0.05)
    orphans = children_of(driver.pid)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    writers = [pid for pid, name in orphans.items() if "RayTrainWorker" in name]
    while any(map(is_running, writers)):
        time.sleep(0.1)
    for pid in filter(is_running, orphans):  # Ray's agents outlive a killed driver for a while
        os.kill(pid, signal.SIGKILL)
    killed = TrialTable(config.tune.output).trials
    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert again.returncode == 0, again.stderr
    return config, killed, again.stdout


def test_trials_that_were_over_are_not_repeated_and_the_interrupted_one_goes_on(resumed):
    config, killed, shown = resumed
    trials = TrialTable(config.tune.output).trials
    assert [trial.status for trial in killed] == ["complete", "stopped", "running"]
    assert [trial.status for trial in trials[:2]] == ["complete", "stopped"]
    assert trials[:2] == killed[:2]
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert trials[2].is_over
    assert trials[2].values == killed[2].values
    assert [line.split()[2] for line in shown.splitlines() if "starts" in line] == ["2"]
    state = Path(config.tune.output, "trials", "0002", "checkpoint", "_resume", "recorded.json")
    assert state.exists() == (trials[2].status == "complete")


def test_asha_stopped_the_hopeless_trial_before_its_end(resumed):
    config, _, _ = resumed
    hopeless = TrialTable(config.tune.output)[1]
    assert (hopeless.name, hopeless.step, hopeless.status) == ("hopeless", 20, "stopped")


def test_mlflow_holds_one_parent_with_every_trial_nested_once_and_closed(resumed):
    from mlflow import MlflowClient

    config, _, _ = resumed
    client = MlflowClient(tracking_uri(config))
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    trials = TrialTable(config.tune.output).trials
    assert parent.info.status == "FINISHED"
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert len(children) == len(trials)
    expected = {"complete": "FINISHED", "stopped": "KILLED"}
    assert {int(r.data.tags["cp2image.trial"]): r.info.status for r in children} == {
        trial.number: expected[trial.status] for trial in trials
    }
    logged = {file.path for file in client.list_artifacts(parent.info.run_id, "search")}
    names = ("parallel_coordinates.png", "numbers_against_objective.png", "best.yaml")
    assert {f"search/{name}" for name in names} <= logged
    version = client.get_model_version_by_alias("blobs", "best")
    source = client.get_run(version.tags["cp2image.run"])
    complete = [trial for trial in trials if trial.status == "complete"]
    best = min(complete, key=lambda trial: trial.score)
    assert source.data.tags["cp2image.trial"] == str(best.number)


def test_the_best_config_trains_to_the_metric_of_the_best_trial(resumed, ray_session):
    config, _, _ = resumed
    trials = [t for t in TrialTable(config.tune.output).trials if t.status == "complete"]
    best = min(trials, key=lambda trial: trial.score)
    written = read_config(str(Path(config.tune.output, "result", "best.yaml")))
    assert written.train.gamma[0] == best.values["train.gamma.1"]
    assert written.train.learning_rate == best.values["train.learning_rate"]
    result = train(written)
    assert result.metrics["validation/L_MSE"] == pytest.approx(best.score, rel=0.02)


def test_asha_is_told_what_an_earlier_run_of_the_search_saw(tmp_path, cells):
    config = search(tmp_path, cells)
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

    assert decide("weak", 20, 2.5) == "STOP"  # the first of this run: only the table says so
    assert decide("good", 20, 1.0) == "CONTINUE"
    assert decide("weak, but all its steps done", 40, 50.0) == "CONTINUE"
