"""Cells without a table get one: every patch measured, or counted as without a nucleus."""

import numpy as np
import pandas as pd
import pytest

from cp2image.config import Config
from cp2image.data.orientations import turn
from cp2image.data.schema import PatchFormat, build_table
from cp2image.dataset import open_dataset
from cp2image.errors import DatasetError, MeasurementError
from cp2image.measuring import measure_dataset, measure_turned
from cp2image.metrics.measurement import measure
from cp2image.publication import Outcome, publish
from cp2image.staging import stage_plate

FORMAT = PatchFormat(("DNA", "Actin"), 40, "uint16", 16)
EMPTY = (1, 6)


def draw_patches(numbers):
    """Round nuclei in round cells, of a size and brightness of their own; none on `EMPTY`."""
    yy, xx = np.mgrid[:40, :40] - 20
    patches = np.full((len(numbers), 2, 40, 40), 500, np.uint16)
    for patch, number in zip(patches, numbers, strict=True):
        if number not in EMPTY:
            patch[0][yy**2 + xx**2 < (5 + number / 4) ** 2] = 20_000 + 1000 * number
            patch[1][yy**2 + xx**2 < 14**2] = 9_000
            patch[1][4:14, 8:20] += 500 * number  # so that it matters how a patch lies
    return patches


@pytest.fixture
def folder(tmp_path, inline):
    metadata = pd.DataFrame(
        {
            "Metadata_Plate": "P1",
            "Metadata_Well": "B02",
            "Metadata_Site": "1",
            "Metadata_ImageNumber": 1,
            "Metadata_ObjectNumber": np.arange(10),
        }
    )
    units = stage_plate(str(tmp_path / "staged"), "P1", metadata, 4)

    def process(unit):
        rows = metadata.iloc[unit.start : unit.start + unit.rows]
        patches = draw_patches(rows["Metadata_ObjectNumber"].tolist())
        return Outcome(build_table(rows, None, patches, FORMAT))

    publish(str(tmp_path / "cells"), units, lambda: process, Config(), "mark", label="test")
    return tmp_path


def config_of(folder, **settings):
    section = {
        "input": str(folder / "cells"),
        "output": str(folder / "measured"),
        "families": ["AreaShape", "Intensity"],
    }
    raw = {"measure": section | settings, "cluster": {"cells_per_task": 4}}
    return Config.model_validate(raw | {"tracking": {"enabled": False}}).resolve()


def test_every_patch_is_measured_or_counted_as_without_a_nucleus(folder):
    result = measure_dataset(config_of(folder))
    assert result.totals == {"in": 10, "out": 8, "no_nucleus": 2}
    cells = pd.read_parquet(folder / "measured").sort_values("Metadata_ObjectNumber")
    numbers = cells["Metadata_ObjectNumber"].tolist()
    assert numbers == [number for number in range(10) if number not in EMPTY]
    expected = measure(
        draw_patches(numbers), channels=FORMAT.channels, families=["AreaShape", "Intensity"]
    )
    dataset = open_dataset(str(folder / "measured"))
    assert dataset.features == list(expected.columns)
    assert dataset.patch_format == FORMAT
    np.testing.assert_allclose(cells[dataset.features], expected.astype(np.float32))
    for number, pixels in zip(numbers, cells["patch"], strict=True):
        patch = np.frombuffer(pixels, "uint16").reshape(2, 40, 40)
        np.testing.assert_array_equal(patch, draw_patches([number])[0])


def test_a_family_that_is_misspelled_is_refused_before_anything_is_measured(folder):
    with pytest.raises(MeasurementError, match="AreaShap"):
        measure_dataset(config_of(folder, families=["AreaShap"]))
    assert not (folder / "measured").exists()


def test_cells_that_were_prepared_anew_are_not_mixed_with_measurements_of_the_old(folder):
    measure_dataset(config_of(folder))
    assert measure_dataset(config_of(folder)).skipped == ("P1",)
    manifest = folder / "cells" / "_manifests" / "P1.json"
    manifest.write_text(manifest.read_text().replace('"mark"', '"another"'))
    with pytest.raises(DatasetError, match="plate 'P1', written with another input"):
        measure_dataset(config_of(folder))


def test_the_other_orientations_are_measured_each_a_dataset_with_the_same_cells(folder, capsys):
    """A patch that is bright on one side tells which way it was turned."""
    settings = {"families": ["Intensity", "Location"]}
    measure_dataset(config_of(folder, **settings))
    result = measure_turned(
        config_of(folder, **settings, turned=True, output=str(folder / "turned"))
    )
    assert [one.totals["out"] for one in result.orientations] == [8] * 7
    assert str(result).count("8 of 10 cells") == 7
    assert "orientation 7 of 7" in capsys.readouterr().out
    upright = open_dataset(str(folder / "measured"))
    for orientation in range(1, 8):
        dataset = open_dataset(str(folder / "turned" / str(orientation)))
        cells = pd.read_parquet(dataset.uri).sort_values("Metadata_ObjectNumber")
        numbers = cells["Metadata_ObjectNumber"].tolist()
        patches = turn(draw_patches(numbers), orientation)
        expected = measure(patches, channels=FORMAT.channels, families=settings["families"])
        np.testing.assert_allclose(cells[dataset.features], expected.astype(np.float32))
        assert cells["patch"].tolist() == [patch.tobytes() for patch in patches]
        for name in ("fingerprint", "input"):  # so that training can tell that they belong together
            assert getattr(dataset.manifests["P1"], name) == getattr(upright.manifests["P1"], name)


def test_the_other_orientations_go_to_a_folder_of_their_own():
    config = Config.model_validate({"measure": {"turned": True}, "run": {"folder": "a"}})
    assert config.resolve().measure.output == "a/turned"
    assert config.resolve().train.input == "a/measured"
