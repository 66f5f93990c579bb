"""One YAML per experiment, strict: sections named after the steps. Ground floor: pydantic.

An unknown key is refused with the nearest known one; ``resolve`` fills the URIs of datasets and
checkpoints from ``run.folder``, so that the steps of one experiment find each other.
"""

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from cp2image.columns import CATEGORIES, nearest
from cp2image.config_explore import Explore
from cp2image.config_scoring import Mechanisms, Sanity
from cp2image.config_section import Amount, Count, Name, NotNegative, Positive, Section, Share
from cp2image.config_tune import Score, Tune
from cp2image.errors import ConfigError
from cp2image.storage import filesystem, join
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


class Simulate(Section):
    """The simulated screen (`cp2image.data.simulate`)."""

    output: str = ""
    plates: Positive = 3
    wells_per_plate: Positive = 24
    sites_per_well: Positive = 1
    cells_per_site: Positive = 40
    field_size: Positive = 352
    defect_share: Share = 0.02
    """Share of fields that are noise or out of focus."""


_Names = TypeVar("_Names", list[str], dict[str, str])


def _unique(names: _Names) -> _Names:
    values = list(names.values()) if isinstance(names, dict) else names
    twice = sorted({name for name in values if values.count(name) > 1})
    if twice:
        raise ValueError(f"{twice[0]!r} stands twice; every channel is its own image")
    return names


