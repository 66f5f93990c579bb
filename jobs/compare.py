"""Train, generate and evaluate several systems on the same cells, several seeds each.

ray job submit --working-dir . -- python jobs/compare.py --config configs/bbbc021_comparison.yaml
Reads train.input; writes compare.output, with the table below table/. Run again to go on.
"""

from cp2image.command import run_job
from cp2image.comparison import compare, derive_all

if __name__ == "__main__":
    own = ("checkpoints", "train.turned", "evaluate.inception_weights")
    reads = ["train.input", "train.turned", "evaluate.inception_weights"]
    reads += [f"compare.systems.*.{key}" for key in own]
    writes = ["compare.output"]
    raise SystemExit(run_job(__doc__, compare, reads=reads, writes=writes, check=derive_all))
