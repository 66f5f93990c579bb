"""Simulate a screen and take it the whole way: prepare, measure, train, generate, evaluate.

python jobs/demo.py --config configs/demo.yaml
Writes everything below run.folder; running it again goes on where it stopped.
"""

from cp2image.command import run_job
from cp2image.demonstration import demonstrate

if __name__ == "__main__":
    raise SystemExit(run_job(__doc__, demonstrate, writes=["run.folder"]))
