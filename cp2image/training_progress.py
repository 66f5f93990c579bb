"""Batches made ahead of their step, and what is known of the steps between two lines of the log."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from cp2image.models.recipe import Batch


class BatchesAhead:
    """Makes the next step's batch in a thread while the present one is trained on."""

    def __init__(self, make: Callable[[int], Batch], step: int) -> None:
        self._make, self._step = make, step
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next = self._thread.submit(make, step)

    def take(self) -> Batch:
        """Return the next batch and begin with the one after it."""
        batch = self._next.result()
        self._step += 1
        self._next = self._thread.submit(self._make, self._step)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the thread; a batch that nobody took is dropped."""
        self._thread.shutdown(cancel_futures=True)


class Progress:
    """Seconds and losses between two lines of the log, without waiting for a GPU's results."""

    def __init__(self, seconds: float) -> None:
        self._before, self._started = seconds, time.monotonic()
        self._waited = 0.0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @property
    def seconds(self) -> float:
        """Training time, that of interrupted runs before this one included."""
        return self._before + time.monotonic() - self._started

    @property
    def waiting_share(self) -> float:
        """Share of this run's time spent on waiting for cells."""
        return self._waited / (time.monotonic() - self._started)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting."""
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add one step's losses."""
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> tuple[list[str], Tensor]:
        """Return the losses' names and their means since the last call, each over its steps."""
        names = list(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        self._sums, self._counts = {}, {}
        return names, means
