"""Train a generator on a dataset of measured cells.

ray job submit --working-dir . -- python jobs/train.py --config configs/bbbc021.yaml
Reads train.input and, if named, train.turned; writes the checkpoint train.output and an MLflow run
with the model.
"""

from cp2image.command import run_job
from cp2image.training import train

if __name__ == "__main__":
    raise SystemExit(
        run_job(__doc__, train, reads=["train.input", "train.turned"], writes=["train.output"])
    )
