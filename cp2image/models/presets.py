"""The models by name: what they see, and what draws a checkpoint's patches. Pure torch."""

from typing import Protocol

import torch
from torch import Tensor, nn

from cp2image.errors import CheckpointError
from cp2image.models.cp2image import Generator
from cp2image.models.folded_generator import FoldedGenerator
from cp2image.models.keyed_noise import keyed_normal
from cp2image.models.lsgan import NOISE, LsganGenerator
from cp2image.models.stochastic import StochasticGenerator
from cp2image.models.vae import LATENT, Vae

PAPER, STOCHASTIC, VAE, VAE_PLUS, LSGAN = "paper", "cp2image-s", "vae", "vaeplus", "lsgan"
PRESETS = (PAPER, STOCHASTIC, VAE, VAE_PLUS, LSGAN)
"""Networks that a checkpoint's weights can belong to."""

_SEES = {PAPER: ("features",), STOCHASTIC: ("features", "noise"), LSGAN: ("noise",)}
_RECONSTRUCT = (VAE, VAE_PLUS)


def reconstructs(preset: str) -> bool:
    """Tell whether a model can draw a cell from its own image."""
    return preset in _RECONSTRUCT


def sees(preset: str, *, image: bool) -> tuple[str, ...]:
    """Return what a draw depends on: ``features``, ``noise``, ``image``.

    Parameters
    ----------
    preset
        One of `PRESETS`.
    image
        Whether models that can are shown the cells' images; without them they draw from noise.
    """
    if reconstructs(preset):
        return ("image",) if image else ("noise",)
    return _SEES[preset]


class Drawer(Protocol):
    """Draws patches from trained weights."""

    def __call__(
        self, features: Tensor, keys: Tensor, seed: int, images: Tensor | None = None
    ) -> Tensor:
        """Return patches, (N, C, H, W), about [0, 1].

        Parameters
        ----------
        features
            Scaled, (N, p).
        keys
            Of the cells, (N,) int64: with the seed they decide the noise.
        seed
            Of the noise.
        images
            The cells themselves, (N, C, H, W) in [0, 1], for models that see them.
        """


def build_drawer(
    preset: str,
    sizes: tuple[int, int, int],
    weights: dict[str, Tensor],
    *,
    device: str = "cpu",
    bf16: bool = False,
) -> Drawer:
    """Return what draws patches from trained weights.

    Parameters
    ----------
    preset
        One of `PRESETS`.
    sizes
        Features, channels, side of a patch.
    weights
        State dict of the preset's generator.
    device
        Where it draws.
    bf16
        Draw in bfloat16.

    Raises
    ------
    CheckpointError
        If the weights are another network's.
    """
    return _BUILDERS[preset](sizes, weights, device, bf16)


def _paper(
    sizes: tuple[int, int, int], weights: dict[str, Tensor], device: str, bf16: bool
) -> Drawer:
    trained = Generator(*sizes)
    _fill(trained, weights)
    folded = FoldedGenerator(trained.eval(), _kind(bf16)).to(device)

    def draw(features: Tensor, keys: Tensor, seed: int, images: Tensor | None = None) -> Tensor:
        drawn: Tensor = folded(features)
        return drawn

    return draw


def _stochastic(
    sizes: tuple[int, int, int], weights: dict[str, Tensor], device: str, bf16: bool
) -> Drawer:
    generator = StochasticGenerator(*sizes)
    _fill(generator, weights)
    _place(generator, device)

    def draw(features: Tensor, keys: Tensor, seed: int, images: Tensor | None = None) -> Tensor:
        noise = generator.noise(keys, seed)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16):
            drawn: Tensor = generator(features, noise)
        return drawn.float()

    return draw


def _vae(
    sizes: tuple[int, int, int], weights: dict[str, Tensor], device: str, bf16: bool
) -> Drawer:
    trained = Vae(*sizes[1:])
    _fill(trained, weights)
    decoder = FoldedGenerator(trained.eval().decoder, _kind(bf16)).to(device)
    encoder = trained.encoder
    _place(encoder, device)

    def draw(features: Tensor, keys: Tensor, seed: int, images: Tensor | None = None) -> Tensor:
        if images is None:
            latent = keyed_normal(keys, LATENT, seed)
        else:
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16):
                latent = encoder(images.contiguous(memory_format=torch.channels_last))[0].float()
        drawn: Tensor = decoder(latent)
        return drawn

    return draw


def _lsgan(
    sizes: tuple[int, int, int], weights: dict[str, Tensor], device: str, bf16: bool
) -> Drawer:
    generator = LsganGenerator(*sizes[1:])
    _fill(generator, weights)
    _place(generator, device)

    def draw(features: Tensor, keys: Tensor, seed: int, images: Tensor | None = None) -> Tensor:
        noise = keyed_normal(keys, NOISE, seed)
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=bf16):
            drawn: Tensor = generator(noise)
        return drawn.float()

    return draw


_BUILDERS = {
    PAPER: _paper,
    STOCHASTIC: _stochastic,
    VAE: _vae,
    VAE_PLUS: _vae,
    LSGAN: _lsgan,
}


def _fill(network: nn.Module, weights: dict[str, Tensor]) -> None:
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:  # what torch raises for names and shapes that do not fit
        raise CheckpointError(
            f"the weights do not fit {type(network).__name__} as this version has it (names or "
            "shapes differ): another version trained it; train it again"
        ) from error


def _kind(bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def _place(network: nn.Module, device: str) -> None:
    network.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
