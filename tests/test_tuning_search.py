"""The space, the objective and what is proposed: no Ray."""

import math
import warnings

import numpy as np
import pytest

from cp2image.config import Config
from cp2image.config_tune import Range
from cp2image.errors import ConfigError
from cp2image.tuning_proposals import Proposals, next_generation
from cp2image.tuning_space import check_search, filled, is_allowed, is_whole, score_of, with_values
from cp2image.tuning_table import Trial, TrialTable, to_frame

GAMMA = {f"train.gamma.{i}": {"low": 0.01, "high": 10, "zero": True} for i in range(1, 5)}


def config(space=None, train=None, **tune):
    sections = {
        "train": {"gamma_ramp": 10, "steps": 300, "validate_every": 50} | (train or {}),
        "score": {"embeddings": ["cp"]},
        "tune": {"space": space or GAMMA, "startup": 3} | tune,
    }
    return Config.model_validate(sections).resolve()


def test_numbers_are_set_by_dotted_key_with_lists_counted_from_1():
    found = with_values(config(), {"train.gamma.1": 0, "train.gamma.4": 2.5, "scaling.clip": 3})
    assert found.train.gamma == (0, 1, 1, 2.5)
    assert found.scaling.clip == 3
    assert with_values(found, {}) == found


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.gamma.0", 1, "expected an entry from 1 to 4, found '0'"),
        ("train.gama.1", 1, r"no key 'train\.gama'.*did you mean 'gamma'"),
        ("train.learning_rat", 1, "learning_rate"),
        ("train.preset", 1, "is no number"),
        ("train.gpu", 1, "is no number"),
        ("train.learning_rate.1", 1, "a number stands above"),
        ("train.gamma.1", math.nan, "finite"),
        ("train.learning_rate", -1, "greater than 0"),
    ],
)
def test_a_key_that_holds_no_number_or_not_this_one_is_refused(key, value, message):
    base = config(train={"learning_rate": 0.003})
    with pytest.raises(ConfigError, match=message):
        with_values(base, {key: value})


def test_a_reference_has_the_configs_own_numbers_where_it_names_none():
    space = {**GAMMA, "train.learning_rate": {"low": 1e-4, "high": 1e-2}}
    found = filled(config(space, {"learning_rate": 0.003}), {"train.gamma.2": 0, "scaling.clip": 4})
    assert found == {
        "train.gamma.1": 1, "train.gamma.2": 0, "train.gamma.3": 1, "train.gamma.4": 1,
        "train.learning_rate": 0.003, "scaling.clip": 4,
    }  # fmt: skip
    assert "train.learning_rate" not in filled(config(space), {})  # None: the optimiser's own


def test_whole_numbers_are_known_from_the_config_itself():
    assert is_whole(config(), "train.gamma_ramp", Range(low=5, high=50))
    assert is_whole(config(), "train.batch_size", Range(low=4, high=104))  # None by default
    assert not is_whole(config(), "train.learning_rate", Range(low=1e-4, high=1e-2))
    assert not is_whole(config(), "train.gamma.2", Range(low=1, high=10))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"train.steps": {"low": 10, "high": 100}}}, "shapes the weights"),
        ({"space": {"split.validation": {"low": 0.1, "high": 0.5}}}, "below train or scaling"),
        ({"space": {"score.cells": {"low": 70, "high": 400}}}, "below train or scaling"),
        ({"space": {"train.validation_cells": {"low": 70, "high": 400}}}, "same for all"),
        ({"train": {"gamma_ramp": 100}}, r"gamma\.3: has no effect.*at step 300 of 300"),
        ({"objective": {"metric": "train/L_generator"}}, "γ = 0 would win"),
        ({"objective": {"floors": {"train/L_generator": 1}}}, "γ = 0 would win"),
        ({"objective": {"metric": "validation/frechet_filterbank"}}, r"embeddings=\[filterbank\]"),
        ({"objective": {"metric": "validation/frechet"}}, "did you mean 'validation/frechet_cp'"),
        ({"train": {"minutes": 3}}, "equal steps"),
        ({"train": {"validate_every": 500}}, "at its end only"),
        ({"references": {"odd": {"train.gamma.9": 1}}}, r"references\.odd: train\.gamma\.9"),
        (
            {"references": {"odd": {"score.cells": 70}}},
            r"references\.odd\.score\.cells: .*same",
        ),
        ({"references": {"odd": {"train.steps": 5}}}, r"references\.odd\.train\.steps: .*same"),
        ({"objective": {"metric": "validation/mean_r"}}, "looks for the worst validation/mean_r"),
        (
            {"objective": {"goal": "max"}},
            "worst validation/frechet_cp; set goal: min",
        ),
        ({"objective": {"metric": "train/L_MSE"}, "train": {"validate_every": 10}}, "log_every"),
        ({"search": "population", "trials": 7}, "expected at least 8"),
        ({"space": {"train.stochastic.energy": {"low": 0.1, "high": 1}}}, "not a setting of"),
    ],
)
def test_a_search_that_could_be_had_for_nothing_is_refused(changes, message):
    check_search(config())
    with pytest.raises(ConfigError, match=message):
        check_search(config(**changes))


