"""MLflow: parameters, metrics, pictures, models. Floor: above config; only rank 0 talks to it."""

import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cp2image.columns import PLATE
from cp2image.config import Config, local_folder
from cp2image.data.schema import PatchFormat
from cp2image.errors import StorageError
from cp2image.mlflow_store import mlflow_store
from cp2image.storage import list_files, name_of, read_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Recorder(Protocol):
    """One run that a job records into."""

    @property
    def run_id(self) -> str:
        """MLflow's; empty without."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers."""

    def picture(self, figure: "Figure", name: str) -> None:
        """Record a picture under ``name`` (with .png)."""

    def folder(self, uri: str, name: str) -> None:
        """Record every file of a folder."""

    def opened(self) -> "Recorder":
        """Wait until the run is open; raise StorageError if that fails."""


class NoRecorder:
    """The twin that records nothing: other ranks, tests, ``tracking.enabled: false``."""

    run_id = ""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Do nothing."""

    def picture(self, figure: "Figure", name: str) -> None:
        """Do nothing."""

    def folder(self, uri: str, name: str) -> None:
        """Do nothing."""

    def opened(self) -> "NoRecorder":
        """Return itself."""
        return self


@dataclass
class MlflowRecorder:
    """Records into one MLflow run; picklable, so a training worker can go on with it."""

    tracking_uri: str
    run_id: str

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.tracking_uri)

    def end(self, status: str) -> None:
        """Close the run as FINISHED or FAILED."""
        self._client().set_terminated(self.run_id, status)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers in one request; NaN is left out, since not every store takes it."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        known = {name: float(value) for name, value in values.items() if not math.isnan(value)}
        batch = [Metric(name, value, now, step) for name, value in known.items()]
        for start in range(0, len(batch), 900):
            self._client().log_batch(self.run_id, metrics=batch[start : start + 900])

    def picture(self, figure: "Figure", name: str) -> None:
        """Record a picture."""
        self._client().log_figure(self.run_id, figure, name)

    def folder(self, uri: str, name: str) -> None:
        """Record every file of a folder, wherever it is."""
        with tempfile.TemporaryDirectory() as scratch:
            for file in list_files(uri):
                target = Path(scratch, file[len(uri.rstrip("/")) + 1 :])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(read_bytes(file))
            self._client().log_artifacts(self.run_id, scratch, name)

    def opened(self) -> "MlflowRecorder":
        """Return itself."""
        return self


def tracking_uri(config: Config) -> str:
    """Return the MLflow store of an experiment: configured, from the environment, or sqlite."""
    chosen = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        return chosen
    folder = local_folder(config.run.folder) or Path.cwd()
    return f"sqlite:///{folder.absolute()}/mlflow.db"


@contextmanager
def record(
    config: Config, step: str, run_id: str = "", tags: Mapping[str, str] | None = None
) -> Iterator[Recorder]:
    """Open a run for one step of an experiment, with its resolved config as parameters.

    An interrupted run goes on under its ``run_id``, or as the one that has all ``tags``. The run
    ends as FINISHED, or FAILED when the block raises.

    Raises
    ------
    StorageError
        If the MLflow store cannot be reached.
    """
    if not config.tracking.enabled:
        yield NoRecorder()
        return
    recorder = _open(config, step, run_id, tags)
    try:
        yield recorder
    except BaseException:
        recorder.end("FAILED")
        raise
    recorder.end("FINISHED")


class LateRecorder:
    """Opens its run on a thread; what is asked of it waits until that has happened."""

    def __init__(self, config: Config, step: str) -> None:
        self._opening: Future[MlflowRecorder] = Future()
        self._given_up = Event()
        # A daemon: a store that does not answer must not keep the process from ending.
        Thread(target=self._open, args=(config, step), daemon=True).start()

    def _open(self, config: Config, step: str) -> None:
        try:
            recorder = _open(config, step, "")
        except BaseException as error:
            self._opening.set_exception(error)
            return
        self._opening.set_result(recorder)
        if self._given_up.is_set():
            recorder.end("FAILED")

    def give_up(self) -> None:
        """Mark the run as failed, now or when it is open, without waiting for that."""
        self._given_up.set()
        if self._opening.done() and self._opening.exception() is None:
            self._opening.result().end("FAILED")

    def opened(self) -> MlflowRecorder:
        """Return the open run.

        Raises
        ------
        StorageError
            If the MLflow store cannot be reached.
        """
        return self._opening.result()

    @property
    def run_id(self) -> str:
        """MLflow's."""
        return self.opened().run_id

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Record numbers."""
        self.opened().metrics(values, step)

    def picture(self, figure: "Figure", name: str) -> None:
        """Record a picture."""
        self.opened().picture(figure, name)

    def folder(self, uri: str, name: str) -> None:
        """Record every file of a folder."""
        self.opened().folder(uri, name)


@contextmanager
def record_beside(config: Config, step: str) -> Iterator[Recorder]:
    """Do as `record`, but let the block begin while MLflow is imported and its run opened.

    That takes seconds, as do the workers that the block starts meanwhile.
    """
    if not config.tracking.enabled:
        yield NoRecorder()
        return
    recorder = LateRecorder(config, step)
    try:
        yield recorder
    except BaseException:
        with suppress(Exception):  # the block's own error is the one to tell
            recorder.give_up()
        raise
    recorder.opened().end("FINISHED")


def _open(
    config: Config, step: str, run_id: str, own: Mapping[str, str] | None = None
) -> MlflowRecorder:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    uri = tracking_uri(config)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    try:
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(uri)
        found = client.get_experiment_by_name(config.tracking.experiment)
        artifacts = None
        if uri.startswith("sqlite:///"):
            artifacts = (Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts").as_uri()
        experiment = (
            found.experiment_id
            if found
            else client.create_experiment(config.tracking.experiment, artifact_location=artifacts)
        )
        tags = {"cp2image.step": step, "mlflow.runName": f"{config.run.name}-{step}", **(own or {})}
        earlier = run_id or (_tagged(client, experiment, own) if own else "")
        run = _existing(client, earlier) or client.create_run(experiment, tags=tags)
        recorder = MlflowRecorder(uri, run.info.run_id)
        if recorder.run_id != run_id:
            _log_parameters(client, recorder.run_id, config, step)
    except (MlflowException, OSError) as error:
        raise StorageError(
            f"MLflow at {_without_secret(uri)} {_mishap(error)} or set tracking.enabled=false"
        ) from error
    return recorder


def _mishap(error: Exception) -> str:
    """Say what MLflow's answer means and what to look at."""
    get_status = getattr(error, "get_http_status_code", int)
    if get_status() in (401, 403):
        return (
            "does not let this user in: check MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN),"
        )
    return f"does not answer: {error}; check run.folder (where it is SQLite), MLFLOW_TRACKING_URI,"


