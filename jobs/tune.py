"""Search for the weights γ, or other numbers of a training run, with Ray Tune.

ray job submit --working-dir . -- python jobs/tune.py --config configs/bbbc021_tune.yaml
Reads train.input; writes tune.output with best.yaml for jobs/train.py. Run again to go on.
"""

from cp2image.command import run_job
from cp2image.tuning import tune

if __name__ == "__main__":
    raise SystemExit(run_job(__doc__, tune, reads=["train.input"], writes=["tune.output"]))
