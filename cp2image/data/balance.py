"""Draw training batches in which every treatment counts alike. Floor 1: numpy alone."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cp2image.data.identity import GOLDEN, Words, scramble
from cp2image.errors import TrainingError

Stream = Literal["original", "real"]
_STREAMS: dict[Stream, int] = {"original": 1, "real": 2}


class TreatmentSampler:
    """Balanced batches: cells of all treatments in turn (the paper: one of each of 104).

    The treatments go by in an endless row of random permutations; a batch is the next piece of
    that row, so after any whole number of permutations each treatment was drawn equally often.
    Within a treatment, a cell is drawn at random with replacement. A batch is a pure function
    of the seed, the step and the stream's name: a resumed run draws what the first would have.

    With several workers the row is the same on all of them. Worker ``rank`` takes every
    ``world``-th place of the batch, from ``rank`` on, and fills it from its own cells; where it
    has none of that treatment it draws another of its treatments at random, so a worker should
    hold cells of most treatments. Pieces differ by one cell if ``world`` does not divide the
    batch.

    Parameters
    ----------
    treatments
        Treatment of each of this worker's cells, integers ≥ 0, shape (N,). `draw` returns row
        numbers into it: keep the rows in one order (that of the cells' keys) between runs.
    batch_size
        Cells per step over all workers; None: the number of treatments.
    seed
        The run's.
    rank, world
        Number of this worker and of all workers.
    treatments_in_all
        Number of treatments over all workers, which are then numbered from 0; needed if
        ``world`` > 1. None: those that occur in ``treatments``.

    Raises
    ------
    TrainingError
        If there are no cells, treatments out of range, or fewer cells per step than workers.
    """

    def __init__(
        self,
        treatments: NDArray[np.integer],
        batch_size: int | None = None,
        seed: int = 0,
        *,
        rank: int = 0,
        world: int = 1,
        treatments_in_all: int | None = None,
    ) -> None:
        if len(treatments) == 0:
            raise TrainingError(
                f"worker {rank} of {world} has no training cells; use fewer workers or more plates"
            )
        if treatments_in_all is None:
            if world > 1:
                raise TrainingError("several workers need treatments_in_all, the same on each")
            distinct, treatments = np.unique(treatments, return_inverse=True)
            treatments_in_all = len(distinct)
        if treatments.min() < 0 or treatments.max() >= treatments_in_all:
            raise TrainingError(
                f"treatments {treatments.min()} to {treatments.max()} found, expected numbers "
                f"from 0 to {treatments_in_all - 1}"
            )
        self.treatments = treatments_in_all
        self.batch_size = batch_size or treatments_in_all
        if not 0 <= rank < world <= self.batch_size:
            raise TrainingError(
                f"worker {rank} of {world} cannot share batches of {self.batch_size} cells; "
                "raise train.batch_size or lower train.workers"
            )
        self._seed, self._rank, self._world = seed, rank, world
        self._rows: NDArray[np.int64] = np.argsort(treatments, kind="stable")
        self._counts = np.bincount(treatments, minlength=treatments_in_all).astype(np.uint64)
        self._starts = np.cumsum(self._counts) - self._counts
        self._present = np.flatnonzero(self._counts)

    def draw(self, step: int, stream: Stream = "original") -> NDArray[np.int64]:
        """Return the rows of this worker's cells of one step.

        Parameters
        ----------
        step
            From 0.
        stream
            ``original`` for the cells to generate, ``real`` for the discriminator's other
            examples; the two are independent.

        Returns
        -------
        NDArray[np.int64]
            Shape (B,), B = ``batch_size`` with one worker, else this worker's piece of it.
        """
        size = self.batch_size
        places = np.arange(self._rank, size, self._world) + step * size
        if self.treatments == 1:
            treatment = np.zeros(len(places), dtype=np.int64)
        else:
            turns, position = np.divmod(places, self.treatments)
            first, last = int(turns[0]), int(turns[-1])
            order = np.stack([self._permutation(turn, stream) for turn in range(first, last + 1)])
            treatment = order[turns - first, position]
        words = self._words("cell", stream, places)
        absent = self._counts[treatment] == 0
        if absent.any():
            choice = self._words("other", stream, places[absent]) % np.uint64(len(self._present))
            treatment[absent] = self._present[choice.astype(np.int64)]
        offset = words % self._counts[treatment] + self._starts[treatment]
        drawn: NDArray[np.int64] = self._rows[offset.astype(np.int64)]
        return drawn

    def _permutation(self, turn: int, stream: Stream) -> NDArray[np.int64]:
        key = self._words("turn", stream, np.array([turn]))
        steps = np.arange(self.treatments, dtype=np.uint64) * np.uint64(GOLDEN)
        order: NDArray[np.int64] = np.argsort(scramble(key + steps), kind="stable")
        return order

    def _words(self, purpose: str, stream: Stream, places: NDArray[np.int64]) -> Words:
        """Hash (seed, stream, purpose, place) to one word per place."""
        kind = 4 * ("turn", "cell", "other").index(purpose) + _STREAMS[stream]
        start = scramble(np.array([(self._seed + kind * GOLDEN) % 2**64], dtype=np.uint64))
        return scramble(start + places.astype(np.uint64) * np.uint64(GOLDEN))
