"""The newest measured draws, and what draws lack on average. Pure torch."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_KEPT = 2048
"""Draws that are kept; each new one takes the place of the oldest."""
_RATE, _MOST = 5e-4, 0.5
"""Share of what one draw lacks by which the correction grows; how large it may be."""


class Measurement(Protocol):
    """Measures drawn patches as the cells' own table was.

    Attributes
    ----------
    each
        Draws that every rank hands over at a time.
    """

    @property
    def each(self) -> int:
        """See the class."""

    def __call__(
        self, latents: Tensor, patches: Tensor, asked: Tensor, rows: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Measure draws; every rank calls this at once, with up to ``each`` of its own.

        Parameters
        ----------
        latents
            Of the draws, (n, L, side, side).
        patches
            Made of them, in [0, 1], (n, C, H, W).
        asked
            The scaled features they were drawn for, (n, p).
        rows
            Of the cells that have these, (n,).

        Returns
        -------
        tuple of Tensor
            Of all ranks' draws that could be measured, in the same order on every rank: latents,
            scaled features as measured, (m, p), and as asked for, (m, p).
        """


class MeasuredDraws:
    """The newest draws, their features as they were measured, and what draws lack on average.

    Attributes
    ----------
    correction
        What is to be asked for beyond the features, so that draws have them on average, (p,): it
        grows for as long as draws lack a feature, as an integral controller's output does.

    Parameters
    ----------
    shape
        Of one draw's latents, (L, side, side).
    features
        Number of features, p.
    device
        Where they are kept.
    """

    def __init__(self, shape: tuple[int, ...], features: int, device: torch.device) -> None:
        self._latents = torch.zeros((_KEPT, *shape), device=device)
        self._features = torch.zeros((_KEPT, features), device=device)
        self.correction = torch.zeros(features, device=device)
        self._seen = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return min(self._seen, _KEPT)

    def add(self, latents: Tensor, features: Tensor, asked: Tensor) -> None:
        """Take (m, L, side, side) and (m, p) up, in place of the oldest; learn what they lack."""
        places = (self._seen + torch.arange(len(latents), device=latents.device)) % _KEPT
        self._latents[places], self._features[places] = latents, features
        self._seen += len(latents)
        grown = self.correction + _RATE * (asked - features).sum(dim=0)
        self.correction = grown.clamp(-_MOST, _MOST)

    def pick(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the latents and features of some by chance, none if there are fewer."""
        if len(self) < count:
            return self._latents[:0], self._features[:0]
        device = self._latents.device
        rows = torch.randint(len(self), (count,), generator=random, device=device)
        return self._latents[rows], self._features[rows]

    def forget(self) -> None:
        """Drop all: the latents do not mean what they did."""
        self._seen = 0
        self.correction = torch.zeros_like(self.correction)

    def state(self) -> dict[str, Tensor]:
        """Return what `load_state` takes back."""
        return {
            "latents": self._latents,
            "features": self._features,
            "correction": self.correction,
            "seen": torch.tensor(self._seen),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what `state` returned, from any device."""
        self._latents.copy_(state["latents"])
        self._features.copy_(state["features"])
        self.correction = state["correction"].to(self.correction.device)
        self._seen = int(state["seen"])
