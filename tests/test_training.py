"""Training on Ray Train: workers, faults, records."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import cp2image
from cp2image import training
from cp2image.errors import CheckpointError, DatasetError, TrainingError
from cp2image.tracking import tracking_uri
from cp2image.training import train
from cp2image.training_loop import TrainingLoop, read_state
from tests.training_experiments import (
    FEATURES,
    assert_same_weights,
    cells_of,
    experiment,
    plan_of,
    run_loop,
    run_two_ranks,
    tables_of,
    write_dataset,
)

ROOT = Path(__file__).resolve().parents[1]
STEPS = 120


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("training") / "cells")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(runs, cells, ray_session):
    """One complete run on Ray Train, recorded: its config and its result."""
    config = experiment(runs / "undisturbed", cells, tracking=True, steps=STEPS)
    return config, train(config)


@pytest.fixture(scope="module")
def plain(runs, cells):
    """The same training without Ray."""
    config = experiment(runs / "plain", cells, steps=STEPS)
    run_loop(plan_of(config))
    return config


def test_training_on_ray_equals_the_plain_loop(undisturbed, plain):
    config, result = undisturbed
    assert result.steps == STEPS
    assert result.resumed_from == 0
    assert_same_weights(config, plain)
    assert not Path(config.train.output, "_ray").exists()


def mlflow_runs(config):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri(config))
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client, client.search_runs(experiments)


def test_run_is_recorded_with_parameters_losses_pictures_and_model(undisturbed):
    config, result = undisturbed
    client, (run,) = mlflow_runs(config)
    assert run.info.run_id == result.run_id
    assert run.info.status == "FINISHED"
    assert run.data.params["train.gamma_ramp"] == "4"
    history = client.get_metric_history(run.info.run_id, "train/L_MSE")
    assert [point.step for point in history] == list(range(4, STEPS + 1, 4))
    assert run.data.metrics["validation/L_MSE"] == pytest.approx(result.metrics["validation/L_MSE"])
    assert [f.path for f in client.list_artifacts(run.info.run_id, "validation")] == [
        f"validation/step_{step:07d}.png" for step in range(20, STEPS + 1, 20)
    ]
    assert yaml.safe_load(cp2image.load(config.train.output).config)["train"]["steps"] == STEPS
    assert len(client.search_logged_models([run.info.experiment_id])) == 1


def copy_of(config, folder):
    """The same experiment with its outputs copied to another place."""
    shutil.copytree(config.train.output, folder / "checkpoint")
    return experiment(folder, config.train.input, tracking=True, steps=STEPS)


def never(*_, **__):
    raise AssertionError("trained again")


def test_finished_run_is_returned_as_it_is(undisturbed, monkeypatch):
    config, result = undisturbed
    monkeypatch.setattr(training, "_fit", never)
    assert train(config) == training.TrainingResult(
        config.train.output, STEPS, result.metrics, result.run_id, 0
    )
    assert len(mlflow_runs(config)[1]) == 1


def test_run_killed_before_its_model_was_logged_logs_it_when_started_again(
    undisturbed, tmp_path, monkeypatch
):
    config = copy_of(undisturbed[0], tmp_path)
    Path(config.train.output, "_resume", "recorded.json").unlink()
    monkeypatch.setattr(training, "_fit", never)
    result = train(config)
    client, (run,) = mlflow_runs(config)
    assert (result.steps, result.run_id, run.info.status) == (STEPS, run.info.run_id, "FINISHED")
    assert len(client.search_logged_models([run.info.experiment_id])) == 1
    train(config)
    assert len(client.search_logged_models([run.info.experiment_id])) == 1


def test_other_settings_into_a_finished_output_are_refused(undisturbed, tmp_path):
    config = copy_of(undisturbed[0], tmp_path)
    other = experiment(tmp_path, config.train.input, gamma_ramp=7)
    with pytest.raises(CheckpointError, match=r"holds a checkpoint of other settings.*120 steps"):
        train(other)
    assert_same_weights(other, undisturbed[0])


def test_other_settings_into_an_interrupted_output_are_refused(undisturbed, tmp_path):
    config = copy_of(undisturbed[0], tmp_path)
    Path(config.train.output, "checkpoint.json").unlink()
    before = read_state(config.train.output)
    with pytest.raises(CheckpointError, match="holds an interrupted run of other settings"):
        train(experiment(tmp_path, config.train.input, gamma_ramp=7))
    assert read_state(config.train.output) == before


def test_dataset_without_features_is_refused_before_anything_is_written(tmp_path, ray_session):
    def without_features(names):
        return [name for name in names if name not in FEATURES]

    bare = write_dataset(tmp_path / "bare", columns=without_features)
    config = experiment(tmp_path / "run", bare, tracking=True)
    with pytest.raises(DatasetError, match=r"no CellProfiler features; run jobs/measure\.py"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("preset", ["paper", "cp2image-s"])
def test_two_ranks_end_with_the_same_weights_those_of_averaged_gradients(
    tmp_path, cells, ray_session, preset
):
    """Oracle: two recipes side by side in this process, whose gradients are averaged by hand."""
    steps = 6
    own = {"learning_rate": None, "gamma_ramp": 2500, "bf16": False}  # rounding that can be told
    chosen = {"paper": {}, "cp2image-s": own}[preset]
    config = experiment(tmp_path, cells, steps=steps, workers=2, preset=preset, **chosen)
    plan = plan_of(config)
    tables = tables_of(plan)
    shares = [cells_of(plan, rank, 2, tables) for rank in range(2)]
    first, second = run_two_ranks(ray_session, plan, shares, tmp_path / "meeting")
    assert all(np.array_equal(first[name], second[name]) for name in first)

    torch.set_num_threads(1)
    loops = [TrainingLoop(plan, *shares[rank], rank=rank, world=2) for rank in range(2)]
    barrier, seen = threading.Barrier(2), {}

    def averaged_by_hand(rank):
        def average(gradients):
            seen[rank] = [gradient.clone() for gradient in gradients]
            barrier.wait()
            for gradient, one, other in zip(gradients, seen[0], seen[1], strict=True):
                gradient.copy_((one + other) / 2)
            barrier.wait()

        for step in range(steps):
            loops[rank].recipe.reached(step / steps)
            loops[rank].recipe.step(loops[rank]._batch(step), step, average)

    threads = [threading.Thread(target=averaged_by_hand, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = loops[0].recipe.state(), loops[1].recipe.state()
    for name in first:
        if name.endswith(("running_mean", "running_var")):  # averaged when the run is saved
            mean = (expected[0][name] + expected[1][name]) / 2
            np.testing.assert_allclose(first[name], mean.numpy(), rtol=1e-4, atol=1e-5)
        else:
            one = expected[0][name].detach().numpy()
            np.testing.assert_allclose(first[name], one, rtol=1e-3, atol=1e-5, err_msg=name)


def children_of(parent):
    """Return the processes below one: pid → command line (Linux)."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # gone meanwhile
            continue
        if int(status.rpartition(")")[2].split()[1]) == parent:
            found |= {int(folder.name): command, **children_of(int(folder.name))}
    return found


