"""Draw what features, treatments and doses look like, with a trained model.

ray job submit --working-dir . -- python jobs/explore.py --config configs/bbbc021.yaml
Reads explore.input and explore.checkpoint; writes figures, vectors and images to explore.output.
"""

from cp2image.command import run_job
from cp2image.exploration import explore

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            __doc__,
            explore,
            reads=["explore.input", "explore.checkpoint"],
            writes=["explore.output"],
        )
    )
