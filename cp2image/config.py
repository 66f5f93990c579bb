"""One YAML per experiment, strict: sections named after the steps. Ground floor: pydantic.

An unknown key is refused with the nearest known one; ``resolve`` fills the URIs of datasets and
checkpoints from ``run.folder``, so that the steps of one experiment find each other.
"""

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from cp2image.columns import nearest
from cp2image.config_benchmark import Benchmark
from cp2image.config_cells import Measure, Prepare, Simulate
from cp2image.config_evaluate import Compare, Evaluate, Generate
from cp2image.config_explore import Explore
from cp2image.config_scoring import Mechanisms, Sanity
from cp2image.config_section import Amount, Count, Name, Positive, Section
from cp2image.config_train import Scaling, Split, Train
from cp2image.config_tune import Score, Tune
from cp2image.errors import ConfigError, StorageError
from cp2image.storage import filesystem, join, split_uri
from cp2image.yaml_dialect import dump_yaml


class Run(Section):
    """What the experiment is called and where its outputs go."""

    name: Name = "cp2image"
    folder: Name = "runs/cp2image"
    """Folder or ``s3://`` prefix below which every step writes, unless it names its own."""
    seed: Annotated[Count, Field(lt=2**63)] = 0


class Cluster(Section):
    """How much of the Ray cluster one job takes."""

    address: str | None = None
    """None: the cluster named by RAY_ADDRESS (set under ``ray job submit``), else a local one."""
    cpus: Positive | None = None
    """CPUs of a local Ray; None: all of the machine."""
    cpus_per_task: Amount = 1.0
    tasks: Positive | None = None
    """Most tasks or actors at once; None: as many as the CPUs allow."""
    cells_per_task: Positive = 2048
    """Cells of a unit of work and of retry; a task holds some 150 kB of memory for each."""
    retries: Count = 2
    """Further attempts at a block of cells that failed, before its plate is given up."""


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
    compare: Compare = Compare()
    explore: Explore = Explore()
    score: Score = Score()
    tune: Tune = Tune()
    mechanisms: Mechanisms = Mechanisms()
    sanity: Sanity = Sanity()
    benchmark: Benchmark = Benchmark()
    tracking: Tracking = Tracking()

    @property
    def max_correlation(self) -> float:
        """Largest correlation of two features that both stay, the preset's own where unset."""
        own = 0.98 if self.train.preset == "cp2image-s" else 1.0
        return own if self.scaling.max_correlation is None else self.scaling.max_correlation

    @property
    def scaled_by(self) -> Literal["plate", "screen"]:
        """Whose controls scale a plate's features, the preset's own where unset."""
        own: Literal["plate", "screen"] = "screen" if self.train.preset == "cp2image-s" else "plate"
        return self.scaling.by or own

    def resolve(self) -> "Config":
        """Fill every empty URI from ``run.folder``; explicit ones stay."""
        folder = self.run.folder
        measures = not self.prepare.tables
        cells = join(folder, "measured" if measures else "cells")
        measured = "turned" if self.measure.turned else "measured"
        filled = {
            "simulate": {"output": join(folder, "simulated")},
            "prepare": {"output": join(folder, "cells")},
            "measure": {"input": join(folder, "cells"), "output": join(folder, measured)},
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
            "compare": {"output": join(folder, "comparison")},
            "explore": {
                "input": cells,
                "checkpoint": join(folder, "checkpoint"),
                "output": join(folder, "exploration"),
            },
            "tune": {"output": join(folder, "tuning")},
            "mechanisms": {"output": join(folder, "mechanisms")},
            "sanity": {"input": join(folder, "cells"), "output": join(folder, "sanity")},
            "benchmark": {"output": join(folder, "benchmark")},
        }
        data = self.model_dump()
        for section, defaults in filled.items():
            for key, value in defaults.items():
                data[section][key] = data[section][key] or value
        return Config.model_validate(data)

    def anchor(self) -> "Config":
        """Make every local path absolute: a cluster's workers run in other folders.

        Raises
        ------
        ConfigError
            If a submitted job would write into the cluster's temporary copy of the working folder.
        """
        folder = self.run.folder
        local = "://" not in folder and not folder.startswith(("/", "~"))
        if local and _JOB_COPY in os.getcwd():
            raise ConfigError(
                f"run.folder = {folder!r}: a submitted job runs in a temporary copy of the working "
                "folder, and what it writes there is lost; give an absolute path or an s3:// "
                "prefix (--set run.folder=…)"
            )
        tracked = self.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
        if "://" in folder and self.tracking.enabled and not tracked and _JOB_COPY in os.getcwd():
            raise ConfigError(
                "a submitted job would record its runs in the temporary copy of the working "
                "folder, where they are lost; set tracking.uri or MLFLOW_TRACKING_URI to an MLflow "
                "server, or tracking.enabled=false"
            )
        data = self.model_dump()
        for section, keys in _PATHS.items():
            for key in keys:
                _check_places(f"{section}.{key}", data[section][key])
                data[section][key] = _absolute(data[section][key])
        prepare = data["prepare"]
        folders = prepare["image_folders"]
        _check_places("prepare.image_folders", list(folders.values()))
        prepare["image_folders"] = {start: _absolute(goal) for start, goal in folders.items()}
        if prepare["stacks"]:
            _check_places("prepare.stacks.index", prepare["stacks"]["index"])
            prepare["stacks"]["index"] = _absolute(prepare["stacks"]["index"])
        wells = data["mechanisms"]
        for key, files in (
            ("prepare.metadata_files", prepare["metadata_files"]),
            ("mechanisms.joined", wells["joined"]),
            ("mechanisms.profiles", [wells["profiles"]] if wells["profiles"] else []),
        ):
            for file in files:
                _check_places(key, file["uri"])
                file["uri"] = _absolute(file["uri"])
        return Config.model_validate(data)

    def yaml(self) -> str:
        """Return the whole config, defaults included, as YAML that `read_config` reads back."""
        return dump_yaml(self.model_dump(mode="json"))

    def fingerprint(self, *sections: str, inputs: Sequence[str] = ()) -> str:
        """Return a short hash that tells outputs of other settings or inputs apart.

        Where the steps' datasets lie and which plates were chosen does not count; ``inputs`` are
        what identifies the data.

        Raises
        ------
        ConfigError
            If a section is not known.
        """
        chosen = self.model_dump(mode="json", include=set(sections))
        for section in sections:
            if section not in chosen:
                known = list(Config.model_fields)
                raise ConfigError(f"no section {section!r} in a config{nearest(section, known)}")
            for place in ("input", "output", "checkpoint", "turned"):
                chosen[section].pop(place, None)
            if isinstance(chosen[section].get("plates"), list):
                del chosen[section]["plates"]
            if chosen[section].get("preset") not in (None, "cp2image-s"):
                chosen[section].pop("stochastic", None)  # other presets do not have it
            for later in _LATER.get(section, ()):
                if chosen[section][later] is None:
                    del chosen[section][later]
        text = json.dumps([chosen, sorted(inputs)], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:16]


