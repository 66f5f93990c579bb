"""Draws measured as their cells' table was, while training. Floor: beside training."""

from dataclasses import dataclass

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
from cp2image.training_cells import CellArrays
from cp2image.training_turns import TurnedCells


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
    """

    cells: CellArrays | TurnedCells
    scaling: Scaling
    patch_format: PatchFormat
    settings: Measure
    world: int
    wanted: int

    @property
    def each(self) -> int:
        """Draws that a rank measures at a time."""
        return -(-self.wanted // self.world)

    def __call__(
        self, latents: Tensor, patches: Tensor, rows: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Measure draws, see `cp2image.models.measured_draws.Measurement`."""
        scaled, found = self.features(patches.float().cpu().numpy(), rows)
        device, shape = latents.device, latents.shape[1:]
        if self.world == 1:
            kept = torch.from_numpy(found).to(device)
            return latents[kept], torch.from_numpy(scaled[found]).to(device)
        width = shape.numel()
        sent = torch.zeros((self.each, width + scaled.shape[1] + 1), device=device)
        sent[: len(rows), :width] = latents.flatten(1)
        sent[: len(rows), width:-1] = torch.from_numpy(scaled).to(device)
        sent[: len(rows), -1] = torch.from_numpy(found).to(device)
        everything = gather_over_ranks(sent)
        everything = everything[everything[:, -1] > 0]
        return everything[:, :width].unflatten(1, shape), everything[:, width:-1]

    def features(
        self, patches: NDArray[np.float32], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Return scaled features, (n, p), of patches in [0, 1], and which have a nucleus, (n,).

        Only families and compartments are measured that a feature is taken from.
        """
        shares = self.cells.restored(quantise(patches), rows, self.patch_format.full_scale)
        channels, names = self.patch_format.channels, list(self.scaling.features)
        own = FAMILIES if self.settings.families is None else self.settings.families
        families, compartments = _needed(names, channels, own)
        table = measure(
            shares,
            channels=channels,
            families=families,
            compartments=compartments,
            nucleus_channel=self.settings.nucleus_channel,
        )
        found = table.notna().any(axis=1).to_numpy(copy=True)
        plates = self.cells.plate_names(rows, self.scaling.plates)
        return self.scaling.apply(table[names].to_numpy(), plates), found


def _needed(
    names: list[str], channels: tuple[str, ...], own: tuple[str, ...] | list[str]
) -> tuple[list[str], list[str]]:
    """Return the families and compartments that have any of the names."""
    wanted = set(names)
    families = [f for f in own if wanted.intersection(feature_names(channels, families=[f]))]
    compartments = [c for c in COMPARTMENTS if any(name.startswith(f"{c}_") for name in names)]
    return families, compartments
