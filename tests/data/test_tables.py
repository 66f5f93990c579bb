import gzip
import os
import pickle
import shutil
import sqlite3
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyarrow import fs as arrow_fs

from cp2image.data.locations import locate_fields
from cp2image.data.tables import join_metadata, nucleus_centers, open_table
from cp2image.errors import ColumnError, Cp2ImageError, StorageError, TableError

PLATES, WELLS, SITES, CELLS = ("P1", "007"), ("A01", "B02"), (1, 2), 5
MEASURED = (
    "AreaShape_Area",
    "AreaShape_Center_X",
    "AreaShape_Center_Y",
    "Texture_Entropy_DNA_3_00_256",
)
IDENTITY = [f"Metadata_{name}" for name in ("Plate", "Well", "Site", "ImageNumber", "ObjectNumber")]


def make_screen(seed=0):
    """Image rows and, per compartment, object rows; Cells are numbered backwards."""
    rng = np.random.default_rng(seed)
    images = pd.DataFrame(
        [
            {"Metadata_Plate": plate, "Metadata_Well": well, "Metadata_Site": site}
            for plate in PLATES
            for well in WELLS
            for site in SITES
        ]
    )
    images.insert(0, "ImageNumber", np.arange(len(images)) + 1)
    images["FileName_DNA"] = [f"{number}_dna.tif" for number in images.ImageNumber]
    images["PathName_DNA"] = "/scratch/images/" + images.Metadata_Plate
    objects = {}
    for compartment in ("Nuclei", "Cells", "Cytoplasm"):
        rows = pd.DataFrame(
            [(i, n) for i in images.ImageNumber for n in range(1, CELLS + 1)],
            columns=["ImageNumber", "ObjectNumber"],
        )
        for name in MEASURED:
            rows[name] = rng.uniform(1, 500, len(rows))
        objects[compartment] = rows
        images[f"Count_{compartment}"] = CELLS
    objects["Cells"]["Parent_Nuclei"] = CELLS + 1 - objects["Cells"].ObjectNumber
    objects["Cytoplasm"]["Parent_Cells"] = objects["Cytoplasm"].ObjectNumber
    return images, objects


def expected_rows(images, objects):
    """The oracle: look every object up, one cell after the other."""
    rows = []
    for _, image in images.iterrows():
        for number in range(1, CELLS + 1):
            cell_number = CELLS + 1 - number
            row = {
                "Metadata_Plate": image.Metadata_Plate,
                "Metadata_Well": image.Metadata_Well,
                "Metadata_Site": str(image.Metadata_Site),
                "Metadata_ImageNumber": image.ImageNumber,
                "Metadata_ObjectNumber": number,
            }
            numbers = {"Nuclei": number, "Cells": cell_number, "Cytoplasm": cell_number}
            for compartment, own in numbers.items():
                table = objects[compartment]
                at = (table.ImageNumber == image.ImageNumber) & (table.ObjectNumber == own)
                for name in MEASURED:
                    row[f"{compartment}_{name}"] = np.float32(table.loc[at, name].item())
            rows.append(row)
    return pd.DataFrame(rows)


def write_spreadsheets(folder, images, objects, prefix=""):
    folder.mkdir(parents=True, exist_ok=True)
    images.to_csv(folder / f"{prefix}Image.csv", index=False)
    for name, rows in objects.items():
        rows.to_csv(folder / f"{prefix}{name}.csv", index=False)
    (folder / f"{prefix}Experiment.csv").write_text("Key,Value\nCellProfiler_Version,4.2.8\n")
    return str(folder)


def write_runs(folder, images, objects, prefix=""):
    for plate, rows in images.groupby("Metadata_Plate"):
        first = rows.ImageNumber.min() - 1
        one = {
            name: table[table.ImageNumber.isin(rows.ImageNumber)].assign(
                ImageNumber=lambda t, first=first: t.ImageNumber - first
            )
            for name, table in objects.items()
        }
        write_spreadsheets(
            folder / f"run-{plate}", rows.assign(ImageNumber=rows.ImageNumber - first), one
        )
    return str(folder)