def test_a_trial_below_the_floor_is_worse_than_any_above_and_better_the_nearer():
    base = config(objective={"floors": {"validation/mean_r": 0.2}})

    def score(distance, r):
        return score_of({"validation/frechet_cp": distance, "validation/mean_r": r}, base)

    assert score(50, 0.2) == 50
    assert score(1e6, 0.21) < score(0, 0.19) < score(0, 0.0)
    assert is_allowed(score(1e6, 0.2))
    assert not is_allowed(score(0, 0.19))
    assert not is_allowed(score(math.nan, 0.5))
    most = config(objective={"metric": "validation/mean_r", "goal": "max", "floors": {}})
    assert score_of({"validation/mean_r": 0.4}, most) < score_of({"validation/mean_r": 0.3}, most)
    with pytest.raises(ConfigError, match=r"logged no 'validation/frechet_cp'.*logs train/L_MSE"):
        score_of({"train/L_MSE": 1.0}, base)


def run(proposals, judge, count, first=0):
    trials = []
    for number in range(first, first + count):
        values = proposals.propose(number)
        trial = Trial(number, values, 0, 300, status="complete")
        trial = trial.reported({"step": 300, "score": judge(values)})
        proposals.tell(trial)
        trials.append(trial)
    return trials


def judge(values):
    """Best with γ₁ exactly 0 and γ₂ near 1; the others do not matter."""
    two = values["train.gamma.2"]
    return (values["train.gamma.1"] > 0) * 2 + (abs(math.log10(two)) if two else 3)


@pytest.mark.parametrize("search", ["optuna", "random"])
def test_proposals_lie_in_the_space_and_have_exact_zeros(search):
    found = run(Proposals(config(search=search)), judge, 40)
    values = np.array([list(trial.values.values()) for trial in found])
    assert (values[:, 0] == 0).any()
    assert ((values == 0) | ((values >= 0.01) & (values <= 10))).all()
    assert len(np.unique(values[:, 1])) > 20


def test_tpe_ends_nearer_to_the_best_than_random_draws_do():
    def last(search, seed):
        base = config(search=search)
        base = base.model_copy(update={"run": base.run.model_copy(update={"seed": seed})})
        return np.mean([trial.score for trial in run(Proposals(base), judge, 40)[25:]])

    better = [last("optuna", seed) < last("random", seed) for seed in range(5)]
    assert sum(better) >= 4


def test_a_search_that_goes_on_learns_from_what_is_over_and_does_not_repeat_it():
    base = config()
    before = run(Proposals(base), judge, 25)
    again = Proposals(base, before, drawn=25)
    assert [t.value for t in again._study.trials] == [t.score for t in before]
    after = run(again, judge, 15, first=25)
    tried = [{tuple(trial.values.values()) for trial in part} for part in (before, after)]
    assert len(tried[0] & tried[1]) <= 1  # all four are 0, say
    assert np.mean([t.score for t in after]) < np.mean([t.score for t in before[:10]])


