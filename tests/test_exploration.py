"""Explorations of a simulated screen by a draughtsman whose pictures are known to obey."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
from PIL import Image

from cp2image import exploration_responses
from cp2image.checkpoint import Model, ModelCard, load_model, save_checkpoint
from cp2image.columns import measurements
from cp2image.config import Config
from cp2image.config_reading import read_config
from cp2image.config_train import Split
from cp2image.data.intensity import Intensity
from cp2image.data.scaling import Scaling
from cp2image.data.simulate import SimulatedScreen, simulate_screen
from cp2image.data.splits import fit_splits
from cp2image.errors import ColumnError, ConfigError, EvaluationError
from cp2image.exploration import explore
from cp2image.exploration_cells import gather
from cp2image.exploration_knobs import all_knobs
from cp2image.exploration_paths import _between, _left_out
from cp2image.exploration_responses import (
    Base,
    knob_table,
    measure_drawn,
    observed_range,
    respond,
)
from cp2image.measuring import measure_dataset
from cp2image.models.cp2image import Discriminator, Generator
from cp2image.models.stochastic import StochasticGenerator
from cp2image.preparation import prepare

SCREEN = SimulatedScreen(
    plates=1, wells_per_plate=24, cells_per_site=14, field_size=224, defect_share=0.0
)
CHANNELS = ("DNA", "Actin", "Tubulin")
SIZE = 68
AREA, ORIENTATION = "Nuclei_AreaShape_Area", "Nuclei_AreaShape_Orientation"
BRIGHTNESS, CELL_AREA = "Nuclei_Intensity_MeanIntensity_DNA", "Cells_AreaShape_Area"
KNOBS = [AREA, ORIENTATION, BRIGHTNESS, CELL_AREA]
IGNORED = "Nuclei_AreaShape_Eccentricity"
BRIGHTEST = 0.15
"""Share of full scale that is drawn as 255."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_inline):
    """Measured cells of a simulated screen, and two untrained checkpoints."""
    folder = tmp_path_factory.mktemp("experiment")
    simulate_screen(folder, SCREEN)
    raw = {
        "prepare": {
            "tables": [str(folder / "tables")],
            "images": str(folder / "images"),
            "channels": {name: name for name in CHANNELS},
            "patch_size": SIZE,
            "quality": {"drop": []},
            "output": str(folder / "cells"),
        },
        "measure": {
            "input": str(folder / "cells"),
            "output": str(folder / "measured"),
            "families": ["AreaShape", "Intensity"],
            "compartments": ["Nuclei", "Cells"],
        },
        "tracking": {"enabled": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        run_inline(patch)
        prepare(Config.model_validate(raw).resolve())
        measure_dataset(Config.model_validate(raw).resolve())
    cells = pd.read_parquet(folder / "measured")
    names = [c.name for c in measurements(cells.columns) if not c.is_position]
    values = cells[names].to_numpy(np.float64)
    sound = np.isfinite(values).all(axis=0) & (values.std(axis=0) > 1e-9)
    names = [name for name, there in zip(names, sound, strict=True) if there]
    values = cells[names].to_numpy(np.float64)
    center, scale = np.median(values, axis=0), values.std(axis=0)
    plates = tuple(cells["Metadata_Plate"].unique())
    scaling = Scaling(tuple(names), plates, np.tile(center, (2, 1)), np.tile(scale, (2, 1)), 5.0)
    splits = fit_splits(cells, Split(by="well", validation=0.25, test=0), 0)
    for preset in ("paper", "cp2image-s"):
        torch.manual_seed(0)
        size = (len(names), 3, SIZE)
        network = Generator(*size) if preset == "paper" else StochasticGenerator(*size)
        save_checkpoint(
            str(folder / preset),
            ModelCard(preset, CHANNELS, SIZE),
            scaling=scaling,
            intensity=Intensity(
                "plate_percentile", (), np.zeros((1, 3)), np.full((1, 3), BRIGHTEST)
            ),
            splits=splits,
            generator=network.state_dict(),
            discriminator=Discriminator(3, SIZE).state_dict(),
            config="",
        )
    return folder


def config_of(folder, output, preset="paper", **settings):
    section = {
        "input": str(folder / "measured"),
        "checkpoint": str(folder / preset),
        "output": str(output),
        "pixel_size": 0.65,
    }
    raw = {
        "explore": section | settings,
        "measure": {"compartments": ["Nuclei", "Cells"]},
        "cluster": {"tasks": 2},
        "tracking": {"enabled": False},
    }
    return Config.model_validate(raw).resolve()


def ellipse(area, ratio, degrees):
    """Pixels of an ellipse at the centre; the angle is CellProfiler's, from the rows' axis."""
    y, x = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    turn = np.deg2rad(degrees)
    along, across = y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn)
    short = np.sqrt(area * ratio / np.pi)
    return (along * ratio / short) ** 2 + (across / short) ** 2 <= 1


def obey(model, scaled, keys, seed=0):
    """Draw nucleus and cell exactly as four of the features say, whatever the others do."""
    own = model.scaling.center[-1] + model.scaling.scale[-1] * scaled.astype(np.float64)
    wanted = own[:, [model.features.index(name) for name in KNOBS]]
    patches = np.zeros((len(scaled), *model.patch_format.shape), dtype=np.uint8)
    for patch, (area, degrees, brightness, cell_area) in zip(patches, wanted, strict=True):
        cell = ellipse(max(cell_area, 400), 0.95, 0)
        patch[1:, cell] = 120
        nucleus = ellipse(np.clip(area, 100, 1500), 0.6, degrees)
        patch[0, nucleus] = np.clip(255 * brightness / BRIGHTEST, 20, 255)
    return patches


@pytest.fixture
def obedient(monkeypatch):
    monkeypatch.setattr(Model, "draw", obey)


@pytest.fixture(scope="module")
def result(folder):
    """All explorations but the table of responses, once."""
    everything = {
        "which": ["manipulate", "trajectories", "concentrations", "representatives", "atlas"],
        "manipulate": {
            "features": [*KNOBS, IGNORED], "cells": 6, "steps": 5, "percentiles": [5, 95],
            "split": "validation",
        },
        "representatives": {"by": "moa", "prototypes": 3},
        "trajectories": {"targets": ["Protein synthesis", "taxol 3"]},
        "concentrations": {"compounds": ["taxol"], "fewest": 3, "real": 2, "points": 4},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Model, "draw", obey)
        return explore(config_of(folder, folder / "exploration", **everything))


@pytest.mark.parametrize("feature", KNOBS)
@pytest.mark.parametrize("mode", ["conditional", "single"])
def test_what_is_asked_of_an_obedient_model_is_what_is_measured(result, feature, mode):
    found = result.found["manipulate"][feature][mode]
    assert found["rises"]
    assert found["spearman"] > 0.9
    assert found["slope"] == pytest.approx(1, abs=0.35)  # in the table's own units
    assert found["draws"] == 1  # paper has no noise


def test_a_feature_that_the_model_ignores_does_not_move_by_itself(result):
    found = result.found["manipulate"][IGNORED]["single"]
    assert not found["rises"]
    assert not found["spearman"] > 0.5


def test_a_value_against_all_other_features_is_marked_and_one_they_follow_is_not(result):
    for feature in (AREA, BRIGHTNESS):
        found = result.found["manipulate"][feature]
        assert found["single"]["contradictory"] > 0.7
        assert found["conditional"]["contradictory"] < found["single"]["contradictory"] - 0.3
        assert found["conditional"]["outside"] < 0.5


def test_figure_vectors_and_images_lie_side_by_side_and_agree(folder, result):
    assert set(result.pictures) >= {f"manipulate/{AREA}", "atlas/treatments", "representatives/moa"}
    model = load_model(str(folder / "paper"))
    for name in result.pictures:
        place = folder / "exploration" / name
        with Image.open(f"{place}.png") as picture:
            assert min(picture.size) > 200
        assert b"<svg" in place.parent.joinpath(f"{place.name}.svg").read_bytes()
        table = pd.read_parquet(f"{place}.parquet")
        images = tifffile.imread(f"{place}.tif").reshape(-1, 3, SIZE, SIZE)
        pixels = np.stack([np.frombuffer(patch, np.uint8) for patch in table["patch"]])
        np.testing.assert_array_equal(pixels.reshape(images.shape), images)
        values = table[list(model.features)].to_numpy(np.float64)
        scaled = model.scaling.apply(values, [""] * len(values))
        again = obey(model, scaled, None)
        assert (again != images).mean() < 0.01  # float32 on the way
        assert set(table["Metadata_Outside"]) <= {0, 1}
        assert ((table["Metadata_Distance"] > 1) == (table["Metadata_Outside"] == 1)).all()


def test_the_report_is_json_with_the_protocol_and_the_tables_have_every_step(folder, result):
    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    pictures = []
    for name in result.found:
        text = (folder / "exploration" / name / "exploration.json").read_text()
        stored = json.loads(text, parse_constant=refuse)
        assert stored["protocol"]["checkpoint"]["preset"] == "paper"
        assert stored["protocol"]["outside"]["held_back_cells"] > 20
        assert set(stored) == {"protocol", name, "pictures", "files"}
        there = {file.name for file in (folder / "exploration" / name).iterdir()}
        assert there == set(stored["files"])
        pictures += [f"{name}/{picture}" for picture in stored["pictures"]]
        assert (folder / "exploration" / name / "_config.yaml").exists()
    assert pictures == result.pictures
    steps = pd.read_csv(folder / "exploration" / "manipulate" / "responses.csv")
    assert len(steps) == 5 * 2 * 5
    assert {"requested", "measured", "spearman", "outside", "contradictory"} <= set(steps)
    assert "Spearman" in str(result)


@pytest.mark.usefixtures("obedient")
def test_an_exploration_drawn_again_takes_its_own_files_and_leaves_the_others(folder, tmp_path):
    out = tmp_path / "out"
    both = {"which": ["representatives", "atlas"], "representatives": {"by": "well"}}
    first = explore(config_of(folder, out, **both))
    assert {"representatives/well_1", "representatives/well_2"} <= set(first.pictures)
    atlas = {file: file.read_bytes() for file in (out / "atlas").iterdir()}
    (out / "representatives" / "mine.txt").write_text("a note of the user's")
    few = {"by": "treatment", "groups": ["taxol"]}
    second = explore(config_of(folder, out, which=["representatives"], representatives=few))
    assert second.pictures == ["representatives/treatment"]
    assert list(second.found["representatives"]) == ["taxol 0.3", "taxol 3"]
    there = {file.name for file in (out / "representatives").iterdir()}
    suffixes = ("png", "svg", "parquet", "tif")
    assert there == {
        "cells.csv", "exploration.json", "_config.yaml", "mine.txt",
        *(f"treatment.{suffix}" for suffix in suffixes),
    }  # fmt: skip
    assert {file: file.read_bytes() for file in (out / "atlas").iterdir()} == atlas


@pytest.mark.usefixtures("obedient")
@pytest.mark.parametrize("before", [True, False])
def test_what_breaks_on_the_way_has_no_protocol_and_is_cleared_by_the_next_run(
    folder, tmp_path, monkeypatch, before
):
    out = tmp_path / "out"
    wells = {"which": ["representatives"], "representatives": {"by": "well"}}
    if before:
        explore(config_of(folder, out, **wells))
    place = out / "representatives" / "exploration.json"

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("cp2image.exploration_album.encode_stack", fail)
        with pytest.raises(OSError, match="no space"):
            explore(config_of(folder, out, **wells))
    left = json.loads(place.read_text())
    assert set(left) == {"unfinished", "files"}
    assert {"well_1.png", "well_1.parquet"} <= set(left["files"])
    few = {"by": "treatment", "groups": ["taxol"]}
    explore(config_of(folder, out, which=["representatives"], representatives=few))
    there = {file.name for file in place.parent.iterdir()}
    assert there == set(json.loads(place.read_text())["files"])


@pytest.mark.usefixtures("obedient")
def test_a_damaged_protocol_is_as_good_as_none(folder, tmp_path):
    place = tmp_path / "out" / "representatives" / "exploration.json"
    place.parent.mkdir(parents=True)
    place.write_text('{"files": ')
    few = {"by": "treatment", "groups": ["taxol"]}
    explore(config_of(folder, tmp_path / "out", which=["representatives"], representatives=few))
    assert "protocol" in json.loads(place.read_text())


def test_a_line_leaves_doses_out_and_says_so_and_tells_concentrations_along_it(folder):
    config = config_of(folder, folder / "x", concentration_unit="µM")
    explored = gather(config, load_model(config.explore.checkpoint))
    assert explored.label("taxol 0.3") == "taxol 0.3 µM"
    assert explored.label("DMSO 0") == "DMSO"
    assert explored.label("unknown") == "unknown"
    groups = {"control": np.array([0]), "taxol 0.3 µM": np.array([1])}
    assert re.fullmatch(r"left out: 3 µM: \d+ cells", _left_out(explored, "taxol", groups))
    rows = np.flatnonzero(explored.cells["treatment"] == "taxol 0.3")
    more = np.flatnonzero(explored.cells["treatment"] == "taxol 3")
    groups = {"control": rows, "taxol 0.3 µM": rows, "taxol 3 µM": more}
    at = {name: np.array([x]) for name, x in zip(groups, (0.0, 0.4, 1.0), strict=True)}
    told = _between(explored, groups, at, np.array([0, 0.2, 0.4, 0.7, 1]))
    assert told == ["control", "< 0.3 µM", "≈ 0.3 µM", "≈ 0.9 µM", "≈ 3 µM"]
    at["taxol 3 µM"] = np.array([0.3])
    assert _between(explored, groups, at, np.array([0, 1])) == []


@pytest.mark.usefixtures("obedient")
def test_every_name_is_looked_up_before_the_first_picture(folder, tmp_path):
    wrong = {"which": ["manipulate", "atlas"], "atlas": {"plates": ["Week1_2"]}}
    with pytest.raises(EvaluationError, match=r"there are 1: Week1_"):
        explore(config_of(folder, tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_a_trajectory_starts_at_a_control_and_ends_at_its_mechanism(folder, result):
    steps = pd.read_csv(folder / "exploration" / "trajectories" / "steps.csv")
    assert set(steps["Metadata_Target"]) == {"Protein synthesis", "taxol 3"}
    for _, way in steps.groupby("Metadata_Target"):
        assert way["Metadata_Cosine"].iloc[-1] == pytest.approx(1)
        assert way["Metadata_Swapped"].iloc[1] == 50
        assert (way["Metadata_Cosine"].diff().dropna() > -0.2).all()


def test_a_stronger_dose_lies_farther_on_the_line(folder, result):
    positions = pd.read_csv(folder / "exploration" / "concentrations" / "positions.csv")
    assert positions["group"].tolist() == ["control", "taxol 0.3", "taxol 3"]
    np.testing.assert_allclose(positions["position"].iloc[[0, 2]], [0, 1], atol=1e-6)
    assert 0 < positions["position"].iloc[1] < 1


def test_representatives_are_cells_of_their_group(folder, result):
    chosen = pd.read_csv(folder / "exploration" / "representatives" / "cells.csv")
    assert (chosen["Metadata_Group"] == chosen["Metadata_MOA"]).all()
    assert (chosen.groupby("Metadata_Group")["Metadata_Rank"].min() == 0).all()


@pytest.mark.usefixtures("obedient")
def test_the_same_command_draws_the_same_and_a_table_without_patches_is_enough(folder, tmp_path):
    cells = pd.read_parquet(folder / "measured").drop(columns=["patch", "plate"])
    cells.to_parquet(tmp_path / "table.parquet")
    chosen = {"which": ["representatives"], "representatives": {"by": "cluster", "clusters": 3}}
    one = explore(config_of(folder, tmp_path / "one", **chosen))
    table = str(tmp_path / "table.parquet")
    two = explore(config_of(folder, tmp_path / "two", **chosen, **{"input": table}))
    assert one.found == two.found
    first, second = (
        pd.read_parquet(tmp_path / name / "representatives" / "cluster.parquet")
        for name in ("one", "two")
    )
    assert (first["patch"] == second["patch"]).all()
    shared = [name for name in first if name in second and name != "patch"]
    pd.testing.assert_frame_equal(first[shared], second[shared], check_dtype=False)


def test_no_value_is_asked_for_that_the_model_cannot_see(folder):
    config = config_of(folder, folder / "x")
    model = load_model(config.explore.checkpoint)
    scaling = model.scaling
    row = model.features.index(AREA)
    wide = gather(config, model)
    plates = list(scaling.plates)
    asked = observed_range(wide, AREA, (0, 100), 5, plates)
    narrow = replace(scaling, scale=np.minimum(scaling.scale, 0.05 * scaling.scale[0, row]))
    model.scaling = narrow
    fewer = observed_range(wide, AREA, (0, 100), 5, plates)
    limits = narrow.center[0, row] + 5 * narrow.scale[0, row] * np.array([-1, 1])
    assert asked[0] < limits[0]
    assert asked[-1] > limits[1]
    assert limits[0] - 1e-9 <= fewer[0] < fewer[-1] <= limits[1] + 1e-9


def test_draws_of_the_model_with_noise_differ_and_are_averaged(folder):
    config = config_of(folder, folder / "x", "cp2image-s")
    explored = gather(config, load_model(config.explore.checkpoint))
    artist = explored.artist
    rows = explored.sample(3, "all", [], "explore.manipulate")
    base = Base.of(explored, rows)
    first, again, other = (artist.draw(explored.scaled[rows], base.keys, t) for t in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (artist.draws(4), artist.model.card.preset) == (4, "cp2image-s")

    class Counting(type(artist)):
        def measure(self, patches, plates, feature):
            return patches.mean(axis=(1, 2, 3), dtype=np.float64)

    counting = Counting(**vars(artist))
    mean, shown = measure_drawn(counting, base, AREA, explored.scaled[rows][:, None], 2)
    expected = np.stack([first, other]).mean(axis=(0, 2, 3, 4))
    np.testing.assert_allclose(mean[:, 0], expected)
    np.testing.assert_array_equal(shown[:, 0], first)


def test_the_cluster_measures_what_this_process_measures(folder, ray_session, monkeypatch):
    features = [AREA, "Nuclei_Intensity_MeanIntensity_*"]
    responses = {"features": features, "cells": 2, "steps": 3}
    config = config_of(folder, folder / "x", "cp2image-s", responses=responses)
    explored = gather(config, load_model(config.explore.checkpoint))
    features, rows = all_knobs(config, explored)
    assert len(rows) == 2
    here = respond(config, explored, features, rows)
    monkeypatch.setattr(exploration_responses, "_FEW", 0)
    there = respond(config, explored, features, rows)
    assert len(here) == 4 * 2 * 3
    pd.testing.assert_frame_equal(here, there, rtol=1e-5)
    knobs = knob_table(here)
    assert len(knobs) == 4
    assert {"spearman_conditional", "spearman_single", "contradictory_single"} <= set(knobs)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"which": ["manipulate"], "manipulate": {"features": ["Nuclei_AreaShape_Aera"]}},
         ColumnError, "did you mean 'Nuclei_AreaShape_Area'"),
        ({"which": ["manipulate"], "manipulate": {"treatments": ["DMSO", "taxl"]}},
         EvaluationError, "explore.manipulate.treatments: no cell of 'taxl' .did you mean 'taxol"),
        ({"which": ["trajectories"], "trajectories": {"targets": ["nothing"]}},
         EvaluationError, "no cell of 'nothing'"),
        ({"which": ["trajectories"], "trajectories": {"targets": ["DMSO"]}},
         EvaluationError, "'DMSO' are the negative controls.*known mechanisms: (?!.*DMSO)"),
        ({"which": ["concentrations"], "concentrations": {"compounds": ["DMSO"]}},
         EvaluationError, "'DMSO' are the negative controls, where every line begins"),
        ({"which": ["concentrations"], "concentrations": {"compounds": ["DMS0"]}},
         EvaluationError, "no cell of 'DMS0' .did you mean 'DMSO'"),
        ({"which": ["representatives"], "representatives": {"groups": ["x"]}},
         EvaluationError, "no cell of treatment 'x'"),
        ({"which": ["atlas"], "atlas": {"plates": ["x"]}},
         EvaluationError, "no cell of plate 'x'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("obedient")
def test_what_is_not_there_is_named(folder, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        explore(config_of(folder, tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def altered_table(folder, tmp_path, alter):
    cells = pd.read_parquet(folder / "measured").drop(columns="patch")
    cells["Metadata_Plate"] = cells["Metadata_Plate"].astype(str)
    place = tmp_path / "table.parquet"
    alter(cells).to_parquet(place)
    return str(place)


@pytest.mark.usefixtures("obedient")
def test_a_table_of_a_plate_the_model_never_saw_is_drawn_with_a_note(folder, tmp_path):
    place = altered_table(folder, tmp_path, lambda cells: cells.assign(Metadata_Plate="new"))
    config = config_of(folder, tmp_path / "out", input=place, which=["representatives"])
    found = explore(config)
    assert any(
        "0 of the cells are of the model's training split" in n for n in found.protocol["notes"]
    )
    assert found.pictures


@pytest.mark.usefixtures("obedient")
def test_a_table_without_treatments_is_refused_with_what_to_group_by(folder, tmp_path):
    unknown = ["Metadata_Compound", "Metadata_Concentration", "Metadata_MOA"]
    place = altered_table(folder, tmp_path, lambda cells: cells.drop(columns=unknown))
    settings = {"which": ["representatives"], "input": place}
    with pytest.raises(EvaluationError, match=r"representatives.by = 'treatment': .*by well"):
        explore(config_of(folder, tmp_path / "out", **settings))


def test_percentiles_have_to_rise():
    overrides = ["explore.manipulate.percentiles=[99, 1]"]
    with pytest.raises(ConfigError, match="the smaller one first"):
        read_config(None, overrides)