def prefixed(objects, number):
    return {
        name: rows.rename(columns={"ObjectNumber": number.format(name)}).rename(
            columns=lambda text, name=name: (
                f"{name}_{text}" if text in MEASURED or "Parent" in text else text
            )
        )
        for name, rows in objects.items()
    }


def write_single_table_database(path, images, objects, prefix="MyExpt_Per_"):
    path = path / "screen.sqlite"
    tables = prefixed(objects, "ObjectNumber")
    combined = None
    for name, rows in tables.items():
        rows = rows.assign(**{f"{name}_Number_Object_Number": rows.ObjectNumber})
        on = ["ImageNumber", "ObjectNumber"]
        combined = rows if combined is None else combined.merge(rows, on=on, how="outer")
    with sqlite3.connect(path) as connection:
        stored = images.rename(columns=lambda n: n if n == "ImageNumber" else f"Image_{n}")
        stored.to_sql(f"{prefix}Image", connection, index=False)
        combined.to_sql(f"{prefix}Object", connection, index=False)
        pd.DataFrame({"a": [1]}).to_sql(f"{prefix}Experiment", connection, index=False)
    connection.close()
    return str(path)


def write_compartment_database(path, images, objects):
    path = path / "screen.db"
    with sqlite3.connect(path) as connection:
        stored = images.rename(columns=lambda n: n if n == "ImageNumber" else f"Image_{n}")
        stored.to_sql("Per_Image", connection, index=False)
        for name, rows in prefixed(objects, "{}_Number_Object_Number").items():
            rows.to_sql(f"Per_{name}", connection, index=False)
    connection.close()
    return str(path)


def one_row_per_cell(images, objects):
    rows = expected_rows(images, objects).merge(
        images.rename(columns={"ImageNumber": "Metadata_ImageNumber"})[
            ["Metadata_ImageNumber", "FileName_DNA", "PathName_DNA"]
        ],
        on="Metadata_ImageNumber",
    )
    return rows.rename(columns=lambda n: f"Image_{n}" if n.startswith(("File", "Path")) else n)


def write_cytotable(path, images, objects):
    rows = one_row_per_cell(images, objects).rename(
        columns={
            "Metadata_Plate": "Image_Metadata_Plate",
            "Metadata_Well": "Image_Metadata_Well",
            "Metadata_Site": "Image_Metadata_Site",
            "Metadata_ObjectNumber": "Metadata_Nuclei_Number_Object_Number",
            "Nuclei_AreaShape_Center_X": "Metadata_Nuclei_AreaShape_Center_X",
        }
    )
    rows["Metadata_Cytoplasm_Parent_Cells"] = 1
    rows.to_parquet(path / "cytotable.parquet")
    return str(path / "cytotable.parquet")


def write_partitioned(path, images, objects):
    rows = one_row_per_cell(images, objects).replace({"Metadata_Plate": {"007": "P007"}})
    rows.to_parquet(path / "cells", partition_cols=["Metadata_Plate"])
    return str(path / "cells")


def write_cell_csv(path, images, objects):
    rows = one_row_per_cell(images, objects)
    with gzip.open(path / "cells.csv.gz", "wt") as sink:
        rows.to_csv(sink, index=False)
    return str(path / "cells.csv.gz")


def write_prefixed_spreadsheets(path, images, objects):
    return write_spreadsheets(path / "export", images, objects, prefix="MyExpt_")


