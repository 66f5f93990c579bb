"""One exploration's folder: figure, vectors, images, protocol. Floor: below the step."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import tifffile
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cp2image.columns import METADATA
from cp2image.data.schema import build_table, to_parquet
from cp2image.exploration_cells import ExploredCells
from cp2image.figures.canvas import save
from cp2image.storage import delete_file, exists, join, read_bytes, write_bytes

DISTANCE, OUTSIDE = "Metadata_Distance", "Metadata_Outside"
"""Mahalanobis distance over the guard's limit, and 1 where it is above 1."""


@dataclass
class Album:
    """A folder of pictures with what they were drawn from.

    What an earlier run left in the folder loses its protocol with the first new file, and what is
    not drawn again goes when the new protocol is there: no protocol speaks of others' pictures.

    Attributes
    ----------
    uri
        The folder.
    explored
        The cells.
    names
        Pictures so far.
    files
        All files so far.
    notes
        What was not drawn and why, a sentence each.
    images, outside
        Generated images so far, and those of them far from the training cells.
    """

    uri: str
    explored: ExploredCells
    names: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    images: int = 0
    outside: int = 0
    _earlier: list[str] | None = None

    def add(
        self,
        name: str,
        figure: Figure,
        rows: NDArray[np.int64],
        about: pd.DataFrame,
        scaled: NDArray[np.float32],
        relative: NDArray[np.float64],
        patches: NDArray[np.uint8],
    ) -> None:
        """Store ``<name>.png``, ``.svg``, ``.parquet`` (vectors and pixels) and ``.tif``.

        Parameters
        ----------
        name
            Name of its files, without suffix.
        figure
            The picture.
        rows
            Cell that each image starts from, (M,): its metadata and plate.
        about
            Further ``Metadata_*`` columns, M rows.
        scaled
            The model's input, (M, p); stored in the table's own units.
        relative
            Distance over the guard's limit, (M,).
        patches
            (M, C, H, W).
        """
        explored = self.explored
        known = [name for name in map(str, explored.cells) if name.startswith(METADATA)]
        metadata = explored.cells[known].iloc[rows].reset_index(drop=True)
        metadata = metadata.assign(**{str(k): about[k].to_numpy() for k in about})
        metadata[DISTANCE], metadata[OUTSIDE] = relative, (relative > 1).astype(np.int64)
        features = explored.artist.own_units(scaled, explored.plates(rows))
        form = explored.artist.model.patch_format
        place = join(self.uri, name)
        self._announce(*(f"{name}.{suffix}" for suffix in ("png", "svg", "parquet", "tif")))
        for suffix in ("png", "svg"):
            save(figure, f"{place}.{suffix}")
        write_bytes(f"{place}.parquet", to_parquet(build_table(metadata, features, patches, form)))
        write_bytes(f"{place}.tif", encode_stack(patches, form.channels))
        self.names.append(name)
        self.images += len(patches)
        self.outside += int((relative > 1).sum())

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Store ``<name>.csv``."""
        self._announce(f"{name}.csv")
        write_bytes(join(self.uri, f"{name}.csv"), frame.to_csv(index=False).encode())

    def close(self, content: Mapping[str, Any], config: str) -> None:
        """Store ``exploration.json`` and ``_config.yaml``; remove what an earlier run had more."""
        self._announce()
        own = {"exploration.json", "_config.yaml", *self.files}
        write_bytes(join(self.uri, "_config.yaml"), config.encode())
        text = json.dumps({**content, "files": sorted(own)}, indent=1, default=str, allow_nan=False)
        write_bytes(join(self.uri, "exploration.json"), text.encode())
        for name in set(self._earlier or ()) - own:
            delete_file(join(self.uri, name))

    def _announce(self, *files: str) -> None:
        """Withdraw an earlier run's protocol, and name the files that are about to be written."""
        place = join(self.uri, "exploration.json")
        if self._earlier is None:
            self._earlier = _files_of(place)
        self.files += files
        unfinished = {"unfinished": True, "files": sorted({*self._earlier, *self.files})}
        write_bytes(place, json.dumps(unfinished).encode())


def _files_of(protocol: str) -> list[str]:
    """Return the files that an earlier run's protocol names: those of its own folder only."""
    if not exists(protocol):
        return []
    try:
        names = json.loads(read_bytes(protocol))["files"]
    except (ValueError, KeyError, TypeError):
        return []
    return [name for name in names if isinstance(name, str) and "/" not in name]


def encode_stack(patches: NDArray[np.uint8], channels: tuple[str, ...]) -> bytes:
    """Return patches (M, C, H, W) as an ImageJ hyperstack, which Fiji opens channel by channel."""
    buffer = io.BytesIO()
    labels = [f"{number + 1} {channel}" for number in range(len(patches)) for channel in channels]
    tifffile.imwrite(
        buffer,
        np.ascontiguousarray(patches),
        imagej=True,
        metadata={"axes": "TCYX", "mode": "composite", "Labels": labels},
    )
    return buffer.getvalue()


def file_name(text: str) -> str:
    """Return a text as a file's name: what is no letter, digit, point or dash becomes ``_``."""
    kept = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)
    return kept.strip("._") or "unnamed"


def join_parts(parts: list[Any]) -> Any:
    """Put arrays or frames of several parts one after another."""
    if isinstance(parts[0], pd.DataFrame):
        return pd.concat(parts, ignore_index=True)
    return np.concatenate(parts)
