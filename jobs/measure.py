"""Measure CellProfiler features on patches that have no table.

ray job submit --working-dir . -- python jobs/measure.py --config configs/bbbc021.yaml
Reads measure.input; writes measure.output, the same cells with their features. With
--set measure.turned=true it measures them turned and mirrored, for train.turned.
"""

from cp2image.command import run_job
from cp2image.config import Config
from cp2image.measuring import measure_dataset, measure_turned


def run(config: Config) -> object:
    """Measure the patches as they are, or in the other orientations."""
    return measure_turned(config) if config.measure.turned else measure_dataset(config)


if __name__ == "__main__":
    raise SystemExit(
        run_job(
            __doc__,
            run,
            reads=["measure.input"],
            writes=["measure.output"],
            plates_of="measure",
        )
    )
