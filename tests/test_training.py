import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

import cp2image
from cp2image import training
from cp2image.config import Config
from cp2image.data.schema import PatchFormat, build_table, decode_patches, to_parquet
from cp2image.dataset import Manifest, Part, manifest_uri, open_dataset
from cp2image.errors import CheckpointError, DatasetError, TrainingError
from cp2image.models.recipe import PaperRecipe
from cp2image.profiles import prepare_profiles
from cp2image.tracking import NoRecorder
from cp2image.training import fingerprint, train
from cp2image.training_cells import TrainingRead, load_cells
from cp2image.training_loop import TrainingLoop, TrainingPlan, read_state

ROOT = Path(__file__).resolve().parents[1]
SHAPE = PatchFormat(("DNA", "Actin"), 36)
STEPS = 40
FEATURES = [f"Nuclei_Texture_Contrast_DNA_{i}_00_256" for i in range(1, 13)]
CONSTANT, EMPTY, HOLES, INFINITE = FEATURES[8:]


def plate_of_cells(plate, wells=8, cells=9):
    """Blobs whose brightness and size the first two features tell; hostile features at the end."""
    random = np.random.default_rng(sum(plate.encode()))
    count = wells * cells
    features = pd.DataFrame(random.normal(size=(count, 12)), columns=FEATURES)
    grid = np.hypot(*np.mgrid[-17.5:18, -17.5:18])
    radius = 8 + 2 * features[FEATURES[1]].to_numpy()[:, None, None, None]
    level = 0.6 + 0.1 * features[FEATURES[0]].to_numpy()[:, None, None, None]
    blobs = level.clip(0.2, 1) / (1 + np.exp(grid[None, None] - radius))
    pixels = blobs + 0.02 * random.random((count, 2, 36, 36))
    features[CONSTANT] = 3.25
    features[EMPTY] = np.nan
    features.loc[::40, HOLES] = np.nan
    features.loc[::40, INFINITE] = np.inf
    features.loc[1, INFINITE] = -np.inf
    metadata = pd.DataFrame(
        {
            "Metadata_Plate": plate,
            "Metadata_Well": np.repeat([f"A{i + 1:02d}" for i in range(wells)], cells),
            "Metadata_Site": 1,
            "Metadata_ImageNumber": np.repeat(np.arange(wells) + 1, cells),
            "Metadata_ObjectNumber": np.tile(np.arange(cells) + 1, wells),
            "Metadata_Compound": np.repeat(["DMSO", "taxol", "DMSO", "nocodazole"], 2 * cells),
            "Metadata_Concentration": 0.1,
        }
    )
    patches = (pixels.clip(0, 1) * 65535).astype(np.uint16)
    return build_table(metadata, features, patches, SHAPE)


def write_dataset(folder, plates=("P1", "P2", "P3"), columns=None):
    for plate in plates:
        table = plate_of_cells(plate)
        table = table if columns is None else table.select(columns(table.column_names))
        data = to_parquet(table, row_group=20)
        part = folder / f"plate={plate}" / "part-00000.parquet"
        part.parent.mkdir(parents=True)
        part.write_bytes(data)
        parts = (Part(f"plate={plate}/part-00000.parquet", table.num_rows, len(data)),)
        manifest = Path(manifest_uri(str(folder), plate))
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_bytes(Manifest(plate, "cells", parts).to_json())
    return str(folder)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("training") / "cells")


def experiment(folder, cells, tracking=False, **settings):
    sections = {
        "run": {"folder": str(folder), "seed": 3},
        "cluster": {"cells_per_task": 30, "cpus": 2},
        "split": {"by": "well", "validation": 0.2, "test": 0.1},
        "scaling": {"min_controls": 5},
        "train": {
            "input": cells,
            "learning_rate": 0.003,
            "gamma_ramp": 4,
            "steps": STEPS,
            "batch_size": 8,
            "threads": 1,
            "log_every": 4,
            "validate_every": 20,
            "checkpoint_every": 4,
            **settings,
        },
        "tracking": {"enabled": tracking},
    }
    return Config.model_validate(sections).resolve()


