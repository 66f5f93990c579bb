"""How maps vary around the middle of a patch: amplitudes of circular waves. Pure torch.

About half of CellProfiler's features tell how a cell lies around its middle: Zernike moments
(Boland, Markey and Murphy, Cytometry 1998) are sizes of projections on waves around it, radial
distributions are means and variations over rings. Means over compartments do not hold these.
"""

import torch
from torch import Tensor, nn

_RINGS, _WIDTH = 8, 0.15
"""Rings from the middle to the edge, and how wide one is, as a share of half the side (σ)."""
_ORDERS = 8
"""Most waves around the middle."""
_PROFILES = 6
"""Mixtures of rings that are learned for each number of waves."""


class CircularHarmonics(nn.Module):
    """Maps to amplitudes of waves around their middle, along radial profiles that are learned.

    Parameters
    ----------
    maps
        Number of maps, M.
    side
        Their side.
    """

    basis: Tensor

    def __init__(self, maps: int, side: int) -> None:
        super().__init__()
        self.length = maps * _PROFILES * (1 + _ORDERS)
        self.register_buffer("basis", _waves(side), persistent=False)
        self.profiles = nn.Parameter(torch.randn(1 + _ORDERS, _RINGS, _PROFILES) / _RINGS**0.5)

    def forward(self, maps: Tensor) -> Tensor:
        """Project.

        Parameters
        ----------
        maps
            (N, M, side, side).

        Returns
        -------
        Tensor
            (N, length): without waves the projection itself, with 1 to 8 waves its amplitude,
            which turning the map does not change; smooth at 0.
        """
        rings = maps.flatten(2) @ self.basis
        rings = rings.view(*rings.shape[:2], _RINGS, 2, 1 + _ORDERS)
        found = torch.einsum("ncrpm,mrk->ncpmk", rings, self.profiles)
        plain, waves = found[:, :, 0, 0], found[..., 1:, :]
        amplitudes = (waves.square().sum(dim=2) + 1e-3).sqrt()
        return torch.cat([plain.flatten(1), amplitudes.flatten(1)], dim=1)


def _waves(side: int) -> Tensor:
    """Return cosines and sines on rings, (side², rings · 2 · (1 + orders)); a ring's norm is 1."""
    line = torch.linspace(-1, 1, side)
    down, across = torch.meshgrid(line, line, indexing="ij")
    distance, angle = torch.hypot(down, across), torch.atan2(down, across)
    middles = torch.linspace(0, 1.05, _RINGS)[:, None, None]
    rings = torch.exp(-0.5 * ((distance - middles) / _WIDTH).square())
    rings = rings / rings.square().sum(dim=(1, 2), keepdim=True).sqrt()
    turns = torch.arange(1 + _ORDERS)[:, None, None] * angle
    parts = torch.stack([turns.cos(), turns.sin()])
    parts[:, 1:, distance == 0] = 0.0  # the middle itself has no direction
    found = rings[:, None, None] * parts
    return found.flatten(3).flatten(0, 2).T.contiguous()
