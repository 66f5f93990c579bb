"""Config of what comes after training: generate, evaluate, compare. Ground floor."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from cp2image.config_section import Count, Positive, Section


def _unique_seeds(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{seeds}: a seed stands twice, and would count twice")
    return seeds


class Generate(Section):
    """A screen from features."""

    input: str = ""
    """A ``cells/`` dataset or any CellProfiler table that has the checkpoint's columns."""
    checkpoint: str = ""
    """A checkpoint folder or an MLflow model, ``models:/name@alias``."""
    output: str = ""
    plates: list[str] = []
    """Only these; empty: all."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Only the cells of one split of the checkpoint's training run."""
    by: Literal["reconstruction", "prior"] | None = None
    """How ``vae`` and ``vaeplus`` draw: from the input's own patches (None, too), or from noise."""
    gpu: bool = False
    bf16: bool = False
    """Draw in bfloat16: for GPUs, and CPUs that have it in hardware."""


class Evaluate(Section):
    """Real against generated cells."""

    real: str = ""
    generated: str = ""
    output: str = ""
    cells: Positive = 10_000
    """Most pairs to compare; fewer are taken evenly over plates and wells."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Only the cells of one split of the checkpoint's training run."""
    embeddings: list[Literal["cp", "filterbank", "inception"]] = ["cp", "filterbank"]
    inception_weights: Annotated[str, Field(min_length=1)] | None = None
    """URI of the FID Inception network's weights (safetensors or a torch state dict)."""
    allow_singular: bool = False
    """Score no more cells than Inception has dimensions (2,048) all the same."""
    families: list[str] | None = None
    draws: Count = 4
    """Further draws of 200 cells, to see which features they agree in; 0: none. ``paper`` has no
    noise, and so none."""
    training_cells: Count = 10_000
    """Most training cells among which the nearest to each generated one is looked for, to see
    whether cells were copied; 0: none."""
    shuffle_control: bool = True
    checkpoint: str = ""
    """The generator for the shuffle control; empty: the run's own."""


def _system_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name):
        raise ValueError(
            f"a system's name is the name of its folder: letters, digits and . _ + -, the first "
            f"one a letter or digit; found {name!r}"
        )
    if name == "table":
        raise ValueError("'table' is the folder of the comparison's own table; choose another name")
    return name


def _system(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError(
            "expected the sections in which the system differs, as {train: {preset: paper}}; "
            "{} for none"
        )
    if not isinstance(value.get("trained_as", ""), str):
        raise ValueError(f"trained_as: expected a system's name, found {value['trained_as']!r}")
    given = value.get("checkpoints", [])
    if not isinstance(given, list) or not all(isinstance(one, str) and one for one in given):
        raise ValueError(
            "checkpoints: expected a list with a folder, models:/… or runs:/… for each of "
            f"compare.seeds, found {given!r}"
        )
    return value


_SystemName = Annotated[str, AfterValidator(_system_name)]
_System = Annotated[dict[str, Any], BeforeValidator(_system)]


class Compare(Section):
    """Several systems trained on the same cells and scored on the same held-out ones."""

    systems: dict[_SystemName, _System] = {}
    """Name → sections with the settings in which it differs, as ``{train: {preset: paper}}``; or
    ``{trained_as: OTHER}``, drawn differently; or ``{checkpoints: [folder, runs:/…, …]}``, one for
    each seed, which are scored as they are."""
    seeds: Annotated[list[Count], Field(min_length=1), AfterValidator(_unique_seeds)] = [0, 1, 2]
    output: str = ""