def weights(config):
    return load_file(Path(config.train.output) / "weights.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def undisturbed(runs, cells, ray_session):
    """One complete run on Ray Train, recorded: its config and its result."""
    config = experiment(runs / "undisturbed", cells, tracking=True)
    return config, train(config)


# Without Ray: one rank's loop.


def plan_of(config, recorder=None):
    dataset = open_dataset(config.train.input)
    preparation = prepare_profiles(dataset, config)
    mark = fingerprint(config, dataset)
    return TrainingPlan(config, preparation, dataset.patch_format, recorder or NoRecorder(), mark)


def tables_of(plan):
    dataset = open_dataset(plan.config.train.input)
    read = TrainingRead(dataset.ranges(30), plan.preparation)
    return [read({"id": np.array([i])}) for i in range(len(dataset.ranges(30)))]


def cells_of(plan, rank=0, world=1, tables=None, validation_cells=1000):
    tables = tables_of(plan) if tables is None else tables
    return load_cells(
        tables,
        plan.preparation,
        plan.patch_format,
        rank=rank,
        world=world,
        validation_cells=validation_cells,
    )


def run_loop(plan):
    train_cells, validation = cells_of(plan)
    torch.set_num_threads(1)
    loop = TrainingLoop(plan, train_cells, validation)
    loop.run(lambda metrics: None)
    return loop


class Diary(NoRecorder):
    """Keeps what a loop records."""

    def __init__(self):
        self.lines = []
        self.pictures = []

    def metrics(self, values, step=0):
        self.lines.append((step, dict(values)))

    def picture(self, figure, name):
        self.pictures.append(name)

    def all(self, name):
        return {step: values[name] for step, values in self.lines if name in values}


@pytest.fixture(scope="module")
def plain(runs, cells):
    """The same training as `undisturbed`, in this process: its config and its diary."""
    config, diary = experiment(runs / "plain", cells), Diary()
    run_loop(plan_of(config, diary))
    return config, diary


def test_losses_fall(plain):
    _, diary = plain
    losses = list(diary.all("train/L_MSE").values())
    assert len(losses) == STEPS / 4
    assert np.mean(losses[-3:]) < 0.5 * losses[0]
    assert set(diary.lines[0][1]) == {
        *(f"train/{name}" for name in ("L_MSE", "L_H1", "L_H2", "L_H3", "L_H4")),
        "train/L_generator",
        "train/L_Dis",
        "train/cells_per_s",
        "train/waiting_share",
    }


def test_recorded_losses_are_means_over_the_steps_since_the_last_line(runs, cells, plain):
    _, diary = plain
    config, every = experiment(runs / "every", cells, log_every=1, steps=4), Diary()
    run_loop(plan_of(config, every))
    single = list(every.all("train/L_MSE").values())
    assert diary.all("train/L_MSE")[4] == pytest.approx(np.mean(single), rel=1e-5)


def test_validation_is_recorded_with_its_floor_and_a_picture(plain):
    _, diary = plain
    assert list(diary.all("validation/L_MSE")) == [20, 40]
    assert diary.pictures == [f"validation/step_00000{step}.png" for step in (20, 40)]
    last = {name: diary.all(f"validation/{name}")[40] for name in ("L_MSE", "below_mean_image")}
    floor = diary.all("validation/L_MSE_mean_image")[40]
    assert last["below_mean_image"] == pytest.approx(1 - last["L_MSE"] / floor)


def test_mean_image_floor_is_that_of_the_validation_patches(cells, plain):
    config, diary = plain
    plan = plan_of(config)
    patches = []
    for table in open_dataset(cells).read():
        raw = decode_patches(table, SHAPE).astype(np.float64)
        of = plan.preparation.splits.of(table.to_pandas())
        patches += [patch / patch.max((1, 2), keepdims=True) for patch in raw[of == "validation"]]
    mean = np.mean(patches, axis=0)
    expected = np.mean([0.5 * ((patch - mean) ** 2).sum() for patch in patches])
    assert diary.all("validation/L_MSE_mean_image")[20] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_training_cell_is_on_exactly_one_rank_whatever_the_order_of_blocks(plain, world):
    plan = plan_of(plain[0])
    tables = tables_of(plan)
    shares = [cells_of(plan, rank, world, tables)[0] for rank in range(world)]
    held = [patch.tobytes() for share in shares for patch in share.patches]
    assert len(held) == len(set(held)) == plan.preparation.counts["train"]
    expected = {
        patch.tobytes()
        for table in open_dataset(plan.config.train.input).read()
        for patch in decode_patches(table, SHAPE)[
            plan.preparation.splits.of(table.to_pandas()) == "train"
        ]
    }
    assert set(held) == expected
    if world > 1:
        assert min(len(share.patches) for share in shares) > len(held) / world / 2
    again = cells_of(plan, world - 1, world, tables[::-1])[0]
    for name in ("patches", "features", "offset", "factor", "treatments"):
        np.testing.assert_array_equal(getattr(again, name), getattr(shares[-1], name))


def test_validation_sample_is_on_rank_0_and_does_not_depend_on_the_order_of_blocks(plain):
    plan = plan_of(plain[0])
    tables = tables_of(plan)
    _, all_cells = cells_of(plan, tables=tables)
    assert len(all_cells.patches) == plan.preparation.counts["validation"]
    _, some = cells_of(plan, tables=tables, validation_cells=5)
    np.testing.assert_array_equal(some.patches, all_cells.patches[:5])
    _, again = cells_of(plan, tables=tables[::-1], validation_cells=5)
    np.testing.assert_array_equal(some.patches, again.patches)
    assert len(cells_of(plan, 1, 2, tables)[1].patches) == 0


def test_rank_without_cells_says_so(plain):
    plan = plan_of(plain[0])
    with pytest.raises(TrainingError, match="worker 0 of 5000 has no training cells"):
        cells_of(plan, 0, 5000, tables_of(plan)[:1])


def test_cells_are_normalised_and_scaled_as_the_checkpoint_says(plain):
    plan = plan_of(plain[0])
    found, _ = cells_of(plan)
    rows = np.array([4, 0, 2])
    expected = plan.preparation.intensity.apply(found.patches[rows], ["P1"] * 3, 65535.0)
    cpu = torch.device("cpu")
    np.testing.assert_allclose(found.normalised(rows, cpu).numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(found.scaled(rows, cpu).numpy(), found.features[rows])
    assert found.features.dtype == np.float32
    assert np.isfinite(found.features).all()
    assert np.abs(found.features).max() <= plan.config.scaling.clip


def test_constant_and_empty_features_are_left_out_and_holes_survive(plain):
    model = cp2image.load(plain[0].train.output)
    assert set(model.card.notes["left_out"]) >= {CONSTANT, EMPTY}
    assert {HOLES, INFINITE} <= set(model.features)
    frame = pd.DataFrame({name: [np.nan, np.inf, 0.0] for name in model.features})
    assert model.generate(frame).shape == (3, 2, 36, 36)
    assert all(value.isfinite().all() for value in weights(plain[0]).values())


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


def interrupt(monkeypatch, config, at_step):
    """Run a loop that dies in the middle of a step."""
    step = PaperRecipe.step

    def dying(self, batch, number, average):
        if number == at_step:
            raise Killed
        return step(self, batch, number, average)

    with monkeypatch.context() as patched:
        patched.setattr(PaperRecipe, "step", dying)
        with pytest.raises(Killed):
            run_loop(plan_of(config))


def test_interrupted_loop_goes_on_to_the_same_weights(tmp_path, cells, plain, monkeypatch):
    config = experiment(tmp_path, cells)
    interrupt(monkeypatch, config, at_step=30)
    assert read_state(config.train.output)["step"] == 28
    assert len(list(Path(config.train.output, "_resume").glob("step-*"))) == 1
    assert run_loop(plan_of(config)).step == STEPS
    assert_same_weights(config, plain[0])


def test_loop_interrupted_before_its_checkpoint_makes_it_with_all_metrics(
    tmp_path, cells, plain, monkeypatch
):
    config = experiment(tmp_path, cells)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(TrainingLoop, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        run_loop(plan_of(config))
    assert read_state(config.train.output)["step"] == STEPS
    run_loop(plan_of(config))
    assert_same_weights(config, plain[0])
    found, expected = (cp2image.load(c.train.output).card for c in (config, plain[0]))
    assert found.metrics == pytest.approx(expected.metrics)
    assert found.steps == STEPS


def test_more_steps_continue_a_finished_loop(tmp_path, cells, plain):
    run_loop(plan_of(experiment(tmp_path, cells, steps=22)))
    longer = experiment(tmp_path, cells)
    run_loop(plan_of(longer))
    assert_same_weights(longer, plain[0])


def test_time_limit_ends_training_at_the_next_line_of_the_log(tmp_path, cells):
    config = experiment(tmp_path, cells, minutes=1e-9)
    assert run_loop(plan_of(config)).step == 4
    assert cp2image.load(config.train.output).card.steps == 4


def test_without_validation_cells_training_ends_with_a_checkpoint(tmp_path, cells):
    config = experiment(tmp_path, cells, steps=4)
    split = config.split.model_copy(update={"validation": 0.0, "test": 0.0})
    config = config.model_copy(update={"split": split})
    run_loop(plan_of(config))
    assert cp2image.load(config.train.output).card.metrics == {}


def test_diverging_training_names_the_learning_rate_and_keeps_no_broken_state(tmp_path, cells):
    config = experiment(tmp_path, cells, learning_rate=1e30, log_every=40)
    with pytest.raises(TrainingError, match=r"step 4: .*not finite; lower train\.learning_rate"):
        run_loop(plan_of(config))
    assert read_state(config.train.output) is None
    with pytest.raises(CheckpointError):
        cp2image.load(config.train.output)


def test_fingerprint_tells_settings_and_data_apart_but_not_their_amount(tmp_path, cells):
    dataset = open_dataset(cells)
    mark = fingerprint(experiment(tmp_path, cells), dataset)
    assert mark == fingerprint(
        experiment(tmp_path / "x", cells, steps=9, minutes=2, log_every=1, threads=2), dataset
    )
    others = [{"gamma_ramp": 5}, {"learning_rate": 0.1}, {"batch_size": 9}, {"workers": 2}]
    marks = {fingerprint(experiment(tmp_path, cells, **other), dataset) for other in others}
    fewer = open_dataset(write_dataset(tmp_path / "fewer", ["P1", "P2"]))
    marks |= {mark, fingerprint(experiment(tmp_path, cells), fewer)}
    assert len(marks) == len(others) + 2


# On Ray Train.


def test_training_on_ray_equals_the_plain_loop(undisturbed, plain):
    config, result = undisturbed
    assert result.steps == STEPS
    assert result.resumed_from == 0
    assert_same_weights(config, plain[0])
    assert not Path(config.train.output, "_ray").exists()


def mlflow_runs(config):
    from mlflow import MlflowClient

    client = MlflowClient(training.record.__globals__["tracking_uri"](config))
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
        f"validation/step_00000{step}.png" for step in (20, 40)
    ]
    assert yaml.safe_load(cp2image.load(config.train.output).config)["train"]["steps"] == STEPS
    assert len(client.search_logged_models([run.info.experiment_id])) == 1


def copy_of(config, folder):
    """The same experiment with its outputs copied to another place."""
    shutil.copytree(config.train.output, folder / "checkpoint")
    return experiment(folder, config.train.input, tracking=True)


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
    with pytest.raises(CheckpointError, match=r"holds a checkpoint of other settings.*40 steps"):
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


def test_two_ranks_end_with_the_same_weights_those_of_averaged_gradients(
    tmp_path, cells, ray_session
):
    """Oracle: two recipes side by side in this process, whose gradients are averaged by hand."""
    steps = 6
    config = experiment(tmp_path, cells, steps=steps, workers=2)
    plan = plan_of(config)
    tables = tables_of(plan)
    shares = [cells_of(plan, rank, 2, tables) for rank in range(2)]
    meeting = f"file://{tmp_path}/meeting"

    def run_rank(rank):
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
        loop = TrainingLoop(plan, *shares[rank], rank=rank, world=2)
        loop.run(lambda metrics: None)
        state = {name: value.numpy() for name, value in loop.recipe.state().items()}
        dist.destroy_process_group()
        return state

    remote = ray_session.remote(num_cpus=1, max_retries=0)(run_rank)
    first, second = ray_session.get([remote.remote(rank) for rank in range(2)], timeout=120)
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
