"""From settings of a training to its recipe. Floor: beside training."""

from dataclasses import replace
from typing import Any

import torch

from cp2image.config_train import Train
from cp2image.data.schema import PatchFormat
from cp2image.models.bfloat16 import multiplies_bfloat16
from cp2image.models.lsgan_recipe import LEARNING_RATE, LsganRecipe
from cp2image.models.measured_draws import Measurement
from cp2image.models.presets import LSGAN, STOCHASTIC, VAE, VAE_PLUS
from cp2image.models.recipe import OPTIMISERS, PaperRecipe, Recipe
from cp2image.models.stochastic_recipe import StochasticRecipe
from cp2image.models.stochastic_setting import StochasticSetting
from cp2image.models.vae_recipe import BETA, BETA_PLUS, VaePlusRecipe, VaeRecipe


def build_recipe(
    settings: Train,
    shape: PatchFormat,
    features: int,
    device: torch.device,
    measurement: Measurement | None = None,
) -> Recipe:
    """Return new networks and optimisers of the preset.

    Parameters
    ----------
    settings
        Of the training; what is left open is the preset's own.
    shape
        Of the patches.
    features
        Number of CellProfiler features.
    device
        Where the networks live.
    measurement
        Measures draws, for ``cp2image-s``; None: none are.
    """
    channels, side = len(shape.channels), shape.size
    common: dict[str, Any] = {"bf16": in_bf16(settings, device), "device": device}
    if settings.preset == STOCHASTIC:
        made_of = StochasticSetting(**settings.stochastic.model_dump())
        return StochasticRecipe(
            features, channels, side, setting=made_of, measurement=measurement, **common
        )
    if settings.preset == LSGAN:
        rate = settings.learning_rate or LEARNING_RATE
        return LsganRecipe(channels, side, learning_rate=rate, **common)
    setting = OPTIMISERS[settings.optimiser]
    if settings.learning_rate is not None:
        setting = replace(setting, generator=settings.learning_rate)
    common["setting"] = setting
    if settings.preset == VAE:
        return VaeRecipe(channels, side, beta=_given(settings.beta, BETA), **common)
    common |= {"gamma": settings.gamma, "gamma_ramp": settings.gamma_ramp}
    if settings.preset == VAE_PLUS:
        return VaePlusRecipe(channels, side, beta=_given(settings.beta, BETA_PLUS), **common)
    return PaperRecipe(features, channels, side, **common)


def in_bf16(settings: Train, device: torch.device) -> bool:
    """Say whether the networks run in bfloat16: as is asked for, or the preset's own way."""
    asked = settings.bf16
    if asked is None:
        asked = "auto" if settings.preset == STOCHASTIC else False
    return multiplies_bfloat16(device) if asked == "auto" else asked


def _given(value: float | None, own: float) -> float:
    return own if value is None else value
