"""Training cells in all eight orientations: which rows there are, and that they belong together."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cp2image.data.identity import cell_keys
from cp2image.data.orientations import turn
from cp2image.dataset import manifest_uri, open_dataset
from cp2image.errors import DatasetError, TrainingError
from cp2image.training import fingerprint, train
from cp2image.training_cells import worker_keys
from cp2image.training_loop import TrainingLoop
from cp2image.training_turns import TurnedRead, add_turned, open_turned
from tests.training_experiments import (
    FEATURES,
    assert_same_weights,
    cells_of,
    experiment,
    plan_of,
    run_loop,
    write_dataset,
)

CPU = torch.device("cpu")
PLATES = ("P1", "P2", "P3")
MARKED = FEATURES[2]


def write_turned(folder, plates=PLATES, left_out=0):
    """Seven datasets whose feature `MARKED` is the orientation times a cell's own number."""
    for orientation in range(1, 8):

        def mark(table, orientation=orientation):
            table = table.slice(left_out)
            marks = (orientation * np.arange(left_out, left_out + table.num_rows)) % 7 - 3.0
            column = table.column_names.index(MARKED)
            return table.set_column(column, table.schema.field(MARKED), [marks.astype(np.float32)])

        write_dataset(folder / str(orientation), plates, change=mark)
    return str(folder)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("turns") / "cells")


@pytest.fixture(scope="module")
def turned(tmp_path_factory):
    return write_turned(tmp_path_factory.mktemp("turns") / "turned")


def turned_tables(plan, uri, cells_per_task=30):
    datasets = open_turned(uri, open_dataset(plan.config.train.input))
    read = TurnedRead(datasets, plan.preparation, cells_per_task)
    return list(read({"id": np.arange(len(read.ranges))}))


def rows_of(plan, uri, rank=0, world=1, reverse=False):
    found, _ = cells_of(plan, rank, world)
    tables = turned_tables(plan, uri)
    keys = worker_keys(plan.preparation, rank, world)
    return add_turned(found, tables[::-1] if reverse else tables, keys)


def test_every_training_cell_is_there_in_eight_orientations(tmp_path, cells, turned):
    plan = plan_of(experiment(tmp_path, cells))
    rows = rows_of(plan, turned)
    count = plan.preparation.counts["train"]
    assert len(rows.sources) == 8 * count == len(rows.features) == len(rows.treatments)
    pairs = set(zip(rows.sources.tolist(), rows.orientations.tolist(), strict=True))
    assert pairs == {(i, k) for i in range(count) for k in range(8)}
    np.testing.assert_array_equal(rows.treatments, rows.cells.treatments[rows.sources])
    np.testing.assert_array_equal(rows.features[:count], rows.cells.features)


