"""The board between workers and driver, and modules that processes beside the workers import."""

import subprocess
import sys
import time

import ray

from cp2image.training_board import progress_board


def imported_by(module):
    code = f"import sys, {module}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_the_driver_prints_what_a_worker_showed_last(ray_session, capsys):
    with progress_board() as board:
        ray.get(board.show.remote("step 20 of 40"))
        assert ray.get(board.read.remote()) == "step 20 of 40"
        printed = ""
        while "step 20 of 40" not in printed:  # the test's timeout ends it
            time.sleep(0.05)
            printed += capsys.readouterr().out
    assert printed == "train: step 20 of 40\n"


def test_its_module_which_the_actor_imports_needs_neither_torch_nor_mlflow():
    assert not {"torch", "mlflow"} & imported_by("cp2image.training_board")


def test_the_module_of_what_ends_a_training_needs_none_of_what_trains():
    """Ray Train's controller imports it, before any worker is started."""
    found = {
        name for name in imported_by("cp2image.training_refusal") if name.startswith("cp2image")
    }
    assert found == {"cp2image", "cp2image.errors", "cp2image.training_refusal"}
