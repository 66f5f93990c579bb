"""How cp2image-s is trained: an autoencoder, then an adversary in its latents. Pure torch."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils import clip_grad_norm_

from cp2image.models.autoencoder import (
    PatchEncoder,
    decoding_misfit,
    evidence,
    from_log,
    sampled,
    to_log,
)
from cp2image.models.energy_score import latent_energy_score
from cp2image.models.grain import brightness, misfit
from cp2image.models.losses import pixel_loss
from cp2image.models.measured_draws import MeasuredDraws, Measurement
from cp2image.models.recipe import Average, Batch, load_optimiser, optimiser_state, part_of
from cp2image.models.stochastic import StochasticDiscriminator, StochasticGenerator
from cp2image.models.stochastic_setting import StochasticSetting

_GRAIN_CELLS = 4
"""Most cells of a step of the second part whose noise is looked at."""
_DECODE_EVERY, _DECODE_RATE, _DECODE_COOLDOWN = 8, 0.5, 0.3
"""Steps of the second part from one of the decoder's to the next; its share of the first's rate;
last share of the training after the generator's alone in which that falls to 0, the grain's too."""
_ALONE_RATE = 1e-3
"""Learning rate of the generator while there is no adversary; it falls over that part's half."""
_ENERGY_EVERY = 2
"""Steps of the second part from one with a second draw of each cell to the next."""
_LATE, _READING_LATE = 0.15, 3.0
"""Last share of the training after the generator's alone, in which the energy score's weight falls
to 0 and that of reading features rises; to how many times as much."""
_GRAIN_EVERY, _GRAIN_RATE, _GRAIN_DROPOUT = 2, 3e-4, 0.2
"""Steps of the second part from one to the next of what noise is filtered with; its learning rate;
share of the features that it does not see."""
_MEASURE_EVERY = 8
"""Steps of the second part from one measurement of draws to the next."""

_OPTIMISERS = tuple(
    f"{part}_optimiser" for part in ("generator", "alone", "autoencoder", "grain", "discriminator")
)

Random = torch.Generator
_AS_IT_IS = StochasticSetting()


