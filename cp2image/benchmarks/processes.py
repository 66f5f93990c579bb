"""Processes of their own to take timings in: fresh, and with one thread each."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@contextmanager
def open_process() -> Iterator[ProcessPoolExecutor]:
    """Yield an executor of one new process whose libraries use one thread.

    Libraries read their number of threads when they are imported: hence a new process.
    """
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    try:
        executor.submit(os.getpid).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    with executor:
        yield executor


def read_peak_memory() -> float:
    """Return the most memory this process has had at once (resident set), MiB. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
