"""One YAML per experiment, strict: sections named after the steps. Ground floor: pydantic only.

An unknown key is refused with the nearest known one; ``resolve`` fills the URIs of datasets and
checkpoints from ``run.folder``, so that the steps of one experiment find each other.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cp2image.columns import CATEGORIES, nearest
from cp2image.errors import ConfigError
from cp2image.storage import join, read_bytes

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A part of the config that refuses unknown keys and is never changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(Section):
    """What the experiment is called and where its outputs go."""

    name: str = "cp2image"
    folder: str = "runs/cp2image"
    """Folder or ``s3://`` prefix below which every step writes, unless it names its own."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Cluster(Section):
    """How much of the Ray cluster one job takes."""

    address: str | None = None
    """None: the cluster named by RAY_ADDRESS (set under ``ray job submit``), else a local one."""
    cpus: Positive | None = None
    """CPUs of a local Ray; None: all of the machine."""
    cpus_per_task: Annotated[float, Field(gt=0)] = 1.0
    tasks: Positive | None = None
    """Most tasks or actors at once; None: as many as the CPUs allow."""
    cells_per_task: Positive = 1024
    retries: Annotated[int, Field(ge=0)] = 2
    """Further attempts at a block of cells that failed, before its plate is given up."""


class Simulate(Section):
    """The simulated screen (`cp2image.data.simulate`)."""

    output: str = ""
    plates: Positive = 3
    wells_per_plate: Positive = 24
    sites_per_well: Positive = 2
    cells_per_site: Positive = 12
    field_size: Positive = 512


class Stacks(Section):
    """Ready-made patches: image stacks and an index CSV with one row per cell."""

    index: str
    columns: dict[str, str]
    """Canonical name → the index's column, as ``Metadata_Plate: plate``; ``file``, ``page`` too."""
    channels: list[str]


class Quality(Section):
    """Which patches are left out (`cp2image.data.quality`)."""

    drop: list[Literal["noise", "out_of_focus", "saturated", "empty_channel"]] = [
        "noise",
        "out_of_focus",
        "saturated",
    ]


class Prepare(Section):
    """CellProfiler tables and fields of view, or ready-made stacks, to ``cells/``."""

    tables: list[str] = []
    """Each an ExportToSpreadsheet folder, an SQLite file, or Parquet/CSV with a row per cell."""
    metadata: dict[str, str] = {}
    """Canonical name → the table's column, where it is not one of the usual variants."""
    metadata_files: list[str] = []
    """CSVs joined on the columns they share with the table (plate layout, MOA list)."""
    images: str | None = None
    """Folder that the file names of the images are relative to; None: as the table says."""
    channels: dict[str, str] = {}
    """Channel name → image name in the table's ``FileName_<image>``, in patch order."""
    stacks: Stacks | None = None
    patch_size: Annotated[int, Field(ge=16, le=512)] = 68
    """Pixels."""
    border: Literal["pad", "drop"] = "pad"
    illumination: bool = False
    """Correct each plate and channel by its own illumination function (Singh et al. 2014)."""
    quality: Quality = Quality()
    output: str = ""


class Measure(Section):
    """CellProfiler features of patches that have no table."""

    input: str = ""
    output: str = ""
    families: list[str] | None = None
    """None: all of `cp2image.metrics.measurement.FAMILIES`."""
    compartments: list[str] = ["Nuclei", "Cells", "Cytoplasm"]
    nucleus_channel: str | None = None
    """None: the first channel."""


class Split(Section):
    """Which cells train, which validate, which test."""

    by: Literal["well", "plate", "cell"] = "well"
    """``cell`` only to match the paper: cells of one field leak into each other's split."""
    validation: Share = 0.1
    test: Share = 0.1
    validation_plates: list[str] = []
    test_plates: list[str] = []
    """Plates named here are held out whole; the shares then apply to the others."""


class Scaling(Section):
    """Feature selection and per-plate scaling against the negative control."""

    control: dict[str, str] = {"Metadata_Compound": "DMSO"}
    min_controls: Positive = 25
    """A plate with fewer control cells is scaled by all plates' controls together."""
    clip: Annotated[float, Field(gt=0)] = 5.0
    """Scaled features are limited to ± this many robust standard deviations."""
    max_missing: Share = 0.05
    """A feature missing in a larger share of the training cells is left out."""
    categories: list[str] = [c for c in CATEGORIES if c != "Location"]
    drop: list[str] = []
    """Further columns to leave out, by name."""


class Train(Section):
    """One training run."""

    input: str = ""
    output: str = ""
    preset: Literal["paper"] = "paper"
    optimiser: Literal["as_run", "as_named"] = "as_run"
    """The authors' code swaps two learning-rate names; ``as_run`` is what it executes."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the generator; None: the optimiser setting's own."""
    gamma: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Final weights γ₁…γ₄ of the hidden-layer losses."""
    gamma_ramp: Positive = 2500
    """Steps: γᵢ rises from 0 at ``gamma_ramp·i`` to its final value at ``gamma_ramp·(i+1)``."""
    steps: Positive = 680_000
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Stop after this many minutes of training even if ``steps`` are not reached."""
    batch_size: Positive | None = None
    """Cells per step over all workers; None: one of each treatment, the paper's 104."""
    normalisation: Literal["per_patch_max", "plate_percentile"] = "per_patch_max"
    workers: Positive = 1
    threads: Positive | None = None
    """Torch threads per worker; None: the CPUs divided by the workers."""
    gpu: bool = False
    bf16: bool = False
    max_failures: Annotated[int, Field(ge=0)] = 3
    validate_every: Positive = 1000
    validation_cells: Positive = 1000
    checkpoint_every: Positive = 1000
    log_every: Positive = 20


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
    batch_size: Positive = 104
    gpu: bool = False


