"""A trained model as one versioned folder. Floor: above storage, data and models.

``weights.safetensors`` holds the generator, ``discriminator.safetensors`` the critic,
``scaling.safetensors`` the scaling; ``checkpoint.json`` (written last, so that a folder
without it is no checkpoint) the ordered features, channels, normalisation and splits;
``config.yaml`` the resolved experiment. Nothing that is loaded can execute code.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cp2image.columns import IDENTITY, PLATE, require_columns
from cp2image.data.identity import cell_keys, texts
from cp2image.data.intensity import Intensity
from cp2image.data.scaling import Scaling
from cp2image.data.schema import PatchFormat, decode_features, decode_metadata
from cp2image.data.splits import Splits
from cp2image.errors import CheckpointError, ColumnError, StorageError
from cp2image.mlflow_store import mlflow_store
from cp2image.models.presets import PRESETS, build_drawer, reconstructs
from cp2image.storage import exists, join, name_of, read_bytes, write_bytes

FORMAT_VERSION = 1
_PASS = {"cpu": 16, "cuda": 1024}
"""Cells per forward pass: on a CPU, what stays in its cache. Always the same on one kind of device,
so that the batch a cell is in does not change it."""


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint says about itself.

    Attributes
    ----------
    preset
        Which network the weights belong to.
    channels, patch_size
        Of the patches it draws.
    steps
        Training steps done.
    metrics
        Last validation metrics.
    notes
        Remarks of scaling and selection, and the columns they left out with the reason.
    """

    preset: str
    channels: tuple[str, ...]
    patch_size: int
    steps: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Model:
    """A generator with everything that stands between a CellProfiler table and it.

    Attributes
    ----------
    features
        Names of the columns it needs, in order.
    channels
        Names of the channels it draws, in order.
    card, scaling, intensity, splits
        What the checkpoint says of itself, and how features, pixels and cells were treated.
    config
        The resolved experiment that trained it, as YAML.
    hash
        SHA-256 of the weights.
    """

    def __init__(
        self,
        card: ModelCard,
        scaling: Scaling,
        intensity: Intensity,
        splits: Splits,
        weights: dict[str, Tensor],
        *,
        config: str = "",
        model_hash: str = "",
        device: str = "cpu",
        bf16: bool = False,
    ) -> None:
        self.card, self.scaling, self.intensity, self.splits = card, scaling, intensity, splits
        self.config, self.hash, self._device = config, model_hash, device
        sizes = (len(scaling.features), len(card.channels), card.patch_size)
        self._drawer = build_drawer(card.preset, sizes, weights, device=device, bf16=bf16)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the columns it needs, in order."""
        return tuple(self.scaling.features)

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels it draws, in order."""
        return self.card.channels

    @property
    def patch_format(self) -> PatchFormat:
        """Format of the patches it draws: 8 bit, in the model's own normalisation."""
        return PatchFormat(self.channels, self.card.patch_size, "uint8", 8, self.intensity.kind)

    @property
    def reconstructs(self) -> bool:
        """Whether it draws cells from their own images, where it is shown them."""
        return reconstructs(self.card.preset)

    def generate(
        self,
        profiles: pd.DataFrame | pa.Table | NDArray[Any],
        seed: int = 0,
        images: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """Draw one patch per row.

        Parameters
        ----------
        profiles
            A DataFrame or Arrow table with the model's features (in any order, in CellProfiler's
            own units) and, if known, ``Metadata_Plate`` (its scaling is used) and the other
            identity columns (they seed a cell's noise); or an array (N, p) of the features in
            order.
        seed
            Another seed is another draw, of the same cells where their identity is known; the
            ``paper`` model has no noise and ignores it.
        images
            The cells themselves for ``vae`` and ``vaeplus`` to reconstruct, (N, C, H, W) in [0, 1]
            as ``intensity.apply`` makes them; without them these two draw from noise.

        Returns
        -------
        NDArray
            uint8, (N, channels, patch_size, patch_size).

        Raises
        ------
        ColumnError
            If features are missing or doubled, with the nearest names, or hold no numbers.
        CheckpointError
            If an array has another width, or images are given that do not fit the model.
        """
        if isinstance(profiles, pa.Table | pd.DataFrame):
            if isinstance(profiles, pa.Table):
                require_columns(profiles.column_names, self.features, "the table of profiles")
                values, cells = _decode(profiles, self.features), decode_metadata(profiles)
            else:
                require_columns(list(profiles.columns), self.features, "the table of profiles")
                values, cells = _numbers(profiles[list(self.features)]), profiles
            plates = texts(cells[PLATE]).tolist() if PLATE in cells else [""] * len(values)
            known = set(IDENTITY) <= set(cells.columns)
            keys = cell_keys(cells) if known else np.arange(len(values), dtype=np.uint64)
        else:
            values = np.asarray(profiles, dtype=np.float64)
            if values.ndim != 2 or values.shape[1] != len(self.features):
                raise CheckpointError(
                    f"profiles have shape {values.shape}, the model takes "
                    f"(N, {len(self.features)}): one column per entry of .features, in that order"
                )
            plates = [""] * len(values)
            keys = np.arange(len(values), dtype=np.uint64)
        return self.draw(self.scaling.apply(values, plates), keys, seed, images)

    def draw(
        self,
        scaled: NDArray[np.float32],
        keys: NDArray[np.uint64],
        seed: int = 0,
        images: NDArray[np.float32] | None = None,
    ) -> NDArray[np.uint8]:
        """Draw from features that are scaled already, (N, p); ``keys`` name the cells.

        Raises
        ------
        CheckpointError
            If images are given to a model that does not see any, or are not (N, C, H, W).
        """
        shape = (len(scaled), *self.patch_format.shape)
        if images is not None and not (self.reconstructs and images.shape == shape):
            raise CheckpointError(
                f"images of shape {images.shape} for {len(scaled)} cells: the model "
                f"{self.card.preset!r} takes "
                + (f"{shape}" if self.reconstructs else "none: it draws without them")
            )
        out = np.empty(shape, dtype=np.uint8)
        size, device = _PASS[torch.device(self._device).type], self._device
        for start in range(0, len(scaled), size):
            part = slice(start, start + size)
            count = len(scaled[part])
            features = _filled(np.asarray(scaled[part], dtype=np.float32), size).to(device)
            names = _filled(keys[part].astype(np.uint64).view(np.int64), size).to(device)
            seen = None if images is None else _filled(images[part], size).to(device)
            with torch.inference_mode():
                drawn = self._drawer(features, names, seed, seen)
                pixels = drawn[:count].clamp_(0, 1).mul_(255).round_().to(torch.uint8)
            out[part] = pixels.cpu().numpy()
        return out


def _filled(rows: NDArray[Any], size: int) -> Tensor:
    """Fill up with zeros to ``size`` rows: every pass is of one size."""
    missing = [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    return torch.from_numpy(np.pad(rows, missing) if len(rows) < size else rows)


def _decode(table: pa.Table, features: Sequence[str]) -> NDArray[Any]:
    """Return the features of an Arrow table, (N, p), in double precision if any column is."""
    kinds = {table.schema.field(name).type for name in features}
    if kinds == {pa.float32()}:
        return decode_features(table, features)
    if all(pa.types.is_floating(kind) or pa.types.is_integer(kind) for kind in kinds):
        return decode_features(table, features, np.float64)
    return _numbers(table.select(list(features)).to_pandas())


def _numbers(frame: pd.DataFrame) -> NDArray[np.float64]:
    try:
        return frame.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError):
        for name in frame.columns:
            found = frame[name]
            bad = found[pd.to_numeric(found, errors="coerce").isna() & found.notna()]
            if len(bad):
                raise ColumnError(
                    f"the table of profiles: column {name!r} holds {bad.iloc[0]!r} in row "
                    f"{bad.index[0]!r}, expected numbers; read the table with that column as float"
                ) from None
        raise


def save_checkpoint(
    uri: str,
    card: ModelCard,
    *,
    scaling: Scaling,
    intensity: Intensity,
    splits: Splits,
    generator: dict[str, Tensor],
    discriminator: dict[str, Tensor],
    config: str,
) -> None:
    """Write a checkpoint folder; ``checkpoint.json``, with the files' hashes, comes last.

    Parameters
    ----------
    uri
        The folder.
    card, scaling, intensity, splits
        As in `Model`.
    generator, discriminator
        State dicts of the networks.
    config
        The resolved experiment as YAML.
    """
    files = {
        "weights.safetensors": save_tensors(_plain(generator)),
        "discriminator.safetensors": save_tensors(_plain(discriminator)),
        "scaling.safetensors": save_arrays(scaling.to_tensors()),
        "config.yaml": config.encode(),
    }
    for name, data in files.items():
        write_bytes(join(uri, name), data)
    entry = {
        "format_version": FORMAT_VERSION,
        "preset": card.preset,
        "channels": card.channels,
        "patch_size": card.patch_size,
        "steps": card.steps,
        "metrics": card.metrics,
        "scaling": scaling.describe(),
        "intensity": intensity.to_json(),
        "splits": splits.to_json(),
        "notes": card.notes,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    write_bytes(join(uri, "checkpoint.json"), json.dumps(entry, indent=1).encode())


def save_scaling(uri: str, scaling: Scaling) -> None:
    """Store a scaling alone in one file: workers may need more plates than a checkpoint has."""
    about = np.frombuffer(json.dumps(scaling.describe()).encode(), dtype=np.uint8)
    write_bytes(uri, save_arrays({**scaling.to_tensors(), "description": about}))


def load_scaling(uri: str) -> Scaling:
    """Read what `save_scaling` wrote."""
    tensors = load_arrays(read_bytes(uri))
    return Scaling.from_tensors(tensors, json.loads(tensors["description"].tobytes()))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def read_card(uri: str) -> ModelCard:
    """Return what a checkpoint folder says about itself, without loading its weights.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or one of a later version.
    """
    return _card(_description(uri, uri))


def load_model(
    uri: str, device: str = "cpu", store: str | None = None, *, bf16: bool = False
) -> Model:
    """Load a checkpoint folder, or an MLflow model named ``models:/name@alias`` or ``runs:/…``.

    Parameters
    ----------
    uri
        Path or URI.
    device
        Where the generator runs: ``cpu``, ``cuda``.
    store
        MLflow's tracking URI for ``models:/`` and ``runs:/``; None: MLFLOW_TRACKING_URI.
    bf16
        Draw in bfloat16: faster on GPUs and on CPUs with AMX or AVX512-BF16, pixels differ by a
        few of 255 levels.

    Raises
    ------
    CheckpointError
        If it is missing, of a later version, or its files do not match their recorded hashes.
    """
    folder = _download(uri, store) if uri.startswith(("models:/", "runs:/")) else uri
    data = _description(uri, folder)
    files = {}
    for name, expected in data["sha256"].items():
        if name == "discriminator.safetensors":
            continue
        files[name] = _read_file(uri, join(folder, name))
        found = hashlib.sha256(files[name]).hexdigest()
        if found != expected:
            raise CheckpointError(
                f"{uri}: {name} is not the file that was saved (sha256 {found[:12]}…, expected "
                f"{expected[:12]}…); copy the checkpoint again"
            )
    scaling = Scaling.from_tensors(load_arrays(files["scaling.safetensors"]), data["scaling"])
    return Model(
        _card(data),
        scaling,
        Intensity.from_json(data["intensity"]),
        Splits.from_json(data["splits"]),
        load_tensors(files["weights.safetensors"]),
        config=files["config.yaml"].decode(),
        model_hash=hashlib.sha256(
            json.dumps([data[key] for key in ("sha256", "scaling", "intensity")]).encode()
        ).hexdigest(),
        device=device,
        bf16=bf16,
    )


def _description(uri: str, folder: str) -> dict[str, Any]:
    """Return ``checkpoint.json``; ``uri`` is what the user asked for."""
    if not exists(join(folder, "checkpoint.json")):
        raise CheckpointError(
            f"{uri}: no checkpoint (checkpoint.json is missing); train one with jobs/train.py or "
            "check train.output"
        )
    try:
        data: dict[str, Any] = json.loads(read_bytes(join(folder, "checkpoint.json")))
        version, preset = data["format_version"], data["preset"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{uri}: checkpoint.json is damaged ({error!r})") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{uri}: format {version}, this program reads up to {FORMAT_VERSION}; update cp2image"
        )
    if preset not in PRESETS:
        raise CheckpointError(
            f"{uri}: a model of preset {preset!r}, this program knows {', '.join(PRESETS)}; "
            "update cp2image"
        )
    return data


def _card(data: dict[str, Any]) -> ModelCard:
    return ModelCard(
        data["preset"],
        tuple(data["channels"]),
        data["patch_size"],
        data["steps"],
        data["metrics"],
        data["notes"],
    )


def _read_file(uri: str, place: str) -> bytes:
    try:
        return read_bytes(place)
    except StorageError as error:
        if exists(place):
            raise
        raise CheckpointError(
            f"{uri}: {name_of(place)} is missing, checkpoint.json names it; copy the checkpoint "
            "again"
        ) from error


def _download(uri: str, store: str | None) -> str:
    path = store.removeprefix("sqlite:///") if store and store.startswith("sqlite:///") else ""
    if path and not Path(path).exists():  # MLflow would make an empty one
        raise CheckpointError(
            f"{uri}: there is no MLflow store at {path}; set tracking.uri or MLFLOW_TRACKING_URI "
            "to the one that has the model, or run.folder to its experiment's"
        )
    import mlflow

    try:
        with mlflow_store(store):
            folder = mlflow.artifacts.download_artifacts(uri)
    except Exception as error:  # MLflow's exceptions differ by store
        raise CheckpointError(
            f"{uri}: MLflow has no such model ({error}); check the name, the alias and "
            "MLFLOW_TRACKING_URI"
        ) from error
    return join(str(folder), "data", "checkpoint")  # where MLflow puts a logged folder
