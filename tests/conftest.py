"""Fixtures for every test: the shared real data, a private home, one Ray for the session."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; the test skips, saying so, without it."""
    if not (SHARED_DATA / "README.md").exists():
        pytest.skip("real data is not present (../shared/data)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def ray_session(tmp_path_factory):
    """One local Ray with 4 logical CPUs, shared by all tests that need it."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=400_000_000,
        logging_level="warning",
        log_to_driver=False,
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def run_inline():
    """A function that makes steps run their units in this process, last first."""
    import ray

    from cp2image import evaluation_sets, publication

    def run(numbers, work, factory, job, cluster, threads):
        worker = publication._Worker(factory, job.folder)
        for number in reversed(numbers):
            row = worker({"number": number, "unit": json.dumps(asdict(work[number]))})
            yield publication.UnitRecord(**json.loads(row["record"]))

    class Inline:
        size = 1

        def __init__(self, config, factory, most):
            self.work = factory()

        def map(self, units, label, cells, watch):
            return [table for table in map(self.work, reversed(units)) if table.num_rows]

    def apply(monkeypatch):
        monkeypatch.setattr(publication, "_map", run)
        monkeypatch.setattr(evaluation_sets, "Workers", Inline)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)

    return apply


@pytest.fixture
def inline(monkeypatch, run_inline):
    """Do all work in this process in one test, where Ray is not the point."""
    run_inline(monkeypatch)
