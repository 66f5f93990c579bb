"""Recipes: networks, their optimisers and one training step. Pure torch; one recipe per preset.

A recipe knows nothing of Ray: the loop that owns the data and the ranks calls `step`, and passes
in how gradients are averaged over ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cp2image.models.cp2image import Discriminator, Generator
from cp2image.models.discriminator_pass import DiscriminatorPass
from cp2image.models.losses import discriminator_gradient, gamma_at, hidden_gradients

Average = Callable[[Sequence[Tensor]], None]
"""Replaces gradients by their mean over all ranks, in place."""


@dataclass(frozen=True)
class Batch:
    """One step's cells.

    Attributes
    ----------
    original
        Normalised patches whose features are given, (N, C, H, W).
    features
        Their scaled features, (N, p).
    real
        A second, independent draw of patches, (N, C, H, W); none where a recipe needs none.
    seed
        Of all that is random in the step.
    orientations
        How each cell was turned, (N,) uint8, see `cp2image.data.orientations`; None: not at all.
    rows
        Which of the rank's cells ``original`` are, (N,), for a `Measurement` of what was drawn.
    """

    original: Tensor
    features: Tensor
    real: Tensor
    seed: int = 0
    orientations: Tensor | None = None
    rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class Recipe(Protocol):
    """What training, checkpoints and generation need of a model.

    Attributes
    ----------
    needs_real
        Whether a step needs a second draw of patches.
    ready
        Whether draws say anything yet; before, there is nothing to validate.
    """

    needs_real: bool

    @property
    def ready(self) -> bool:
        """See the class."""

    def step(self, batch: Batch, step: int, average: Average) -> dict[str, Tensor]:
        """Train on one batch; return named losses as scalars."""

    def reached(self, share: float) -> None:
        """Hear which share of the training is done, 0 to 1, for schedules; before some steps."""

    def draw(
        self, features: Tensor, keys: Tensor, seed: int = 0, images: Tensor | None = None
    ) -> Tensor:
        """Draw patches (N, C, H, W) in [0, 1] as the checkpoint will, see `Drawer`."""

    def published(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights of a checkpoint's generator and discriminator."""

    def state(self) -> dict[str, Tensor]:
        """Return everything that resuming needs, flat, by name."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned."""


@dataclass(frozen=True)
class OptimiserSetting:
    """Learning rates of generator (Adam) and discriminator (SGD, momentum 0.9)."""

    generator: float
    discriminator: float


OPTIMISERS = {
    "as_run": OptimiserSetting(generator=0.01, discriminator=0.001),
    "as_named": OptimiserSetting(generator=0.001, discriminator=0.01),
}
"""The authors' code swaps the names of its two learning rates: what it runs, what it names."""


