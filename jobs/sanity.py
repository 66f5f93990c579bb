"""Spoil real cells on purpose and see whether each metric moves the right way.

python jobs/sanity.py --config configs/demo.yaml
Reads sanity.input (a cells/ dataset, simulated or real); writes the table to sanity.output.
"""

from cp2image.command import run_job
from cp2image.sanity import check_metrics

if __name__ == "__main__":
    raise SystemExit(
        run_job(__doc__, check_metrics, reads=["sanity.input"], writes=["sanity.output"])
    )