def test_a_row_has_the_patch_and_the_features_of_its_cell_as_it_lies(tmp_path, cells, turned):
    plan = plan_of(experiment(tmp_path, cells))
    rows = rows_of(plan, turned)
    chosen = np.array([5, len(rows.sources) - 1, len(rows.sources) // 2, 5])
    patches = rows.normalised(chosen, CPU).numpy()
    for patch, row in zip(patches, chosen, strict=True):
        upright = rows.cells.normalised(rows.sources[[row]], CPU).numpy()[0]
        np.testing.assert_array_equal(patch, turn(upright, int(rows.orientations[row])))
    assert rows.normalised(chosen, CPU).is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(rows.scaled(chosen, CPU).numpy(), rows.features[chosen])
    # the features are those that were measured, scaled as those of the cells as they are
    scaling, keys = plan.preparation.scaling, worker_keys(plan.preparation, 0, 1)
    place = scaling.features.index(MARKED)
    frames = {k: pd.read_parquet(Path(turned) / str(k)) for k in (3, 7)}
    for k, frame in frames.items():
        known = dict(zip(cell_keys(frame).tolist(), range(len(frame)), strict=True))
        for row in np.flatnonzero(rows.orientations == k)[:40]:
            cell = frame.iloc[[known[int(keys[rows.sources[row]])]]]
            values = cell[list(scaling.features)].to_numpy(np.float64)
            expected = scaling.apply(values, [str(cell["Metadata_Plate"].iloc[0])])
            np.testing.assert_allclose(rows.features[row, place], expected[0, place], rtol=1e-5)


def test_a_step_is_told_how_its_cells_lie(tmp_path, cells, turned):
    plan = plan_of(experiment(tmp_path, cells))
    upright, validation = cells_of(plan)
    rows = rows_of(plan, turned)
    found = torch.cat([TrainingLoop(plan, rows, validation)._batch(i).orientations for i in (0, 1)])
    sampler = TrainingLoop(plan, rows, validation)._sampler
    expected = np.concatenate([rows.orientations[sampler.draw(i, "original")] for i in (0, 1)])
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(expected)) > 2
    assert TrainingLoop(plan, upright, validation)._batch(0).orientations is None


def test_rows_do_not_depend_on_the_order_of_tables_and_workers_share_the_cells(
    tmp_path, cells, turned
):
    plan = plan_of(experiment(tmp_path, cells))
    one, other = rows_of(plan, turned), rows_of(plan, turned, reverse=True)
    for name in ("sources", "orientations", "features", "treatments"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    shares = [rows_of(plan, turned, rank, 2) for rank in (0, 1)]
    assert sum(len(share.sources) for share in shares) == len(one.sources)


def test_a_cell_that_could_not_be_measured_turned_is_seen_as_it_is(tmp_path, cells):
    uri = write_turned(tmp_path / "turned", plates=("P1", "P2"), left_out=3)
    plan = plan_of(experiment(tmp_path / "run", cells))
    rows = rows_of(plan, uri)
    count = plan.preparation.counts["train"]
    assert count < len(rows.sources) < 8 * count
    assert (rows.orientations[:count] == 0).all()


def test_cells_to_validate_and_test_on_are_not_among_the_rows(tmp_path, cells, turned):
    by_well = plan_of(experiment(tmp_path / "wells", cells))
    keys = np.concatenate([t.column("key").to_numpy() for t in turned_tables(by_well, turned)])
    assert len(keys) == 7 * by_well.preparation.counts["train"]
    assert np.isin(keys, worker_keys(by_well.preparation, 0, 1)).all()
    settings = {"split": {"by": "plate", "test_plates": ["P3"], "validation_plates": ["P2"]}}
    config = experiment(tmp_path, cells)
    config = type(config).model_validate(config.model_dump() | settings)
    plan = plan_of(config)
    read = TurnedRead(open_turned(turned, open_dataset(cells)), plan.preparation, 30)
    assert {one.plate for _, one in read.ranges} == {"P1"}
    keys = np.concatenate([one.column("key").to_numpy() for one in turned_tables(plan, turned)])
    assert len(keys)
    assert np.isin(keys, worker_keys(plan.preparation, 0, 1)).all()


def test_orientations_of_other_cells_are_refused(tmp_path, cells, turned):
    upright = open_dataset(cells)
    with pytest.raises(DatasetError, match="1: not a dataset of cells"):
        open_turned(str(tmp_path / "nowhere"), upright)
    uri = write_turned(tmp_path / "turned")
    place = Path(manifest_uri(f"{uri}/4", "P2"))
    place.write_bytes(place.read_bytes().replace(b'"fingerprint": "cells"', b'"fingerprint": "x"'))
    with pytest.raises(DatasetError, match=r"turned/4: plate 'P2' was not measured from the cells"):
        train(experiment(tmp_path / "run", cells, turned=uri))
    assert not (tmp_path / "run").exists()
    uri = write_turned(tmp_path / "other", plates=("P9",))
    with pytest.raises(TrainingError, match=r"none of the .* training cells is there"):
        rows_of(plan_of(experiment(tmp_path / "run", cells)), uri)


def test_training_with_them_is_another_training_and_the_same_on_ray(
    tmp_path, cells, turned, ray_session
):
    config = experiment(tmp_path / "ray", cells, turned=turned)
    plain = experiment(tmp_path / "plain", cells, turned=turned)
    without = experiment(tmp_path / "without", cells)
    dataset = open_dataset(cells)
    assert fingerprint(config, dataset) == fingerprint(plain, dataset)
    assert fingerprint(config, dataset) != fingerprint(without, dataset)
    train(config)
    run_loop(plan_of(plain), turned_rows=lambda plan: rows_of(plan, turned))
    assert_same_weights(config, plain)
    run_loop(plan_of(without))
    with pytest.raises(AssertionError):
        assert_same_weights(config, without)
