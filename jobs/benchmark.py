"""Time this package against plain scripts, side by side: python jobs/benchmark.py measure

Names of benchmarks come first (none: those of benchmark.which), then --config, --set and so on.
Reads measure.input where it is published, else simulates; writes benchmark.output: tables and JSON.
"""

import sys
from itertools import takewhile

from cp2image.benchmarks.running import run_benchmarks
from cp2image.command import run_job

if __name__ == "__main__":
    names = list(takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    argv = [f"--set=benchmark.which=[{', '.join(names)}]"] if names else []
    argv += sys.argv[len(names) + 1 :]
    raise SystemExit(run_job(__doc__, run_benchmarks, argv, writes=["benchmark.output"]))
