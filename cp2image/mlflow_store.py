"""Pointing MLflow at a store for a while. Ground floor: MLflow, imported when it is needed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def mlflow_store(uri: str | None) -> Iterator[None]:
    """Make MLflow's module-level functions use the store at ``uri``, then the one before again.

    They read a global variable and ``MLFLOW_TRACKING_URI``, which would otherwise carry one
    experiment's store into the next. None leaves both as they are.
    """
    import mlflow

    before = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        yield
        return
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
