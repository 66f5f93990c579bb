"""The newest line of progress, between workers and driver. Needs Ray alone.

The actor imports the module its class stands in: here that is nothing but Ray, while all that
training needs would take its process seven seconds.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray


class ProgressBoard:
    """Holds the newest line of progress between the workers and the driver."""

    def __init__(self) -> None:
        self._line = ""

    def show(self, line: str) -> None:
        """Take a line from a worker."""
        self._line = line

    def read(self) -> str:
        """Return the newest line; empty before the first."""
        return self._line


@contextmanager
def progress_board() -> Iterator[Any]:
    """Start an actor that workers report to; a thread prints what is new on the driver."""
    board = ray.remote(num_cpus=0)(ProgressBoard).remote()
    stop = threading.Event()

    def follow() -> None:
        shown = ""
        while not stop.wait(2.0):
            with suppress(Exception):  # progress is a courtesy: it must never end a run
                line = ray.get(board.read.remote(), timeout=10)
                if line != shown:
                    print(f"train: {line}", flush=True)
                    shown = line

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join()
        ray.kill(board)
