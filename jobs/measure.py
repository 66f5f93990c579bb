"""Measure CellProfiler features on patches that have no table.

ray job submit --working-dir . -- python jobs/measure.py --config configs/bbbc021.yaml
Reads measure.input; writes measure.output, the same cells with their features.
"""

from cp2image.command import run_job
from cp2image.measuring import measure_dataset

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            __doc__,
            measure_dataset,
            reads=["measure.input"],
            writes=["measure.output"],
            plates_of="measure",
        )
    )
