"""MLflow runs that open beside the work."""

import threading
import time

import pytest

from cp2image import tracking
from cp2image.config import Config
from cp2image.errors import DatasetError, StorageError
from cp2image.tracking import NoRecorder, close_children, record, record_beside


class Run:
    run_id = "7"

    def __init__(self):
        self.ends, self.values = [], {}

    def end(self, status):
        self.ends.append(status)

    def metrics(self, values, step=0):
        self.values |= values


def run_block(block):
    with record_beside(Config(), "generate") as recorder:
        block(recorder)


def fail(recorder):
    raise DatasetError("own error")


@pytest.fixture
def opening(monkeypatch):
    """A run that opens when the event is set, and the event."""
    run, gate = Run(), threading.Event()

    def open_late(config, step, run_id):
        assert gate.wait(10)
        return run

    monkeypatch.setattr(tracking, "_open", open_late)
    return run, gate


def test_the_block_begins_before_the_run_is_open_and_what_it_records_waits(opening):
    run, gate = opening
    with record_beside(Config(), "generate") as recorder:
        assert not run.values
        gate.set()
        recorder.metrics({"cells": 3.0})
        assert recorder.run_id == "7"
    assert run.values == {"cells": 3.0}
    assert run.ends == ["FINISHED"]


def test_a_store_that_refuses_is_told_when_first_asked(monkeypatch):
    def refuse(config, step, run_id):
        raise StorageError("wrong password")

    monkeypatch.setattr(tracking, "_open", refuse)
    with pytest.raises(StorageError, match="wrong password"):
        run_block(lambda recorder: recorder.opened())
    with pytest.raises(DatasetError, match="own error"):
        run_block(fail)


def test_an_error_does_not_wait_for_a_silent_store_and_the_run_fails_when_it_opens(opening):
    run, gate = opening
    started = time.monotonic()
    with pytest.raises(DatasetError):
        run_block(fail)
    assert time.monotonic() - started < 5
    gate.set()
    for _ in range(100):
        if run.ends:
            break
        time.sleep(0.05)
    assert run.ends == ["FAILED"]


def test_an_open_run_fails_with_its_block(opening):
    run, gate = opening
    gate.set()
    with pytest.raises(DatasetError, match="own error"):
        run_block(lambda recorder: (recorder.opened(), fail(recorder)))
    assert run.ends == ["FAILED"]


def test_without_tracking_nothing_is_opened(monkeypatch):
    monkeypatch.setattr(tracking, "_open", lambda *_: pytest.fail("opened"))
    config = Config.model_validate({"tracking": {"enabled": False}})
    with record_beside(config, "generate") as recorder:
        assert isinstance(recorder.opened(), NoRecorder)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("UNAUTHENTICATED", "does not let this user in: check MLFLOW_TRACKING_USERNAME"),
        ("PERMISSION_DENIED", "does not let this user in"),
        ("INTERNAL_ERROR", "does not answer: down; check run.folder"),
    ],
)
def test_who_is_not_let_in_is_told_so(monkeypatch, code, expected):
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2

    class Refusing:
        def __init__(self, uri):
            raise MlflowException("down", error_code=getattr(databricks_pb2, code))

    monkeypatch.setattr(mlflow, "MlflowClient", Refusing)
    config = Config.model_validate({"tracking": {"uri": "http://lab:5000"}})
    with pytest.raises(StorageError, match=expected):
        tracking._open(config, "train", "")


def test_runs_of_stopped_trials_are_killed_whatever_their_own_process_wrote(tmp_path):
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/mlflow.db"
    config = Config.model_validate({"run": {"folder": str(tmp_path)}, "tracking": {"uri": store}})
    client = MlflowClient(store)
    with record(config, "tune") as recorder:
        experiment = client.get_run(recorder.run_id).info.experiment_id

        def trial(number, status):
            tags = {"mlflow.parentRunId": recorder.run_id, "cp2image.trial": str(number)}
            run = client.create_run(experiment, tags=tags).info.run_id
            if status:
                client.set_terminated(run, status)
            return run

        ended = ["FAILED", "FINISHED", "FAILED", None, None]
        runs = [trial(number, status) for number, status in enumerate(ended)]
        became = {0: "stopped", 1: "complete", 2: "failed", 3: "stopped"}
        closed = close_children(recorder, became)
        assert set(closed) == {runs[0], runs[3]}
        assert client.get_run(runs[4]).info.status == "RUNNING"
        close_children(recorder, became, others=True)
    found = [client.get_run(run) for run in runs]
    assert [run.info.status for run in found] == [
        "KILLED",
        "FINISHED",
        "FAILED",
        "KILLED",
        "KILLED",
    ]
    assert [run.data.tags.get("cp2image.status") for run in found[:4]] == list(became.values())
