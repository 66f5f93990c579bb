"""One rank's training, without Ray."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import cp2image
from cp2image.checkpoint import load_model
from cp2image.data.intensity import Intensity
from cp2image.data.schema import decode_patches
from cp2image.dataset import open_dataset
from cp2image.errors import CheckpointError, DatasetError, TrainingError
from cp2image.models.recipe import PaperRecipe
from cp2image.tracking import NoRecorder
from cp2image.training import fingerprint
from cp2image.training_cells import CellArrays, TrainingRead
from cp2image.training_loop import TrainingLoop, read_state
from tests.training_experiments import (
    CONSTANT,
    EMPTY,
    HOLES,
    INFINITE,
    SHAPE,
    assert_same_weights,
    cells_of,
    experiment,
    plan_of,
    run_loop,
    tables_of,
    weights,
    write_dataset,
)

STEPS = 40


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("training") / "cells")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


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


@pytest.mark.parametrize(("channels", "kind"), [(1, np.uint8), (3, np.uint16), (5, np.uint16)])
def test_any_number_of_channels_is_normalised(channels, kind):
    random = np.random.default_rng(channels)
    patches = random.integers(0, 250, (7, channels, 6, 5)).astype(kind)
    patches[2, 0] = 0  # a channel without signal
    limits = Intensity().limits(patches, [""] * 7, 255.0)
    cells = CellArrays(patches, np.zeros((7, 2), np.float32), *limits, *np.zeros((2, 7), int))
    rows = np.array([6, 2, 2])
    found = cells.normalised(rows, torch.device("cpu"))
    expected = Intensity().apply(patches[rows], [""] * 3, 255.0)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert cells.normalised(rows[:0], torch.device("cpu")).shape == (0, channels, 6, 5)


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


def test_an_interrupted_training_of_another_version_is_refused(tmp_path, cells, monkeypatch):
    config = experiment(tmp_path, cells)
    interrupt(monkeypatch, config, at_step=30)
    complete = PaperRecipe.load_state

    def wanting_more(self, state):
        complete(self, {k: v for k, v in state.items() if k != "generator.linear.weight"})

    monkeypatch.setattr(PaperRecipe, "load_state", wanting_more)
    with pytest.raises(CheckpointError, match="another version began it"):
        run_loop(plan_of(config))
    assert read_state(config.train.output)["step"] == 28


def test_loop_interrupted_before_its_checkpoint_makes_it_with_all_metrics(
    tmp_path, cells, plain, monkeypatch
):
    config = experiment(tmp_path, cells)

    def dying(self, metrics, seconds):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(TrainingLoop, "_finish", dying)
        with pytest.raises(Killed):
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


def test_a_diverging_preset_with_rates_of_its_own_names_its_own(tmp_path, cells):
    stochastic = {"learning_rate": 1e30, "autoencoder": 0.1, "alone": 0, "warmup": 0}
    preset = {"preset": "cp2image-s", "learning_rate": None, "gamma_ramp": 2500}
    config = experiment(tmp_path, cells, stochastic=stochastic, **preset)
    names_it = r"not finite; lower train\.stochastic\.learning_rate \(1e\+30\)"
    with pytest.raises(TrainingError, match=names_it):
        run_loop(plan_of(config))


def test_fingerprint_tells_settings_and_data_apart_but_not_their_amount(tmp_path, cells):
    dataset = open_dataset(cells)
    mark = fingerprint(experiment(tmp_path, cells), dataset)
    assert mark == fingerprint(
        experiment(
            tmp_path / "x", cells, steps=9, minutes=2, log_every=1, threads=2, max_failures=0
        ),
        dataset,
    )
    others = [{"gamma_ramp": 5}, {"learning_rate": 0.1}, {"batch_size": 9}, {"workers": 2}]
    marks = {fingerprint(experiment(tmp_path, cells, **other), dataset) for other in others}
    fewer = open_dataset(write_dataset(tmp_path / "fewer", ["P1", "P2"]))
    marks |= {mark, fingerprint(experiment(tmp_path, cells), fewer)}
    assert len(marks) == len(others) + 2


@pytest.mark.parametrize(("balance", "share"), [("treatment", 1 / 3), ("cell", 1 / 2)])
def test_half_the_cells_are_dmso_and_balance_says_how_often_they_are_drawn(
    tmp_path, cells, balance, share
):
    config = experiment(tmp_path / balance, cells, balance=balance, batch_size=12)
    plan = plan_of(config)
    loop = TrainingLoop(plan, *cells_of(plan))
    control = plan.preparation.treatments.index("DMSO 0.1")
    train, _ = cells_of(plan)
    drawn = np.concatenate([loop._sampler.draw(step) for step in range(200)])
    assert np.mean(train.treatments[drawn] == control) == pytest.approx(share, abs=0.04)


def test_the_saved_checkpoint_draws_validation_cells_as_well_as_training_said(cells, plain):
    config, _ = plain
    model, dataset = load_model(config.train.output), open_dataset(cells)
    losses = []
    for table in dataset.read():
        frame = table.drop_columns("patch").to_pandas()
        held_out = model.splits.of(frame) == "validation"
        plates = frame["Metadata_Plate"].tolist()
        patches = decode_patches(table, dataset.patch_format)
        real = model.intensity.apply(patches, plates, dataset.patch_format.full_scale)
        drawn = model.generate(frame) / 255
        losses.append(0.5 * ((real - drawn)[held_out] ** 2).sum(axis=(1, 2, 3)))
    said = model.card.metrics["validation/L_MSE"]
    assert np.concatenate(losses).mean() == pytest.approx(said, rel=0.01)


def test_ranges_come_in_order_and_whole_however_many_threads_read(tmp_path, cells):
    plan = plan_of(experiment(tmp_path, cells))
    dataset = open_dataset(plan.config.train.input)
    alone, many = (TrainingRead(dataset, plan.preparation, 7, threads=n) for n in (1, 3))
    numbers = {"id": np.arange(len(alone.ranges))}
    expected, found = list(alone(numbers)), list(many(numbers))
    assert len(found) == len(expected) > 6
    assert all(one.equals(other) for one, other in zip(found, expected, strict=True))


def test_reading_ahead_ends_with_the_consumer_and_tells_errors(tmp_path, cells, monkeypatch):
    plan = plan_of(experiment(tmp_path, cells))
    read = TrainingRead(open_dataset(plan.config.train.input), plan.preparation, 7, threads=2)
    begun, plain = [], TrainingRead._read

    def follow(self, unit):
        begun.append(unit.index)
        if unit.start >= 28:
            raise DatasetError("damaged")
        return plain(self, unit)

    monkeypatch.setattr(TrainingRead, "_read", follow)
    tables = read({"id": np.arange(len(read.ranges))})
    next(tables)
    tables.close()
    assert len(begun) <= 3
    with pytest.raises(DatasetError, match="damaged"):
        list(read({"id": np.arange(len(read.ranges))}))
