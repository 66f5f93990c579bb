"""How LSGAN is trained: least squares (Mao et al., ICCV 2017) as CytoGAN does. Pure torch."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cp2image.models.keyed_noise import keyed_normal
from cp2image.models.lsgan import NOISE, LsganDiscriminator, LsganGenerator
from cp2image.models.recipe import Average, Batch, load_optimiser, optimiser_state, part_of

LEARNING_RATE = 2e-4
_BETAS = (0.5, 0.999)
_INPUT_NOISE = 0.1
"""Standard deviation of the noise on what the discriminator sees, for intensities of [0, 1]."""
_LABELS = (0.8, 1.0)
"""Real patches' labels are drawn evenly from here."""


class LsganRecipe:
    """Both networks, their optimisers, and one training step.

    Discriminator: ½ (D(real) − label)² + ½ D(drawn)², labels in [0.8, 1], noise on its input;
    generator: ½ (D(drawn) − 1)². Learning rate and the noise's strength are not published: 2e-4 as
    in DCGAN, and 0.1.

    Parameters
    ----------
    channels, patch_size
        Size of the networks.
    learning_rate
        Of both networks' Adam (β 0.5 and 0.999).
    bf16
        Run both networks under bfloat16 autocast.
    device
        Where the networks live; on CPUs with channels last.
    """

    needs_real = False
    ready = True

    def __init__(
        self,
        channels: int,
        patch_size: int,
        *,
        learning_rate: float = LEARNING_RATE,
        bf16: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.generator: nn.Module = LsganGenerator(channels, patch_size).to(device)
        self.discriminator = LsganDiscriminator(channels, patch_size).to(device)
        if torch.device(device).type == "cpu":
            for network in (self.generator, self.discriminator):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.bf16, self._device = bf16, torch.device(device)
        self._g, self._d = list(self.generator.parameters()), list(self.discriminator.parameters())
        self.generator_optimiser = torch.optim.Adam(self._g, lr=learning_rate, betas=_BETAS)
        self.discriminator_optimiser = torch.optim.Adam(self._d, lr=learning_rate, betas=_BETAS)

    def step(self, batch: Batch, step: int, average: Average) -> dict[str, Tensor]:
        """Train both networks on one batch; each sees the other as it was before the step.

        Parameters
        ----------
        batch
            This rank's cells; features and ``real`` are not used.
        step
            Not used: nothing changes over time.
        average
            Called once for each network's gradients.

        Returns
        -------
        dict
            ``L_generator``, ``L_Dis``: scalars without gradients.
        """
        self.generator.train()
        count, random = len(batch.original), torch.Generator(self._device).manual_seed(batch.seed)
        with self._autocast():
            drawn = self.generator(self._normal((count, NOISE), random))
        seen = drawn.detach().float().requires_grad_()
        patches = torch.cat([batch.original, seen])
        with self._autocast():
            noise = _INPUT_NOISE * self._normal(patches.shape, random)
            scores = self.discriminator(patches + noise).float()
        low, high = _LABELS
        labels = torch.rand(count, generator=random, device=self._device) * (high - low) + low
        real, fake = scores.chunk(2)
        told = 0.5 * ((real - labels).square().mean() + fake.square().mean())
        fooled = 0.5 * (fake - 1).square().mean()
        (pull,) = torch.autograd.grad(fooled, seen, retain_graph=True)
        to_discriminator = torch.autograd.grad(told, self._d)
        to_generator = torch.autograd.grad(drawn, self._g, pull.to(drawn.dtype))
        self._update(self._d, to_discriminator, self.discriminator_optimiser, average)
        self._update(self._g, to_generator, self.generator_optimiser, average)
        return {"L_generator": fooled.detach(), "L_Dis": told.detach()}

    def _normal(self, size: Sequence[int], random: torch.Generator) -> Tensor:
        return torch.randn(size, generator=random, device=self._device)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _update(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        optimiser: torch.optim.Optimizer,
        average: Average,
    ) -> None:
        average(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def reached(self, share: float) -> None:
        """Do nothing: the learning rates are constant."""

    def draw(
        self, features: Tensor, keys: Tensor, seed: int = 0, images: Tensor | None = None
    ) -> Tensor:
        """Draw from noise by the cells' keys, in evaluation mode: (N, C, H, W) in [0, 1]."""
        self.generator.eval()
        drawn: Tensor = self.generator(keyed_normal(keys, NOISE, seed))
        return drawn

    def published(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights a checkpoint holds: generator, discriminator."""
        return self.generator.state_dict(), self.discriminator.state_dict()

    def state(self) -> dict[str, Tensor]:
        """Return networks and optimisers, flat."""
        found = {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        found |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        found |= optimiser_state("generator_optimiser", self.generator_optimiser)
        return found | optimiser_state("discriminator_optimiser", self.discriminator_optimiser)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back networks and optimisers, from any device."""
        self.generator.load_state_dict(part_of(state, "generator"))
        self.discriminator.load_state_dict(part_of(state, "discriminator"))
        load_optimiser(state, "generator_optimiser", self.generator_optimiser)
        load_optimiser(state, "discriminator_optimiser", self.discriminator_optimiser)
