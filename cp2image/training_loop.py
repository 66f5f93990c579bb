"""What each Ray Train worker does: load its cells, step, validate, save. Floor: beside training."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cp2image.checkpoint import ModelCard, save_checkpoint
from cp2image.columns import PLATE
from cp2image.config import Config
from cp2image.data.balance import Stream, TreatmentSampler
from cp2image.data.identity import cell_keys, treatment_names
from cp2image.data.schema import PATCH, PatchFormat, decode_features, decode_metadata
from cp2image.dataset import CellRange, read_range
from cp2image.errors import TrainingError
from cp2image.figures.patches import figure_pairs
from cp2image.models.losses import pixel_loss
from cp2image.models.recipe import OPTIMISERS, Batch, PaperRecipe, Recipe, part_of
from cp2image.profiles import Preparation
from cp2image.storage import delete_tree, join, list_files, read_bytes, write_bytes
from cp2image.tracking import Recorder

STATES = "_resume"
"""Folder below a checkpoint with the states an interrupted run goes on from."""


@dataclass(frozen=True)
class TrainingPlan:
    """Everything a worker needs, besides its cells.

    Attributes
    ----------
    config
        The resolved experiment.
    preparation
        Splits, scaling and treatments, fitted once by the driver.
    patch_format
        Of the dataset.
    recorder
        Where rank 0 records.
    fingerprint
        Of all settings that change the weights; states of others are not resumed from.
    board
        Ray actor whose ``show`` takes rank 0's lines to the driver; None to print them.
    """

    config: Config
    preparation: Preparation
    patch_format: PatchFormat
    recorder: Recorder
    fingerprint: str
    board: Any = None


class TrainingRead:
    """Ray Data's map: ranges of cells → keys, split, treatment, scaled features, patch."""

    def __init__(self, ranges: Sequence[CellRange], preparation: Preparation) -> None:
        self._ranges, self._preparation = ranges, preparation

    def __call__(self, batch: Mapping[str, NDArray[Any]]) -> pa.Table:
        tables = [self._read(self._ranges[int(i)]) for i in batch["id"]]
        return pa.concat_tables(tables)

    def _read(self, cells: CellRange) -> pa.Table:
        table = read_range(cells)
        metadata = decode_metadata(table)
        scaling = self._preparation.scaling
        plates = metadata[PLATE].astype(str).tolist()
        scaled = scaling.apply(decode_features(table, scaling.features), plates)
        width = scaled.shape[1] * 4
        rows = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(scaled), [None, pa.py_buffer(scaled)]
        )
        found = pa.table(
            {
                "key": pa.array(cell_keys(metadata), type=pa.uint64()),
                "split": pa.array(self._preparation.splits.of(metadata).tolist(), pa.string()),
                "treatment": pa.array(treatment_names(metadata).tolist(), pa.string()),
                "plate": pa.array(plates, pa.string()),
                "features": rows,
                PATCH: table.column(PATCH),
            }
        )
        return found.filter(pa.compute.is_in(found["split"], pa.array(["train", "validation"])))


