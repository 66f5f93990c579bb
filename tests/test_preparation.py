"""From tables and images to cells: every cell accounted for, and no bad input gets through."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
import yaml
from PIL import Image
from scipy import ndimage

from cp2image.command import REFUSED, run_job
from cp2image.config import Config
from cp2image.config_reading import read_config
from cp2image.data.simulate import SimulatedScreen, simulate_screen
from cp2image.dataset import open_dataset
from cp2image.errors import DatasetError, TableError
from cp2image.preparation import prepare

SCREEN = SimulatedScreen(
    plates=2, wells_per_plate=6, cells_per_site=8, field_size=176, defect_share=0.3, seed=3
)
SIZE = 68
CHANNELS = ("DNA", "Actin", "Tubulin")
CELL = ["Metadata_Plate", "Metadata_ImageNumber", "Metadata_ObjectNumber"]


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    """Folder of a simulated screen in which 5 of 12 fields are defective."""
    folder = tmp_path_factory.mktemp("screen")
    simulate_screen(folder, SCREEN)
    return folder


@pytest.fixture(scope="module")
def truth(screen):
    rows = pd.read_csv(screen / "truth.csv")
    return rows.rename(
        columns={"ImageNumber": CELL[1], "ObjectNumber": CELL[2], "Metadata_Site": "site"}
    )


def settings_of(screen, output, **settings):
    """An experiment on an ExportToSpreadsheet folder beside its images."""
    section = {
        "tables": [str(screen / "tables")],
        "images": str(screen / "images"),
        "channels": {name: name for name in CHANNELS},
        "patch_size": SIZE,
        "output": str(output),
    }
    return {"prepare": section | settings, "tracking": {"enabled": False}}


def config_of(screen, output, **settings):
    return Config.model_validate(settings_of(screen, output, **settings)).resolve()


def patches_of(cells, shape, dtype="uint16"):
    return np.stack([np.frombuffer(pixels, dtype).reshape(shape) for pixels in cells.patch])


@pytest.fixture
def output(tmp_path):
    return tmp_path / "cells"


@pytest.mark.usefixtures("inline")
def test_defective_fields_are_dropped_by_reason_and_all_other_cells_are_there(
    screen, truth, output
):
    result = prepare(config_of(screen, output))
    defects = truth.groupby(["Metadata_Plate", "defect"]).size()
    for plate, account in result.plates.items():
        assert account["in"] == (truth["Metadata_Plate"] == plate).sum()
        assert account.get("noise", 0) == defects.get((plate, "noise"), 0)
        assert account.get("out_of_focus", 0) == defects.get((plate, "defocus"), 0)
        assert account["out"] == account["in"] - account.get("noise", 0) - account.get(
            "out_of_focus", 0
        )
    cells = pd.read_parquet(output)
    sound = truth[truth["defect"] == "none"]
    assert len(cells) == result.totals["out"] == len(sound)
    assert len(cells.merge(sound, on=CELL)) == len(sound)


@pytest.mark.usefixtures("inline")
def test_patches_are_centred_on_the_nuclei_they_are_named_after(screen, truth, output):
    prepare(config_of(screen, output))
    cells = pd.read_parquet(output).merge(truth, on=CELL)
    patches = patches_of(cells, (3, SIZE, SIZE)).astype(np.float64)
    yy, xx = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    near = (yy**2 + xx**2)[None] <= cells["nucleus_area"].to_numpy()[:, None, None] / np.pi
    ring = (yy**2 + xx**2 > 30**2)[None] & np.ones_like(near)
    nucleus = np.array([p[m].mean() for p, m in zip(patches[:, 0], near, strict=True)])
    around = np.array([np.median(p[m]) for p, m in zip(patches[:, 0], ring, strict=True)])
    assert (nucleus > 1.3 * around).mean() > 0.95
    brightness = cells["Nuclei_Intensity_MeanIntensity_DNA"] * 65535
    assert np.corrcoef(nucleus, brightness)[0, 1] > 0.95
    first = cells.iloc[0]
    index = pd.read_csv(screen / "BBBC021_v1_image.csv").set_index("ImageNumber")
    row = index.loc[first[CELL[1]]]
    for channel, name in enumerate(("DAPI", "Actin", "Tubulin")):
        place = screen / "images" / row[f"Image_PathName_{name}"] / row[f"Image_FileName_{name}"]
        field = np.pad(tifffile.imread(place), SIZE)
        top, left = (round(first[f"Nuclei_Location_Center_{axis}"]) + SIZE // 2 for axis in "YX")
        expected = field[top : top + SIZE, left : left + SIZE]
        np.testing.assert_array_equal(patches[0, channel], expected)


@pytest.mark.usefixtures("inline")
def test_features_and_metadata_of_the_table_are_kept_as_they_were(screen, output):
    prepare(config_of(screen, output))
    dataset = open_dataset(str(output))
    assert dataset.patch_format.channels == CHANNELS
    assert dataset.patch_format.dtype == "uint16"
    cells = pd.read_parquet(output)
    nuclei = pd.read_csv(screen / "tables" / "Nuclei.csv").rename(
        columns={"ImageNumber": CELL[1], "ObjectNumber": CELL[2]}
    )
    both = cells.merge(nuclei, on=CELL[1:])
    assert len(both) == len(cells)
    np.testing.assert_allclose(both["Nuclei_AreaShape_Area"], both["AreaShape_Area"])
    assert set(cells["Metadata_MOA"]) <= {
        "DMSO",
        "DNA damage",
        "Actin disruptors",
        "Microtubule stabilizers",
        "Protein synthesis",
        "Aurora kinase inhibitors",
    }
    assert cells["Metadata_Concentration"].dtype == np.float64
    assert not [name for name in cells if name.startswith(("source_", "center_"))]


@pytest.mark.usefixtures("inline")
def test_patches_that_leave_the_field_are_padded_or_dropped_and_counted(screen, truth, output):
    half = SIZE // 2
    result = prepare(config_of(screen, output, border="drop", quality={"drop": []}))
    tables = pd.read_csv(screen / "tables" / "Nuclei.csv")
    y, x = (tables[f"Location_Center_{axis}"] for axis in "YX")
    kept = np.ones(len(tables), dtype=bool)
    for center in (y, x):
        kept &= (center.round() >= half) & (center.round() + half <= SCREEN.field_size)
    assert result.totals["border"] == (~kept).sum() > 0
    assert result.totals["out"] == kept.sum()
    padded = prepare(config_of(screen, output.parent / "padded", quality={"drop": []}))
    assert padded.totals["out"] == len(truth)
    assert padded.totals["noted_noise"] == (truth["defect"] == "noise").sum()


@pytest.fixture
def shaded(screen, tmp_path):
    """The same screen under light that falls off to a third at the right of the field."""
    folder = tmp_path / "shaded"
    shutil.copytree(screen, folder)
    light = np.linspace(1, 1 / 3, SCREEN.field_size)
    for place in folder.glob("images/**/*.tif"):
        tifffile.imwrite(place, np.rint(tifffile.imread(place) * light).astype(np.uint16))
    return folder


@pytest.mark.usefixtures("ray_session")
def test_illumination_correction_evens_the_light_out(screen, truth, shaded, output):
    ratios = {}
    for corrected in (False, True):
        place = output.parent / f"cells-{corrected}"
        config = config_of(
            shaded, place, illumination=corrected, quality={"drop": ["noise", "out_of_focus"]}
        )
        prepare(config)
        cells = pd.read_parquet(place).merge(truth, on=CELL)
        patches = patches_of(cells, (3, SIZE, SIZE))
        tubulin = np.array([np.median(patch[2][patch[2] > 0]) for patch in patches])
        right = cells["center_x"] > SCREEN.field_size / 2
        ratios[corrected] = tubulin[~right].mean() / tubulin[right].mean()
    assert ratios[False] > 1.3
    assert abs(np.log(ratios[True])) < 0.5 * abs(np.log(ratios[False]))


@pytest.mark.usefixtures("ray_session")
def test_a_plate_without_a_usable_illumination_is_named_and_the_others_are_published(
    screen, tmp_path, output
):
    folder = tmp_path / "screen"
    shutil.copytree(screen, folder)
    broken = next(folder.glob("images/Week1/Week1_20020/*w1*.tif"))
    broken.write_bytes(broken.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=r"plate Week1_20020: .*truncated") as caught:
        prepare(config_of(folder, output, illumination=True))
    assert "Traceback" not in str(caught.value)
    assert set(open_dataset(str(output)).manifests) == {"Week1_20000"}


@pytest.mark.usefixtures("inline")
def test_a_plate_can_be_added_and_a_rerun_reads_nothing_twice(screen, tmp_path, output):
    half = tmp_path / "half"
    half.mkdir()
    for name in ("Image", "Nuclei", "Cells", "Cytoplasm"):
        table = pd.read_csv(screen / "tables" / f"{name}.csv")
        first = table[table["ImageNumber"] <= SCREEN.wells_per_plate]
        first.to_csv(half / f"{name}.csv", index=False)
    prepare(config_of(screen, output, tables=[str(half)]))
    before = (output / "plate=Week1_20000" / "part-00000.parquet").stat().st_mtime_ns
    result = prepare(config_of(screen, output))
    assert result.skipped == ("Week1_20000",)
    assert result.totals["in"] == 96
    assert (output / "plate=Week1_20000" / "part-00000.parquet").stat().st_mtime_ns == before
    with pytest.raises(DatasetError, match="other settings"):
        prepare(config_of(screen, output, patch_size=40))


@pytest.mark.usefixtures("inline")
def test_chosen_plates_come_first_and_the_others_later(screen, tmp_path, output):
    first = prepare(config_of(screen, output, plates=["Week1_20020"]))
    assert set(first.plates) == {"Week1_20020"}
    result = prepare(config_of(screen, output))
    assert result.skipped == ("Week1_20020",)
    assert set(result.plates) == {"Week1_20000", "Week1_20020"}
    with pytest.raises(TableError, match=r"no plate 'Week1_2002' .did you mean 'Week1_20020'"):
        prepare(config_of(screen, tmp_path / "other", plates=["Week1_2002"]))
    assert not (tmp_path / "other").exists()


@pytest.mark.real_data
@pytest.mark.usefixtures("inline")
def test_every_cell_of_cellprofilers_own_example_is_there_and_as_bright_as_its_table_says(
    shared_data, output
):
    place = Path(__file__).parents[1] / "configs" / "examplehuman.yaml"
    folder = str(shared_data / "examplehuman")
    config = read_config(
        str(place),
        [
            f"prepare.tables=[{folder}]",
            f"prepare.images={folder}",
            f"prepare.output={output}",
            "tracking.enabled=false",
        ],
    )
    account = prepare(config).totals
    assert (account["in"], account["out"]) == (289, 289)
    cells = pd.read_parquet(output)
    assert open_dataset(str(output)).patch_format.channels == ("DNA", "PH3", "CellBody")
    size = config.prepare.patch_size
    dna = patches_of(cells, (3, size, size), "uint8")[:, 0] / 255
    yy, xx = np.mgrid[:size, :size] - size // 2
    disc = (yy**2 + xx**2)[None] <= cells["Nuclei_AreaShape_Area"].to_numpy()[:, None, None] / np.pi
    inside = np.array([patch[mask].mean() for patch, mask in zip(dna, disc, strict=True)])
    stated = cells["Nuclei_Intensity_MeanIntensity_DNA"]
    assert np.corrcoef(inside, stated)[0, 1] > 0.98  # 0.986 measured
    slope, offset = np.polyfit(stated, inside, 1)
    assert slope == pytest.approx(1, abs=0.05)
    assert offset == pytest.approx(0, abs=0.01)
    shifted = np.array([p[np.roll(m, 6)].mean() for p, m in zip(dna, disc, strict=True)])
    assert np.corrcoef(shifted, stated)[0, 1] < 0.9


@pytest.mark.real_data
@pytest.mark.usefixtures("inline")
def test_ready_made_stacks_are_taken_page_by_page(shared_data, output, tmp_path):
    folder = shared_data / "bbbc021"
    index = pd.read_csv(folder / "cells.csv")
    chosen = index[index["plate"].isin(index["plate"].value_counts().index[-2:])]
    chosen = chosen.assign(file=[str(folder / name) for name in chosen["file"]])
    chosen.to_csv(tmp_path / "cells.csv", index=False)
    columns = {
        "file": "file",
        "page": "page_index",
        "Metadata_Plate": "plate",
        "Metadata_Well": "well",
        "Metadata_Site": "site",
        "Metadata_Compound": "compound",
    }
    stacks = {"index": str(tmp_path / "cells.csv"), "columns": columns, "channels": list(CHANNELS)}
    settings = {"stacks": stacks, "patch_size": 68, "output": str(output)}
    raw = {"prepare": settings | {"quality": {"drop": []}}, "tracking": {"enabled": False}}
    result = prepare(Config.model_validate(raw).resolve())
    assert result.totals["in"] == result.totals["out"] == len(chosen)
    cells = pd.read_parquet(output)
    assert cells.groupby("Metadata_Plate").size().to_dict() == (
        chosen.groupby("plate").size().to_dict()
    )
    row = chosen.iloc[len(chosen) // 2]
    found = cells[
        (cells["Metadata_Plate"] == row["plate"])
        & (cells["Metadata_Well"] == row["well"])
        & (cells["Metadata_Site"] == str(row["site"]))
        & (cells["Metadata_ObjectNumber"] == row["page_index"] + 1)
    ]
    stack = tifffile.imread(row["file"]).reshape(-1, 3, 68, 68)
    np.testing.assert_array_equal(patches_of(found, (3, 68, 68))[0], stack[row["page_index"]])


def spoil_missing_image(folder, section):
    next(folder.glob("images/**/*w2*.tif")).unlink()
    return "not found"


def spoil_position(folder, section):
    place = folder / "tables" / "Nuclei.csv"
    table = pd.read_csv(place)
    table.loc[3, ["Location_Center_X", "AreaShape_Center_X"]] = 999.0
    table.to_csv(place, index=False)
    return r"x=999\.0 is outside its 176 x 176 px"


def spoil_no_position(folder, section):
    place = folder / "tables" / "Nuclei.csv"
    table = pd.read_csv(place)
    table.drop(columns=[c for c in table if "Center" in c]).to_csv(place, index=False)
    return "patches need the nucleus centre"


def spoil_lfs_image(folder, section):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    next(folder.glob("images/**/*w1*.tif")).write_bytes(pointer)
    return "Git LFS pointer"


def spoil_lfs_table(folder, section):
    (folder / "tables" / "Image.csv").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
    )
    return r"Image\.csv: found a Git LFS pointer"


def spoil_rgb(folder, section):
    place = next(folder.glob("images/**/*w4*.tif"))
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((176, 176, 3), np.uint8)).save(buffer, "TIFF")
    place.write_bytes(buffer.getvalue())
    return "RGB"


def spoil_size(folder, section):
    place = next(folder.glob("images/**/*w4*.tif"))
    tifffile.imwrite(place, ndimage.zoom(tifffile.imread(place), 0.5, order=0))
    return "88"


def spoil_type(folder, section):
    for place in folder.glob("images/**/B02*.tif"):
        tifffile.imwrite(place, (tifffile.imread(place) >> 8).astype(np.uint8))
    return "of different types"


def spoil_table(folder, section):
    (folder / "tables" / "Nuclei.csv").write_text("ImageNumber,ObjectNumber,AreaShape_Area\n")
    return "Nuclei"


def spoil_columns(folder, section):
    section["channels"]["Actin"] = "Aktin"
    return r"FileName_Aktin.*did you mean 'FileName_Actin'"


def spoil_output(folder, section):
    (folder / "occupied").write_text("")
    section["output"] = str(folder / "occupied" / "cells")
    return "is a file where a folder is expected"


def spoil_twice(folder, section):
    shutil.copytree(folder / "tables", folder / "copy")
    section["tables"].append(str(folder / "copy"))
    return r"plate 'Week1_20000' is in .*tables already"


def spoil_other_pipeline(folder, section):
    copy = folder / "other"
    copy.mkdir()
    for name in ("Image", "Nuclei", "Cells", "Cytoplasm"):
        table = pd.read_csv(folder / "tables" / f"{name}.csv")
        if name == "Image":
            table["Metadata_Plate"] += "b"
        table.drop(columns="AreaShape_Extent", errors="ignore").to_csv(
            copy / f"{name}.csv", index=False
        )
    section["tables"].append(str(copy))
    return "measurements differ from the plates before it: missing .*Nuclei_AreaShape_Extent"


@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize(
    "spoil",
    [value for name, value in sorted(globals().items()) if name.startswith("spoil_")],
    ids=lambda spoil: spoil.__name__.removeprefix("spoil_"),
)
def test_bad_input_gets_one_clear_error_and_nothing_is_half_written(
    screen, tmp_path, capsys, spoil
):
    folder = tmp_path / "screen"
    shutil.copytree(screen, folder)
    output = folder / "cells"
    settings = settings_of(folder, output, quality={"drop": []})
    message = spoil(folder, settings["prepare"])
    place = tmp_path / "bad.yaml"
    place.write_text(yaml.safe_dump(settings))
    assert run_job("prepare", prepare, argv=["--config", str(place)]) == REFUSED
    shown = capsys.readouterr().err
    block = shown[shown.index("error: ") :]
    assert pytest.raises(AssertionError, match=message).matches(AssertionError(block)), block
    assert "Traceback" not in shown
    left = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    if (output / "_account.json").exists():
        account = json.loads((output / "_account.json").read_text())
        failed = set(account["failed"])
        assert failed
        left = {name for name in left if not any(plate in name for plate in account["plates"])}
        assert not any(plate in name for name in left for plate in failed)
    assert left <= {"_config.yaml", "_account.json"}


@pytest.mark.real_data
@pytest.mark.usefixtures("inline")
@pytest.mark.parametrize("name", ["lfs_pointer_metadata.csv", "lfs_pointer_metadata.parquet"])
def test_real_pointers_in_place_of_tables_are_named(shared_data, screen, output, capsys, name):
    place = output.parent / "bad.yaml"
    settings = settings_of(screen, output, tables=[str(shared_data / "hostile" / name)])
    place.write_text(yaml.safe_dump(settings))
    assert run_job("prepare", prepare, argv=["--config", str(place)]) == REFUSED
    assert f"{name}: found a Git LFS pointer" in capsys.readouterr().err
    assert not output.exists()