def test_random_draws_go_on_where_they_were():
    base = config(search="random")
    first = Proposals(base).propose(0)
    again = Proposals(base, drawn=1)
    assert first == Proposals(base).propose(0)
    assert first not in [again.propose(number) for number in range(1, 9)]


def test_stopped_diverged_and_reference_trials_are_told_as_what_they_are():
    base = config()
    stopped = Trial(0, dict.fromkeys(GAMMA, 1.0), 0, 300, status="stopped")
    stopped = stopped.reported({"step": 100, "score": 7.0})
    outside = Trial(1, dict.fromkeys(GAMMA, 30.0), 0, 300, status="complete")
    outside = outside.reported({"step": 300, "score": 9.0})
    diverged = Trial(2, dict.fromkeys(GAMMA, 10.0), 0, 300, status="diverged")
    other_space = Trial(3, {"train.learning_rate": 1.0}, 0, 300, status="complete")
    for proposals in (
        Proposals(base, [stopped, outside, diverged, other_space]),
        told := Proposals(base),
    ):
        if proposals is told:
            for trial in (stopped, outside, diverged, other_space):
                proposals.tell(trial)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            known = proposals._study.trials
        assert [t.state.name for t in known] == ["PRUNED", "COMPLETE", "PRUNED"]
        assert known[0].intermediate_values == {100: 7.0}
        proposals.propose(9)


def test_in_a_population_the_weak_take_over_from_the_strong_within_the_ranges():
    space = config().tune.space
    space = {**space, "train.gamma_ramp": Range(low=5, high=20)}
    whole = {key: key == "train.gamma_ramp" for key in space}
    members = [
        Trial(
            n, {**dict.fromkeys(GAMMA, 9.0), "train.gamma_ramp": 10}, 0, 100, status="complete"
        ).reported({"step": 100, "score": float(n)})
        for n in range(8)
    ]
    members[3] = Trial(3, members[3].values, 0, 100, status="diverged")
    found = next_generation(members, space, whole, seed=1)
    parents = [one.parent for one in found]
    assert [p for n, p in enumerate(parents) if n not in (3, 6, 7)] == [0, 1, 2, 4, 5]
    assert {parents[n] for n in (3, 6, 7)} <= {0, 1}
    for n in (3, 6, 7):
        changed = found[n].values
        assert set(changed.values()) - {0.0} <= {9.0 * 0.8, 10.0, 8, 12}
        assert isinstance(changed["train.gamma_ramp"], int)
    assert all(found[n].values == members[n].values for n in (0, 1, 2, 4, 5))
    assert next_generation([members[3]], space, whole, seed=1) == []


def test_trials_are_read_back_from_storage_as_they_were_written(tmp_path):
    table = TrialTable(str(tmp_path))
    trial = Trial(table.next_number(), {"train.gamma.1": 0.0}, 3, 300, name="gamma-0")
    table.put(trial.reported({"step": 50, "score": 2.0, "validation/mean_r": 0.1}))
    table.put(table[0].reported({"step": 100, "score": 1.0}))
    table.put(table[0].reported({"step": 50, "score": 4.0}))  # gone on from an earlier state
    found = TrialTable(str(tmp_path))
    assert found.trials == table.trials
    assert found.next_number() == 1
    assert (found[0].step, found[0].score) == (50, 4.0)
    assert to_frame(found.trials).loc[0, ["trial", "train.gamma.1", "score"]].tolist() == [0, 0, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"low": 0, "high": 1}, "zero: true"),
        ({"low": 2, "high": 1}, "not below"),
        ({"low": -1, "high": 1, "log": False, "zero": True}, "0 lies between"),
    ],
)
def test_a_range_that_cannot_be_searched_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Range(**text)