def is_running(process):
    """Tell whether a process is there and more than a name that its parent has not asked for."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_for_step(config, step, alive):
    """Wait until a run has saved a state of at least this step."""
    while (read_state(config.train.output) or {"step": 0})["step"] < step:
        assert alive(), "training ended before it could be killed"
        time.sleep(0.02)


def test_killed_worker_of_two_is_replaced_and_the_run_ends_as_undisturbed(
    tmp_path, cells, ray_session
):
    config = experiment(tmp_path / "killed", cells, steps=STEPS, workers=2)
    killed = []

    def kill_one_worker():
        wait_for_step(config, 12, alive=training_thread.is_alive)
        workers = [p for p, name in children_of(os.getpid()).items() if "RayTrainWorker" in name]
        killed.extend(workers[:1])
        os.kill(workers[0], signal.SIGKILL)

    results = []
    training_thread = threading.Thread(target=lambda: results.append(train(config)))
    training_thread.start()
    kill_one_worker()
    before = read_state(config.train.output)["step"]
    training_thread.join()
    assert killed
    assert before < STEPS
    assert results[0].steps == STEPS

    other = experiment(tmp_path / "undisturbed", cells, steps=STEPS, workers=2)
    plan = plan_of(other)
    shares = [cells_of(plan, rank, 2) for rank in range(2)]
    run_two_ranks(ray_session, plan, shares, tmp_path / "meeting")
    assert_same_weights(config, other)


@pytest.mark.timeout(600)
def test_killed_driver_goes_on_when_the_job_is_started_again(tmp_path, cells, plain):
    config = experiment(tmp_path / "run", cells, tracking=True, steps=STEPS)
    file = tmp_path / "experiment.yaml"
    file.write_text(config.yaml())
    command = [sys.executable, "jobs/train.py", "--config", str(file)]
    outside = {"RAY_ADDRESS", "MLFLOW_TRACKING_URI", "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    environment = {k: v for k, v in os.environ.items() if k not in outside}

    driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    wait_for_step(config, 12, alive=lambda: driver.poll() is None)
    orphans = children_of(driver.pid)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    writers = [pid for pid, name in orphans.items() if "RayTrainWorker" in name]
    while any(map(is_running, writers)):
        time.sleep(0.1)
    for pid in filter(is_running, orphans):  # Ray's agents outlive a killed driver for a while
        os.kill(pid, signal.SIGKILL)
    reached = read_state(config.train.output)["step"]
    assert 12 <= reached < STEPS
    assert not Path(config.train.output, "checkpoint.json").exists()

    again = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert again.returncode == 0, again.stderr
    assert f"{STEPS} steps (resumed from step {reached})" in again.stdout
    assert_same_weights(config, plain)
    client, (run,) = mlflow_runs(config)
    assert run.info.status == "FINISHED"
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/L_MSE")]
    assert sorted(set(steps)) == list(range(4, STEPS + 1, 4))
    assert len(client.search_logged_models([run.info.experiment_id])) == 1


def test_diverging_training_is_refused_at_once_and_its_run_fails(tmp_path, cells, ray_session):
    config = experiment(tmp_path, cells, tracking=True, learning_rate=1e30, log_every=1)
    with pytest.raises(TrainingError, match=r"not finite; lower train\.learning_rate"):
        train(config)
    client, (run,) = mlflow_runs(config)
    assert run.info.status == "FAILED"
    history = client.get_metric_history(run.info.run_id, "train/L_MSE")
    assert [point.step for point in history] == [1]  # once: it was not tried again
    assert read_state(config.train.output) is None