@dataclass(frozen=True)
class CellArrays:
    """Cells in memory, in the order of their keys.

    Attributes
    ----------
    patches
        Acquisition scale, (N, C, H, W), uint8 or uint16.
    features
        Scaled, (N, p) float32.
    offset, factor
        Normalisation of each patch and channel, (N, C) float32.
    treatments
        Number of each cell's treatment, (N,).
    """

    patches: NDArray[Any]
    features: NDArray[np.float32]
    offset: NDArray[np.float32]
    factor: NDArray[np.float32]
    treatments: NDArray[np.int64]

    def normalised(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the chosen patches in [0, 1], float32, on the device."""
        pixels = torch.from_numpy(self.patches[rows].astype(np.float32)).to(device)
        offset = torch.from_numpy(self.offset[rows])[..., None, None].to(device)
        factor = torch.from_numpy(self.factor[rows])[..., None, None].to(device)
        return pixels.sub_(offset).mul_(factor).clamp_(0, 1)

    def scaled(self, rows: NDArray[np.int64], device: torch.device) -> Tensor:
        """Return the chosen cells' features on the device."""
        return torch.from_numpy(self.features[rows]).to(device)


def load_cells(
    tables: Iterator[pa.Table], plan: TrainingPlan, rank: int, world: int
) -> tuple[CellArrays, CellArrays]:
    """Gather a worker's share of the training cells, and the validation sample.

    A training cell belongs to the worker that its key names, whatever order the blocks come in;
    the validation sample is the ``validation_cells`` cells with the smallest keys.

    Raises
    ------
    TrainingError
        If this worker gets no cells.
    """
    train: list[pa.Table] = []
    validation: list[pa.Table] = []
    limit = plan.config.train.validation_cells
    for table in tables:
        keys = table.column("key").to_numpy()
        split = np.array(table.column("split").to_pylist())
        mine = (split == "train") & (keys % np.uint64(world) == rank)
        train.append(table.filter(pa.array(mine)))
        if rank == 0:
            validation.append(table.filter(pa.array(split == "validation")))
            if sum(part.num_rows for part in validation) > 4 * limit:
                validation = [_by_key(validation).slice(0, limit).combine_chunks()]
    if not sum(part.num_rows for part in train):
        raise TrainingError(
            f"worker {rank} of {world} has no training cells; use fewer workers "
            "(train.workers) or more data"
        )
    held_out = _by_key(validation).slice(0, limit) if rank == 0 else train[0].slice(0, 0)
    return _arrays(_by_key(train), plan), _arrays(held_out, plan)


def _by_key(parts: list[pa.Table]) -> pa.Table:
    table = pa.concat_tables(parts)
    order = np.argsort(table.column("key").to_numpy(), kind="stable")
    return table.take(pa.array(order))


def _arrays(table: pa.Table, plan: TrainingPlan) -> CellArrays:
    shape = plan.patch_format
    patches = _matrix(table, PATCH, shape.dtype).reshape(-1, *shape.shape)
    features = _matrix(table, "features", "float32")
    number = {name: i for i, name in enumerate(plan.preparation.treatments)}
    treatments = [number.get(name, -1) for name in table.column("treatment").to_pylist()]
    offset, factor = plan.preparation.intensity.limits(
        patches, table.column("plate").to_pylist(), shape.full_scale
    )
    return CellArrays(patches, features, offset, factor, np.array(treatments, dtype=np.int64))


def _matrix(table: pa.Table, name: str, dtype: str) -> NDArray[Any]:
    column = table.column(name)
    width = column.type.byte_width // np.dtype(dtype).itemsize
    data = b"".join(
        memoryview(chunk.buffers()[1])[chunk.offset * chunk.type.byte_width :][
            : len(chunk) * chunk.type.byte_width
        ]
        for chunk in column.chunks
        if len(chunk)
    )
    return np.frombuffer(data, dtype=dtype).reshape(-1, width)


def run_worker(settings: dict[str, Any]) -> None:
    """Train on one worker; Ray Train calls it on every rank."""
    import ray.train
    import ray.train.torch

    plan: TrainingPlan = settings["plan"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(settings["threads"])
    shard = ray.train.get_dataset_shard("cells")
    tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    train, validation = load_cells(tables, plan, rank, world)
    loop = TrainingLoop(plan, train, validation, rank, world, device)
    loop.run(ray.train.report)


class TrainingLoop:
    """One rank's training: steps, validation, states to resume from, the final checkpoint."""

    def __init__(
        self,
        plan: TrainingPlan,
        train: CellArrays,
        validation: CellArrays,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._plan, self._cells, self._validation = plan, train, validation
        self._rank, self._world, self._device = rank, world, torch.device(device)
        settings, seed = plan.config.train, plan.config.run.seed
        treatments = plan.preparation.treatments
        self._sampler = TreatmentSampler(
            train.treatments, settings.batch_size, seed,
            rank=rank, world=world, treatments_in_all=len(treatments),
        )
        torch.manual_seed(seed)  # the same weights on every rank
        setting = OPTIMISERS[settings.optimiser]
        if settings.learning_rate is not None:
            setting = type(setting)(settings.learning_rate, setting.discriminator)
        shape = plan.patch_format
        self._recipe: Recipe = PaperRecipe(
            train.features.shape[1], len(shape.channels), shape.size, setting,
            settings.gamma, settings.gamma_ramp, settings.bf16, self._device,
        )
        self.step, self._seconds = 0, 0.0
        self._floor = _mean_image_loss(validation)

    @property
    def recipe(self) -> Recipe:
        """The networks and their optimisers."""
        return self._recipe

    def run(self, report: Any) -> None:
        """Train to the end and save the checkpoint; resumes from the newest state if any."""
        settings, recorder = self._plan.config.train, self._plan.recorder
        self._resume()
        started, waited = time.monotonic(), 0.0
        sums: dict[str, Tensor] = {}
        metrics: dict[str, float] = {}
        since = self.step
        while self.step < settings.steps:
            before = time.monotonic()
            batch = self._batch(self.step)
            waited += time.monotonic() - before
            losses = self._recipe.step(batch, self.step, self._average)
            self.step += 1
            for name, value in losses.items():
                sums[name] = sums.get(name, torch.zeros_like(value)) + value
            elapsed = self._seconds + time.monotonic() - started
            last = self.step == settings.steps
            if self.step % settings.log_every == 0 or last:
                last = self._agree(last or elapsed > 60 * (settings.minutes or float("inf")))
                taken = self.step - since
                values = {f"train/{name}": float(v) / taken for name, v in sums.items()}
                self._check_finite(values)
                values["train/cells_per_s"] = self.step * self._sampler.batch_size / elapsed
                values["train/waiting_share"] = waited / (time.monotonic() - started)
                if self._rank == 0:
                    recorder.metrics(values, self.step)
                    self._show(values, elapsed)
                sums, since = {}, self.step
            if self.step % settings.validate_every == 0 or last:
                self._average_statistics()
                metrics = self._validate()
                report({"step": self.step, **metrics, "train_seconds": elapsed})
            if self.step % settings.checkpoint_every == 0 or last:
                self._average_statistics()
                self._save_state(elapsed)
            if last:
                break
        if self._rank == 0:
            self._finish(metrics)

    def _batch(self, step: int) -> Batch:
        streams: tuple[Stream, Stream] = ("original", "real")
        original, real = (self._sampler.draw(step, stream) for stream in streams)
        return Batch(
            self._cells.normalised(original, self._device),
            self._cells.scaled(original, self._device),
            self._cells.normalised(real, self._device),
        )

    def _average(self, gradients: Sequence[Tensor]) -> None:
        """Average gradients over the ranks in one all-reduce (data-parallel training)."""
        if self._world == 1:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self._world
        start = 0
        for gradient in gradients:
            gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
            start += gradient.numel()

    def _average_statistics(self) -> None:
        """Make batch norm's running statistics those of all ranks together."""
        if self._world == 1:
            return
        buffers = [
            b for _, b in self._recipe.generator.named_buffers() if b.is_floating_point()
        ]
        self._average(buffers)

    def _agree(self, stop: bool) -> bool:
        if self._world == 1:
            return stop
        flag = torch.tensor([float(stop)], device=self._device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def _check_finite(self, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            raise TrainingError(
                f"step {self.step}: {', '.join(bad)} is not finite; lower train.learning_rate "
                f"(optimiser setting {self._plan.config.train.optimiser!r}) or switch bf16 off"
            )

    def _validate(self) -> dict[str, float]:
        if self._rank != 0 or not len(self._validation.patches):
            return {}
        generator = self._recipe.generator.eval()
        losses, pairs = [], []
        rows = np.arange(len(self._validation.patches))
        with torch.inference_mode():
            for start in range(0, len(rows), 104):
                chosen = rows[start : start + 104]
                real = self._validation.normalised(chosen, self._device)
                drawn = generator(self._validation.scaled(chosen, self._device)).clamp_(0, 1)
                losses.append(float(pixel_loss(real, drawn)) * len(chosen))
                if start == 0:
                    pairs = [real[:10].cpu().numpy(), drawn[:10].cpu().numpy()]
        generator.train()
        loss = sum(losses) / len(rows)
        metrics = {
            "validation/L_MSE": loss,
            "validation/L_MSE_mean_image": self._floor,
            "validation/below_mean_image": 1 - loss / self._floor,
        }
        self._plan.recorder.metrics(metrics, self.step)
        self._draw(pairs)
        return metrics

    def _draw(self, pairs: list[NDArray[np.float32]]) -> None:
        figure = figure_pairs(*pairs, channels=self._plan.patch_format.channels)
        self._plan.recorder.picture(figure, f"validation/step_{self.step:07d}.png")

    def _show(self, values: dict[str, float], elapsed: float) -> None:
        rate, total = values["train/cells_per_s"], self._plan.config.train.steps
        line = (
            f"step {self.step:,} of {total:,}  L_MSE {values['train/L_MSE']:.1f}  "
            f"{rate:.0f} cells/s  {elapsed / 60:.1f} min"
        )
        if self._plan.board is None:
            print(f"train: {line}", flush=True)
        else:
            self._plan.board.show.remote(line)

    def _save_state(self, elapsed: float) -> None:
        if self._rank != 0:
            return
        folder = join(self._plan.config.train.output, STATES)
        about = {
            "step": self.step,
            "seconds": elapsed,
            "fingerprint": self._plan.fingerprint,
            "run_id": self._plan.recorder.run_id,
        }
        state = {k: v.detach().cpu().contiguous() for k, v in self._recipe.state().items()}
        data = save_tensors(state, metadata={"cp2image": json.dumps(about)})
        name = f"step-{self.step:09d}"
        older = {place.rsplit("/", 2)[1] for place in list_files(folder, ".safetensors")}
        write_bytes(join(folder, name, "state.safetensors"), data)
        write_bytes(join(folder, "latest.json"), json.dumps({**about, "state": name}).encode())
        for place in older - {name}:
            delete_tree(join(folder, place))

    def _resume(self) -> None:
        about = read_state(self._plan.config.train.output)
        if about is None or about["fingerprint"] != self._plan.fingerprint:
            return
        folder = join(self._plan.config.train.output, STATES)
        state = load_tensors(read_bytes(join(folder, about["state"], "state.safetensors")))
        self._recipe.load_state({k: v.to(self._device) for k, v in state.items()})
        self.step, self._seconds = int(about["step"]), float(about["seconds"])

    def _finish(self, metrics: dict[str, float]) -> None:
        plan, state = self._plan, self._recipe.state()
        shape, preparation = plan.patch_format, plan.preparation
        notes = {
            "scaling": list(preparation.scaling.notes),
            "left_out": preparation.selection.dropped,
            "cells": preparation.counts,
            "treatments": len(preparation.treatments),
            "fingerprint": plan.fingerprint,
            "wanted": [plan.config.train.steps, plan.config.train.minutes],
        }
        card = ModelCard(
            plan.config.train.preset, shape.channels, shape.size, self.step, metrics, notes
        )
        save_checkpoint(
            plan.config.train.output, card, preparation.scaling, preparation.intensity,
            preparation.splits, part_of(state, "generator"), part_of(state, "discriminator"),
            plan.config.yaml(),
        )


def _mean_image_loss(cells: CellArrays) -> float:
    """½ Σ² of predicting the cells' own mean image: what any generator must beat."""
    if not len(cells.patches):
        return float("nan")
    patches = cells.normalised(np.arange(len(cells.patches)), torch.device("cpu"))
    mean = patches.mean(dim=0, keepdim=True)
    return float(pixel_loss(patches, mean.expand_as(patches)))


def read_state(checkpoint: str) -> dict[str, Any] | None:
    """Return what the newest state of an interrupted run says of itself, or None."""
    found = [f for f in list_files(join(checkpoint, STATES)) if f.endswith("latest.json")]
    if not found:
        return None
    about: dict[str, Any] = json.loads(read_bytes(found[0]))
    return about
