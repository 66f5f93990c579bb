"""What each actor of a generation job does: read profiles, draw, hand over. Floor: beside it.

Apart from the step itself so that actors import no more than they need.
"""

import numpy as np
import pyarrow as pa

from cp2image.checkpoint import load_model, load_scaling
from cp2image.columns import METADATA
from cp2image.config import Config
from cp2image.data.schema import build_table, decode_metadata
from cp2image.dataset import CellRange, columns_of, read_range
from cp2image.publication import Outcome
from cp2image.tracking import tracking_uri


class Draw:
    """Draws one range of cells; loads the model once per actor."""

    def __init__(self, config: Config, scaling: str) -> None:
        import torch

        settings = config.generate
        if not settings.gpu:
            torch.set_num_threads(max(1, int(config.cluster.cpus_per_task)))
        device, store = "cuda" if settings.gpu else "cpu", tracking_uri(config)
        self._model = load_model(settings.checkpoint, device, store, bf16=settings.bf16)
        self._model.scaling = load_scaling(scaling)
        self._split, self._seed = settings.split, config.run.seed

    def __call__(self, unit: CellRange) -> Outcome:
        """Draw the cells of one range; those of other splits than wanted are counted as dropped."""
        names = list(self._model.features)
        metadata = [name for name in columns_of(unit) if name.startswith(METADATA)]
        table = read_range(unit, [*metadata, *names])
        cells = decode_metadata(table)
        dropped: dict[str, int] = {}
        if self._split != "all":
            wanted = self._model.splits.of(cells) == self._split
            if not wanted.all():
                dropped[f"not_{self._split}"] = int(np.count_nonzero(~wanted))
                table, cells = table.filter(pa.array(wanted)), decode_metadata(table)[wanted]
        patches = self._model.generate(table, self._seed)
        features = table.select(names)
        return Outcome(build_table(cells, features, patches, self._model.patch_format), dropped)
