"""Which numbers to try next: Optuna's TPE, random, or a population. No Ray, no MLflow."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cp2image.config import Config
from cp2image.config_tune import Range
from cp2image.tuning_space import Values, is_whole
from cp2image.tuning_table import Trial

_ZERO = 0.25
"""Length, in lengths of a range, of the piece below it that stands for exactly 0."""


class Proposals:
    """Optuna's sampler over the config's space, told of every trial that is over.

    With ``search: optuna`` it is TPE (Bergstra et al., NeurIPS 2011; multivariate), which learns
    from complete trials and, by the step they reached, from those stopped early; a trial that
    diverged counts as the worst. With ``random`` it draws from the space. The sampler sees each
    range as a line from 0 to 1; where exactly 0 is allowed, a fifth of the line lies below the
    range and stands for it, next to the smallest numbers: as the loss sees it too.

    Parameters
    ----------
    config
        The experiment.
    over
        Trials to learn from, as an earlier run of the search left them.
    drawn
        How many trials were proposed before: with the run's seed it sets the sampler's, so a
        search that goes on does not draw the same numbers again.
    """

    def __init__(self, config: Config, over: Iterable[Trial] = (), drawn: int = 0) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        settings = config.tune
        self._space = settings.space
        self._whole = {key: is_whole(config, key, one) for key, one in self._space.items()}
        self._distributions = {
            key: optuna.distributions.FloatDistribution(-_ZERO if one.zero else 0.0, 1.0)
            for key, one in self._space.items()
        }
        seed = int(np.random.SeedSequence([config.run.seed, drawn]).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler: Any = optuna.samplers.RandomSampler(seed=seed)
            if settings.search == "optuna":
                sampler = optuna.samplers.TPESampler(
                    seed=seed,
                    n_startup_trials=settings.startup,
                    multivariate=True,
                    constant_liar=True,
                )
        self._study = optuna.create_study(sampler=sampler)
        self._asked: dict[int, Any] = {}
        for trial in over:
            if set(trial.values) == set(self._space):
                self._study.add_trial(self._frozen(trial))

    def propose(self, number: int) -> Values:
        """Return the next trial's numbers; the sampler knows from then on that it is running."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            asked = self._study.ask(self._distributions)
            self._asked[number] = asked
            return {
                key: _value(one, asked.params[key], self._whole[key])
                for key, one in self._space.items()
            }

    def tell(self, trial: Trial) -> None:
        """Learn from a trial that is over, whether or not it was proposed here."""
        from optuna.trial import TrialState

        asked = self._asked.pop(trial.number, None)
        if asked is None:
            if set(trial.values) == set(self._space):
                self._study.add_trial(self._frozen(trial))
            return
        if trial.status == "complete":
            self._study.tell(asked, trial.score)
            return
        if trial.status == "stopped":
            for one in trial.history:
                asked.report(one["score"], int(one["step"]))
        failed = trial.status == "failed"
        self._study.tell(asked, state=TrialState.FAIL if failed else TrialState.PRUNED)

    def _frozen(self, trial: Trial) -> Any:
        from optuna.trial import TrialState, create_trial

        states = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
        state = states.get(trial.status, TrialState.PRUNED)
        stopped = trial.status == "stopped"
        return create_trial(
            state=state,
            value=trial.score if state == TrialState.COMPLETE else None,
            params={key: _place(self._space[key], value) for key, value in trial.values.items()},
            distributions=self._distributions,
            intermediate_values=(
                {int(one["step"]): one["score"] for one in trial.history} if stopped else {}
            ),
        )


@dataclass(frozen=True)
class Member:
    """One of a population's next generation: its numbers and the trial it goes on from."""

    values: Values
    parent: int


def next_generation(
    members: Sequence[Trial], space: Mapping[str, Range], whole: Mapping[str, bool], seed: int
) -> list[Member]:
    """Return the next generation: weak members take over a strong one's weights and numbers.

    Truncation selection as in population based training (Jaderberg et al. 2017, section 4.1): the
    worse quarter, at least one of two, copies one of the better quarter and multiplies each number
    by 0.8 or 1.25, within its range; a 0 becomes a number, and a number a 0, once in ten times
    where 0 is allowed. The others go on as they are. A member that diverged is always replaced.

    Parameters
    ----------
    members
        Trials of the last generation, all over.
    space, whole
        Ranges by key, and whether they hold whole numbers only.
    seed
        Of the draws.
    """
    alive = sorted((m for m in members if m.status == "complete"), key=lambda m: m.score or 0.0)
    if not alive:
        return []
    rng = np.random.default_rng(seed)
    cut = max(1, len(members) // 4)
    best, weak = alive[:cut], {m.number for m in alive[max(cut, len(alive) - cut) :]}
    lost = {m.number for m in members} - {m.number for m in alive}
    found = []
    for member in members:
        if member.number not in weak | lost:
            found.append(Member(dict(member.values), member.number))
            continue
        model = best[int(rng.integers(len(best)))]
        values = {
            key: _explore(model.values.get(key), one, whole[key], rng) for key, one in space.items()
        }
        found.append(Member(values, model.number))
    return found


def _explore(value: float | None, one: Range, whole: bool, rng: np.random.Generator) -> float:
    turn, up, anywhere = rng.random() < 0.1, rng.random() < 0.5, float(rng.random())
    if one.zero and (value == 0) != turn:
        return 0.0
    if not value:
        return _value(one, anywhere, whole)
    changed = min(max(value * (1.25 if up else 0.8), one.low), one.high)
    return round(changed) if whole else changed


def _value(one: Range, place: float, whole: bool) -> float:
    """Return the number at a place of a range, 0 to 1; 0 below it."""
    if place < 0:
        return 0 if whole else 0.0
    low, high = (math.log(one.low), math.log(one.high)) if one.log else (one.low, one.high)
    value = low + place * (high - low)
    value = min(max(math.exp(value) if one.log else value, one.low), one.high)
    return round(value) if whole else value


def _place(one: Range, value: float) -> float:
    """Return where in a range a number stands; one from outside stands at its nearest end."""
    if one.zero and value == 0:
        return -_ZERO / 2
    value = min(max(value, one.low), one.high)
    low, high, at = (
        (math.log(one.low), math.log(one.high), math.log(value))
        if one.log
        else (one.low, one.high, value)
    )
    return min(max((at - low) / (high - low), 0.0), 1.0)
