"""Draws measured as the cells' table was: when that can be, and that both come out alike."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cp2image import training_measurement
from cp2image.data.orientations import ORIENTATIONS
from cp2image.data.schema import build_table, to_parquet
from cp2image.dataset import Manifest, Part, manifest_uri, open_dataset
from cp2image.metrics.embedding import quantise
from cp2image.metrics.measurement import measure
from cp2image.models.stochastic_recipe import StochasticRecipe
from cp2image.training import _describe_measurement, fingerprint
from cp2image.training_cells import CellArrays, worker_keys
from cp2image.training_loop import TrainingLoop
from cp2image.training_measurement import DrawMeasurement, measured_alike
from cp2image.training_turns import TurnedCells
from tests.training_experiments import (
    SHAPE,
    assert_same_weights,
    cells_of,
    experiment,
    plan_of,
    run_loop,
    run_two_ranks,
    tables_of,
    write_dataset,
)

FAMILIES = ["AreaShape", "Intensity", "Texture"]
CPU = torch.device("cpu")
PLATES = ("P1", "P2", "P3")


def blobs(plate, wells=8, cells=5):
    """Cells of 36 px: a bright nucleus in a dimmer cell, brighter on every further plate."""
    random = np.random.default_rng(sum(plate.encode()))
    count = wells * cells
    across, down = np.mgrid[-17.5:18, -17.5:18]
    size = 5 + 2 * random.random((count, 1, 1))
    stretch = 1 + 0.4 * random.random((count, 1, 1))
    away = np.hypot(across * stretch, down)
    level = (0.5 + 0.3 * random.random((count, 1, 1))) * (1 + 0.1 * int(plate[1:]))
    dna, actin = (level / (1 + np.exp(away - size * k)) for k in (1.0, 1.8))
    pixels = 0.05 + 0.5 * np.stack([dna, actin], axis=1)
    pixels += 0.01 * random.random(pixels.shape)
    metadata = pd.DataFrame(
        {
            "Metadata_Plate": plate,
            "Metadata_Well": np.repeat([f"A{i + 1:02d}" for i in range(wells)], cells),
            "Metadata_Site": 1,
            "Metadata_ImageNumber": np.repeat(np.arange(wells) + 1, cells),
            "Metadata_ObjectNumber": np.tile(np.arange(cells) + 1, wells),
            "Metadata_Compound": np.repeat(["DMSO", "taxol"] * (wells // 2), cells),
            "Metadata_Concentration": 0.1,
        }
    )
    return metadata, (pixels.clip(0, 1) * 65535).astype(np.uint16)


def write_measured(folder, config):
    """Publish blobs with their features as jobs/measure.py would."""
    for plate in PLATES:
        metadata, patches = blobs(plate)
        features = measure(patches, channels=SHAPE.channels, families=FAMILIES)
        data = to_parquet(build_table(metadata, features, patches, SHAPE), row_group=20)
        part = folder / f"plate={plate}" / "part-00000.parquet"
        part.parent.mkdir(parents=True)
        part.write_bytes(data)
        parts = (Part(f"plate={plate}/part-00000.parquet", len(metadata), len(data)),)
        manifest = Path(manifest_uri(str(folder), plate))
        manifest.parent.mkdir(parents=True, exist_ok=True)
        mark = config.fingerprint("measure")
        manifest.write_bytes(Manifest(plate, mark, parts, {}, "cells of a plate").to_json())
    return str(folder)


def settings(folder, cells, families=FAMILIES, **train):
    own = {"preset": "cp2image-s", "learning_rate": None, "gamma_ramp": 2500, "steps": 12}
    config = experiment(folder, cells, **(own | train))
    measured = config.measure.model_copy(update={"families": families})
    return config.model_copy(update={"measure": measured})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("measured")
    return write_measured(folder / "cells", settings(folder, "none"))


def plan(config):
    """A plan as `train` makes it, but for the board."""
    alike = measured_alike(config, open_dataset(config.train.input))
    return replace(plan_of(config), measured_alike=alike)


def measurement_of(plan, cells, world=1, wanted=16):
    return DrawMeasurement(
        cells, plan.preparation.scaling, plan.patch_format, plan.config.measure, world, wanted
    )


def plates_of(plan, rows):
    """Names of the plates of training cells, by their keys."""
    names = {}
    for table in tables_of(plan):
        names |= dict(zip(table["key"].to_pylist(), table["plate"].to_pylist(), strict=True))
    return [names[int(key)] for key in worker_keys(plan.preparation, 0, 1)[rows]]


def test_a_dataset_is_measured_alike_if_the_same_measurement_made_it(tmp_path, measured):
    assert measured_alike(settings(tmp_path, measured), open_dataset(measured))
    other = settings(tmp_path, measured, families=["AreaShape", "Intensity"])
    assert not measured_alike(other, open_dataset(measured))
    foreign = write_dataset(tmp_path / "foreign")
    assert not measured_alike(settings(tmp_path, foreign), open_dataset(foreign))
    given = open_dataset(measured)  # features that came with the cells: made from no dataset
    plates = {name: replace(m, input="") for name, m in given.manifests.items()}
    assert not measured_alike(settings(tmp_path, measured), replace(given, manifests=plates))


@pytest.mark.parametrize(
    ("normalisation", "by"),
    [("screen_percentile", "screen"), ("plate_percentile", "plate"), ("per_patch_max", "plate")],
)
def test_a_cell_drawn_as_it_is_has_its_own_features(tmp_path, measured, normalisation, by):
    """Only what 8 bits and the percentiles cut off is lost; plates differ in brightness."""
    config = settings(tmp_path, measured, normalisation=normalisation)
    config = config.model_copy(update={"scaling": config.scaling.model_copy(update={"by": by})})
    made = plan(config)
    cells, _ = cells_of(made)
    rows = np.arange(len(cells.features))
    patches = cells.normalised(rows, CPU).numpy()
    found, there = measurement_of(made, cells).features(patches, rows)
    assert there.all()
    miss = np.abs(found - cells.features)
    assert np.median(miss) < 0.05
    assert np.mean(miss < 0.5) > 0.9
    others = np.abs(found - np.roll(cells.features, 40, axis=0))
    assert np.median(miss) < 0.1 * np.median(others)


def test_what_normalising_takes_from_all_cells_is_given_back(tmp_path, measured):
    made = plan(settings(tmp_path, measured))
    cells, _ = cells_of(made)
    rows = np.arange(len(cells.features))
    plain = measurement_of(made, cells)
    called = []
    adjusted = plain.giving_back(called.append)
    assert [tensor.shape for tensor in called[0]] == [(cells.features.shape[1],)]
    patches = cells.normalised(rows, CPU).numpy()
    before, after = (m.features(patches, rows)[0] - cells.features for m in (plain, adjusted))
    inside = np.abs(cells.features).max(axis=0) < 0.8 * made.config.scaling.clip
    assert inside.any()
    assert np.abs(after.mean(axis=0))[inside].max() < 1e-3
    assert np.abs(before.mean(axis=0))[inside].max() > 0.05
    assert np.abs(adjusted.features(patches, rows)[0]).max() <= made.config.scaling.clip


def test_turned_cells_are_measured_on_the_scale_of_their_own_plate(tmp_path, measured):
    config = settings(tmp_path, measured, normalisation="plate_percentile")
    made = plan(config)
    cells, _ = cells_of(made)
    count = len(cells.features)
    sources = np.arange(count).repeat(2)[::-1].copy()
    turned = TurnedCells(
        cells,
        sources,
        (np.arange(2 * count) % ORIENTATIONS).astype(np.uint8),
        cells.features[sources],
        cells.treatments[sources],
    )
    drawn = quantise(cells.normalised(sources, CPU).numpy())
    found = turned.restored(drawn, np.arange(2 * count), 65535.0)
    own = cells.patches[sources] / 65535.0
    assert np.mean(np.abs(found - own)) < 0.002
    assert turned.plate_names(np.array([3]), PLATES) == cells.plate_names(sources[[3]], PLATES)


def test_restoring_undoes_what_normalising_did(tmp_path, measured):
    for kind in ("screen_percentile", "plate_percentile"):
        made = plan(settings(tmp_path, measured, normalisation=kind))
        cells, _ = cells_of(made)
        rows = np.arange(0, len(cells.features), 7)
        drawn = np.random.default_rng(0).integers(0, 256, (len(rows), *SHAPE.shape), np.uint8)
        expected = made.preparation.intensity.restore(drawn, plates_of(made, rows))
        found = cells.restored(drawn, rows, SHAPE.full_scale)
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_a_channel_without_signal_stays_without():
    patches = np.zeros((1, 2, 4, 4), np.uint16)
    flat = np.zeros((1, 2), np.float32)
    cells = CellArrays(patches, np.zeros((1, 3), np.float32), flat, flat, *np.zeros((2, 1), int))
    full = np.full((1, 2, 4, 4), 255, np.uint8)
    assert (cells.restored(full, np.array([0]), 65535.0) == 0).all()


def test_only_what_features_are_taken_from_is_measured(tmp_path, measured, monkeypatch):
    calls = []

    def follow(images, **how):
        calls.append(how)
        return measure(images, **how)

    monkeypatch.setattr(training_measurement, "measure", follow)
    config = settings(tmp_path, measured)
    scaling = config.scaling.model_copy(update={"drop": ["Cells_*", "*_Texture_*"]})
    made = plan(config.model_copy(update={"scaling": scaling}))
    cells, _ = cells_of(made)
    rows = np.arange(4)
    measurement_of(made, cells).features(cells.normalised(rows, CPU).numpy(), rows)
    assert calls[0]["families"] == ["AreaShape", "Intensity"]
    assert calls[0]["compartments"] == ["Nuclei", "Cytoplasm"]


def test_draws_without_a_nucleus_are_passed_over(tmp_path, measured):
    made = plan(settings(tmp_path, measured))
    cells, _ = cells_of(made)
    rows = np.arange(4)
    patches = cells.normalised(rows, CPU)
    patches[1] = 0
    latents = torch.arange(4.0).view(4, 1, 1, 1)
    asked = torch.from_numpy(cells.features[rows]) + 1
    kept, features, as_asked = measurement_of(made, cells)(latents, patches, asked, rows)
    assert kept.flatten().tolist() == [0, 2, 3]
    assert torch.equal(as_asked, asked[[0, 2, 3]])
    assert features.shape == (3, cells.features.shape[1])
    assert (features - torch.from_numpy(cells.features[[0, 2, 3]])).abs().median() < 0.05


@pytest.fixture
def as_asked(monkeypatch):
    """Every draw is measured as the cell that it was asked for: networks that young draw none."""
    calls = []

    def features(self, patches, rows):
        if len(rows) <= 8:  # draws, not all cells, by which is told what normalising takes
            calls.append((patches, rows))
        return self.cells.features[rows], np.ones(len(rows), bool)

    monkeypatch.setattr(DrawMeasurement, "features", features)
    return calls


def test_draws_are_measured_in_the_loop_where_that_is_wanted_and_can_be(
    tmp_path, measured, as_asked
):
    on = plan(settings(tmp_path / "on", measured))
    cells, validation = cells_of(on)
    loop = TrainingLoop(on, cells, validation)
    loop.run(lambda metrics: None)
    ((patches, rows),) = as_asked  # at step 8 of 12
    assert patches.shape == (8, *SHAPE.shape)
    np.testing.assert_array_equal(rows, loop._sampler.draw(8, "original"))
    state = loop.recipe.state()
    assert int(state["measured.seen"]) == 8
    np.testing.assert_array_equal(state["measured.features"][:8], cells.features[rows])
    for unwanted in (
        plan(settings(tmp_path / "off", measured, stochastic={"measured": 0})),
        plan(settings(tmp_path / "other", measured, families=["AreaShape"])),
    ):
        loop = TrainingLoop(unwanted, *cells_of(unwanted))
        loop.run(lambda metrics: None)
        assert int(loop.recipe.state()["measured.seen"]) == 0
    assert len(as_asked) == 1


def test_it_is_said_where_draws_cannot_be_measured(tmp_path, measured, capsys):
    _describe_measurement(plan(settings(tmp_path, measured)))
    _describe_measurement(plan(settings(tmp_path, measured, [], stochastic={"measured": 0})))
    assert not capsys.readouterr().out
    _describe_measurement(plan(settings(tmp_path, measured, families=["AreaShape"])))
    assert "draws are not measured while training" in capsys.readouterr().out


def test_another_measurement_is_another_training(tmp_path, measured):
    dataset = open_dataset(measured)
    marks = [
        fingerprint(settings(tmp_path, measured, families), dataset)
        for families in (FAMILIES, ["AreaShape"], ["Intensity"])
    ]
    assert marks[0] != marks[1] == marks[2]  # those two are not measured at all


def test_an_interrupted_run_goes_on_with_what_was_measured(
    tmp_path, measured, monkeypatch, as_asked
):
    config = settings(tmp_path / "undisturbed", measured)
    run_loop(plan(config))
    other = settings(tmp_path / "killed", measured, checkpoint_every=1)
    step = StochasticRecipe.step

    def dying(self, batch, number, average):
        if number == 10:
            raise InterruptedError
        return step(self, batch, number, average)

    with monkeypatch.context() as patched:
        patched.setattr(StochasticRecipe, "step", dying)
        with pytest.raises(InterruptedError):
            run_loop(plan(other))
    run_loop(plan(other))
    assert len(as_asked) == 2  # it was not measured again
    assert_same_weights(other, config)


def test_two_ranks_learn_from_the_draws_of_both(tmp_path, measured, ray_session):
    made = plan(settings(tmp_path, measured, workers=2))
    tables = tables_of(made)
    shares = [cells_of(made, rank, 2, tables)[0] for rank in range(2)]
    meeting = str(tmp_path / "meeting")

    def measure_on(rank):
        import torch.distributed as dist

        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
        patches = shares[rank].normalised(np.arange(3 - rank), CPU)  # three cells and two
        patches[1] *= rank  # one cannot be measured
        latents = torch.arange(3.0 - rank).view(-1, 1, 1, 1) + 10 * rank
        measurement = measurement_of(made, shares[rank], world=2, wanted=5)
        asked = torch.from_numpy(shares[rank].features[: 3 - rank]) + 1
        found = measurement(latents, patches, asked, np.arange(3 - rank))
        dist.destroy_process_group()
        return [part.numpy() for part in found]

    remote = ray_session.remote(num_cpus=1, max_retries=0)(measure_on)
    first, second = ray_session.get([remote.remote(rank) for rank in range(2)], timeout=120)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    latents, features, asked = first
    assert latents.flatten().tolist() == [0, 2, 10, 11]
    own = np.concatenate([shares[0].features[[0, 2]], shares[1].features[:2]])
    assert np.median(np.abs(features - own)) < 0.05
    np.testing.assert_array_equal(asked, own + 1)


def test_two_ranks_that_measure_end_with_the_same_weights(tmp_path, measured, ray_session):
    made = plan(settings(tmp_path, measured, workers=2))
    tables = tables_of(made)
    shares = [cells_of(made, rank, 2, tables) for rank in range(2)]
    first, second = run_two_ranks(ray_session, made, shares, tmp_path / "meeting")
    assert all(np.array_equal(first[name], second[name]) for name in first)
