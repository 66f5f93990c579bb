"""The course of a search, with trials that are only judged, not trained."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cp2image import tuning
from cp2image.config import Config
from cp2image.config_reading import read_config
from cp2image.errors import ConfigError, TuningError
from cp2image.metrics.validation import ValidationScores
from cp2image.training_loop import TrainingLoop, adopt_state, read_state
from cp2image.tuning import tune
from cp2image.tuning_runs import Sweep
from cp2image.tuning_table import Trial, TrialTable
from tests.training_experiments import (
    assert_same_weights,
    cells_of,
    experiment,
    plan_of,
    run_loop,
    write_dataset,
)

SPACE = {"train.gamma.1": {"low": 0.01, "high": 10, "zero": True}}
REFERENCES = {"gamma-1": {"train.gamma.1": 1.0}, "gamma-0": {"train.gamma.1": 0.0}}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("course") / "cells", plates=("P1", "P2"))


def search(folder, cells, **changes):
    sections = experiment(folder, cells, validate_every=10).model_dump()
    sections["tune"] |= {
        "space": SPACE,
        "references": REFERENCES,
        "objective": {"metric": "validation/L_MSE", "floors": {}},
        "trials": 8,
        "seeds": [1, 2],
        "finalists": 1,
        "output": "",
        **changes,
    }
    return Config.model_validate(sections).resolve()


def best_at(value):
    """Judge by how near γ₁ is to a value; 0 counts as 0.001; seeds differ a little."""

    def judge(trial):
        gamma = trial.values["train.gamma.1"] or 0.001
        return 10 + abs(math.log10(gamma / value)) + 0.01 * trial.seed

    return judge


class Killed(BaseException):
    pass


@pytest.fixture
def judged(inline, monkeypatch):
    """Judge trials instead of training them; die after so many reports if told to."""

    def apply(judge, reports=10**6, parallel=2):
        left = reports

        def run(sweep, wanted, over, *, stops_early):
            nonlocal left
            running, none_left = [], False
            while running or not none_left:
                while len(running) < parallel and not none_left:
                    trial = wanted()
                    none_left = trial is None
                    running += [] if none_left else [trial.number]
                for number in list(running):
                    trial = sweep.table[number]
                    if left == 0:
                        raise Killed
                    left -= 1
                    step, score = min(trial.step + 10, trial.steps), judge(trial)
                    numbers = {"step": step, "score": score, "validation/L_MSE": score}
                    trial = trial.reported(numbers)
                    done = step == trial.steps
                    sweep.table.put(replace(trial, status="complete" if done else "running"))
                    if done:
                        running.remove(number)
                        over(sweep.table[number])

        monkeypatch.setattr(tuning, "run_trials", run)

    return apply


def test_finalists_and_references_get_every_seed_and_the_best_is_written(tmp_path, cells, judged):
    judged(best_at(0.1))
    config = search(tmp_path, cells)
    found = tune(config)
    trials = TrialTable(config.tune.output).trials
    assert [trial.name for trial in trials[:3]] == ["gamma-1", "gamma-0", ""]
    finals = [(trial.name, trial.seed) for trial in trials[8:]]
    best = min(trials[:8], key=lambda trial: trial.score)
    names = ["gamma-1", "gamma-0", f"trial-{best.number}"]
    assert finals == [(name, seed) for name in names for seed in (1, 2)]
    assert found.best == best.values
    written = read_config(str(Path(config.tune.output, "result", "best.yaml")))
    assert written.train.gamma[0] == found.best["train.gamma.1"]
    assert (written.split.seed, written.run.seed, written.train.steps) == (3, 3, 40)
    row = found.finalists.set_index("name").loc["gamma-1"]
    assert (row["mean"], row["seeds"]) == (pytest.approx(11.015), 2)
    assert "ahead of gamma-1, more than twice the standard error" in found.text
    table = pd.read_csv(Path(config.tune.output, "result", "trials.csv"))
    assert table["train.gamma.1"].tolist() == [trial.values["train.gamma.1"] for trial in trials]


def test_a_search_that_finds_nothing_better_says_so(tmp_path, cells, judged):
    judged(best_at(1))
    assert "nothing better than the reference gamma-1" in tune(search(tmp_path, cells)).text


def test_without_finalists_the_references_of_the_search_are_compared_with(tmp_path, cells, judged):
    judged(best_at(1))
    config = search(tmp_path, cells, finalists=0)
    assert "nothing better than the reference gamma-1" in tune(config).text
    assert len(TrialTable(config.tune.output).trials) == 8
    judged(best_at(0.1))
    text = tune(search(tmp_path / "other", cells, finalists=0)).text
    assert "ahead of gamma-1, on one seed only." in text
    assert "does not" not in text


def test_a_lead_within_the_spread_of_the_seeds_is_called_that(tmp_path, cells, judged):
    noise = np.random.default_rng(0)
    judged(lambda trial: 10 - (trial.name == "") * 0.01 + noise.normal())
    found = tune(search(tmp_path, cells, finalists=3))
    winner = found.finalists["name"].iloc[0]
    assert "no more than twice" in found.text or winner in REFERENCES


def test_a_search_of_which_nothing_meets_the_floor_says_so_and_registers_nothing(
    tmp_path, cells, judged, monkeypatch
):
    judged(lambda trial: 2e9)
    monkeypatch.setattr(tuning, "_register", lambda *_: pytest.fail("registered"))
    text = tune(search(tmp_path, cells)).text
    assert "| 2 of 2 below a floor |" in text
    assert "No settings met the floors" in text


def test_one_seed_below_the_floor_is_below_the_floor(tmp_path, cells, judged):
    def judge(trial):
        falls = trial.kind == "final" and trial.name != "gamma-0" and trial.seed == 2
        return 1.01e9 if falls else best_at(0.1)(trial)

    judged(judge)
    found = tune(search(tmp_path, cells))
    rows = found.finalists.set_index("name")
    assert found.finalists["name"].iloc[0] == "gamma-0"
    assert rows.loc["gamma-1", "below"] == 1
    assert rows.loc["gamma-1", "mean"] == pytest.approx(1.01e9)
    assert "| gamma-1 | 1 of 2 below a floor | — | 2 |" in found.text
    assert "e+0" not in found.text


@pytest.mark.parametrize("changed", [{"validation_cells": 40}, {"validate_every": 20}])
def test_a_search_is_not_gone_on_with_on_other_cells_or_steps(tmp_path, cells, judged, changed):
    judged(best_at(1))
    config = search(tmp_path, cells)
    tune(config)
    train = config.train.model_copy(update=changed)
    with pytest.raises(TuningError, match="other settings or data"):
        tune(config.model_copy(update={"train": train}))


@pytest.mark.parametrize("kind", ["optuna", "random", "population"])
@pytest.mark.parametrize("reports", [1, 5, 14, 23, 35, 41])
def test_wherever_it_is_killed_it_ends_with_every_trial_once(
    tmp_path, cells, judged, kind, reports
):
    config = search(tmp_path, cells, search=kind, generations=2)
    judged(best_at(0.1), reports)
    with pytest.raises(Killed):
        tune(config)
    killed = {trial.number: trial for trial in TrialTable(config.tune.output).trials}
    judged(best_at(0.1))
    tune(config)
    trials = TrialTable(config.tune.output).trials
    assert [trial.number for trial in trials] == list(range(14))
    assert {trial.status for trial in trials} == {"complete"}
    for number, before in killed.items():
        after = trials[number]
        assert (after.values, after.seed, after.steps) == (
            before.values,
            before.seed,
            before.steps,
        )
        assert after.history[: len(before.history)] == before.history
        assert before.status == "running" or after == before


def test_an_interrupted_population_becomes_what_an_undisturbed_one_does(tmp_path, cells, judged):
    sweeps = []
    for name, reports in (("whole", None), ("killed", 11)):
        config = search(tmp_path / name, cells, search="population", generations=4)
        if reports:
            judged(best_at(0.1), reports)
            with pytest.raises(Killed):
                tune(config)
        judged(best_at(0.1))
        tune(config)
        sweeps.append(TrialTable(config.tune.output).trials)
    assert sweeps[0] == sweeps[1]
    members = sweeps[0][:8]
    assert [trial.steps for trial in members] == [10, 10, 20, 20, 30, 30, 40, 40]
    assert [trial.parent for trial in members[:2]] == [None, None]
    for trial in members[2:]:
        assert sweeps[0][trial.parent].generation == trial.generation - 1
    assert members[2].parent == members[3].parent == 0  # γ = 0 took over from γ = 1


def test_too_small_a_population_is_refused(tmp_path, cells, judged):
    judged(best_at(1))
    with pytest.raises(ConfigError, match="expected at least 16"):
        tune(search(tmp_path, cells, search="population", generations=8))


def test_when_all_trials_fail_the_search_ends_with_their_reason(
    tmp_path, cells, inline, monkeypatch
):
    started = []

    def fail(sweep, wanted, over, *, stops_early):
        while trial := wanted():
            started.append(trial)
            failed = replace(trial, status="failed", reason="no space left")
            sweep.table.put(failed)
            over(failed)

    monkeypatch.setattr(tuning, "run_trials", fail)
    with pytest.raises(TuningError, match=r"first 3 trials failed: no space left"):
        tune(search(tmp_path, cells))
    assert len(started) == 3


def test_another_search_in_the_same_folder_is_refused(tmp_path, cells, judged):
    judged(best_at(1))
    tune(search(tmp_path, cells))
    tune(search(tmp_path, cells, trials=9, parallel=1, seeds=[1]))
    with pytest.raises(TuningError, match="holds a search with other settings"):
        tune(search(tmp_path, cells, objective={"metric": "train/L_MSE", "floors": {}}))


def test_a_member_that_takes_over_a_state_trains_on_as_its_owner_would(tmp_path, cells):
    owner = experiment(tmp_path / "owner", cells, steps=8)
    run_loop(plan_of(owner))
    heir = experiment(tmp_path / "heir", cells, steps=16, gamma_ramp=7)
    mark = plan_of(heir).fingerprint
    assert not adopt_state(str(tmp_path / "nowhere"), heir.train.output, mark)
    assert adopt_state(owner.train.output, heir.train.output, mark)
    about = read_state(heir.train.output)
    assert (about["step"], about["run_id"], about["fingerprint"]) == (8, "", mark)
    begun = TrainingLoop(plan_of(heir), *cells_of(plan_of(heir)))
    begun._resume()
    assert begun.step == 8
    same = experiment(tmp_path / "same", cells, steps=16)
    adopt_state(owner.train.output, same.train.output, plan_of(same).fingerprint)
    run_loop(plan_of(same))
    run_loop(plan_of(experiment(tmp_path / "owner", cells, steps=16)))
    assert_same_weights(same, owner)
    run_loop(plan_of(heir))
    with pytest.raises(AssertionError):
        assert_same_weights(heir, owner)


def test_training_logs_and_reports_the_scores_that_are_asked_for(tmp_path, cells):
    sections = experiment(tmp_path, cells, steps=4, validate_every=4).model_dump()
    sections["split"] |= {"validation": 0.6, "test": 0}
    sections["score"] = {"embeddings": ["cp"], "cells": 70, "families": ["Intensity"]}
    config = Config.model_validate(sections)
    plan = plan_of(config)
    loop = TrainingLoop(plan, *cells_of(plan))
    reports = []
    loop.run(reports.append)
    found = reports[-1]
    assert {"validation/frechet_cp", "validation/mean_r", "train/L_H4", "step"} <= set(found)
    held_out = loop._validation
    rows = np.arange(70)
    real = held_out.normalised(rows, torch.device("cpu")).numpy()
    scores = ValidationScores(real, ("DNA", "Actin"), ["cp"], ["Intensity"])
    drawn = loop.recipe.draw(held_out.scaled(rows, torch.device("cpu")), torch.from_numpy(rows))
    again = scores.of(drawn.detach().numpy())
    assert found["validation/frechet_cp"] == pytest.approx(again["frechet_cp"], rel=0.01)
    assert found["validation/mean_r"] == pytest.approx(again["mean_r"], abs=0.005)


def test_trials_with_other_seeds_are_judged_on_the_same_cells(tmp_path, cells):
    config = search(tmp_path, cells)
    sweep = Sweep(config, TrialTable(config.tune.output))
    trials = [Trial(seed, {"train.gamma.1": 0.5}, seed, 40) for seed in (3, 7)]
    plans = [plan_of(sweep.config_of(trial)) for trial in trials]
    validation = [plan.preparation.keys["validation"] for plan in plans]
    np.testing.assert_array_equal(*validation)
    assert plans[0].config.run.seed != plans[1].config.run.seed
    np.testing.assert_array_equal(validation[0], plan_of(config).preparation.keys["validation"])
    other = config.model_copy(update={"run": config.run.model_copy(update={"seed": 7})})
    assert not np.array_equal(validation[0], plan_of(other).preparation.keys["validation"])
