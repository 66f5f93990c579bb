"""A small measured dataset with hostile features, and experiments on it."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file

from cp2image.config import Config
from cp2image.data.schema import PatchFormat, build_table, to_parquet
from cp2image.dataset import Manifest, Part, manifest_uri, open_dataset
from cp2image.profiles import prepare_profiles
from cp2image.tracking import NoRecorder
from cp2image.training import fingerprint
from cp2image.training_cells import TrainingRead, load_cells
from cp2image.training_loop import TrainingLoop, TrainingPlan

SHAPE = PatchFormat(("DNA", "Actin"), 36)
FEATURES = [f"Nuclei_Texture_Contrast_DNA_{i}_00_256" for i in range(1, 13)]
CONSTANT, EMPTY, HOLES, INFINITE = FEATURES[8:]


def plate_of_cells(plate, wells=8, cells=9):
    """Blobs whose brightness and size the first two features tell; hostile features at the end."""
    random = np.random.default_rng(sum(plate.encode()))
    count = wells * cells
    features = pd.DataFrame(random.normal(size=(count, 12)), columns=FEATURES)
    grid = np.hypot(*np.mgrid[-17.5:18, -17.5:18])
    radius = 8 + 2 * features[FEATURES[1]].to_numpy()[:, None, None, None]
    level = 0.6 + 0.1 * features[FEATURES[0]].to_numpy()[:, None, None, None]
    blobs = level.clip(0.2, 1) / (1 + np.exp(grid[None, None] - radius))
    pixels = blobs + 0.02 * random.random((count, 2, 36, 36))
    features[CONSTANT] = 3.25
    features[EMPTY] = np.nan
    features.loc[::40, HOLES] = np.nan
    features.loc[::40, INFINITE] = np.inf
    features.loc[1, INFINITE] = -np.inf
    metadata = pd.DataFrame(
        {
            "Metadata_Plate": plate,
            "Metadata_Well": np.repeat([f"A{i + 1:02d}" for i in range(wells)], cells),
            "Metadata_Site": 1,
            "Metadata_ImageNumber": np.repeat(np.arange(wells) + 1, cells),
            "Metadata_ObjectNumber": np.tile(np.arange(cells) + 1, wells),
            "Metadata_Compound": np.repeat(["DMSO", "taxol", "DMSO", "nocodazole"], 2 * cells),
            "Metadata_Concentration": 0.1,
        }
    )
    patches = (pixels.clip(0, 1) * 65535).astype(np.uint16)
    return build_table(metadata, features, patches, SHAPE)


def write_dataset(folder, plates=("P1", "P2", "P3"), columns=None, change=lambda table: table):
    for plate in plates:
        table = change(plate_of_cells(plate))
        table = table if columns is None else table.select(columns(table.column_names))
        data = to_parquet(table, row_group=20)
        part = folder / f"plate={plate}" / "part-00000.parquet"
        part.parent.mkdir(parents=True)
        part.write_bytes(data)
        parts = (Part(f"plate={plate}/part-00000.parquet", table.num_rows, len(data)),)
        manifest = Path(manifest_uri(str(folder), plate))
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_bytes(Manifest(plate, "cells", parts).to_json())
    return str(folder)


def experiment(folder, cells, tracking=False, **settings):
    sections = {
        "run": {"folder": str(folder), "seed": 3},
        "cluster": {"cells_per_task": 30, "cpus": 2},
        "split": {"by": "well", "validation": 0.2, "test": 0.1},
        "scaling": {"min_controls": 5},
        "train": {
            "input": cells,
            "learning_rate": 0.003,
            "gamma_ramp": 4,
            "steps": 40,
            "batch_size": 8,
            "threads": 1,
            "log_every": 4,
            "validate_every": 20,
            "checkpoint_every": 4,
            **settings,
        },
        "tracking": {"enabled": tracking},
    }
    return Config.model_validate(sections).resolve()


def weights(config):
    return load_file(Path(config.train.output) / "weights.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


def plan_of(config, recorder=None):
    dataset = open_dataset(config.train.input)
    preparation = prepare_profiles(dataset, config)
    mark = fingerprint(config, dataset)
    return TrainingPlan(config, preparation, dataset.patch_format, recorder or NoRecorder(), mark)


def tables_of(plan):
    dataset = open_dataset(plan.config.train.input)
    read = TrainingRead(dataset, plan.preparation, 30)
    return list(read({"id": np.arange(len(read.ranges))}))


def cells_of(plan, rank=0, world=1, tables=None, validation_cells=1000):
    tables = tables_of(plan) if tables is None else tables
    return load_cells(
        tables,
        plan.preparation,
        plan.patch_format,
        rank=rank,
        world=world,
        validation_cells=validation_cells,
    )


def run_loop(plan, turned_rows=None):
    train_cells, validation = cells_of(plan)
    train_cells = train_cells if turned_rows is None else turned_rows(plan)
    torch.set_num_threads(1)
    loop = TrainingLoop(plan, train_cells, validation)
    loop.run(lambda metrics: None)
    return loop


def run_two_ranks(ray, plan, shares, meeting):
    """Run the loop in two processes that gloo joins; return the states they end with."""

    def run_rank(rank):
        import torch
        import torch.distributed as dist

        from cp2image.training_loop import TrainingLoop

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        loop = TrainingLoop(plan, *shares[rank], rank=rank, world=2)
        loop.run(lambda metrics: None)
        state = {name: value.numpy() for name, value in loop.recipe.state().items()}
        dist.destroy_process_group()
        return state

    remote = ray.remote(num_cpus=1, max_retries=0)(run_rank)
    return ray.get([remote.remote(rank) for rank in range(2)], timeout=120)