def _tagged(client: Any, experiment: str, tags: Mapping[str, str]) -> str:
    """Return the id of the newest run with all these tags; empty if there is none."""
    condition = " and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())
    found = client.search_runs([experiment], condition, max_results=1)
    return str(found[0].info.run_id) if found else ""


def _existing(client: Any, run_id: str) -> Any:
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException:  # the store was changed or emptied meanwhile
        return None
    if run.info.lifecycle_stage != "active":
        return None
    client.update_run(run_id, status="RUNNING")
    return run


def _without_secret(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _log_parameters(client: Any, run_id: str, config: Config, step: str) -> None:
    from mlflow.entities import Param

    wanted = {"run", step} | ({"split", "scaling"} if step == "train" else set())
    params = [
        Param(f"{section}.{key}", str(value)[:500])
        for section, values in config.model_dump(mode="json").items()
        if section in wanted
        for key, value in values.items()
    ]
    client.log_batch(run_id, params=params)
    client.log_text(run_id, config.yaml(), "config.yaml")


def log_model(
    recorder: Recorder, config: Config, features: Sequence[str], patch_format: PatchFormat
) -> None:
    """Log the checkpoint ``config.train.output`` as an MLflow pyfunc; register it if configured.

    The model is logged as data plus the name of this package's loader: nothing is pickled, so
    loading it executes no code but cp2image's own.

    Parameters
    ----------
    recorder
        The run it belongs to.
    config
        The experiment.
    features, patch_format
        Names of the columns that go in and format of the patches that come out, for the signature.
    """
    if not isinstance(recorder, MlflowRecorder):
        return
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema, TensorSpec

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "checkpoint")
        folder.mkdir()
        uri = config.train.output.rstrip("/")
        for file in list_files(uri, recursive=False):
            (folder / name_of(file)).write_bytes(read_bytes(file))
        columns = [ColSpec(DataType.double, name) for name in features]
        columns.append(ColSpec(DataType.string, PLATE, required=False))
        shape = (-1, *patch_format.shape)
        signature = ModelSignature(
            Schema(columns), Schema([TensorSpec(np.dtype("uint8"), shape, "patches")])
        )
        warnings.filterwarnings("ignore", message=".*input example was not provided.*")
        with mlflow_store(recorder.tracking_uri), mlflow.start_run(run_id=recorder.run_id):
            mlflow.pyfunc.log_model(
                name="model",
                loader_module="cp2image.serving",
                data_path=str(folder),
                signature=signature,
                pip_requirements=[f"cp2image=={version('cp2image')}"],
                registered_model_name=config.tracking.register_as,
            )


