"""Joining the Ray cluster a job runs on. Floor: above config, below the datasets."""

import logging
import os

import ray

from cp2image.config import Cluster
from cp2image.errors import StorageError


def join_cluster(cluster: Cluster) -> None:
    """Connect to the configured cluster, or start a local one that ends with this process.

    Under ``ray job submit`` the cluster is the one the job was submitted to. Credentials are not
    passed on (a runtime environment is readable on the dashboard): the nodes have their own.

    Raises
    ------
    StorageError
        If the named cluster cannot be reached.
    """
    if ray.is_initialized():
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        # A local Ray serves this process alone, on loopback; without this it would write a token
        # file that changes how later clusters of the same user authenticate.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        ray.init(
            address=address,
            num_cpus=cluster.cpus if address == "local" else None,
            logging_level=logging.WARNING,
            log_to_driver=bool(os.environ.get("CP2IMAGE_WORKER_LOGS")),
        )
    except ConnectionError as error:
        raise StorageError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, "
            "or set cluster.address=local"
        ) from error
    quieten()


def quieten() -> None:
    """Show Ray Data's warnings only: the jobs print their own progress."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # a refused input stays a refusal
    logging.getLogger("ray.data").setLevel(logging.ERROR)
