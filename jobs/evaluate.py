"""Compare generated cells with the real ones they were drawn for.

ray job submit --working-dir . -- python jobs/evaluate.py --config configs/bbbc021.yaml
Reads evaluate.real, evaluate.generated and the checkpoint; writes the report evaluate.output.
"""

from cp2image.command import run_job
from cp2image.evaluation import evaluate

if __name__ == "__main__":
    reads = [
        f"evaluate.{name}" for name in ["real", "generated", "checkpoint", "inception_weights"]
    ]
    raise SystemExit(run_job(__doc__, evaluate, reads=reads, writes=["evaluate.output"]))
