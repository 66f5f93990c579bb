"""Numbers of a config by dotted key, and the space they are looked for in. No Ray, no MLflow."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cp2image.columns import nearest
from cp2image.config import Config
from cp2image.config_errors import explain
from cp2image.config_tune import Range
from cp2image.errors import ConfigError

Values = dict[str, float]
"""Dotted key → number."""
_SECTIONS = ("train", "scaling")
ALLOWED = 1e9
"""Scores below it are of trials above all floors."""
_NOT_SEARCHED = (
    *("train.steps", "train.minutes", "train.validate_every", "train.validation_cells"),
    *("train.checkpoint_every", "train.log_every", "train.workers", "train.threads"),
    "train.max_failures",
)
"""They say how much is done or on which cells it is judged, which is the same for all trials."""
_SCORED = {
    "validation/frechet_cp": "cp",
    "validation/mean_r": "cp",
    "validation/share_above_half": "cp",
    "validation/without_nucleus": "cp",
    "validation/frechet_filterbank": "filterbank",
}
"""Metric → what `score.embeddings` must name for it."""
_LOSSES = ("validation/L_MSE", "validation/below_mean_image")
_MORE_IS_BETTER = (
    "validation/mean_r",
    "validation/share_above_half",
    "validation/below_mean_image",
)
_SCALED_BY_GAMMA = ("train/L_generator",)
_GAMMA = "train.gamma."


def with_values(config: Config, values: Mapping[str, float]) -> Config:
    """Return the config with other numbers, checked as if they stood in the file.

    Parameters
    ----------
    config
        A resolved experiment.
    values
        Dotted key (``train.learning_rate``; entries of a list are counted from 1) → number.

    Raises
    ------
    ConfigError
        If a key is unknown or holds no number, or a value is refused.
    """
    data = config.model_dump(mode="json")
    for key, value in values.items():
        node, last = _find(data, key)
        node[last] = value
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        shown = ", ".join(f"{key}={value:g}" for key, value in values.items())
        raise ConfigError(f"with {shown}: {explain(error, Config)}") from error


def filled(config: Config, values: Mapping[str, float]) -> Values:
    """Return values with the config's own for the numbers of the space that they do not name."""
    found: Values = {}
    for key in config.tune.space:
        node, last = _find(config.model_dump(mode="json"), key)
        own = values.get(key, node[last])
        if own is not None:
            found[key] = own
    return {**found, **values}


def is_whole(config: Config, key: str, found: Range) -> bool:
    """Tell whether a key takes whole numbers only, by what the config says to others.

    Raises
    ------
    ConfigError
        If it takes neither end of its range.
    """
    for value in (found.low, found.high):
        with_values(config, {key: value})
    between = found.low + 0.617 * (found.high - found.low)
    if between.is_integer():
        between += 0.1
    try:
        with_values(config, {key: between})
    except ConfigError:
        return True
    return False


def check_search(config: Config) -> None:
    """Refuse a search that cannot work or whose objective could be had for nothing.

    Raises
    ------
    ConfigError
        Naming the key: unknown, without effect, or one that changes what trials are judged by.
    """
    settings = config.tune
    for key, found in settings.space.items():
        where = f"tune.space.{key}"
        _check_key(where, key)
        is_whole(config, key, found)
        if found.zero:
            with_values(config, {key: 0})
        if key.startswith(_GAMMA) and "train.gamma_ramp" not in settings.space:
            start = config.train.gamma_ramp * int(key.removeprefix(_GAMMA))
            if start >= config.train.steps:
                raise ConfigError(
                    f"{where}: has no effect, since train.gamma_ramp = {config.train.gamma_ramp} "
                    f"switches it on at step {start:,} of {config.train.steps:,}; lower "
                    "train.gamma_ramp or raise train.steps"
                )
    for name, values in settings.references.items():
        try:
            with_values(config, values)
        except ConfigError as error:
            raise ConfigError(f"tune.references.{name}: {error}") from error
        for key in values:
            _check_key(f"tune.references.{name}.{key}", key)
    size = settings.trials // settings.generations
    if settings.search == "population" and size < 2:
        raise ConfigError(
            f"tune.trials = {settings.trials} in {settings.generations} generations is no "
            f"population; expected at least {2 * settings.generations}"
        )
    _check_objective(config)


