"""The board between workers and driver: what it shows, and that its process stays small."""

import subprocess
import sys
import time

import ray

from cp2image.training_board import progress_board


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
    code = "import sys, cp2image.training_board; print(*{'torch', 'mlflow'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