class Evaluate(Section):
    """Real against generated cells."""

    real: str = ""
    generated: str = ""
    output: str = ""
    cells: Positive = 10_000
    """Most pairs to compare; fewer are taken evenly over plates and wells."""
    embeddings: list[Literal["cp", "filterbank", "inception"]] = ["cp", "filterbank"]
    inception_weights: str | None = None
    """URI of the FID Inception network's weights (safetensors or a torch state dict)."""
    families: list[str] | None = None
    shuffle_control: bool = True
    checkpoint: str = ""
    """The generator for the shuffle control; empty: the run's own."""


class Tracking(Section):
    """MLflow."""

    uri: str | None = None
    """None: MLFLOW_TRACKING_URI, else ``sqlite`` in the run's folder (or in ./ for s3 runs)."""
    experiment: str = "cp2image"
    register_as: str | None = None
    """Name under which the trained model is registered; None: not registered."""
    enabled: bool = True


class Config(Section):
    """A whole experiment."""

    run: Run = Run()
    cluster: Cluster = Cluster()
    simulate: Simulate = Simulate()
    prepare: Prepare = Prepare()
    measure: Measure = Measure()
    split: Split = Split()
    scaling: Scaling = Scaling()
    train: Train = Train()
    generate: Generate = Generate()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    def resolve(self) -> "Config":
        """Fill every empty URI from ``run.folder``; explicit ones stay."""
        folder = self.run.folder
        measures = not self.prepare.tables
        cells = join(folder, "measured" if measures else "cells")
        filled = {
            "simulate": {"output": join(folder, "simulated")},
            "prepare": {"output": join(folder, "cells")},
            "measure": {"input": join(folder, "cells"), "output": join(folder, "measured")},
            "train": {"input": cells, "output": join(folder, "checkpoint")},
            "generate": {
                "input": cells,
                "checkpoint": join(folder, "checkpoint"),
                "output": join(folder, "screen"),
            },
            "evaluate": {
                "real": cells,
                "generated": join(folder, "screen"),
                "output": join(folder, "report"),
                "checkpoint": join(folder, "checkpoint"),
            },
        }
        data = self.model_dump()
        for section, defaults in filled.items():
            for key, value in defaults.items():
                data[section][key] = data[section][key] or value
        return Config.model_validate(data)

    def yaml(self) -> str:
        """Return the whole config, defaults included, as YAML that `read_config` reads back."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text

    def fingerprint(self, *sections: str) -> str:
        """Return a short hash of some sections: tells outputs of other settings apart."""
        chosen = self.model_dump(mode="json", include=set(sections))
        return sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:16]


def read_config(uri: str | None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides, check it, fill its URIs.

    Parameters
    ----------
    uri
        Path or URI of the YAML file; None for the defaults alone.
    overrides
        Each ``section.key=value``, the value in YAML (``train.gamma=[1, 1, 0, 0]``).

    Raises
    ------
    ConfigError
        Naming the key or the line, what was found and what was expected.
    """
    where = uri or "the defaults"
    data: Any = {}
    if uri is not None:
        try:
            data = yaml.safe_load(read_bytes(uri).decode()) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{uri}: not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(data, dict):
            raise ConfigError(f"{uri}: expected sections such as 'train:', found {data!r:.60}")
    for override in overrides or []:
        _override(data, override)
    try:
        return Config.model_validate(data).resolve()
    except ValidationError as error:
        raise ConfigError(f"{where}: {_explain(error)}") from error


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected section.key=value, as train.steps=500")
    node = data
    for key in keys[:-1]:
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {key!r} holds a value, not keys")
    try:
        node[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML") from error


def _explain(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        path = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _keys_at(problem["loc"][:-1])
            lines.append(f"unknown key {path!r}{nearest(str(problem['loc'][-1]), known)}")
        else:
            lines.append(f"{path} = {problem.get('input')!r:.80}: {problem['msg'].lower()}")
    return "; ".join(lines)


def _keys_at(path: tuple[int | str, ...]) -> list[str]:
    model: Any = Config
    for part in path:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        annotation = field.annotation if field is not None else None
        options = getattr(annotation, "__args__", (annotation,))
        model = next((o for o in options if isinstance(o, type) and issubclass(o, Section)), None)
        if model is None:
            return []
    return list(model.model_fields)


def local_folder(uri: str) -> Path | None:
    """Return ``uri`` as a local path, or None when it is on object storage."""
    if "://" not in uri:
        return Path(uri).expanduser().absolute()
    return Path(uri.removeprefix("file://")) if uri.startswith("file://") else None
