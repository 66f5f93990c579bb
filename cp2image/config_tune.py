"""The config's sections of `cp2image.tuning` and of the scores it steers by. Ground floor."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from cp2image.config_section import Count, Name, Positive, Section

_SYSTEM = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"


def _unique(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{seeds}: a seed stands twice, and would count twice")
    return seeds


class Score(Section):
    """What validation measures on the held-out cells beside L_MSE, see `ValidationScores`."""

    embeddings: list[Literal["cp", "filterbank"]] = []
    """Spaces of the Fréchet distance. ``cp`` measures the drawn cells and adds the correlation of
    features; it takes about 5 ms a cell. Empty: L_MSE alone."""
    cells: Annotated[Positive, Field(ge=66)] = 400
    """Most validation cells that are scored: always the same ones, in the order of their keys."""
    families: list[str] | None = None
    """None: all of `cp2image.metrics.measurement.FAMILIES`."""


class Range(Section):
    """Where a number of the config is looked for."""

    low: float
    high: float
    log: bool = True
    """Whether equal factors, not equal differences, are equally likely."""
    zero: bool = False
    """Whether exactly 0 is tried too."""

    @model_validator(mode="after")
    def _check(self) -> "Range":
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(
                f"low = {self.low:g} with log: expected a number above 0; for 0 itself set "
                "zero: true, for other ranges log: false"
            )
        if self.zero and self.low <= 0 <= self.high:
            raise ValueError("0 lies between low and high; zero: true is for ranges without it")
        return self


class Objective(Section):
    """What makes one trial better than another."""

    metric: Name = "validation/frechet_cp"
    """Any metric that training logs, but no loss that γ scales (``train/L_generator``)."""
    goal: Literal["min", "max"] = "min"
    floors: dict[Name, float] = {"validation/mean_r": 0.1}
    """Metric → least value. A trial below a floor is worse than any that is above all."""


_Gamma = Range(low=0.01, high=10.0, log=True, zero=True)


class Tune(Section):
    """A search for the numbers of a training run."""

    space: Annotated[dict[Name, Range], Field(min_length=1)] = {
        f"train.gamma.{i}": _Gamma for i in range(1, 5)
    }
    """Dotted key of a number below ``train`` or ``scaling`` → its range. Entries of a list are
    counted from 1: ``train.gamma.1`` is γ₁."""
    search: Literal["optuna", "random", "population"] = "optuna"
    """Optuna's TPE; random; or generations, in which the best are carried on with changes."""
    early_stop: Literal["asha", "none"] = "asha"
    """Whether weak trials are stopped early (not in generations, which have their own way)."""
    trials: Positive = 16
    """Trials of the search; raise it to go on with a finished one."""
    parallel: Positive = 2
    """Trials side by side, each with its share of the CPUs."""
    startup: Positive = 6
    """Random trials before TPE begins."""
    grace: Positive | None = None
    """Steps before which no trial is stopped. None: a ninth of ``train.steps``."""
    reduction: Annotated[Positive, Field(ge=2)] = 3
    """Of this many trials that reach a rung one goes on; rungs lie this factor apart."""
    generations: Annotated[Positive, Field(ge=2)] = 4
    """Into which ``train.steps`` are cut by a population; each has trials / generations members."""
    objective: Objective = Objective()
    references: dict[Annotated[str, Field(pattern=_SYSTEM)], dict[Name, float]] = {}
    """Name → values to compare with, as γ = 1; tried first, and among the finalists."""
    finalists: Count = 2
    """Best trials that are trained with every seed, beside the references; 0: none of either."""
    seeds: Annotated[list[Count], Field(min_length=1), AfterValidator(_unique)] = [1, 2, 3]
    """Of the finalists and references. ``run.seed`` is better not among them: a finalist was chosen
    for its score with that one, which flatters it. The split stays the search's own."""
    retries: Count = 2
    """Further attempts at a trial that failed without having diverged."""
    alias: Name = "best"
    """Of the best model, where ``tracking.register_as`` names a registered model."""
    output: str = ""
