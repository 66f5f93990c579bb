"""Pictures of cells from their CellProfiler features.

``cp2image.load(uri)`` opens a trained model; ``cp2image.measure(images, channels=…)`` measures
patches with CellProfiler's features. Everything else is run as a job, see ``jobs/``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cp2image.checkpoint import load_model as load
    from cp2image.metrics.measurement import measure

__all__ = ["load", "measure"]
_PUBLIC = {
    "load": ("cp2image.checkpoint", "load_model"),
    "measure": ("cp2image.metrics.measurement", "measure"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cp2image' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(import_module(module), attribute)
