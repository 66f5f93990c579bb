"""Draw one patch per cell of a screen from its features.

ray job submit --working-dir . -- python jobs/generate.py --config configs/bbbc021.yaml
Reads generate.input and generate.checkpoint; writes generate.output, plate by plate.
"""

from cp2image.command import run_job
from cp2image.generation import generate

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            __doc__,
            generate,
            reads=["generate.input", "generate.checkpoint"],
            writes=["generate.output"],
            plates_of="generate",
        )
    )
