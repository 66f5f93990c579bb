"""How VAE and VAEplus are trained. Pure torch.

VAE: L_MSE + β KL, the negative evidence bound of a Gaussian of unit variance per pixel and channel
(Kingma and Welling, ICLR 2014). VAEplus adds Σ γ_i L_H,i of a discriminator that learns beside it
(Lafarge et al., MIDL 2019): everything but the encoder is CP2Image's own step.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from cp2image.models.keyed_noise import keyed_normal
from cp2image.models.losses import pixel_loss
from cp2image.models.recipe import (
    OPTIMISERS,
    Average,
    Batch,
    OptimiserSetting,
    PaperRecipe,
    load_optimiser,
    optimiser_state,
    part_of,
)
from cp2image.models.vae import LATENT, Vae

BETA, BETA_PLUS = 1.0, 2.0
"""Weight of KL in VAE (the evidence bound) and in VAEplus (the paper's)."""


class VaeRecipe:
    """Encoder and decoder, their optimiser, and one training step; no discriminator.

    Parameters
    ----------
    channels, patch_size
        Size of the networks.
    setting
        Learning rates; the generator's is the one used.
    beta
        Weight of KL.
    bf16
        Run the networks under bfloat16 autocast.
    device
        Where they live; on CPUs with channels last.
    """

    needs_real = False
    ready = True
    decay = PaperRecipe.decay

    def __init__(
        self,
        channels: int,
        patch_size: int,
        *,
        setting: OptimiserSetting = OPTIMISERS["as_run"],
        beta: float = BETA,
        bf16: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.generator = Vae(channels, patch_size).to(device)
        if torch.device(device).type == "cpu":
            self.generator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.beta, self.bf16, self._device = beta, bf16, torch.device(device).type
        self._parameters = list(self.generator.parameters())
        self._kernels: list[Tensor] = [p for p in self._parameters if p.ndim > 1]
        self.optimiser = torch.optim.Adam(
            self._parameters, lr=setting.generator, betas=(0.9, 0.999), eps=1e-7
        )

    def step(self, batch: Batch, step: int, average: Average) -> dict[str, Tensor]:
        """Train on one batch.

        Parameters
        ----------
        batch
            This rank's cells; features and ``real`` are not used.
        step
            Not used: nothing changes over time.
        average
            Called once with the gradients.

        Returns
        -------
        dict
            ``L_MSE``, ``L_KL`` (β · KL), ``L_generator`` (their sum): scalars without gradients.
        """
        self.generator.train()
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self.bf16):
            drawn, kl = self.generator(batch.original, latent_noise(batch))
        pixel, weighted = pixel_loss(batch.original, drawn.float()), self.beta * kl
        gradients = torch.autograd.grad(pixel + weighted, self._parameters)
        average(gradients)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_mul_(self._kernels, 1 - self.decay)
        losses = {"L_MSE": pixel, "L_KL": weighted, "L_generator": pixel + weighted}
        return {name: value.detach() for name, value in losses.items()}

    def reached(self, share: float) -> None:
        """Do nothing: the learning rate is constant."""

    def draw(
        self, features: Tensor, keys: Tensor, seed: int = 0, images: Tensor | None = None
    ) -> Tensor:
        """Reconstruct ``images``, or draw from the prior without them, see `draw_vae`."""
        return draw_vae(self.generator, keys, seed, images)

    def published(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights a checkpoint holds: encoder and decoder; no discriminator."""
        return self.generator.state_dict(), {}

    def state(self) -> dict[str, Tensor]:
        """Return networks and optimiser, flat."""
        found = {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        return found | optimiser_state("optimiser", self.optimiser)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back networks and optimiser, from any device."""
        self.generator.load_state_dict(part_of(state, "generator"))
        load_optimiser(state, "optimiser", self.optimiser)


class VaePlusRecipe(PaperRecipe):
    """CP2Image's training step with images in the place of features, and β KL beside its losses.

    Parameters
    ----------
    channels, patch_size
        Size of the networks.
    setting
        Learning rates.
    gamma, gamma_ramp
        Final γ_1 … γ_4 and the ramp in steps, see `gamma_at`.
    beta
        Weight of KL.
    bf16
        Run the networks under bfloat16 autocast.
    device
        Where they live.
    """

    def __init__(
        self,
        channels: int,
        patch_size: int,
        *,
        setting: OptimiserSetting = OPTIMISERS["as_run"],
        gamma: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        gamma_ramp: int = 2500,
        beta: float = BETA_PLUS,
        bf16: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.beta = beta
        super().__init__(
            LATENT,
            channels,
            patch_size,
            setting=setting,
            gamma=gamma,
            gamma_ramp=gamma_ramp,
            bf16=bf16,
            device=device,
        )

    def _build(self, features: int, channels: int, patch_size: int) -> nn.Module:
        return Vae(channels, patch_size)

    def _generate(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        drawn, kl = self.generator(batch.original, latent_noise(batch))
        return drawn, {"L_KL": self.beta * kl}

    def draw(
        self, features: Tensor, keys: Tensor, seed: int = 0, images: Tensor | None = None
    ) -> Tensor:
        """Reconstruct ``images``, or draw from the prior without them, see `draw_vae`."""
        return draw_vae(cast(Vae, self.generator), keys, seed, images)


def latent_noise(batch: Batch) -> Tensor:
    """Return a step's latent noise, (N, 256): the batch's seed decides it."""
    device = batch.original.device
    random = torch.Generator(device).manual_seed(batch.seed)
    return torch.randn(len(batch.original), LATENT, generator=random, device=device)


def draw_vae(network: Vae, keys: Tensor, seed: int, images: Tensor | None) -> Tensor:
    """Draw in evaluation mode: (N, C, H, W) in [0, 1].

    Parameters
    ----------
    network
        Is put into evaluation mode.
    keys, seed
        Decide the latent vectors where there are no images, see `keyed_normal`.
    images
        In [0, 1], (N, C, H, W): decoded from the means of their latent vectors.
    """
    network.eval()
    latent = keyed_normal(keys, LATENT, seed) if images is None else network.encoder(images)[0]
    drawn: Tensor = network.decoder(latent).clamp_(0, 1)
    return drawn
