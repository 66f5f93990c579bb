"""Where the time of a step goes, told by its parts. Ground floor: the standard library."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Adds up seconds on the clock by named part; a part within a part counts in the inner one.

    The parts therefore add up to the time from the first one's begin to the last one's end, but
    for what lies outside of all.

    Attributes
    ----------
    seconds
        Part → seconds so far, in the order in which parts were first ended.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block takes, less the parts within it, as ``name``."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def credit(self, work: Mapping[str, float], workers: int) -> None:
        """Tell what ``workers`` workers did meanwhile: move it out of the part that waits for them.

        Parameters
        ----------
        work
            Part → seconds, added up over the workers; a ``workers``-th of it has passed here.
        workers
            How many work at the same time.
        """
        waits = self._open[-1]
        for name, seconds in work.items():
            self._add(name, seconds / workers)
            self._add(waits, -seconds / workers)

    def take(self) -> dict[str, float]:
        """Return the seconds so far and begin again."""
        taken, self.seconds = self.seconds, {}
        return taken

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self._add(self._open[-1], now - self._since)
        self._since = now

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