class PaperRecipe:
    """CP2Image as published: L_MSE + Σ γ_i L_H,i for the generator, L_Dis for the discriminator.

    Both gradients come from one discriminator pass over [real, generated, original]; all kernels
    shrink by ``1e-4`` each step.

    Parameters
    ----------
    features, channels, patch_size
        Size of the networks.
    setting
        Learning rates.
    gamma, gamma_ramp
        Final γ_1 … γ_4 and the ramp in steps, see `gamma_at`.
    bf16
        Run both networks under bfloat16 autocast.
    device
        Where the networks live; on CPUs with channels last, which is twice as fast there.
    """

    needs_real = True
    ready = True
    decay = 1e-4

    def __init__(
        self,
        features: int,
        channels: int,
        patch_size: int,
        *,
        setting: OptimiserSetting = OPTIMISERS["as_run"],
        gamma: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        gamma_ramp: int = 2500,
        bf16: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.generator = self._build(features, channels, patch_size).to(device)
        self.discriminator = Discriminator(channels, patch_size).to(device)
        if torch.device(device).type == "cpu":
            for network in (self.generator, self.discriminator):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.gamma, self.gamma_ramp, self.bf16 = tuple(gamma), gamma_ramp, bf16
        self._values = channels * patch_size * patch_size
        self._device = torch.device(device).type
        self._g = list(self.generator.parameters())
        self._d = list(self.discriminator.parameters())
        self._kernels: list[Tensor] = [p for p in self._g + self._d if p.ndim > 1]
        self.generator_optimiser = torch.optim.Adam(
            self._g, lr=setting.generator, betas=(0.9, 0.999), eps=1e-7
        )
        self.discriminator_optimiser = torch.optim.SGD(
            self._d, lr=setting.discriminator, momentum=0.9
        )

    def _build(self, features: int, channels: int, patch_size: int) -> nn.Module:
        """Return the network that draws."""
        return Generator(features, channels, patch_size)

    def _generate(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return drawn patches, and further losses to add, already weighted, by name."""
        return self.generator(batch.features), {}

    def step(self, batch: Batch, step: int, average: Average) -> dict[str, Tensor]:
        """Train both networks on one batch.

        Parameters
        ----------
        batch
            This rank's cells.
        step
            Steps done before, for the schedule of γ.
        average
            Called once with the gradients of both networks.

        Returns
        -------
        dict
            ``L_MSE``, ``L_H1`` … ``L_H4`` (not weighted by γ), ``L_generator``, ``L_Dis``: scalars
            without gradients.
        """
        self.generator.train()
        self.discriminator.train()
        count, kind = len(batch.original), torch.bfloat16 if self.bf16 else torch.float32
        with torch.autocast(self._device, dtype=torch.bfloat16, enabled=self.bf16):
            generated, further = self._generate(batch)
        drawn = generated.detach().float()
        patches = torch.cat([batch.real, drawn, batch.original]).to(kind)
        seen = DiscriminatorPass(self.discriminator, patches)
        gamma = gamma_at(step, self.gamma, self.gamma_ramp)
        layers, towards = hidden_gradients(seen.hidden, gamma, self._values)
        difference = drawn - batch.original
        pixel = 0.5 * difference.square().sum() / count
        total = pixel + (layers.new_tensor(gamma) * layers).sum()
        gradient = difference.div_(count).add_(seen.generated_gradient(towards))
        outputs, pulls = [generated], [gradient.to(generated.dtype)]
        for loss in further.values():
            outputs.append(loss)
            pulls.append(torch.ones_like(loss))
            total = total + loss.detach()
        to_generator = torch.autograd.grad(outputs, self._g, pulls)
        adversary, to_logits = discriminator_gradient(seen.logits[: 2 * count])
        to_discriminator = seen.weight_gradients(to_logits)
        average([*to_generator, *to_discriminator])
        for parameters, gradients, optimiser in (
            (self._g, to_generator, self.generator_optimiser),
            (self._d, to_discriminator, self.discriminator_optimiser),
        ):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_mul_(self._kernels, 1 - self.decay)
        losses = {f"L_H{i}": layer for i, layer in enumerate(layers, start=1)}
        losses |= {name: loss.detach() for name, loss in further.items()}
        return {"L_MSE": pixel, **losses, "L_generator": total, "L_Dis": adversary}

    def reached(self, share: float) -> None:
        """Do nothing: the paper's learning rates are constant."""

    def draw(
        self, features: Tensor, keys: Tensor, seed: int = 0, images: Tensor | None = None
    ) -> Tensor:
        """Draw from scaled features in evaluation mode; there is no noise to key."""
        self.generator.eval()
        drawn: Tensor = self.generator(features).clamp_(0, 1)
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


def optimiser_state(name: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's tensors, flat, under ``name.``."""
    return {
        f"{name}.{i}.{k}": v
        for i, entry in optimiser.state_dict()["state"].items()
        for k, v in entry.items()
        if v is not None
    }


def load_optimiser(state: dict[str, Tensor], name: str, optimiser: torch.optim.Optimizer) -> None:
    """Take back what `optimiser_state` returned.

    Moments get their parameter's layout in memory: fused Adam walks through both side by side.
    """
    parameters = [one for group in optimiser.param_groups for one in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for key, value in part_of(state, name).items():
        index, _, field = key.partition(".")
        own = parameters[int(index)].detach()
        laid = torch.empty_like(own).copy_(value) if value.shape == own.shape else value
        entries.setdefault(int(index), {})[field] = laid
    optimiser.load_state_dict({**optimiser.state_dict(), "state": entries})


def part_of(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the entries of a flat state under ``name.``, without the prefix."""
    return {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
