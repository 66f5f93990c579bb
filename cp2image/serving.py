"""The loader that MLflow calls for a logged cp2image model: a DataFrame in, patches out."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cp2image.checkpoint import Model, load_model


class PatchModel:
    """MLflow's pyfunc interface of a `cp2image.checkpoint.Model`."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def predict(
        self, data: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.uint8]:
        """Draw one patch per row of CellProfiler features: uint8, (N, C, H, W)."""
        return self._model.generate(data, seed=int((params or {}).get("seed", 0)))


def _load_pyfunc(path: str) -> PatchModel:
    return PatchModel(load_model(path))
