"""What each Ray Train worker does: step, validate, save. Floor: beside training."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from cp2image.checkpoint import ModelCard, save_checkpoint
from cp2image.config import Config
from cp2image.data.balance import TreatmentSampler
from cp2image.data.schema import PatchFormat
from cp2image.errors import CheckpointError, DivergenceError, TrainingError
from cp2image.metrics.validation import ValidationScores
from cp2image.models.data_parallel import average_over_ranks
from cp2image.models.losses import pixel_loss
from cp2image.models.presets import STOCHASTIC, sees
from cp2image.models.recipe import Batch, Recipe
from cp2image.profiles import Preparation
from cp2image.storage import delete_tree, join, list_files, read_bytes, write_bytes
from cp2image.tracking import Recorder
from cp2image.training_cells import CellArrays, load_cells, worker_keys
from cp2image.training_measurement import DrawMeasurement
from cp2image.training_progress import BatchesAhead, Progress
from cp2image.training_recipes import build_recipe, in_bf16
from cp2image.training_turns import TurnedCells, add_turned

_SHOWN = ("L_MSE", "L_generator", "L_energy")
"""Losses, of which a line of progress shows the first that there is."""
STATES = "_resume"
"""Folder below a checkpoint with the states an interrupted run goes on from.

A state is the networks, the optimisers and the step: nothing else has to be kept, since
`TreatmentSampler` draws each step's cells, and a recipe its noise, from the seed, the rank and the
step alone.
"""


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
    measured_alike
        Whether draws can be measured as the dataset's features were.
    """

    config: Config
    preparation: Preparation
    patch_format: PatchFormat
    recorder: Recorder
    fingerprint: str
    board: Any = None
    measured_alike: bool = False