def close_children(
    recorder: Recorder, statuses: Mapping[int, str], *, others: bool = False
) -> list[str]:
    """Close the runs below a parent run that nobody writes to any more, as KILLED.

    Parameters
    ----------
    recorder
        Of the parent.
    statuses
        Number of a trial → what became of it, for the tag ``cp2image.status``. A run that is
        open is closed. That of a trial which was ``stopped`` becomes KILLED whatever its own
        process has made of its sudden end.
    others
        Whether runs of other trials are closed too if they are still open.

    Returns
    -------
    list
        Ids of the runs that were closed.
    """
    if not isinstance(recorder, MlflowRecorder):
        return []
    client = recorder._client()
    experiment = client.get_run(recorder.run_id).info.experiment_id
    condition = f"tags.`mlflow.parentRunId` = '{recorder.run_id}'"
    closed = []
    for run in client.search_runs([experiment], condition, max_results=1000):
        number = int(run.data.tags.get("cp2image.trial", -1))
        became = statuses.get(number)
        if became is not None:
            client.set_tag(run.info.run_id, "cp2image.status", became)
        is_left = run.info.status == "RUNNING" and (others or became is not None)
        if is_left or (became == "stopped" and run.info.status != "KILLED"):
            client.set_terminated(run.info.run_id, "KILLED")
            closed.append(str(run.info.run_id))
    return closed


def register_model(recorder: Recorder, run_id: str, name: str, alias: str) -> str:
    """Register the model that a run has logged, and let an alias point to it.

    Returns
    -------
    str
        ``models:/name@alias``; empty without tracking. A model that is registered already keeps
        its version.

    Raises
    ------
    StorageError
        If the run has logged no model.
    """
    if not isinstance(recorder, MlflowRecorder):
        return ""
    import mlflow

    client = recorder._client()
    run = client.get_run(run_id)
    models = [one.model_id for one in run.outputs.model_outputs] if run.outputs else []
    if not models:
        raise StorageError(f"MLflow run {run_id} has no model to register as {name!r}")
    uri = f"models:/{models[-1]}"
    known = {one.source: one for one in _versions(client, name)}
    with mlflow_store(recorder.tracking_uri):
        version = known.get(uri) or mlflow.register_model(uri, name)
    client.set_registered_model_alias(name, alias, version.version)
    client.set_model_version_tag(name, version.version, "cp2image.run", run_id)
    return f"models:/{name}@{alias}"


def _versions(client: Any, name: str) -> list[Any]:
    return list(client.search_model_versions(f"name='{name}'"))
