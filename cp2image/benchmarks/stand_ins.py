"""A checkpoint and a plate of cells to time jobs on, where nothing trained is at hand. Above data.

Features are random numbers under a table's real names; patches are those of `take_patches`, over
and over. How fast a job is does not depend on what the cells look like.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from cp2image.benchmarks.patches import Patches
from cp2image.checkpoint import ModelCard, save_checkpoint
from cp2image.data.intensity import Intensity
from cp2image.data.scaling import Scaling
from cp2image.data.schema import ROW_GROUP, PatchFormat, build_table, to_parquet
from cp2image.data.splits import Splits
from cp2image.dataset import Manifest, Part, manifest_uri, plate_folder
from cp2image.metrics.measurement import feature_names
from cp2image.models.cp2image import Discriminator, Generator
from cp2image.storage import join, write_bytes

PLATE_NAME = "P1"
WELLS = 96


def publish_cells(
    patches: Patches,
    folder: str,
    count: int,
    *,
    plates: int = 1,
    part_size: int = ROW_GROUP,
    name: str = "cells",
    normalisation: str = "none",
    features: Sequence[str] | None = None,
) -> str:
    """Publish ``count`` cells with features, all that `measure` gives; return the dataset's URI.

    ``name`` is its folder's, ``normalisation`` what the patches are in. The same ``count`` gives
    the same identities, whatever the patches are.
    """
    uri = join(folder, name)
    names = list(features or feature_names(patches.channels))
    dtype = patches.images.dtype
    kind = PatchFormat(
        patches.channels,
        patches.images.shape[-1],
        str(dtype),
        8 * dtype.itemsize,
        normalisation,
    )
    for plate in range(plates):
        label = f"P{plate + 1}"
        numbers = np.arange(plate, count, plates)
        parts: list[Part] = []
        for start in range(0, len(numbers), part_size):
            chosen = numbers[start : start + part_size]
            random = np.random.default_rng(start + plate)
            values = random.normal(size=(len(chosen), len(names))).astype(np.float32)
            metadata = _identify(chosen, label)
            images = patches.images[chosen % len(patches.images)]
            frame = pd.DataFrame(values, columns=names)
            data = to_parquet(build_table(metadata, frame, images, kind))
            file = join(plate_folder(label), f"part-{len(parts):05d}.parquet")
            write_bytes(join(uri, file), data)
            parts.append(Part(file, len(chosen), len(data)))
        account = {"in": len(numbers), "out": len(numbers)}
        manifest = Manifest(label, "benchmark", tuple(parts), account)
        write_bytes(manifest_uri(uri, label), manifest.to_json())
    return uri


def _identify(numbers: "np.ndarray[tuple[int], np.dtype[np.int64]]", plate: str) -> pd.DataFrame:
    well = numbers % WELLS
    return pd.DataFrame(
        {
            "Metadata_Plate": plate,
            "Metadata_Well": [f"{'ABCDEFGH'[w // 12]}{w % 12 + 1:02d}" for w in well],
            "Metadata_Site": 1,
            "Metadata_ImageNumber": well + 1,
            "Metadata_ObjectNumber": numbers + 1,
            "Metadata_Compound": np.where(well % 3 == 0, "DMSO", [f"drug {w % 8}" for w in well]),
            "Metadata_MOA": np.where(well % 3 == 0, "DMSO", [f"moa {w % 4}" for w in well]),
        }
    )


def save_stand_in(
    folder: str, channels: tuple[str, ...], side: int, features: Sequence[str] | None = None
) -> str:
    """Save a checkpoint of the untrained generator with these features, or all of `measure`'s."""
    features = tuple(features or feature_names(channels))
    torch.manual_seed(0)
    generator = Generator(len(features), len(channels), side).train()
    with torch.no_grad():
        for _ in range(3):
            generator(torch.randn(16, len(features)))
    uri = join(folder, "checkpoint")
    save_checkpoint(
        uri,
        ModelCard("paper", channels, side),
        scaling=Scaling(
            features,
            (PLATE_NAME,),
            np.zeros((2, len(features))),
            np.ones((2, len(features))),
            clip=5.0,
        ),
        intensity=Intensity(),
        splits=Splits("plate", 0, {PLATE_NAME: "test"}),
        generator=generator.state_dict(),
        discriminator=Discriminator(len(channels), side).state_dict(),
        config="",
    )
    return uri
