"""Measure CellProfiler features on patches that have no table.

ray job submit --working-dir . -- python jobs/measure.py --config configs/bbbc021.yaml
Reads measure.input; writes measure.output. With --set measure.turned=true, all turned and mirrored.
"""

from cp2image.command import run_job
from cp2image.measuring import measure_cells

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            __doc__,
            measure_cells,
            reads=["measure.input"],
            writes=["measure.output"],
            plates_of="measure",
        )
    )
