"""How cp2image-s is trained: relativistic loss, gradient penalties, regression. Pure torch."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from cp2image.models.losses import pixel_loss
from cp2image.models.recipe import Average, Batch, load_optimiser, optimiser_state, part_of
from cp2image.models.stochastic import StochasticDiscriminator, StochasticGenerator


@dataclass(frozen=True)
class StochasticSetting:
    """What training is made of; 0 switches a part off.

    Attributes
    ----------
    learning_rate
        Of both networks' Adam (β 0 and 0.99).
    pixel
        Weight of L_MSE between a cell and the mean of its draws.
    draws
        Draws of a cell whose mean L_MSE sees.
    regression
        Weight of ½ Σ (feature − feature as predicted from the patch)² / p.
    penalty
        γ of R1 + R2: γ/2 · |∇ score|², for real and for generated patches.
    penalty_every
        Steps from one penalty to the next; it counts that many times.
    ema
        Decay of the averaged generator, per step, once training is under way.
    cooldown
        Share of the training, its last, in which the learning rates fall to 0 in a line.
    """

    learning_rate: float = 4e-4
    pixel: float = 0.005
    draws: int = 1
    regression: float = 1.0
    penalty: float = 0.3
    penalty_every: int = 8
    ema: float = 0.999
    cooldown: float = 0.3


class StochasticRecipe:
    """Both networks, their optimisers, the averaged generator, and one training step.

    The discriminator learns to tell a cell from a draw of the same features by the difference of
    their scores, softplus(score(draw) − score(cell)), the generator the reverse (relativistic
    pairing, Jolicoeur-Martineau, ICLR 2019; with R1 + R2 as in R3GAN, Huang et al., NeurIPS 2024).

    Parameters
    ----------
    features, channels, patch_size
        Size of the networks.
    setting
        What the losses are made of.
    bf16
        Run both networks under bfloat16 autocast; penalties stay in float32.
    device
        Where the networks live; on CPUs with channels last.
    """

    needs_real = False

    def __init__(
        self,
        features: int,
        channels: int,
        patch_size: int,
        *,
        setting: StochasticSetting = StochasticSetting(),
        bf16: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.generator: nn.Module = StochasticGenerator(features, channels, patch_size).to(device)
        self.discriminator = StochasticDiscriminator(features, channels, patch_size).to(device)
        for network in (self.generator, self.discriminator):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = deepcopy(self.generator).requires_grad_(False)
        self.setting, self.bf16 = setting, bf16
        self._device = torch.device(device)
        self._g, self._d = list(self.generator.parameters()), list(self.discriminator.parameters())
        rate, betas = setting.learning_rate, (0.0, 0.99)
        self.generator_optimiser = torch.optim.Adam(self._g, lr=rate, betas=betas, fused=True)
        self.discriminator_optimiser = torch.optim.Adam(self._d, lr=rate, betas=betas, fused=True)

    def reached(self, share: float) -> None:
        """Set the learning rates by the share of the training that is done, 0 to 1."""
        left, cooldown = 1 - min(share, 1.0), self.setting.cooldown
        rate = self.setting.learning_rate * (min(1.0, left / cooldown) if cooldown else 1.0)
        for optimiser in (self.generator_optimiser, self.discriminator_optimiser):
            for group in optimiser.param_groups:
                group["lr"] = rate

    def step(self, batch: Batch, step: int, average: Average) -> dict[str, Tensor]:
        """Train both networks on one batch; each sees the other as it was before the step.

        So each patch passes through the discriminator once.

        Parameters
        ----------
        batch
            This rank's cells; ``real`` is not used.
        step
            Steps done before.
        average
            Called once for each network's gradients.

        Returns
        -------
        dict
            ``L_MSE``, ``L_generator`` (without L_MSE), ``L_Dis``, ``L_features`` (real patches)
            and ``penalty`` (|∇ score|², real and generated, times `penalty_every` where it is
            taken and 0 elsewhere, so that its mean over steps is right): scalars without
            gradients.
        """
        setting, features = self.setting, batch.features
        random = torch.Generator(self._device).manual_seed(batch.seed)
        draws = [self._draw(features, random) for _ in range(setting.draws)]
        seen_draw = draws[0].detach().requires_grad_()
        with self._autocast():
            score, seen = self.discriminator(batch.original, features)
            fake_score, fake_seen = self.discriminator(seen_draw, features)
        difference = score.float() - fake_score.float()
        loss, adversarial = softplus(-difference).mean(), softplus(difference).mean()
        regression = _distance(seen, features)
        if setting.regression:
            adversarial = adversarial + setting.regression * _distance(fake_seen, features)
        (pull,) = torch.autograd.grad(adversarial, seen_draw, retain_graph=True)
        total = loss + setting.regression * regression
        steepness = self._update_discriminator(batch, total, seen_draw, step, average)
        mean = torch.stack(draws).mean(dim=0) if setting.draws > 1 else draws[0]
        pixel = pixel_loss(batch.original, mean)
        gradients = torch.autograd.grad(
            [draws[0], setting.pixel * pixel], self._g, [pull, torch.ones_like(pixel)]
        )
        self._update(self._g, gradients, self.generator_optimiser, average)
        self._follow(step)
        losses = {"L_MSE": pixel, "L_generator": adversarial, "L_Dis": loss}
        losses |= {"L_features": regression, "penalty": steepness}
        return {name: value.detach() for name, value in losses.items()}

    def _update_discriminator(
        self, batch: Batch, total: Tensor, drawn: Tensor, step: int, average: Average
    ) -> Tensor:
        """Update by the gradients of ``total`` and, every so many steps, the penalty's."""
        setting, features = self.setting, batch.features
        steepness = torch.zeros_like(total)
        gradients = list(torch.autograd.grad(total, self._d, allow_unused=True))
        if setting.penalty and step % setting.penalty_every == 0:
            steepness = self._steepness(torch.cat([batch.original, drawn]), features)
            weight = 0.5 * setting.penalty * setting.penalty_every
            more = torch.autograd.grad(weight * steepness, self._d, allow_unused=True)
            for i, extra in enumerate(more):
                known = gradients[i]
                gradients[i] = known if extra is None else extra if known is None else known + extra
            steepness = steepness * setting.penalty_every
        filled = [
            torch.zeros_like(p) if g is None else g for p, g in zip(self._d, gradients, strict=True)
        ]
        self._update(self._d, filled, self.discriminator_optimiser, average)
        return steepness

    def _steepness(self, patches: Tensor, features: Tensor) -> Tensor:
        """|∇ score|² of real and of generated patches, each the mean over cells; their sum."""
        patches = patches.detach().requires_grad_()
        scores, _ = self.discriminator(patches, torch.cat([features, features]))
        (gradient,) = torch.autograd.grad(scores.sum(), patches, create_graph=True)
        return gradient.square().sum() / len(features)

    def _draw(self, features: Tensor, random: torch.Generator) -> Tensor:
        size = (len(features), self.generator.noise_size)
        noise = torch.randn(size, generator=random, device=self._device)  # type: ignore[arg-type]
        with self._autocast():
            drawn: Tensor = self.generator(features, noise)
        return drawn.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _update(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        optimiser: torch.optim.Optimizer,
        average: Average,
    ) -> None:
        average(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _follow(self, step: int) -> None:
        """Move the averaged generator; in the beginning its memory grows with the steps."""
        keep = min(self.setting.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            averaged: list[Tensor] = list(self.averaged.parameters())
            new: list[Tensor] = list(self._g)
            torch._foreach_lerp_(averaged, new, 1 - keep)

    def draw(
        self, features: Tensor, keys: Tensor, seed: int = 0, images: Tensor | None = None
    ) -> Tensor:
        """Draw with the averaged generator, noise by the cells' keys: (N, C, H, W) in [0, 1]."""
        noise = self.averaged.noise(keys, seed)
        drawn: Tensor = self.averaged(features, noise)
        return drawn

    def published(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights a checkpoint holds: averaged generator, discriminator."""
        return self.averaged.state_dict(), self.discriminator.state_dict()

    def state(self) -> dict[str, Tensor]:
        """Return networks and optimisers, flat."""
        found = {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        found |= {f"averaged.{k}": v for k, v in self.averaged.state_dict().items()}
        found |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        found |= optimiser_state("generator_optimiser", self.generator_optimiser)
        return found | optimiser_state("discriminator_optimiser", self.discriminator_optimiser)

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back networks and optimisers, from any device."""
        self.generator.load_state_dict(part_of(state, "generator"))
        self.averaged.load_state_dict(part_of(state, "averaged"))
        self.discriminator.load_state_dict(part_of(state, "discriminator"))
        load_optimiser(state, "generator_optimiser", self.generator_optimiser)
        load_optimiser(state, "discriminator_optimiser", self.discriminator_optimiser)


def _distance(seen: Tensor, features: Tensor) -> Tensor:
    """½ Σ (feature − prediction)² / p, the mean over cells."""
    return 0.5 * (seen.float() - features).square().mean()
