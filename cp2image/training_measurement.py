"""Draws measured as their cells' table was, while training. Floor: beside training."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cp2image.config import Config
from cp2image.config_cells import Measure
from cp2image.data.scaling import Scaling
from cp2image.data.schema import PatchFormat
from cp2image.dataset import CellDataset
from cp2image.metrics.embedding import quantise
from cp2image.metrics.measurement import COMPARTMENTS, FAMILIES, feature_names, measure
from cp2image.models.data_parallel import gather_over_ranks
from cp2image.models.recipe import Average
from cp2image.training_cells import CellArrays
from cp2image.training_turns import TurnedCells

_COMPARED = 512
"""Cells by which is told what 8 bits and percentiles take from features."""
_CPU = torch.device("cpu")


def measured_alike(config: Config, dataset: CellDataset) -> bool:
    """Say whether the config's measurement is the one that the dataset's features come from."""
    mark = config.fingerprint("measure")
    plates = dataset.manifests.values()
    return all(plate.input and plate.fingerprint == mark for plate in plates)


@dataclass(frozen=True)
class DrawMeasurement:
    """Brings draws to 8 bit and back to the acquisition scale, measures and scales them.

    Attributes
    ----------
    cells
        The rank's training cells: a draw goes back to the scale of the cell it was asked for.
    scaling
        Of their features.
    patch_format
        Of their patches.
    settings
        How their table was measured.
    world
        Number of ranks.
    wanted
        Draws to measure at a time over all ranks.
    lost
        What bringing a patch to 8 bit and back takes from its scaled features, (p,), see
        `giving_back`; it is added.
    """

    cells: CellArrays | TurnedCells
    scaling: Scaling
    patch_format: PatchFormat
    settings: Measure
    world: int
    wanted: int
    lost: NDArray[np.float32] | float = 0.0

    def giving_back(self, average: Average) -> "DrawMeasurement":
        """Return a measurement under which cells have, on average, the features of their table.

        Normalising cuts the darkest and brightest pixels off, and 8 bits round the others: what
        that changes in cells' features is no flaw of draws, and must not count as one.

        Parameters
        ----------
        average
            Over the ranks; every rank calls this at once.
        """
        count = len(self.cells.features)
        rows = np.linspace(0, count - 1, min(count, _COMPARED)).astype(np.int64)
        found, there = self.features(self.cells.normalised(rows, _CPU).numpy(), rows)
        lost = (self.cells.features[rows] - found)[there]
        mean = torch.from_numpy(lost.mean(axis=0) if there.any() else np.zeros_like(found[0]))
        average([mean])
        return replace(self, lost=mean.numpy())

    @property
    def each(self) -> int:
        """Draws that a rank measures at a time."""
        return -(-self.wanted // self.world)

    def __call__(
        self, latents: Tensor, patches: Tensor, asked: Tensor, rows: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Measure draws, see `cp2image.models.measured_draws.Measurement`."""
        scaled, found = self.features(patches.float().cpu().numpy(), rows)
        device, shape = latents.device, latents.shape[1:]
        if self.world == 1:
            kept = torch.from_numpy(found).to(device)
            return latents[kept], torch.from_numpy(scaled[found]).to(device), asked[kept]
        there = torch.from_numpy(found).to(device).float().unsqueeze(1)
        parts = [latents.flatten(1), torch.from_numpy(scaled).to(device), asked, there]
        widths = [part.shape[1] for part in parts]
        sent = torch.zeros((self.each, sum(widths)), device=device)
        sent[: len(rows)] = torch.cat(parts, dim=1)
        everything = gather_over_ranks(sent)
        drawn, measured, wanted, _ = torch.split(everything[everything[:, -1] > 0], widths, dim=1)
        return drawn.reshape(-1, *shape), measured, wanted

    def features(
        self, patches: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return scaled features, (n, p), of patches in [0, 1], and which have a nucleus, (n,).

        Only families and compartments are measured that a feature is taken from.
        """
        shares = self.cells.restored(quantise(patches), rows, self.patch_format.full_scale)
        families, compartments = self._needed
        table = measure(
            shares,
            channels=self.patch_format.channels,
            families=families,
            compartments=compartments,
            nucleus_channel=self.settings.nucleus_channel,
        )
        found = table.notna().any(axis=1).to_numpy(copy=True)
        plates = self.cells.plate_names(rows, self.scaling.plates)
        values = table[list(self.scaling.features)].to_numpy()
        scaled, limit = self.scaling.apply(values, plates) + self.lost, self.scaling.clip
        return np.clip(scaled, -limit, limit), found

    @cached_property
    def _needed(self) -> tuple[list[str], list[str]]:
        """Families and compartments that any feature is taken from."""
        names, channels = set(self.scaling.features), self.patch_format.channels
        own = FAMILIES if self.settings.families is None else self.settings.families
        families = [f for f in own if names.intersection(feature_names(channels, families=[f]))]
        compartments = [c for c in COMPARTMENTS if any(name.startswith(f"{c}_") for name in names)]
        return families, compartments
