"""A cell is drawn the same way however the work is cut, and no table that does not fit is drawn."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cp2image import generation
from cp2image.checkpoint import ModelCard, load_model, save_checkpoint
from cp2image.columns import measurements
from cp2image.config import Config
from cp2image.config_train import Split
from cp2image.data.intensity import Intensity
from cp2image.data.scaling import Scaling
from cp2image.data.simulate import SimulatedScreen, simulate_screen
from cp2image.data.splits import fit_splits
from cp2image.dataset import open_dataset
from cp2image.errors import ColumnError, Cp2ImageError, DatasetError
from cp2image.generation import generate
from cp2image.models.cp2image import Discriminator, Generator
from cp2image.preparation import prepare

SCREEN = SimulatedScreen(
    plates=2, wells_per_plate=6, cells_per_site=8, field_size=176, defect_share=0.0
)
SIZE = 36
KNOWN, UNKNOWN = "Week1_20000", "Week1_20020"
CELL = ["Metadata_Plate", "Metadata_Well", "Metadata_ObjectNumber"]
CHANNELS = ("DNA", "Actin", "Tubulin")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, run_inline):
    """A screen, its cells, and a checkpoint of random weights that has seen the first plate."""
    folder = tmp_path_factory.mktemp("experiment")
    simulate_screen(folder, SCREEN)
    section = {
        "tables": [str(folder / "tables")],
        "images": str(folder / "images"),
        "channels": {name: name for name in CHANNELS},
        "patch_size": SIZE,
        "output": str(folder / "cells"),
    }
    raw = {"prepare": section, "tracking": {"enabled": False}}
    with pytest.MonkeyPatch.context() as patch:
        run_inline(patch)
        prepare(Config.model_validate(raw).resolve())
    save_random_checkpoint(folder)
    return folder


def save_random_checkpoint(folder):
    cells = pd.read_parquet(folder / "cells")
    cells = cells[cells["Metadata_Plate"] == KNOWN]
    names = [
        c.name for c in measurements(cells.columns) if c.category in ("AreaShape", "Intensity")
    ]
    values = cells[names].to_numpy(np.float64)
    center = np.median(values, axis=0)
    scale = np.abs(values - center).mean(axis=0) + 1e-3
    scaling = Scaling(
        tuple(names), (KNOWN,), np.stack([center] * 2), np.stack([scale] * 2), 5.0, min_controls=5
    )
    torch.manual_seed(0)
    generator, discriminator = Generator(len(names), 3, SIZE), Discriminator(3, SIZE)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3 if parameter.ndim > 1 else 1)
    save_checkpoint(
        str(folder / "checkpoint"),
        ModelCard("paper", CHANNELS, SIZE),
        scaling=scaling,
        intensity=Intensity(),
        splits=fit_splits(cells, Split(by="well", validation=0.34, test=0), 0),
        generator=generator.state_dict(),
        discriminator=discriminator.state_dict(),
        config="",
    )


def config_of(folder, output, cluster=None, seed=0, **settings):
    section = {
        "input": str(folder / "cells"),
        "checkpoint": str(folder / "checkpoint"),
        "output": str(output),
    }
    raw = {
        "run": {"seed": seed},
        "generate": section | settings,
        "cluster": cluster or {},
        "scaling": {"min_controls": 5},
        "tracking": {"enabled": False},
    }
    return Config.model_validate(raw).resolve()


def drawn(output):
    cells = pd.read_parquet(output).sort_values(CELL, ignore_index=True)
    patches = [np.frombuffer(pixels, "uint8").reshape(3, SIZE, SIZE) for pixels in cells.patch]
    return cells, np.stack(patches).astype(int)


@pytest.fixture
def screen(tmp_path):
    return tmp_path / "screen"


@pytest.mark.usefixtures("ray_session")
def test_the_same_cells_are_drawn_however_the_work_is_cut(folder, tmp_path, run_inline):
    """The batch is always the same size, so the patches are equal bit by bit: no tolerance."""
    cuts = {"one": (1, 1000), "three": (3, 16)}
    found = {}
    for name, (tasks, cells) in cuts.items():
        generate(config_of(folder, tmp_path / name, {"tasks": tasks, "cells_per_task": cells}))
        found[name] = drawn(tmp_path / name)
    with pytest.MonkeyPatch.context() as patch:
        run_inline(patch)
        generate(config_of(folder, tmp_path / "reversed", {"cells_per_task": 7}))
    found["reversed"] = drawn(tmp_path / "reversed")
    cells, patches = found["one"]
    assert len(cells) == 96
    assert patches.std(axis=0).mean() > 1  # the cells differ from each other
    for name in ("three", "reversed"):
        np.testing.assert_array_equal(patches, found[name][1])
        pd.testing.assert_frame_equal(cells, found[name][0])


@pytest.mark.usefixtures("inline")
def test_a_screen_is_what_the_model_draws_from_the_same_features(folder, screen):
    result = generate(config_of(folder, screen, plates=[KNOWN]))
    assert result.totals == {"in": 48, "out": 48}
    cells, patches = drawn(screen)
    model = load_model(str(folder / "checkpoint"))
    np.testing.assert_array_equal(patches, model.generate(cells))
    dataset = open_dataset(str(screen))
    assert dataset.patch_format == model.patch_format
    assert dataset.features == list(model.features)
    real = pd.read_parquet(folder / "cells")
    merged = cells.merge(real, on=CELL, suffixes=("", "_real"))
    assert len(merged) == 48
    name = model.features[0]
    np.testing.assert_array_equal(merged[name], merged[f"{name}_real"])


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("form", ["spreadsheet", "csv", "parquet"])
def test_a_table_of_cellprofiler_gives_the_same_screen_as_the_dataset(
    folder, screen, tmp_path, form
):
    generate(config_of(folder, screen))
    source = folder / "tables"
    if form != "spreadsheet":
        cells = pd.read_parquet(folder / "cells").drop(columns=["patch", "plate"])
        source = tmp_path / f"table.{form}"
        cells.to_csv(source, index=False) if form == "csv" else cells.to_parquet(source)
    config = config_of(folder, tmp_path / "from_table", {"cells_per_task": 16}, input=str(source))
    generate(config)
    first, second = drawn(screen), drawn(tmp_path / "from_table")
    assert first[0][CELL].equals(second[0][CELL])
    np.testing.assert_allclose(first[1], second[1], atol=0 if form == "parquet" else 1)
    assert not (tmp_path / "from_table" / "_staging").exists()


@pytest.mark.usefixtures("inline")
def test_an_unknown_plate_is_scaled_by_its_own_controls(folder, screen):
    generate(config_of(folder, screen, plates=[UNKNOWN]))
    cells, patches = drawn(screen)
    model = load_model(str(folder / "checkpoint"))
    features = cells[list(model.features)].to_numpy(np.float64)
    controls = features[(cells["Metadata_Compound"] == "DMSO").to_numpy()]
    own = model.scaling.with_plate(UNKNOWN, controls)
    keys = np.arange(len(cells), dtype=np.uint64)
    by_own = model.draw(own.apply(features, [UNKNOWN] * len(cells)), keys)
    by_all = model.draw(model.scaling.apply(features, [UNKNOWN] * len(cells)), keys)
    np.testing.assert_array_equal(patches, by_own)
    assert (by_own != by_all).any()


@pytest.mark.usefixtures("inline")
def test_an_unknown_plate_is_scaled_as_all_are_where_the_screen_is_scaled_alike(
    folder, screen, monkeypatch
):
    model = load_model(str(folder / "checkpoint"))
    own = model.scaling
    alike = Scaling(own.features, (), own.center[-1:], own.scale[-1:], own.clip, per_plate=False)
    model.scaling = alike
    monkeypatch.setattr(generation, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(generation, "_add_controls", lambda *_: pytest.fail("read controls"))
    generate(config_of(folder, screen, plates=[UNKNOWN]))
    cells, patches = drawn(screen)
    features = cells[list(model.features)].to_numpy(np.float64)
    keys = np.arange(len(cells), dtype=np.uint64)
    by_all = model.draw(alike.apply(features, [UNKNOWN] * len(cells)), keys)
    np.testing.assert_array_equal(patches, by_all)


@pytest.mark.usefixtures("inline")
def test_only_the_cells_of_the_chosen_split_are_drawn_and_the_others_counted(folder, screen):
    splits = load_model(str(folder / "checkpoint")).splits
    cells = pd.read_parquet(folder / "cells")
    wanted = (splits.of(cells) == "validation").sum()
    assert 0 < wanted < 48
    result = generate(config_of(folder, screen, split="validation"))
    assert result.totals == {"in": 96, "out": wanted, "not_validation": 96 - wanted}
    assert len(drawn(screen)[0]) == wanted


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("form", ["dataset", "table"])
def test_a_table_without_the_models_features_is_refused_naming_the_difference(
    folder, screen, tmp_path, form
):
    cells = pd.read_parquet(folder / "cells").drop(columns=["patch", "plate"])
    cells = cells.rename(columns={"Nuclei_AreaShape_Area": "Nuclei_AreaShape_Areas"})
    cells.to_parquet(tmp_path / "table.parquet")
    source = tmp_path / "table.parquet"
    if form == "dataset":
        source = tmp_path / "cells"
        rename_column(folder / "cells", source)
    with pytest.raises(ColumnError) as caught:
        generate(config_of(folder, screen, input=str(source)))
    message = str(caught.value)
    assert f"{source}: 1 column(s) missing: 'Nuclei_AreaShape_Area'" in message
    assert "did you mean 'Nuclei_AreaShape_Areas'?" in message
    assert str(folder / "checkpoint") in message
    assert not screen.exists()


def rename_column(source, target):
    """Copy a dataset, one feature under another name."""
    import shutil

    import pyarrow.parquet as pq

    shutil.copytree(source, target)
    for place in target.glob("plate=*/*.parquet"):
        table = pq.read_table(place, partitioning=None)
        names = [f"{n}s" if n == "Nuclei_AreaShape_Area" else n for n in table.column_names]
        renamed = table.rename_columns(names).replace_schema_metadata(
            pq.read_schema(place).metadata
        )
        pq.write_table(renamed, place)


@pytest.mark.usefixtures("inline")
def test_an_unknown_plate_name_is_refused_with_the_nearest(folder, screen):
    for source in ("cells", "tables"):
        config = config_of(folder, screen, input=str(folder / source), plates=["Week1_2000"])
        with pytest.raises(Cp2ImageError, match=r"no plate 'Week1_2000' .did you mean 'Week1_20"):
            generate(config)


@pytest.mark.usefixtures("inline")
def test_plates_can_be_done_one_by_one_into_one_screen(folder, screen):
    generate(config_of(folder, screen, plates=[KNOWN]))
    before = drawn(screen)[1]
    result = generate(config_of(folder, screen, plates=[UNKNOWN]))
    assert result.skipped == (KNOWN,)
    cells, patches = drawn(screen)
    np.testing.assert_array_equal(patches[cells["Metadata_Plate"] == KNOWN], before)
    assert len(cells) == 96
    with pytest.raises(DatasetError, match="other settings"):
        generate(config_of(folder, screen, seed=1))


@pytest.mark.usefixtures("inline")
def test_each_plate_has_a_picture_with_its_wells(folder, screen):
    generate(config_of(folder, screen))
    pictures = sorted((screen / "_plates").iterdir())
    assert [path.name for path in pictures] == [f"plate={KNOWN}.png", f"plate={UNKNOWN}.png"]
    for place in pictures:
        with Image.open(place) as picture:
            assert min(picture.size) > 200
    assert set(json.loads((screen / "_account.json").read_text())["plates"]) == {KNOWN, UNKNOWN}