def _check_key(where: str, key: str) -> None:
    if key.split(".", maxsplit=1)[0] not in _SECTIONS or key in _NOT_SEARCHED:
        raise ConfigError(
            f"{where}: expected a number below {' or '.join(_SECTIONS)} that shapes the "
            "weights; how long and on which cells trials are judged is the same for all"
        )


def _check_objective(config: Config) -> None:
    wanted = config.tune.objective
    for metric in (wanted.metric, *wanted.floors):
        if metric in _SCALED_BY_GAMMA:
            raise ConfigError(
                f"tune.objective: {metric} is a sum that γ scales: γ = 0 would win; choose a "
                "metric of validation, as validation/frechet_cp"
            )
        space = _SCORED.get(metric)
        if metric not in (*_SCORED, *_LOSSES) and not metric.startswith("train/"):
            hint = nearest(metric, [*_SCORED, *_LOSSES])
            raise ConfigError(
                f"tune.objective: training logs no {metric!r}{hint}; known are "
                f"{', '.join([*_SCORED, *_LOSSES])} and train/<loss>"
            )
        if space is not None and space not in config.score.embeddings:
            raise ConfigError(
                f"tune.objective: {metric} is only measured with score.embeddings=[{space}]"
            )
        if metric.startswith("train/") and config.train.log_every > config.train.validate_every:
            raise ConfigError(
                f"tune.objective: {metric} is logged every {config.train.log_every} steps "
                f"(train.log_every), and trials are judged every {config.train.validate_every} "
                "(train.validate_every); log as often as that"
            )
    better = "max" if wanted.metric in _MORE_IS_BETTER else "min"
    if wanted.metric.startswith("validation/") and wanted.goal != better:
        raise ConfigError(
            f"tune.objective.goal = {wanted.goal!r} looks for the worst {wanted.metric}; set goal: "
            f"{better}"
        )
    if config.train.minutes is not None:
        raise ConfigError(
            "train.minutes: trials are compared after equal steps; set train.steps instead"
        )
    if config.train.steps < config.train.validate_every:
        raise ConfigError(
            f"train.validate_every = {config.train.validate_every}: a trial of "
            f"{config.train.steps} steps would be judged at its end only; expected at most that"
        )


def score_of(metrics: Mapping[str, float], config: Config) -> float:
    """Return what the search minimises.

    Above all floors it is the metric (negative, if more is better). Below one it is 1e9 and more
    the farther below: worse than anything allowed, and the nearer to it the better.

    Raises
    ------
    ConfigError
        If a metric was not logged.
    """
    wanted = config.tune.objective
    for name in (wanted.metric, *wanted.floors):
        if name not in metrics:
            raise ConfigError(
                f"tune.objective: training logged no {name!r}{nearest(name, list(metrics))}; it "
                f"logs {', '.join(sorted(n for n in metrics if '/' in n))}"
            )
    short = sum(max(0.0, least - metrics[name]) for name, least in wanted.floors.items())
    value = metrics[wanted.metric]
    if not math.isfinite(value) or not math.isfinite(short):
        return 1e12
    if short > 0:
        return ALLOWED * (1 + short)
    return value if wanted.goal == "min" else -value


def is_allowed(score: float) -> bool:
    """Tell whether a score is of a trial above all floors."""
    return score < ALLOWED


def _find(data: dict[str, Any], key: str) -> tuple[Any, Any]:
    """Return the container and the index of a number in a config that was dumped as JSON."""
    node: Any = data
    *path, last = key.split(".")
    for depth, part in enumerate(path, start=1):
        node = node[_index(node, part, ".".join(path[:depth]))]
    index = _index(node, last, key)
    value = node[index]
    if isinstance(value, bool) or not (value is None or isinstance(value, int | float)):
        raise ConfigError(f"{key} = {value!r:.60} is no number to search for")
    return node, index


def _index(node: Any, part: str, key: str) -> Any:
    if isinstance(node, dict):
        if part not in node:
            raise ConfigError(f"no key {key!r} in a config{nearest(part, list(node))}")
        return part
    if isinstance(node, list):
        if not part.isdigit() or not 1 <= int(part) <= len(node):
            raise ConfigError(f"{key}: expected an entry from 1 to {len(node)}, found {part!r}")
        return int(part) - 1
    raise ConfigError(f"no key {key!r} in a config: a number stands above it")
