"""Match treatments by their wells' CellProfiler profiles (NSC, NSCB), in several recipes.

python jobs/mechanisms.py --config configs/bbbc021_wells.yaml
Reads mechanisms.profiles and what is joined to it; writes the report mechanisms.output.
"""

from cp2image.command import run_job
from cp2image.mechanisms import match_mechanisms

if __name__ == "__main__":
    raise SystemExit(
        run_job(
            __doc__,
            match_mechanisms,
            reads=["mechanisms.profiles", "mechanisms.joined"],
            writes=["mechanisms.output"],
        )
    )
