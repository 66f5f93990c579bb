"""A sample of cells that does not depend on their order. Floor 1: numpy."""

import numpy as np
from numpy.typing import NDArray

from cp2image.data.identity import Words
from cp2image.errors import DatasetError

Values = NDArray[np.floating]

MAX_CONTROLS = 5_000
"""Control cells of one plate that its scaling is computed from."""


class KeyedSample:
    """At most ``limit`` cells, those with the smallest keys: a sample that no order can change.

    Attributes
    ----------
    seen
        Cells added so far.
    keys, values
        The sample: shapes (n,) and (n, p), by rising key.
    """

    def __init__(self, features: int, limit: int = MAX_CONTROLS) -> None:
        self.limit = limit
        self.seen = 0
        self.keys: Words = np.empty(0, dtype=np.uint64)
        self.values: Values = np.empty((0, features), dtype=np.float32)

    def add(self, keys: Words, values: Values) -> None:
        """Add cells, in blocks of any size and order.

        Parameters
        ----------
        keys
            From `cp2image.data.identity.cell_keys`, shape (n,).
        values
            Shape (n, p).
        """
        if len(keys) != len(values) or values.shape[1:] != self.values.shape[1:]:
            raise DatasetError(
                f"{len(keys)} keys with values of shape {values.shape}; "
                f"expected (cells, {self.values.shape[1]})"
            )
        self.seen += len(keys)
        if len(self.keys) == self.limit:
            below = keys < self.keys[-1]
            keys, values = keys[below], values[below]
        if len(keys):
            merged = np.concatenate([self.keys, keys])
            chosen = np.argsort(merged, kind="stable")[: self.limit]
            self.keys = merged[chosen]
            self.values = np.concatenate([self.values, values])[chosen]