def run_worker(settings: dict[str, Any]) -> None:
    """Train on one worker; Ray Train calls it on every rank."""
    import ray.train
    import ray.train.torch
    import ray.util

    plan: TrainingPlan = settings["plan"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    torch.set_num_threads(settings["threads"])
    shard = ray.train.get_dataset_shard("cells")
    tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    train: CellArrays | TurnedCells
    train, validation = load_cells(
        tables,
        plan.preparation,
        plan.patch_format,
        rank=rank,
        world=world,
        validation_cells=plan.config.train.validation_cells,
    )
    if plan.config.train.turned:
        shard = ray.train.get_dataset_shard("turned")
        tables = shard.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        train = add_turned(train, tables, worker_keys(plan.preparation, rank, world))
    loop = TrainingLoop(plan, train, validation, rank, world, device)
    group = ray.util.get_current_placement_group()
    place = {"placement_group": group.id.hex() if group else ""}  # to free it, if need be
    loop.run(lambda metrics: ray.train.report({**metrics, **place}))


class TrainingLoop:
    """One rank's training: steps, validation, states to resume from, the final checkpoint."""

    def __init__(
        self,
        plan: TrainingPlan,
        train: CellArrays | TurnedCells,
        validation: CellArrays,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._plan, self._cells, self._validation = plan, train, validation
        self._rank, self._world, self._device = rank, world, torch.device(device)
        settings, seed = plan.config.train, plan.config.run.seed
        treatments, count = train.treatments, len(plan.preparation.treatments)
        size = settings.cells_per_step(count)
        if settings.balance == "cell":
            treatments, count = np.zeros_like(treatments), 1
        self._sampler = TreatmentSampler(
            treatments, size, seed, rank=rank, world=world, treatments_in_all=count
        )
        torch.manual_seed(seed)  # the same weights on every rank
        self._recipe = build_recipe(
            settings, plan.patch_format, train.features.shape[1], self._device, self._measurement()
        )
        self.step, self._seconds, self._time_used = 0, 0.0, 0.0
        self._floor = _mean_image_loss(validation)
        self._scores = self._score_by() if rank == 0 else None
        self._logged: dict[str, float] = {}

    @property
    def recipe(self) -> Recipe:
        """The networks and their optimisers."""
        return self._recipe

    def run(self, report: Callable[[dict[str, float]], None]) -> None:
        """Train to the end and save the checkpoint; resumes from the newest state if any.

        Parameters
        ----------
        report
            Called on every rank after each validation with the step, the seconds and the newest
            value of everything that was logged; metrics are rank 0's.

        Raises
        ------
        DivergenceError
            If a loss or a weight is not finite.
        """
        settings = self._plan.config.train
        self._resume()
        progress = Progress(self._seconds)
        metrics: dict[str, float] = {}
        last = self._is_over(self._seconds)
        with BatchesAhead(self._batch, self.step) as ahead:
            while not last:
                with progress.waiting():
                    batch = ahead.take()
                self._recipe.reached(self._share())
                progress.add(self._recipe.step(batch, self.step, self._average))
                self.step += 1
                last = self.step == settings.steps
                if self.step % settings.log_every == 0 or last:
                    last = self._is_over(progress.seconds)
                    self._log(progress)
                due = self.step % settings.validate_every == 0 and self._recipe.ready
                if due or last:
                    self._average_statistics()
                    metrics = self._validate()
                    numbers = {"step": self.step, "train_seconds": progress.seconds}
                    report({**self._logged, **metrics, **numbers})
                if self.step % settings.checkpoint_every == 0 or last:
                    self._average_statistics()
                    self._save_state(progress.seconds)
        if self._rank == 0:
            self._finish(metrics or self._validate(), progress.seconds)

    def _measurement(self) -> DrawMeasurement | None:
        """Return what measures draws while training, where that is wanted and can be."""
        config, preparation = self._plan.config, self._plan.preparation
        wanted = config.train.stochastic.measured
        if not (wanted and self._plan.measured_alike):  # other presets' plans never say so
            return None
        shape = self._plan.patch_format
        measurement = DrawMeasurement(
            self._cells, preparation.scaling, shape, config.measure, self._world, wanted
        )
        return measurement.giving_back(self._average)

    def _log(self, progress: "Progress") -> None:
        """Record the mean losses of all ranks since the last time."""
        names, losses = progress.take()
        self._average([losses])
        values = {f"train/{name}": float(v) for name, v in zip(names, losses, strict=True)}
        self._check_finite(values)
        rate = self.step * self._sampler.batch_size / progress.seconds
        if self._rank == 0:
            values |= {"train/cells_per_s": rate, "train/waiting_share": progress.waiting_share}
            self._plan.recorder.metrics(values, self.step)
            self._logged |= values
            self._show(values, progress.seconds)

    def _batch(self, step: int) -> Batch:
        original = self._sampler.draw(step, "original")
        real = self._sampler.draw(step, "real") if self._recipe.needs_real else original[:0]
        seed = np.random.SeedSequence([self._plan.config.run.seed, self._rank, step])
        return Batch(
            self._cells.normalised(original, self._device),
            self._cells.scaled(original, self._device),
            self._cells.normalised(real, self._device),
            int(seed.generate_state(1)[0]),
            self._orientations(original),
            original,
        )

    def _orientations(self, rows: NDArray[np.int64]) -> Tensor | None:
        """Return how the chosen cells are turned; None where none are."""
        if not isinstance(self._cells, TurnedCells):
            return None
        return torch.from_numpy(self._cells.orientations[rows]).to(self._device)

    def _average(self, gradients: Sequence[Tensor]) -> None:
        if self._world > 1:
            average_over_ranks(gradients)

    def _average_statistics(self) -> None:
        """Make batch norm's running statistics those of all ranks together."""
        state = self._recipe.state()
        self._average([value for name, value in state.items() if name.endswith(("_mean", "_var"))])

    def _is_over(self, seconds: float) -> bool:
        """Tell whether steps or minutes are used up; rank 0's clock counts on all ranks."""
        settings = self._plan.config.train
        if settings.minutes:
            used = torch.tensor([seconds / (60 * settings.minutes)], device=self._device)
            if self._world > 1:
                dist.broadcast(used, src=0)
            self._time_used = float(used)
        return self._share() >= 1

    def _share(self) -> float:
        """Return which share of the training is done."""
        return max(self.step / self._plan.config.train.steps, self._time_used)

    def _check_finite(self, values: dict[str, float]) -> None:
        bad = [name for name, value in values.items() if not np.isfinite(value)]
        if bad:
            settings = self._plan.config.train
            rate = f"train.learning_rate (optimiser setting {settings.optimiser!r})"
            if settings.preset == STOCHASTIC:
                rate = f"train.stochastic.learning_rate ({settings.stochastic.learning_rate:g})"
            raise DivergenceError(
                f"step {self.step}: {', '.join(bad)} not finite; lower {rate} or switch bf16 off"
            )

    def _validate(self) -> dict[str, float]:
        if self._rank != 0 or not len(self._validation.patches):
            return {}
        losses, kept = [], []
        rows = np.arange(len(self._validation.patches))
        with torch.inference_mode():
            for start in range(0, len(rows), 104):
                chosen = rows[start : start + 104]
                real = self._validation.normalised(chosen, self._device)
                features = self._validation.scaled(chosen, self._device)
                keys = torch.from_numpy(chosen).to(self._device)
                drawn = self._recipe.draw(features, keys, images=real)
                losses.append(float(pixel_loss(real, drawn)) * len(chosen))
                if self._scores is not None and start < self._plan.config.score.cells:
                    kept.append(drawn.float().cpu().numpy())
                if start == 0:
                    self._draw(real[:10], drawn[:10])
        loss = sum(losses) / len(rows)
        metrics = {
            "validation/L_MSE": loss,
            "validation/L_MSE_mean_image": self._floor,
            "validation/below_mean_image": 1 - loss / self._floor,
        }
        if self._scores is not None:
            scored = self._scores.of(np.concatenate(kept)[: self._plan.config.score.cells])
            metrics |= {f"validation/{name}": value for name, value in scored.items()}
        self._plan.recorder.metrics(metrics, self.step)
        return metrics

    def _score_by(self) -> ValidationScores | None:
        settings, cells = self._plan.config.score, self._validation
        if not settings.embeddings or not len(cells.patches):
            return None
        rows = np.arange(min(settings.cells, len(cells.patches)))
        real = cells.normalised(rows, torch.device("cpu")).numpy()
        channels = self._plan.patch_format.channels
        return ValidationScores(real, channels, settings.embeddings, settings.families)

    def _draw(self, real: Tensor, drawn: Tensor) -> None:
        from cp2image.figures.patches import figure_pairs  # by one rank, once there is something

        channels = self._plan.patch_format.channels
        figure = figure_pairs(real.cpu().numpy(), drawn.cpu().numpy(), channels)
        self._plan.recorder.picture(figure, f"validation/step_{self.step:07d}.png")

    def _show(self, values: dict[str, float], elapsed: float) -> None:
        rate, total = values["train/cells_per_s"], self._plan.config.train.steps
        name = next(name for name in _SHOWN if f"train/{name}" in values)
        line = (
            f"step {self.step:,} of {total:,}  {name} {values[f'train/{name}']:.4g}  "
            f"{rate:.0f} cells/s  {elapsed / 60:.1f} min"
        )
        if self._plan.board is None:
            print(f"train: {line}", flush=True)
        else:
            self._plan.board.show.remote(line)

    def _save_state(self, elapsed: float) -> None:
        if self._rank != 0:
            return
        state = {k: v.detach().cpu().contiguous() for k, v in self._recipe.state().items()}
        self._check_finite({k: float(v.float().sum()) for k, v in state.items()})
        folder = join(self._plan.config.train.output, STATES)
        about = {
            "step": self.step,
            "seconds": elapsed,
            "fingerprint": self._plan.fingerprint,
            "run_id": self._plan.recorder.run_id,
        }
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
        try:
            self._recipe.load_state(state)
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{folder}: the interrupted training there does not fit this version's "
                f"{self._plan.config.train.preset!r}: another version began it; train to a new "
                "folder (train.output), or remove that one to begin again"
            ) from error
        self.step, self._seconds = int(about["step"]), float(about["seconds"])

    def _finish(self, metrics: dict[str, float], seconds: float) -> None:
        if not self._recipe.ready:
            raise TrainingError(
                f"training ended after {self.step:,} steps and its generator has learned nothing "
                "yet: what comes before the adversary (train.stochastic.autoencoder and alone) "
                "took them all; give more train.steps or train.minutes, or look at the clock more "
                "often (train.log_every)"
            )
        plan, (generator, discriminator) = self._plan, self._recipe.published()
        shape, preparation = plan.patch_format, plan.preparation
        notes = {
            "scaling": list(preparation.scaling.notes),
            "left_out": preparation.selection.dropped,
            "cells": preparation.counts,
            "treatments": len(preparation.treatments),
            "fingerprint": plan.fingerprint,
            "seconds": seconds,
            "bf16": in_bf16(plan.config.train, self._device),
            "cells_seen": self.step * self._sampler.batch_size,
            "wanted": [plan.config.train.steps, plan.config.train.minutes],
            "sees": list(sees(plan.config.train.preset, image=True)),
        }
        card = ModelCard(
            plan.config.train.preset, shape.channels, shape.size, self.step, metrics, notes
        )
        save_checkpoint(
            plan.config.train.output,
            card,
            scaling=preparation.scaling,
            intensity=preparation.intensity,
            splits=preparation.splits,
            generator=generator,
            discriminator=discriminator,
            config=plan.config.yaml(),
        )


def _mean_image_loss(cells: CellArrays) -> float:
    """½ Σ² of predicting the cells' own mean image: what any generator must beat."""
    if not len(cells.patches):
        return float("nan")
    patches = cells.normalised(np.arange(len(cells.patches)), torch.device("cpu"))
    mean = patches.mean(dim=0, keepdim=True)
    return float(pixel_loss(patches, mean.expand_as(patches)))


def adopt_state(source: str, target: str, fingerprint: str) -> bool:
    """Let a run below ``target`` begin with the newest state of the run below ``source``.

    Returns
    -------
    bool
        False if there is no such state.
    """
    about = read_state(source)
    if about is None:
        return False
    data = read_bytes(join(source, STATES, about["state"], "state.safetensors"))
    write_bytes(join(target, STATES, about["state"], "state.safetensors"), data)
    about |= {"fingerprint": fingerprint, "run_id": ""}
    write_bytes(join(target, STATES, "latest.json"), json.dumps(about).encode())
    return True


def read_state(checkpoint: str) -> dict[str, Any] | None:
    """Return what the newest state of an interrupted run says of itself, or None."""
    found = [f for f in list_files(join(checkpoint, STATES)) if f.endswith("latest.json")]
    if not found:
        return None
    about: dict[str, Any] = json.loads(read_bytes(found[0]))
    return about