WRITERS = {
    "spreadsheets": write_prefixed_spreadsheets,
    "folder per run": write_runs,
    "Per_Object": write_single_table_database,
    "supplement_Object": partial(write_single_table_database, prefix="supplement_"),
    "Per_Nuclei": write_compartment_database,
    "CytoTable": write_cytotable,
    "partitioned Parquet": write_partitioned,
    "CSV of cells": write_cell_csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_cells_plate_by_plate_or_at_once(name, tmp_path):
    images, objects = make_screen()
    expected = expected_rows(images, objects)
    table = open_table(WRITERS[name](tmp_path, images, objects))
    if name == "folder per run":
        first = expected.groupby("Metadata_Plate").Metadata_ImageNumber.transform("min")
        expected.Metadata_ImageNumber += 1 - first
    if name == "partitioned Parquet":
        expected = expected.replace({"Metadata_Plate": {"007": "P007"}})
    assert table.plates == sorted(set(expected.Metadata_Plate))
    whole = table.read()
    assert list(whole)[:5] == IDENTITY
    assert set(whole.dtypes[list(expected)[5:]]) == {np.dtype(np.float32)}
    by_plate = pd.concat([table.read(plate) for plate in table.plates])
    for found in (whole, by_plate):
        found = found.sort_values(IDENTITY, ignore_index=True)[list(expected)]
        wanted = expected.sort_values(IDENTITY, ignore_index=True)
        pd.testing.assert_frame_equal(found, wanted, check_dtype=False)
    assert whole.attrs["account"]["cells"] == whole.attrs["account"]["objects"] == len(expected)


def test_runs_that_number_their_images_anew_and_pycytominers_merge_of_them_agree(tmp_path):
    """cytominer-database's layout: TableNumber and ImageNumber together name an image set."""
    cells = pytest.importorskip("pycytominer.cyto_utils.cells")
    images, objects = make_screen()
    expected = expected_rows(images, objects)
    objects["Cytoplasm"]["Parent_Nuclei"] = objects["Cells"].Parent_Nuclei
    table_of = images.set_index("ImageNumber").Metadata_Plate.map({"P1": 11, "007": 22})
    path = tmp_path / "backend.sqlite"
    connection = sqlite3.connect(path)
    for name, rows in {"Image": images, **prefixed(objects, "ObjectNumber")}.items():
        stored = rows.assign(
            TableNumber=rows.ImageNumber.map(table_of), ImageNumber=(rows.ImageNumber - 1) % 4 + 1
        )
        if name == "Image":
            keys = ("ImageNumber", "TableNumber")
            stored = stored.rename(columns=lambda n, keys=keys: n if n in keys else f"Image_{n}")
        stored.to_sql(name, connection, index=False)
    connection.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pycytominer announces CytoTable as successor
        merged = cells.SingleCells(
            f"sqlite:///{path}",
            strata=["Image_Metadata_Plate", "Image_Metadata_Well"],
            image_cols=["TableNumber", "ImageNumber", "Image_Metadata_Site"],
            fields_of_view_feature="Image_Metadata_Site",
        ).merge_single_cells()
    merged.to_parquet(tmp_path / "merged.parquet")
    expected.Metadata_ImageNumber = (expected.Metadata_ImageNumber - 1) % 4 + 1
    for uri in (path, tmp_path / "merged.parquet"):
        table = open_table(str(uri))
        found = pd.concat([table.read(plate) for plate in ("007", "P1")])[list(expected)]
        pd.testing.assert_frame_equal(
            found.sort_values(IDENTITY, ignore_index=True),
            expected.sort_values(IDENTITY, ignore_index=True),
            check_dtype=False,
        )


@pytest.fixture(scope="module")
def bucket():
    """A local S3 server with the bucket ``screens``, and the standard variables set."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host = "{}:{}".format(*server.get_host_and_port())
    patch = pytest.MonkeyPatch()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}")
    patch.setenv("AWS_ACCESS_KEY_ID", "key")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    files = arrow_fs.S3FileSystem(
        access_key="key",
        secret_key="secret",
        endpoint_override=host,
        scheme="http",
        region="us-east-1",
        allow_bucket_creation=True,
    )
    files.create_dir("screens")
    yield files
    patch.undo()
    server.stop()


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_from_object_storage_too(name, tmp_path, bucket):
    local = WRITERS[name](tmp_path, *make_screen())
    folder = name.replace(" ", "-")
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        with bucket.open_output_stream(
            f"screens/{folder}/{path.relative_to(tmp_path)}", compression=None
        ) as sink:
            sink.write(path.read_bytes())
    target = f"s3://screens/{folder}"
    remote = open_table(target + local[len(str(tmp_path)) :])
    here = open_table(local)
    pd.testing.assert_frame_equal(remote.images(), here.images())
    pd.testing.assert_frame_equal(remote.read("P1"), here.read("P1"))


@pytest.mark.parametrize("name", WRITERS)
def test_images_list_every_set_once_with_its_files(name, tmp_path):
    images, objects = make_screen()
    table = open_table(WRITERS[name](tmp_path, images, objects))
    found = table.images()
    assert len(found) == len(images)
    assert sorted(found.FileName_DNA) == sorted(images.FileName_DNA)
    again = pickle.loads(pickle.dumps(table))
    pd.testing.assert_frame_equal(again.read(table.plates[0]), table.read(table.plates[0]))


def test_cells_without_partner_are_left_out_and_counted(tmp_path):
    images, objects = make_screen()
    objects["Cells"] = objects["Cells"].drop(index=[3, 17])
    objects["Cytoplasm"] = objects["Cytoplasm"].drop(index=[3, 17, 20])
    objects["Cells"].loc[30, "Parent_Nuclei"] = 0
    images = images.drop(columns=["Count_Cells", "Count_Cytoplasm"])
    table = open_table(write_spreadsheets(tmp_path, images, objects))
    cells = table.read()
    account = cells.attrs["account"]
    assert account["objects"] == 40
    assert account["cells"] == len(cells) == 36
    assert account["without_Cells"] == 3
    assert account["without_Cytoplasm"] == 4
    assert account["Cells_without_parent"] == 1


def test_objects_that_are_no_compartment_are_ignored_unless_asked_for(tmp_path):
    images, objects = make_screen()
    spots = objects["Nuclei"].iloc[[0, 7]].rename(columns={"ObjectNumber": "Parent_Nuclei"})
    objects["PH3"] = spots.assign(ObjectNumber=1)
    folder = write_spreadsheets(tmp_path, images, objects)
    table = open_table(folder)
    assert [name.rsplit("/", 1)[1] for name in table.ignored] == ["Experiment.csv", "PH3.csv"]
    assert not any(name.startswith("PH3") for name in table.read())
    asked = open_table(folder, compartments=["Nuclei", "PH3"]).read()
    assert len(asked) == 2
    assert asked.attrs["account"]["without_PH3"] == 38


def test_infinite_values_become_nan_and_are_counted_by_column(tmp_path):
    images, objects = make_screen()
    objects["Nuclei"].loc[[0, 3], "AreaShape_Area"] = [np.inf, -np.inf]
    objects["Cells"].loc[5, "AreaShape_Area"] = np.nan
    cells = open_table(write_spreadsheets(tmp_path, images, objects)).read()
    account = cells.attrs["account"]
    assert account["infinite_columns"] == {"Nuclei_AreaShape_Area": 2}
    assert account["infinite_values"] == 2
    assert account["nan_values"] == 1
    assert cells.Nuclei_AreaShape_Area.isna().sum() == 2


def test_a_table_without_plate_well_and_site_gets_the_documented_names(tmp_path):
    images, objects = make_screen()
    images = images.drop(columns=["Metadata_Plate", "Metadata_Well", "Metadata_Site"])
    found = open_table(write_spreadsheets(tmp_path, images, objects)).images()
    assert set(found.Metadata_Plate) == {"plate"}
    assert set(found.Metadata_Well) == {"well"}
    assert list(found.Metadata_Site) == [str(number) for number in found.Metadata_ImageNumber]


@pytest.mark.parametrize(
    ("theirs", "given"),
    [
        ("Image_Metadata_Plate_DNA", None),
        ("Metadata_PlateID", None),
        ("Metadata_Run", {"Metadata_Plate": "Metadata_Run"}),
    ],
)
def test_the_plate_is_found_under_its_usual_names_or_the_given_one(theirs, given, tmp_path):
    images, objects = make_screen()
    images = images.rename(columns={"Metadata_Plate": theirs})
    table = open_table(write_spreadsheets(tmp_path, images, objects), metadata=given)
    assert table.plates == ["007", "P1"]


def test_a_misspelled_metadata_choice_names_the_nearest_column(tmp_path):
    folder = write_spreadsheets(tmp_path, *make_screen())
    with pytest.raises(ColumnError, match=r"'Metadata_Wel'.*did you mean 'Metadata_Well'"):
        open_table(folder, metadata={"Metadata_Well": "Metadata_Wel"}).images()


def test_a_plate_map_and_a_compound_list_are_joined_one_after_the_other(tmp_path):
    folder = write_spreadsheets(tmp_path / "run", *make_screen())
    (tmp_path / "map.csv").write_text(
        "Image_Metadata_Plate_DAPI,Image_Metadata_Well_DAPI,FileName_DAPI,Image_Metadata_Compound,"
        "Image_Metadata_Concentration,Replicate\n"
        "P1,A01,1.tif,taxol,0.3,1\nP1,A01,2.tif,taxol,0.3,1\n007,A01,3.tif,DMSO,0.0,2\n"
    )
    (tmp_path / "moa.csv").write_text(
        '"compound",concentration,"moa"\n"taxol",0.300000,"Stabil."\n'
    )
    table = join_metadata(
        open_table(folder), str(tmp_path / "map.csv"), ["Metadata_Plate", "Metadata_Well"]
    )
    on = ["Metadata_Compound", "Metadata_Concentration"]
    cells = join_metadata(table, str(tmp_path / "moa.csv"), on).read("P1")
    first = cells[cells.Metadata_Well == "A01"]
    assert set(first.Metadata_Compound) == {"taxol"}
    assert set(first.Metadata_Concentration) == {0.3}
    assert set(first.Metadata_MOA) == {"Stabil."}
    assert set(first.Metadata_Replicate) == {"1"}
    assert cells[cells.Metadata_Well == "B02"].Metadata_MOA.isna().all()
    assert list(cells)[5:8] == ["Metadata_Compound", "Metadata_Concentration", "Metadata_MOA"]


def test_a_key_that_is_a_number_in_one_file_and_text_in_the_other_still_joins(tmp_path):
    rows = one_row_per_cell(*make_screen()).assign(Metadata_Batch=7)
    rows.to_parquet(tmp_path / "cells.parquet")
    (tmp_path / "batches.csv").write_text("Batch,Operator\n 7 ,me \n8,you\n")
    table = open_table(str(tmp_path / "cells.parquet"))
    found = join_metadata(table, str(tmp_path / "batches.csv"), ["Metadata_Batch"]).images()
    assert set(found.Metadata_Operator) == {"me"}
    assert set(found.Metadata_Batch) == {7}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("plate,compound\nP1,a\nP1,b\n", "2 different rows .* Metadata_Compound"),
        ("plate,compound\nP9,a\n", "no image set"),
        ("well,compound\nA01,a\n", "Metadata_Plate"),
        ("plate,well\nP1,A01\n", "'Metadata_Well' is in"),
    ],
)
def test_metadata_that_do_not_fit_are_refused(text, says, tmp_path):
    folder = write_spreadsheets(tmp_path / "run", *make_screen())
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(Cp2ImageError, match=says):
        join_metadata(open_table(folder), str(tmp_path / "map.csv"), ["Metadata_Plate"]).images()


def test_files_are_found_below_another_root_or_by_replacing_the_start(tmp_path):
    images, objects = make_screen()
    found = open_table(write_spreadsheets(tmp_path, images, objects)).images()
    assert locate_fields(found, ["DNA"]).DNA[0] == "/scratch/images/P1/1_dna.tif"
    assert locate_fields(found, ["DNA"], root="s3://b/x").DNA[0] == "s3://b/x/1_dna.tif"
    moved = locate_fields(found, ["DNA"], replace={"/scratch": "s3://b"})
    assert moved.DNA[0] == "s3://b/images/P1/1_dna.tif"
    relative = found.assign(PathName_DNA="Week1\\P1")
    assert locate_fields(relative, ["DNA"], root="/d").DNA[0] == "/d/Week1/P1/1_dna.tif"
    with pytest.raises(ColumnError, match=r"FileName_DAN.*FileName_DNA"):
        locate_fields(found, ["DAN"])
    with pytest.raises(TableError, match=r"'DNA'.*P1"):
        locate_fields(found.assign(FileName_DNA=np.nan), ["DNA"])


def test_nucleus_centers_are_y_then_x_and_asked_for_by_name():
    frame = pd.DataFrame({"Nuclei_AreaShape_Center_X": [1.5], "Nuclei_AreaShape_Center_Y": [7.0]})
    np.testing.assert_array_equal(nucleus_centers(frame), [[7.0, 1.5]])
    with pytest.raises(ColumnError, match="Cells_Location_Center_X"):
        nucleus_centers(frame, "Cells")


def break_column(folder):
    text = (folder / "Nuclei.csv").read_text().replace("ObjectNumber", "ObjectNumbr", 1)
    (folder / "Nuclei.csv").write_text(text)


def double_column(folder):
    text = (folder / "Cells.csv").read_text().replace("AreaShape_Center_X", "AreaShape_Area", 1)
    (folder / "Cells.csv").write_text(text)


def spell_number(folder):
    lines = (folder / "Nuclei.csv").read_text().splitlines()
    lines[3] = "1,3,broken" + lines[3][lines[3].index(",", 4) :]
    (folder / "Nuclei.csv").write_text("\n".join(lines) + "\n")


def repeat_object(folder):
    with open(folder / "Nuclei.csv", "a") as sink:
        sink.write("1,3,1,1,1,1\n")


def drop_image(folder):
    lines = (folder / "Image.csv").read_text().splitlines(keepends=True)
    (folder / "Image.csv").write_text("".join(lines[:-1]))


def repeat_image(folder):
    lines = (folder / "Image.csv").read_text().splitlines(keepends=True)
    (folder / "Image.csv").write_text("".join([*lines, lines[1]]))


def empty_table(folder):
    lines = (folder / "Image.csv").read_text().splitlines(keepends=True)
    (folder / "Image.csv").write_text(lines[0])


def no_cells(folder):
    images = pd.read_csv(folder / "Image.csv").drop(columns=["Count_Nuclei", "Count_Cells"])
    images.drop(columns="Count_Cytoplasm").to_csv(folder / "Image.csv", index=False)
    for name in ("Nuclei", "Cells", "Cytoplasm"):
        text = (folder / f"{name}.csv").read_text().splitlines()[0]
        (folder / f"{name}.csv").write_text(text + "\n")


def empty_file(folder):
    (folder / "Cells.csv").write_bytes(b"")


def cut_within_a_row(folder):
    text = (folder / "Cytoplasm.csv").read_text()
    (folder / "Cytoplasm.csv").write_text(text[: text.index("\n", len(text) // 2) + 12])


def cut_between_rows(folder):
    lines = (folder / "Cytoplasm.csv").read_text().splitlines(keepends=True)
    (folder / "Cytoplasm.csv").write_text("".join(lines[:20]))


def dangle_parent(folder):
    cells = pd.read_csv(folder / "Cells.csv")
    cells.loc[2, "Parent_Nuclei"] = 77
    cells.to_csv(folder / "Cells.csv", index=False)


def share_parent(folder):
    cells = pd.read_csv(folder / "Cells.csv")
    cells.loc[2, "Parent_Nuclei"] = 1
    cells.to_csv(folder / "Cells.csv", index=False)


def renumber_without_parents(folder):
    cells = pd.read_csv(folder / "Cells.csv").drop(columns="Parent_Nuclei")
    cells.loc[4, "ObjectNumber"] = 99
    cells.to_csv(folder / "Cells.csv", index=False)


def drop_a_plate_name(folder):
    images = pd.read_csv(folder / "Image.csv", dtype=str)
    images.loc[3, "Metadata_Plate"] = ""
    images.to_csv(folder / "Image.csv", index=False)


def lose_compartment(folder):
    for name in ("Nuclei", "Cells", "Cytoplasm"):
        shutil.move(folder / f"{name}.csv", folder / f"{name}x.csv")


@pytest.mark.parametrize(
    ("harm", "kind", "says"),
    [
        (break_column, ColumnError, r"Nuclei.csv.*'ObjectNumber'.*did you mean 'ObjectNumbr'"),
        (double_column, ColumnError, r"Cells.csv.*more than once: AreaShape_Area"),
        (spell_number, ColumnError, r"Nuclei.csv: line 4, column 'AreaShape_Area': found 'broken'"),
        (repeat_object, TableError, r"Nuclei.*6 rows.*counts 5"),
        (drop_image, TableError, r"Nuclei.csv: line 37 has ImageNumber 8.*Image.csv"),
        (repeat_image, TableError, r"1 image sets occur more than once.*'P1'"),
        (empty_table, TableError, r"no rows"),
        (no_cells, TableError, r"8 image sets, but not one complete cell"),
        (empty_file, TableError, r"Cells.csv: the file is empty"),
        (cut_within_a_row, TableError, r"Cytoplasm.csv.*truncated"),
        (cut_between_rows, TableError, r"Cytoplasm.csv: ImageNumber 4 has 4 rows.*counts 5"),
        (dangle_parent, TableError, r"Cells_Parent_Nuclei.*ObjectNumber 3 .*77"),
        (share_parent, TableError, r"1 Cells share one of the Nuclei.*ObjectNumber"),
        (renumber_without_parents, TableError, r"do not match .*ObjectNumber 99"),
        (drop_a_plate_name, TableError, r"1 of 8 image sets have no Metadata_Plate.*ImageNumber 4"),
        (lose_compartment, TableError, r"no table of Nuclei or Cells.*Nucleix"),
    ],
)
def test_a_damaged_export_is_refused_with_file_place_and_value(harm, kind, says, tmp_path):
    folder = tmp_path / "run"
    write_spreadsheets(folder, *make_screen())
    assert len(open_table(str(folder)).read()) == 40
    harm(folder)
    with pytest.raises(kind, match=says):
        open_table(str(folder)).read()


def test_objects_repeated_without_counts_are_refused(tmp_path):
    images, objects = make_screen()
    objects["Nuclei"] = pd.concat([objects["Nuclei"], objects["Nuclei"].iloc[[2]]])
    folder = write_spreadsheets(tmp_path, images.drop(columns="Count_Nuclei"), objects)
    with pytest.raises(TableError, match="Nuclei: 1 rows repeat ImageNumber 1, ObjectNumber 3"):
        open_table(folder).read()


def test_a_cell_that_occurs_twice_in_a_cell_file_is_refused(tmp_path):
    rows = one_row_per_cell(*make_screen())
    pd.concat([rows, rows.iloc[[4]]]).to_parquet(tmp_path / "cells.parquet")
    with pytest.raises(
        TableError, match=r"1 cells occur more than once.*'Metadata_ObjectNumber': 5"
    ):
        open_table(str(tmp_path / "cells.parquet")).read()


def test_text_in_a_parquet_feature_names_cell_and_value(tmp_path):
    rows = one_row_per_cell(*make_screen()).astype({"Cells_AreaShape_Area": str})
    rows.loc[6, "Cells_AreaShape_Area"] = "broken"
    rows.to_parquet(tmp_path / "cells.parquet")
    says = r"Cells_AreaShape_Area.*ImageNumber 2, ObjectNumber 2: found 'broken'"
    with pytest.raises(ColumnError, match=says):
        open_table(str(tmp_path / "cells.parquet")).read()


def test_cells_of_unknown_images_in_a_database_are_refused(tmp_path):
    path = write_compartment_database(tmp_path, *make_screen())
    connection = sqlite3.connect(path)
    connection.execute("DELETE FROM Per_Image WHERE ImageNumber = 8")
    connection.commit()
    connection.close()
    with pytest.raises(TableError, match="Per_Nuclei has cells of ImageNumber 8"):
        open_table(path).read("P1")


@pytest.mark.parametrize("name", ["Per_Object", "CytoTable"])
def test_a_truncated_file_is_refused(name, tmp_path):
    path = WRITERS[name](tmp_path, *make_screen())
    with open(path, "r+b") as file:
        file.truncate(9000)
    with pytest.raises(TableError, match=r"(screen\.sqlite|cytotable\.parquet).*truncated"):
        open_table(path).read()


def test_reading_a_database_leaves_it_untouched(tmp_path):
    path = write_single_table_database(tmp_path, *make_screen())
    before = (tmp_path / "screen.sqlite").read_bytes()
    open_table(path).read()
    assert (tmp_path / "screen.sqlite").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["screen.sqlite"]


def test_an_unknown_plate_names_the_nearest(tmp_path):
    table = open_table(write_spreadsheets(tmp_path, *make_screen()))
    with pytest.raises(TableError, match=r"no plate 'P11' \(did you mean 'P1'\?\)"):
        table.read("P11")


def test_what_is_no_table_is_named(tmp_path):
    with pytest.raises(StorageError, match="nothing there"):
        open_table(str(tmp_path / "nothing"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(TableError, match=r"found notes\.txt; expected"):
        open_table(str(tmp_path))
    with pytest.raises(TableError, match="starts with b'hello'"):
        open_table(str(tmp_path / "notes.txt"))
    (tmp_path / "profiles.csv").write_text("Metadata_ImageNumber,ObjectNumber,height\n1,1,2\n")
    with pytest.raises(ColumnError, match="none of its 3 columns is a CellProfiler measurement"):
        open_table(str(tmp_path / "profiles.csv"))


@pytest.mark.real_data
def test_all_289_cells_of_cellprofilers_own_export_are_read(shared_data):
    table = open_table(str(shared_data / "examplehuman"))
    assert [name.rsplit("/", 1)[1] for name in table.ignored] == ["Experiment.csv", "PH3.csv"]
    cells = table.read(*table.plates)
    account = cells.attrs["account"]
    assert account["objects"] == account["cells"] == len(cells) == 289
    assert account["without_Cells"] == account["without_Cytoplasm"] == 0
    for name in ("Nuclei", "Cells", "Cytoplasm"):
        plain = pd.read_csv(shared_data / "examplehuman" / f"{name}.csv")
        for feature in ("AreaShape_Area", "Intensity_MeanIntensity_DNA"):
            np.testing.assert_allclose(cells[f"{name}_{feature}"], plain[feature], rtol=1e-6)


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["lfs_pointer_metadata.csv", "lfs_pointer_metadata.parquet"])
def test_lfs_pointers_are_refused_as_such(name, shared_data):
    with pytest.raises(TableError, match=rf"{name}: found a Git LFS pointer"):
        open_table(str(shared_data / "hostile" / name))


@pytest.mark.real_data
def test_bbbc021s_own_metadata_files_are_joined(shared_data, tmp_path):
    profiles = shared_data / "bbbc021" / "well_profiles"
    images, objects = make_screen()
    images["Metadata_Plate"], images["Metadata_Well"] = "Week4_27481", "G10"
    images["Metadata_Site"] = images.ImageNumber
    table = open_table(write_spreadsheets(tmp_path, images, objects))
    on = ["Metadata_Plate", "Metadata_Well"]
    table = join_metadata(table, str(profiles / "BBBC021_v1_image.csv.gz"), on)
    on = ["Metadata_Compound", "Metadata_Concentration"]
    found = join_metadata(table, str(profiles / "BBBC021_v1_moa_unix.csv"), on)
    with pytest.raises(TableError, match="no image set"):  # 5-fluorouracil has no known mechanism
        found.images()
    assert set(table.images().Metadata_Compound) == {"5-fluorouracil"}
    assert set(table.images().Metadata_Concentration) == {0.003}
