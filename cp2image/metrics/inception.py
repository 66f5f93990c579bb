"""The Inception v3 network behind FID. Pure: torch and safetensors; no Ray, MLflow or download.

Szegedy et al. 2016 (Rethinking the Inception Architecture), figures 4 to 7, with the departures of
the graph that FID is defined with (``inception-2015-12-05``, Heusel et al. 2017): 1,008 classes,
average pools that do not count the padding, a max pool in the last block's pool branch, and
TensorFlow 1's bilinear resize. Layer names are those of the published PyTorch state dict.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torch.nn import functional

from cp2image.errors import EvaluationError

SIDE, DIMENSION, CLASSES = 299, 2048, 1008

_average = partial(
    functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False
)
_maximum = partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1)
_halve = partial(functional.max_pool2d, kernel_size=3, stride=2)


class Convolution(nn.Module):
    """Convolution without bias, batch norm (ε = 0.001), ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        return functional.relu(self.bn(self.conv(x)))


def _chain(x: Tensor, *layers: Callable[[Tensor], Tensor]) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


class Block35(nn.Module):
    """35 × 35 grid: 1 × 1, 5 × 5, double 3 × 3 and pool branches (figure 5)."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Convolution(inputs, 64)
        self.branch5x5_1 = Convolution(inputs, 48)
        self.branch5x5_2 = Convolution(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, padding=1)
        self.branch_pool = Convolution(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 224 + pooled, H, W)."""
        branches = [
            self.branch1x1(x),
            _chain(x, self.branch5x5_1, self.branch5x5_2),
            _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3),
            _chain(x, _average, self.branch_pool),
        ]
        return torch.cat(branches, 1)


class Reduction17(nn.Module):
    """From the 35 × 35 to the 17 × 17 grid."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = Convolution(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = Convolution(inputs, 64)
        self.branch3x3dbl_2 = Convolution(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Convolution(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, inputs + 480, H // 2, W // 2)."""
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2, self.branch3x3dbl_3)
        return torch.cat([self.branch3x3(x), double, _halve(x)], 1)


class Block17(nn.Module):
    """17 × 17 grid: 7 × 7 convolutions taken apart into 1 × 7 and 7 × 1 (figure 6)."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        row = partial(Convolution, kernel=(1, 7), padding=(0, 3))
        column = partial(Convolution, kernel=(7, 1), padding=(3, 0))
        self.branch1x1 = Convolution(inputs, 192)
        self.branch7x7_1 = Convolution(inputs, width)
        self.branch7x7_2 = row(width, width)
        self.branch7x7_3 = column(width, 192)
        self.branch7x7dbl_1 = Convolution(inputs, width)
        self.branch7x7dbl_2 = column(width, width)
        self.branch7x7dbl_3 = row(width, width)
        self.branch7x7dbl_4 = column(width, width)
        self.branch7x7dbl_5 = row(width, 192)
        self.branch_pool = Convolution(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 768, H, W)."""
        double = _chain(
            x,
            self.branch7x7dbl_1,
            self.branch7x7dbl_2,
            self.branch7x7dbl_3,
            self.branch7x7dbl_4,
            self.branch7x7dbl_5,
        )
        single = _chain(x, self.branch7x7_1, self.branch7x7_2, self.branch7x7_3)
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class Reduction8(nn.Module):
    """From the 17 × 17 to the 8 × 8 grid."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = Convolution(inputs, 192)
        self.branch3x3_2 = Convolution(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Convolution(inputs, 192)
        self.branch7x7x3_2 = Convolution(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Convolution(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Convolution(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, inputs + 512, H // 2, W // 2)."""
        deep = _chain(
            x, self.branch7x7x3_1, self.branch7x7x3_2, self.branch7x7x3_3, self.branch7x7x3_4
        )
        return torch.cat([_chain(x, self.branch3x3_1, self.branch3x3_2), deep, _halve(x)], 1)


