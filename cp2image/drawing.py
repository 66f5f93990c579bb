"""What each actor of a generation job does: read profiles, draw, hand over. Floor: beside it.

Apart from the step itself so that actors import no more than they need.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from cp2image.checkpoint import load_model, load_scaling
from cp2image.columns import METADATA, PLATE
from cp2image.config import Config
from cp2image.data.identity import texts
from cp2image.data.schema import PATCH, PatchFormat, build_table, decode_metadata, decode_patches
from cp2image.dataset import CellRange, columns_of, read_range
from cp2image.publication import Outcome
from cp2image.tracking import tracking_uri


class Draw:
    """Draws one range of cells; loads the model once per actor.

    Parameters
    ----------
    config
        The experiment.
    scaling
        URI of the scaling of all plates.
    shown
        Format of the cells' own patches where the model is shown them; None: it is not.
    """

    def __init__(self, config: Config, scaling: str, shown: PatchFormat | None = None) -> None:
        import torch

        settings = config.generate
        if not settings.gpu:
            torch.set_num_threads(max(1, int(config.cluster.cpus_per_task)))
        device, store = "cuda" if settings.gpu else "cpu", tracking_uri(config)
        self._model = load_model(settings.checkpoint, device, store, bf16=settings.bf16)
        self._model.scaling = load_scaling(scaling)
        self._split, self._seed, self._shown = settings.split, config.run.seed, shown

    def __call__(self, unit: CellRange) -> Outcome:
        """Draw the cells of one range; those of other splits than wanted are counted as dropped."""
        names = list(self._model.features)
        metadata = [name for name in columns_of(unit) if name.startswith(METADATA)]
        shown = [PATCH] if self._shown else []
        table = read_range(unit, [*metadata, *names, *shown])
        cells = decode_metadata(table)
        dropped: dict[str, int] = {}
        if self._split != "all":
            wanted = self._model.splits.of(cells) == self._split
            if not wanted.all():
                dropped[f"not_{self._split}"] = int(np.count_nonzero(~wanted))
                table, cells = table.filter(pa.array(wanted)), decode_metadata(table)[wanted]
        patches = self._model.generate(table, self._seed, self._images(table, cells))
        features = table.select(names)
        return Outcome(build_table(cells, features, patches, self._model.patch_format), dropped)

    def _images(self, table: pa.Table, cells: pd.DataFrame) -> NDArray[np.float32] | None:
        """Return the cells' own patches as the model sees them, where it does."""
        if self._shown is None:
            return None
        patches, plates = decode_patches(table, self._shown), texts(cells[PLATE]).tolist()
        return self._model.intensity.apply(patches, plates, self._shown.full_scale)
