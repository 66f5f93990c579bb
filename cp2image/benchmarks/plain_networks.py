"""CP2Image as a user would write it in plain PyTorch. Floor 1: torch alone.

The same layers, losses and optimisers as `cp2image.models`, one module a layer, in torch's default
layout: what the package's networks are compared with, in speed by the benchmarks and in value by
the tests. Nothing is folded, shared or fused.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, leaky_relu, max_pool2d
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

SLOPE = 0.01


class PlainGenerator(nn.Module):
    """Features to patch; an upsampled map is cropped by one where the patch needs it."""

    def __init__(self, features: int, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        sides = [patch_size]
        for _ in range(3):
            sides.insert(0, -(-(sides[0] - 4) // 2))
        self.sides = sides
        self.first = nn.Conv2d(features, 32, sides[0], padding=sides[0] - 1, bias=False)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(32, 32, 5, padding=4, bias=False) for _ in range(3)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(4))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.to_channels = nn.Conv2d(32, channels, 1, bias=False)
        self.channel_norm = nn.BatchNorm2d(channels)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, p) features to (N, channels, patch_size, patch_size)."""
        x = self.first(features[:, :, None, None])
        x = leaky_relu(self.norms[0](x), SLOPE)
        for layer in range(3):
            grid = self.sides[layer + 1] - 4
            x = self.convolutions[layer](self.upsample(x)[:, :, :grid, :grid])
            x = leaky_relu(self.norms[layer + 1](x), SLOPE)
        return leaky_relu(self.channel_norm(self.to_channels(x)), SLOPE)


class PlainDiscriminator(nn.Module):
    """Patch to hidden layers and logit; batch norm takes [real, generated] for its statistics."""

    def __init__(self, channels: int = 3, patch_size: int = 68) -> None:
        super().__init__()
        last = PlainGenerator(1, channels, patch_size).sides[0]
        shapes = [(channels, 32, 5), (32, 32, 5), (32, 32, 5), (32, 64, last), (64, 1, 1)]
        self.convolutions = nn.ModuleList(
            spectral_norm(nn.Conv2d(i, o, k, bias=False)) for i, o, k in shapes
        )
        self.weights = nn.ParameterList(torch.ones(o) for _, o, _ in shapes)
        self.biases = nn.ParameterList(torch.zeros(o) for _, o, _ in shapes)

    def forward(self, patches: Tensor, leading: int) -> tuple[list[Tensor], Tensor]:
        """Return the four hidden layers and the logits of (N, channels, size, size) patches."""
        hidden: list[Tensor] = []
        x = patches
        for layer, convolution in enumerate(self.convolutions):
            x = convolution(x)
            mean = x[:leading].mean(dim=(0, 2, 3), keepdim=True)
            variance = x[:leading].var(dim=(0, 2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / torch.sqrt(variance + 1e-5)
            x = x * self.weights[layer].view(1, -1, 1, 1) + self.biases[layer].view(1, -1, 1, 1)
            if layer == 4:
                break
            if layer < 3:
                x = max_pool2d(x, 2, ceil_mode=True)
            x = leaky_relu(x, SLOPE)
            hidden.append(x)
        return hidden, x.flatten()


class PlainTraining:
    """Both networks, their optimisers, and one training step in two passes.

    Parameters
    ----------
    generator, discriminator
        The networks, on their device.
    generator_rate, discriminator_rate
        Learning rates of Adam and of SGD with momentum 0.9.
    gamma_ramp
        Steps of the γ ramp; the final weights are 1.
    """

    def __init__(
        self,
        generator: PlainGenerator,
        discriminator: PlainDiscriminator,
        generator_rate: float = 0.01,
        discriminator_rate: float = 0.001,
        gamma_ramp: int = 2500,
    ) -> None:
        self.generator, self.discriminator = generator.train(), discriminator.train()
        self.gamma_ramp = gamma_ramp
        self.generator_optimiser = torch.optim.Adam(
            generator.parameters(), lr=generator_rate, betas=(0.9, 0.999), eps=1e-7
        )
        self.discriminator_optimiser = torch.optim.SGD(
            discriminator.parameters(), lr=discriminator_rate, momentum=0.9
        )

    def step(self, original: Tensor, features: Tensor, real: Tensor, step: int) -> dict[str, float]:
        """Train on one batch of patches (N, C, H, W) and features (N, p); return the losses."""
        count, values = len(original), original[0].numel()
        generated = self.generator(features)
        with parametrize.cached():  # one power iteration a step, not one a pass
            self.discriminator_optimiser.zero_grad()
            _, logits = self.discriminator(torch.cat([real, generated.detach()]), 2 * count)
            ones = torch.ones(count, device=logits.device)
            adversary = binary_cross_entropy_with_logits(
                logits[:count], ones
            ) + binary_cross_entropy_with_logits(logits[count : 2 * count], 0 * ones)
            torch.autograd.backward(adversary)

            self.generator_optimiser.zero_grad()
            hidden, _ = self.discriminator(torch.cat([real, generated, original]), 2 * count)
            pixel = 0.5 * ((original - generated) ** 2).sum() / count
            layers = [
                0.5 * values * ((h[2 * count :] - h[count : 2 * count]) ** 2).mean() for h in hidden
            ]
            total = pixel
            for i, layer in enumerate(layers, start=1):
                total = total + min(max(step / self.gamma_ramp - i, 0.0), 1.0) * layer
            torch.autograd.backward(total, inputs=list(self.generator.parameters()))
        self.discriminator_optimiser.step()
        self.generator_optimiser.step()
        with torch.no_grad():
            for network in (self.generator, self.discriminator):
                for parameter in network.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(1 - 1e-4)
        return {
            "L_MSE": pixel.item(),
            "L_generator": total.item(),
            "L_Dis": adversary.item(),
        }


def copy_generator(plain: PlainGenerator, weights: dict[str, Tensor]) -> None:
    """Give ``plain`` the weights of `cp2image.models.cp2image.Generator`."""
    side, features = plain.sides[0], weights["linear.weight"].shape[1]
    kernel = weights["linear.weight"].view(32, side, side, features)
    first = {"first.weight": kernel.permute(0, 3, 1, 2).flip(2, 3).contiguous()}
    rest = {k: v.contiguous() for k, v in weights.items() if k != "linear.weight"}
    plain.load_state_dict(first | rest)


def copy_discriminator(plain: PlainDiscriminator, weights: dict[str, Tensor]) -> None:
    """Give ``plain`` the weights of `cp2image.models.cp2image.Discriminator`."""
    known = plain.state_dict()
    for layer in range(5):
        known[f"weights.{layer}"] = weights[f"norms.{layer}.weight"]
        known[f"biases.{layer}"] = weights[f"norms.{layer}.bias"]
    known |= {k: v.contiguous() for k, v in weights.items() if k.startswith("convolutions.")}
    plain.load_state_dict(known)
