"""Faults at a chosen moment of a generate job, and what they cost."""

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from tests.cluster.fault_proxy import Faults
from tests.cluster.laboratory import Ended, Laboratory
from tests.cluster.screen import Screen

AT_WORK_S = 22
"""Seconds after submission when the actors are at work on a small machine."""
Fault = Callable[[Laboratory, random.Random], str]
"""Does harm, returns what was done; the job goes on meanwhile."""


def kill_node(laboratory: Laboratory, chance: random.Random) -> str:
    """SIGKILL everything on one worker."""
    host = chance.randrange(1, laboratory.hosts.count)
    laboratory.hosts.kill(host)
    return f"node {host} killed"


def cut_cable(laboratory: Laboratory, chance: random.Random) -> str:
    """Unplug one worker for good."""
    host = chance.randrange(1, laboratory.hosts.count)
    laboratory.hosts.cut(host)
    return f"node {host} cut off"


def kill_driver(laboratory: Laboratory, chance: random.Random) -> str:
    """SIGKILL the job's driver on the head."""
    for pid in laboratory.hosts.pids_of(0, "jobs/generate.py"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return "driver killed"


def kill_store(laboratory: Laboratory, chance: random.Random) -> str:
    """SIGKILL the S3 server; it comes back after 15 s."""
    laboratory.store.kill()
    time.sleep(15)
    laboratory.store.start()
    return "S3 server killed for 15 s"


def stall_store(laboratory: Laboratory, chance: random.Random) -> str:
    """Let nothing pass between the cluster and the store for 60 s."""
    laboratory.faults.stalled = True
    time.sleep(60)
    laboratory.faults.stalled = False
    return "S3 stalled for 60 s"


def refuse_and_reset(laboratory: Laboratory, chance: random.Random) -> str:
    """From now on answer every 20th request 503, reset every 33rd in the middle of its answer."""
    laboratory.faults.refuse_every, laboratory.faults.reset_every = 20, 33
    return "5 % of requests 503, connections reset"


def kill_node_while_refused(laboratory: Laboratory, chance: random.Random) -> str:
    """Refuse and reset requests from the start; kill a worker once the actors are at work."""
    what = refuse_and_reset(laboratory, chance)
    time.sleep(AT_WORK_S)
    return f"{what}; {kill_node(laboratory, chance)}"


@dataclass(frozen=True)
class Survived:
    """What became of one disturbed run.

    Attributes
    ----------
    what
        The fault.
    moment_s, seconds
        When it came and how long the work took in all, reruns included; from submission on.
    runs
        How often the job was submitted.
    lost, doubled, changed
        Cells of the undisturbed screen that are absent, there twice or not the same.
    logs
        Output of the last run.
    """

    what: str
    moment_s: float
    seconds: float
    runs: int
    lost: int
    doubled: int
    changed: int
    logs: str

    @property
    def exact(self) -> bool:
        """Whether the screen equals the undisturbed one, cell by cell."""
        return not (self.lost or self.doubled or self.changed)


def nothing(laboratory: Laboratory, chance: random.Random) -> str:
    """Leave everything alone."""
    return "none"


class MissedError(Exception):
    """The job had ended when the fault should have come; says after how many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the job had ended after {seconds:.0f} s")
        self.seconds = seconds


def disturb(screen: Screen, name: str, fault: Fault, moment_s: float, seed: int = 0) -> Survived:
    """Generate the screen into a fresh folder, disturbed; run again if the job itself was ended.

    Raises
    ------
    MissedError
        If the job is over before ``moment_s``.
    RuntimeError
        If the job fails although its driver was left alone, or a rerun fails.
    """
    laboratory = screen.laboratory
    output = f"{screen.folder}/disturbed/{name}"
    started, runs = time.monotonic(), 1
    job = laboratory.submit("generate", screen.generating(output))
    while time.monotonic() < started + moment_s:
        if laboratory.has_ended(job):
            raise MissedError(time.monotonic() - started)
        time.sleep(0.5)
    try:
        what = fault(laboratory, random.Random(seed))
        ended = laboratory.wait(job, 600)
        if ended.exit_code != 0 and fault is kill_driver:
            runs += 1
            ended = laboratory.wait(laboratory.submit("generate", screen.generating(output)), 600)
        seconds = time.monotonic() - started
    finally:
        _set_right(laboratory)
    _require_success(what, ended)
    return _judge(screen, output, Survived(what, moment_s, seconds, runs, 0, 0, 0, ended.logs))


def _set_right(laboratory: Laboratory) -> None:
    laboratory.faults.__dict__.update(Faults().__dict__)
    for host in range(1, laboratory.hosts.count):
        if not laboratory.hosts.works(host):
            laboratory.hosts.restart(host)


def _require_success(what: str, ended: Ended) -> None:
    if ended.exit_code != 0:
        raise RuntimeError(f"{what}: exit code {ended.exit_code}:\n{ended.logs[-4000:]}")


def _judge(screen: Screen, output: str, run: Survived) -> Survived:
    found = screen.laboratory.cells(output)
    known, seen = dict(screen.reference), dict(found)
    counts = Counter(name for name, _ in found)
    return Survived(
        run.what,
        run.moment_s,
        run.seconds,
        run.runs,
        lost=len(known.keys() - seen.keys()),
        doubled=sum(count - 1 for count in counts.values()),
        changed=sum(seen[name] != value for name, value in known.items() if name in seen),
        logs=run.logs,
    )
