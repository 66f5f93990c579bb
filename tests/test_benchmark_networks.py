"""Both sides of the speed comparisons do the same work; how fast they are is never asserted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cp2image.benchmarks.networks import (
    Size,
    follow_losses,
    loss_deviation,
    measure_growth,
    synthetic_cells,
    tell_losses,
    time_drawing,
    time_training,
    time_workers,
)
from cp2image.benchmarks.report import Sample, Timing
from cp2image.benchmarks.running import run_benchmarks
from cp2image.config_reading import read_config

SMALL = Size(features=6, channels=2, side=36, batch=4)
ROOT = Path(__file__).parents[1]


def test_both_generators_draw_the_same_patches_while_they_are_timed():
    found = time_drawing(SMALL, cells=20, repetitions=2)
    assert found.difference < 1e-5
    assert list(found.timings)[:2] == ["plain", "float32"]
    assert all(len(timing.samples) == 2 for timing in found.timings.values())


def test_the_plain_script_and_the_recipe_follow_the_same_losses():
    losses = follow_losses(SMALL, 12)
    deviations = loss_deviation(losses, window=4)
    assert set(deviations) == {"L_MSE", "L_generator", "L_Dis"}
    adversary = deviations.pop("L_Dis")  # where rounding is enlarged most
    assert max(deviations.values()) < 1e-3
    assert adversary < 1e-2
    assert losses[-1]["plain"]["L_MSE"] != losses[0]["plain"]["L_MSE"]
    assert "Largest relative difference" in str(tell_losses(losses))


def test_loss_deviation_sees_another_course():
    same = [{"plain": {"a": 2.0}, "ours": {"a": 2.0}}] * 30
    other = [*same, *[{"plain": {"a": 2.0}, "ours": {"a": 3.0}}] * 20]
    assert loss_deviation(same) == {"a": 0.0}
    assert loss_deviation(other) == {"a": 0.5}


def test_training_steps_are_timed_in_turn_with_the_plain_script():
    timings = time_training(SMALL, repetitions=2)
    assert list(timings)[:2] == ["plain", "float32"]
    assert timings["plain"].cells == SMALL.batch


def test_two_workers_share_a_batch():
    assert time_workers(SMALL, 1, 2) > 0


def test_growth_has_a_row_for_each_size():
    table, figures = measure_growth(
        lambda size: Timing(size.batch, (Sample(1, 2),)), [SMALL] * 2, "x"
    )
    assert len(table.rows) == len(figures) == 2
    assert figures[0]["wall_ms_per_cell"] == 250


def test_synthetic_cells_show_their_features():
    cells = synthetic_cells(Size(8, 1, 48), 200, 0)
    assert cells.original.min() >= 0
    assert cells.original.max() <= 1
    area = (cells.original[:, 0] > 0.3).float().mean(dim=(1, 2))
    assert np.corrcoef(area, cells.features[:, 0])[0, 1] > 0.8


def test_networks_run_with_torch_alone():
    """Nothing but torch and the standard library is imported on the way."""
    blocked = [
        "ray",
        "mlflow",
        "pandas",
        "pyarrow",
        "numpy.testing",
        "pydantic",
        "scipy",
        "skimage",
        "numba",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); "
        "sys.argv = 'x --features 6 --channels 1 --side 36 --batch 4 --cells 8 --repetitions 1 "
        "--steps 2'.split(); from cp2image.benchmarks.networks import run_alone; print(run_alone())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    for title in ("Drawing, bare model", "A training step", "The same losses"):
        assert title in done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("run")
    settings = [
        f"run.folder={folder}",
        "benchmark.which=[generate, input]",
        "benchmark.repetitions=1",
        "benchmark.drawn=8",
        "benchmark.plate_cells=12",
        "benchmark.jobs=1",
        "benchmark.small_plate_cells=4",
        "benchmark.bare_cells=64",
        "benchmark.growth=false",
        "benchmark.read_cells=208",
        "cluster.cells_per_task=3",
        "cluster.tasks=2",
        "tracking.enabled=false",
    ]
    return run_benchmarks(read_config(None, settings)), folder / "benchmark"


def test_the_whole_generation_job_stands_beside_the_bare_model(written):
    text, folder = written
    job, small = json.loads((folder / "generate.json").read_text())["results"]["jobs"]
    assert job["cells"] == 12
    assert job["flow_cells_per_s"] > 0
    assert set(job["bare_cells_per_s"]) == {"torch threads", "Python threads"}
    assert small["cells"] == 4
    assert small["flow_cells_per_s"] is None  # no more parts than workers
    assert 0 < job["first_unit_s"] < job["seconds"]
    assert "The whole job, one plate" in text


def test_reading_stands_beside_one_file_per_cell_and_a_bare_scan(written):
    text, folder = written
    results = json.loads((folder / "input.json").read_text())["results"]
    ways = {"bare scan", "first read", "first read in a fresh Ray", "later pass"}
    assert {*ways, "one file, 0 workers"} <= set(results["timings"])
    assert 0 <= results["training"]["waiting_share"] < 1
    assert "share of time waiting for cells" in text


def test_the_nudged_script_starts_a_rounding_error_away():
    first = follow_losses(SMALL, 1)[0]
    apart = [abs(first["nudged"][name] / loss - 1) for name, loss in first["plain"].items()]
    assert 0 < max(apart) < 1e-4
