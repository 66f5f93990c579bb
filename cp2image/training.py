"""Train a generator on a measured dataset with Ray Train. Step: beside the other steps."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cp2image.checkpoint import load_model
from cp2image.cluster import join_cluster
from cp2image.config import Config
from cp2image.dataset import CellDataset, open_dataset
from cp2image.errors import CheckpointError, TrainingError
from cp2image.profiles import Preparation, prepare_profiles
from cp2image.storage import delete_tree, exists, filesystem, join
from cp2image.tracking import log_model, record
from cp2image.training_loop import TrainingPlan, TrainingRead, read_state, run_worker

_FREE = ("steps", "minutes", "validate_every", "validation_cells", "checkpoint_every", "log_every")
"""Settings that may change between an interrupted run and its resumption."""


@dataclass(frozen=True)
class TrainingResult:
    """What a training run left behind."""

    checkpoint: str
    steps: int
    metrics: dict[str, float]
    run_id: str
    resumed_from: int = 0

    def __str__(self) -> str:
        numbers = ", ".join(f"{k.split('/')[-1]} {v:.4g}" for k, v in self.metrics.items())
        resumed = f" (resumed from step {self.resumed_from:,})" if self.resumed_from else ""
        return f"{self.checkpoint}: {self.steps:,} steps{resumed}; {numbers}"


def fingerprint(config: Config, dataset: CellDataset) -> str:
    """Return a hash of all that shapes the weights: settings but not their amount, and the data."""
    train = config.train.model_copy(update={key: None for key in _FREE} | {"output": ""})
    parts = sorted((m.plate, m.fingerprint, m.rows) for m in dataset.manifests.values())
    settings = config.model_copy(update={"train": train})
    text = settings.fingerprint("train", "split", "scaling") + repr((config.run.seed, parts))
    return sha256(text.encode()).hexdigest()[:16]


def train(config: Config) -> TrainingResult:
    """Train as ``config.train`` says and publish the checkpoint.

    An interrupted run (worker or driver killed) goes on from its newest state when the same job is
    started again; a finished one is returned as it is; more ``steps`` or ``minutes`` continue it.

    Raises
    ------
    CheckpointError
        If ``train.output`` holds a checkpoint of other settings or data.
    DatasetError
        If ``train.input`` is not a measured dataset.
    TrainingError
        If training fails on the workers.
    """
    dataset = open_dataset(config.train.input)
    mark = fingerprint(config, dataset)
    finished = _finished(config, mark)
    if finished is not None:
        return finished
    join_cluster(config.cluster)
    preparation = prepare_profiles(dataset, config)
    state = read_state(config.train.output)
    resumes = state is not None and state["fingerprint"] == mark
    run_id = str(state["run_id"]) if state is not None and resumes else ""
    with record(config, "train", run_id) as recorder:
        _describe(dataset, preparation)
        with _board() as board:
            _fit(
                TrainingPlan(config, preparation, dataset.patch_format, recorder, mark, board),
                dataset,
            )
        model = load_model(config.train.output)
        log_model(recorder, config, model)
    resumed_from = int(state["step"]) if state is not None and resumes else 0
    card = model.card
    return TrainingResult(
        config.train.output, card.steps, card.metrics, recorder.run_id, resumed_from
    )


class _Board:
    """Holds the newest line of progress between the workers and the driver."""

    def __init__(self) -> None:
        self._line = ""

    def show(self, line: str) -> None:
        self._line = line

    def read(self) -> str:
        return self._line


@contextmanager
def _board() -> Iterator[Any]:
    """An actor that workers report to; a thread prints what is new on the driver."""
    import ray

    board = ray.remote(num_cpus=0)(_Board).remote()
    stop = threading.Event()

    def follow() -> None:
        shown = ""
        while not stop.wait(2.0):
            with suppress(Exception):  # progress is a courtesy: it must never end a run
                line = ray.get(board.read.remote(), timeout=10)
                if line != shown:
                    print(f"train: {line}", flush=True)
                    shown = line

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
        ray.kill(board)


def _finished(config: Config, mark: str) -> TrainingResult | None:
    """Return the checkpoint that is there already if it is what this run would make."""
    uri = config.train.output
    if not exists(join(uri, "checkpoint.json")):
        return None
    card = load_model(uri).card
    if card.notes.get("fingerprint") != mark:
        raise CheckpointError(
            f"{uri}: holds a checkpoint of other settings or data ({card.steps:,} steps); set "
            "train.output or run.folder to a new place"
        )
    wanted = (config.train.steps, config.train.minutes)
    if card.steps >= config.train.steps or card.notes.get("wanted") == list(wanted):
        return TrainingResult(uri, card.steps, card.metrics, "")
    return None


def _describe(dataset: CellDataset, preparation: Preparation) -> None:
    counts = ", ".join(f"{n:,} {name}" for name, n in sorted(preparation.counts.items()))
    print(
        f"train: {dataset.rows:,} cells ({counts}), {len(preparation.treatments)} treatments, "
        f"{len(preparation.scaling.features)} of {len(dataset.features)} features",
        flush=True,
    )


def _fit(plan: TrainingPlan, dataset: CellDataset) -> None:
    import ray
    from ray.data import TaskPoolStrategy
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    settings = plan.config.train
    cpus = ray.cluster_resources().get("CPU", 1.0)
    # Ray Data's reading needs a little of the CPUs while the workers wait for their cells.
    share = min(1.0, max(0.1, (cpus - 0.5) / settings.workers))
    resources: dict[str, float] = {"CPU": share}
    if settings.gpu:
        resources["GPU"] = 1.0
    threads = settings.threads or max(1, int(cpus // settings.workers))
    ranges = dataset.ranges(plan.config.cluster.cells_per_task)
    rows = ray.data.from_items(
        [{"id": i} for i in range(len(ranges))], override_num_blocks=len(ranges)
    )
    cells = rows.map_batches(TrainingRead(ranges, plan.preparation), batch_size=1, num_cpus=0.1, compute=TaskPoolStrategy(size=2))
    with _scratch(settings.output) as (filesystem_, path):
        trainer = TorchTrainer(
            run_worker,
            train_loop_config={"plan": plan, "threads": threads},
            scaling_config=ScalingConfig(
                num_workers=settings.workers, use_gpu=settings.gpu, resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"train-{uuid.uuid4().hex[:12]}",
                storage_path=path,
                storage_filesystem=filesystem_,
                failure_config=FailureConfig(max_failures=settings.max_failures),
            ),
            datasets={"cells": cells},
            dataset_config=DataConfig(datasets_to_split=[]),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise TrainingError(f"training stopped: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    text = str(error).strip()
    for line in reversed(text.splitlines()):
        if "Error" in line:
            return line.strip()
    return text[-500:]


@contextmanager
def _scratch(output: str) -> Iterator[tuple[Any, str]]:
    """A folder for Ray Train's own bookkeeping; states and checkpoints are not kept there."""
    uri = join(output, "_ray")
    files, path = filesystem(uri)
    try:
        yield files, path
    finally:
        delete_tree(uri)