class Block8(nn.Module):
    """8 × 8 grid with widened branches (figure 7); ``pool`` is average, then max in the last."""

    def __init__(self, inputs: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Convolution(inputs, 320)
        self.branch3x3_1 = Convolution(inputs, 384)
        self.branch3x3_2a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Convolution(inputs, 448)
        self.branch3x3dbl_2 = Convolution(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Convolution(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Convolution(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Convolution(inputs, 192)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 2048, H, W)."""
        single = self.branch3x3_1(x)
        double = _chain(x, self.branch3x3dbl_1, self.branch3x3dbl_2)
        branches = [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            _chain(x, self.pool, self.branch_pool),
        ]
        return torch.cat(branches, 1)


class InceptionV3(nn.Module):
    """The FID Inception network; 566 names in its state dict, 23,850,960 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Convolution(64, 80)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b = Block35(192, pooled=32)
        self.Mixed_5c = Block35(256, pooled=64)
        self.Mixed_5d = Block35(288, pooled=64)
        self.Mixed_6a = Reduction17(288)
        self.Mixed_6b = Block17(768, width=128)
        self.Mixed_6c = Block17(768, width=160)
        self.Mixed_6d = Block17(768, width=160)
        self.Mixed_6e = Block17(768, width=192)
        self.Mixed_7a = Reduction8(768)
        self.Mixed_7b = Block8(1280, pool=_average)
        self.Mixed_7c = Block8(2048, pool=_maximum)
        self.fc = nn.Linear(DIMENSION, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Embed 8-bit RGB images.

        Parameters
        ----------
        images
            Shape (N, 3, H, W), any size, values 0 to 255, any real type.

        Returns
        -------
        Tensor
            Pool features, shape (N, 2048), float32. The class scores are not computed.
        """
        x = (resize_tf1(images.float(), SIDE) - 128) / 128
        x = _chain(x, self.Conv2d_1a_3x3, self.Conv2d_2a_3x3, self.Conv2d_2b_3x3, _halve)
        x = _chain(x, self.Conv2d_3b_1x1, self.Conv2d_4a_3x3, _halve)
        x = _chain(x, self.Mixed_5b, self.Mixed_5c, self.Mixed_5d, self.Mixed_6a)
        x = _chain(x, self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e)
        x = _chain(x, self.Mixed_7a, self.Mixed_7b, self.Mixed_7c)
        return x.mean(dim=(2, 3))


def resize_tf1(images: Tensor, side: int) -> Tensor:
    """Resize (N, C, H, W) to ``side`` × ``side`` as TensorFlow 1's ``resize_bilinear`` does.

    Output pixel i reads at ``i · in / out``: the first pixels coincide, pixel centres do not, there
    is no antialiasing, and beyond the last pixel its value is repeated.
    """
    for axis in (2, 3):
        low, high, weight = _samples(images.shape[axis], side, images)
        weight = weight.view([-1, 1] if axis == 2 else [-1])
        first, second = images.index_select(axis, low), images.index_select(axis, high)
        images = first + (second - first) * weight
    return images


def _samples(size: int, side: int, like: Tensor) -> Sequence[Tensor]:
    position = torch.arange(side, dtype=torch.float32, device=like.device) * (size / side)
    low = position.floor().long().clamp(max=size - 1)
    return low, (low + 1).clamp(max=size - 1), position - low


def read_weights(data: bytes, source: str) -> dict[str, Tensor]:
    """Read a safetensors file or a PyTorch state dict; code in a pickle is refused, not run.

    Raises
    ------
    EvaluationError
        If ``data`` (from ``source``) is neither.
    """
    try:
        if data[8:9] == b"{":
            found: object = load_safetensors(data)
        else:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise their own kinds
        start = data[:40]
        raise EvaluationError(
            f"{source}: neither safetensors nor a PyTorch state dict (it starts with {start!r}); "
            "give the state dict of pt_inception-2015-12-05, not a TorchScript or TensorFlow file"
        ) from error
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        raise EvaluationError(f"{source}: holds {type(found).__name__}, not a dict of tensors")
    return dict(found)


def load_inception(state: Mapping[str, Tensor], source: str) -> InceptionV3:
    """Build the network with these weights, in evaluation mode, after checking names and shapes.

    Raises
    ------
    EvaluationError
        Naming the first missing, unexpected and misshapen entries.
    """
    network = InceptionV3()
    expected = network.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    misshapen = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing or unexpected or misshapen:
        problems = [
            f"{len(names)} {what}: {', '.join(names[:3])}"
            for what, names in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", misshapen),
            )
            if names
        ]
        raise EvaluationError(
            f"{source}: not the FID Inception weights ({'; '.join(problems)}); expected the "
            f"{len(expected)} entries of pt_inception-2015-12-05 (torchvision's own weights differ)"
        )
    network.load_state_dict(dict(state))
    return network.eval().requires_grad_(False)
