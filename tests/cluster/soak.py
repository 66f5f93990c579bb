"""Many disturbed runs of the generate job, one table: `make soak`.

Each run writes the same screen with one fault at a random moment, and is compared with the
undisturbed screen cell by cell. Ends with exit code 1 if any run was not exact.
"""

import argparse
import random
import re
import signal
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from statistics import median
from types import FrameType

from tests.cluster.disturbances import (
    Fault,
    MissedError,
    Survived,
    cut_cable,
    disturb,
    kill_driver,
    kill_node,
    kill_store,
    nothing,
    refuse_and_reset,
    stall_store,
)
from tests.cluster.hosts import why_not
from tests.cluster.laboratory import Laboratory, why_no_services
from tests.cluster.screen import Screen

_FAULTS: tuple[Fault, ...] = (
    kill_node,
    cut_cable,
    kill_node,
    kill_driver,
    cut_cable,
    kill_node,
    cut_cable,
    kill_store,
    kill_node,
    cut_cable,
    refuse_and_reset,
    stall_store,
)

_BETWEEN = 6
"""Disturbed runs after which an undisturbed one shows how fast the machine is just then."""


def main() -> int:
    """Run the soak and print its table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path, default=Path("runs/soak.md"))
    options = parser.parse_args()
    reason = why_not() or why_no_services()
    if reason:
        print(f"soak: {reason}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _unwind)
    with tempfile.TemporaryDirectory(prefix="cp2s", dir="/tmp") as folder:
        laboratory = Laboratory(Path(folder) / "servers", Path(folder) / "ray")
        try:
            laboratory.start()
            return _soak(laboratory, options.runs, options.seed, options.table)
        finally:
            laboratory.stop()


def _unwind(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _soak(laboratory: Laboratory, count: int, seed: int, place: Path) -> int:
    screen = Screen(laboratory)
    screen.make()
    failed = [step for step, end in screen.ended.items() if end.exit_code != 0]
    if failed:
        print(screen.ended[failed[0]].logs[-3000:], file=sys.stderr)
        return 1
    chance, spans = random.Random(seed), []
    runs: list[Survived] = []
    broken = []
    for number in range(count):
        if number % _BETWEEN == 0:
            spans.append(disturb(screen, f"undisturbed-{number}", nothing, 0).seconds)
            print(f"undisturbed: {spans[-1]:.0f} s", flush=True)
        fault = _FAULTS[number % len(_FAULTS)]
        try:
            run = _disturb_in_time(screen, number, fault, spans[-1], chance)
        except (RuntimeError, TimeoutError) as error:
            broken.append(f"run {number}, {fault.__name__}: {error}")
            print(broken[-1], flush=True)
            continue
        runs.append(run)
        print(
            f"{number}: {run.what} at {run.moment_s:.0f} s; {run.seconds:.0f} s; lost {run.lost}, "
            f"doubled {run.doubled}, changed {run.changed}",
            flush=True,
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    table = _tabulate(runs, spans, len(screen.reference))
    place.write_text("\n".join([table, *broken]) + "\n")
    print(place.read_text())
    return 0 if not broken and all(run.exact for run in runs) else 1


def _disturb_in_time(
    screen: Screen, number: int, fault: Fault, span: float, chance: random.Random
) -> Survived:
    """Disturb a run at a random moment before its end; again, earlier, if it ended before that."""
    for attempt in range(5):
        moment = 0.0 if fault is refuse_and_reset else chance.uniform(5, max(10, span))
        try:
            name = f"run-{number}-{attempt}"
            return disturb(screen, name, fault, moment, seed=chance.randrange(2**31))
        except MissedError as missed:
            print(f"{number}: {missed}, before the fault; again", flush=True)
            span = missed.seconds
    raise RuntimeError("the job ended before the fault five times")


def _tabulate(runs: list[Survived], spans: list[float], cells: int) -> str:
    kinds: dict[str, list[Survived]] = defaultdict(list)
    for run in runs:
        kinds[re.sub(r"node \d+", "a node", run.what)].append(run)
    base = median(spans)
    lines = [
        f"{len(runs)} runs of {cells:,} cells; {len(spans)} undisturbed ones between them took "
        f"{base:.0f} s ({min(spans):.0f} to {max(spans):.0f}).\n",
        "| Fault | Runs | Equal | Lost | Doubled | Changed | Seconds, median (most) | Later than "
        "the median undisturbed one |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for what, some in sorted(kinds.items()):
        took = [run.seconds for run in some]
        lines.append(
            f"| {what} | {len(some)} | {sum(run.exact for run in some)} | "
            f"{sum(run.lost for run in some)} | {sum(run.doubled for run in some)} | "
            f"{sum(run.changed for run in some)} | {median(took):.0f} ({max(took):.0f}) | "
            f"{median(took) - base:.0f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
