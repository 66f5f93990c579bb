"""Train a generator on a measured dataset with Ray Train. Step: beside the other steps."""

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import ray
from pyarrow.fs import FileSystem
from ray.data import TaskPoolStrategy
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from cp2image.checkpoint import ModelCard, load_model, read_card
from cp2image.cluster import join_cluster
from cp2image.config import Config
from cp2image.dataset import CellDataset, open_dataset
from cp2image.errors import CheckpointError, DivergenceError, TrainingError
from cp2image.models.presets import STOCHASTIC
from cp2image.profiles import Preparation, measured_features, prepare_profiles
from cp2image.storage import delete_tree, exists, filesystem, join, read_bytes, write_bytes
from cp2image.tracking import log_model, record
from cp2image.training_board import progress_board
from cp2image.training_cells import TrainingRead
from cp2image.training_loop import STATES, TrainingPlan, adopt_state, read_state, run_worker
from cp2image.training_measurement import measured_alike
from cp2image.training_refusal import StopOnRefusal, refusal_of
from cp2image.training_turns import TurnedRead, open_turned

_FREE = (
    "steps",
    "minutes",
    "validate_every",
    "validation_cells",
    "checkpoint_every",
    "log_every",
    "threads",
    "max_failures",
    "input",
    "output",
    "turned",
)
"""Settings that may change between an interrupted run and its resumption; the data may move."""
_READ_CPUS = 0.1
"""Share of a CPU that each of Ray Data's reading tasks asks for, beside the training workers."""
_READ_THREADS = 2
"""Threads of a reading task; with more, each waits for Python's lock."""
_RANGES_PER_TASK = 16
"""Ranges of a reading task: Ray Data takes a second to start a second one, and 0.1 s between."""
_BLOCK_BYTES = 32 * 2**20
"""Size of the pieces that a task hands over: the less lies about, the faster."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training run left behind.

    Attributes
    ----------
    checkpoint
        Its URI, for `cp2image.load`.
    steps
        Training steps done, over all runs that led to it.
    metrics
        Of the last validation.
    run_id
        MLflow's; empty without tracking.
    resumed_from
        Step that an earlier, interrupted run had reached; 0 for none.
    """

    checkpoint: str
    steps: int
    metrics: dict[str, float]
    run_id: str
    resumed_from: int = 0

    def __str__(self) -> str:
        numbers = ", ".join(f"{k.split('/')[-1]} {v:.4g}" for k, v in self.metrics.items())
        resumed = f" (resumed from step {self.resumed_from:,})" if self.resumed_from else ""
        return f"{self.checkpoint}: {self.steps:,} steps{resumed}; {numbers}"


@dataclass(frozen=True)
class Place:
    """Where a training run stands among others that share its cluster.

    Attributes
    ----------
    share
        Of the cluster's CPUs, for this run.
    callbacks
        Told of each report, see `ray.train.UserCallback`.
    tags
        Of its MLflow run; a run that has them all is gone on with.
    quiet
        Whether its progress is not shown: one process less.
    start_from
        Checkpoint folder whose newest state a run begins with that has none of its own; empty: it
        begins with new weights.
    """

    share: float = 1.0
    callbacks: Sequence[UserCallback] = ()
    tags: dict[str, str] = field(default_factory=dict)
    quiet: bool = False
    start_from: str = ""


_ALONE = Place()


def fingerprint(config: Config, dataset: CellDataset) -> str:
    """Return a hash of all that shapes the weights: settings but not their amount, and the data.

    Raises
    ------
    DatasetError
        If ``train.turned`` does not go with the dataset.
    """
    train = config.train.model_copy(update=dict.fromkeys(_FREE))
    parts = sorted((m.plate, m.fingerprint, m.rows) for m in dataset.manifests.values())
    settings = config.model_copy(update={"train": train})
    text = settings.fingerprint("train", "split", "scaling") + repr((config.run.seed, parts))
    if _measures_draws(config, dataset):
        text += config.fingerprint("measure")
    for one in _turned(config, dataset):
        text += repr(sorted(manifest.identity for manifest in one.manifests.values()))
    return sha256(text.encode()).hexdigest()[:16]


