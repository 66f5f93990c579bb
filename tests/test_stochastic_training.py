"""cp2image-s through the training loop, the checkpoint and the model that draws."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import cp2image
from cp2image.config import Config
from cp2image.errors import ConfigError, TrainingError
from cp2image.models.stochastic_recipe import StochasticRecipe
from cp2image.training_loop import TrainingLoop
from tests.training_experiments import (
    assert_same_weights,
    cells_of,
    experiment,
    plan_of,
    run_loop,
    write_dataset,
)

STEPS = 12


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("training") / "cells")


def settings(folder, cells, **more):
    own = {"preset": "cp2image-s", "learning_rate": None, "gamma_ramp": 2500, "steps": STEPS} | more
    return experiment(folder, cells, **own)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cells):
    config = settings(tmp_path_factory.mktemp("runs") / "whole", cells)
    run_loop(plan_of(config))
    return config


@pytest.fixture(scope="module")
def model(trained):
    return cp2image.load(trained.train.output)


def profiles(model, count=5):
    values = np.random.default_rng(0).normal(size=(count, len(model.features)))
    frame = pd.DataFrame(values, columns=list(model.features))
    return frame.assign(
        Metadata_Plate="P1",
        Metadata_Well="A01",
        Metadata_Site=1,
        Metadata_ImageNumber=1,
        Metadata_ObjectNumber=np.arange(count) + 1,
    )


def test_checkpoint_says_what_it_holds(model):
    assert model.card.preset == "cp2image-s"
    assert model.intensity.kind == "screen_percentile"
    assert (model.scaling.plates, model.scaling.per_plate) == ((), False)
    assert model.card.metrics["validation/L_MSE"] > 0


def test_the_published_network_keeps_its_own_normalisation(trained):
    assert Config().train.intensity == "per_patch_max"
    assert trained.train.intensity == "screen_percentile"
    assert (Config().scaled_by, trained.scaled_by) == ("plate", "screen")
    by_plate = trained.scaling.model_copy(update={"by": "plate"})
    assert trained.model_copy(update={"scaling": by_plate}).scaled_by == "plate"
    chosen = trained.train.model_copy(update={"normalisation": "per_patch_max"})
    assert chosen.intensity == "per_patch_max"


def test_a_seed_is_a_draw_and_a_cell_keeps_its_noise(model):
    frame = profiles(model)
    drawn = model.generate(frame, seed=1)
    np.testing.assert_array_equal(model.generate(frame, seed=1), drawn)
    assert (model.generate(frame, seed=2) != drawn).any(axis=(1, 2, 3)).all()
    for rows in ([3], [4, 0], [2, 1, 3]):
        np.testing.assert_array_equal(model.generate(frame.iloc[rows], seed=1), drawn[rows])


def test_cells_of_the_same_profile_differ(model):
    frame = profiles(model)
    same = frame.assign(**{name: frame[name].iloc[0] for name in model.features})
    drawn = model.generate(same)
    assert len({patch.tobytes() for patch in drawn}) == len(same)


@pytest.mark.parametrize("killed", [1, 3, 4, STEPS - 2])
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    tmp_path, cells, trained, monkeypatch, killed
):
    """While the autoencoder learns, between that and the adversary, and while rates fall."""
    config = settings(tmp_path / "run", cells)
    step = StochasticRecipe.step

    def dying(self, batch, number, average):
        if number == killed:
            raise InterruptedError
        return step(self, batch, number, average)

    with monkeypatch.context() as patched:
        patched.setattr(StochasticRecipe, "step", dying)
        with pytest.raises(InterruptedError):
            run_loop(plan_of(config))
    run_loop(plan_of(config))
    assert_same_weights(config, trained)


def test_nothing_is_validated_before_there_is_an_adversary(tmp_path, cells):
    """A quarter of the steps are the autoencoder's, the next twentieth has no adversary."""
    plan = plan_of(settings(tmp_path / "run", cells, validate_every=1))
    reports = []
    TrainingLoop(plan, *cells_of(plan)).run(reports.append)
    assert [report["step"] for report in reports] == list(range(5, STEPS + 1))
    assert all(report["validation/L_MSE"] > 0 for report in reports)


def test_every_part_shows_a_loss_of_its_own(tmp_path, cells, capsys):
    run_loop(plan_of(settings(tmp_path / "run", cells, log_every=1)))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = [line[line.index("step") + 4] for line in lines if "cells/s" in line]
    assert shown == ["L_MSE"] * 3 + ["L_energy"] + ["L_generator"] * (STEPS - 4)


def test_a_training_that_ends_before_the_generator_learned_is_not_published(tmp_path, cells):
    config = settings(tmp_path / "run", cells, steps=1)
    with pytest.raises(TrainingError, match="learned nothing yet: what comes before the adversary"):
        run_loop(plan_of(config))
    assert not Path(config.train.output, "checkpoint.json").exists()


def test_the_learning_rates_end_near_zero(tmp_path, cells):
    config = settings(tmp_path / "run", cells)
    loop = run_loop(plan_of(config))
    rate = loop.recipe.generator_optimiser.param_groups[0]["lr"]
    assert rate == pytest.approx(6e-4 * (1 / STEPS) / (0.7 * 0.6))


def test_parts_can_be_switched_off(tmp_path, cells, trained):
    off = {"energy": 0.0, "regression": 0.0, "penalty": 0.0, "ema": 0.0}
    config = settings(tmp_path / "off", cells, stochastic=off)
    run_loop(plan_of(config))
    with pytest.raises(AssertionError):
        assert_same_weights(config, trained)


def test_settings_that_make_no_sense_are_refused(tmp_path, cells):
    with pytest.raises((ConfigError, ValueError), match="ema"):
        settings(tmp_path / "x", cells, stochastic={"ema": 1.0})


@pytest.mark.parametrize(
    ("capabilities", "asked", "found"),
    [
        ({"avx512_bf16": True}, None, True),
        ({"amx_bf16": True}, None, True),
        ({"avx512_f": True, "amx_bf16": False}, None, False),
        ({"avx512_bf16": True}, False, False),
        ({}, True, True),
        ({"amx_bf16": True}, "auto", True),
        ({"avx512_f": True}, "auto", False),
    ],
)
def test_bf16_by_itself_where_the_processor_multiplies_in_it(
    tmp_path, cells, monkeypatch, capabilities, asked, found
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    plan = plan_of(settings(tmp_path / "run", cells, bf16=asked))
    assert TrainingLoop(plan, *cells_of(plan)).recipe.bf16 is found


def test_the_published_network_stays_in_float32_unless_asked(tmp_path, cells, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    plan = plan_of(experiment(tmp_path / "run", cells))
    assert TrainingLoop(plan, *cells_of(plan)).recipe.bf16 is False
    plan = plan_of(experiment(tmp_path / "asked", cells, bf16="auto"))
    assert TrainingLoop(plan, *cells_of(plan)).recipe.bf16 is True