_LATER = {"split": ("seed",), "scaling": ("by",), "train": ("beta",), "generate": ("by",)}
"""Settings that count only where they are set: what was made before they came stays valid."""
_JOB_COPY = "/runtime_resources/working_dir_files/"
_MODELS = ("models:/", "runs:/")
_PATHS = {
    "run": ["folder"],
    "simulate": ["output"],
    "prepare": ["tables", "images", "output"],
    "measure": ["input", "output"],
    "train": ["input", "output", "turned"],
    "generate": ["input", "checkpoint", "output"],
    "evaluate": ["real", "generated", "output", "checkpoint", "inception_weights"],
    "compare": ["output"],
    "explore": ["input", "checkpoint", "output"],
    "tune": ["output"],
    "mechanisms": ["output"],
    "sanity": ["input", "output"],
    "benchmark": ["output"],
}


def _check_places(key: str, value: Any) -> None:
    for one in value if isinstance(value, list) else [value]:
        if not one or one.startswith(_MODELS):
            continue
        try:
            split_uri(one)
        except StorageError as error:
            raise ConfigError(f"{key} = {one!r}: {error}") from error


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    if not value or "://" in value or value.startswith(_MODELS):
        return value
    return os.path.abspath(os.path.expanduser(value))


def local_folder(uri: str) -> Path | None:
    """Return ``uri`` as an absolute local path, or None when it is on object storage."""
    return None if uri.startswith("s3://") else Path(filesystem(uri)[1])