def train(config: Config, place: Place = _ALONE) -> TrainingResult:
    """Train as ``config.train`` says and publish the checkpoint.

    An interrupted run (worker or driver killed) goes on from its newest state when the same job is
    started again, under the same MLflow run; a finished one is returned as it is; more ``steps``
    or ``minutes`` continue it.

    Raises
    ------
    CheckpointError
        If ``train.output`` holds a checkpoint or an interrupted run of other settings or data.
    DatasetError
        If ``train.input`` is not a measured dataset.
    TrainingError
        If training fails on the workers; DivergenceError if a loss is not finite.
    """
    dataset = open_dataset(config.train.input)
    measured_features(dataset)  # refused before anything is written
    mark = fingerprint(config, dataset)
    output = config.train.output
    card, state = _earlier(output, mark)
    if place.start_from and not state and card is None:
        adopt_state(place.start_from, output, mark)
    trained = card is not None and _is_enough(card, config)
    recorded = _recorded(output)
    if card is not None and trained and recorded["steps"] == card.steps:
        return TrainingResult(output, card.steps, card.metrics, recorded["run_id"])
    write_bytes(join(output, STATES, "config.yaml"), config.yaml().encode())  # or say so now
    join_cluster(config.cluster)
    preparation = None if trained else prepare_profiles(dataset, config)
    with record(config, "train", state.get("run_id", ""), place.tags) as recorder:
        if preparation is not None:
            _describe(dataset, preparation)
            measures = _measures_draws(config, dataset)
            with nullcontext() if place.quiet else progress_board() as board:
                shape = dataset.patch_format
                plan = TrainingPlan(config, preparation, shape, recorder, mark, board, measures)
                _describe_measurement(plan)
                _fit(plan, dataset, place)
        model = load_model(output)
        log_model(recorder, config, model.features, model.patch_format)
    card = model.card
    done = {"steps": card.steps, "run_id": recorder.run_id}
    write_bytes(_record_uri(output), json.dumps(done).encode())
    return TrainingResult(
        output, card.steps, card.metrics, recorder.run_id, int(state.get("step", 0))
    )


def _earlier(output: str, mark: str) -> tuple[ModelCard | None, dict[str, Any]]:
    """Return the checkpoint and the resumable state that earlier runs of this job left, if any."""
    advice = "set train.output or run.folder to a new place, or remove that folder yourself"
    card = read_card(output) if exists(join(output, "checkpoint.json")) else None
    if card is not None and card.notes.get("fingerprint") != mark:
        raise CheckpointError(
            f"{output}: holds a checkpoint of other settings or data ({card.steps:,} steps); "
            f"{advice}"
        )
    state = read_state(output)
    if state is not None and state["fingerprint"] != mark:
        raise CheckpointError(
            f"{output}: holds an interrupted run of other settings or data "
            f"({state['step']:,} steps); {advice}"
        )
    return card, state or {}


def _is_enough(card: ModelCard, config: Config) -> bool:
    wanted = [config.train.steps, config.train.minutes]
    return card.steps >= config.train.steps or card.notes.get("wanted") == wanted


def _record_uri(output: str) -> str:
    return join(output, STATES, "recorded.json")


def _recorded(output: str) -> dict[str, Any]:
    """Return how many steps MLflow has the model of; the checkpoint itself is written before."""
    uri = _record_uri(output)
    if not exists(uri):
        return {"steps": None, "run_id": ""}
    done: dict[str, Any] = json.loads(read_bytes(uri))
    return done


def _describe(dataset: CellDataset, preparation: Preparation) -> None:
    counts = ", ".join(f"{n:,} {name}" for name, n in sorted(preparation.counts.items()))
    print(
        f"train: {dataset.rows:,} cells ({counts}), {len(preparation.treatments)} treatments, "
        f"{len(preparation.scaling.features)} of {len(dataset.features)} features",
        flush=True,
    )


def _measures_draws(config: Config, dataset: CellDataset) -> bool:
    """Say whether draws are measured while training: where it is wanted and can be done alike."""
    settings = config.train
    wanted = settings.preset == STOCHASTIC and settings.stochastic.measured > 0
    return wanted and measured_alike(config, dataset)


def _describe_measurement(plan: TrainingPlan) -> None:
    settings = plan.config.train
    if settings.preset == STOCHASTIC and settings.stochastic.measured and not plan.measured_alike:
        print(
            f"train: draws are not measured while training: the features of {settings.input} are "
            "not jobs/measure.py's, or made with another measure section than this config has",
            flush=True,
        )


