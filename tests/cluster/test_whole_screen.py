"""A simulated screen on S3, through every step, by `ray job submit` to a head and three nodes."""

import pytest

from tests.cluster.mlflow_server import PASSWORD
from tests.cluster.object_store import SECRET
from tests.cluster.screen import STEPS

pytestmark = pytest.mark.timeout(1800)


def test_every_step_ends_well(screen):
    for step in STEPS:
        assert screen.ended[step].exit_code == 0, screen.ended[step].logs[-3000:]


def test_the_published_screen_has_every_measured_cell_once(screen):
    measured = [name for name, _ in screen.laboratory.cells(f"{screen.folder}/measured")]
    generated = [name for name, _ in screen.reference]
    assert len(generated) > 500
    assert len(set(generated)) == len(generated)
    assert generated == measured


def test_work_was_done_on_every_node(screen):
    assert screen.hosts_at_work >= {1, 2, 3}


def test_the_server_has_the_runs_and_the_store_their_artifacts(screen, monkeypatch):
    import mlflow

    for name, value in screen.laboratory.mlflow.client_environment.items():
        monkeypatch.setenv(name, value)
    client = mlflow.MlflowClient(screen.laboratory.mlflow.uri)
    experiment = client.get_experiment_by_name("cluster")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) >= 3
    trained = [run for run in runs if "validation/L_MSE" in run.data.metrics]
    assert trained
    stored = [path for path, _ in screen.laboratory.objects() if path.startswith("mlflow/")]
    assert any(trained[0].info.run_id in path for path in stored)


def test_no_secret_is_written_anywhere(screen):
    laboratory = screen.laboratory
    known = [word.encode() for word in (SECRET, PASSWORD, laboratory.token)]
    texts = [(f"log of {step}", end.logs.encode()) for step, end in screen.ended.items()]
    texts += laboratory.objects()
    texts.append(("MLflow's database", laboratory.mlflow.dump().encode()))
    assert len(texts) > 50
    found = [(place, word) for place, text in texts for word in known if word in text]
    assert not found
