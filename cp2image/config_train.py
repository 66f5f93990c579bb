"""Config of training: split, scaling, train. Ground floor."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cp2image.columns import CATEGORIES
from cp2image.config_section import Amount, Count, NotNegative, Positive, Section, Share


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
    """Feature selection and scaling against the negative control."""

    by: Literal["plate", "screen"] | None = None
    """``plate``: each plate's features by its own controls; ``screen``: all alike, by the controls
    of all plates. None: ``screen`` for the preset ``cp2image-s``, ``plate`` for the others."""
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

    autoencoder: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Share of the training, its first, in which patches are learned: the autoencoder's. Where a
    finished run is given more steps, it learns again for that share of them."""
    autoencoder_rate: Amount = 2e-3
    """Learning rate meanwhile; afterwards half of it is the decoder's, which goes on to learn."""
    divergence: NotNegative = 1.0
    """Weight of the autoencoder's KL."""
    alone: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the training after that in which the generator learns by the energy score alone,
    before there is an adversary."""
    learning_rate: Amount = 6e-4
    """Of generator and discriminator afterwards, at its highest."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the time afterwards, its first, in which that rate rises from 0 in a line."""
    energy: NotNegative = 0.03
    """Weight of the energy score of two draws of each cell; near the end it falls to 0."""
    regression: NotNegative = 6.0
    """Weight of the features as the discriminator reads them from latents; near the end it rises to
    three times as much."""
    measured: Count = 16
    """Draws that are measured every 8 steps over all workers, a batch at most, so that the
    discriminator learns to read draws as well as cells. Only where the features are
    jobs/measure.py's, made with the same ``measure`` section."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.3
    """Share of what features are read from that is left out in each step."""
    penalty: NotNegative = 1.0
    """γ of the gradient penalties R1 + R2."""
    penalty_every: Positive = 8
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged generator per step."""
    cooldown: Annotated[float, Field(ge=0, le=1)] = 0.6
    """Share of that time, its last, in which that rate falls to 0 in a line."""

    @model_validator(mode="after")
    def _leave_time_for_the_adversary(self) -> "Stochastic":
        if self.autoencoder + self.alone >= 1:
            raise ValueError(
                f"autoencoder={self.autoencoder:g} and alone={self.alone:g} are shares of "
                "one training and leave nothing of it for the adversary; make their sum less than 1"
            )
        return self


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
    turned: str = ""
    """The same cells turned and mirrored, as jobs/measure.py with measure.turned makes them: each
    cell is seen in all eight orientations. Worth it where cells are seen many times."""
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
    ``lsgan``; for ``cp2image-s`` 16, or 64 on a GPU."""
    balance: Literal["treatment", "cell"] = "treatment"
    """Draw every treatment alike (the paper's way), or every cell alike: better where many
    treatments have a handful of cells, which would be seen again and again."""
    normalisation: Literal["per_patch_max", "plate_percentile", "screen_percentile"] | None = None
    """Of patches. None: ``screen_percentile`` for ``cp2image-s``, which keeps what intensity
    features are about, within plates and between them (``plate_percentile``: within them); for
    the others the paper's ``per_patch_max``."""
    workers: Positive = 1
    threads: Positive | None = None
    """Torch threads per worker; None: the CPUs divided by the workers."""
    gpu: bool = False
    bf16: bool | Literal["auto"] | None = None
    """Run the networks in bfloat16; ``auto``: on CPUs that multiply in it, elsewhere it is slower
    than float32. None: ``auto`` for ``cp2image-s``, float32 for the others."""
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
        own = {"cp2image-s": 64 if self.gpu else 16, "lsgan": 64}.get(self.preset, treatments)
        return self.batch_size or max(own, self.workers)

    @property
    def intensity(self) -> str:
        """The normalisation of patches, the preset's own where none is set."""
        own = "screen_percentile" if self.preset == "cp2image-s" else "per_patch_max"
        return self.normalisation or own