def _unique_seeds(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{seeds}: a seed stands twice, and would count twice")
    return seeds


class Stacks(Section):
    """Ready-made patches: image stacks and an index CSV with one row per cell."""

    index: str
    columns: dict[str, str]
    """Canonical name → the index's column, as ``Metadata_Plate: plate``; ``file``, ``page`` too."""
    channels: Annotated[list[str], Field(min_length=1, max_length=8), AfterValidator(_unique)]


class Quality(Section):
    """Which patches are left out (`cp2image.data.quality`)."""

    drop: list[Literal["noise", "out_of_focus", "saturated", "empty_channel"]] = [
        "noise",
        "out_of_focus",
        "saturated",
    ]


class MetadataFile(Section):
    """A CSV with more about the image sets: plate layout, mechanisms of action."""

    uri: str
    on: list[str]
    """Canonical names that file and table share, as ``[Metadata_Plate, Metadata_Well]``."""
    columns: dict[str, str] = {}
    """Canonical name → the file's column, where it is not one of the usual variants."""


class Prepare(Section):
    """CellProfiler tables and fields of view, or ready-made stacks, to ``cells/``."""

    tables: list[str] = []
    """Each an ExportToSpreadsheet folder, an SQLite file, or Parquet/CSV with a row per cell."""
    metadata: dict[str, str] = {}
    """Canonical name → the table's column, where it is not one of the usual variants."""
    metadata_files: list[MetadataFile] = []
    images: str | None = None
    """Folder of the images: below it a relative folder of the table is kept, an absolute one
    (of the machine CellProfiler ran on) is replaced by it. None: as the table says."""
    image_folders: dict[str, str] = {}
    """Start of a folder in the table → start of the real one; goes before ``images``."""
    nuclei: str = "Nuclei"
    """The compartment whose centre a patch is cut around."""
    channels: Annotated[dict[str, str], Field(max_length=8), AfterValidator(_unique)] = {}
    """Channel name → image name in the table's ``FileName_<image>``, in patch order."""
    stacks: Stacks | None = None
    patch_size: Annotated[Positive, Field(ge=16, le=512)] = 68
    """Pixels."""
    border: Literal["pad", "drop"] = "pad"
    illumination: bool = False
    """Correct each plate and channel by its own illumination function (Singh et al. 2014)."""
    bit_depth: Annotated[int, Field(ge=8, le=32)] | None = None
    """Bits of the camera, where they are the lower ones of a wider file (12 for 0…4095)."""
    quality: Quality = Quality()
    output: str = ""
    plates: list[str] = []
    """Only these; empty: all. The others can follow later."""


class Measure(Section):
    """CellProfiler features of patches that have no table."""

    input: str = ""
    output: str = ""
    plates: list[str] = []
    """Only these; empty: all. The others can follow later."""
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
    seed: Count | None = None
    """None: the run's. Set it to train with several seeds on the same split."""


class Scaling(Section):
    """Feature selection and per-plate scaling against the negative control."""

    control: dict[str, str] = {"Metadata_Compound": "DMSO"}
    min_controls: Positive = 25
    """A plate with fewer control cells is scaled by all plates' controls together."""
    clip: Amount = 5.0
    """Scaled features are limited to ± this many robust standard deviations."""
    max_missing: Share = 0.05
    """A feature missing in a larger share of the training cells is left out."""
    categories: list[str] = [c for c in CATEGORIES if c != "Location"]
    drop: list[str] = []
    """Further columns to leave out, by name or pattern (``*_ZernikePhase_*``)."""
    max_correlation: Share | None = None
    """Of two features that correlate more than this over training cells, the second is left out.
    None: 0.98 for the preset ``cp2image-s``, 1 (all stay) for the others."""


class Stochastic(Section):
    """What the training of ``cp2image-s`` is made of; 0 switches a loss off."""

    learning_rate: Amount = 4e-4
    """Of both networks."""
    pixel: NotNegative = 0.005
    """Weight of L_MSE between a cell and the mean of its draws."""
    draws: Positive = 1
    """Draws of a cell whose mean L_MSE sees."""
    regression: NotNegative = 1.0
    """Weight of the features as the discriminator reads them from a patch."""
    penalty: NotNegative = 0.3
    """γ of the gradient penalties R1 + R2."""
    penalty_every: Positive = 8
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged generator per step."""
    cooldown: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Share of the training, its last, in which the learning rates fall to 0 in a line."""


_IMAGE_LOSSES = ("paper", "vae", "vaeplus")
_SETTINGS_OF = {
    "stochastic": ("cp2image-s",),
    "optimiser": _IMAGE_LOSSES,
    "learning_rate": (*_IMAGE_LOSSES, "lsgan"),
    "gamma": ("paper", "vaeplus"),
    "gamma_ramp": ("paper", "vaeplus"),
    "beta": ("vae", "vaeplus"),
}
"""Setting of training → the presets that have it."""


class Train(Section):
    """One training run."""

    input: str = ""
    output: str = ""
    preset: Literal["paper", "cp2image-s", "vae", "vaeplus", "lsgan"] = "paper"
    """``paper`` is the published network; ``cp2image-s`` draws one of the cells that a profile
    allows, see `Stochastic`. ``vae`` and ``vaeplus`` see the image, ``lsgan`` noise alone."""
    stochastic: Stochastic = Stochastic()
    optimiser: Literal["as_run", "as_named"] = "as_run"
    """The authors' code swaps two learning-rate names; ``as_run`` is what it executes."""
    learning_rate: Amount | None = None
    """Of the generator; None: the optimiser setting's own, 2e-4 for ``lsgan``."""
    gamma: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    """Final weights γ₁…γ₄ of the hidden-layer losses."""
    gamma_ramp: Positive = 2500
    """Steps: γᵢ rises from 0 at ``gamma_ramp·i`` to its final value at ``gamma_ramp·(i+1)``."""
    beta: NotNegative | None = None
    """Weight of KL; None: 1 for ``vae``, 2 for ``vaeplus``."""
    steps: Positive = 680_000
    minutes: Amount | None = None
    """Stop after this many minutes of training even if ``steps`` are not reached."""
    batch_size: Positive | None = None
    """Cells per step over all workers. None: as many as treatments, the paper's 104; 64 for
    ``lsgan``; for ``cp2image-s`` 4, or 64 on a GPU: on CPUs many small steps go furthest."""
    balance: Literal["treatment", "cell"] = "treatment"
    """Draw every treatment alike (the paper's way), or every cell alike: better where many
    treatments have a handful of cells, which would be seen again and again."""
    normalisation: Literal["per_patch_max", "plate_percentile"] | None = None
    """Of patches. None: ``plate_percentile`` for ``cp2image-s``, which keeps what intensity
    features are about; for the others the paper's ``per_patch_max``."""
    workers: Positive = 1
    threads: Positive | None = None
    """Torch threads per worker; None: the CPUs divided by the workers."""
    gpu: bool = False
    bf16: bool = False
    max_failures: Count = 3
    validate_every: Positive = 1000
    validation_cells: Positive = 1000
    checkpoint_every: Positive = 1000
    log_every: Positive = 20

    @model_validator(mode="after")
    def _refuse_the_other_presets(self) -> "Train":
        for name, presets in _SETTINGS_OF.items():
            default = Train.model_fields[name].get_default()
            if self.preset not in presets and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is not a setting of the preset {self.preset!r}: leave it out, or "
                    f"choose another preset ({', '.join(presets)})"
                )
        return self

    def cells_per_step(self, treatments: int) -> int:
        """Cells per step over all workers, the preset's own where none is set."""
        own = {"cp2image-s": 64 if self.gpu else 4, "lsgan": 64}.get(self.preset, treatments)
        return self.batch_size or max(own, self.workers)

    @property
    def intensity(self) -> str:
        """The normalisation of patches, the preset's own where none is set."""
        own = "plate_percentile" if self.preset == "cp2image-s" else "per_patch_max"
        return self.normalisation or own


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


_System = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]


