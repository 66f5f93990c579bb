"""Scores at the two ends: a generator that returns the real cells, and one that knows nothing."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cp2image import evaluation, evaluation_sets
from cp2image.checkpoint import ModelCard, save_checkpoint
from cp2image.columns import measurements
from cp2image.config import Config
from cp2image.config_train import Split
from cp2image.data.intensity import Intensity
from cp2image.data.scaling import Scaling
from cp2image.data.schema import (
    PatchFormat,
    build_table,
    decode_metadata,
    decode_patches,
)
from cp2image.data.simulate import SimulatedScreen, simulate_screen
from cp2image.data.splits import fit_splits
from cp2image.dataset import open_dataset, read_range
from cp2image.errors import EvaluationError
from cp2image.evaluation import evaluate
from cp2image.evaluation_distances import compare_sets, describe_beside
from cp2image.metrics.coverage import coverage
from cp2image.metrics.embedding import quantise
from cp2image.metrics.frechet import Moments, frechet_distance
from cp2image.models.cp2image import Discriminator, Generator
from cp2image.preparation import prepare
from cp2image.publication import Outcome, publish

SCREEN = SimulatedScreen(
    plates=2, wells_per_plate=6, cells_per_site=10, field_size=192, defect_share=0.0
)
CHANNELS = ("DNA", "Actin", "Tubulin")
SIZE = 68


def as_the_model_sees_them(dataset, plate_names, unit):
    """The real cells of a unit as a perfect generator would draw them."""
    table = read_range(unit)
    patches = decode_patches(table, dataset.patch_format)
    seen = quantise(Intensity().apply(patches, [""] * len(patches), 65535))
    metadata = decode_metadata(table)
    metadata["Metadata_Plate"] = [plate_names.get(p, p) for p in metadata["Metadata_Plate"]]
    names = list(dataset.features)
    form = PatchFormat(CHANNELS, SIZE, "uint8", 8, "per_patch_max")
    return Outcome(build_table(metadata, table.select(names).to_pandas(), seen, form))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_inline):
    """Real cells, a perfect screen of them, one of other plates, and a model that knows nothing."""
    folder = tmp_path_factory.mktemp("experiment")
    simulate_screen(folder, SCREEN)
    section = {
        "tables": [str(folder / "tables")],
        "images": str(folder / "images"),
        "channels": {name: name for name in CHANNELS},
        "patch_size": SIZE,
        "quality": {"drop": []},
        "output": str(folder / "cells"),
    }
    config = Config.model_validate({"prepare": section, "tracking": {"enabled": False}}).resolve()
    with pytest.MonkeyPatch.context() as patch:
        run_inline(patch)
        prepare(config)
        dataset = open_dataset(str(folder / "cells"))
        units = dataset.ranges(50)
        for name, renamed in (("perfect", {}), ("other", {p: f"{p}x" for p in dataset.manifests})):
            process = partial(as_the_model_sees_them, dataset, renamed)
            publish(str(folder / name), units, lambda p=process: p, config, "mark", label=name)
    cells = pd.read_parquet(folder / "cells")
    names = [c.name for c in measurements(cells.columns) if c.category == "Intensity"]
    values = np.nan_to_num(cells[names].to_numpy(np.float64))
    center, scale = values.mean(axis=0), values.std(axis=0) + 1e-6
    torch.manual_seed(0)
    save_checkpoint(
        str(folder / "checkpoint"),
        ModelCard("paper", CHANNELS, SIZE),
        scaling=Scaling(tuple(names), (), center[None], scale[None], 5.0),
        intensity=Intensity(),
        splits=fit_splits(cells, Split(by="plate", validation=0.5, test=0), 0),
        generator=Generator(len(names), 3, SIZE).state_dict(),
        discriminator=Discriminator(3, SIZE).state_dict(),
        config="",
    )
    return folder


def config_of(folder, output, generated="perfect", **settings):
    section = {
        "real": str(folder / "cells"),
        "generated": str(folder / generated),
        "checkpoint": str(folder / "checkpoint"),
        "output": str(output),
        "families": ["AreaShape", "Intensity"],
    }
    raw = {
        "evaluate": section | settings,
        "cluster": {"tasks": 2},
        "tracking": {"enabled": False},
    }
    return Config.model_validate(raw).resolve()


@pytest.fixture(scope="module")
def report(folder, ray_session):
    return evaluate(config_of(folder, folder / "report"))


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON")


def test_a_perfect_generator_keeps_every_feature(report):
    model = report.correlation["model"]
    assert model["share_above_half"] == 1
    assert model["mean_r"] == pytest.approx(1, abs=1e-6)
    assert model["features"] > 50


def test_a_perfect_generator_is_no_farther_from_the_real_cells_than_they_are_from_each_other(
    report,
):
    assert set(report.distances) == {"cp", "filterbank"}
    for found in report.distances.values():
        assert found["n"] == 120
        assert found["half_n"] == 60
        assert found["floor_half"] > 0
        assert found["frechet_half"] <= found["floor_half"] * (1 + 1e-6)
        assert found["frechet"] <= 1e-3 * found["floor_half"]


def test_with_shuffled_features_the_correlations_collapse(report):
    control = report.correlation["shuffle control"]
    assert control["share_above_half"] < 0.05
    assert abs(control["mean_r"]) < 0.2
    frechet = report.distances["cp"]["shuffle_control"]
    assert frechet["frechet_shuffled"] > 5 * frechet["frechet"]


def test_the_ceiling_compares_the_real_patches_with_the_table_they_came_with(report):
    ceiling = report.correlation["ceiling"]
    assert 10 < ceiling["features"] <= report.correlation["model"]["features"]
    assert 0.3 < ceiling["mean_r"] < 1


def test_the_report_is_a_folder_of_json_tables_and_pictures(folder, report):
    names = {path.name for path in (folder / "report").iterdir()}
    assert names == {
        "_config.yaml",
        "best_features.png",
        "cells.png",
        "correlation.png",
        "correlation_by_category.png",
        "correlation_ceiling.csv",
        "correlation_model.csv",
        "correlation_shuffle_control.csv",
        "report.json",
        "treatments.csv",
    }
    for name in names:
        if name.endswith(".png"):
            with Image.open(folder / "report" / name) as picture:
                assert min(picture.size) > 200
    table = pd.read_csv(folder / "report" / "correlation_model.csv")
    assert table["r"].dropna().is_monotonic_decreasing
    stored = json.loads(
        (folder / "report" / "report.json").read_text(), parse_constant=refuse_constant
    )
    assert stored["protocol"]["cells"] == 120
    assert stored["protocol"]["wells"] == 12
    assert stored["correlation"]["model"]["mean_r"] == pytest.approx(1, abs=1e-6)
    assert set(stored["distances"]) == {"cp", "filterbank"}
    assert {"reading", "measuring", "correlation"} <= set(stored["seconds"])
    assert "120 generated cells against the 120 real ones" in str(report)
    assert "100 % of" in str(report)


@pytest.mark.usefixtures("inline")
def test_few_cells_are_taken_evenly_over_wells_and_the_control_can_be_left_out(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation_sets, "_CELLS_PER_TASK", 3)  # some tasks meet no chosen cell
    chosen = {"cells": 24, "shuffle_control": False, "embeddings": ["filterbank"]}
    small = evaluate(config_of(folder, tmp_path / "report", **chosen))
    assert small.protocol["cells"] == 24
    assert small.protocol["wells"] == 12
    assert set(small.correlation) == {"model", "ceiling"}
    assert small.distances["filterbank"]["singular"]


@pytest.mark.usefixtures("inline")
def test_copies_of_training_cells_are_told_from_cells_that_are_only_alike(folder, tmp_path):
    held_out = evaluate(config_of(folder, tmp_path / "report", split="validation"))
    found = held_out.beside["copies"]
    assert found["training_cells"] == 60
    assert found["generated_over_real"] == pytest.approx(1, abs=1e-6)  # they are the real cells
    assert (tmp_path / "report" / "nearest_training_cells.png").exists()
    assert "nearest training cell: 1.00" in str(held_out)
    on_training = evaluate(config_of(folder, tmp_path / "again", split="train"))
    assert "copies" not in on_training.beside


def test_variety_is_reported_with_that_of_the_real_cells(report):
    for found in report.distances.values():
        assert found["recall"] == found["recall_floor"] > 0.3
        assert found["coverage"] == found["coverage_floor"] > 0.3
    assert "recall" in str(report)


@pytest.mark.usefixtures("inline")
def test_sets_without_a_common_cell_are_refused(folder, tmp_path):
    with pytest.raises(EvaluationError, match="share no cell"):
        evaluate(config_of(folder, tmp_path / "report", generated="other"))
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("inline")
def test_a_split_without_cells_is_refused(folder, tmp_path):
    with pytest.raises(EvaluationError, match="none of the cells in both sets is in the test"):
        evaluate(config_of(folder, tmp_path / "report", split="test"))


def test_the_control_gives_each_cell_the_features_of_another_of_its_plate():
    cells = pd.DataFrame({"Metadata_Plate": np.repeat(["P1", "P2"], [3000, 500])})
    rows, source = evaluation_sets._permute(cells)
    plates = cells["Metadata_Plate"].to_numpy()
    np.testing.assert_array_equal(plates[rows], plates[source])
    assert len(rows) == len(set(rows)) == len(set(source)) == 2000
    assert (rows == source).mean() < 0.01


def test_distances_have_intervals_a_limit_and_the_scale_of_plates(report):
    found = report.distances["filterbank"]
    low, high = found["kernel_between_wells_interval_95"]
    assert low <= found["kernel_between_wells"] <= high
    assert found["noise_patches"] == 0
    cp = report.distances["cp"]
    low, high = cp["frechet_interval_95_by_well"]
    assert low <= 1e-3
    assert "limit" in cp
    assert abs(cp["limit"]) < cp["floor_half"]


def test_halves_are_compared_as_the_mean_over_ten_splits():
    random = np.random.default_rng(0)
    real = random.normal(size=(61, 3)).astype(np.float32)
    drawn = real + random.normal(0.2, 0.5, size=(61, 3)).astype(np.float32)
    cells = pd.DataFrame({"Metadata_Plate": ["P"] * 61, "Metadata_Well": ["A01"] * 61})
    found = compare_sets(real, drawn, cells, np.ones(61, bool), np.zeros(61, bool))
    plain = []
    for split in range(10):
        order = np.random.default_rng(split).permutation(61)
        a, b = order[0::2], order[1::2]
        pairs = [(real[a], drawn[b]), (real[b], drawn[a]), (real[a], real[b])]
        there, back, floor = (frechet_distance(Moments.of(x), Moments.of(y)) for x, y in pairs)
        balls = coverage(real[a], drawn[b]), coverage(real[a], real[b])
        plain.append([(there + back) / 2, floor, *(one.coverage for one in balls)])
    names = ("frechet_half", "floor_half", "coverage", "coverage_floor")
    assert [found[name] for name in names] == pytest.approx(np.mean(plain, axis=0).tolist())
    assert (found["half_n"], found["splits"]) == (30, 10)


def test_the_text_says_when_a_distance_mostly_tells_the_sample_size():
    assert "singular: mostly the sample size" in describe_beside({"singular": True})
    assert describe_beside({"singular": False}) == ""


@pytest.fixture
def untouched(monkeypatch):
    """Nothing may be started: no Ray, no MLflow run, no worker."""
    for name in ("gather_cells", "join_cluster", "record"):
        monkeypatch.setattr(evaluation, name, lambda *_, **__: pytest.fail("started"))


@pytest.mark.parametrize(("cells", "asked", "refused"), [
    (2_049, False, True), (4_097, False, True), (4_098, False, False), (2_049, True, False),
])  # fmt: skip
def test_halves_need_more_cells_than_inceptions_dimensions(cells, asked, refused):
    settings = Config.model_validate(
        {"evaluate": {"embeddings": ["inception"], "allow_singular": asked}}
    ).evaluate
    if refused:
        with pytest.raises(EvaluationError, match=r"2,048 dimensions.*score 4,098 or more"):
            evaluation.refuse_few(cells, settings)
    else:
        evaluation.refuse_few(cells, settings)


@pytest.mark.usefixtures("untouched")
def test_fewer_cells_than_inceptions_dimensions_are_refused_before_any_work(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "check_weights", lambda _: None)
    config = config_of(folder, tmp_path / "report", embeddings=["inception"])
    with pytest.raises(EvaluationError, match=r"120 cells for the 2,048.*allow_singular"):
        evaluate(config)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, r"evaluate\.inception_weights is not set"),
        ("nowhere.pth", r"evaluate\.inception_weights: .*nowhere\.pth"),
        ("other.pth", r"evaluate\.inception_weights: .*other\.pth: not the FID .*566 missing"),
        ("text.pth", r"evaluate\.inception_weights: .*text\.pth: neither safetensors nor"),
    ],
)
def test_weights_of_another_network_are_refused_before_any_work(folder, tmp_path, weights, message):
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("version https://git-lfs")
    place = weights and str(tmp_path / weights)
    chosen = {"embeddings": ["inception"], "inception_weights": place}
    with pytest.raises(EvaluationError, match=message):
        evaluate(config_of(folder, tmp_path / "report", **chosen))
    assert not (tmp_path / "report").exists()
