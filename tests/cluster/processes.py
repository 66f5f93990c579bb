"""Processes that a test starts: in their own group, with a log, ended by their pid."""

import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


class Service:
    """One server process with its children; it ends when this process does, however that ends.

    Parameters
    ----------
    command
        What to run.
    log
        File that takes its output.
    env
        Added to the environment.
    """

    def __init__(
        self, command: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(env or {}),
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    def alive(self) -> bool:
        """Tell whether the server still runs."""
        return self._process.poll() is None

    def stop(self, number: signal.Signals = signal.SIGTERM, patience_s: float = 10) -> None:
        """End the server and its children, by force once patience is over."""
        for kind in (number, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, kind)
            except ProcessLookupError:
                break
            try:
                self._process.wait(patience_s)
            except subprocess.TimeoutExpired:
                continue
        self._process.wait(patience_s)


def wait_for(what: str, ready: Callable[[], bool], service: Service, seconds: float = 60) -> None:
    """Return once ``ready()``; raise with the end of the log if the server ends or is late."""
    ends = time.monotonic() + seconds
    while not ready():
        if not service.alive() or time.monotonic() > ends:
            tail = service.log.read_text(errors="replace")[-2000:]
            service.stop()
            raise RuntimeError(f"{what} did not start:\n{tail}")
        time.sleep(0.1)


def listens(host: str, port: int) -> bool:
    """Tell whether something accepts connections there."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