class StochasticRecipe:
    """All networks, their optimisers, the averaged generator, and one training step.

    First the autoencoder learns patches; its decoder and what filters noise go on to the end. Next
    the generator learns by the energy score of two draws of each cell, see `latent_energy_score`:
    it alone asks that draws differ as cells do. That goes on in every second step; near the end its
    weight falls to 0 and that of reading features becomes three times as much, with which draws
    were seen to come nearer to cells (docs/trials.md). The discriminator learns to tell a cell's
    latents from drawn ones of the same features by the difference of their scores,
    softplus(score(draw) − score(cell)), the generator the reverse (relativistic pairing,
    Jolicoeur-Martineau, ICLR 2019; with R1 + R2 as in R3GAN, Huang et al., NeurIPS 2024); of two
    draws the discriminator sees the first. How features are read from latents it learns from cells
    and, where draws can be measured, from draws as well: else it would not know what becomes of a
    draw's flaws when it is measured, nor the generator. What draws still lack on average is asked
    for in addition.

    Parameters
    ----------
    features, channels, patch_size
        Size of the networks.
    setting
        What the losses are made of.
    bf16
        Run the networks under bfloat16 autocast; penalties stay in float32.
    device
        Where the networks live; on CPUs with channels last.
    measurement
        Measures draws; None: none are.
    """

    needs_real = False

    def __init__(
        self,
        features: int,
        channels: int,
        patch_size: int,
        *,
        setting: StochasticSetting = _AS_IT_IS,
        bf16: bool = False,
        device: torch.device | str = "cpu",
        measurement: Measurement | None = None,
    ) -> None:
        self.encoder = PatchEncoder(channels).to(device)
        self.generator = StochasticGenerator(features, channels, patch_size).to(device)
        self.discriminator = StochasticDiscriminator(features, channels, patch_size).to(device)
        for network in (self.encoder, self.generator, self.discriminator):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.averaged = deepcopy(self.generator).requires_grad_(False)
        for part in ("decoder", "grain"):  # not averaged: their rates fall to 0
            setattr(self.averaged, part, getattr(self.generator, part))
        self.setting, self.bf16 = setting, bf16
        self._device, self._share, self._followed = torch.device(device), 0.0, 0
        self._measurement = measurement
        self._measured = MeasuredDraws(self._latent_shape(1)[1:], features, self._device)
        self._g = list(self.generator.latents.parameters())
        self._d = list(self.discriminator.parameters())
        self._n = list(self.generator.grain.parameters())
        self._decoder = list(self.generator.decoder.parameters())
        self._a = [*self.encoder.parameters(), *self._decoder]
        rate, betas = setting.learning_rate, (0.0, 0.99)
        self.generator_optimiser = torch.optim.Adam(self._g, lr=rate, betas=betas, fused=True)
        self.discriminator_optimiser = torch.optim.Adam(self._d, lr=rate, betas=betas, fused=True)
        self.alone_optimiser = torch.optim.Adam(
            self._g, lr=_ALONE_RATE, betas=(0.9, 0.99), fused=True
        )
        self.autoencoder_optimiser = torch.optim.Adam(
            self._a, lr=setting.autoencoder_rate, betas=(0.9, 0.99), fused=True
        )
        self.grain_optimiser = torch.optim.Adam(
            self._n, lr=_GRAIN_RATE, betas=(0.9, 0.99), fused=True
        )
        self.reached(0.0)

    @property
    def ready(self) -> bool:
        """Whether the generator has learned at all; before, draws say nothing of features."""
        return self._followed > 0

    def reached(self, share: float) -> None:
        """Set learning rates and weights of losses by the share of the training done, 0 to 1."""
        setting, self._share = self.setting, share
        first, then = setting.autoencoder, setting.autoencoder + setting.alone
        left = 1 - min(max(share - then, 0.0) / (1 - then), 1.0)
        cooled = min(1.0, left / setting.cooldown) if setting.cooldown else 1.0
        late = min(1.0, left / _DECODE_COOLDOWN)
        of_first = min(1.0, (1 - share / first) / 0.4) if share < first else _DECODE_RATE * late
        _set_rate(self.autoencoder_optimiser, setting.autoencoder_rate * of_first)
        until = (then - share) / setting.alone if setting.alone else 1.0
        _set_rate(self.alone_optimiser, _ALONE_RATE * min(max(2 * until, 0.0), 1.0))
        begun = min(1.0, (1 - left) / setting.warmup) if setting.warmup else 1.0
        for optimiser in (self.generator_optimiser, self.discriminator_optimiser):
            _set_rate(optimiser, setting.learning_rate * begun * cooled)
        _set_rate(self.grain_optimiser, _GRAIN_RATE * late)
        before_late = min(1.0, left / _LATE)
        self._energy = setting.energy * before_late
        self._reading = setting.regression * (_READING_LATE + (1 - _READING_LATE) * before_late)

    def step(self, batch: Batch, step: int, average: Average) -> dict[str, Tensor]:
        """Train on one batch: autoencoder, generator, then generator and discriminator.

        Of the last two each sees the other as it was before the step, so that latents pass through
        the discriminator once.

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
            Of the autoencoder ``L_MSE`` (of its mean), ``L_likelihood`` and ``L_KL``; of the
            generator alone ``L_energy``; then ``L_energy``, ``L_generator`` (without L_energy),
            ``L_Dis``, ``L_features`` (real cells), ``L_measured`` (the same of measured draws,
            where there are any) and ``penalty`` (|∇ score|², real and generated): scalars without
            gradients. L_energy beside a discriminator and the penalty are not taken in every step:
            0 where they are not, and as many times as much where they are, so that their means
            over steps are right.
        """
        random = torch.Generator(self._device).manual_seed(batch.seed)
        if self._share < self.setting.autoencoder:
            return self._encode_and_decode(batch, random, average)
        if self._share < self.setting.autoencoder + self.setting.alone:
            return self._learn_alone(batch, random, average)
        self.alone_optimiser.state.clear()  # else its moments would be in every later state
        return self._draw_and_judge(batch, step, random, average)

    def _encode_and_decode(
        self, batch: Batch, random: Random, average: Average
    ) -> dict[str, Tensor]:
        """Update the autoencoder by the evidence bound, a pixel's share of it."""
        values = to_log(batch.original)
        shape = self._latent_shape(len(values))
        noise = torch.randn(shape, generator=random, device=self._device)
        with self._autocast():
            misfit, divergence, decoded = evidence(
                self.encoder, self.generator.decoder, values, noise
            )
        total = (misfit + self.setting.divergence * divergence) / values[0].numel()
        gradients = torch.autograd.grad(total, self._a)
        self._update(self._a, gradients, self.autoencoder_optimiser, average, most=1.0)
        self._measured.forget()  # another autoencoder's latents
        pixel = pixel_loss(batch.original, from_log(decoded.detach()))
        losses = {"L_MSE": pixel, "L_likelihood": misfit, "L_KL": divergence}
        return {name: value.detach() for name, value in losses.items()}

    def _learn_alone(self, batch: Batch, random: Random, average: Average) -> dict[str, Tensor]:
        """Update the generator by the energy score of its draws."""
        with torch.no_grad(), self._autocast():
            real, _ = self.encoder(to_log(batch.original))
        drawn = self._draw(batch.features.repeat(2, 1), random)
        energy = latent_energy_score(real.float(), *drawn.chunk(2))
        gradients = torch.autograd.grad(energy, self._g)
        self._update(self._g, gradients, self.alone_optimiser, average)
        return {"L_energy": energy.detach()}

    def _draw_and_judge(
        self, batch: Batch, step: int, random: Random, average: Average
    ) -> dict[str, Tensor]:
        """Update discriminator and generator."""
        features = batch.features
        values = to_log(batch.original)
        with torch.no_grad(), self._autocast():
            real, unsure = (found.float() for found in self.encoder(values))
        twice = self._energy > 0 and step % _ENERGY_EVERY == 0
        drawn, *again = self._draw(features.repeat(1 + twice, 1), random).chunk(1 + twice)
        seen_draw = drawn.detach().requires_grad_()
        if self._measurement is not None and step % _MEASURE_EVERY == 0:
            self._measure(self._measurement, seen_draw.detach(), batch, random)
        measured, as_measured = self._measured.pick(len(real) // 2, random)
        known = torch.cat([real, measured.contiguous(memory_format=torch.channels_last)])
        asked = torch.cat([features, as_measured])
        with self._autocast():
            score, seen = self.discriminator(known, asked, self._kept(random, known))
            fake_score, fake_seen = self.discriminator(
                seen_draw, features, self._kept(random, real)
            )
        difference = score[: len(real)].float() - fake_score.float()
        loss, adversarial = softplus(-difference).mean(), softplus(difference).mean()
        regression = _distance(seen, asked)
        if self._reading:
            wanted = features + self._measured.correction
            adversarial = adversarial + self._reading * _distance(fake_seen, wanted)
        (pull,) = torch.autograd.grad(adversarial, seen_draw, retain_graph=True)
        total = loss + self._reading * regression
        both = torch.cat([real, seen_draw])
        steepness = self._update_discriminator(both, features, total, step, average)
        energy = loss.new_zeros(())
        asks, weights = [drawn], [pull]
        if again:
            energy = _ENERGY_EVERY * latent_energy_score(real, drawn, again[0])
            asks.append(self._energy * energy)
            weights.append(torch.ones_like(energy))
        gradients = torch.autograd.grad(asks, self._g, weights)
        self._update(self._g, gradients, self.generator_optimiser, average)
        if step % _DECODE_EVERY == 0:
            self._learn_to_decode(values, real, unsure, random, average)
        if step % _GRAIN_EVERY == 0:
            self._learn_grain(values, real, batch, random, average)
        self._follow()
        losses = {"L_energy": energy, "L_generator": adversarial, "L_Dis": loss}
        losses |= {"L_features": _distance(seen[: len(real)], features), "penalty": steepness}
        if len(measured):
            losses["L_measured"] = _distance(seen[len(real) :], as_measured)
        return {name: value.detach() for name, value in losses.items()}

    def _learn_to_decode(
        self, values: Tensor, mean: Tensor, log_variance: Tensor, random: Random, average: Average
    ) -> None:
        """Update the decoder only: what latents mean stays as the others have learned it."""
        noise = torch.randn(mean.shape, generator=random, device=self._device)
        latents = sampled(mean, log_variance, noise)
        with self._autocast():
            misfit, _ = decoding_misfit(self.generator.decoder, latents, values)
        gradients = torch.autograd.grad(misfit / values[0].numel(), self._decoder)
        self._update(self._decoder, gradients, self.autoencoder_optimiser, average, most=1.0)

    def _learn_grain(
        self, values: Tensor, latents: Tensor, batch: Batch, random: Random, average: Average
    ) -> None:
        """Learn what noise is like from some cells that lie as they were taken."""
        upright = torch.ones(len(values), dtype=torch.bool, device=self._device)
        if batch.orientations is not None:
            upright = batch.orientations == 0
        rows = upright.nonzero().flatten()[:_GRAIN_CELLS]
        shown = _kept((len(rows), batch.features.shape[1]), _GRAIN_DROPOUT, random)
        gradients = [torch.zeros_like(parameter) for parameter in self._n]
        if len(rows):
            with torch.no_grad(), self._autocast():
                decoded, log_deviation = self.generator.decoder(latents[rows])
            noise = (values[rows] - decoded).float() * (-log_deviation.float()).exp()
            bright, grain = brightness(decoded.float()), self.generator.grain
            weights = grain(batch.features[rows] * shown, latents[rows])
            size = (len(rows), grain.noise_size)
            white = torch.randn(size, generator=random, device=self._device)
            made = grain.drawn(weights.detach(), bright, white).detach()
            uneven = grain.unevenness_misfit(weights, bright, noise, made)
            total = misfit(weights, bright, noise) + uneven
            gradients = list(torch.autograd.grad(total, self._n))
        # Where a filter nears 0 the likelihood is steep, and one step could lead astray.
        self._update(self._n, gradients, self.grain_optimiser, average, most=1.0)

    def _measure(
        self, measurement: Measurement, drawn: Tensor, batch: Batch, random: Random
    ) -> None:
        """Make patches of some draws and take up what is measured in them."""
        drawn = drawn[: measurement.each]
        size = (len(drawn), self.generator.grain.noise_size)
        noise = torch.randn(size, generator=random, device=self._device)
        with torch.no_grad(), self._autocast():
            patches = self.generator.decode(drawn, batch.features[: len(drawn)], noise)
        asked, rows = batch.features[: len(drawn)], batch.rows[: len(drawn)]
        self._measured.add(*measurement(drawn, patches, asked, rows))

    def _kept(self, random: Random, latents: Tensor) -> Tensor | None:
        """Draw dropout's factors, (N, summed_up)."""
        share, shape = self.setting.dropout, (len(latents), self.discriminator.summed_up)
        return _kept(shape, share, random) if share else None

    def _latent_shape(self, cells: int) -> tuple[int, ...]:
        side = self.generator.latents.sides[-1]
        return (cells, self.generator.latents.last.out_channels, side, side)

    def _update_discriminator(
        self, both: Tensor, features: Tensor, total: Tensor, step: int, average: Average
    ) -> Tensor:
        """Update by the gradients of ``total`` and, every so many steps, the penalty's."""
        setting = self.setting
        steepness = torch.zeros_like(total)
        gradients = list(torch.autograd.grad(total, self._d, allow_unused=True))
        if setting.penalty and step % setting.penalty_every == 0:
            steepness = self._steepness(both, features)
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

    def _steepness(self, latents: Tensor, features: Tensor) -> Tensor:
        """|∇ score|² of real and of generated latents, each the mean over cells; their sum."""
        latents = latents.detach().requires_grad_()
        scores, _ = self.discriminator(latents, torch.cat([features, features]))
        (gradient,) = torch.autograd.grad(scores.sum(), latents, create_graph=True)
        return gradient.square().sum() / len(features)

    def _draw(self, features: Tensor, random: Random) -> Tensor:
        size = (len(features), self.generator.latents.noise_size)
        noise = torch.randn(size, generator=random, device=self._device)
        with self._autocast():
            drawn: Tensor = self.generator.latents(features, noise)
        return drawn.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def _update(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        optimiser: torch.optim.Optimizer,
        average: Average,
        most: float | None = None,
    ) -> None:
        """Step by the ranks' mean gradients, of a norm of at most ``most``."""
        average(gradients)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if most is not None:
            clip_grad_norm_(parameters, most)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def _follow(self) -> None:
        """Move the averaged generator; in the beginning its memory grows with the steps."""
        keep = min(self.setting.ema, (1 + self._followed) / (10 + self._followed))
        self._followed += 1
        with torch.no_grad():
            averaged: list[Tensor] = list(self.averaged.latents.parameters())
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
        """Return a checkpoint's weights: averaged generator; discriminator and encoder."""
        beside = {f"encoder.{k}": v for k, v in self.encoder.state_dict().items()}
        return self.averaged.state_dict(), {**self.discriminator.state_dict(), **beside}

    def state(self) -> dict[str, Tensor]:
        """Return networks and optimisers, flat."""
        found = {"followed": torch.tensor(self._followed)}
        found |= {f"measured.{k}": v for k, v in self._measured.state().items()}
        found |= {f"generator.{k}": v for k, v in self.generator.state_dict().items()}
        found |= {f"averaged.{k}": v for k, v in self.averaged.latents.state_dict().items()}
        found |= {f"encoder.{k}": v for k, v in self.encoder.state_dict().items()}
        found |= {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        for name in _OPTIMISERS:
            found |= optimiser_state(name, getattr(self, name))
        return found

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back networks and optimisers, from any device."""
        self._followed = int(state["followed"])
        self._measured.load_state(part_of(state, "measured"))
        self.generator.load_state_dict(part_of(state, "generator"))
        self.averaged.latents.load_state_dict(part_of(state, "averaged"))
        self.encoder.load_state_dict(part_of(state, "encoder"))
        self.discriminator.load_state_dict(part_of(state, "discriminator"))
        for name in _OPTIMISERS:
            load_optimiser(state, name, getattr(self, name))


def _kept(shape: tuple[int, ...], dropout: float, random: Random) -> Tensor:
    """Draw dropout's factors: 0 for that share, more than 1 for the others."""
    return (torch.rand(shape, generator=random, device=random.device) >= dropout) / (1 - dropout)


def _distance(seen: Tensor, features: Tensor) -> Tensor:
    """½ Σ (feature − prediction)² / p, the mean over cells."""
    return 0.5 * (seen.float() - features).square().mean()


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
