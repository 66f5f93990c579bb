"""The patches a benchmark works on: of a published dataset, else simulated. Above dataset."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.config import Config
from cp2image.data.patches import crop_patches
from cp2image.data.schema import PATCH, PatchFormat, build_table, decode_patches, to_parquet
from cp2image.data.simulate import SimulatedScreen, simulate_fields
from cp2image.data.simulated_cells import CHANNELS
from cp2image.dataset import (
    Manifest,
    Part,
    manifest_uri,
    open_dataset,
    plate_folder,
    read_manifests,
)
from cp2image.errors import DatasetError
from cp2image.metrics.measurement import _choose_channels
from cp2image.metrics.segmentation import segment
from cp2image.storage import join, write_bytes


@dataclass(frozen=True)
class Patches:
    """Patches that have a nucleus at their centre.

    Attributes
    ----------
    images
        Shape (patches, channels, height, width), as acquired.
    masks
        uint8, shape (patches, 3, height, width): nucleus, cell, cytoplasm.
    channels
        Names.
    nucleus, body
        Indices of the channels to find nuclei and cells by.
    source
        Where they are from, for the report.
    """

    images: NDArray[Any]
    masks: NDArray[np.uint8]
    channels: tuple[str, ...]
    nucleus: int
    body: tuple[int, ...]
    source: str

    @property
    def nucleus_name(self) -> str:
        """The channel that shows nuclei."""
        return self.channels[self.nucleus]


def take_patches(config: Config, count: int) -> Patches:
    """Take ``count`` patches of ``measure.input``, or simulated ones where none is published.

    Raises
    ------
    DatasetError
        If there are not that many patches with a nucleus.
    MeasurementError
        If it cannot be told which channel shows nuclei.
    """
    uri = config.measure.input
    blocks: Iterator[NDArray[Any]]
    if read_manifests(uri):
        dataset = open_dataset(uri)
        channels, source = dataset.patch_format.channels, uri
        blocks = (decode_patches(t, dataset.patch_format) for t in dataset.read([PATCH]))
    else:
        channels, source = CHANNELS, "simulated"
        blocks = _simulate_patches(config.run.seed, config.prepare.patch_size)
    nucleus, body = _choose_channels(channels, config.measure.nucleus_channel, None)
    images: list[NDArray[Any]] = []
    masks: list[NDArray[np.uint8]] = []
    found = 0
    for block in blocks:
        stack = segment(block, nucleus, body)
        present = np.flatnonzero(stack.any(axis=(1, 2, 3)))[: count - found]
        images.append(block[present])
        masks.append(stack[present])
        found += len(present)
        if found == count:
            break
    if found < count:
        raise DatasetError(
            f"{source}: {found} patches with a nucleus, the benchmark was to take {count}; lower "
            "benchmark.patches"
        )
    return Patches(np.concatenate(images), np.concatenate(masks), channels, nucleus, body, source)


def _simulate_patches(seed: int, size: int) -> Iterator[NDArray[np.uint16]]:
    """Yield the patches of one simulated field after another, of 24 treatments in turn."""
    screen = SimulatedScreen(plates=1000, seed=seed, defect_share=0.0)
    for field in simulate_fields(screen):
        yield crop_patches(field.images, field.cells[["center_y", "center_x"]].to_numpy(), size)[0]


def publish_patches(patches: Patches, folder: str, count: int, part_size: int) -> str:
    """Publish ``count`` cells, the patches over and over, as one plate; return the dataset's URI.

    In the format that the steps publish, ``part_size`` cells a file.
    """
    uri, plate = join(folder, "cells"), "P1"
    kind = PatchFormat(patches.channels, patches.images.shape[-1], str(patches.images.dtype))
    parts: list[Part] = []
    for start in range(0, count, part_size):
        numbers = np.arange(start, min(start + part_size, count))
        metadata = pd.DataFrame({"Metadata_Plate": plate, "Metadata_ObjectNumber": numbers + 1})
        images = patches.images[numbers % len(patches.images)]
        data = to_parquet(build_table(metadata, None, images, kind))
        name = join(plate_folder(plate), f"part-{len(parts):05d}.parquet")
        write_bytes(join(uri, name), data)
        parts.append(Part(name, len(numbers), len(data)))
    manifest = Manifest(plate, "benchmark", tuple(parts), {"in": count, "out": count})
    write_bytes(manifest_uri(uri, plate), manifest.to_json())
    return uri