class Compare(Section):
    """Several systems trained on the same cells and scored on the same held-out ones."""

    systems: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")], dict[str, Any]
    ] = {}
    """Name → sections with the settings in which it differs, as ``{train: {preset: paper}}``."""
    seeds: Annotated[list[Count], Field(min_length=1), AfterValidator(_unique_seeds)] = [0, 1, 2]
    output: str = ""


class Benchmark(Section):
    """Speed beside what a user would otherwise write (`cp2image.benchmarks`)."""

    which: Annotated[
        list[Literal["measure", "generate", "train", "input", "evaluate", "screen"]],
        Field(min_length=1),
    ] = ["measure"]
    output: str = ""
    patches: Positive = 96
    """Patches that both ways work on; the plain way takes a tenth of a second for each."""
    repetitions: Positive = 5
    sizes: Annotated[list[Annotated[Count, Field(ge=2)]], Field(min_length=1)] = [
        1_000,
        10_000,
        50_000,
    ]
    """Numbers of patches over which growth is shown; the largest takes 60 kB of memory each."""
    drawn: Positive = 416
    """Cells that both generators draw."""
    plate_cells: Annotated[Positive, Field(ge=4)] = 61_440
    """Cells of the plate that the whole generation job draws; 35 kB of disk each."""
    small_plate_cells: Annotated[Positive, Field(ge=4)] = 20_480
    """Cells of a plate that the job draws once, to show what its start costs."""
    bare_cells: Annotated[Positive, Field(ge=64)] = 8_192
    """Cells that the bare model draws before and after each job, in two ways."""
    growth: bool = True
    """Whether cost is also shown over numbers of features, sides of patches and batches."""
    jobs: Positive = 5
    """How often the whole generation job is run."""
    screens: Annotated[list[Annotated[Count, Field(ge=8)]], Field(min_length=1)] = [
        100_000,
        1_000_000,
    ]
    """Cells of the screens, of small patches, over which the generation job's growth is shown."""
    screen_jobs: Positive = 3
    """How often each of them is generated."""
    batch: Annotated[Positive, Field(ge=4, multiple_of=2)] = 104
    """Cells of a training step, for two workers too; the plain script needs about 3 MB for each."""
    followed_steps: Positive = 200
    followed_batch: Positive = 13
    """Steps and cells over which the losses of both ways are compared."""
    read_cells: Annotated[Positive, Field(ge=208)] = 65_536
    """Cells that are read from a dataset and from one file each; 60 kB of disk and 36 kB of memory
    each."""
    evaluated_cells: Positive = 10_000
    """Real cells of the evaluation that is timed, and as many generated ones."""


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
        data = self.model_dump()
        for section, keys in _PATHS.items():
            for key in keys:
                data[section][key] = _absolute(data[section][key])
        prepare = data["prepare"]
        folders = prepare["image_folders"]
        prepare["image_folders"] = {start: _absolute(goal) for start, goal in folders.items()}
        if prepare["stacks"]:
            prepare["stacks"]["index"] = _absolute(prepare["stacks"]["index"])
        wells = data["mechanisms"]
        for extra in [
            *prepare["metadata_files"],
            *wells["joined"],
            *filter(None, [wells["profiles"]]),
        ]:
            extra["uri"] = _absolute(extra["uri"])
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
            for place in ("input", "output", "checkpoint"):
                chosen[section].pop(place, None)
            if isinstance(chosen[section].get("plates"), list):
                del chosen[section]["plates"]
            for later in _LATER.get(section, ()):
                if chosen[section][later] is None:
                    del chosen[section][later]
        text = json.dumps([chosen, sorted(inputs)], sort_keys=True)
        return sha256(text.encode()).hexdigest()[:16]


_LATER = {"split": ("seed",), "train": ("beta",), "generate": ("by",)}
"""Settings that count only where they are set: what was made before they came stays valid."""
_JOB_COPY = "/runtime_resources/working_dir_files/"
_PATHS = {
    "run": ["folder"],
    "simulate": ["output"],
    "prepare": ["tables", "images", "output"],
    "measure": ["input", "output"],
    "train": ["input", "output"],
    "generate": ["input", "checkpoint", "output"],
    "evaluate": ["real", "generated", "output", "checkpoint", "inception_weights"],
    "compare": ["output"],
    "explore": ["input", "checkpoint", "output"],
    "tune": ["output"],
    "mechanisms": ["output"],
    "sanity": ["input", "output"],
    "benchmark": ["output"],
}


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return [_absolute(one) for one in value]
    if not value or "://" in value or value.startswith(("models:/", "runs:/")):
        return value
    return os.path.abspath(os.path.expanduser(value))


def local_folder(uri: str) -> Path | None:
    """Return ``uri`` as an absolute local path, or None when it is on object storage."""
    return None if uri.startswith("s3://") else Path(filesystem(uri)[1])
