"""Every failure cp2image raises on purpose. One string each, so they pickle out of Ray workers."""


class Cp2ImageError(Exception):
    """Base of all; each subclass also is the builtin that a caller would expect."""


class ConfigError(Cp2ImageError, ValueError):
    """A config file or ``--set`` holds an unknown key or a value out of range."""


class ColumnError(Cp2ImageError, ValueError):
    """A column is missing, doubled, misspelled or of the wrong type."""


class TableError(Cp2ImageError, ValueError):
    """A feature table is unreadable, empty, or its parts do not belong together."""


class FieldError(Cp2ImageError, ValueError):
    """A field of view is missing, unreadable, or does not match its feature table."""


class PatchError(Cp2ImageError, ValueError):
    """A set of patches has the wrong shape, type or channel order."""


class MeasurementError(Cp2ImageError, ValueError):
    """Images, masks or a choice of feature families that cannot be measured."""


class StorageError(Cp2ImageError, OSError):
    """A URI cannot be read or written."""


class DatasetError(Cp2ImageError, ValueError):
    """A ``cells/`` or ``screen/`` dataset is missing, incomplete or does not fit its use."""


class CheckpointError(Cp2ImageError, ValueError):
    """A checkpoint is missing, of another version, or does not fit the data."""


class TrainingError(Cp2ImageError, RuntimeError):
    """Training cannot start or has gone wrong (too few cells, loss not finite)."""


class DivergenceError(TrainingError):
    """A loss or a weight is not finite: the same settings would diverge again."""


class TuningError(Cp2ImageError, RuntimeError):
    """A search cannot start, or has left no trial to choose from."""


class EvaluationError(Cp2ImageError, ValueError):
    """Two sets of cells cannot be compared as asked."""