def _turned(config: Config, dataset: CellDataset) -> list[CellDataset]:
    return open_turned(config.train.turned, dataset) if config.train.turned else []


def _fit(plan: TrainingPlan, dataset: CellDataset, place: Place) -> None:
    settings = plan.config.train
    cpus = ray.cluster_resources().get("CPU", 1.0) * place.share
    # Ray Data's reading needs a little of the CPUs while the workers wait for their cells.
    share = min(1.0, max(0.1, (cpus - 0.5 * place.share) / settings.workers))
    resources: dict[str, float] = {"CPU": share}
    if settings.gpu:
        gpus = ray.cluster_resources().get("GPU", 1.0) * place.share
        resources["GPU"] = min(1.0, gpus / settings.workers) if place.share < 1 else 1.0
    threads = settings.threads or max(1, int(cpus // settings.workers))
    read = {"cells": read_cells(dataset, plan.preparation, plan.config)}
    turned = _turned(plan.config, dataset)
    if turned:
        read["turned"] = read_turned(turned, plan.preparation, plan.config)
    with _scratch(settings.output) as (files, path):
        trainer = TorchTrainer(
            run_worker,
            train_loop_config={"plan": plan, "threads": threads},
            scaling_config=ScalingConfig(
                num_workers=settings.workers, use_gpu=settings.gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"train-{uuid.uuid4().hex[:12]}",
                storage_path=path,
                storage_filesystem=files,
                failure_config=FailureConfig(max_failures=settings.max_failures),
                callbacks=[StopOnRefusal(), *place.callbacks],
            ),
            datasets=read,
            dataset_config=DataConfig(datasets_to_split=[]),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            kind = DivergenceError if _diverged(error) else TrainingError
            raise kind(f"training stopped: {_cause(error)}") from error


def read_cells(dataset: CellDataset, preparation: Preparation, config: Config) -> ray.data.Dataset:
    """Return the cells to train and validate on as Ray Data reads them, see `TrainingRead`."""
    threads = min(_READ_THREADS, _reading_cpus(config))
    read = TrainingRead(dataset, preparation, config.cluster.cells_per_task, threads)
    return _stream(read, config, threads)


def read_turned(
    datasets: Sequence[CellDataset], preparation: Preparation, config: Config
) -> ray.data.Dataset:
    """Return the other orientations of the cells to train on, see `TurnedRead`."""
    read = TurnedRead(datasets, preparation, config.cluster.cells_per_task)
    return _stream(read, config, 1)


def _reading_cpus(config: Config) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1.0)) // config.train.workers)


def _stream(read: TrainingRead | TurnedRead, config: Config, threads: int) -> ray.data.Dataset:
    """Let tasks of so many threads read the ranges, several each."""
    count, tasks = len(read.ranges), _reading_cpus(config) // threads
    blocks = min(count, max(tasks, count // _RANGES_PER_TASK))
    rows = ray.data.from_items([{"id": i} for i in range(count)], override_num_blocks=blocks)
    cells = rows.map_batches(
        read, batch_size=None, num_cpus=_READ_CPUS, compute=TaskPoolStrategy(size=tasks)
    )
    cells.context.target_max_block_size = _BLOCK_BYTES
    return cells


def _first(error: TrainingFailedError) -> BaseException:
    failures = getattr(error, "worker_failures", None) or {}
    first: BaseException = getattr(error, "controller_failure", None) or next(
        iter(failures.values()), error
    )
    return first


def _diverged(error: TrainingFailedError) -> bool:
    return isinstance(refusal_of(_first(error)), DivergenceError)


def _cause(error: TrainingFailedError) -> str:
    first = _first(error)
    refusal = refusal_of(first)
    if refusal is not None:
        return str(refusal)
    inner = getattr(first, "_base_exc", first)
    return f"{type(inner).__name__}: {str(inner).strip()[-500:]}"


@contextmanager
def _scratch(output: str) -> Iterator[tuple[FileSystem, str]]:
    """Give Ray Train a folder for its own bookkeeping; nothing that we keep is in it."""
    uri = join(output, "_ray")
    files, path = filesystem(uri)
    try:
        yield files, path
    finally:
        delete_tree(uri)
