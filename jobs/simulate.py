"""Write a simulated screen: fields of view, CellProfiler tables, and the truth about every cell.

ray job submit --working-dir . -- python jobs/simulate.py --config configs/demo.yaml
Reads nothing; writes simulate.output.
"""

from cp2image.command import run_job
from cp2image.simulation import simulate

if __name__ == "__main__":
    raise SystemExit(run_job(__doc__, simulate, writes=["simulate.output"]))
